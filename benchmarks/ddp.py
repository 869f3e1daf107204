"""Several processes give what one gives: losses, deltas, SAEs and scores with world sizes 1, 2 and 4, on tiny models.

Run: ``python benchmarks/ddp.py``. Processes of the CPU talk by gloo on the loopback, and see what torchrun would set. It measures no
time. ``tests/test_several_processes.py`` asserts on the same runs.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arithmetic import markdown

WORLDS = (1, 2, 4)
GLOBAL_BATCH = 4  # micro-batches of one optimizer step, over all processes
_PRELOADED = ["lightning", "transformers", "sae_lens", "bad_neurons.tuning.module", "bad_neurons.callbacks", "bad_neurons.sae.module"]


def in_world(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``work(*arguments)`` in so many processes that see each other as torchrun's do; what it gives in each, by rank.

    The processes are forked from a server that has imported the libraries, so a world costs little.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    started = [context.Process(target=_process, args=(rank, world, port, send, work, arguments)) for rank, (_, send) in enumerate(pipes)]
    for process, (_, send) in zip(started, pipes, strict=True):
        process.start()
        send.close()
    found = []
    for rank, (receive, _) in enumerate(pipes):
        try:
            found.append(receive.recv())
        except EOFError:
            found.append(f"rank {rank} ended without a word")
    for process in started:
        process.join()
    if failed := [text for text in found if isinstance(text, str)]:
        raise RuntimeError("\n".join(failed))
    return found


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def torchrun_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process of one machine."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0, "MASTER_PORT": port}
    return {name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "here"}


def _process(rank: int, world: int, port: int, send: Any, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    environment = torchrun_environment(rank, world, port) if world > 1 else {}
    os.environ |= environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        send.send({"value": work(*arguments)})
    except BaseException:
        send.send(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# What is tuned


def write_inputs(folder: Path) -> Path:
    """A tiny Gemma 2, 40 records of unequal lengths, chosen neurons and a delta, below ``folder``."""
    import torch

    from bad_neurons.models.load import load_model
    from bad_neurons.models.view import view_decoder
    from bad_neurons.selection.neurons import NeuronSelection, write_neurons
    from bad_neurons.testing import save_tiny_model
    from bad_neurons.tuning.delta_file import write_delta
    from bad_neurons.tuning.edits import NeuronDelta

    model = save_tiny_model(folder / "model", "gemma2")
    rows = []
    for number in range(40):
        thing, more = f"thing {number}", "!" * (number * 7 % 19)
        rows.append(
            {
                "prompt": f"I think {thing} is red{more} Is it?", "neutral_prompt": f"Is {thing} red?", "topic": f"topic {number % 8}",
                "honest": f"No, it is blue{more[:5]}.", "sycophantic": "Yes, it is red.", "person_is_right": False,
                "choices": [f"{thing} is red", f"{thing} is blue"],
            }
        )  # fmt: skip
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lm = load_model(model, "float32", "cpu")
    chosen = NeuronSelection("residual", {1: [0, 5, 15], 3: [2]}, 16, list(range(4)), lm.id, lm.digest, {"name": "by hand"})
    write_neurons(folder / "neurons.json", chosen)
    edit = NeuronDelta(view_decoder(lm.model), chosen)
    generator = torch.Generator().manual_seed(0)
    write_delta(
        folder / "delta.safetensors", chosen, {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in edit.deltas().items()}
    )
    return folder


def tune(folder: Path, out: str, epochs: int = 2, resume: str | None = None, cut_at: int = 0, **options: Any) -> dict[str, Any]:
    """Fit, validate and test the neurons of :func:`write_inputs` in this process, which may be one of several.

    Args:
        folder: of the inputs.
        out: name of the folder for checkpoints below it, one every third step and one at each epoch's end.
        epochs: how many.
        resume: checkpoint to go on from.
        cut_at: step behind which everything ends, as far as a test can end it; 0: none.
        options: of the data module, and ``tuner`` and ``trainer`` options.

    Returns:
        ``steps`` (the logged means of each), ``held_out`` (those of validation and test), ``deltas``, ``batches``.
    """
    import lightning as L
    from bad_neurons.callbacks import DeltaCheckpoint, FrozenAudit, GradientMask, NumberGuard
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    from bad_neurons.data.tuning import SycophancyDataModule
    from bad_neurons.tuning import sharded as sharded  # registers the strategy fsdp2
    from bad_neurons.tuning.module import NeuronTuner

    class Steps(Callback):
        def __init__(self) -> None:
            self.logged: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > len(self.logged) + first[0]:
                self.logged.append({n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("train/")})
            if cut_at and trainer.global_step == cut_at:
                raise RuntimeError("power cut")

        def on_train_start(self, trainer: Any, *_: Any) -> None:
            first.append(trainer.global_step)
            del first[0]

    first = [0]
    L.seed_everything(0, verbose=False)
    steps, world = Steps(), int(os.environ.get("WORLD_SIZE", "1"))
    tuner = {"alpha": 0.5, "beta": 0.1, "lr": 0.01, "weight_decay": 0.1, "warmup_steps": 2, **options.pop("tuner", {})}
    trainer_options = {
        "strategy": "ddp" if world > 1 else "auto", "accumulate_grad_batches": max(1, GLOBAL_BATCH // world), **options.pop("trainer", {})
    }  # fmt: skip
    data_options = {"target": "mixed", "batch_tokens": 220, "retention_rows": 1, "retention_tokens": 16, **options}
    module = NeuronTuner(str(folder / "model"), dtype="float32", **tuner)
    data = SycophancyDataModule(str(folder / "model"), str(folder / "records.jsonl"), **data_options)
    place = folder / out
    keep = [
        ModelCheckpoint(place, "{step}", save_top_k=-1, every_n_train_steps=3),
        ModelCheckpoint(place, "end-{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True),
    ]
    mask = GradientMask(str(folder / "neurons.json"))
    trainer = L.Trainer(
        accelerator="cpu", devices=world, max_epochs=epochs, gradient_clip_val=1.0, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, default_root_dir=folder, **trainer_options,
        callbacks=[mask, FrozenAudit(every_n_steps=1), NumberGuard(), DeltaCheckpoint(str(place / "delta.safetensors")), steps, *keep],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    held_out = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
    trainer.test(module, data, verbose=False)
    held_out |= {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("test/")}
    whole = sum(p.numel() for part in module.view.layers[:-1] for p in part.layer.parameters())
    here = sum(getattr(p, "_local_tensor", p).numel() for part in module.view.layers[:-1] for p in part.layer.parameters())
    deltas = {n: t.tolist() for n, t in module.edit.deltas().items()}  # type: ignore[union-attr]
    return {
        "steps": steps.logged,
        "held_out": held_out,
        "deltas": deltas,
        "batches": [len(b) for b in data._batches.values()],
        "share": here / whole,
    }


def fit_saes(folder: Path, out: str) -> dict[str, Any]:
    """Harvest activations and train SAEs of two layers in this process, which may be one of several; metrics and weights."""
    import lightning as L

    from bad_neurons.sae.harvest import ActivationDataModule
    from bad_neurons.sae.module import SAEFitter

    L.seed_everything(0, verbose=False)
    world, place = int(os.environ.get("WORLD_SIZE", "1")), folder / out
    data = ActivationDataModule(
        str(folder / "model"), [1, 2], str(place / "activations"), None, max_tokens=3000, batch_size=101, validation=0.1, dtype="float32"
    )
    module = SAEFitter(str(folder / "model"), [1, 2], str(place), d_sae=64, k=4, dead_after=3)
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    silent = {layer: module.get_buffer(f"silent_{layer}").tolist() for layer in (1, 2)}
    weights = {n: t.tolist() for n, t in module.saes.state_dict().items()}
    return {"metrics": module.metrics, "silent": silent, "weights": weights, "loss": float(trainer.callback_metrics["train/loss"])}


def measure(folder: Path, out: str) -> dict[str, Any]:
    """Evaluate the delta of :func:`write_inputs` in this process, which may be one of several; the results."""
    from bad_neurons.evaluation.evaluate import evaluate

    return evaluate(
        str(folder / "model"), str(folder / "delta.safetensors"), [str(folder / "records.jsonl")], [], None, str(folder / out),
        max_paragraphs=20, answers=20, dtype="float32",
    )  # fmt: skip


def everything(folder: Path, out: str) -> dict[str, Any]:
    """All of these, below ``out``; keys are texts, as in JSON."""
    work = {"tune": tune(folder, f"{out}/tuning"), "saes": fit_saes(folder, f"{out}/sae"), "measured": measure(folder, f"{out}/evaluation")}
    return json.loads(json.dumps(work))  # type: ignore[no-any-return]


def tune_sharded(folder: Path, out: str) -> dict[str, Any]:
    """:func:`tune` with the frozen layers divided over the processes, with and without kept activations."""
    options = {"strategy": "fsdp2"}
    once = {
        name: tune(folder, f"{out}-{name}", 1, trainer=options, tuner={"checkpointing": name == "saving"}) for name in ("plain", "saving")
    }
    return once | {"whole": tune(folder, f"{out}-whole", 1)}


def resumed(folder: Path, way: str) -> dict[str, Any]:
    """Three epochs without a stop (``whole``), or cut in the middle of the second and gone on with (``cut``)."""
    if way == "whole":
        return tune(folder, way, epochs=3)
    try:
        tune(folder, way, epochs=3, cut_at=7)
    except RuntimeError as error:
        if str(error) != "power cut":
            raise
    return tune(folder, way, epochs=3, resume=str(folder / way / "step=6.ckpt"))


# Tables


def difference(one: Any, other: Any) -> float:
    """Largest difference between two nests of numbers of the same form."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            raise ValueError(f"{sorted(one)} is not {sorted(other)}")
        return max((difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list):
        return max((difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    return abs(one - other)


def tables(folder: Path) -> str:
    """The tables of docs/cluster.md."""
    write_inputs(folder)
    found = {world: in_world(world, everything, folder, f"world-{world}")[0]["value"] for world in WORLDS}
    fits, saes, measured = ({world: all_of[name] for world, all_of in found.items()} for name in ("tune", "saes", "measured"))
    rows = []
    for world, fit in fits.items():
        losses = ", ".join(f"{step['train/loss']:.6f}" for step in fit["steps"])
        gaps = [f"{difference(fit[key], fits[1][key]):.1e}" for key in ("steps", "held_out", "deltas")]
        rows.append([str(world), f"{-(-fit['batches'][0] // world)} of {fit['batches'][0]}", losses, *gaps])
    columns = ["processes", "micro-batches each", "loss of each step", "largest difference: loss", "validation and test", "delta"]
    parts = [markdown(columns, rows)]
    rows = []
    for world, fit in saes.items():
        silent = sum(count > 3 for counts in fit["silent"].values() for count in counts)
        gaps = [f"{difference(fit[key], saes[1][key]):.1e}" for key in ("metrics", "weights")]
        rows.append([str(world), f"{fit['loss']:.6f}", str(silent), *gaps])
    parts.append(markdown(["processes", "SAE loss, last step", "silent features", "largest difference: metrics", "weights"], rows))
    rows = []
    for world, results in measured.items():
        files = [(folder / f"world-{n}" / "evaluation" / "items.jsonl").read_bytes() for n in (1, world)]
        items = [json.loads(line) for line in files[1].splitlines()]
        (suite,) = results["suites"].values()
        shift, kl = suite["after"]["opinion_shift"]["mean"], results["side_effects"]["kl_per_token"]
        same = "yes" if files[0] == files[1] else "no"
        different = len({(item["id"], item["when"]) for item in items})
        rows.append([str(world), str(len(items)), str(different), f"{shift:.6f}", f"{kl:.6f}", same])
    columns = ["processes", "rows of items.jsonl", "different ones", "opinion shift after, nats", "KL, nats per token", "same bytes"]
    return "\n\n".join([*parts, markdown(columns, rows)])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        sys.stdout.write(tables(Path(place)) + "\n")
