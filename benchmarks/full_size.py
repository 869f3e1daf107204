"""Tuning, head, extraction and evaluation in the shapes of Gemma 2, with random weights: for a machine with a GPU.

    python benchmarks/full_size.py --model gemma-2-2b
    python benchmarks/full_size.py --model gemma-2-9b --tokens 2048 --rounds 5
    python benchmarks/full_size.py --model tiny --device cpu --rounds 1 --out tiny.json    # seconds: does it run?

This file needs torch, transformers and the package, no weights, no tokenizer and no network: what a pass costs does not
depend on the numbers in it. Prompts are 100 to 200 random token ids, answers 5 to 20. LoRA goes through peft where peft is
installed and is written by hand otherwise; the results say which.

Contenders run one after the other on the same weights. Each runs once unseen and then for some rounds, the device
synchronised at both ends of each. Reported are the median time, tokens a second (a record's tokens count once, however often
somebody reads them), and the peak of allocated device memory above the weights of the one model that everybody needs; on
a processor it is resident memory (Linux), which a process gives back late, so only a GPU's figures are worth a comparison.
Who runs out of memory is recorded as such, and the others go on.

Legend: B rows, T positions, N supervised places, d hidden size, V vocabulary, F SAE width.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config

from bad_neurons.batching import batches_by_length, pack_sequences
from bad_neurons.data.tuning import TuningBatch
from bad_neurons.evaluation.scoring import Request, answer_log_probs
from bad_neurons.models.passes import Runner, checkpointed, finish, open_frame, plain, run_layers
from bad_neurons.models.view import MATRICES, DecoderView, view_decoder
from bad_neurons.probe.features import Example, Pooling, extract_features
from bad_neurons.selection.neurons import NeuronSelection
from bad_neurons.tuning.clean_cache import CleanCache, CleanPass
from bad_neurons.tuning.edits import NeuronDelta
from bad_neurons.tuning.losses import Supervision, dense_loss_sums, loss_sums

SHARE, ALPHA, BETA, LR, RANK = 0.03, 1.0, 0.01, 1e-4, 16  # of the neurons; of the KL; of the entropy; of AdamW; of LoRA
RECORDS, BATCH, BOS = 32, 8, 2
HEAD_PLACES = (256, 512, 1024, 2048, 4096)


class Size(NamedTuple):
    """Shapes of one model.

    Attributes:
        config: arguments of ``Gemma2Config``.
        layers: layers that are read by SAEs and edited: nine, over the depth as in arXiv 2601.18939.
        d_sae: SAE width F.
        dtype: dtype of the weights.
    """

    config: dict[str, int]
    layers: tuple[int, ...]
    d_sae: int = 16_384
    dtype: torch.dtype = torch.bfloat16


def _config(L: int, d: int, m: int, heads: int, kv: int, head_dim: int, scalar: int, V: int = 256_000) -> dict[str, int]:
    return {
        "num_hidden_layers": L, "hidden_size": d, "intermediate_size": m, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": head_dim, "query_pre_attn_scalar": scalar, "vocab_size": V,
    }  # fmt: skip


SIZES = {
    "gemma-2-2b": Size(_config(26, 2304, 9216, 8, 4, 256, 256), (5, 6, 7, 8, 11, 13, 15, 19, 24)),
    "gemma-2-9b": Size(_config(42, 3584, 14_336, 16, 8, 256, 256), (8, 10, 12, 14, 17, 20, 23, 28, 34)),
    "gemma-2-27b": Size(_config(46, 4608, 36_864, 32, 16, 128, 144), (9, 11, 13, 15, 19, 22, 25, 31, 42)),
    "tiny": Size(_config(6, 64, 96, 4, 2, 16, 16, V=512), (1, 2, 4), 256, torch.float32),
}


class Record(NamedTuple):
    """A prompt with two answers, as token ids."""

    prompt: list[int]
    answers: list[list[int]]


class Work(NamedTuple):
    """What every contender starts from.

    Attributes:
        view: a view on the frozen model.
        layers: layers that are read and edited.
        records: the data.
        batches: the records with their first answers, for tuning.
        d_sae: SAE width.
    """

    view: DecoderView
    layers: list[int]
    records: list[Record]
    batches: list[TuningBatch]
    d_sae: int

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.view.model

    @property
    def examples(self) -> list[Example]:
        """Every answer behind its prompt."""
        return [Example(r.prompt + answer, len(r.prompt)) for r in self.records for answer in r.answers]

    @property
    def example_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.ids) for example in self.examples)


Round = Callable[[], dict[str, Any]]
Contender = Callable[[Work], AbstractContextManager[Round]]  # sets up, gives a function that does one round, cleans up


def make_work(size: Size, layers: list[int], tokens: int, device: torch.device) -> Work:
    """The model, made on the device in its own dtype, and random data."""
    torch.manual_seed(0)

    def some(least: int, most: int) -> list[int]:
        return torch.randint(3, size.config["vocab_size"], (int(torch.randint(least, most + 1, ())),)).tolist()

    records = [Record([BOS, *some(99, 199)], [some(5, 20), some(5, 20)]) for _ in range(RECORDS)]
    config = Gemma2Config(**size.config, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=size.dtype, attn_implementation="eager")
    view = view_decoder(model.requires_grad_(False).eval())
    return Work(view, layers, records, tuning_batches(records, tokens, device), size.d_sae)


def tuning_batches(records: Sequence[Record], tokens: int, device: torch.device) -> list[TuningBatch]:
    """Batches of similar lengths, at most ``tokens`` each after padding; the answer's tokens are supervised."""
    batches = []
    for picked in batches_by_length([len(r.prompt + r.answers[0]) for r in records], tokens):
        rows = pack_sequences([records[i].prompt + records[i].answers[0] for i in picked])
        T = rows.input_ids.shape[1]
        ends = [(row * T + len(records[i].prompt), len(records[i].answers[0])) for row, i in enumerate(picked)]
        at = torch.tensor([place for end, count in ends for place in range(end - 1, end - 1 + count)])
        ones, key = torch.ones(len(at), device=device), str(len(batches))
        targets = rows.input_ids.flatten()[at + 1].to(device)
        nothing = torch.zeros_like(ones)
        batches.append(TuningBatch(rows.to(device), at.to(device), targets, ones, nothing, nothing, None, key))
    return batches


# Tuning -------------------------------------------------------------------------------------------------------------------


def selection_of(work: Work) -> NeuronSelection:
    """The same random 3 % of the residual indices of each layer for everybody."""
    d = work.view.d_model
    chosen = {n: sorted(torch.randperm(d, generator=torch.Generator().manual_seed(n))[: round(SHARE * d)].tolist()) for n in work.layers}
    return NeuronSelection("residual", chosen, d, work.layers, "random weights", "", {"name": "random"})


def epochs(work: Work, weights: list[nn.Parameter], loss_of: Callable[[TuningBatch], Tensor]) -> Round:
    """One epoch a round, AdamW after each batch; ``loss_of`` gives the mean over the batch's answer tokens."""
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
    seen: list[float] = []
    counted = {"units": sum(int(b.rows.attention_mask.sum()) for b in work.batches), "trained": sum(w.numel() for w in weights)}

    def run() -> dict[str, Any]:
        for batch in work.batches:
            loss = loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(loss.detach()))
        return {**counted, "loss_at_step_0": seen[0], "loss_now": seen[-1]}

    return run


def ours(cached: bool, layer_by: Runner = plain) -> Contender:
    """The chosen rows and columns alone, as :class:`bad_neurons.tuning.module.NeuronTuner` does it."""

    @contextmanager
    def contender(work: Work) -> Iterator[Round]:
        view, selection = work.view, selection_of(work)
        edit, first = NeuronDelta(view, selection), selection.first_layer
        kept = CleanCache(2**62, None, "")

        def loss_of(batch: TuningBatch) -> Tensor:
            cache = kept if cached else CleanCache(2**62, None, "")
            frame, inside = open_frame(view, batch.rows), batch.rows.attention_mask.bool()
            if (clean := cache.get(batch.key)) is None:
                with edit.disabled(), torch.no_grad():
                    below = run_layers(view, frame, frame.embedded, last=first)
                    clean = CleanPass(below[inside], finish(view, frame, below, first, batch.at, layer_by))
                    del below
                cache.put(batch.key, clean)
            hidden, final = (t.to(view.device, non_blocking=True) for t in clean[:2])
            hidden = torch.zeros_like(frame.embedded).masked_scatter_(inside[..., None], hidden)
            tuned = finish(view, frame, hidden, first, batch.at, layer_by)
            return loss_sums(view, tuned, Supervision(final, batch.targets, batch.answer, batch.answer), ALPHA, 0.0).loss / len(batch.at)

        try:
            yield epochs(work, edit.trainable(), loss_of)
        finally:
            edit.remove()

    return contender


Forward = Callable[[DecoderView, Callable[[], AbstractContextManager[DecoderView]], TuningBatch], Tensor]


def as_written(tuned: DecoderView, reference: Callable[[], AbstractContextManager[DecoderView]], batch: TuningBatch) -> Tensor:
    """CE + alpha KL as people write it: labels passed to transformers, logits [B, T, V] of both models."""
    flat = torch.full_like(batch.rows.input_ids, -100).flatten()
    labels = flat.index_copy(0, batch.at + 1, batch.targets).view_as(batch.rows.input_ids)
    rows = {"input_ids": batch.rows.input_ids, "attention_mask": batch.rows.attention_mask, "use_cache": False}
    output = tuned.model(**rows, labels=labels)
    with torch.no_grad(), reference() as clean:
        clean_logits = clean.model(**rows).logits
    at = labels.roll(-1, 1) != -100
    return output.loss + ALPHA * _kl(output.logits[at].float(), clean_logits[at].float())  # type: ignore[no-any-return]


def where_needed(tuned: DecoderView, reference: Callable[[], AbstractContextManager[DecoderView]], batch: TuningBatch) -> Tensor:
    """The same with the head at the N supervised places alone, a saving of ours given to the others."""

    def logits(view: DecoderView) -> Tensor:
        rows = {"input_ids": batch.rows.input_ids, "attention_mask": batch.rows.attention_mask, "use_cache": False}
        return view.logits(view.backbone(**rows).last_hidden_state.flatten(0, 1)[batch.at])

    of_tuned = logits(tuned)
    with torch.no_grad(), reference() as clean:
        of_clean = logits(clean)
    return F.cross_entropy(of_tuned, batch.targets) + ALPHA * _kl(of_tuned, of_clean)


def _kl(tuned: Tensor, clean: Tensor) -> Tensor:
    return F.kl_div(tuned.log_softmax(-1), clean.log_softmax(-1), reduction="batchmean", log_target=True)


def masked(forward: Forward) -> Contender:
    """Full matrices under a gradient mask, AdamW over them, and a second model for the KL."""

    @contextmanager
    def contender(work: Work) -> Iterator[Round]:
        tuned = view_decoder(copy.deepcopy(work.model))
        weights = []
        for layer, indices in selection_of(work).layers.items():
            for name in MATRICES:
                weight: Any = tuned.layers[layer].matrix(name).weight
                mask = torch.zeros(tuned.d_model, dtype=weight.dtype, device=weight.device)
                mask[indices] = 1.0
                own = mask[:, None] if name == "down_proj" else mask
                weight.requires_grad_(True).register_hook(lambda gradient, own=own: gradient * own)
                weights.append(weight)
        yield epochs(work, weights, lambda batch: forward(tuned, lambda: nullcontext(work.view), batch))

    return contender


class Adapter(NamedTuple):
    """LoRA on the MLP matrices of some layers: what learns, the context in which it is off, and how to take it off."""

    weights: list[nn.Parameter]
    disabled: Callable[[], AbstractContextManager[Any]]
    remove: Callable[[], Any]


def lora_of_peft(work: Work) -> Adapter:
    """LoRA through peft."""
    from peft import LoraConfig, get_peft_model

    where = rf".*\.layers\.({'|'.join(map(str, work.layers))})\.mlp\.({'|'.join(MATRICES)})"
    adapter = get_peft_model(work.model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=where))
    return Adapter([p for p in adapter.parameters() if p.requires_grad], adapter.disable_adapter, adapter.unload)


def lora_by_hand(work: Work) -> Adapter:
    """LoRA by forward hooks: ``y + (x A^T) B^T`` with A [r, in] random, B [out, r] zero, both float32 (arXiv 2106.09685)."""
    weights, handles, on = [], [], [True]
    for layer in work.layers:
        for name in MATRICES:
            linear = work.view.layers[layer].matrix(name)
            A = nn.Parameter(torch.randn(RANK, linear.in_features, device=linear.weight.device) / linear.in_features**0.5)
            B = nn.Parameter(torch.zeros(linear.out_features, RANK, device=linear.weight.device))

            def add(_module: nn.Module, args: Any, y: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
                return y + F.linear(F.linear(args[0], A.to(y.dtype)), B.to(y.dtype)) if on[0] else y

            weights += [A, B]
            handles.append(linear.register_forward_hook(add))

    @contextmanager
    def disabled() -> Iterator[None]:
        on[0] = False
        try:
            yield
        finally:
            on[0] = True

    return Adapter(weights, disabled, lambda: [handle.remove() for handle in handles])


def lora(make: Callable[[Work], Adapter], forward: Forward) -> Contender:
    """LoRA at the same matrices; the clean model is the same one with the adapter off."""

    @contextmanager
    def contender(work: Work) -> Iterator[Round]:
        adapter = make(work)

        @contextmanager
        def clean() -> Iterator[DecoderView]:
            with adapter.disabled():
                yield work.view

        try:
            yield epochs(work, adapter.weights, lambda batch: forward(work.view, clean, batch))
        finally:
            adapter.remove()

    return contender


# Head ---------------------------------------------------------------------------------------------------------------------


def head(places: int, loss: Callable[..., Any]) -> Contender:
    """Forward and backward of CE + alpha KL - beta entropy from final hidden states [N, d]."""

    @contextmanager
    def contender(work: Work) -> Iterator[Round]:
        view = work.view
        random = torch.Generator(view.device).manual_seed(places)
        shape = (2, places, view.d_model)
        clean, near = torch.randn(shape, generator=random, device=view.device).to(view.head.weight.dtype)
        targets = torch.randint(view.head.out_features, (places,), generator=random, device=view.device)
        ones = torch.ones(places, device=view.device)
        tuned = (clean + 0.1 * near).requires_grad_()

        def run() -> dict[str, Any]:
            tuned.grad = None
            sums = loss(view, tuned, Supervision(clean, targets, ones, ones), ALPHA, BETA)
            sums.loss.backward()
            return {"units": places, "loss": float(sums.loss.detach()) / places}

        yield run

    return contender


# Extraction ---------------------------------------------------------------------------------------------------------------


class JumpReLU:
    """An SAE of random numbers with the form of Gemma Scope's (arXiv 2408.05147): a feature below its threshold is 0."""

    def __init__(self, d: int, d_sae: int, device: torch.device) -> None:
        self.W_enc, self.W_dec = (torch.randn(shape, device=device) / d**0.5 for shape in ((d, d_sae), (d_sae, d)))
        self.b_enc, self.threshold = torch.zeros(d_sae, device=device), torch.full((d_sae,), 2.9, device=device)

    def encode(self, x: Tensor) -> Tensor:
        """Features [P, F] of activations [P, d]."""
        before = x @ self.W_enc + self.b_enc
        return before * (before > self.threshold)


class Loaded:
    """SAEs that all lie in memory, with the interface of :class:`bad_neurons.sae.load.SAEs`."""

    def __init__(self, work: Work) -> None:
        torch.manual_seed(1)
        self.turns = [work.layers]
        self.saes = {layer: JumpReLU(work.view.d_model, work.d_sae, work.view.device) for layer in work.layers}

    def load(self, turn: Sequence[int]) -> dict[int, JumpReLU]:
        """All of them."""
        return self.saes


@contextmanager
def ours_extracting(work: Work) -> Iterator[Round]:
    """``extract_features`` into an empty folder; writing to the disk is part of its time."""
    saes: Any = Loaded(work)
    pooling = Pooling("max", "answer")

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            found = extract_features(work.view, work.examples, saes, work.layers, [pooling], Path(folder), "full size")
            features = [found.read(pooling, "sae", layer) for layer in work.layers]
        return {"units": work.example_tokens, "mean_feature": _mean(features)}

    yield run


@contextmanager
def everything_kept(work: Work) -> Iterator[Round]:
    """The whole model with its logits, the output of every layer and of every MLP kept; then the SAEs on all tokens; then the pooling."""
    saes, kept, examples = Loaded(work).saes, {}, work.examples

    def keep(kind: str, layer: int) -> Callable[..., None]:
        return lambda _module, _args, output: kept.update({(kind, layer): output})

    handles = [part.sae_point.register_forward_hook(keep("mlp", layer)) for layer, part in enumerate(work.view.layers)]
    handles += [part.layer.register_forward_hook(keep("layer", layer)) for layer, part in enumerate(work.view.layers)]

    def run() -> dict[str, Any]:
        pooled: dict[int, list[Tensor]] = {layer: [] for layer in saes}
        for picked in _eights([len(e.ids) for e in examples]):
            rows = pack_sequences([examples[i].ids for i in picked]).to(work.view.device)
            starts = torch.tensor([examples[i].answer_start for i in picked], device=work.view.device)
            outside = (rows.positions < starts[:, None]) | (rows.attention_mask == 0)
            with torch.no_grad():
                work.model(rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
                for layer, sae in saes.items():
                    features = sae.encode(kept["mlp", layer].float()).masked_fill(outside[..., None], float("-inf"))
                    pooled[layer].append(features.amax(1).cpu())
            kept.clear()
        return {"units": work.example_tokens, "mean_feature": _mean(torch.cat(parts) for parts in pooled.values())}

    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _mean(parts: Any) -> float:
    return float(torch.stack([part.double().mean() for part in parts]).mean())


def _eights(lengths: Sequence[int]) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


# Evaluation ---------------------------------------------------------------------------------------------------------------


class Numbers:
    """A tokenizer whose words are token ids."""

    chat_template, bos_token_id = None, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """The numbers in ``text``."""
        return {"input_ids": [int(word) for word in text.split() if word.isdigit()]}


@contextmanager
def moved(work: Work) -> Iterator[NeuronDelta]:
    """An edit that changes the model."""
    edit = NeuronDelta(work.view, selection_of(work))
    random = torch.Generator(work.view.device).manual_seed(2)
    for value in edit.trainable():
        value.data.normal_(0.0, 0.1, generator=random)
    try:
        yield edit
    finally:
        edit.remove()


@contextmanager
def ours_evaluating(work: Work) -> Iterator[Round]:
    """``answer_log_probs``: prompts shared, layers below the edit run once for both sides."""
    tokenizer: Any = Numbers()
    words = [(" ".join(map(str, r.prompt)), " ".join(map(str, answer))) for r in work.records for answer in r.answers]
    requests = [Request([{"role": "user", "content": prompt}], answer) for prompt, answer in words]
    with moved(work) as edit:
        yield lambda: _scored(work, *answer_log_probs(work.view, tokenizer, requests, edit))


@contextmanager
def one_a_row(work: Work) -> Iterator[Round]:
    """Eight requests a batch, one a row, logits of every token; all of it without the edit and again with it."""
    with moved(work) as edit:

        def run() -> dict[str, Any]:
            with edit.disabled():
                before = _one_a_row(work)
            return _scored(work, before, _one_a_row(work))

        yield run


def _one_a_row(work: Work) -> list[float]:
    scores = []
    examples = work.examples
    for picked in _eights([len(e.ids) for e in examples]):
        rows = pack_sequences([examples[i].ids[:-1] for i in picked]).to(work.view.device)  # nothing is asked of the last token
        with torch.no_grad():
            logits = work.model(rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
            for row, example in enumerate(examples[i] for i in picked):
                places = slice(example.answer_start - 1, len(example.ids) - 1)
                targets = torch.tensor(example.ids[example.answer_start :], device=logits.device)[:, None]
                scores.append(float(logits[row, places].float().log_softmax(-1).gather(-1, targets).sum()))
    return scores


def _scored(work: Work, before: Sequence[float], after: Sequence[float] | None) -> dict[str, Any]:
    assert after is not None
    return {"units": work.example_tokens, "before": statistics.fmean(before), "after": statistics.fmean(after)}


# Measuring ----------------------------------------------------------------------------------------------------------------


class Meter:
    """Time and memory of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def settle(self) -> int:
        """Give back what nobody uses, start counting the peak anew, and tell what is in use, in bytes."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        Path("/proc/self/clear_refs").write_text("5")
        return self._status("VmRSS")

    def peak(self) -> int:
        """Most bytes in use since :meth:`settle`."""
        return torch.cuda.max_memory_allocated(self.device) if self.gpu else self._status("VmHWM")

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(work: Work, contender: Contender, rounds: int, meter: Meter) -> dict[str, Any]:
    """Run one contender; ``seconds`` is the median, ``peak_bytes`` that of setting up and all rounds."""
    base, seconds = meter.settle(), []
    try:
        with contender(work) as run:
            run()
            for _ in range(rounds):
                meter.synchronize()
                start = time.perf_counter()
                counted = run()
                meter.synchronize()
                seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    median = statistics.median(seconds)
    rate = counted["units"] / median
    return {"seconds": median, "seconds_all": seconds, "rate": rate, "peak_bytes": meter.peak() - base, "base_bytes": base, **counted}


def contenders() -> dict[str, dict[str, Contender]]:
    """Everybody, by kind of work and name."""
    with_peft = importlib.util.find_spec("peft") is not None
    make, name = (lora_of_peft, "peft LoRA") if with_peft else (lora_by_hand, "LoRA by hand")
    tuning = {
        "masked matrices + second model, as written": masked(as_written),
        "masked matrices + second model, logits where needed": masked(where_needed),
        f"{name}, as written": lora(make, as_written),
        f"{name}, logits where needed": lora(make, where_needed),
        "bad-neurons, first epoch": ours(cached=False),
        "bad-neurons, clean pass cached": ours(cached=True),
        "bad-neurons, clean pass cached, checkpointing": ours(cached=True, layer_by=checkpointed(plain)),
    }
    heads = {
        f"{kind}, {places} places": head(places, loss)
        for places in HEAD_PLACES
        for kind, loss in (("dense", dense_loss_sums), ("chunked", loss_sums))
    }
    extraction: dict[str, Contender] = {"whole pass, everything kept, then encoded": everything_kept, "bad-neurons": ours_extracting}
    evaluation: dict[str, Contender] = {"one request a row, twice": one_a_row, "bad-neurons": ours_evaluating}
    return {"tuning": tuning, "head": heads, "extraction": extraction, "evaluation": evaluation}


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name and memory of the device, and versions."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "peft", "bad-neurons"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine(), "memory_bytes": None, "versions": versions}
    facts = torch.cuda.get_device_properties(device)
    return {"name": facts.name, "memory_bytes": facts.total_memory, "versions": versions}


def table(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The figures as text, one contender a line."""
    lines = [f"{'':<64} {'seconds':>9} {'tokens/s':>10} {'peak, MiB above the weights':>28}"]
    for work, rows in results.items():
        for name, row in rows.items():
            figures = f"{'out of memory':>9}"
            if "seconds" in row:
                figures = f"{row['seconds']:9.3f} {row['rate']:10,.0f} {row['peak_bytes'] / 2**20:28,.0f}"
            lines.append(f"{work + ': ' + name:<64} {figures}")
    return "\n".join(lines)


def main() -> None:
    """Measure everybody, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--model", choices=SIZES, required=True, help="whose shapes")
    parser.add_argument("--device", default="cuda", help="a torch device string, cuda or cpu")
    parser.add_argument("--layers", type=int, nargs="+", help="layers that are read and edited; default: nine over the depth")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of one tuning batch, padding included")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--out", type=Path, help="JSON file; default: results/<date>-<model>-<device>.json beside this script")
    given = parser.parse_args()
    device, size = torch.device(given.device), SIZES[given.model]
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("full-size benchmark: torch sees no GPU here; --model tiny --device cpu tells whether the script runs")
    work = make_work(size, sorted(given.layers or size.layers), given.tokens, device)
    work.view.check_layers(work.layers, "--layers")
    results: dict[str, dict[str, Any]] = {}
    meter = Meter(device)
    for kind, named in contenders().items():
        for name, contender in named.items():
            results.setdefault(kind, {})[name] = measure(work, contender, given.rounds, meter)
            sys.stderr.write(f"{kind}: {name}: {'out of memory' if 'seconds' not in results[kind][name] else 'done'}\n")
    facts = device_facts(device)
    content = {
        "model": given.model, "config": size.config, "dtype": str(size.dtype), "layers": work.layers, "batch_tokens": given.tokens,
        "weights_bytes": sum(p.numel() * p.element_size() for p in work.model.parameters()), "device": facts,
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "results": results,
    }  # fmt: skip
    place = "-".join(str(facts["name"]).lower().split())
    out = given.out or Path(__file__).parent / "results" / f"{datetime.now(UTC):%Y-%m-%d}-{given.model}-{place}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{table(results)}\n{out}\n")


if __name__ == "__main__":
    main()
