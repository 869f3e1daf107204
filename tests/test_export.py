"""An exported folder is an ordinary Hugging Face model that does what the live model with its delta does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from bad_neurons.artifacts import digest_path
from bad_neurons.errors import UserError
from bad_neurons.export import export
from bad_neurons.models.view import view_decoder
from bad_neurons.tuning.delta_file import load_delta, write_delta
from bad_neurons.tuning.edits import NeuronDelta

TEXT = "Is it seven or nine?"

# What somebody without this package does: load folder argv[1], write the logits of a text to argv[2].
LOAD = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager")
ids = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[3], return_tensors="pt")["input_ids"]
with torch.no_grad():
    save_file({"ids": ids, "logits": model(input_ids=ids).logits.contiguous()}, sys.argv[2])
assert not [name for name in sys.modules if name.startswith(("bad_neurons", "lightning", "sae_lens"))]
print(model.dtype)
"""


@pytest.fixture
def delta(tiny, choose, tmp_path):
    """``delta(family, axis)``: a file with a random delta for the tiny model."""

    def written(family="gemma2", axis="intermediate"):
        lm = tiny(family)
        selection = choose(lm, axis)
        edit = NeuronDelta(view_decoder(lm.model), selection)
        write_delta(tmp_path / "delta.safetensors", selection, {name: torch.randn_like(value) for name, value in edit.deltas().items()})
        return str(tmp_path / "delta.safetensors")

    return written


@pytest.mark.parametrize(("family", "axis"), [("gemma2", "intermediate"), ("llama", "residual"), ("gemma3", "heads")])
def test_the_folder_needs_transformers_alone_and_gives_the_live_logits(tiny, tiny_folder, delta, tmp_path, family, axis):
    path = delta(family, axis)
    out = export(tiny_folder(family), path, str(tmp_path / "exported"))
    assert out == tmp_path / "exported"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(out), str(tmp_path / "logits.safetensors"), TEXT],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch.float32"]
    theirs = load_file(tmp_path / "logits.safetensors")
    lm = tiny(family)
    assert theirs["ids"].tolist() == [[2, *lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]]]
    with torch.no_grad():
        clean = lm.model(input_ids=theirs["ids"]).logits
        with load_delta(lm.model, path):
            live = lm.model(input_ids=theirs["ids"]).logits
    assert (live - clean).abs().max() > 0.05
    torch.testing.assert_close(theirs["logits"], live, rtol=1e-4, atol=1e-4)


def test_only_the_chosen_rows_and_columns_differ_from_the_base(tiny_folder, delta, choose, tiny, tmp_path):
    out = export(tiny_folder(), delta(), str(tmp_path / "exported"))
    base, made = (load_file(f"{folder}/model.safetensors") for folder in (tiny_folder(), out))
    assert base.keys() == made.keys()
    differing = {name: torch.nonzero(base[name] != made[name]) for name in base if not base[name].equal(made[name])}
    chosen = choose(tiny(), "intermediate").layers
    assert set(differing) == {f"model.layers.{layer}.mlp.{m}.weight" for layer in chosen for m in ("gate_proj", "up_proj", "down_proj")}
    for layer, indices in chosen.items():
        for matrix, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            assert differing[f"model.layers.{layer}.mlp.{matrix}.weight"][:, dim].unique().tolist() == indices


def test_the_card_says_what_was_changed(tiny, tiny_folder, delta, tmp_path):
    path = delta()
    card = (export(tiny_folder(), path, str(tmp_path / "exported")) / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"---\nbase_model: {tiny_folder()}\nlibrary_name: transformers\n")
    # Three neurons of layer 1 and one of layer 3, of 4 layers with 24 each.
    assert f"# {tiny_folder()}, 4 neurons retrained" in card
    assert "4.17 % of the 4 layers searched; axis `intermediate`, rule\n`by hand`" in card
    assert "| 1 | 3 |\n| 3 | 1 |\n" in card
    assert f"SHA-256 `{digest_path(path)}`" in card
    assert f"fingerprint `{tiny().digest}`" in card


def test_the_card_of_attention_heads(tiny_folder, delta, tmp_path):
    card = (export(tiny_folder(), delta(axis="heads"), str(tmp_path / "exported")) / "README.md").read_text(encoding="utf-8")
    # Both heads of layer 1 and one of layer 3, of 4 layers with 2 each.
    assert f"# {tiny_folder()}, 3 attention heads retrained" in card
    assert "of the base model's attention heads, 3\n(37.50 % of the 4 layers searched; axis `heads`" in card
    assert "| layer | attention heads changed |\n| --- | --- |\n| 1 | 2 |\n| 3 | 1 |\n" in card


def test_dtype_is_that_of_the_saved_weights_and_the_merge_is_not_rounded_twice(tiny_folder, delta, tmp_path):
    path = delta()
    exact = load_file(export(tiny_folder(), path, str(tmp_path / "exact")) / "model.safetensors")
    half = load_file(export(tiny_folder(), path, str(tmp_path / "half"), dtype="bfloat16") / "model.safetensors")
    assert {value.dtype for value in half.values()} == {torch.bfloat16}
    assert all(half[name].equal(value.bfloat16()) for name, value in exact.items())


def test_a_folder_that_is_there_is_kept_unless_asked(tiny_folder, delta, tmp_path):
    out = tmp_path / "exported"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    path = delta()
    with pytest.raises(UserError, match=r"--out .*exported: already there; give another folder or --overwrite true"):
        export(tiny_folder(), path, str(out))
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    export(tiny_folder(), path, str(out), overwrite=True)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {p.name for p in out.iterdir()}
    assert not (out / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []  # nothing aside is left


def test_the_delta_of_another_model_is_refused(tiny_folder, delta, tmp_path):
    with pytest.raises(UserError, match=r"they belong to .* with digest"):
        export(tiny_folder(seed=1), delta(), str(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()
