"""Does a model descend from a base? What a sample of its weights says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fusewright.engine._models import comparable
from fusewright.engine._pairs import Pairs, Source, compare, make_source, sampled_spans
from fusewright.weights import Weights

Verdict = Literal["yes", "doubtful", "no"]

CLOSE = 0.5
"""‖τ‖/‖θ0‖ of a descendant is below this. Fine-tuning moves weights by a few per cent of their
norm and long continued training by some tens; half the norm also bounds the angle (30°)."""
ALIKE = 0.9
"""cos(θ_t, θ0) of a descendant's matrices is above this."""
UNLIKE = 0.5
"""Below this cosine (60°) a model is further from the base than the base is from zero, if their
norms agree. Matrices of n elements trained from other initial values have cosines of about
1/√n, practically 0; only what both share (sinusoidal positions) lifts that."""

SAMPLE = 4 * 2**20
"""Bytes of base and expert together: a million bf16 numbers of each tell a cosine to 0.001."""


@dataclass(frozen=True)
class Descent:
    """``relative_norm`` = ‖τ‖/‖θ0‖ and ``cosine`` = cos(θ_t, θ0) over ``elements`` coordinates of
    matrices (None if there were none, or only zeros)."""

    relative_norm: float | None
    cosine: float | None
    verdict: Verdict
    elements: int


def descent(
    base: Weights, expert: Weights, names: Iterable[str] | Mapping[str, str], sample: int = SAMPLE
) -> Descent:
    """Evidence of descent from a sample of at most ``sample`` bytes (or one canonical block).

    ``names`` are tensors of the base, mapped to the expert's names if they differ; those that
    cannot be compared are passed over. "yes" needs a relative norm up to 0.5 and a cosine of at
    least 0.9, "no" a cosine below 0.5; what is between, or without evidence, is "doubtful".
    DoRA adapters need their norms, which are read besides. Raises WeightsError.
    """
    pairs = names.items() if isinstance(names, Mapping) else ((name, name) for name in names)
    sources = [
        make_source(name, base[name], (expert,), (own,))
        for name, own in pairs
        if comparable(base[name], expert[own])
    ]
    chosen = matrices(sources, {source.name: base[source.own].shape for source in sources})
    found = compare(base, (expert,), sampled_spans(chosen, sample), threads=1)
    return judged(Pairs.total(list(found.values()), 1), 0)


def matrices(
    sources: Iterable[Source], shapes: Mapping[str, tuple[int, ...]]
) -> list[Source]:
    """Those of two axes or more, which nothing but training makes alike: scales of norms are near
    1 in every model. All float tensors of a model without matrices."""
    floats = [source for source in sources if source.is_float]
    return [source for source in floats if len(shapes[source.name]) > 1] or floats


def judged(pairs: Pairs, expert: int) -> Descent:
    """The verdict on the expert of this index."""
    relative, cosine = pairs.relative(expert), pairs.cosine_to_base(expert)
    verdict: Verdict = "doubtful"
    if cosine is not None and cosine < UNLIKE:
        verdict = "no"
    elif cosine is not None and relative is not None and cosine >= ALIKE and relative <= CLOSE:
        verdict = "yes"
    return Descent(relative, cosine, verdict, int(pairs.elements[expert]))
