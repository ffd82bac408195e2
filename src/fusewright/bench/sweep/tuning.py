"""Trials of a method's parameters: the same number for every method, from a stated seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusewright.extras import needs
from fusewright.methods.settings import Range


@dataclass(frozen=True)
class Tuned:
    """The best parameters, and every trial in order: {"parameters", "value"}."""

    best: Mapping[str, float]
    value: float
    trials: list[dict[str, Any]] = field(repr=False)


def tune(
    ranges: Mapping[str, Range],
    start: Mapping[str, float],
    score: Callable[[Mapping[str, float]], float],
    trials: int,
    seed: int,
) -> Tuned:
    """Maximise ``score`` by tree-structured Parzen estimators (Optuna), ``trials`` times.

    The first trial is ``start``, the method's defaults, where they lie inside the ranges: tuning
    ends no worse than they are on the split that it sees. Half of the trials, ten at most, are
    drawn at random before the estimator takes over. Of equal scores the earliest wins.
    """
    optuna = needs("optuna", "bench")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, (trials + 1) // 2))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    if all(r.low <= start[name] <= r.high for name, r in ranges.items()):
        study.enqueue_trial(dict(start))
    done: list[dict[str, Any]] = []
    for _ in range(trials):
        trial = study.ask()
        values = {name: _suggested(trial, name, r) for name, r in ranges.items()}
        found = score(values)
        study.tell(trial, found)
        done.append({"parameters": values, "value": found})
    best = max(done, key=lambda one: one["value"])
    return Tuned(best["parameters"], best["value"], done)


def _suggested(trial: Any, name: str, r: Range) -> float:
    if r.whole:
        return int(trial.suggest_int(name, int(r.low), int(r.high), log=r.log))
    return float(trial.suggest_float(name, r.low, r.high, log=r.log))
