"""An inspection as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusewright.engine.inspect import Comparison, Inspection, Model
from fusewright.engine.subspaces import ZONES, Shares
from fusewright.errors import FusewrightError

_FEW = 24   # labels that fit an axis, and cells whose numbers can be read
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's: told apart by colour-blind readers, and in grey."""


def draw(inspection: Inspection, path: Path) -> None:
    """Write the picture. Raises FusewrightError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FusewrightError("a picture needs matplotlib", fix="pip install matplotlib") from error
    done = inspection.comparison
    if done is None:
        figure = Figure(figsize=(7, 4), layout="constrained")
        _sizes(figure.subplots(), inspection.models[0])
    else:
        zones = inspection.subspaces if (
            inspection.subspaces is not None and inspection.subspaces.matrices) else None
        rows = 2 if zones is None else 3
        figure = Figure(figsize=(11, 3.75 * rows), layout="constrained")
        grid = figure.add_gridspec(rows, 2, width_ratios=(1, 1.4))
        _norms(figure.add_subplot(grid[0, :]), done)
        _cosines(figure.add_subplot(grid[1, 0]), done)
        _conflicts(figure.add_subplot(grid[1, 1]), done)
        if zones is not None:
            _zones(figure.add_subplot(grid[2, 0]), zones.roles(), "by kind")
            axes = figure.add_subplot(grid[2, 1])
            _zones(axes, zones.layers(), "by layer")
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=150)


def _sizes(axes: Any, model: Model) -> None:
    totals = sorted(model.totals(lambda row: row.role).items(), key=lambda item: item[1][2])
    axes.barh([role for role, _ in totals], [t[2] / 2**20 for _, t in totals], color=_COLOURS[0])
    axes.set(title=f"{model.name}: bytes by role", xlabel="MiB")
    axes.grid(axis="x", alpha=0.3)


def _norms(axes: Any, done: Comparison) -> None:
    for t, key in enumerate(done.experts):
        values = [pairs.relative(t) for pairs in done.layers.values()]
        numbers = [np.nan if value is None else value for value in values]
        style = ("-", "--", ":")[t // len(_COLOURS) % 3]
        axes.plot(numbers, style, marker="os^Dvp*"[t % len(_COLOURS)], ms=5, alpha=0.8,
                  label=key, color=_COLOURS[t % len(_COLOURS)])  # fmt: skip
    axes.set(title=f"How far each layer went from {done.base}", ylabel="‖τ‖ / ‖θ0‖")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    _name_layers(axes, done)


def _cosines(axes: Any, done: Comparison) -> None:
    keys, n = done.experts, len(done.experts)
    values = [[done.whole.cosine(i, j) for j in range(n)] for i in range(n)]
    table = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    image = axes.imshow(table, vmin=-1, vmax=1, cmap="RdBu")
    axes.set(title="Cosines of task vectors", xticks=range(n), yticks=range(n))
    axes.set_xticklabels(keys, rotation=45, ha="right")
    axes.set_yticklabels(keys)
    if n <= _FEW:
        for (i, j), value in np.ndenumerate(table):
            shown = "-" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}"  # no "-0.00"
            dark = abs(value) > 0.6
            axes.text(j, i, shown, ha="center", va="center", color="white" if dark else "black",
                      fontsize=9 if n <= 8 else 6)  # fmt: skip
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _conflicts(axes: Any, done: Comparison) -> None:
    rates = [pairs.conflict_rate for pairs in done.layers.values()]
    axes.bar(range(len(rates)), [100 * (rate or 0.0) for rate in rates], color=_COLOURS[1])
    axes.set(title="Sign conflicts", ylabel="% of coordinates that several change", ylim=(0, 100))
    axes.grid(axis="y", alpha=0.3)
    _name_layers(axes, done)


def _zones(axes: Any, groups: Mapping[str, Shares], by: str) -> None:
    """Shares of all experts' energy, stacked; a black line where chance would end each zone."""
    shown = {name: said for name, one in groups.items() if (said := one.of()) is not None}
    ends, chance = np.zeros(len(shown)), np.zeros(len(shown))
    for zone, colour in zip(ZONES, _COLOURS, strict=False):
        parts = np.array([100 * said[zone] for said in shown.values()])
        axes.bar(range(len(shown)), parts, bottom=ends, color=colour, label=zone, alpha=0.85)
        ends, chance = ends + parts, chance + [100 * s[f"{zone}, random"] for s in shown.values()]
        if zone != ZONES[-1]:
            axes.hlines(chance, np.arange(len(shown)) - 0.4, np.arange(len(shown)) + 0.4,
                        color="black", linewidth=1.4,
                        label="at random" if zone == ZONES[0] else None)  # fmt: skip
    axes.set(title=f"Energy in the base's singular directions, {by}", ylabel="%", ylim=(0, 100))
    _name(axes, list(shown))


def _name_layers(axes: Any, done: Comparison) -> None:
    _name(axes, list(done.layers))


def _name(axes: Any, names: Sequence[str]) -> None:
    stacks = {name.rpartition(".")[0] for name in names if name[-1].isdigit()}
    short = [name.rpartition(".")[2] if len(stacks) == 1 else name for name in names]
    shown = range(0, len(names), -(-len(names) // _FEW))
    axes.set_xticks(list(shown), [short[i] for i in shown])
    if max(map(len, short), default=0) > 3:
        axes.tick_params(axis="x", rotation=45)
        for label in axes.get_xticklabels():
            label.set_ha("right")
    if len(stacks) == 1:
        axes.set_xlabel(f"block of {stacks.pop()}, and the tensors outside of blocks by role")
