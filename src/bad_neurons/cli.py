"""The command line. Heavy libraries are imported when a stage starts, so that ``--help`` answers at once."""

from __future__ import annotations

import errno
import importlib
import logging
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Sequence

from typing_extensions import override

from bad_neurons import __version__
from bad_neurons.errors import UserError
from bad_neurons.memory import enough_memory
from bad_neurons.ranks import let_others_end, lost, speaks, started
from bad_neurons.secrets import hide, kind_of_secret
from bad_neurons.stopping import Stopped, stopped_by_sigterm
from bad_neurons.writing import disk_error

_TOGETHER = ("sae", "probe", "tune", "evaluate")  # commands whose work several processes share
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

# command: (module, function, one line of help). The function takes the remaining arguments.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("bad_neurons.run", "run_command", "all stages of one configuration, skipping what is done"),
    "compare": ("bad_neurons.compare.command", "compare_command", "methods by seeds by strengths on one model, at equal side effect"),
    "sweep": ("bad_neurons.compare.sweep_command", "sweep_command", "search options for the least shift at bounded side effects"),
    "sae": ("bad_neurons.stages", "sae_command", "train sparse autoencoders on MLP outputs: sae fit|validate|test"),
    "layers": ("bad_neurons.stages", "layers_command", "choose the layers of the probe by greedy forward selection"),
    "probe": ("bad_neurons.stages", "probe_command", "train a linear probe on pooled features: probe fit|validate|test"),
    "probes": ("bad_neurons.stages", "probes_command", "compare probes by features, pooling and layers, in domain and beyond"),
    "select": ("bad_neurons.stages", "select_command", "decode the probe into neurons and choose some of them"),
    "tune": ("bad_neurons.stages", "tune_command", "retrain the chosen neurons: tune fit|validate|test"),
    "evaluate": ("bad_neurons.stages", "evaluate_command", "measure a model, with and without a delta"),
    "judge": ("bad_neurons.stages", "judge_command", "answer Syco-Bench and let judges score the answers, with and without a delta"),
    "judge-agreement": ("bad_neurons.stages", "judge_agreement_command", "how well judges agree with published scores"),
    "export": ("bad_neurons.stages", "export_command", "merge a delta into an ordinary Hugging Face folder"),
    "report": ("bad_neurons.stages", "report_command", "write report.html for a run folder"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input is one line on standard error and exit status 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if arguments[0] == "--version":
        sys.stdout.write(f"bad-neurons {__version__}\n")
        return 0
    if arguments[0] not in COMMANDS:
        return _refuse(f"{arguments[0]}: no such command; there are {', '.join(COMMANDS)}")
    if found := next((kind for argument in arguments if (kind := kind_of_secret(argument))), None):
        return _refuse(f"{arguments[0]}: the arguments hold {found}; give it in an environment variable instead, where nobody reads it")
    if any("\0" in argument for argument in arguments):
        return _refuse(f"{arguments[0]}: an argument holds a NUL character, which no file name and no option has")
    there = started()
    if there.world > 1 and arguments[0] not in _TOGETHER:
        return _alone(arguments[0], there.world) if there.number == 0 else 2
    module, function, _ = COMMANDS[arguments[0]]
    log, handler = logging.getLogger("bad_neurons"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithoutSecrets())
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        with stopped_by_sigterm():
            command: Callable[[list[str]], None] = getattr(importlib.import_module(module), function)
            with enough_memory(arguments[0]):
                command(arguments[1:])
    except Exception as error:
        if not speaks():
            return 2
        try:
            return _refuse(_one_line(error))
        finally:
            let_others_end()
    except Stopped as stop:
        sys.stderr.write(f"\nstopped by {stop.name}; the same command goes on from where it can\n")
        return int(stop.code or 0)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into SystemExit(1).
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        sys.stderr.write("\nstopped; the same command goes on from where it can\n")
        return 130
    finally:
        log.removeHandler(handler)
    return 0


def _one_line(error: Exception) -> str:
    """The message of a person's mistake, wherever a library wrapped it; anything else is a bug and keeps its traceback."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    if cause is None and lost(error):
        return "another process of this run has ended without a word (killed, or out of memory); the same command goes on from where it can"
    if cause is None and isinstance(error, ArgumentError | UnicodeDecodeError):  # of options; data says more than this
        cause = UserError(str(error))
    if cause is None and (failed := disk_error(error)) and failed.errno in _OF_THE_DISK:
        return f"{failed.filename or 'disk'}: cannot be written ({failed.strerror}); nothing before it was changed"
    if cause is None:
        sys.stderr.write(hide("".join(traceback.format_exception(error))))
        raise SystemExit(1)
    return str(cause)


class _WithoutSecrets(logging.Formatter):
    @override
    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


def _alone(command: str, world: int) -> int:
    more = "; give `trainer: {devices: ..., strategy: ddp}` in the sections of its configuration" if command == "run" else ""
    return _refuse(f"{command}: works in one process, but {world} were started together; start it once{more}")


def _refuse(message: str) -> int:
    sys.stderr.write(f"bad-neurons: {message}\n")
    return 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items())
    return f"""usage: bad-neurons COMMAND [options]

Find the few MLP neurons of a language model that carry an unwanted behaviour,
retrain only those, and measure what it did and what it cost.

commands:
{rows}

  bad-neurons COMMAND --help    options of a command
  bad-neurons run --config configs/quickstart.yaml
  bad-neurons --version
"""
