"""What is known of a live model's architecture, in one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fusewright.layout import ModelLayout, Role, TensorLayout, describe
from fusewright.layout.names import module
from fusewright.modules.batchnorm import batchnorms
from fusewright.modules.blocks import Block, find_blocks
from fusewright.modules.kinds import Kind, kinds_of
from fusewright.modules.linears import LinearMap, linear_map
from fusewright.modules.tensors import tied_names


@dataclass(frozen=True)
class Architecture:
    """Where everything of a model is.

    ``blocks`` in running order; ``linears`` by the name of their weight; ``heads``: modules that
    make the output (classifier, language-model head); ``tied``: groups of names that are one
    tensor, the first met is the stored one; ``batchnorms``: modules with running statistics;
    ``layout``: every tensor's place, corrected by what the modules know.
    """

    blocks: tuple[Block, ...]
    linears: Mapping[str, LinearMap]
    heads: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    batchnorms: tuple[str, ...]
    layout: ModelLayout

    def inside(self, block: int) -> tuple[LinearMap, ...]:
        """The linear maps of one block, in the order of the model's tensors."""
        return tuple(linear for linear in self.linears.values() if linear.block == block)


def describe_module(model: nn.Module) -> Architecture:
    """What is known of the model: from names, shapes and config, then from its modules' classes.

    Works on the meta device; reads no values.
    """
    tensors = model.state_dict()
    kinds = {n: "float" if t.is_floating_point() else "int" for n, t in tensors.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    guessed = describe(shapes, kinds, config_of(model))
    known = _known(model)
    layouts = {n: _corrected(t, shapes[n], known.get(n)) for n, t in guessed.items()}
    layout = ModelLayout(layouts, tied_names(model), guessed.notes)
    blocks = find_blocks(layout)
    linears = _linears(model, tensors, layout, blocks)
    return Architecture(
        blocks=blocks, linears=linears, tied=layout.tied, layout=layout,
        heads=tuple(dict.fromkeys(x.module for x in linears.values()
                                  if layout[x.weight].role is Role.HEAD)),
        batchnorms=tuple(batchnorms(model)),
    )  # fmt: skip


def config_of(model: nn.Module) -> dict[str, Any]:
    """The model's Hugging Face config as a dictionary; of a model that wraps such models, one
    section for each of the outermost; {} if there is none."""
    found: dict[str, dict[str, Any]] = {}
    for path, part in model.named_modules():
        config: Any = getattr(part, "config", None)
        inside = any(path.startswith(f"{outer}.") or not outer for outer in found)
        if not inside and hasattr(config, "to_dict"):
            found[path] = config.to_dict()
    if len(found) == 1:
        return next(iter(found.values()))
    return {f"{path}.config": config for path, config in found.items()}


def _known(model: nn.Module) -> dict[str, Kind]:
    """What classes tell, by tensor name."""
    return {
        f"{path}.{kind.parameter}".lstrip("."): kind
        for path, part in model.named_modules(remove_duplicate=False)
        for kind in kinds_of(part)
    }


def _corrected(guess: TensorLayout, shape: tuple[int, ...], kind: Kind | None) -> TensorLayout:
    """What the class says stands; what it is silent on stays as the names told it."""
    if kind is None:
        return guess
    packed, axis = guess.packed, guess.packed_axis
    if kind.parts > 1:
        packed, axis = (shape[0] // kind.parts,) * kind.parts, 0
    elif not kind.linear:
        packed, axis = (), 0
    return replace(
        guess, matrix=kind.linear, in_first=kind.in_first, packed=packed, packed_axis=axis
    )


def _linears(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    layout: ModelLayout,
    blocks: tuple[Block, ...],
) -> dict[str, LinearMap]:
    position = {(block.stack, block.layer): at for at, block in enumerate(blocks)}
    return {
        name: linear_map(
            model.get_submodule(module(name)), tensors[name], place, set(tensors),
            None if place.layer is None else position[place.stack, place.layer],
        )
        for name, place in layout.items()
        if place.matrix
    }  # fmt: skip
