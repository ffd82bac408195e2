"""Which block of which stack a tensor belongs to, from the numbers in its name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fusewright.layout import rules
from fusewright.layout.config import integers

Shape = tuple[int, ...]
Key = tuple[int, ...]


class Mark(NamedTuple):
    """Where a name says that its tensor is: the stack, its last component, the block's number."""

    stack: str
    word: str
    key: Key


@dataclass(frozen=True, slots=True)
class Place:
    """A block: ``layer`` of ``depth`` in ``stack``."""

    stack: str
    layer: int
    depth: int


def place_blocks(
    shapes: Mapping[str, Shape], config: Mapping[str, Any]
) -> tuple[dict[str, Place], list[str]]:
    """The block of every tensor that is in one, and notes on what had to be inferred."""
    marks = {name: mark for name in shapes if (mark := find_mark(name))}
    marks |= _repeated({n: s for n, s in shapes.items() if n not in marks}, alone=not marks)
    places: dict[str, Place] = {}
    notes: list[str] = []
    for label, members in _chained(marks).items():
        keys = _with_stage_tensors(members)
        order, depth, note = _order(set(keys.values()), integers(config, rules.DEPTH_KEYS))
        if note:
            notes.append(f"{label or 'the model'}: {note}")
        places |= {name: Place(label, order[key], depth) for name, key in keys.items()}
    return places, notes


def find_mark(name: str) -> Mark | None:
    """What the known words in a name say (see ``rules``): the outermost stack decides."""
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if part in rules.SINGLE_BLOCKS:
            return Mark(".".join(parts[: at + 1]), part, (0,))
        if part.isdigit() and at and rules.STACK_WORD.fullmatch(parts[at - 1]):
            stack, word, number = ".".join(parts[:at]), parts[at - 1], int(part)
        elif (stage := rules.NUMBERED_STAGE.fullmatch(part)) and parts[at + 1].isdigit():
            word, number = stage[1], int(stage[2])
            stack = ".".join([*parts[:at], word])
        else:
            continue
        return Mark(stack, word, (number, *_within_stage(word, ".".join(parts[at + 1 :]))))
    return None


def _within_stage(word: str, rest: str) -> Key:
    for stage, inner in rules.STAGES:
        if stage.fullmatch(word) and (found := inner.match(rest)):
            return (int(found[1]),)
    return ()


def _repeated(shapes: Mapping[str, Shape], alone: bool) -> dict[str, Mark]:
    """Stacks without a known word: a number followed by the same matrices again and again.

    Two matrices must recur, so that ``projector.0.weight, projector.2.weight`` beside real stacks
    is none; one is enough in a model that has no other stack.
    """
    axes: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, shape in shapes.items():
        for stack, number, rest in _numbers(name):
            if len(shape) >= 2:
                axes[stack][rest].add(number)
    least = 1 if alone else 2
    stacks = {
        stack
        for stack, rests in axes.items()
        if sum(len(numbers) > 1 for numbers in rests.values()) >= least
    }
    marks = {}
    for name in shapes:
        for stack, number, _ in _numbers(name):
            if stack in stacks:
                marks[name] = Mark(stack, stack.rpartition(".")[2], (int(number),))
                break
    return marks


def _numbers(name: str) -> Iterable[tuple[str, str, str]]:
    parts = name.split(".")
    return [
        (".".join(parts[:at]), part, ".".join(parts[at + 1 :]))
        for at, part in enumerate(parts[:-1])
        if part.isdigit()
    ]


def _chained(marks: Mapping[str, Mark]) -> dict[str, dict[str, Mark]]:
    """Names and marks by stack; stacks that follow each other (``rules.CHAINS``) become one."""
    words = defaultdict(set)
    for mark in marks.values():
        words[mark.stack.removesuffix(mark.word)].add(mark.word)
    groups: dict[str, dict[str, Mark]] = defaultdict(dict)
    for name, mark in marks.items():
        prefix = mark.stack.removesuffix(mark.word)
        chain = next((c for c in rules.CHAINS if mark.word in c), (mark.word,))
        present = [word for word in chain if word in words[prefix]]
        position = (chain.index(mark.word),) if len(present) > 1 else ()
        label = prefix + "+".join(present)
        groups[label][name] = mark._replace(key=position + mark.key)
    return groups


def _with_stage_tensors(members: Mapping[str, Mark]) -> dict[str, Key]:
    """Keys in which a stage's own tensors (its down-sampling) belong to its first or last block."""
    blocks: dict[Key, list[Key]] = defaultdict(list)
    for mark in members.values():
        blocks[mark.key[:-1]].append(mark.key)

    def key(mark: Mark) -> Key:
        inner = blocks.get(mark.key)
        if not inner:
            return mark.key
        return min(inner) if rules.SAMPLES_FIRST.fullmatch(mark.word) else max(inner)

    return {name: key(mark) for name, mark in members.items()}


def _order(keys: set[Key], stated: set[int]) -> tuple[dict[Key, int], int, str]:
    """The position of each block, their number, and what had to be inferred ("" if nothing)."""
    ranks = {key: rank for rank, key in enumerate(sorted(keys))}
    if any(len(key) > 1 for key in keys):
        return ranks, len(ranks), "stages are counted as one order of blocks"
    numbers = {key: key[0] for key in keys}
    if numbers == ranks:
        return ranks, len(ranks), ""
    depths = [depth for depth in sorted(stated) if depth > max(numbers.values())]
    if depths:
        return numbers, depths[0], f"{len(keys)} of the config's {depths[0]} blocks are present"
    return ranks, len(ranks), "numbers have gaps: blocks are counted in their order"
