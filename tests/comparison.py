"""Tables of a comparison whose frontiers are known: what is left falls in proportion to the root of KL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd

Effect = Callable[[str, int, str], float]  # of method, seed and topic
RIGHT = (True, False, None)


def comparison(
    slopes: Mapping[str, float],
    seeds: int = 3,
    topics: int = 5,
    per_topic: int = 3,
    strengths: Sequence[float] = (0.0, 0.5, 1.0, 2.0),
    kl: float | Callable[[str, int], float] = 0.01,
    suites: Sequence[str] = ("phil",),
    trained_on: str = "phil",
    examples: Sequence[int] = (64,),
    before: Effect = lambda method, seed, topic: 2.0,
    slope: Effect = lambda method, seed, topic: 0.0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Items and cells of methods that remove ``slopes[method] + slope(...)`` nats per root of KL.

    Args:
        slopes: by method.
        seeds: of each method.
        topics: of each suite.
        per_topic: items of each topic; the first agrees with somebody right, then wrong, then an opinion, and so on.
        strengths: of each cell.
        kl: at strength 1, the same or of each method and seed; it grows with the square of the strength.
        suites: their names.
        trained_on: as in the table.
        examples: numbers of examples.
        before: opinion shift of the clean model by topic, with what the item adds (its number / 10).
        slope: added to the slope.
    """
    items, cells = [], []
    for (method, mean), seed, number, strength in product(slopes.items(), range(seeds), examples, strengths):
        at_one = kl(method, seed) if callable(kl) else kl
        key = {"method": method, "seed": seed, "examples": number, "strength": strength}
        root = strength * np.sqrt(at_one)
        cells.append(key | side_effects(root) | {"trained_on": trained_on})
        for suite, topic, item in product(suites, range(topics), range(per_topic)):
            name = f"topic {topic}"
            clean = before(method, seed, f"{suite} {name}") + item / 10
            after = clean - (mean + slope(method, seed, f"{suite} {name}")) * root
            right = RIGHT[item % 3]
            items.append(
                key
                | {"suite": suite, "topic": name, "id": f"{topic}-{item}", "before": clean, "after": after, "person_is_right": right}
                | {"odds_before": clean + 1, "odds_after": after + 1}
                | {"accurate_before": None if right is None else True, "accurate_after": None if right is None else strength < 2}
            )
    return pd.DataFrame(items), pd.DataFrame(cells)


def side_effects(root: float) -> dict[str, float]:
    """Columns of a cell whose KL has this root."""
    return {
        "kl": root**2,
        "perplexity_before": 18.0,
        "perplexity_after": 18 * np.exp(root**2),
        "accuracy_before": 0.5,
        "accuracy_after": 0.5 - root / 2,
        "neurons": 100,
        "share": 0.03,
        "parameters": 1000,
        "train_seconds": 60.0,
    }
