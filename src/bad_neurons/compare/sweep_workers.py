"""The processes of a sweep."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace

from tqdm.auto import tqdm

from bad_neurons.compare.processes import worker_pool
from bad_neurons.compare.sweep import Objective, Sweep

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


def run_sweep(sweep: Sweep, make: Callable[[], Objective], trials: int, processes: int = 1) -> None:
    """Try until the study has ``trials`` trials; those of earlier and of other processes count.

    Args:
        sweep: what is looked for.
        make: makes the objective; called once in each process that has something to do, and pickled where there are several.
        trials: number of trials in all.
        processes: processes that try at a time, each with its share of the cores.

    Raises:
        UserError: a bound is on something that is not measured.
    """
    sweep.requeue_dead()
    left = trials - len(sweep.tried())
    log.info("%d trials, %d of them done or running already", trials, min(trials, len(sweep.tried())))
    if left <= 0:
        return
    with tqdm(total=trials, initial=trials - left, desc="sweep", unit="trial") as bar:

        def show() -> None:
            best = sweep.best()
            bar.set_postfix_str(f"best {best.value:.3g}" if best else "none within bounds")
            bar.update(len(sweep.tried()) - bar.n)

        if (count := min(processes, left)) == 1:
            work(sweep, make, trials, show)
            return
        with worker_pool(count) as pool:
            waiting = {pool.submit(work, replace(sweep), make, trials) for _ in range(count)}  # without the open study
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS, "FIRST_COMPLETED")
                show()
                for one in done:
                    one.result()


def work(sweep: Sweep, make: Callable[[], Objective], trials: int, show: Callable[[], None] = lambda: None) -> None:
    """Try one thing after the other until the study has ``trials`` trials."""
    objective = make()
    while (trial := sweep.claim(trials)) is not None:
        sweep.measure(trial, objective)
        show()
