"""The formats of everything that this package writes and reads again: name, version, and the command that writes it.

A version rises whenever a reader of the one before could misread a file; what is older is refused by name.
"""

from __future__ import annotations

from bad_neurons.sealed import Format

SHARD = Format("bad-neurons/shard/1", "the same command")
SAE = Format("bad-neurons/sae/1", "bad-neurons sae fit")
SAE_METRICS = Format("bad-neurons/sae-metrics/1", "bad-neurons sae fit")
LAYERS = Format("bad-neurons/layers/2", "bad-neurons layers")
PROBE = Format("bad-neurons/probe/2", "bad-neurons probe fit")
PROBE_METRICS = Format("bad-neurons/probe-metrics/1", "bad-neurons probe fit")
PROBES = Format("bad-neurons/probes/2", "bad-neurons probes")
NEURONS = Format("bad-neurons/neurons/2", "bad-neurons select")
CLEAN_PASS = Format("bad-neurons/clean-pass/1", "bad-neurons tune fit")
CHECKPOINT = Format("bad-neurons/checkpoint/1", "bad-neurons tune fit")
DELTA = Format("bad-neurons/delta/2", "bad-neurons tune fit")
RESULTS = Format("bad-neurons/results/1", "bad-neurons evaluate")
JUDGED = Format("bad-neurons/judged/1", "bad-neurons judge")
KEPT = Format("bad-neurons/kept/1", "the same command")
AGREEMENT = Format("bad-neurons/agreement/1", "bad-neurons judge-agreement")
CELL = Format("bad-neurons/cell/1", "bad-neurons compare")
STAGE = Format("bad-neurons/stage/1", "bad-neurons run")
