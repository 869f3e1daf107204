"""Kept clean passes: the same losses and steps, found again, and never the wrong ones."""

from __future__ import annotations

import pytest
import torch

from bad_neurons.tuning.clean_cache import CleanCache, CleanPass
from bad_neurons.tuning.module import NeuronTuner

LENGTHS = [(5, 4), (9, 2), (7, 7)]


@pytest.fixture
def attached(tuner, choose, tiny):
    """``attached(**options)``: a tuner with the same random deltas every time."""

    def made(**options):
        module = tuner(beta=0.1, **options)
        edit = module.attach_neurons(choose(tiny()))
        torch.manual_seed(3)
        edit.restore({name: 0.3 * torch.randn_like(value) for name, value in edit.deltas().items()})
        return module

    return made


def value_and_gradients(module, batch):
    for parameter in module.edit.trainable():
        parameter.grad = None
    sums = module.losses(batch)
    sums.loss.backward()
    return [s.detach().clone() for s in sums], [p.grad.clone() for p in module.edit.trainable()]


def equal(one, other):
    return all(torch.equal(a, b) for side, theirs in zip(one, other, strict=True) for a, b in zip(side, theirs, strict=True))


def test_cached_is_uncached_bit_for_bit(attached, make_batch, tmp_path):
    batches = [make_batch(LENGTHS, [11, 16], seed=i, teacher=LENGTHS if i else None) for i in range(2)]
    nothing, memory, disk = attached(cache_gb=0.0), attached(), attached(cache_gb=0.0, cache_folder=str(tmp_path / "clean"))
    for batch in batches:
        expected = value_and_gradients(nothing, batch)
        for module in (nothing, memory, disk):
            assert equal(value_and_gradients(module, batch), expected)  # makes the entry
            assert equal(value_and_gradients(module, batch), expected)  # reads it
    assert [(m.clean_cache.hits, m.clean_cache.misses) for m in (nothing, memory, disk)] == [(0, 6), (2, 2), (2, 2)]
    later = attached(cache_gb=0.0, cache_folder=str(tmp_path / "clean"))  # another run
    assert equal(value_and_gradients(later, batches[1]), value_and_gradients(nothing, batches[1]))
    assert (later.clean_cache.hits, later.clean_cache.misses) == (1, 0)


def test_layers_below_the_edit_do_not_run_for_a_cached_batch(attached, make_batch):
    module, ran = attached(), []
    for number, part in enumerate(module.view.layers):
        part.mlp.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    module.losses(make_batch(LENGTHS))
    assert ran == [0, 1, 2, 3, 1, 2, 3]  # the clean pass, then the edited layers
    ran.clear()
    module.losses(make_batch(LENGTHS))
    assert ran == [1, 2, 3]


def test_a_fit_reads_each_batch_once(tuner, neurons, fit, make_batch):
    batches = [make_batch(LENGTHS, [11], seed=i) for i in range(4)]
    cached, uncached = tuner(lr=0.01), tuner(lr=0.01, cache_gb=0.0)
    steps = [fit(module, neurons(), batches, max_epochs=3).steps for module in (cached, uncached)]
    assert len(steps[0]) == 12
    assert all(torch.equal(mine[name], theirs[name]) for mine, theirs in zip(*steps, strict=True) for name in mine)
    assert (cached.clean_cache.hits, cached.clean_cache.misses) == (8, 4)
    assert uncached.clean_cache.hits == 0


def test_checkpointing_changes_nothing_but_rounding(attached, make_batch):
    batch = make_batch(LENGTHS, [11])
    sums, grads = value_and_gradients(attached(), batch)
    other, theirs = value_and_gradients(attached(checkpointing=True), batch)
    for mine, their in zip([*sums, *grads], [*other, *theirs], strict=True):
        torch.testing.assert_close(their, mine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_kl_is_zero_where_nothing_has_changed(tuner, choose, tiny, make_batch, checkpointing):
    module = tuner(checkpointing=checkpointing)
    module.attach_neurons(choose(tiny()))
    assert module.losses(make_batch(LENGTHS, [11])).kl.item() == 0.0


def some(n=3, seed=0):
    torch.manual_seed(seed)
    return CleanPass(torch.randn(n, 4), torch.randn(2, 4))


def test_memory_up_to_the_budget_and_the_rest_on_disk(tmp_path):
    cache = CleanCache(200, tmp_path, "origin")
    passes = {name: some(seed=number) for number, name in enumerate("abc")}  # (12 + 8) x 4 bytes each
    for name, clean in passes.items():
        cache.put(name, clean)
    assert sorted(cache._kept) == ["a", "b"]
    assert len(list(tmp_path.glob("origin/*.safetensors"))) == 3
    for name, clean in passes.items():
        assert all(torch.equal(x, y) for x, y in zip(cache.get(name)[:2], clean[:2], strict=True))
    assert cache.get("d") is None
    bounded = CleanCache(200, None, "origin")
    for name, clean in passes.items():
        bounded.put(name, clean)
    assert [bounded.get(name) is None for name in "abc"] == [False, False, True]


def test_origins_lie_side_by_side(tmp_path):
    kept = {origin: some(seed=seed) for seed, origin in enumerate(("one", "other"))}
    for origin, clean in kept.items():
        CleanCache(0, tmp_path, origin).put("a", clean)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")) == [
        "one/a.safetensors",
        "other/a.safetensors",
    ]
    for origin, clean in kept.items():
        assert torch.equal(CleanCache(0, tmp_path, origin).get("a").hidden, clean.hidden)
    assert CleanCache(0, tmp_path, "third").get("a") is None


def test_tuners_share_a_cache_of_their_origin(tiny, tuner, choose, make_batch):
    lm, batch = tiny(), make_batch(LENGTHS, [11])
    first = NeuronTuner.of(lm)
    first.attach_neurons(choose(lm))
    first.losses(batch)
    first.edit.remove()
    second, lower = NeuronTuner.of(lm), NeuronTuner.of(lm)
    second.attach_neurons(choose(lm, "intermediate"), cache=first.clean_cache)
    assert second.clean_cache is first.clean_cache
    found = value_and_gradients(second, batch)
    assert (second.clean_cache.hits, second.clean_cache.misses) == (1, 1)
    alone = tuner()
    alone.attach_neurons(choose(tiny(), "intermediate"))
    assert equal(found, value_and_gradients(alone, batch))
    second.edit.remove()
    lower.attach_neurons(choose(lm, layers={0: [1], 3: [2]}), cache=first.clean_cache)
    assert lower.clean_cache is not first.clean_cache


def test_the_origin_follows_model_dtype_and_layer(attached, tuner, choose, tiny):
    first = attached().clean_cache.origin
    assert attached().clean_cache.origin == first
    lower, coarse = tuner(), tuner(dtype="bfloat16")
    lower.attach_neurons(choose(tiny(), layers={0: [1], 3: [2]}))
    coarse.attach_neurons(choose(tiny()))
    assert len({first, lower.clean_cache.origin, coarse.clean_cache.origin}) == 3
