"""From the configuration of a run to the complete configuration of each of its stages.

What stages share (model, layers, records, split) stands once at the top of the YAML file; a section a stage holds that
stage's own options and wins over everything that is filled in here. To add a stage, write the function that makes its
:class:`Stage` and name it in :func:`plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bad_neurons.data.readers import PUBLIC, files_of
from bad_neurons.data.splits import sources_of
from bad_neurons.errors import UserError
from bad_neurons.reading import CONFIG_BYTES, parse_yaml, read_text
from bad_neurons.run_layers import LayerChoice, check_layers
from bad_neurons.secrets import kind_of_secret

Config = dict[str, Any]

_SHARED = ("out", "model", "layers", "records", "validation", "test", "split_seed", "seed")
_SECTIONS = ("sae", "probe", "probes", "select", "tune", "evaluate")
# What the choice of layers takes over from the section `probe`: the layers are to serve that probe.
_OF_THE_PROBE = ("l2", "pool", "tokens", "max_records", "dtype", "sae_gb")


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: its folder below the run's folder, and its name in messages and in ``seconds``.
        command: words of the command line in front of ``--config``.
        config: the stage's complete configuration.
        inputs: files and folders that it reads.
        outputs: files that exist when it is done.
        resume: a checkpoint from which an interrupted fit goes on, where there is one.
        kept: whether it stays when the stage is done.
    """

    name: str
    command: tuple[str, ...]
    config: Config
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    resume: Path | None = None
    kept: bool = True


def read_run_config(path: Path, further: tuple[str, ...] = ()) -> Config:
    """Read and check a run's YAML file.

    Args:
        path: the file.
        further: sections that it may have beside a run's own.

    Raises:
        UserError: unreadable, not YAML, an unknown or missing option.
    """
    text = read_text(path, "the YAML file of a run", CONFIG_BYTES)
    try:
        config = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not YAML ({error})") from error
    if found := kind_of_secret(text):  # it would be copied into the run's folder and into the report
        raise UserError(f"{path}: holds {found}; give it in an environment variable instead")
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected options by name, such as `model: packaged:gemma-3-270m`")
    known = (*_SHARED, *_SECTIONS, *further)
    for key in config:
        if key not in known:
            raise UserError(f"{path}: unknown option {key!r}; expected {', '.join(known)}")
    for key in ("model", "layers", "out"):
        if key not in config:
            raise UserError(f"{path}: `{key}` is missing")
    for key in (*_SECTIONS, *further):
        if not isinstance(config.get(key), dict | (str | None if key == "sae" else None)):
            raise UserError(f"{path}: {key}: expected the stage's options by name, not {config[key]!r}")
    check_layers(config["layers"], str(path))
    return config


@dataclass(frozen=True)
class _Run:
    """A run's configuration with its defaults, and the places of what passes between stages."""

    config: Config
    folder: Path

    @property
    def model(self) -> str:
        return str(self.config["model"])

    @property
    def records(self) -> str:
        return str(self.config.get("records", "embedded"))

    @property
    def split(self) -> Config:
        return {name: self.config.get(name, default) for name, default in (("validation", 0.2), ("test", 0.2), ("split_seed", 0))}

    @property
    def seed(self) -> Config:
        return {"seed_everything": self.config.get("seed", 0)}

    @property
    def data_seed(self) -> Config:
        return {"seed": self.config.get("seed", 0)}

    @property
    def pretrained_sae(self) -> str | None:
        return self.config["sae"] if isinstance(self.config.get("sae"), str) else None

    @property
    def sae(self) -> str:
        return self.pretrained_sae or str(self.folder / "sae")

    @property
    def decoded(self) -> bool:
        """Whether neurons are chosen by decoding a probe."""
        return bool(self.section("select").get("way", "probe") == "probe")

    @property
    def probed(self) -> bool:
        """Whether SAEs and probes are made: something reads them, or a section asks for them."""
        return self.decoded or self.choice.on_sae or any(self.config.get(name) is not None for name in ("sae", "probe", "probes"))

    def sae_folders(self, layers: list[int]) -> tuple[Path, ...]:
        """Folders of the layers' SAEs that the run itself trains."""
        return () if self.pretrained_sae else tuple(self.folder / "sae" / f"layer-{layer}" for layer in layers)

    @cached_property
    def choice(self) -> LayerChoice:
        named = None if self.pretrained_sae else (self.section("sae").get("data") or {}).get("layers")
        chosen = self.folder / "layers" / "layers.json"
        return LayerChoice(self.config["layers"], self.model, chosen, self.pretrained_sae is not None, named)

    @property
    def neurons(self) -> Path:
        return self.folder / "selection" / "neurons.json"

    @property
    def delta(self) -> Path:
        return self.folder / "tuning" / "delta.safetensors"

    def probe(self, name: str) -> Path:
        return self.folder / name / "probe.safetensors"

    def section(self, name: str) -> Config:
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}


def chosen_layers(config: Config, folder: Path) -> list[int]:
    """The layers of a run; where a stage chooses them, once that stage is done."""
    return list(_Run(config, folder).choice.layers)


def plan(config: Config, folder: Path) -> dict[str, Callable[[], Stage]]:
    """The stages of a run in order: by name, a function that gives the stage with its complete configuration.

    The configuration of a stage may hold what an earlier one found (the chosen layers), so a function is to be called when
    the stages before it are done.
    """
    run = _Run(config, folder)
    saes = {"sae": partial(_sae, run)} if run.probed and not run.pretrained_sae else {}
    probes = {name: partial(_probe, run, name, features) for name, features in (("probe", "sae"), ("probe-residual", "residual"))}
    layers = {} if run.choice.greedy is None else {"layers": partial(_layers, run)}
    first = {**saes, **layers} if run.choice.on_sae else {**layers, **saes}
    compared = {"probes": partial(_probes, run)} if "probes" in config else {}
    return {
        **first,
        **(probes if run.probed else {}),
        **compared,
        "selection": partial(_selection, run),
        "tuning": partial(_tuning, run),
        "evaluation": partial(_evaluation, run),
    }


def _layers(run: _Run) -> Stage:
    choice, folder = run.choice, run.choice.chosen.parent
    probe = {**(run.section("probe").get("model") or {}), **(run.section("probe").get("data") or {})}
    own: Config = {"model": run.model, "records": run.records, **run.split, **{key: probe[key] for key in _OF_THE_PROBE if key in probe}}
    if choice.on_sae:
        own |= {"sae": run.sae} | ({} if run.pretrained_sae else {"candidates": choice.candidates})
    config = merged(own, {"folder": str(folder / "features"), "out": str(folder)}, choice.greedy or {})
    inputs = _record_files(config) + (run.sae_folders(choice.candidates) if choice.on_sae else ())
    return Stage("layers", ("layers",), config, inputs, (choice.chosen, folder / "layers.png"))


def _sae(run: _Run) -> Stage:
    layers = run.choice.candidates if run.choice.on_sae else run.choice.layers
    topics = {"validation_topics": run.split["validation"], "test_topics": run.split["test"], "split_seed": run.split["split_seed"]}
    data = {"model": run.model, "layers": layers, "records": run.records, **topics, **run.data_seed}
    trainer, resume = _resumable(run.folder / "sae", every_n_train_steps=200, at_epoch_end=False)
    own: Config = {
        "model": {"out": run.sae},
        "data": {**data, "folder": str(run.folder / "sae" / "activations")},
        "trainer": {"enable_checkpointing": True, **trainer},
    }
    config = merged(run.seed, own, run.section("sae"))
    outputs = tuple(folder / "cfg.json" for folder in run.sae_folders(config["data"]["layers"]))
    return Stage("sae", ("sae", "fit"), config, _record_files(config["data"]), outputs, resume, kept=False)


def _probe(run: _Run, name: str, features: str) -> Stage:
    data = {"model": run.model, "layers": run.choice.layers, "records": run.records, **run.split, "sae": run.sae, "features": features}
    # Both probes read one set of features, extracted in one pass.
    own = {"model": {"out": str(run.folder / name)}, "data": {**data, "folder": str(run.folder / "probe" / "features")}}
    config = merged(run.seed, own, run.section("probe"))
    inputs = _record_files(config["data"]) + run.sae_folders(config["data"]["layers"])
    return Stage(name, ("probe", "fit"), config, inputs, (run.probe(name), run.folder / name / "metrics.json"))


def _probes(run: _Run) -> Stage:
    folder, layers = run.folder / "probes", run.choice.layers
    own: Config = {"model": run.model, "layers": layers, "sae": run.sae, "records": run.records, **run.split}
    config = merged(own, {"folder": str(folder / "features"), "out": str(folder)}, run.section("probes"))
    outputs = tuple(folder / f"probes.{kind}" for kind in ("json", "csv", "png"))
    inputs = _record_files(config) + run.sae_folders(config["layers"] or layers)
    return Stage("probes", ("probes",), config, inputs, outputs)


def _selection(run: _Run) -> Stage:
    probes = {"probe": run.probe("probe"), "control": run.probe("probe-residual")} if run.decoded else {}
    read = {name: str(path) for name, path in probes.items()} | {"sae": run.sae} if run.decoded else {"layers": run.choice.layers}
    data = {"records": run.records, **run.split, **run.data_seed}
    config = merged({"model": run.model, **read, **data, "out": str(run.neurons.parent)}, run.section("select"))
    inputs = [*probes.values()] if run.decoded else [*_record_files(config)]
    inputs += [Path(config["like"])] if config.get("like") else []
    return Stage("selection", ("select",), config, tuple(inputs), (run.neurons,))


def _tuning(run: _Run) -> Stage:
    folder = run.delta.parent
    logger = {"class_path": "bad_neurons.metrics_log.MetricsLog", "init_args": {"path": str(folder / "metrics.csv")}}
    trainer, resume = _resumable(folder)
    own = {
        "model": {"model": run.model},
        "data": {"records": run.records, **run.split, **run.data_seed},
        "mask": {"neurons": str(run.neurons)},
        "delta": {"path": str(run.delta)},
        "trainer": {"logger": logger, **trainer},
    }
    config = merged(run.seed, own, run.section("tune"))
    return Stage("tuning", ("tune", "fit"), config, (*_record_files(config["data"]), run.neurons), (run.delta,), resume)


def _resumable(folder: Path, **options: Any) -> tuple[Config, Path]:
    """Options of a Trainer whose fit goes on where it was interrupted, and the checkpoint from which it does."""
    keep = {"class_path": "bad_neurons.callbacks.MidEpochCheckpoint", "init_args": {"dirpath": str(folder / "checkpoints"), **options}}
    return {"default_root_dir": str(folder), "callbacks": [keep]}, folder / "checkpoints" / "last.ckpt"


def _evaluation(run: _Run) -> Stage:
    results = run.folder / "evaluation" / "results.json"
    suites = {"suites": sources_of(run.records), "trained_on": run.records, **run.split}
    own = {"model": run.model, "delta": str(run.delta), **suites, "out": str(results.parent)}
    config = merged(own, run.section("evaluate"))
    inputs = (*files_of([*config["suites"], *config.get("optional_suites", PUBLIC)]), run.delta)
    return Stage("evaluation", ("evaluate",), config, inputs, (results,))


def _record_files(options: Config) -> tuple[Path, ...]:
    """Files of the records that a stage's own options name; its section may name others than the run."""
    return files_of(sources_of(options["records"])) if options.get("records") else ()


def merged(*parts: Mapping[str, Any]) -> Config:
    """Nested mappings laid over each other; the later one wins."""
    result: Config = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result
