"""Features of answers for the probe: this package against TransformerLens with sae-lens, and against the bare matrix products.

The work: both answers to questions of the PHIL set, nine layers of Gemma 3 270M in bfloat16, a top-k SAE (width 4,096, k 32,
float32, random weights) a layer, the largest value of each feature over the answer's tokens, and the same of the activations
that the SAE reads. Units are tokens of prompt and answer, counted the plain way for everybody.

Contenders, all on the same weights:

- TransformerLens' ``run_with_cache`` in batches of eight as the records come, ``sae.encode`` on every token, then the pooling:
  ``HookedTransformer`` (what sae-lens loads by default) as most people write it (everything cached), with a ``names_filter``
  (needed), and given our trick with ``stop_at_layer`` beside it (no layers behind the last, no logits); the last two also
  with ``TransformerBridge``, its successor.
- bare: the Hugging Face backbone cut behind the last layer, batches by length, and ``x @ W_enc + b_enc`` at the answers'
  positions. No top-k, no pooling, nothing kept: less than the work.
- ``bad_neurons.probe.features.extract_features`` into an empty folder.

Run (Linux; the data is looked for in ``BAD_NEURONS_DATA``)::

    python benchmarks/extraction.py
    python benchmarks/extraction.py --rounds 5 --items 64
    python benchmarks/extraction.py --quick

Legend: B sequences, T positions, d hidden size, F SAE width, N examples.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import harness
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bad_neurons.batching import batches_by_length
from bad_neurons.data.readers import available, load_records
from bad_neurons.models.load import LanguageModel, load_model, resolve_model
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import DecoderView, view_decoder
from bad_neurons.probe.features import Example, Pooling, extract_features
from bad_neurons.sae.load import SAEs
from bad_neurons.testing import save_tiny_saes

MODEL = "packaged:gemma-3-270m"
RECORDS = "anthropic:phil"
LAYERS = tuple(range(4, 13))
D_MODEL, D_SAE, K = 640, 4096, 32
BATCH = 8
BATCH_TOKENS = 2048
COMPARED = 16  # examples whose features are compared

Features = dict[str, Tensor]
Cache = Literal["everything", "needed", "needed, stop"]


class Task(NamedTuple):
    """What every contender starts from.

    Attributes:
        lm: the model.
        view: a view on it.
        saes: the SAEs, in memory.
        examples: prompts with an answer, two a record.
    """

    lm: LanguageModel
    view: DecoderView
    saes: SAEs
    examples: list[Example]


def load_task(saes: str, items: int, dtype: str) -> Task:
    """Load the model, note the memory that it takes, then the SAEs and ``items`` examples (of more the first are the same)."""
    import sae_lens  # noqa: F401  (before the base, so that its code counts for nobody)
    import transformer_lens  # noqa: F401

    warnings.filterwarnings("ignore")
    lm = load_model(MODEL, dtype)  # type: ignore[arg-type]
    view = view_decoder(lm.model)
    harness.mark_base()
    records = load_records(RECORDS)
    random.Random(0).shuffle(records)
    examples = []
    for record in records[: items // 2]:
        for answer in (record.disagreeing, record.agreeing):
            ids = tokenize(lm.tokenizer, record.prompt, answer)
            examples.append(Example(ids.prompt + ids.answer, len(ids.prompt)))
    loaded = SAEs(saes, LAYERS, view.d_model)
    loaded.load(LAYERS)
    return Task(lm, view, loaded, examples)


def count_tokens(examples: Sequence[Example]) -> int:
    """Tokens of prompt and answer, summed over the examples."""
    return sum(len(example.ids) for example in examples)


class Batch(NamedTuple):
    """Examples padded on the right.

    Attributes:
        ids: [B, T].
        answer: [B, T] bool, true at the answers' tokens.
    """

    ids: Tensor
    answer: Tensor


def pad_batch(examples: Sequence[Example]) -> Batch:
    """Put examples into one rectangle; right padding is invisible to a causal model's tokens."""
    ids = torch.zeros(len(examples), max(len(example.ids) for example in examples), dtype=torch.long)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        answer[row, example.answer_start : len(example.ids)] = True
    return Batch(ids, answer)


def set_up_lens(saes: str, items: int, out: str, bridge: bool, cache: Cache, dtype: str = "bfloat16") -> harness.Round:
    """TransformerLens and sae-lens, as people write it.

    Args:
        saes: folder of the SAEs.
        items: number of examples.
        out: file that gets the features of the first examples.
        bridge: TransformerBridge instead of HookedTransformer.
        cache: which activations are kept, and whether the pass stops behind the last of them.
        dtype: dtype of the model.
    """
    task = load_task(saes, items, dtype)
    model = _lens_model(task.lm, bridge)
    saes_by_layer, examples = task.saes.load(LAYERS), task.examples
    del task  # HookedTransformer has the weights a second time
    names = [f"blocks.{layer}.hook_mlp_out" for layer in LAYERS]  # in Gemma behind the norm that follows the MLP
    options: dict[str, Any] = {} if cache == "everything" else {"names_filter": names}
    if cache == "needed, stop":
        options["stop_at_layer"] = LAYERS[-1] + 1

    def extract(examples: Sequence[Example]) -> Features:
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(examples), BATCH):
            batch = pad_batch(examples[start : start + BATCH])
            with torch.no_grad():
                _, cached = model.run_with_cache(batch.ids, **options)
                for layer, name in zip(LAYERS, names, strict=True):
                    acts = cached[name].float()
                    for kind, values in (("residual", acts), ("sae", saes_by_layer[layer].encode(acts))):
                        parts.setdefault(f"{kind}.{layer}", []).append(_largest(values, batch.answer))
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    return _round(examples, extract, out)


def _lens_model(lm: LanguageModel, bridge: bool) -> Any:
    """The same weights inside TransformerLens, without folding and centring; nothing is fetched from a network."""
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    dtype = lm.model.dtype
    with contextlib.redirect_stdout(io.StringIO()):
        if bridge:
            return TransformerBridge.boot_transformers(resolve_model(MODEL), hf_model=lm.model, tokenizer=lm.tokenizer, dtype=dtype)
        return HookedTransformer.from_pretrained_no_processing(
            "google/gemma-3-270m", hf_model=lm.model, tokenizer=lm.tokenizer, dtype=dtype
        )


def _lens_name(bridge: bool) -> str:
    return "TransformerBridge" if bridge else "HookedTransformer"


def _largest(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask[..., None], float("-inf")).amax(1)


def set_up_bare(saes: str, items: int) -> harness.Round:
    """The passes through the layers up to the last one that is read, and the products with the encoders' matrices."""
    task = load_task(saes, items, "bfloat16")
    backbone = task.view.backbone
    backbone.layers = backbone.layers[: LAYERS[-1] + 1]
    tokens = count_tokens(task.examples)
    found: dict[int, Tensor] = {}
    for layer in LAYERS:
        task.view.layers[layer].sae_point.register_forward_hook(lambda _module, _args, output, layer=layer: found.update({layer: output}))

    def run() -> dict[str, Any]:
        for numbers in batches_by_length([len(example.ids) for example in task.examples], BATCH_TOKENS):
            batch = pad_batch([task.examples[i] for i in numbers])
            with torch.no_grad():
                backbone(input_ids=batch.ids, use_cache=False)
                for layer, sae in task.saes.load(LAYERS).items():
                    found[layer][batch.answer].to(sae.W_enc.dtype) @ sae.W_enc + sae.b_enc
        return {"units": tokens}

    run()
    return run


def set_up_ours(saes: str, items: int, out: str, dtype: str = "bfloat16") -> harness.Round:
    """This package; see :func:`set_up_lens` for the arguments."""
    task = load_task(saes, items, dtype)

    pooling = Pooling("max", "answer")

    def extract(examples: Sequence[Example]) -> Features:
        with tempfile.TemporaryDirectory() as folder:
            found = extract_features(task.view, examples, task.saes, LAYERS, [pooling], Path(folder), "benchmark")
            return {f"{kind}.{layer}": found.read(pooling, kind, layer) for layer in LAYERS for kind in ("residual", "sae")}

    return _round(task.examples, extract, out)


def _round(examples: Sequence[Example], extract: Callable[[Sequence[Example]], Features], out: str) -> harness.Round:
    """A round of ``extract``; the first examples warm up, and their features are kept for the comparison."""
    tokens = count_tokens(examples)
    save_file({name: values.float().contiguous() for name, values in extract(examples[:COMPARED]).items()}, out)

    def run() -> dict[str, Any]:
        extract(examples)
        return {"units": tokens}

    return run


def relative_error(features: Features, reference: Features) -> dict[str, float]:
    """Norm of the difference over the norm of the reference, of the worst layer, for both kinds of features."""
    return {
        kind: max(float((features[name] - values).norm() / values.norm()) for name, values in reference.items() if name.startswith(kind))
        for kind in ("residual", "sae")
    }


def contenders(saes: str, items: int, folder: Path) -> list[harness.Contender]:
    """All of them; ``folder`` gets their features."""
    lens = [
        harness.Contender(
            f"{_lens_name(bridge)}, {cache}",
            "extraction:set_up_lens",
            {"saes": saes, "items": items, "out": str(folder / f"{_lens_name(bridge)}, {cache}"), "bridge": bridge, "cache": cache},
            warm_up=0,
        )
        for bridge, cache in ((False, "everything"), (False, "needed"), (False, "needed, stop"), (True, "needed"), (True, "needed, stop"))
    ]
    own = {"saes": saes, "items": items}
    return [
        *lens,
        harness.Contender("bare", "extraction:set_up_bare", own, warm_up=0),
        harness.Contender("bad-neurons", "extraction:set_up_ours", {**own, "out": str(folder / "bad-neurons")}, warm_up=0),
    ]


def compare_features(saes: str, folder: Path) -> dict[str, Any]:
    """How far the features are from each other: among contenders in float32, and of each in bfloat16 from float32.

    Rounding moves features near the top-k threshold in or out, so in bfloat16 nobody's SAE features equal anybody's to
    rounding; what can be asked is that ours are as near to float32 as the others' are.

    Args:
        saes: folder of the SAEs.
        folder: its ``rounds`` has the features of the contenders, see :func:`contenders`.
    """
    exact = str(folder / "float32")
    set_up_ours(saes, COMPARED, exact, "float32")
    ours = load_file(exact)
    others = {}
    for bridge in (False, True):
        path = str(folder / f"float32-{bridge}")
        set_up_lens(saes, COMPARED, path, bridge, "needed", "float32")
        others[_lens_name(bridge)] = relative_error(load_file(path), ours)
    rounded = {path.name: relative_error(load_file(path), ours) for path in sorted((folder / "rounds").iterdir())}
    return {"examples": COMPARED, "float32 from ours in float32": others, "bfloat16 from ours in float32": rounded}


def main() -> None:
    """Run the comparison and add it to the results of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--items", type=int, default=32, help="answers, two a question; at least 16")
    parser.add_argument("--quick", action="store_true", help="one round with 16 answers, nothing written")
    options = parser.parse_args()
    if not available(RECORDS):
        sys.exit("set BAD_NEURONS_DATA to the folder that holds the model-written evaluations (sycophancy_on_philpapers2020.jsonl)")
    rounds, items = (1, 16) if options.quick else (options.rounds, options.items)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        saes = save_tiny_saes(folder / "saes", LAYERS, D_MODEL, D_SAE, K)
        (folder / "rounds").mkdir()
        rows = harness.compare(contenders(saes, items, folder / "rounds"), rounds)
        agreement = compare_features(saes, folder)
    seconds = {name: row["seconds"] for name, row in rows.items()}
    results = {
        "rows": rows,
        "ratios": {f"{name} / bad-neurons, seconds": taken / seconds["bad-neurons"] for name, taken in seconds.items()},
        "agreement": agreement,
    }
    sys.stdout.write(json.dumps({name: results[name] for name in ("ratios", "agreement")}, indent=1) + "\n")
    if not options.quick:
        sys.stdout.write(f"{harness.write_results('extraction', results)}\n")


if __name__ == "__main__":
    main()
