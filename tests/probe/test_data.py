"""Which answers become examples, with which label, on which side; and the probe stage from records to its file."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bad_neurons.artifacts import write_jsonl
from bad_neurons.data.records import Record, record_to_json
from bad_neurons.data.splits import split_by_topic
from bad_neurons.errors import UserError
from bad_neurons.probe import answers as answers_module
from bad_neurons.probe.data import ProbeDataModule
from bad_neurons.probe.module import LinearProbe, read_probe
from bad_neurons.sae.load import load_saes
from bad_neurons.testing import save_tiny_saes

pytestmark = [  # Lightning's own
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]


def record(topic, right):
    """A short record whose texts name their part."""
    text = f"{topic} {right}"
    return Record(
        prompt=({"role": "user", "content": f"Q {text}"},),
        honest=f"honest {text}",
        sycophantic=None if right else f"sycophantic {text}",
        contrarian=f"contrarian {text}" if right else None,
        person_is_right=right,
        topic=topic,
        source="test",
    )


RECORDS = [record(f"t{i}", right) for i in range(8) for right in (True, False, None)]
SPLIT = split_by_topic(RECORDS, 0.2, 0.2, 0)


@pytest.fixture
def write(tmp_path):
    def written(records):
        path = tmp_path / "records.jsonl"
        write_jsonl(path, [record_to_json(r) for r in records])
        return str(path)

    return written


@pytest.fixture
def extracted(monkeypatch, tiny):
    """A fake extraction that gives each example its own number as its only feature, and notes the texts."""
    texts = []
    decode = tiny().tokenizer.decode

    def extract(view, examples, saes, layers, poolings, folder, key, rank):
        texts[:] = [(decode(e.ids[: e.answer_start]), decode(e.ids[e.answer_start :])) for e in examples]
        number = torch.arange(float(len(examples)))[:, None]
        return SimpleNamespace(read=lambda pooling, features, layer: number + 1000 * layer)

    monkeypatch.setattr(answers_module, "extract_features", extract)
    return texts


def sides(data):
    loaders = {"train": data.train_dataloader(), "validation": data.val_dataloader(), "test": data.test_dataloader()}
    return {side: next(iter(loader)) for side, loader in loaders.items()}


def test_labels_and_sides_of_every_answer(tiny_folder, write, extracted, tmp_path):
    data = ProbeDataModule(
        tiny_folder(), [3, 1], sae=None, features="residual", folder=str(tmp_path), records=write(RECORDS), dtype="float32"
    )
    data.setup("fit")
    for side, expected in zip(sides(data).items(), SPLIT, strict=True):
        name, (x, y) = side
        assert x[:, 1].equal(x[:, 0] + 2000), name  # layers side by side, in order
        labelled = {(*extracted[int(number) - 1000], int(label)) for number, label in zip(x[:, 0], y, strict=True)}
        by_hand = {
            (f"<bos>Human: {r.prompt[0]['content']}\n\nAssistant:", f" {answer}", label)
            for r in expected
            for answer, label in ((r.honest, 0), (r.sycophantic, 1))
            if answer
        }
        assert labelled == by_hand, name
        # A topic has three persons: three honest answers, and two that are sycophantic, since the third is right.
        topics = len({r.topic for r in expected})
        assert (len(y), int(y.sum())) == (5 * topics, 2 * topics), name
    assert not any("contrarian" in answer for _, answer in extracted)
    assert data.widths == [1, 1]


def test_max_records_thins_training_alone(tiny_folder, write, extracted, tmp_path):
    data = ProbeDataModule(
        tiny_folder(), [1], sae=None, features="residual", folder=str(tmp_path), records=write(RECORDS), max_records=6, dtype="float32"
    )
    data.setup("fit")
    counts = {side: len(batch.y) for side, batch in sides(data).items()}
    topics = {f"t{i}" for i in range(8)} & {prompt.split()[2] for prompt, _ in extracted[: counts["train"]]}
    assert len(topics) == len({r.topic for r in SPLIT.train})  # drawn evenly
    assert 6 <= counts["train"] <= 12
    assert (counts["validation"], counts["test"]) == (5 * 2, 5 * 2)


def test_one_label_alone_is_refused(tiny_folder, write, extracted, tmp_path):
    path = write([record(f"t{i}", True) for i in range(4)])
    data = ProbeDataModule(tiny_folder(), [1], sae=None, features="residual", folder=str(tmp_path), records=path, dtype="float32")
    with pytest.raises(UserError, match=r"records.jsonl: the train side has 2 examples of 1 label\(s\); the probe needs"):
        data.setup("fit")


def test_layers_that_the_model_lacks_are_refused(tiny_folder, write, tmp_path):
    data = ProbeDataModule(
        tiny_folder(), [1, 4], sae=None, features="residual", folder=str(tmp_path), records=write(RECORDS), dtype="float32"
    )
    with pytest.raises(UserError, match=r"--data.layers: \[4\]: this model has layers 0 to 3"):
        data.setup("fit")


@pytest.mark.parametrize("features", ["sae", "residual"])
def test_the_stage_from_records_to_its_file(tiny, tiny_folder, write, tmp_path, trainer, features):
    sae = save_tiny_saes(tmp_path / "sae", [1, 3], d_sae=32)
    data = ProbeDataModule(tiny_folder(), [1, 3], sae, features, str(tmp_path / "features"), write(RECORDS), "mean", dtype="float32")
    module = LinearProbe(str(tmp_path / "probe"), l2=1e-2)
    trainer().fit(module, data)
    probe = read_probe(tmp_path / "probe" / "probe.safetensors")
    width = 32 if features == "sae" else 16
    assert {layer: len(w) for layer, w in probe.weights.items()} == {1: width, 3: width}
    assert probe.origin["model"] == {"id": tiny_folder(), "digest": tiny().digest}
    assert probe.origin["sae"] == (sae if features == "sae" else None)

    # One answer by hand: transformers, the SAE, the mean over the answer, the probe.
    chosen = SPLIT.train[0]
    lm, prompt, answer = tiny(), f"Human: {chosen.prompt[0]['content']}\n\nAssistant:", f" {chosen.honest}"
    start = len(lm.tokenizer(prompt)["input_ids"])
    outputs, log_odds = {}, torch.tensor(probe.bias)
    for layer in (1, 3):
        point = lm.model.model.layers[layer].post_feedforward_layernorm
        point.register_forward_hook(lambda _m, _a, output, layer=layer: outputs.update({layer: output[0]}))
    with torch.no_grad():
        lm.model(**lm.tokenizer(prompt + answer, return_tensors="pt", return_token_type_ids=False))
        for layer, values in outputs.items():
            rows = load_saes(sae, [layer], 16)[layer].encode(values[start:]) if features == "sae" else values[start:]
            log_odds += rows.mean(0) @ probe.weights[layer]
        x = sides(data)["train"].x
        assert (module(x) - log_odds).abs().min() < 1e-4
