"""The public contract suite over every registered method, and that it catches broken ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from references import REFERENCES
from torch import Tensor

from fusewright.errors import PlanError
from fusewright.methods.contract import (
    At,
    Card,
    Merger,
    Method,
    Program,
    Round,
    Routed,
    Seen,
    Transform,
)
from fusewright.methods.partials import Partial
from fusewright.methods.registry import registry
from fusewright.methods.static import Average, IsoC, Mean, Slerp
from fusewright.testing import (
    PROPERTIES,
    ContractViolation,
    cases,
    check_method,
    check_property,
    check_reference,
)


@pytest.mark.parametrize(
    ("method", "name"), [pytest.param(m, n, id=f"{m.name}-{n}") for m, n in cases()]
)
def test_every_method_keeps_every_promise(method: type[Method], name: str) -> None:
    check_property(method, name)


WEIGHTS_ALONE = sorted(n for n, m in registry().items() if not issubclass(m, Program | Routed))


@pytest.mark.parametrize("name", WEIGHTS_ALONE)
def test_every_method_agrees_with_a_reference_written_apart(name: str) -> None:
    check_reference(registry()[name], REFERENCES[name])


def test_slerp_goes_from_the_base_to_its_only_expert() -> None:
    base, expert = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.allclose(Slerp(t=0.5)(base, [expert]), torch.full((2,), 0.5**0.5))
    with pytest.raises(PlanError, match="another number of experts"):
        Slerp()(None, [expert])


def test_every_property_speaks_of_some_method() -> None:
    assert {name for _, name in cases()} == set(PROPERTIES)


class _Toy(Merger):
    """A mean that tests break.

    One line more.
    ``weight``: none.
    """

    name: ClassVar[str] = "toy"
    card: ClassVar[Card] = Card("Toy", "none")

    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return sum(vectors[1:], vectors[0]) / len(vectors)


class _Adds(_Toy):
    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return sum(vectors[1:], vectors[0])


class _FirstOnly(_Toy):
    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return vectors[0]


class _KnowsWhereItIs(_Toy):
    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return super().merge(vectors, base, at) * (1.0 if at.start == 0 else 1.0 + 2**-20)


class _Writes(_Toy):
    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        assert base is not None
        base.add_(1.0)
        return super().merge(vectors, base, at)


class _DividesByNorm(_Toy):
    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return sum((v / v.abs().max() for v in vectors[1:]), vectors[0] / vectors[0].abs().max())


class _Shifts(_Toy):
    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return super().merge(vectors, base, at) + 1e-3


class _Flattens(_Toy):
    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return super().merge(vectors, base, at)[:1]


class _RoundsDown(_Toy):
    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        return super().merge(vectors, base, at).float().to(at.dtype)


class _FlushesSmall(_Toy):
    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        merged = super().merge(vectors, base, at)
        small = (merged.abs() < 1e-38) & (at.dtype == torch.float32)
        return torch.where(small, 0.0, merged)


class _SolvesToTensors(_Toy):
    def rounds(self, dtype: torch.dtype) -> tuple[Round, ...]:
        return (Round("all", "tensor", self._measure, lambda partial, at: {1, 2}),)

    def _measure(self, seen: Seen, at: At) -> Partial:
        return Partial(counts={"n": torch.tensor(seen.vectors[0].numel())})


class _ExemptWithoutNeed(_Toy):
    card: ClassVar[Card] = Card("Toy", "none", exempt={"order": "no reason at all"})


class _ExemptFromManners(_Toy):
    card: ClassVar[Card] = Card("Toy", "none", exempt={"shapes": "inconvenient"})


class _BadTransform(Transform):
    """A transform that makes NaN of zero vectors.

    More.
    """

    name: ClassVar[str] = "bad"
    card: ClassVar[Card] = Card("Bad", "none")

    def apply(self, vector: Tensor, expert: int, at: At) -> Tensor:
        return vector * (vector.numel() / vector.count_nonzero())


def test_a_sound_method_passes() -> None:
    check_method(_Toy)


def test_a_name_that_is_taken_is_noticed() -> None:
    class Impostor(_Toy):
        name: ClassVar[str] = "ties"

    with pytest.raises(ContractViolation, match="described"):
        check_property(Impostor, "described")


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (_Adds, "identical_experts"),
        (_FirstOnly, "order"),
        (_KnowsWhereItIs, "chunked"),
        (_Writes, "one_expert"),
        (_DividesByNorm, "one_zero_vector"),
        (_DividesByNorm, "homogeneous"),
        (_Shifts, "zero_vectors"),
        (_Flattens, "shapes"),
        (_RoundsDown, "dtypes"),
        (_FlushesSmall, "extremes"),
        (_SolvesToTensors, "solved_is_plain"),
        (_ExemptWithoutNeed, "order"),
        (_ExemptFromManners, "shapes"),
        (_BadTransform, "one_zero_vector"),
    ],
)
def test_a_broken_method_fails(broken: type[Method], promise: str) -> None:
    with pytest.raises(ContractViolation):
        check_property(broken, promise)
    with pytest.raises(ContractViolation, match=promise):
        check_method(broken)


def test_a_wrong_reference_is_noticed() -> None:
    check_reference(Average, REFERENCES["average"])
    with pytest.raises(ContractViolation, match="differs from its reference"):
        check_reference(Mean, lambda m, base, experts, at: base)


def test_an_exemption_is_backed_by_a_counterexample() -> None:
    assert "one_expert" in IsoC.card.exempt
    check_property(IsoC, "one_expert")
