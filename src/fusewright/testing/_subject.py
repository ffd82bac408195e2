"""A method class made ready to be tested: a Map, its neutral form and its variants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from torch import Tensor

from fusewright.layout.spec import TensorLayout
from fusewright.methods.contract import Composite, Finish, Method, Stage, Transform
from fusewright.methods.door import on_tensors
from fusewright.methods.pipeline import Pipeline, as_pipeline
from fusewright.methods.settings import Reach, reach_of
from fusewright.testing._toys import Toy

NEUTRAL = {"density": 1.0, "scale": 1.0}
"""The values of the house's fixed words that change nothing."""
NAME, SEED = "layers.1.weight", 7
"""The tensor's name and the seed in all tests: a tensor in the middle one of three layers."""


def is_map(cls: type[Method]) -> bool:
    """Whether the method acts on tensors by itself: a stage or a composite."""
    return issubclass(cls, Stage | Composite)


def as_map(method: Method) -> Pipeline:
    """A Map around any stage: transforms and finishes are tested with the mean."""
    from fusewright.methods.static import Mean

    if isinstance(method, Transform):
        return method >> Mean()
    if isinstance(method, Finish):
        return Mean() >> method
    return as_pipeline(method)


def neutral(cls: type[Method], **params: Any) -> Method:
    """The method with density and scale 1, if it has them: what identities are about."""
    return cls(**{k: v for k, v in NEUTRAL.items() if k in cls.model_fields}, **params)


def variants(cls: type[Method]) -> Iterator[Method]:
    """The default, every profile, and the default with one parameter changed at a time."""
    yield cls()
    for profile in cls.profiles:
        yield cls.profile(profile)
    for name, info in cls.model_fields.items():
        for value in _alternatives(name, info):
            yield cls(**{name: value})


def _alternatives(name: str, info: Any) -> tuple[Any, ...]:
    if name == "density":
        return (0.35, 1.0)
    if info.annotation is bool:
        return (not info.default,)
    if get_origin(info.annotation) is Literal:
        return tuple(v for v in get_args(info.annotation) if v != info.default)
    if reach_of(info.metadata) is Reach.TENSOR and isinstance(info.default, float):
        return (0.6 * info.default,)
    return ()


def count(cls: type[Method], wanted: int = 3) -> int:
    """The number of experts nearest to the one wanted that the card allows."""
    low, high = cls.card.experts
    return max(low, wanted if high is None else min(wanted, high))


def run(method: Method, models: Toy, **place: Any) -> Tensor:
    """The merge of a toy at the tensor door, in the middle layer of three."""
    base = None if type(method).card.base == "unused" else models.base
    layout = TensorLayout(NAME, stack="layers", layer=1, depth=3, matrix=models.base.dim() >= 2)
    place = {"keys": models.keys, "name": NAME, "layout": layout, "seed": SEED, **place}
    return on_tensors(as_map(method), base, models.tensors, **place)
