"""NeuronTuner: what moves, what does not, and by how much."""

from __future__ import annotations

import pytest
import torch
from bad_neurons.callbacks import GradientMask
from jsonargparse import ArgumentParser
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from bad_neurons.errors import UserError
from bad_neurons.models.view import view_decoder
from bad_neurons.selection.axes import PARTS
from bad_neurons.tuning.module import NeuronTuner

CHOSEN = {1: [0, 5, 15], 3: [2]}
LENGTHS = ([(5, 4), (9, 2), (7, 7)], [(12, 3), (3, 1), (6, 6)], [(4, 9), (10, 5)], [(8, 2), (8, 1), (2, 2), (5, 5)])


@pytest.fixture
def batches(make_batch):
    """``batches(n)``: n batches of unequal lengths, each with retention text beside it."""
    return lambda n: [make_batch(LENGTHS[i % 4], [11, 16], seed=i) for i in range(n)]


def owns_rows(axis, matrix):
    return next(part.rows for part in PARTS[axis] if part.matrix == matrix)


def weights(module):
    return {name: p.detach().clone() for name, p in module.lm.named_parameters()}


def moved(before, after):
    """Names of the parameters that are not bit-equal."""
    return {name for name in before if not torch.equal(before[name].view(torch.int32), after[name].view(torch.int32))}


@pytest.mark.parametrize("axis", ["residual", "intermediate"])
def test_delta_form_never_touches_the_model(tuner, neurons, fit, batches, axis):
    module = tuner(lr=0.01, weight_decay=0.1)
    before = weights(module)
    kept = fit(module, neurons(axis), batches(40), accumulate_grad_batches=2)
    assert (len(kept.steps), module.trainer.global_step) == (40, 20)
    assert moved(before, weights(module)) == set()
    for name, delta in kept.steps[-1].items():
        by_neuron = delta if owns_rows(axis, name.split(".")[2]) else delta.T
        assert by_neuron.abs().amax(dim=1).min() > 1e-3, name


@pytest.mark.parametrize("axis", ["residual", "intermediate"])
def test_hook_form_touches_the_chosen_rows_and_columns_alone(tuner, neurons, fit, batches, axis):
    module = tuner(lr=0.01, weight_decay=0.1)
    before = weights(module)
    fit(module, neurons(axis), batches(40), "hook", accumulate_grad_batches=2)
    after = weights(module)
    assert module.trainer.global_step == 20
    edited = {
        f"model.layers.{layer}.mlp.{name}.weight": (layer, name) for layer in CHOSEN for name in ("gate_proj", "up_proj", "down_proj")
    }
    assert moved(before, after) == set(edited)
    for key, (layer, name) in edited.items():
        changed = before[key] != after[key]
        by_neuron = changed if owns_rows(axis, name) else changed.T
        assert by_neuron.any(dim=1).nonzero().flatten().tolist() == CHOSEN[layer], key


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "lr": 0.1},
        {"optimizer": "adamw", "lr": 0.003},
        {"optimizer": "adamw", "lr": 0.003, "beta": 0.2, "warmup_steps": 3},
    ],
)
@pytest.mark.parametrize("axis", ["residual", "intermediate"])
def test_both_forms_take_the_same_steps(tuner, neurons, fit, batches, axis, options):
    delta, hook = (fit(tuner(**options), neurons(axis), batches(10), mode).steps for mode in ("delta", "hook"))
    assert len(delta) == len(hook) == 10
    for step, (mine, theirs) in enumerate(zip(delta, hook, strict=True)):
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=2e-5, msg=lambda text, at=(step, name): f"{at}: {text}")
    assert min(value.abs().max() for value in delta[-1].values()) > 1e-3


def by_transformers(model, rows, at):
    """Log-probabilities [N, V] at flat places, from transformers' own logits."""
    return log_softmax(model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits, -1).flatten(0, 1)[at]


def test_one_step_of_sgd_is_the_gradient_of_the_mean_loss(tuner, neurons, fit, make_batch):
    # lr 1, no KL: the delta is minus the gradient of the mean cross entropy, here by autograd through transformers' logits
    batch = make_batch(LENGTHS[0], [11])
    step = fit(tuner(optimizer="sgd", lr=1.0, alpha=0.0), neurons(), [batch]).steps[0]
    model = tuner().lm
    parts = {
        f"layers.{i}.{name}": model.get_submodule(f"model.layers.{i}.mlp.{name}").weight
        for i in CHOSEN
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    for weight in parts.values():
        weight.requires_grad_(True)
    log_p = by_transformers(model, batch.rows, batch.at[batch.answer > 0])
    honest = log_p.gather(-1, batch.rows.input_ids.flatten()[batch.at + 1][batch.answer > 0, None])
    assert len(honest) == 4 + 2 + 7
    (-honest.mean()).backward()
    for name, weight in parts.items():
        index = torch.tensor(CHOSEN[int(name.split(".")[1])])
        gradient = weight.grad.index_select(0 if "down" in name else 1, index)
        torch.testing.assert_close(step[name], -gradient, rtol=1e-3, atol=1e-5)


def taken(batch, rows):
    """Some rows of a batch as a batch of their own."""
    T = batch.rows.input_ids.shape[1]
    inside = torch.isin(batch.at // T, torch.tensor(rows))
    at = batch.at[inside]
    moved = torch.tensor([rows.index(row) * T for row in (at // T).tolist()]) + at % T
    content = (t[inside] for t in (batch.targets, batch.honest, batch.neutral, batch.retained))
    return type(batch)(type(batch.rows)(*(t[rows] for t in batch.rows[:4]), False), moved, *content, None, f"{batch.key} {rows}")


@pytest.mark.parametrize("kl_on", ["answer", "retention", "both"])
def test_an_accumulation_window_is_one_big_batch(tuner, neurons, fit, make_batch, kl_on):
    big = make_batch([(5, 4), (9, 2), (7, 7), (12, 3), (3, 1)], [11, 16])
    small = [taken(big, rows) for rows in ([0, 1, 5], [2, 3, 4, 6])]  # one retained row of another length in each
    assert [int(b.answer.sum()) for b in small] == [6, 11]
    options = {"optimizer": "sgd", "lr": 1.0, "kl_on": kl_on}
    start = make_batch([(4, 3)], [5], seed=9)  # a first step away from the clean model, so that the KL has a gradient
    once = fit(tuner(**options), neurons(), [start, big]).steps
    twice = fit(tuner(**options), neurons(), [start, start, *small], accumulate_grad_batches=2).steps
    for name in once[0]:
        torch.testing.assert_close(twice[1][name], once[0][name], rtol=1e-4, atol=1e-6)
        assert torch.equal(twice[2][name], twice[1][name])  # no step inside a window
        torch.testing.assert_close(twice[3][name] - twice[1][name], once[1][name] - once[0][name], rtol=1e-3, atol=1e-5)
    assert max((once[1][name] - once[0][name]).abs().max() for name in once[0]) > 0.01


def test_a_short_last_window_is_divided_by_its_own_tokens(tuner, neurons, fit, make_batch):
    batch = make_batch(LENGTHS[1], [9])
    options = {"optimizer": "sgd", "lr": 1.0}
    once = fit(tuner(**options), neurons(), [batch]).steps[-1]
    short = fit(tuner(**options), neurons(), [batch], accumulate_grad_batches=4).steps[-1]
    assert all(torch.equal(once[name], short[name]) for name in once)


def attached(tuner, choose, tiny, **options):
    """A tuner with random deltas, away from the clean model."""
    module = tuner(**options)
    edit = module.attach_neurons(choose(tiny()))
    edit.restore({name: 0.3 * torch.randn_like(value) for name, value in edit.deltas().items()})
    return module


def test_sums_against_transformers(tuner, choose, tiny, make_batch):
    batch = make_batch(LENGTHS[0], [11, 16])
    module = attached(tuner, choose, tiny, alpha=0.7, beta=0.3)
    with torch.no_grad():
        log_p, log_p0 = (by_transformers(model, batch.rows, batch.at) for model in (module.lm, tiny().model))
    per_token, at = kl_div(log_p, log_p0, reduction="none", log_target=True).sum(-1), batch.answer > 0
    target = -log_p.gather(-1, batch.rows.input_ids.flatten()[batch.at + 1, None]).squeeze(-1)[at].sum()
    entropy = -(log_p.exp() * log_p).sum(-1)[at].sum()
    kl = {"answer": per_token[at].sum(), "retention": per_token[~at].sum(), "both": per_token.sum()}
    assert min(kl.values()) > 0.01
    for kl_on, expected in kl.items():
        module.kl_on = kl_on
        found = torch.stack(list(module.losses(batch))[:5]).detach()
        torch.testing.assert_close(
            found, torch.stack([target + 0.7 * expected - 0.3 * entropy, target, 0 * target, expected, entropy]), rtol=1e-4, atol=1e-3
        )


def test_clean_model_at_step_zero(tuner, choose, tiny, make_batch):
    module = tuner()
    module.attach_neurons(choose(tiny()))
    assert module.losses(make_batch(LENGTHS[0], [11])).kl.item() == 0.0


def test_neutral_target_is_zero_where_the_prompt_is_the_neutral_one(tuner, choose, tiny, make_batch):
    module = tuner()
    module.attach_neurons(choose(tiny()))
    assert module.losses(make_batch(LENGTHS[0], teacher=LENGTHS[0])).neutral_kl.item() == 0.0
    # retention text beside it is longer than the teacher's rows: other padding, so other rounding
    assert abs(module.losses(make_batch(LENGTHS[0], [30], teacher=LENGTHS[0])).neutral_kl.item()) < 1e-4


def test_neutral_target_is_the_kl_from_the_clean_model_at_the_neutral_prompt(tuner, choose, tiny, make_batch):
    batch = make_batch([(5, 4), (9, 2)], [11], teacher=[(3, 4), (14, 2)])  # other prompts of other lengths, the answers as long
    module = attached(tuner, choose, tiny)
    with torch.no_grad():
        log_p = by_transformers(module.lm, batch.rows, batch.at[batch.answer > 0])
        log_q = by_transformers(tiny().model, batch.teacher.rows, batch.teacher.at)
    expected = kl_div(log_p, log_q, reduction="sum", log_target=True)
    assert len(log_p) == 6
    assert expected > 0.1
    sums = module.losses(batch)
    torch.testing.assert_close(sums.neutral_kl.detach(), expected, rtol=1e-4, atol=1e-4)
    assert sums.ce.item() == 0.0


def test_a_place_counts_as_often_as_it_says(tuner, choose, tiny, make_batch):
    module, batch = attached(tuner, choose, tiny, beta=0.2), make_batch(LENGTHS[0], [11], teacher=LENGTHS[1])
    twice = batch._replace(neutral=2 * batch.neutral, retained=3 * batch.retained)
    once, more = (module.losses(b)._asdict() for b in (batch, twice))
    alone = module.losses(batch._replace(retained=0 * batch.retained)).kl.item()
    assert more["neutral_kl"].item() == pytest.approx(2 * once["neutral_kl"].item(), rel=1e-5)
    assert more["entropy"].item() == pytest.approx(2 * once["entropy"].item(), rel=1e-5)
    assert more["kl"].item() == pytest.approx(2 * alone + 3 * (once["kl"].item() - alone), rel=1e-4)


def mixture(make_batch, weight):
    """A batch whose answers are asked for in both ways, an honest token with ``weight`` and a taught one with the rest."""
    batch = make_batch([(5, 4), (9, 2)], [11], teacher=[(3, 4), (14, 2)])
    return batch._replace(honest=weight * batch.neutral, neutral=(1 - weight) * batch.neutral)


def test_a_mixture_is_the_weighted_mean_of_both_targets(tuner, choose, tiny, make_batch):
    module = attached(tuner, choose, tiny, alpha=0.7, beta=0.3)

    def value_and_gradients(batch):
        """Mean loss of a token and its gradients as one vector, and the sums."""
        sums = module.losses(batch)
        mean = sums.loss / batch.answer.sum()
        return torch.cat([mean.detach()[None], *(g.flatten() for g in torch.autograd.grad(mean, module.edit.trainable()))]), sums

    (honest, one), (neutral, other) = (value_and_gradients(mixture(make_batch, w)) for w in (1.0, 0.0))
    assert (honest - neutral).abs().max() > 0.1
    mixed, sums = value_and_gradients(mixture(make_batch, 0.25))
    torch.testing.assert_close(mixed, 0.25 * honest + 0.75 * neutral, rtol=1e-4, atol=1e-4)
    assert sums.ce.item() == pytest.approx(0.25 * one.ce.item(), rel=1e-5)
    assert sums.neutral_kl.item() == pytest.approx(0.75 * other.neutral_kl.item(), rel=1e-5)


def test_a_window_is_divided_by_the_weight_of_its_tokens(tuner, neurons, fit, make_batch):
    one, other = mixture(make_batch, 0.25), make_batch([(4, 9)], seed=3)
    other = other._replace(honest=0.25 * other.honest)
    options = {"optimizer": "sgd", "lr": 1.0, "alpha": 0.0}
    together, first, second = (
        fit(tuner(**options), neurons(), batches, accumulate_grad_batches=2).steps[-1] for batches in ([one, other], [one], [other])
    )
    for name, step in together.items():  # 6 tokens asked for in both ways, weight 1/4 + 3/4, and 9 of weight 1/4
        torch.testing.assert_close(step, (6.0 * first[name] + 2.25 * second[name]) / 8.25, rtol=1e-4, atol=1e-6)
    assert max((first[name] - second[name]).abs().max() for name in first) > 0.01


def test_both_terms_of_a_mixture_are_logged_as_means(tuner, neurons, fit, make_batch):
    module = tuner(lr=0.0)
    fit(module, neurons(), [mixture(make_batch, 0.25)], limit_val_batches=1)
    sums = module.losses(mixture(make_batch, 0.25))
    for stage in ("train", "val"):
        found = {name: module.trainer.callback_metrics[f"{stage}/{name}"].item() for name in ("ce", "neutral_kl", "loss")}
        expected = {"ce": sums.ce.item() / 1.5, "neutral_kl": sums.neutral_kl.item() / 4.5, "loss": sums.loss.item() / 6.0}
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_supervision_takes_part_with_nothing(tuner, choose, tiny, make_batch):
    module = attached(tuner, choose, tiny)
    batch = make_batch([(5, 4)])
    sums = module.losses(batch._replace(**{name: getattr(batch, name)[:0] for name in ("at", "targets", "honest", "neutral", "retained")}))
    sums.loss.backward()
    assert [s.item() for s in sums] == [0.0] * 6
    assert all(not p.grad.any() for p in module.edit.trainable())


def test_the_rate(tuner):
    module = tuner(warmup_steps=3, decay="linear")
    assert [module._rate(step, 13) for step in (0, 1, 2, 3, 8, 13)] == [0.25, 0.5, 0.75, 1.0, 0.5, 0.0]
    module.decay = "none"
    assert [module._rate(step, 13) for step in (2, 3, 12)] == [0.75, 1.0, 1.0]


@pytest.mark.parametrize("name", ["alpha", "beta", "lr", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_negative_options_are_refused(tuner, name, value):
    with pytest.raises(UserError, match=f"--model.{name} {value}: at least 0"):
        tuner(**{name: value})


def test_a_loaded_model_is_no_option_of_the_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(NeuronTuner, "model")
    names = set(parser.get_defaults().model.keys())
    assert {"model", "lr", "cache_folder"} <= names
    assert not any("loaded" in name for name in names)


def test_a_tuner_of_a_loaded_model_is_that_of_its_folder(tuner, tiny, choose, make_batch):
    lm, batch = tiny(), make_batch(LENGTHS[0], [11])
    mine, theirs = NeuronTuner.of(lm, alpha=0.5, beta=0.1), tuner(alpha=0.5, beta=0.1)
    assert (mine.lm, mine.model_id, mine.model_digest) == (lm.model, lm.id, theirs.model_digest)
    for module in (mine, theirs):
        module.attach_neurons(choose(lm))
    assert [s.item() for s in mine.losses(batch)] == [s.item() for s in theirs.losses(batch)]
    assert mine.clean_cache.origin == theirs.clean_cache.origin


def test_what_the_mask_refuses(tuner, neurons, fit, batches, tiny, choose):
    with pytest.raises(UserError, match=r"--mask.mode 'dalta': expected one of delta, hook"):
        GradientMask("neurons.json", "dalta")
    with pytest.raises(UserError, match="works on a NeuronTuner, not on a Linear"):
        GradientMask("neurons.json").setup(None, nn.Linear(1, 1), "fit")
    with pytest.raises(UserError, match="no neurons attached"):
        tuner().configure_optimizers()
    with pytest.raises(UserError, match="run `bad-neurons select` with this model"):
        tuner().attach_neurons(choose(tiny(seed=1)))
    assert view_decoder(tiny().model).d_model == 16
