"""Lightning callbacks, imported as ``bad_neurons.callbacks``."""

from bad_neurons.callbacks.delta_checkpoint import DeltaCheckpoint
from bad_neurons.callbacks.frozen_audit import FrozenAudit
from bad_neurons.callbacks.gradient_mask import GradientMask

__all__ = ["DeltaCheckpoint", "FrozenAudit", "GradientMask"]
