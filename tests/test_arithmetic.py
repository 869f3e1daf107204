"""The arithmetic of docs/scaling.md against what torch counts while real code runs: on tiny models, and at real size without data."""

from __future__ import annotations

import re
import weakref
from pathlib import Path

import arithmetic
import full_size
import pytest
import torch
from arithmetic import SHAPES, Shape
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, Gemma2Config

from bad_neurons.models import head
from bad_neurons.models.passes import Frame, checkpointed, finish, plain
from bad_neurons.models.view import DecoderView, LayerView
from bad_neurons.selection.neurons import NeuronSelection
from bad_neurons.tuning.clean_cache import CleanPass
from bad_neurons.tuning.edits import MaskedMatrices, NeuronDelta
from bad_neurons.tuning.losses import Supervision, loss_sums

CPU = torch.device("cpu")
ROW, ANSWER = 40, 4
TINY = (
    Shape("wide MLP", 8, 64, 512, 4, 2, 16, 512, (1, 3, 6)),
    Shape("much attention", 7, 96, 192, 8, 4, 16, 512, (2, 3, 5)),
)
CONTENDERS = {
    "as written": full_size.masked(full_size.as_written),
    "where needed": full_size.masked(full_size.where_needed),
    "first epoch": full_size.ours(cached=False),
    "cached": full_size.ours(cached=True),
    "recomputed": full_size.ours(cached=True, layer_by=checkpointed(plain)),
}


class Watch(TorchDispatchMode):
    """Counts operations, by torch's own formulas, bytes of tensors alive at the worst moment, and bytes of their elementwise traffic."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.flops = self.peak = self.moved = self.live = 0
        self.sizes = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        elif not func.is_view and func not in (torch.ops.aten.detach.default, torch.ops.aten.embedding.default):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in tensors)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage):
        if (key := storage._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key):
        self.live -= self.sizes.pop(key)


def config_of(shape):
    return {
        "num_hidden_layers": shape.L, "hidden_size": shape.d, "intermediate_size": shape.m, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv, "head_dim": shape.head_dim, "vocab_size": shape.V,
    }  # fmt: skip


def tiny_work(shape, rows, answers=1):
    """Prompts of equal length, `rows` of them, with `answers` that differ from the first token on."""
    work = full_size.make_work(full_size.Size(config_of(shape), shape.edited, 32, torch.bfloat16), list(shape.edited), 1024, CPU)
    prompts = [[2, row + 3, *range(100, 100 + ROW - ANSWER - 2)] for row in range(rows)]
    records = [full_size.Record(prompt, [[60 + i, 61, 62, 63] for i in range(answers)]) for prompt in prompts]
    return work._replace(records=records, batches=full_size.tuning_batches(records, 10**6, CPU))


@pytest.fixture
def one_block(monkeypatch):
    """The head as on a GPU: all the vocabulary in one block."""
    monkeypatch.setattr(head, "_BLOCK", 2**40)


def watched(work, contender):
    with contender(work) as run:
        run()
        with Watch(*work.model.parameters()) as watch:
            counted = run()
    return watch, counted


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_parameters_are_those_of_transformers(shape):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Gemma2Config(**config_of(shape)), dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == shape.weights
    layer = model.model.layers[0]
    assert sum(p.numel() for p in layer.mlp.parameters()) == shape.mlp
    assert sum(p.numel() for p in layer.self_attn.parameters()) == shape.attention


def test_both_scripts_have_the_same_shapes():
    for shape in SHAPES:
        size = full_size.SIZES[f"gemma-2-{shape.name.lower()}"]
        assert {**config_of(shape), "query_pre_attn_scalar": size.config["query_pre_attn_scalar"]} == size.config
        assert (size.layers, size.d_sae, full_size.SHARE) == (shape.edited, arithmetic.D_SAE, arithmetic.SHARE)
    assert arithmetic.CHUNK == head.ROWS


@pytest.mark.parametrize("shape", TINY, ids=lambda s: s.name)
@pytest.mark.parametrize("way", CONTENDERS)
def test_operations_of_a_tuning_step(shape, way):
    watch, counted = watched(tiny_work(shape, 5), CONTENDERS[way])
    assert watch.flops == arithmetic.step_flops(shape, way, 5 * ROW, 5 * ANSWER, ROW)
    assert counted["trained"] == (shape.masked if way in arithmetic.MASKED else shape.trained)


@pytest.mark.parametrize("shape", TINY, ids=lambda s: s.name)
@pytest.mark.parametrize("way", CONTENDERS)
def test_memory_of_a_tuning_step(shape, way, one_block):
    shape = shape._replace(V=4000 if way in arithmetic.MASKED else shape.V)  # so that the peak is at the logits, as it is at real size
    peaks = [watched(tiny_work(shape, rows), CONTENDERS[way])[0].peak for rows in (6, 12)]
    logits = {"as written": 16 * ROW, "where needed": 36 * ANSWER}.get(way, 20 * ANSWER) * shape.V
    of_a_row = arithmetic.saved_bytes(shape, way, ROW, ANSWER, ROW) + arithmetic.passing_bytes(shape, ROW) + logits
    assert (peaks[1] - peaks[0]) / 6 == pytest.approx(of_a_row, rel=0.06)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
@pytest.mark.parametrize("way", ["cached", "where needed"])
def test_activations_at_real_size(shape, way):
    """On tensors without data: what autograd keeps of a row is what the formula says, to the byte."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Gemma2Config(**config_of(shape)), dtype=torch.bfloat16, attn_implementation="eager")
    layers = [
        LayerView(layer=part, attention=part.self_attn, mlp=part.mlp, sae_point=part.post_feedforward_layernorm)
        for part in model.model.layers
    ]
    view = DecoderView(model.requires_grad_(False), model.model, tuple(layers), model.model.norm, model.lm_head, 30.0)
    chosen = {layer: list(range(shape.k)) for layer in shape.edited}
    selection = NeuronSelection("residual", chosen, shape.d, list(chosen), "meta", "", {})
    (NeuronDelta if way == "cached" else MaskedMatrices)(view, selection)
    found = [kept_bytes(view, rows, arithmetic.T, shape, way) for rows in (1, 2)]
    assert found[1] - found[0] == arithmetic.saved_bytes(shape, way, arithmetic.T, arithmetic.ANSWER)


def kept_bytes(view, rows, row, shape, way):
    """Bytes that autograd keeps of a pass from the first edited layer to the final norm, weights apart."""
    kept = weakref.WeakValueDictionary()  # what autograd lets go of again does not count

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor.detach()  # a node that held its own output would never be let go of

    angles = torch.empty(1, row, shape.head_dim, dtype=torch.bfloat16, device="meta")
    call = {"position_embeddings": (angles, angles), "attention_mask": None}
    hidden = torch.empty(rows, row, shape.d, dtype=torch.bfloat16, device="meta")
    places = torch.empty(rows * arithmetic.ANSWER, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if way == "cached":
            final = finish(view, Frame(hidden, [call] * shape.L), hidden, shape.first, places)
        else:
            for part in view.layers[shape.first :]:
                hidden = part.layer(hidden, **call)
            final = view.final_norm(hidden)
    assert final.shape[-1] == shape.d
    weights = {p.untyped_storage()._cdata for p in (places, *view.model.parameters())}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)


def test_logits_of_the_chunked_head(one_block):
    """Bytes held and moved a place and entry of the vocabulary, whatever the vocabulary."""
    places, found = 64, []
    for V in (4000, 8000):
        shape = TINY[0]._replace(V=V)
        view = tiny_work(shape, 1).view
        clean = torch.randn(places, shape.d, dtype=torch.bfloat16)
        tuned = (clean + 0.1 * torch.randn_like(clean)).requires_grad_()
        asked = Supervision(clean, torch.randint(V, (places,)), torch.ones(places), torch.ones(places))
        with Watch(*view.model.parameters()) as watch:
            loss_sums(view, tuned, asked, 1.0, 0.0).loss.backward()
        found.append((watch.peak, watch.moved))
    held, moved = ((large - small) / 4000 / places for small, large in zip(*found, strict=True))
    assert held == pytest.approx(arithmetic.LOGITS_HELD["ours"], rel=0.05)
    assert moved == pytest.approx(arithmetic.LOGITS_MOVED["ours"], rel=0.05)


@pytest.mark.parametrize(("way", "a_row"), [("as written", ROW), ("where needed", ANSWER)])
def test_logits_of_the_others(way, a_row):
    watches = [watched(tiny_work(TINY[0]._replace(V=V), 4), CONTENDERS[way])[0] for V in (20_000, 40_000)]
    held, moved = ((large - small) / 20_000 for small, large in ((w.peak for w in watches), (w.moved for w in watches)))
    second_model = 2 * TINY[0].d  # its head is in sight, too
    assert (held - second_model) / 4 / a_row == pytest.approx(arithmetic.LOGITS_HELD[way], rel=0.05)
    if way == "where needed":
        assert moved / 4 / a_row == pytest.approx(arithmetic.LOGITS_MOVED[way], rel=0.05)


def test_operations_of_an_evaluation():
    shape = TINY[0]
    watch, _ = watched(tiny_work(shape, 1, answers=2), full_size.ours_evaluating)
    assert watch.flops == arithmetic.evaluation_flops(shape, ROW - ANSWER, ANSWER, 2)


def test_operations_of_an_extraction():
    shape, rows = TINY[0], 3
    watch, _ = watched(tiny_work(shape, rows), full_size.ours_extracting)
    encoders = len(shape.edited) * 2 * shape.d * 32 * rows * ANSWER
    assert watch.flops == rows * ROW * (shape.edited[-1] + 1) * arithmetic.layer_flops(shape, ROW) + encoders


def test_operations_of_sae_training():
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=64, k=4))
    with Watch() as watch:
        sae.training_forward_pass(TrainStepInput(torch.randn(10, 16), {}, torch.zeros(64, dtype=torch.bool), 0, False)).loss.backward()
    assert watch.flops == 10 * arithmetic.sae_fit_flops(16, 64)


def test_bytes_of_the_cache():
    shape = SHAPES[0]
    kept = CleanPass(*(torch.empty(count, shape.d, dtype=torch.bfloat16, device="meta") for count in (1600, 120)))
    assert kept.bytes == arithmetic.cache_bytes(shape, 1600, 120)


@pytest.mark.parametrize("ranks", [2, 8])
def test_what_a_rank_finds_in_its_cache(ranks):
    size, seen, shares = 8000, set(), []
    for epoch in range(3):
        sampler = DistributedSampler(range(size), ranks, rank=0, shuffle=True)
        sampler.set_epoch(epoch)
        drawn = set(sampler)
        shares.append(len(drawn & seen) / len(drawn))
        seen |= drawn
    assert shares == pytest.approx([arithmetic.kept_share(ranks, epoch) for epoch in (1, 2, 3)], abs=0.03)


def test_the_page_shows_these_tables_and_no_others():
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE) == [table() + "\n" for table in arithmetic.TABLES]
