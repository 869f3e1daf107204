"""Lightning callbacks, imported as ``bad_neurons.callbacks``."""

from bad_neurons.callbacks.delta_checkpoint import DeltaCheckpoint
from bad_neurons.callbacks.exact_resume import ExactResume
from bad_neurons.callbacks.frozen_audit import FrozenAudit
from bad_neurons.callbacks.gradient_mask import GradientMask
from bad_neurons.callbacks.kl_bound import KLBound
from bad_neurons.callbacks.mid_epoch_checkpoint import MidEpochCheckpoint
from bad_neurons.callbacks.number_guard import NumberGuard
from bad_neurons.callbacks.stop_in_order import StopInOrder

__all__ = ["DeltaCheckpoint", "ExactResume", "FrozenAudit", "GradientMask", "KLBound", "MidEpochCheckpoint", "NumberGuard", "StopInOrder"]
