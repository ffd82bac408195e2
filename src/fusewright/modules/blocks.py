"""The blocks of a model as modules: what is hooked, run and merged one after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from fusewright.layout import ModelLayout, block_order, rules
from fusewright.layout.blocks import find_mark


@dataclass(frozen=True, slots=True)
class Block:
    """One block: the module at ``path``, number ``layer`` in ``stack``.

    ``beside`` are modules outside ``path`` whose tensors count with this block: a stage's
    down-sampling, the attention beside a UNet's ResNet.
    """

    path: str
    stack: str
    layer: int
    beside: tuple[str, ...] = ()


class _Cut(NamedTuple):
    """Where a tensor's name says that its block begins: after how many numbers, at which module,
    and which child of it holds the tensor."""

    numbers: int
    path: str
    child: str


def find_blocks(layout: ModelLayout) -> tuple[Block, ...]:
    """Every block in running order; stacks in order of their first appearance."""
    cuts: dict[tuple[str, int], list[_Cut]] = defaultdict(list)
    for name, tensor in layout.items():
        if tensor.layer is not None:
            cuts[tensor.stack, tensor.layer].append(_cut(name, tensor.stack))
    return tuple(_block(*place, cuts[place]) for place in block_order(layout))


def _block(stack: str, layer: int, cuts: list[_Cut]) -> Block:
    """A stage's own tensors (``stages.1.downsampling_layer``) have fewer numbers than blocks."""
    deepest = max(cut.numbers for cut in cuts)
    found = dict.fromkeys(cut.path for cut in cuts if cut.numbers == deepest)
    found |= dict.fromkeys(cut.child for cut in cuts if cut.numbers < deepest)
    path, *beside = found
    return Block(path, stack, layer, tuple(beside))


def _cut(name: str, stack: str) -> _Cut:
    mark = find_mark(name)
    if mark and mark.word in rules.SINGLE_BLOCKS:
        return _Cut(1, mark.stack, mark.stack)
    numbers = len(mark.key) if mark else 1
    prefix, parts = mark.stack if mark else stack, name.split(".")
    *_, last = islice(_numbered(parts, len(prefix.split(".")) if prefix else 0), numbers)
    child = parts[: min(last + 2, len(parts) - 1)]
    return _Cut(numbers, ".".join(parts[: last + 1]), ".".join(child))


def _numbered(parts: list[str], start: int) -> Iterator[int]:
    """Where numbers stand in a name: components of digits, or the stage itself (``layer1``)."""
    if start and rules.NUMBERED_STAGE.fullmatch(parts[start - 1]):
        yield start - 1
    yield from (at for at in range(start, len(parts)) if parts[at].isdigit())
