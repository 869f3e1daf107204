"""The package as it is installed, and that light commands stay light."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path

import pytest

from bad_neurons.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
HEAVY = ("torch", "transformers", "lightning", "sae_lens", "datasets", "matplotlib", "numpy")


def folder_of(package):
    """Where a package's files lie, by the longest entry of ``package-dir``."""
    known = max((p for p in SETUPTOOLS["package-dir"] if package == p or package.startswith(p + ".")), key=len)
    return ROOT / SETUPTOOLS["package-dir"][known] / Path(*package.removeprefix(known).strip(".").split("."))


def test_the_package_list_is_the_folders_on_disk():
    top = ROOT / "src" / "bad_neurons"
    below = {".".join(("bad_neurons", *init.parent.relative_to(top).parts)) for init in top.rglob("*.py")}
    assert set(SETUPTOOLS["packages"]) == below | {"bad_neurons.callbacks"}
    assert len(SETUPTOOLS["packages"]) == len(set(SETUPTOOLS["packages"]))
    for package in SETUPTOOLS["packages"]:
        assert (folder_of(package) / "__init__.py").is_file(), package


def test_callbacks_are_mapped_from_the_top_folder():
    assert folder_of("bad_neurons.callbacks") == ROOT / "callbacks"
    assert not (ROOT / "src" / "bad_neurons" / "callbacks").exists()
    assert {path.name for path in (ROOT / "callbacks").iterdir() if path.is_dir()} <= {"__pycache__"}


def test_every_file_of_the_package_is_python_or_declared_data():
    declared = SETUPTOOLS["package-data"]
    for package in SETUPTOOLS["packages"]:
        others = {p.name for p in folder_of(package).iterdir() if p.is_file() and p.suffix != ".py"}
        assert {name for name in others if not any(fnmatch(name, pattern) for pattern in declared.get(package, []))} == set(), package


@pytest.mark.parametrize("package", SETUPTOOLS["package-data"])
def test_package_data_is_present(package):
    for pattern in SETUPTOOLS["package-data"][package]:
        found = [path for path in files(package).iterdir() if fnmatch(path.name, pattern)]
        assert found, pattern


def imported_by(code):
    """Heavy modules that a new interpreter has imported behind ``code``, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('HEAVY', *(m for m in {HEAVY!r} if m in sys.modules))"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    output, _, heavy = done.stdout.rpartition("HEAVY")
    return heavy.split(), output


def test_the_check_itself_sees_a_heavy_import():
    assert imported_by("import numpy")[0] == ["numpy"]


def test_importing_the_package_is_light():
    assert imported_by("import bad_neurons; bad_neurons.__version__")[0] == []


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_is_light(arguments):
    heavy, output = imported_by(f"from bad_neurons.cli import main; assert main({arguments!r}) == 0")
    assert heavy == []
    for command in ("run", "sae", "probe", "select", "tune", "evaluate", "judge", "judge-agreement", "export", "report"):
        assert f"\n  {command} " in output


def test_version_and_mistakes_are_light():
    heavy, output = imported_by("from bad_neurons.cli import main; assert (main(['--version']), main(['tuna'])) == (0, 2)")
    assert (heavy, output) == ([], f"bad-neurons {PYPROJECT['project']['version']}\n")


def test_the_command_is_installed():
    assert PYPROJECT["project"]["scripts"] == {"bad-neurons": "bad_neurons.cli:main"}
    done = subprocess.run([Path(sys.executable).parent / "bad-neurons", "tuna"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"bad-neurons: tuna: no such command; there are {', '.join(COMMANDS)}\n"


def test_names_at_the_top():
    import bad_neurons
    from bad_neurons.tuning import delta_file

    assert (bad_neurons.load_delta, bad_neurons.LoadedDelta) == (delta_file.load_delta, delta_file.LoadedDelta)
    assert sorted(bad_neurons.__all__) == ["LoadedDelta", "__version__", "load_delta"]
    with pytest.raises(AttributeError, match="module 'bad_neurons' has no attribute 'load_detla'"):
        bad_neurons.load_detla  # noqa: B018
