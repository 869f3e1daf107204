"""Harvested activations against a plain transformers pass with a hook, and what is kept from one harvest to the next."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from bad_neurons.artifacts import write_jsonl, write_tensors
from bad_neurons.data.embedded import embedded_records
from bad_neurons.data.records import record_to_json
from bad_neurons.data.splits import split_by_topic
from bad_neurons.errors import RunError, UserError
from bad_neurons.models.view import view_decoder
from bad_neurons.sae import harvest as harvest_module
from bad_neurons.sae.harvest import ActivationBatches, ActivationDataModule, harvest
from bad_neurons.testing import save_tiny_model, tiny_tokenizer

LAYERS = [1, 3]


@pytest.fixture
def sequences():
    """Twelve token sequences with a BOS (id 2), of lengths 9 to 20."""
    generator = torch.Generator().manual_seed(3)
    return [[2, *torch.randint(3, 259, (8 + i,), generator=generator).tolist()] for i in range(12)]


@pytest.fixture
def records_file(tmp_path):
    """The first two questions of each of six embedded topics, as a JSONL file."""
    topics = sorted({r.topic for r in embedded_records()})[:6]
    records = [r for topic in topics for r in [r for r in embedded_records() if r.topic == topic][:2]]
    write_jsonl(tmp_path / "records.jsonl", [record_to_json(r) for r in records])
    return str(tmp_path / "records.jsonl"), records


def hooked(model, name, layer, ids):
    """Output [T, d] of the named child of one layer in an ordinary pass over one sequence."""
    seen = []
    handle = getattr(model.model.layers[layer], name).register_forward_hook(lambda _m, _a, output: seen.append(output[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    handle.remove()
    return seen[0]


def read_shards(folder):
    shards = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


@pytest.mark.parametrize(("family", "point"), [("gemma2", "post_feedforward_layernorm"), ("llama", "mlp")])
def test_activations_equal_those_of_a_hook_in_a_plain_pass(tiny, family, point, sequences, tmp_path):
    lm = tiny(family)
    harvest(view_decoder(lm.model), sequences, LAYERS, tmp_path, "key")
    stored = read_shards(tmp_path)
    longest_first = sorted(sequences, key=len, reverse=True)
    assert set(stored) == {"layer.1", "layer.3"}
    for layer in LAYERS:
        values = stored[f"layer.{layer}"]
        without_bos = torch.cat([hooked(lm.model, point, layer, s)[1:] for s in longest_first])
        assert values.dtype == torch.bfloat16
        assert values.shape == (sum(range(8, 20)), 16)  # 162 tokens: neither BOS nor padding
        torch.testing.assert_close(values.float(), without_bos, rtol=2**-8, atol=1e-6)
        assert (values == without_bos.bfloat16()).float().mean() > 0.99
        bos = hooked(lm.model, point, layer, sequences[0])[0]
        assert (values.float() - bos).norm(dim=-1).min() > 0.01 * bos.norm()


def test_in_gemma_the_bare_mlp_would_be_something_else(tiny, sequences):
    model = tiny("gemma2").model
    mlp, behind = (hooked(model, name, 1, sequences[0]) for name in ("mlp", "post_feedforward_layernorm"))
    assert (mlp - behind).norm() > 0.1 * behind.norm()


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of two batches of at most 40 tokens, and a list that gets the token ids of every batch that runs."""
    monkeypatch.setattr(harvest_module, "_BATCH_TOKENS", 40)
    monkeypatch.setattr(harvest_module, "_SHARD_TOKENS", 80)
    ran = []
    original = harvest_module.visit_mlp_outputs

    def counted(view, rows, layers, visit):
        ran.append([row[: int(m.sum())].tolist() for row, m in zip(rows.input_ids, rows.attention_mask, strict=True)])
        return original(view, rows, layers, visit)

    monkeypatch.setattr(harvest_module, "visit_mlp_outputs", counted)
    return ran


def test_only_a_missing_shard_is_computed_again(tiny, sequences, small_shards, tmp_path):
    view = view_decoder(tiny().model)
    harvest(view, sequences, LAYERS, tmp_path, "key")
    # Longest first, 40 tokens a batch: 20+19, 18+17, 16+15, 14+13, then 12+11+10 and the 9 alone.
    assert [[len(row) for row in batch] for batch in small_shards] == [[20, 19], [18, 17], [16, 15], [14, 13], [12, 11, 10], [9]]
    shards = sorted(tmp_path.glob("shard-*.safetensors"))
    assert [p.name for p in shards] == [f"shard-{i:05d}.safetensors" for i in range(3)]
    bytes_before, times = [p.read_bytes() for p in shards], [p.stat().st_mtime_ns for p in shards]

    small_shards.clear()
    harvest(view, sequences, LAYERS, tmp_path, "key")
    assert small_shards == []

    shards[1].unlink()
    harvest(view, sequences, LAYERS, tmp_path, "key")
    assert [[len(row) for row in batch] for batch in small_shards] == [[16, 15], [14, 13]]
    assert [p.read_bytes() for p in shards] == bytes_before
    assert [p.stat().st_mtime_ns for p in (shards[0], shards[2])] == [times[0], times[2]]


def test_another_key_makes_all_shards_anew_and_removes_those_left_over(tiny, sequences, small_shards, tmp_path):
    view = view_decoder(tiny().model)
    harvest(view, sequences, LAYERS, tmp_path, "key")
    small_shards.clear()
    harvest(view, sequences[:3], [1], tmp_path, "another")
    assert small_shards == [[sequences[2], sequences[1], sequences[0]]]
    assert [p.name for p in tmp_path.glob("shard-*")] == ["shard-00000.safetensors"]
    assert {name: values.shape for name, values in read_shards(tmp_path).items()} == {"layer.1": (8 + 9 + 10, 16)}


def test_validation_and_training_tokens_are_disjoint_and_together_all(tmp_path):
    rows = torch.arange(200.0)[:, None]  # whole numbers up to 256 are exact in bfloat16
    for number, part in enumerate(rows.split(150)):
        tensors = {"layer.1": part.expand(-1, 4).bfloat16(), "layer.3": -part.expand(-1, 4).bfloat16()}
        write_tensors(tmp_path / f"shard-{number:05d}.safetensors", tensors, {})
    data = ActivationDataModule("unused", LAYERS, str(tmp_path), max_tokens=200, validation=0.1, batch_size=20)
    data.harvest = lambda _rank: None  # it is there
    data.setup("fit")
    train = data.training_activations()
    held_out = torch.cat([batch[1] for batch in data.val_dataloader()])[:, 0].tolist()
    assert len(held_out) == 20
    assert sorted(held_out + train[1][:, 0].tolist()) == rows[:, 0].tolist()
    assert train[3].equal(-train[1])  # both layers hold the same tokens in the same order
    in_batches = torch.cat([batch[1] for batch in data.train_dataloader()])[:, 0].tolist()
    assert sorted(in_batches) == sorted(train[1][:, 0].tolist())


@pytest.mark.parametrize(("n", "size", "expected"), [(100, 32, [34, 33, 33]), (31, 32, [31]), (64, 32, [32, 32]), (63, 32, [63])])
def test_no_token_is_left_out_of_the_batches(n, size, expected):
    batches = ActivationBatches({0: torch.arange(n, dtype=torch.bfloat16)[:, None]}, size, seed=1)
    items = [batches[i][0] for i in range(len(batches))]
    assert [len(item) for item in items] == expected
    assert torch.cat(items)[:, 0].sort().values.tolist() == list(range(n))
    assert items[0].dtype == torch.float32


@pytest.fixture
def read(monkeypatch):
    """The token ids that a data module hands to the harvest, which itself is left out."""
    seen = {}
    monkeypatch.setattr(
        harvest_module, "harvest", lambda view, sequences, layers, folder, key, rank: seen.update(sequences=sequences, key=key)
    )
    return seen


def test_exactly_the_answers_of_training_topics_are_read(tiny, tiny_folder, records_file, read, tmp_path):
    path, records = records_file
    ActivationDataModule(tiny_folder(), LAYERS, str(tmp_path), path, text=[], max_tokens=100_000, dtype="float32").harvest()
    tokenizer = tiny().tokenizer
    texts = sorted(tokenizer.decode(ids, skip_special_tokens=True) for ids in read["sequences"])
    split = split_by_topic(records, 0.2, 0.2, 0)
    assert len({r.topic for r in split.train}) == 4
    answers = [(r.agreeing, r.disagreeing)[i % 2] for i, r in enumerate(split.train)]  # one a record: no prompt is read twice
    expected = [f"Human: {r.prompt[0]['content']}\n\nAssistant: {answer}" for r, answer in zip(split.train, answers, strict=True)]
    assert texts == sorted(expected)
    assert {ids[0] for ids in read["sequences"]} == {2}
    assert {ids.count(2) for ids in read["sequences"]} == {1}


@pytest.mark.parametrize("bos", [True, False])
def test_half_of_the_tokens_come_from_records_and_half_from_text(records_file, read, tmp_path, bos):
    folder, tokenizer = save_tiny_model(tmp_path / "model"), tiny_tokenizer()
    if not bos:  # the first token is left out all the same
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer.save_pretrained(folder)
    data = ActivationDataModule(folder, LAYERS, str(tmp_path), records_file[0], max_tokens=2000, batch_size=100, dtype="float32")
    data.harvest()
    assert {s[0] == 2 for s in read["sequences"]} == {bos}
    from_records = [s for s in read["sequences"] if tokenizer.decode(s, skip_special_tokens=True).startswith("Human: ")]
    lengths = [len(s) - 1 for s in from_records]
    total = sum(len(s) - 1 for s in read["sequences"])
    assert sum(lengths[:-1]) < 1000 <= sum(lengths)
    assert total - (len(read["sequences"][-1]) - 1) < 2000 <= total
    assert len(from_records) < len(read["sequences"])


def test_the_key_follows_model_dtype_layers_and_text(tiny_folder, records_file, read, tmp_path):
    def key(model, layers, seed=0, dtype="float32"):
        data = ActivationDataModule(model, layers, str(tmp_path), records_file[0], max_tokens=2000, batch_size=99, seed=seed, dtype=dtype)
        data.harvest()
        return read["key"]

    first = key(tiny_folder(), [1, 3])
    assert key(tiny_folder(), [3, 1]) == first
    other_model, other_layers = key(tiny_folder(seed=1), [1, 3]), key(tiny_folder(), [1, 2])
    assert len({first, other_model, other_layers, key(tiny_folder(), [1, 3], seed=1), key(tiny_folder(), [1, 3], dtype="bfloat16")}) == 5


def test_what_cannot_be_is_refused(tiny_folder, tmp_path):
    with pytest.raises(UserError, match=r"--data.layers: \[4\]: this model has layers 0 to 3"):
        ActivationDataModule(tiny_folder(), [1, 4], str(tmp_path), dtype="float32").harvest()
    with pytest.raises(UserError, match=r"--data.max_tokens 9999: at least ten batches of 1000"):
        ActivationDataModule(tiny_folder(), [1], max_tokens=9999, batch_size=1000)
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match=f"--data.validation {share}: a share between 0 and 1"):
            ActivationDataModule(tiny_folder(), [1], validation=share)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_activations_that_are_not_finite_are_named(tiny, sequences, tmp_path, value):
    lm = tiny("llama")
    with torch.no_grad():
        lm.model.model.layers[3].mlp.down_proj.weight[2] = value
    with pytest.raises(RunError, match=r"^activations of layer 3: \d+ of \d+ values are (NaN|infinity|NaN and infinity) \(float32\)"):
        harvest(view_decoder(lm.model), sequences, LAYERS, tmp_path, "key")
    assert not list(tmp_path.glob("*.safetensors"))
