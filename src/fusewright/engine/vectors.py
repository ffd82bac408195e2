"""Task vectors of a recipe's models, read from their files when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusewright.engine.codec import Finite, check_input
from fusewright.engine.inputs import Inputs
from fusewright.engine.state import whole
from fusewright.errors import PlanError
from fusewright.modules.deltas import Delta, Dense, Factors, Sparse
from fusewright.modules.tensors import wide_dtype
from fusewright.modules.vectors import TaskVectors
from fusewright.weights import TensorInfo, Weights
from fusewright.weights.spec import LowRank


def task_vectors(
    inputs: Inputs, names: Mapping[str, str] | None = None, rule: Finite | None = None
) -> TaskVectors:
    """θ_0 and τ_t over the floating-point tensors that the base and every expert have.

    Differences are in float32, or float64 where the base is; of adapters over the base, the
    factors. ``names`` {the module's: the checkpoint's} renames them. Raises PlanError without a
    base, or if nothing is shared, NumericError for NaN and infinity where they are first read,
    unless ``rule`` allows them.
    """
    rule = rule or Finite()
    if inputs.base is None:
        raise PlanError("task vectors need the base that the experts were trained from",
                        fix="base: ...")  # fmt: skip
    wanted = [n for n in inputs.alignment.names if _everywhere(inputs, n)]
    renamed = {source: module for module, source in (names or {}).items()}
    named = {renamed.get(name, name): name for name in wanted}
    if not named:
        raise PlanError("base and experts share no floating-point tensor")
    for name in named.values():
        _check_shapes(inputs, name)
    base = {module: whole(inputs.base, _own(inputs, None, name)) for module, name in named.items()}
    for module, tensor in base.items():
        check_input(_wide(tensor), f"{inputs.base.label}: {named[module]}", rule)
    sound: set[tuple[str, str]] = set()

    def read(expert: str, module: str) -> Delta:
        weights, name = inputs.experts[expert], _own(inputs, expert, named[module])
        delta = _delta(weights, name, base[module])
        if (expert, name) not in sound:  # finite less finite is finite, or too large
            for tensor in delta.tensors:
                if tensor.is_floating_point():
                    check_input(tensor, f"{weights.label}: {name}", rule)
            sound.add((expert, name))
        return delta

    return TaskVectors(tuple(inputs.experts), base, read)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor))


def _everywhere(inputs: Inputs, name: str) -> bool:
    infos: list[TensorInfo | None] = [inputs.info(m, name) for m in (None, *inputs.experts)]
    return all(info is not None and info.dtype.is_float for info in infos)


def _check_shapes(inputs: Inputs, name: str) -> None:
    shapes = {m: info.shape for m in (None, *inputs.experts) if (info := inputs.info(m, name))}
    other = {m: shape for m, shape in shapes.items() if shape != shapes[None]}
    if other:
        raise PlanError("an expert's tensor has another shape than the base's", where=name,
                        expected=shapes[None], found=other)  # fmt: skip


def _own(inputs: Inputs, model: str | None, name: str) -> str:
    own = inputs.name_in(model, name)
    assert own is not None
    return own


def _delta(weights: Weights, name: str, base: Tensor) -> Delta:
    known, wide = weights.delta(name), wide_dtype(base)
    if isinstance(known, LowRank):
        wide = torch.promote_types(known.up.dtype, wide)
        return Factors(known.scale * known.up.to(wide), known.down.to(wide), base.shape)
    if known is not None:  # an adapter left it alone
        nothing = torch.empty(0, dtype=wide)
        return Sparse(nothing, nothing.to(torch.int32), base.shape)
    return Dense(whole(weights, name).to(wide) - base.to(wide), weights[name].dtype.torch)
