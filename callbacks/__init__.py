"""Lightning callbacks, imported as ``bad_neurons.callbacks``."""

from bad_neurons.callbacks.delta_checkpoint import DeltaCheckpoint
from bad_neurons.callbacks.frozen_audit import FrozenAudit
from bad_neurons.callbacks.gradient_mask import GradientMask
from bad_neurons.callbacks.kl_bound import KLBound
from bad_neurons.callbacks.number_guard import NumberGuard

__all__ = ["DeltaCheckpoint", "FrozenAudit", "GradientMask", "KLBound", "NumberGuard"]
