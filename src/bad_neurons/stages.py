"""The command of each stage: from its arguments to its files.

``sae``, ``probe`` and ``tune`` are LightningCLIs with a fixed module and data module, so every flag of the Trainer works
(``--trainer.devices 2 --trainer.strategy ddp``, ``--ckpt_path``); the others are plain functions.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from bad_neurons.errors import UserError
from bad_neurons.lock import sole_writer
from bad_neurons.ranks import check_strategy, started
from bad_neurons.reading import CONFIG_BYTES, parse_yaml, read_text
from bad_neurons.secrets import kind_of_secret

set_parsing_settings(docstring_parse_attribute_docstrings=True)


_jsonargparse_yaml: Callable[[str], Any] = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """What jsonargparse reads, of a size and a shape that is bounded, and without secrets."""
    if len(text) > CONFIG_BYTES:
        raise ValueError(f"{len(text):,} characters, and {CONFIG_BYTES:,} are read at most")
    if found := kind_of_secret(text):
        raise UserError(f"the options hold {found}; give it in an environment variable instead")
    return parse_yaml(text, _jsonargparse_yaml)


set_loader("yaml", _load_yaml, (ValueError, yaml.YAMLError))

_BRACKETS = 200  # in one argument at most: what is nested a thousand deep ends jsonargparse

# Libraries' notices about what is meant here, one by one; everything else still warns.
_MEANT = (
    ".*LightningCLI's args parameter is intended to run from within Python.*",
    "(?s).*JSONARGPARSE_DEPRECATION_WARNINGS.*",  # Lightning calls jsonargparse the old way
    "(?s).*was deprecated in v4.49.0.*",
    ".*does not have many workers.*",
    r".*module\(s\) in eval mode at the start of training.*",  # the frozen model, on purpose
    ".*smaller than the logging interval.*",
    ".*exists and is not empty.*",
    ".*Experiment logs directory.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*torch.jit.script.*is (not supported|deprecated).*",
)


def _check_arguments(arguments: list[str]) -> None:
    """Look at arguments and configuration files before jsonargparse does, whose messages name the option and not the file.

    Raises:
        UserError: a file that cannot be read, that is not YAML of a bounded shape, or that holds a secret; too many brackets.
    """
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word.count("[") + word.count("{") > _BRACKETS:
            raise UserError(f"{word[:40]}: more than {_BRACKETS} brackets in one argument; give it in a --config file")
        name, equals, value = word.partition("=")
        if name != "--config":
            continue
        path = value if equals else following
        text = read_text(path, "a YAML file with options", CONFIG_BYTES)
        try:
            content = _load_yaml(text)
        except (ValueError, UserError) as error:
            raise UserError(f"{path}: not YAML that can be read ({error})") from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: expected options by name, such as `model: packaged:gemma-3-270m`")


class StageCLI(LightningCLI):
    """A LightningCLI with flat flags whose options are linked where two parts need the same value.

    Args:
        model: the module class.
        data: the data module class.
        arguments: subcommand and options.
        links: ``source: target`` pairs of options that are one option.
        callbacks: callback classes with flags of their own, by prefix (``mask`` gives ``--mask.neurons``).
        trainer: defaults of the Trainer.
        writes: options that name what it writes: folders, or the path of a file (``delta.path``).
        held: where the locks on those folders are kept.
    """

    def __init__(
        self,
        model: type[L.LightningModule],
        data: type[L.LightningDataModule],
        arguments: list[str],
        links: dict[str, str],
        callbacks: dict[str, type[L.Callback]],
        trainer: dict[str, Any],
        writes: tuple[str, ...],
        held: ExitStack,
    ) -> None:
        self._links, self._own_callbacks, self._writes, self._held = links, callbacks, writes, held
        strict: dict[str, Any] = {"exit_on_error": False}
        # The configuration is kept by `bad-neurons run`; Lightning's own copy fails on the second run (lightning#17168).
        super().__init__(
            model, data, args=arguments, seed_everything_default=0, save_config_callback=None, trainer_defaults=trainer,
            parser_kwargs={**strict, **dict.fromkeys(self.subcommands(), strict)},
        )  # fmt: skip

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for source, target in self._links.items():
            parser.link_arguments(source, target)
        for prefix, callback in self._own_callbacks.items():
            parser.add_lightning_class_args(callback, prefix)

    @override
    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand] if self.subcommand else self.config
        _hold(self._held, [Path(options[name]).parent if name.endswith(".path") else Path(options[name]) for name in self._writes])

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        strategy = self._get(self.config_init, "trainer.strategy")
        if isinstance(strategy, str):
            check_strategy(strategy)  # Lightning's own complaints are tracebacks
        return super().instantiate_trainer(**kwargs)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}


def sae_command(arguments: list[str]) -> None:
    """``bad-neurons sae fit|validate|test``."""
    from bad_neurons.sae.harvest import ActivationDataModule
    from bad_neurons.sae.module import SAEFitter

    links = {"data.model": "model.model", "data.layers": "model.layers"}
    trainer = {"max_epochs": 3, "enable_checkpointing": False, "logger": False, "num_sanity_val_steps": 0}
    _lightning(SAEFitter, ActivationDataModule, arguments, links, {}, trainer, ("model.out", "data.folder"))


def layers_command(arguments: list[str]) -> None:
    """``bad-neurons layers``."""
    from bad_neurons.probe.choose import choose_layers, layers_table

    _show(layers_table(_function(choose_layers, "layers", arguments)))


def probe_command(arguments: list[str]) -> None:
    """``bad-neurons probe fit|validate|test``."""
    from bad_neurons.probe.data import ProbeDataModule
    from bad_neurons.probe.module import LinearProbe

    trainer = {"max_epochs": 1, "enable_checkpointing": False, "logger": False, "num_sanity_val_steps": 0}
    _lightning(LinearProbe, ProbeDataModule, arguments, {}, {}, trainer, ("model.out", "data.folder"))


def probes_command(arguments: list[str]) -> None:
    """``bad-neurons probes``."""
    from bad_neurons.probe.compare import compare_probes
    from bad_neurons.report.probes import probes_tables

    for table in probes_tables(_function(compare_probes, "probes", arguments)):
        _show(table)


def tune_command(arguments: list[str]) -> None:
    """``bad-neurons tune fit|validate|test``."""
    from bad_neurons.callbacks import DeltaCheckpoint, FrozenAudit, GradientMask, KLBound, NumberGuard
    from bad_neurons.data.tuning import SycophancyDataModule
    from bad_neurons.tuning import sharded as sharded  # registers its strategy
    from bad_neurons.tuning.module import NeuronTuner

    trainer = {"max_epochs": 2, "gradient_clip_val": 1.0, "num_sanity_val_steps": 0, "log_every_n_steps": 1}
    checks: dict[str, type[L.Callback]] = {"audit": FrozenAudit, "guard": NumberGuard, "bound": KLBound}
    callbacks: dict[str, type[L.Callback]] = {"mask": GradientMask, **checks, "delta": DeltaCheckpoint}
    _lightning(NeuronTuner, SycophancyDataModule, arguments, {"model.model": "data.model"}, callbacks, trainer, ("delta.path",))


def select_command(arguments: list[str]) -> None:
    """``bad-neurons select``."""
    from bad_neurons.selection.select import select

    _function(select, "select", arguments)


def evaluate_command(arguments: list[str]) -> None:
    """``bad-neurons evaluate``."""
    from bad_neurons.evaluation.evaluate import evaluate
    from bad_neurons.report.terminal import results_table

    table = results_table(_function(evaluate, "evaluate", arguments))
    if started().number == 0:
        _show(table)


def judge_command(arguments: list[str]) -> None:
    """``bad-neurons judge``."""
    from bad_neurons.evaluation.judged.stage import judge
    from bad_neurons.evaluation.judged.tables import judged_table

    _show(judged_table(_function(judge, "judge", arguments)))


def judge_agreement_command(arguments: list[str]) -> None:
    """``bad-neurons judge-agreement``."""
    from rich.markdown import Markdown

    from bad_neurons.evaluation.judged.agreement_stage import judge_agreement
    from bad_neurons.evaluation.judged.tables import agreement_markdown

    _show(Markdown(agreement_markdown(_function(judge_agreement, "judge-agreement", arguments))))


def export_command(arguments: list[str]) -> None:
    """``bad-neurons export``."""
    from bad_neurons.export import export

    _function(export, "export", arguments, ())  # its folder appears whole in the end


def report_command(arguments: list[str]) -> None:
    """``bad-neurons report``."""
    from bad_neurons.report.html import write_report

    def report(run: Path) -> Path:
        """Write ``report.html`` for a run folder.

        Args:
            run: folder of ``bad-neurons run``.
        """
        with sole_writer(run) if run.is_dir() else nullcontext():
            path: Path = write_report(run)
        return path

    _function(report, "report", arguments, ())


def _lightning(
    model: type[L.LightningModule],
    data: type[L.LightningDataModule],
    arguments: list[str],
    links: dict[str, str],
    callbacks: dict[str, type[L.Callback]],
    trainer: dict[str, Any],
    writes: tuple[str, ...],
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch", "lightning.fabric"):  # which devices there are not, and advertisements
        logging.getLogger(name).setLevel(logging.WARNING)
    _check_arguments(arguments)
    with ExitStack() as held, warnings.catch_warnings():
        for message in _MEANT:
            warnings.filterwarnings("ignore", message)
        StageCLI(model, data, arguments, links, callbacks, trainer, writes, held)


def _function(function: Callable[..., Any], name: str, arguments: list[str], writes: tuple[str, ...] = ("out", "folder")) -> Any:
    _check_arguments(arguments)
    parser = ArgumentParser(prog=f"bad-neurons {name}", description=(function.__doc__ or "").split("\n\n")[0], exit_on_error=False)
    parser.add_argument("--config", action="config", help="Path of a YAML file with these options.")
    parser.add_function_arguments(function, sub_configs=False)
    values = parser.parse_args(arguments)
    options = {key: value for key, value in vars(values).items() if key != "config"}
    with ExitStack() as held:
        _hold(held, [Path(options[name]) for name in writes if options.get(name)])
        return function(**options)


def _hold(held: ExitStack, folders: list[Path]) -> None:
    """Be the only one to write to each of some folders until ``held`` is closed."""
    for folder in dict.fromkeys(path.resolve() for path in folders):
        held.enter_context(sole_writer(folder))


def _show(table: Any) -> None:
    from rich.console import Console

    Console().print(table)
