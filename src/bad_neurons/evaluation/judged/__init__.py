"""Syco-Bench as published: answers at length, scored by judges, and how far judges can be trusted."""
