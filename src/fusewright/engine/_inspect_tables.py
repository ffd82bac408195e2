"""An inspection as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fusewright.engine._pairs import Pairs
from fusewright.engine.inspect import Comparison, Model, TensorRow
from fusewright.engine.subspaces import ZONES, Subspaces
from fusewright.engine.tables import Table


def of_model(model: Model) -> list[Table]:
    """Tensors, totals by role and by dtype, and what was noted when it was opened."""
    rows = tuple(
        (row.name, row.dtype, str(list(row.shape)), row.nbytes, row.role, row.layer)
        for row in model.tensors
    )
    columns = ("name", "dtype", "shape", "bytes", "role", "layer")
    return [
        Table(f"Tensors of {model.name}", columns, rows),
        _totals("role", model, lambda row: row.role),
        _totals("dtype", model, lambda row: row.dtype),
        *_notes([model]),
    ]


def of_comparison(
    models: Sequence[Model], done: Comparison, subspaces: Subspaces | None = None
) -> list[Table]:
    """Models, task vectors, cosines, kinds, subspaces, layers, tensors, differences, notes; empty
    ones left out."""
    rows = tuple((m.name, m.label, *_total(m), ", ".join(sorted(m.totals(_dtype)))) for m in models)
    tables = [
        Table("Models", ("model", "opened from", "tensors", "parameters", "bytes", "dtypes"), rows),
        _vectors(done),
        _cosines(done),
        _kinds(done),
        *([] if subspaces is None else _subspaces(subspaces)),
        _by("Layers", "layer", done, done.layers),
        _by("Tensors", "tensor", done, done.tensors),
        Table(
            "Differences", ("expert", "tensor", "what", f"in {done.base}", "in the expert"),
            tuple((d.expert, d.tensor, d.kind, d.base, d.found) for d in done.differences),
        ),
        *_notes(models),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _dtype(row: TensorRow) -> str:
    return row.dtype


def _total(model: Model) -> tuple[int, int, int]:
    return model.totals(lambda _: "").get("", (0, 0, 0))


def _totals(by: str, model: Model, of: Callable[[TensorRow], str]) -> Table:
    sums = sorted(model.totals(of).items(), key=lambda item: -item[1][2])
    rows = tuple((key, *numbers) for key, numbers in (*sums, ("all", _total(model))))
    return Table(f"Totals by {by}", (by, "tensors", "parameters", "bytes"), rows)


def _notes(models: Iterable[Model]) -> list[Table]:
    rows = tuple((model.name, note) for model in models for note in model.notes)
    return [Table("Notes", ("model", "note"), rows)] if rows else []


def _vectors(done: Comparison) -> Table:
    whole, columns = done.whole, ("expert", "‖τ‖", "‖τ‖/‖θ0‖", "changed", "NaN or inf")
    rows = tuple(
        (key, whole.norm(t), whole.relative(t),
         whole.changed_fraction(t), int(whole.bad[t + 1]))
        for t, key in enumerate(done.experts)
    )  # fmt: skip
    return Table(f"Task vectors, from {done.base}", columns, rows)


def _cosines(done: Comparison) -> Table:
    rows = tuple(
        (key, *(done.whole.cosine(i, j) for j in range(len(done.experts))))
        for i, key in enumerate(done.experts)
    )
    few = len(done.experts) < 2
    return Table("Cosines of task vectors", ("", *done.experts), () if few else rows)


def _kinds(done: Comparison) -> Table:
    rows = tuple((kind, *done.critical(pairs).values()) for kind, pairs in done.kinds.items())
    columns = ("kind", "elements", "‖τ‖", "‖τ‖/√n", "‖τ‖/‖θ0‖")
    return Table("Kinds of modules, means over experts", columns, rows)


def _subspaces(found: Subspaces) -> list[Table]:
    """Shares by kind for each expert, and by layer for all of them; "random" is what the zone's
    size alone would give."""
    title = f"Energy of task vectors in singular directions of {found.base}, %"
    columns = [name for zone in ZONES for name in (zone, "random")]
    kinds = [(kind, expert, *_percents(one.of(t))) for kind, one in found.roles().items()
             for t, expert in enumerate(found.experts)]  # fmt: skip
    if found.matrices:
        kinds += [("all", expert, *_percents(found.whole().of(t)))
                  for t, expert in enumerate(found.experts)]  # fmt: skip
    layers = [(layer, *_percents(one.of())) for layer, one in found.layers().items()]
    return [
        Table(f"{title}, by kind", ("kind", "expert", *columns), tuple(kinds)),
        Table(f"{title}, by layer, all experts", ("layer", *columns), tuple(layers)),
    ]


def _percents(shares: Mapping[str, float] | None) -> Iterator[float | None]:
    for name in (name for zone in ZONES for name in (zone, f"{zone}, random")):
        yield None if shares is None else round(100 * shares[name], 2)


def _by(title: str, what: str, done: Comparison, parts: Mapping[str, Pairs]) -> Table:
    pairs = [(i, j) for j in range(len(done.experts)) for i in range(j)]
    columns = (
        what,
        *(f"‖τ‖/‖θ0‖ {key}" for key in done.experts),
        *(f"cos {done.experts[i]}, {done.experts[j]}" for i, j in pairs),
        *(("sign conflicts",) if pairs else ()),
    )

    def row(name: str, one: Pairs) -> tuple[Any, ...]:
        cosines = [one.cosine(i, j) for i, j in pairs]
        conflicts = [one.conflict_rate] if pairs else []
        return (name, *(one.relative(t) for t in range(len(done.experts))), *cosines, *conflicts)

    return Table(title, columns, tuple(row(name, one) for name, one in parts.items()))
