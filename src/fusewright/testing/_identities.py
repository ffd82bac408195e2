"""Identities: what a merge must be when the answer is known without merging.

A card may exempt its method from them, by name, with a reason.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusewright.methods.contract import Merger, Method
from fusewright.testing._promise import promise
from fusewright.testing._subject import as_map, count, is_map, run
from fusewright.testing._toys import toy


def close(found: Tensor, expected: Tensor) -> None:
    """Equal to a few roundings of the largest number."""
    if expected.numel():
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * size)


def _merges_one(cls: type[Method]) -> bool:
    return is_map(cls) and cls.card.experts[0] == 1


def _merges_two(cls: type[Method]) -> bool:
    return is_map(cls) and cls.card.experts[1] != 1


def _has_weight(cls: type[Method]) -> bool:
    return is_map(cls) and "weight" in cls.model_fields


def _has_scale(cls: type[Method]) -> bool:
    return is_map(cls) and "scale" in cls.model_fields


@promise("neutral", _merges_one, identity=True)
def one_expert(method: Method) -> None:
    """One expert is returned as it is."""
    models = toy(1)
    close(run(method, models), models.tensors[0])


@promise("neutral", _merges_two, identity=True)
def identical_experts(method: Method) -> None:
    """Copies of one expert merge into that expert."""
    models = toy(count(type(method)))
    same = models.with_experts(dict.fromkeys(models.keys, models.tensors[0]))
    close(run(method, same), models.tensors[0])


@promise("variants", _merges_two, identity=True)
def order(method: Method) -> None:
    """The order of the experts changes nothing but the last rounding; weights follow names."""
    models = toy(count(type(method)))
    if _has_weight(type(method)):
        weights = {k: w for k, w in zip(models.keys, (0.5, 2.0, 1.0), strict=False)}
        method = type(method)(**{**dict(method), "weight": weights})
    turned = models.with_experts(dict(reversed(models.experts.items())))
    close(run(method, turned), run(method, models))


@promise("variants", lambda cls: _merges_two(cls) and _has_weight(cls), identity=True)
def zero_weight(method: Method) -> None:
    """An expert of weight 0 is as good as absent."""
    models = toy(count(type(method)))
    last = models.keys[-1]
    weighted = type(method)(**{**dict(method), "weight": {last: 0.0}})
    fewer = models.with_experts({k: v for k, v in models.experts.items() if k != last})
    close(run(weighted, models), run(method, fewer))


@promise("variants", identity=True)
def zero_vectors(method: Method) -> None:
    """Experts equal to the base give the base; weights of zero give zero."""
    models = toy(count(type(method)))
    if as_map(method).frame == "weights":
        models = models.map(torch.zeros_like)
    same = models.with_experts(dict.fromkeys(models.keys, models.base))
    close(run(method, same), models.base)


@promise("variants", _has_scale, identity=True)
def scale(method: Method) -> None:
    """The merged vector is proportional to ``scale``."""
    models = toy(count(type(method)))
    zero = torch.zeros_like(models.base) if as_map(method).frame == "weights" else models.base
    once, half = (type(method)(**{**dict(method), "scale": s}) for s in (1.0, 0.5))
    close(run(half, models) - zero, 0.5 * (run(once, models) - zero))


@promise("variants", identity=True)
def homogeneous(method: Method) -> None:
    """Vectors twice as long merge into a vector twice as long."""
    models = toy(count(type(method)))
    short = models.map(lambda x: x - models.base)
    close(run(method, short.map(lambda x: 2 * x)), 2 * run(method, short))


@promise("class", lambda cls: is_map(cls) and issubclass(cls, Merger))
def optional_base(method: Method) -> None:
    """With two experts, a merger that says its base is optional merges the same without it."""
    cls = type(method)
    if cls.card.base == "optional" and _merges_two(cls):
        models = toy(2)
        close(method(None, models.tensors), method(models.base, models.tensors))
