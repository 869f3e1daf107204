"""Processes that work together: who they are, what each does, which commands they may share, and how they end."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from ddp import free_port, in_world

from bad_neurons import cli
from bad_neurons.errors import UserError
from bad_neurons.ranks import ALONE, Rank, Started, check_strategy, join, rank_of, started
from rank_work import failing, joined_twice

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_NNODES": "2", "SLURM_STEP_NUM_NODES": "2"}
BATCH_SCRIPT = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NNODES": "2"}
LIGHTNING = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 1)),
        (TORCHRUN, (5, 8, 4)),
        (SRUN, (3, 4, 2)),
        (BATCH_SCRIPT, (0, 1, 1)),  # the script itself is one process, however many tasks the job may start
        (LIGHTNING, (1, 2, 2)),
    ],
)
def test_what_was_started(environment, expected):
    assert started(environment) == Started(*expected)


def test_parts_are_all_and_none_twice():
    items = list(range(11))
    parts = [Rank(number, 4).share(items) for number in range(4)]
    assert sorted(item for part in parts for item in part) == items
    assert [len(part) for part in parts] == [3, 3, 3, 2]
    tensor = torch.arange(11)
    assert Rank(1, 4).share(tensor).tolist() == [1, 5, 9]
    assert ALONE.total(tensor) is tensor
    assert ALONE.gather("text") == ["text"]


@pytest.fixture
def of_three(monkeypatch):
    """``of_three(number)``: torchrun's environment of one of three processes."""

    def environment(number):
        for name, value in {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}.items():
            monkeypatch.setenv(name, str(value))

    return environment


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name not in ("sae", "probe", "tune", "evaluate")])
def test_commands_of_one_process_refuse_several(of_three, capsys, command):
    of_three(0)
    assert cli.main([command]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"bad-neurons: {command}: works in one process, but 3 were started together; start it once")
    assert ("strategy: ddp" in said) == (command == "run")
    of_three(2)
    assert cli.main([command]) == 2
    assert capsys.readouterr().err == ""


def test_another_number_of_processes_than_there_are_is_refused(of_three):
    of_three(0)
    with pytest.raises(UserError, match="--devices 2: 3 processes were started on this machine; leave the option out, or give 3"):
        join(2)
    with pytest.raises(UserError, match="--devices -1: at least 0"):
        join(-1)


def test_one_process_is_alone():
    assert join(0) is join(1) is ALONE
    assert rank_of(None) is rank_of(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)) is ALONE


@pytest.mark.parametrize("name", ["fsdp", "deepspeed_stage_3", "ModelParallel"])
def test_strategies_that_divide_the_model_are_refused(name):
    with pytest.raises(UserError, match=f"--trainer.strategy {name}: every process holds the frozen model"):
        check_strategy(name)


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_spawn", "fsdp2", "SingleDevice"])
def test_strategies_that_do_not_are_not(name):
    check_strategy(name)


def test_the_command_line_refuses_them_before_anything_runs(tiny_folder, neurons_file, capsys):
    status = cli.main(["tune", "fit", "--model.model", tiny_folder(), "--mask.neurons", neurons_file, "--trainer.strategy", "fsdp"])
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "bad-neurons: --trainer.strategy fsdp: every process holds the frozen model and its own part of the batches; give ddp"
    )


@pytest.fixture
def neurons_file(tmp_path, tiny, choose):
    """Path of a ``neurons.json`` for the tiny Gemma 2."""
    from bad_neurons.selection.neurons import write_neurons

    write_neurons(tmp_path / "neurons.json", choose(tiny()))
    return str(tmp_path / "neurons.json")


@pytest.mark.ddp
@pytest.mark.parametrize("number", [0, 1, 2, None])
def test_a_failure_on_one_process_ends_all_with_one_message(number):
    found = [rank["value"] for rank in in_world(3, failing, number)]
    assert [status for status, _ in found] == [2, 2, 2]
    said = [text for _, text in found if text]
    assert said == ["bad-neurons: records.jsonl: cannot be read\n"]
    if number is not None:
        assert found[number][1]


@pytest.mark.ddp
def test_stages_of_a_run_each_have_their_own_processes():
    assert [rank["value"] for rank in in_world(2, joined_twice, free_port())] == [[2, 0, 2, 0]] * 2
