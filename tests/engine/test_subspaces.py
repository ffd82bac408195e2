"""Shares of task vectors' energy are those of a direct computation in all singular directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llamas import llama, lora, saved, tuned

from fusewright.engine.inspect import inspect_models
from fusewright.engine.subspaces import ZONES, Basis, Subspaces
from fusewright.errors import PlanError, WeightsError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direct(matrix: torch.Tensor, delta: torch.Tensor) -> dict[str, float]:
    """By both full bases, element by element."""
    u, values, vt = torch.linalg.svd(matrix, full_matrices=True)
    rank = int(torch.linalg.matrix_rank(matrix, rtol=1e-5))
    half = next(k for k in range(1, rank + 1) if values[:k].sum() >= 0.5 * values.sum() - 1e-12)
    squares = (u.T @ delta @ vt.T).square()
    found = dict.fromkeys(ZONES, 0.0)
    for i, row in enumerate(squares.tolist()):
        for j, value in enumerate(row):
            if i < half and j < half:
                zone = "leading"
            elif i < half or j < half:
                zone = "across"
            else:
                zone = "lesser" if i < rank and j < rank else "null"
            found[zone] += value
    return found


def measured(*models: Any, **options: Any) -> Subspaces:
    found = inspect_models(models, subspace=True, **options).subspaces
    assert found is not None
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 9))
def test_energies_are_those_of_every_pair_of_directions(
    rows: int, columns: int, rank: int, seed: int
) -> None:
    base = random(rows, rank, seed=seed) @ random(rank, columns, seed=seed + 1)
    delta = random(rows, columns, seed=seed + 2)
    found = Basis.of(base).energies(delta)
    assert found.tolist() == pytest.approx([*direct(base, delta).values()], abs=1e-9)
    assert found.sum() == pytest.approx(float(delta.square().sum()))


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
def test_chance_is_the_mean_over_random_matrices(shape: tuple[int, int]) -> None:
    basis = Basis.of(random(*shape))
    mean = sum(basis.energies(random(*shape, seed=s)) for s in range(400)) / 400 / (
        shape[0] * shape[1])  # fmt: skip
    assert basis.chance().sum() == pytest.approx(1.0)
    assert mean.tolist() == pytest.approx(basis.chance().tolist(), abs=0.03)


@pytest.mark.parametrize(
    ("row", "column", "zone"),
    [(0, 0, "leading"), (2, 3, "lesser"), (0, 3, "across"), (4, 5, "null"), (2, 5, "null"),
     (5, 0, "across")],
)  # fmt: skip
def test_a_change_in_one_direction_is_in_one_zone(row: int, column: int, zone: str) -> None:
    base = torch.diag(torch.tensor([4.0, 1.0, 1.0, 1.0, 0.0, 0.0]))
    delta = torch.zeros(6, 6)
    delta[row, column] = 0.5
    found = measured({"mlp.weight": base}, {"mlp.weight": base + delta})
    (one,) = found.matrices
    assert (one.half, one.rank) == (1, 4)
    shares = one.shares.of(0)
    assert shares is not None and shares[zone] == pytest.approx(1.0)
    assert shares["leading, random"] == pytest.approx(1 / 36)
    assert shares["null, random"] == pytest.approx((25 - 9) / 36)


def test_kinds_and_layers_weigh_matrices_by_energy(tmp_path: Path) -> None:
    base = llama()
    one, two = tuned(base, 1), tuned(base, 2)
    found = measured(saved(base, tmp_path / "base"), saved(one, tmp_path / "one"),
                     saved(two, tmp_path / "two"))  # fmt: skip
    assert set(found.roles()) == {"attention", "mlp", "head"}
    assert list(found.layers()) == ["model.layers.0", "model.layers.1", "head"]
    sums = dict.fromkeys(ZONES, 0.0)
    for name, weight in base.named_parameters():
        if ".mlp." in name:
            start = weight.detach().double()
            delta = one.get_parameter(name).detach().double() - start
            sums = {zone: sums[zone] + part for zone, part in direct(start, delta).items()}
    shares = found.roles()["mlp"].of(0)
    assert shares is not None
    whole = sum(sums.values())
    assert [shares[zone] for zone in ZONES] == pytest.approx([s / whole for s in sums.values()])
    assert sum(shares[f"{zone}, random"] for zone in ZONES) == pytest.approx(1.0)


def test_packed_matrices_are_decomposed_apart() -> None:
    parts = [random(8, 8, seed=s) * 10**s for s in range(3)]
    name = "h.0.attn.in_proj_weight"
    base = {name: torch.cat(parts), "h.0.attn.in_proj_bias": torch.zeros(24)}
    delta = random(24, 8, seed=5)
    found = measured(base, base | {name: base[name] + delta})
    assert [one.shape for one in found.matrices] == [(8, 8)] * 3
    for at, (one, part) in enumerate(zip(found.matrices, parts, strict=True)):
        said = one.shares.of(0)
        known = direct(part, delta[8 * at : 8 * at + 8])
        assert said is not None
        assert said["leading"] == pytest.approx(known["leading"] / sum(known.values()))


def test_an_adapter_is_its_factors(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    found = measured(base, lora(base, tmp_path / "adapter"))
    moved = {one.tensor for one in found.matrices if one.shares.of(0) is not None}
    assert moved == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def test_too_little_memory_is_refused_with_what_is_needed() -> None:
    model = {"layers.0.mlp.weight": torch.ones(2000, 500)}
    with pytest.raises(PlanError, match=r"fix:\s+--memory 46MiB"):
        measured(model, model, memory="20MiB")


def test_a_single_model_and_numbers_that_are_none_are_refused() -> None:
    model = {"layers.0.mlp.weight": torch.eye(4)}
    with pytest.raises(PlanError, match="--subspace"):
        measured(model)
    with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.weight"):
        measured(model, {"layers.0.mlp.weight": torch.eye(4).log()})


def test_tables_json_and_picture_have_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base = llama()
    found = inspect_models([base, tuned(base, 1), base], subspace=True)
    json.dumps(found.to_json(), allow_nan=False)
    titles = [table.title for table in found.tables()]
    assert sum("singular directions" in title for title in titles) == 2
    for table in found.tables():
        assert all(len(row) == len(table.columns) for row in table.rows)
    found.save_png(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    bare = inspect_models([{"a": torch.ones(3)}, {"a": torch.zeros(3)}], subspace=True)
    bare.save_png(tmp_path / "y.png")
    assert bare.to_json()["subspaces"]["matrices"] == [] and bare.tables()
