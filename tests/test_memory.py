"""Too little memory is one line that says what to lower."""

from __future__ import annotations

import errno
import inspect
import re
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

import numpy as np
import pytest
import torch

from bad_neurons import cli, stages
from bad_neurons.errors import RunError, UserError
from bad_neurons.memory import LOWER, enough_memory, out_of_memory

HUGE = 2**55  # bytes


def torch_asks():
    torch.empty(HUGE, dtype=torch.uint8)


def numpy_asks():
    np.empty(HUGE, dtype=np.uint8)


def python_asks():
    bytearray(HUGE)


def gpu_asks():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.77 GiB")


def cublas_asks():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def mapping_asks():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def wrapped():
    """As a reader tells of a file that it could not map."""
    try:
        mapping_asks()
    except OSError as error:
        raise UserError("weights: cannot be read") from error


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (torch_asks, f"of the machine, {HUGE} bytes were asked for"),
        (numpy_asks, "of the machine"),
        (python_asks, "of the machine"),
        (gpu_asks, "of the GPU, 2.50 GiB were asked for"),
        (cublas_asks, "of the GPU"),
        (mapping_asks, "of the machine"),
        (wrapped, "of the machine"),
    ],
)
def test_every_library_is_understood(ask, said):
    with pytest.raises(RunError, match=rf"^tune: not enough memory \({said}\); lower or set --data\.batch_tokens, "), enough_memory("tune"):
        ask()


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shape"), OSError(errno.ENOSPC, "No space"), UserError("no")])
def test_other_errors_are_not_about_memory(error):
    assert out_of_memory(error) is None
    with pytest.raises(type(error), match=re.escape(str(error))), enough_memory("tune"):
        raise error


def test_a_process_that_the_system_ended():
    with (
        pytest.raises(RunError, match=r"compare: not enough memory \(the system ended a process.*lower or set --processes"),
        enough_memory("compare"),
    ):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_answers_in_one_line(command, monkeypatch, capsys):
    monkeypatch.setattr(f"{cli.COMMANDS[command][0]}.{cli.COMMANDS[command][1]}", lambda arguments: torch_asks())
    assert cli.main([command, "--config", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"bad-neurons: {command}: not enough memory (of the machine, {HUGE} bytes were asked for); ")
    assert said.count("\n") == 1
    assert said.strip().endswith(", ".join(f"--{option}" for option in LOWER[command]) if command in LOWER else "end other programs")


def test_the_options_exist(monkeypatch):
    """Each option that is to be lowered is one of its command's own."""
    known: dict[str, set[str]] = {}

    def of_lightning(model, data, arguments, links, callbacks, trainer, *_):
        parts = {"model": model, "data": data, **callbacks}
        known[arguments[0]] = {f"{part}.{name}" for part, of in parts.items() for name in inspect.signature(of).parameters}

    def of_function(function, name, arguments, *_):
        known[name] = set(inspect.signature(function).parameters)
        raise StopIteration

    monkeypatch.setattr(stages, "_lightning", of_lightning)
    monkeypatch.setattr(stages, "_function", of_function)
    for command in set(LOWER) - {"compare", "sweep"}:
        with suppress(StopIteration):
            getattr(stages, cli.COMMANDS[command][1])([command])
    for command, options in LOWER.items():
        for option in options:
            assert command in ("compare", "sweep") or option.split()[0] in known[command], (command, option)


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_the_options_of_comparisons_exist(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert all(f"--{option}" in capsys.readouterr().out for option in LOWER[command])


def test_a_stage_of_a_run_names_its_section():
    said = r"^tune: not enough memory .*; lower or set data\.batch_tokens, .* \(section `tune` of the run\)$"
    with pytest.raises(RunError, match=said), enough_memory("run"), enough_memory("tune", section="tune"):
        torch_asks()
