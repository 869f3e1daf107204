"""Comparing ways to correct a model: methods by seeds by strengths, at equal side effect."""
