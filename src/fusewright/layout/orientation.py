"""Whether a weight is stored out by in (``Linear``) or in by out (``Conv1D``, bare parameters)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from fusewright.layout import rules
from fusewright.layout.blocks import Place
from fusewright.layout.config import integers
from fusewright.layout.names import bias_of, leaf
from fusewright.layout.spec import Role

Shape = tuple[int, ...]


def in_first(
    shapes: Mapping[str, Shape],
    roles: Mapping[str, Role],
    matrices: Mapping[str, bool],
    places: Mapping[str, Place],
    config: Mapping[str, Any],
) -> tuple[set[str], list[str]]:
    """The names of weights stored in by out, and notes.

    The length of a bias is the number of outputs. A square weight says nothing and follows the
    other weights of its block; where nothing speaks, weights are out by in as in ``Linear``.
    """
    found, undecided = set(), []
    votes: dict[tuple[str, int], list[bool]] = defaultdict(list)
    for name, shape in shapes.items():
        if not matrices[name] or len(shape) != 2:
            continue
        verdict = _by_bias(name, shapes)
        if verdict:
            found.add(name)
        if verdict is None and shape[0] == shape[1] and name in places:
            undecided.append(name)
        if verdict is not None and name in places:
            votes[_block(places[name])].append(verdict)
        if verdict is None and roles[name] is Role.PROJECTION and leaf(name) != "weight":
            found.add(name)  # a bare parameter, used as x @ parameter
    for name in undecided:
        evidence = votes[_block(places[name])]
        if evidence and all(evidence):
            found.add(name)
    experts, notes = _experts(shapes, roles, config)
    return found | experts, notes


def _block(place: Place) -> tuple[str, int]:
    return place.stack, place.layer


def _by_bias(name: str, shapes: Mapping[str, Shape]) -> bool | None:
    rows, columns = shapes[name]
    bias = shapes.get(bias_of(name))
    if bias is None or len(bias) != 1 or rows == columns:
        return None
    return True if bias[0] == columns else False if bias[0] == rows else None


def _experts(
    shapes: Mapping[str, Shape], roles: Mapping[str, Role], config: Mapping[str, Any]
) -> tuple[set[str], list[str]]:
    found: set[str] = set()
    doubtful: set[str] = set()
    hidden = integers(config, rules.HIDDEN_KEYS)
    for up, down in feed_forwards(shapes):
        if roles[up] is not Role.EXPERT or len(shapes[up]) != 3:
            continue
        verdict = _by_pair(shapes[up][1:], shapes[down][1:], hidden)
        if verdict is None:
            doubtful |= {up, down}
        elif verdict:
            found |= {up, down}
    if doubtful:
        return found, [
            f"{len(doubtful)} expert stacks are taken to be out by in: nothing else tells"
        ]
    return found, []


def _by_pair(up: Shape, down: Shape, hidden: set[int]) -> bool | None:
    """Whether a feed-forward's two weights are in by out: its middle must fit, once or twice."""
    out_in = up[1] == down[0] and up[0] in (down[1], 2 * down[1])
    in_out = up[0] == down[1] and up[1] in (down[0], 2 * down[0])
    if out_in and in_out and up[0] != up[1]:
        out_in, in_out = up[1] in hidden, up[0] in hidden
    return in_out if out_in != in_out else None


def feed_forwards(shapes: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """(first, second) projections that stand side by side, by ``rules.FEED_FORWARD``."""
    pairs = []
    for name in shapes:
        for first, second in rules.FEED_FORWARD:
            partner = f".{name}.".replace(f".{first}.", f".{second}.")[1:-1]
            if partner != name and partner in shapes:
                if len(shapes[name]) == len(shapes[partner]) >= 2:
                    pairs.append((name, partner))
                break
    return pairs
