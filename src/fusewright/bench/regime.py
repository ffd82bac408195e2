"""The regime of a pool: whether its experts are small steps from a base worth merging.

Merging works where experts are better than their base, close to it, and nearly orthogonal to each
other. A pool outside that regime measures nothing, so every suite that is published is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from fusewright.layout import Role, describe
from fusewright.tasks.units import unit_of
from fusewright.weights.memory import tied_groups

if TYPE_CHECKING:
    from torch import Tensor

    from fusewright.bench.suite import Suite
    from fusewright.tasks.outcomes import Outcomes

    State = Mapping[str, Tensor]

SCALES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Of task arithmetic, along which entropy and loss are compared."""
STEPS = (0.25, 0.5, 0.75)
"""Between a base (0) and its expert (1), where a barrier is looked for."""
COMPETENT, GAP, ROOM = 0.85, 0.10, 0.06
"""A suite discriminates if its experts' mean is at least the first, the base's lower by at least
the second, and the average's by at least the third."""

Evaluate = Callable[["State", str], "Outcomes"]
"""What a model of these weights does on a task; loss and entropy in nats where they are known."""


@dataclass(frozen=True)
class TaskRegime:
    """One merged task. Scores are means of outcomes; ``norm`` is |expert - base| / |base|.

    Of perplexities and errors, scores are shares of the expert's: its own over the model's, so
    that 1 is as good as the expert. ``shown`` then holds those of base, average and expert, in
    the unit ``shown_in``.

    ``barrier`` is the largest excess of the loss between base and expert over the straight line
    between their losses (Frankle et al. 2020, arXiv:1912.05671), in nats. ``loss`` and
    ``entropy`` are means at each scale of task arithmetic over all experts; ``rank`` is their
    Spearman correlation, NaN where one does not vary. All four are None where outcomes have no
    loss or entropy.
    """

    base: float
    average: float
    expert: float
    norm: float
    barrier: float | None = None
    loss: tuple[float, ...] | None = None
    entropy: tuple[float, ...] | None = None
    rank: float | None = None
    shown: tuple[float, ...] | None = None
    shown_in: str = ""


@dataclass(frozen=True)
class Regime:
    """What :func:`check` found. ``cosines`` are of each pair of task vectors; ``unseen`` holds
    (base, average) of the tasks that have no expert, as shares of the base's if they are language
    modelling."""

    tasks: Mapping[str, TaskRegime]
    cosines: Mapping[tuple[str, str], float]
    scales: tuple[float, ...] = SCALES
    unseen: Mapping[str, tuple[float, float]] | None = None

    def mean(self, what: str) -> float:
        """The mean over merged tasks of "base", "average", "expert", "norm", "barrier", "rank";
        NaN where nothing is known, tasks without a value left out."""
        known = [v for task in self.tasks.values() if (v := getattr(task, what)) is not None]
        known = [v for v in known if not np.isnan(v)]
        return fmean(known) if known else float("nan")

    @property
    def gap(self) -> float:
        """How much better the experts are than the base, each on its own task."""
        return self.mean("expert") - self.mean("base")

    @property
    def gain(self) -> float:
        """How much better their average is than the base."""
        return self.mean("average") - self.mean("base")

    @property
    def room(self) -> float:
        """How much better the experts are than their average."""
        return self.mean("expert") - self.mean("average")

    def doubts(self) -> list[str]:
        """In what the suite is not one that discriminates; empty if in nothing."""
        found = []
        if self.mean("expert") < COMPETENT:
            found.append(f"the experts' mean is {self.mean('expert'):.3f}, below {COMPETENT}")
        if self.gap < GAP:
            found.append(f"the base is only {self.gap:.3f} below the experts, not {GAP}")
        if self.gain <= 0:
            found.append(f"averaging gains nothing over the base: {self.gain:+.3f}")
        if self.room < ROOM:
            found.append(f"averaging is only {self.room:.3f} below the experts, not {ROOM}")
        wrong = [n for n, t in self.tasks.items() if t.rank is not None and not t.rank > 0]
        if wrong:
            found.append(f"less entropy is not less loss along the scales on {', '.join(wrong)}")
        return found

    def table(self) -> str:
        """Everything as aligned text."""
        return "\n".join(_table(self))

    __str__ = table


def check(
    base: State,
    experts: Mapping[str, State],
    evaluate: Evaluate,
    *,
    unseen: Sequence[str] = (),
    scales: Sequence[float] = SCALES,
    step: Callable[[str], None] = lambda name: None,
) -> Regime:
    """The regime of a base and one expert a task, of the task's name.

    ``evaluate`` answers for weights and a task; it is called for the base, the average and each
    expert, at three points between base and expert, and at each of ``scales``. ``step`` hears of
    every merged task. Tensors that are not floating point are the base's; tied ones count once in
    norms and cosines. Running statistics are no weights, and no sum of them is one: at each scale
    they are the experts' mean, as of a merge.

    Raises ValueError without experts; KeyError if an expert lacks a tensor of the base.
    """
    if not experts:
        raise ValueError("a regime needs at least one expert")
    vectors = {name: _difference(expert, base) for name, expert in experts.items()}
    average = _moved(base, vectors.values(), 1 / len(experts))
    statistics = {name: average[name] for name in _statistics(base)}
    along = [_moved(base, vectors.values(), scale) | statistics for scale in scales]
    weights = _weights(base)
    steps = {name: {n: vector[n] for n in weights} for name, vector in vectors.items()}
    size = _length({name: base[name] for name in weights})
    tasks = {}
    for name, vector in vectors.items():
        between = [_moved(base, [vector], at) for at in STEPS]
        ends = evaluate(base, name), evaluate(_moved(base, [vector], 1.0), name)
        said = ends[0], evaluate(average, name), ends[1]
        scores = _scores(said, reference=ends[1])
        tasks[name] = TaskRegime(
            scores[0], scores[1], scores[2], _length(steps[name]) / size,
            _barrier(ends, [evaluate(state, name) for state in between]),
            *_ranked([evaluate(state, name) for state in along]),
            *((None, "") if (unit := unit_of(ends[0].metric)).bounded
              else (tuple(found.shown for found in said), unit.name)),
        )  # fmt: skip
        step(name)
    others = {}
    for name in unseen:
        found = evaluate(base, name), evaluate(average, name)
        scores = _scores(found, reference=found[0])
        others[name] = scores[0], scores[1]
    cosines = {(a, b): _cosine(steps[a], steps[b]) for a, b in combinations(steps, 2)}
    return Regime(tasks, cosines, tuple(scales), others)


def check_suite(
    suite: Suite, *, part: str = "validation", limit: int | None = None, progress: bool = True
) -> Regime:
    """The regime of a suite's pool, on its validation splits unless another part is named."""
    from fusewright.bench.progress import Stages

    opened = {name: suite.open(path).state_dict() for name, path in suite.experts.items()}
    experts = {name: opened[name] for name in suite.spec.merged}
    model = suite.open(suite.base)
    base = deepcopy(dict(model.state_dict()))  # where tensors are tied, so are the copies
    model.to(suite.device)

    def evaluate(state: State, task: str) -> Outcomes:
        model.load_state_dict(state)
        return suite.evaluate(model, task, part, limit)

    with Stages(progress).stage("regime", len(experts)) as step:
        return check(base, experts, evaluate, unseen=suite.spec.unseen, step=step)


def _scores(outcomes: Sequence[Outcomes], reference: Outcomes) -> list[float]:
    """Values; of what has no fixed scale, shares of the reference: ratios of perplexities or of
    errors."""
    values = [found.value for found in outcomes]
    unit = unit_of(reference.metric)
    if unit.bounded:
        return values
    found = unit.share(np.asarray(values), np.asarray(reference.value))
    return [float(value) for value in found]


def _floating(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def _statistics(state: State) -> set[str]:
    """Running statistics."""
    roles = describe({name: tuple(tensor.shape) for name, tensor in state.items()})
    return {name for name in _floating(state) if roles[name].role is Role.STATISTIC}


def _weights(state: State) -> list[str]:
    """The other floating tensors, of tied ones the first."""
    left = _statistics(state).union(*(names[1:] for names in tied_groups(state)))
    return [name for name in _floating(state) if name not in left]


def _difference(expert: State, base: State) -> dict[str, Tensor]:
    return {name: expert[name] - tensor for name, tensor in _floating(base).items()}


def _moved(base: State, vectors: Iterable[State], scale: float) -> dict[str, Tensor]:
    """base + scale · sum of vectors."""
    moved = dict(base)
    for vector in vectors:
        for name, tensor in vector.items():
            moved[name] = moved[name] + scale * tensor
    return moved


def _dot(a: State, b: State) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def _length(vector: State) -> float:
    return float(np.sqrt(_dot(vector, vector)))


def _cosine(a: State, b: State) -> float:
    lengths = _length(a) * _length(b)
    return _dot(a, b) / lengths if lengths else float("nan")


def _means(outcomes: Sequence[Outcomes], column: str) -> tuple[float, ...] | None:
    if any(column not in found.columns for found in outcomes):
        return None
    return tuple(
        float(np.average(np.asarray(f.columns[column], np.float64), weights=f.weight))
        for f in outcomes
    )


def _barrier(ends: Sequence[Outcomes], between: Sequence[Outcomes]) -> float | None:
    at_ends, inside = _means(ends, "loss"), _means(between, "loss")
    if at_ends is None or inside is None:
        return None
    first, last = at_ends
    line = [(1 - at) * first + at * last for at in STEPS]
    return max(0.0, *(loss - straight for loss, straight in zip(inside, line, strict=True)))


def _ranked(
    along: Sequence[Outcomes],
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, float | None]:
    loss, entropy = _means(along, "loss"), _means(along, "entropy")
    rank = None if loss is None or entropy is None else spearman(entropy, loss)
    return loss, entropy, rank


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; NaN if one is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b)]
    centred = [r - r.mean() for r in ranks]
    lengths = np.sqrt(np.prod([(c**2).sum() for c in centred]))
    return float((centred[0] * centred[1]).sum() / lengths) if lengths else float("nan")


def _ranks(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _table(regime: Regime) -> Iterator[str]:
    heads = ("task", "base", "average", "expert", "norm", "barrier", "entropy~loss")
    kinds = ("base", "average", "expert", "norm", "barrier", "rank")
    wide = max(20, *(len(name) + 2 for name in [*regime.tasks, *(regime.unseen or ())]))
    yield heads[0].ljust(wide) + "".join(head.rjust(13) for head in heads[1:])
    for name, task in regime.tasks.items():
        yield name.ljust(wide) + "".join(_number(getattr(task, kind)) for kind in kinds)
    yield "mean".ljust(wide) + "".join(_number(regime.mean(kind)) for kind in kinds)
    for name, (base, average) in (regime.unseen or {}).items():
        yield f"{name} *".ljust(wide) + _number(base) + _number(average)
    if regime.unseen:
        yield "* unseen: no expert was merged"
    units = dict.fromkeys(task.shown_in for task in regime.tasks.values() if task.shown_in)
    if units:
        yield (f"{', '.join(units)}: shares of the expert's, its own over the model's "
               "(unseen: the base's)")  # fmt: skip
    yield (f"gap of experts {regime.gap:+.3f}, gain of averaging {regime.gain:+.3f}, "
           f"experts above the average {regime.room:+.3f}")  # fmt: skip
    if regime.cosines:
        found = list(regime.cosines.values())
        yield (f"cosines of task vectors: mean {fmean(found):+.4f}, "
               f"from {min(found):+.4f} to {max(found):+.4f}")  # fmt: skip
    for name, task in regime.tasks.items():
        if task.shown is not None:
            shown = (f"{value:.2f}" for value in task.shown)
            yield f"{name}: {task.shown_in} of base, average, expert {', '.join(shown)}"
    norms = [task.norm for task in regime.tasks.values()]
    yield f"|task vector| / |base|: mean {fmean(norms):.4f}, {min(norms):.4f} to {max(norms):.4f}"
    for doubt in regime.doubts():
        yield f"doubt: {doubt}"


def _number(value: float | None) -> str:
    return ("-" if value is None else f"{value:.3f}").rjust(13)
