"""Find the few MLP neurons that carry an unwanted behaviour, retrain only those, and measure it (arXiv 2601.18939)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bad_neurons.tuning.delta_file import LoadedDelta as LoadedDelta
    from bad_neurons.tuning.delta_file import load_delta as load_delta

__version__ = "0.3.0"
__all__ = ["LoadedDelta", "__version__", "load_delta"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and `bad-neurons --help` must not wait for it.
    if name in ("LoadedDelta", "load_delta"):
        from bad_neurons.tuning import delta_file

        return getattr(delta_file, name)
    raise AttributeError(f"module 'bad_neurons' has no attribute {name!r}")
