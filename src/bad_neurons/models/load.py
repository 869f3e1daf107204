"""One loader for models: a packaged one, a local folder, or a hub id."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bad_neurons.errors import UserError
from bad_neurons.models.packaged import PREFIX, packaged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRUST = "trust-remote-code:"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_SAMPLES_PER_TENSOR = 4096
_BLOCK, _BLOCKS = 2**20, 64


@dataclass(frozen=True)
class LanguageModel:
    """A frozen causal language model with its tokenizer.

    Attributes:
        id: what the person typed: ``packaged:…``, a folder, or a hub id.
        model: the transformers model in evaluation mode, no parameter requiring a gradient.
        tokenizer: its tokenizer; padding is the caller's business.
        digest: fingerprint of the weights, see :func:`model_digest`.
    """

    id: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str


def load_model(model: str, dtype: Dtype = "auto", device: str = "auto") -> LanguageModel:
    """Load ``packaged:<name>``, a local folder, or a hub id, frozen and in evaluation mode.

    A model whose code is not part of transformers is refused unless its name says so: ``trust-remote-code:<folder or hub id>`` runs
    the Python files that lie beside its weights, with all that the person who runs this may do.

    Args:
        model: which model.
        dtype: ``auto`` is bfloat16 where there is a GPU or the processor multiplies it natively, else float32.
        device: a torch device string; ``auto`` is the GPU where there is one.

    Raises:
        UserError: unknown model, no network, or a folder that holds no model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    source, trust = resolve_model(model), {"trust_remote_code": model.startswith(TRUST)}
    transformers_logging.disable_progress_bar()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # of weights that do not fit it prints a table; the refusal says it
    try:
        config = AutoConfig.from_pretrained(source, **trust)
        how = {"dtype": resolve_dtype(dtype), "attn_implementation": _attention(config), "output_loading_info": True, **trust}
        loaded, report = AutoModelForCausalLM.from_pretrained(source, **how)
        tokenizer = AutoTokenizer.from_pretrained(source, **trust)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # its files go through a dozen parsers, and no base class is shared by what those raise
        raise UserError(_explain(model, source, error)) from error
    finally:
        transformers_logging.set_verbosity(before)
    if absent := sorted(report["missing_keys"]):
        raise UserError(f"model {model}: its weights lack {absent[0]} and {len(absent) - 1} more, which would be random numbers")
    loaded.requires_grad_(False).eval().to(resolve_device(device))
    return LanguageModel(model, loaded, tokenizer, model_digest(loaded))


def resolve_model(model: str) -> str:
    """The folder or hub id that transformers understands for what a person typed."""
    return str(packaged_folder(model.removeprefix(PREFIX))) if model.startswith(PREFIX) else model.removeprefix(TRUST)


def layer_count(model: str) -> int:
    """Number of decoder layers by the model's configuration: the weights of a large model need not be read for it.

    Raises:
        UserError: as :func:`load_model`.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_model(model), trust_remote_code=model.startswith(TRUST))
        count: int = config.get_text_config().num_hidden_layers
    except Exception as error:  # as in load_model
        raise UserError(_explain(model, resolve_model(model), error)) from error
    return count


def model_stamp(model: str) -> Any:
    """Something that changes when a local model folder does, by content and not by date; names and hub ids stand for themselves."""
    folder = Path(model.removeprefix(TRUST))
    return [[p.name, _file_stamp(p)] for p in sorted(folder.glob("*")) if p.is_file()] if folder.is_dir() else model


def _file_stamp(path: Path) -> str:
    """SHA-256 (hex) over a file's size and up to 64 evenly spaced blocks of 1 MiB of it: all of a small file."""
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with open(path, "rb") as handle:
        for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
            handle.seek(start)
            digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def resolve_device(device: str) -> str:
    """``auto`` as the first GPU, or the processor where there is none."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_dtype(dtype: Dtype) -> Any:
    """The torch dtype for ``dtype``."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    native = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """The model computes in float32 inside the block, with the weights that it has; afterwards it is as before, bit for bit.

    In bfloat16 two passes that differ by next to nothing round differently, which alone is a KL of about 0.001 nats a token.
    """
    import torch

    rounded = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    before = [t.data for t in rounded]
    try:
        for tensor in rounded:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(rounded, before, strict=True):
            tensor.data = data


def model_digest(model: PreTrainedModel) -> str:
    """Fingerprint of a model's weights, the same for whichever dtype it was loaded in.

    SHA-256 over every parameter's name, shape and up to 4,096 evenly spaced values rounded to bfloat16 (a load in
    bfloat16 has rounded them already). It tells models and fine-tunes apart in milliseconds; it is not a checksum of
    every bit.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES_PER_TENSOR)].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _attention(config: Any) -> str | None:
    """Name of the attention to load, None for transformers' own choice (sdpa)."""
    import torch

    # sdpa drops Gemma-2's attention soft cap or gives NaN under padding (transformers#32390).
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    # On a processor, plain matrix products beat torch's fused kernel on short rows and equal it on long ones
    # (benchmarks/attention.py).
    return "eager" if capped or not torch.cuda.is_available() else None


def _explain(model: str, source: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"model {model}: it needs Python code of its own, which is not run; if you trust its author, name it {TRUST}{model}"
    if Path(source).is_dir():
        return (
            f"model {model}: the folder does not hold a causal language model that transformers can load ({type(error).__name__}: {error})"
        )
    return (
        f"model {model}: not a folder here, and the Hugging Face hub did not give it (unknown id, no network, or a licence "
        f"to accept first); name a local folder, a hub id, or {PREFIX}gemma-3-270m"
    )
