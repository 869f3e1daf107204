"""The head: our chunked loss against dense logits with autograd, on the real head of Gemma 3 270M (V 262,144, d 640, bfloat16).

The work: forward and backward of CE + alpha KL - beta entropy (alpha 1, beta 0.01) by the final hidden states. Those of the
clean model are of real text, PHIL prompts; those of the tuned model are the same with some noise. Units are supervised tokens.

Contenders: ``loss_sums``, and ``dense_loss_sums``, which is plain PyTorch: all logits at once, log-softmax, autograd.

Run (Linux; the data is looked for in ``BAD_NEURONS_DATA``; the dense form needs 14 GB of memory)::

    python benchmarks/head.py
    python benchmarks/head.py --quick

Legend: N supervised tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Contender, Round, compare, mark_base, write_results
from torch import Tensor

from bad_neurons.batching import pack_sequences
from bad_neurons.data.readers import available, load_records
from bad_neurons.models.load import load_model
from bad_neurons.models.passes import final_hidden
from bad_neurons.models.prompts import tokenize
from bad_neurons.models.view import DecoderView, view_decoder
from bad_neurons.tuning.losses import LossSums, Supervision, dense_loss_sums, loss_sums

MODEL, RECORDS = "packaged:gemma-3-270m", "anthropic:phil"
ALPHA, BETA, NOISE = 1.0, 0.01, 0.1
SMALL, LARGE = 256, 2048
FORMS: dict[str, Callable[..., LossSums]] = {"chunked": loss_sums, "dense": dense_loss_sums}


class Task(NamedTuple):
    """What every contender starts from.

    Attributes:
        view: gives the head.
        tuned: final hidden states [N, d] of the tuned model, a leaf with gradients.
        asked: the clean model's, and the tokens that follow.
    """

    view: DecoderView
    tuned: Tensor
    asked: Supervision


def load_task(count: int) -> Task:
    """The first ``count`` positions of the PHIL prompts behind their BOS; all of them are answers and are to stay."""
    lm = load_model(MODEL, "bfloat16", "cpu")
    view = view_decoder(lm.model)
    hidden, targets = [], []
    for record in load_records(RECORDS):
        ids = tokenize(lm.tokenizer, record.prompt).prompt
        hidden.append(final_hidden(view, pack_sequences([ids]), torch.arange(1, len(ids) - 1)))
        targets.append(torch.tensor(ids[2:]))
        if sum(map(len, targets)) >= count:
            break
    clean, following, ones = torch.cat(hidden)[:count], torch.cat(targets)[:count], torch.ones(count)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean) * clean.float().std().to(clean)
    tuned = (clean + NOISE * noise).requires_grad_()
    return Task(view, tuned, Supervision(clean, following, ones, ones))


def head_setup(form: str, count: int) -> Round:
    """One of :data:`FORMS` at ``count`` tokens; a round gives the sums and the norm of the gradient as well."""
    task = load_task(count)
    small = Task(task.view, task.tuned.detach()[:4].requires_grad_(), Supervision(*(t if t is None else t[:4] for t in task.asked)))
    run_once(form, small)  # brings in the weights and the libraries' workspaces, which are nobody's own memory
    mark_base()

    def run() -> Mapping[str, Any]:
        result = run_once(form, task)
        means = {name: float(value.detach()) / count for name, value in result.sums._asdict().items()}
        return {"units": count, "per_token": means, "gradient_norm": float(result.gradient.norm())}

    return run


class Result(NamedTuple):
    """Losses and the gradient [N, d], float32, by the tuned hidden states."""

    sums: LossSums
    gradient: Tensor


def run_once(form: str, task: Task) -> Result:
    """Forward and backward."""
    sums = FORMS[form](task.view, task.tuned, task.asked, ALPHA, BETA)
    (gradient,) = torch.autograd.grad(sums.loss, task.tuned)
    return Result(sums, gradient.float())


def float32_result(task: Task) -> Result:
    """The same in float32, written with torch's own losses: what both forms round."""
    W = task.view.head.weight.detach().float()
    tuned = task.tuned.detach().float().requires_grad_()
    z, clean = tuned @ W.T, (task.asked.clean.float() @ W.T).log_softmax(-1)
    ce = F.cross_entropy(z, task.asked.targets, reduction="sum")
    kl = F.kl_div(z.log_softmax(-1), clean, reduction="sum", log_target=True)
    entropy = torch.distributions.Categorical(logits=z).entropy().sum()
    loss = ce + ALPHA * kl - BETA * entropy
    return Result(LossSums(loss, ce, kl, entropy), torch.autograd.grad(loss, tuned)[0])


def agreement_setup(count: int) -> Round:
    """Relative errors of both forms from :func:`float32_result`, and of one from the other."""
    task = load_task(count)

    def run() -> Mapping[str, Any]:
        exact, found = float32_result(task), {form: run_once(form, task) for form in FORMS}
        return {
            "tokens": count,
            **{f"{form} from float32": _errors(result, exact) for form, result in found.items()},
            "chunked from dense": _errors(found["chunked"], found["dense"]),
        }

    return run


def _errors(result: Result, reference: Result) -> dict[str, float]:
    errors = {
        name: abs(float((a - b).detach() / b.detach())) for name, a, b in zip(LossSums._fields, result.sums, reference.sums, strict=True)
    }
    return {**errors, "gradient": float((result.gradient - reference.gradient).norm() / reference.gradient.norm())}


def ratios(rows: Mapping[str, Mapping[str, Any]], large: int, small: int) -> dict[str, float]:
    """What was asked for (memory at least 10, time at most 1.15), and how both grow from ``small`` to ``large``."""
    found = {
        "dense / chunked, peak memory": rows[f"dense, {large}"]["peak_bytes"] / rows[f"chunked, {large}"]["peak_bytes"],
        "chunked / dense, seconds": rows[f"chunked, {large}"]["seconds"] / rows[f"dense, {large}"]["seconds"],
    }
    for form in FORMS:
        for what in ("seconds", "peak_bytes"):
            grown = rows[f"{form}, {large}"][what] / rows[f"{form}, {small}"][what]
            found[f"{form}, {what}, {large} / {small} tokens"] = grown
    return found


def main() -> None:
    """Run the comparison and add it to the results of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--quick", action="store_true", help="one round with an eighth of the tokens, nothing written")
    options = parser.parse_args()
    if not available(RECORDS):
        sys.exit("set BAD_NEURONS_DATA to the folder that holds the model-written evaluations (sycophancy_on_philpapers2020.jsonl)")
    small, large = (SMALL // 8, LARGE // 8) if options.quick else (SMALL, LARGE)
    rows = compare(
        [Contender(f"{form}, {count}", "head:head_setup", {"form": form, "count": count}) for count in (small, large) for form in FORMS],
        1 if options.quick else options.rounds,
    )
    agreement = compare([Contender("agreement", "head:agreement_setup", {"count": small}, warm_up=0)], 1)["agreement"]
    results = {"rows": rows, "ratios": ratios(rows, large, small), "agreement": agreement}
    sys.stdout.write(json.dumps(results, indent=1) + "\n")
    if not options.quick:
        sys.stdout.write(f"{write_results('head', results)}\n")


if __name__ == "__main__":
    main()
