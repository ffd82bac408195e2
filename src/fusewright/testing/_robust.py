"""Promises without exemption: shapes, dtypes, numbers at the edge, chunks, and good manners."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fusewright.errors import RecipeError
from fusewright.layout import describe
from fusewright.layout.spec import TensorLayout
from fusewright.methods import door
from fusewright.methods.contract import At, Merger, Method
from fusewright.methods.partials import BLOCK
from fusewright.methods.pipeline import Place, resolved
from fusewright.methods.registry import method_class, parse_method
from fusewright.testing._identities import close
from fusewright.testing._promise import promise
from fusewright.testing._subject import NAME, SEED, as_map, count, is_map, run
from fusewright.testing._toys import Toy, toy
from fusewright.weights.spec import LowRank

SHAPES = ((), (1,), (7,), (1, 5), (5, 1), (6, 8), (8, 6), (2, 3, 4), (4, 3, 3, 3), (0,), (3, 0))


def same_bytes(found: Tensor, expected: Tensor) -> None:
    """Bit for bit the same."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    different = int((found != expected).sum())
    assert torch.equal(found, expected), f"{different} of {found.numel()} elements differ"


@promise()
def shapes(method: Method) -> None:
    """From 0 to 4 dimensions, and empty: the shape and dtype stay, the numbers are finite."""
    for shape in SHAPES:
        models = toy(count(type(method)), shape)
        merged = run(method, models)
        assert merged.shape == shape, f"shape {shape} became {tuple(merged.shape)}"
        assert torch.isfinite(merged).all(), f"not finite for shape {shape}"


@promise()
def non_contiguous(method: Method) -> None:
    """Strides do not matter."""
    models = toy(count(type(method)))
    strided = models.map(lambda x: x.T.contiguous().T)
    same_bytes(run(method, strided), run(method, models))


@promise("neutral")
def integers(method: Method) -> None:
    """Integer and boolean tensors come from the base."""
    for dtype in (torch.int64, torch.uint8, torch.bool):
        models = toy(count(type(method))).map(lambda x, d=dtype: (x > 0).to(d))  # type: ignore[misc]
        same_bytes(run(method, models), models.base)


@promise()
def dtypes(method: Method) -> None:
    """Storage dtypes stay; half precision is computed in float32 and rounded once; float64 is
    computed in float64."""
    cls = type(method)
    for dtype in (torch.bfloat16, torch.float16):
        models = toy(count(cls), dtype=dtype)
        wide = models.map(lambda x: x.float())
        same_bytes(run(method, models), run(method, wide).to(dtype))
    exact = toy(count(cls), grid=False, dtype=torch.float64)
    exact = exact.map(lambda x, base=exact.base: x - base)  # type: ignore[misc]
    merged = run(method, exact)
    assert merged.dtype == torch.float64
    nudged = exact.map(lambda x: x * (1 + 2.0**-40))
    assert not torch.equal(run(method, nudged), merged), "float64 was computed in float32"


@promise()
def inputs_unchanged(method: Method) -> None:
    """Inputs are read, never written, and the result shares no memory with them."""
    models = toy(count(type(method)))
    before = models.map(torch.clone)
    run(method, models).fill_(77.0)
    for now, then in zip([models.base, *models.tensors], [before.base, *before.tensors],
                         strict=True):  # fmt: skip
        same_bytes(now, then)


@promise()
def chunked(method: Method) -> None:
    """Block by block, the bytes are those of larger chunks; and the same again."""
    models = toy(count(type(method)), (3 * BLOCK + 77,), grid=False)
    whole = run(method, models)
    same_bytes(run(method, models), whole)
    with patch.object(door, "CHUNK", BLOCK):
        same_bytes(run(method, models), whole)


@promise()
def solved_is_plain(method: Method) -> None:
    """What rounds solve survives JSON, without which no merge could be resumed."""
    given = door.with_solved

    def through_json(place: Place, solved: Mapping[Any, Any]) -> Place:
        return given(place, {k: json.loads(json.dumps(v)) for k, v in solved.items()})

    models = toy(count(type(method)))
    whole = run(method, models)
    with patch.object(door, "with_solved", through_json):
        same_bytes(run(method, models), whole)


@promise()
def one_zero_vector(method: Method) -> None:
    """A zero vector among others, or a zero tensor, makes no NaN."""
    models = toy(count(type(method)))
    for zero in (models.base, torch.zeros_like(models.base)):
        merged = run(method, models.with_experts({**models.experts, models.keys[-1]: zero}))
        assert torch.isfinite(merged).all()


def _agrees_with_float64(method: Method, models: Toy, atol: float = 0.0) -> None:
    dtype = models.base.dtype
    exact = run(method, models.map(lambda x: x.double())).to(dtype)
    tiny = float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    coarse = dtype != torch.float32
    torch.testing.assert_close(
        run(method, models), exact, rtol=1e-2 if coarse else 2e-5, atol=max(atol, 8 * tiny)
    )


@promise()
def extremes(method: Method) -> None:
    """Magnitudes from 1e-45 to 1e38, and bfloat16 denormals, in one vector: as in float64."""
    cls = type(method)
    # What is dropped at random is made up for by 1/density, which must not overflow.
    largest = 36 if "density" in cls.model_fields else 38
    powers = torch.linspace(-44.85, largest, 193, dtype=torch.float64)
    signs = torch.ones_like(powers)
    signs[1::2] = -1
    for dtype, values in (
        (torch.float32, signs * 10**powers),
        (torch.bfloat16, signs * 2.0 ** torch.linspace(-133, -110, 193, dtype=torch.float64)),
    ):
        vector = values.to(dtype)
        given = [vector, vector, -vector][: count(cls)]
        experts = {f"expert {i}": v for i, v in enumerate(given)}
        _agrees_with_float64(method, Toy(torch.zeros_like(vector), experts))


@promise()
def equal_magnitudes(method: Method) -> None:
    """Entries that all have one magnitude are merged as in float64, wherever a threshold falls."""
    cls = type(method)
    models = toy(count(cls))
    level = models.map(lambda x: 0.25 * torch.sign(x - models.base))
    _agrees_with_float64(method, level, atol=1e-6)


@promise("neutral", lambda cls: is_map(cls) and issubclass(cls, Merger))
def factors(method: Method) -> None:
    """LoRA factors merge as their dense products do, if the method merges factors at all."""
    assert isinstance(method, Merger)
    models = toy(max(count(type(method)), 1), (12, 9))
    lora = [LowRank(x[:, :2].contiguous(), x[:2, :].contiguous(), 0.5) for x in models.tensors]
    dense = [f.scale * (f.up @ f.down) for f in lora]
    zero = torch.zeros_like(dense[0])
    at = At("w", (12, 9), 0, 108, models.keys, TensorLayout("w", matrix=True))
    if method.rounds(at.dtype):
        return
    at = at.replaced(params=resolved(method, at.layout, models.keys))
    merged = method.merge_factors(lora, at)
    if merged is NotImplemented:
        return
    assert merged is not None
    close(merged.scale * (merged.up @ merged.down), as_map(method)(zero, dense))
    untouched = method.merge_factors([None] * len(lora), at)
    assert untouched is None, "untouched factors must stay untouched"


@promise()
def doors(method: Method) -> None:
    """The engine's answer is the tensor door's, bit for bit, with and without fused kernels."""
    from fusewright.engine import merge

    cls = type(method)
    for dtype in (torch.float32, torch.bfloat16):
        models = toy(count(cls), grid=False, dtype=dtype)
        base, experts = {NAME: models.base}, {k: {NAME: v} for k, v in models.experts.items()}
        layout = describe({NAME: tuple(models.base.shape)}, {})[NAME]
        expected = run(method, models, layout=layout)
        for kernels in (False, True):
            found = merge(as_map(method), base=base, experts=experts, seed=SEED, kernels=kernels)
            same_bytes(found.state_dict()[NAME], expected)


@promise("variants", lambda cls: True)
def written(method: Method) -> None:
    """A method is written and read back as the same value."""
    read = parse_method(json.loads(json.dumps(method.spec())))
    assert read == method, f"{method!r} was read back as {read!r}"


@promise("class", lambda cls: True)
def described(method: Method) -> None:
    """Name, card and docstring say what a reader needs."""
    cls = type(method)
    assert method_class(cls.name) is cls, f"{cls.name!r} names another method"
    assert cls.__doc__ and len(cls.__doc__.strip().splitlines()) >= 3, "a docstring is missing"
    assert cls.card.title and cls.card.paper, "the card names no title or paper"
    assert cls.card.arxiv is None or cls.card.arxiv in cls.__doc__, "the docstring cites no arXiv"
    for name in cls.model_fields:
        mentioned = f"``{name}``" in cls.__doc__ or "Parameters as in" in cls.__doc__
        assert mentioned, f"the docstring does not explain {name!r}"


@promise("class", lambda cls: True)
def refuses_unknown_parameters(method: Method) -> None:
    """A misspelt parameter is refused with the known ones."""
    try:
        type(method)(no_such_parameter=1)
    except RecipeError as error:
        assert "no_such_parameter" in str(error)
    else:
        raise AssertionError("an unknown parameter was accepted")
