"""Where each output tensor is found in each input, when checkpoints name and store differently.

The rules, in order; each that applied is reported in ``notes``:

1. wrappers' prefixes are removed (:mod:`.names`);
2. one common prefix may lie between an expert's names and the reference's (a bare model, and the
   same model under a head);
3. a tied tensor may be absent under all but one of its names, and is then found under that one;
4. buffers that every model recomputes may be absent from any input; the reference's are kept;
5. tensors that the caller calls ``optional`` may be absent (the reference's are kept) or extra.

Anything else that is missing or extra is an error. The reference is the base, or the first expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import WeightsError
from .locate import DESCRIPTION, is_routed
from .names import canonical_names, recomputed
from .same import same_values
from .spec import TensorInfo, Weights

Groups = tuple[tuple[str, ...], ...]
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "decoder.weight")
_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
    "shared.weight", "tok_embeddings.weight",
)  # fmt: skip


@dataclass(slots=True)
class Aligned:
    """One input: output name to its own name, and why each other tensor of its own is not used.

    ``absent`` are outputs that it lacks by rule 4 or 5, with the reason.
    """

    names: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alignment:
    """The output's tensors, in the reference's order, and where every input has them.

    ``aliases`` maps tied names that the reference stores a second time to the one that counts:
    they are not in ``names``. Every tensor of every input is in its ``names`` or ``skipped``.
    """

    names: tuple[str, ...]
    base: Aligned | None
    experts: dict[str, Aligned]
    aliases: dict[str, str]
    notes: tuple[str, ...]


def align(
    base: Weights | None,
    experts: Mapping[str, Weights],
    tied: Groups = (),
    *,
    untie: bool = False,
    optional: Iterable[str] = (),
) -> Alignment:
    """Account for every tensor of every input (the rules are this module's docstring).

    ``tied`` are groups of names (of the reference) that share one tensor in the model, the stored
    one first. Tied in one input and not in another is an error, unless ``untie``: then each name
    of the group is an output. ``optional`` are glob patterns. Whether two stored copies are equal
    is read from the data; nothing else is read. Raises WeightsError.
    """
    inputs = {"base": base} if base is not None else {}
    labelled: dict[str, Weights] = {**inputs, **{f"expert {k}": v for k, v in experts.items()}}
    if not labelled:
        raise WeightsError("nothing to align", expected="a base or an expert", found="none")
    _refuse_routed(labelled)
    reference, first = next(iter(labelled.items()))
    notes: list[str] = []
    tables = _tables(labelled, reference, tied, notes)
    tied = _with_missing_heads(first, labelled, tables, reference, tied)
    split = _untied_groups(labelled, tables, tied, untie, notes)
    outputs, aliases = _outputs(tables[reference], tied, split)
    patterns = tuple(optional)
    ours = tables[reference]
    done = {
        key: _account(key, weights, tables[key], outputs, tied, ours, first, patterns, notes)
        for key, weights in labelled.items()
    }
    named = {key: done[f"expert {key}"] for key in experts}
    return Alignment(tuple(outputs), done.get("base"), named, aliases, tuple(notes))


Table = dict[str, str]  # name as the reference writes it -> the input's own name


def _tables(
    labelled: Mapping[str, Weights], reference: str, tied: Groups, notes: list[str]
) -> dict[str, Table]:
    tables: dict[str, Table] = {}
    for key, weights in labelled.items():
        table, mended = canonical_names(list(weights), weights.label)
        if key != reference:
            known = {*tables[reference], *(name for group in tied for name in group)}
            table, note = _common_prefix(table, known, f"{key} ({weights.label})")
            mended = (*mended, *note)
        notes += [f"{key}: {note}" for note in mended]
        tables[key] = table
    return tables


def _common_prefix(table: Table, known: set[str], label: str) -> tuple[Table, tuple[str, ...]]:
    """Add or remove the one prefix that makes more names known than any other."""
    counts: dict[tuple[str, str], int] = {("", ""): sum(name in known for name in table)}
    for name in table.keys() - known:
        for i in _dots(name):
            if name[i:] in known:
                counts["-", name[:i]] = counts.get(("-", name[:i]), 0) + 1
    for name in known - table.keys():
        for i in _dots(name):
            if name[i:] in table:
                counts["+", name[:i]] = counts.get(("+", name[:i]), 0) + 1
    (sign, prefix), best = max(counts.items(), key=lambda item: item[1])
    if not sign or list(counts.values()).count(best) > 1 or best <= len(table) // 2:
        return table, ()
    moved: Table = {}
    for name, given in table.items():
        new = _moved(name, sign, prefix, known)
        if new in moved:
            raise WeightsError(
                f"two tensors have the same name with '{prefix}' "
                f"{'removed' if sign == '-' else 'added'}",
                where=label, expected="one of them", found=f"{moved[new]}, {given}",
            )  # fmt: skip
        moved[new] = given
    return moved, (f"'{prefix}' {'removed from' if sign == '-' else 'added to'} {best} names",)


def _dots(name: str) -> list[int]:
    return [i + 1 for i, char in enumerate(name) if char == "."]


def _moved(name: str, sign: str, prefix: str, known: set[str]) -> str:
    if name in known:
        return name
    new = name.removeprefix(prefix) if sign == "-" else prefix + name
    return new if new in known or sign == "-" else name


def _with_missing_heads(
    first: Weights,
    labelled: Mapping[str, Weights],
    tables: Mapping[str, Table],
    reference: str,
    tied: Groups,
) -> Groups:
    """Add the group of a head that some input leaves out because its own config ties it."""
    if tied:
        return tied
    for key, weights in labelled.items():
        if weights.config.get("tie_word_embeddings") is True:
            for head in tables[reference].keys() - tables[key].keys():
                group = _head_group(head, tables[reference], first)
                if group and group[0] in tables[key]:
                    return (group,)
    return tied


def _head_group(head: str, table: Table, weights: Weights) -> tuple[str, str] | None:
    if not head.endswith(_HEADS):
        return None
    shape = weights[table[head]].shape
    same = [n for n in table if n.endswith(_EMBEDDINGS) and weights[table[n]].shape == shape]
    return (same[0], head) if len(same) == 1 else None


def _untied_groups(
    labelled: Mapping[str, Weights],
    tables: Mapping[str, Table],
    tied: Groups,
    untie: bool,
    notes: list[str],
) -> set[tuple[str, ...]]:
    """The groups that some input stores as different tensors."""
    split: set[tuple[str, ...]] = set()
    for group in tied:
        apart = [key for key, weights in labelled.items() if _differs(weights, tables[key], group)]
        if not apart:
            continue
        if not untie:
            together = [key for key in labelled if key not in apart]
            raise WeightsError(
                "tied here and untied there",
                where=f"{apart[0]} ({labelled[apart[0]].label}): {', '.join(group)}",
                expected=f"one tensor for all names, as in {', '.join(together) or 'the config'}",
                found="different tensors", fix="--untie (in Python: untie=True)",
            )  # fmt: skip
        split.add(group)
        notes.append(f"untied in the output: {', '.join(group)}")
    return split


def _differs(weights: Weights, table: Table, group: tuple[str, ...]) -> bool:
    own = [table[name] for name in group if name in table]
    return any(not same_values(weights, own[0], other) for other in own[1:])


def _outputs(
    table: Table, tied: Groups, split: set[tuple[str, ...]]
) -> tuple[list[str], dict[str, str]]:
    outputs, aliases = list(table), {}
    for group in tied:
        present = [name for name in group if name in table]
        if group in split and present:
            outputs += [name for name in group if name not in table]
        elif len(present) > 1:
            aliases.update(dict.fromkeys(present[1:], present[0]))
    return [name for name in outputs if name not in aliases], aliases


def _account(
    key: str,
    weights: Weights,
    table: Table,
    outputs: list[str],
    tied: Groups,
    reference: Table,
    first: Weights,
    optional: tuple[str, ...],
    notes: list[str],
) -> Aligned:
    done, missing, extra = Aligned(), [], []
    stand_in = _stand_ins(table, tied)
    for name in outputs:
        if name in table:
            done.names[name] = table[name]
        elif name in stand_in:
            done.names[name] = stand_in[name]
            notes.append(f"{key}: {name} is absent; tied, so it is {stand_in[name]}")
        elif reason := _may_be_absent(name, first, reference, optional):
            done.absent[name] = reason
        else:
            missing.append(name)
    used = set(done.names.values())
    for name, given in table.items():
        if given in used:
            continue
        reason = _may_be_extra(name, weights[given], stand_in, used, optional)
        if reason:
            done.skipped[given] = reason
        else:
            extra.append(given)
    _refuse(key, weights, missing, extra)
    for what in sorted({*done.skipped.values(), *done.absent.values()}):
        notes.append(f"{key}: {_count(done, what)} tensors: {what}")
    return done


def _stand_ins(table: Table, tied: Groups) -> Table:
    """For every name of a tied group, the input's own name of the first one that it stores."""
    found: Table = {}
    for group in tied:
        present = [name for name in group if name in table]
        if present:
            found.update(dict.fromkeys(group, table[present[0]]))
    return found


def _may_be_absent(
    name: str, first: Weights, reference: Table, optional: tuple[str, ...]
) -> str | None:
    given = reference.get(name)
    if given is not None:
        info = first[given]
        kind = recomputed(TensorInfo(name, info.dtype, info.shape))
        if kind:
            return f"recomputed by the model ({kind})"
    if given is not None and any(fnmatchcase(name, pattern) for pattern in optional):
        return "optional, taken from the reference"
    return None


def _may_be_extra(
    name: str, info: TensorInfo, stand_in: Table, used: set[str], optional: tuple[str, ...]
) -> str | None:
    if stand_in.get(name) in used:
        return "a second copy of a tied tensor"
    kind = recomputed(TensorInfo(name, info.dtype, info.shape))
    if kind:
        return f"recomputed by the model ({kind})"
    if any(fnmatchcase(name, pattern) for pattern in optional):
        return "optional, left out"
    return None


def _count(done: Aligned, what: str) -> int:
    return [*done.skipped.values(), *done.absent.values()].count(what)


def _refuse_routed(labelled: Mapping[str, Weights]) -> None:
    for key, weights in labelled.items():
        if weights.root is not None and is_routed(Path(weights.root)):
            raise WeightsError(
                "a routed model is no set of weights: layers of its own say what they do",
                where=f"{key} ({weights.label})", expected="the tensors of a plain model",
                found=Path(weights.root) / DESCRIPTION,
                fix="take the models that it was made of: fusewright.json names them",
            )  # fmt: skip


def _refuse(key: str, weights: Weights, missing: list[str], extra: list[str]) -> None:
    if missing or extra:
        raise WeightsError(
            "the inputs do not hold the same tensors",
            where=f"{key} ({weights.label})",
            expected="the reference's tensors, or buffers and tied heads by rule",
            found="; ".join(
                f"{len(names)} {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
                for what, names in (("missing", missing), ("extra", extra))
                if names
            ),
            fix="check that these are fine-tunes of one model; name the tensors that may differ "
            f"as optional, e.g. optional: ['{(missing or extra)[0]}']",
        )
