"""How tensors are cut into units changes nothing but the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import METHODS, expert, models, on_disk, read, same
from test_resume import killed

import fusewright as fw
from fusewright.engine import jobs, make_recipe
from fusewright.engine.inputs import open_inputs
from fusewright.engine.options import Options
from fusewright.engine.planner import make_plan
from fusewright.engine.schedule import shares
from fusewright.engine.work import low_rank_range
from fusewright.errors import NumericError
from fusewright.methods.door import CHUNK
from fusewright.weights import LowRank

LONG = {"layers.0.mlp.weight": (1000, 1000), "layers.1.norm.weight": (10,)}


def wide(patch: pytest.MonkeyPatch, chunks: int = 8) -> None:
    patch.setattr(jobs, "WIDEST", chunks * CHUNK)


@pytest.mark.parametrize("method", METHODS)
def test_long_units_write_the_same_bytes(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = on_disk(tmp_path, shapes=LONG)
    narrow = fw.merge(METHODS[method], **given)
    for chunks in (2, 8):
        wide(monkeypatch, chunks)
        found = fw.merge(METHODS[method], **given)
        assert same(narrow.state_dict(), found.state_dict())
        assert found.report["tasks"] <= narrow.report["tasks"]


def test_units_are_long_where_a_kernel_runs_and_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide(monkeypatch)
    given = on_disk(tmp_path, shapes=LONG)

    def tasks(**options: Any) -> int:
        return fw.merge("linear", **given, **options).report["tasks"]

    # Six bytes an element of two experts and the output, four chunks in a million elements.
    assert tasks(threads=1) == 2
    assert tasks(threads=1, kernels=False) == 5
    # 32 MiB / 4 / 6 bytes / 3 threads: one chunk, not two.
    assert tasks(threads=3, memory=2**25 + jobs.COMPILED) == 5
    assert tasks(threads=2, memory=2**25 + jobs.COMPILED) == 3


def test_many_workers_share_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide(monkeypatch)
    given = on_disk(tmp_path, shapes=LONG)
    for threads in (1, 4, 16):
        plan = fw.merge("linear", **given, threads=threads).plan
        assert plan["costs"]["memory"] <= Options().memory


@pytest.mark.parametrize("method", ["linear", "ties per tensor", "slerp"])
@pytest.mark.parametrize("at", [10, 3 * CHUNK + 7])
def test_the_definition_takes_over_inside_a_long_unit(
    method: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide(monkeypatch)
    origin, experts = models(shapes=LONG)
    experts["a"]["layers.0.mlp.weight"].view(-1)[at] = float("inf")
    chunk = at // CHUNK * CHUNK
    stop = min(chunk + CHUNK, 1_000_000)
    if method == "ties per tensor" and at < 65_536:
        stop = 65_536  # a sampled block finds it first
    with pytest.raises(NumericError, match=f"elements {chunk}:{stop}"):
        fw.merge(METHODS[method], base=origin, experts=experts)


def test_what_is_allowed_passes_through_long_units(monkeypatch: pytest.MonkeyPatch) -> None:
    wide(monkeypatch)
    origin, experts = models(shapes=LONG)
    experts["a"]["layers.0.mlp.weight"].view(-1)[3 * CHUNK + 7] = float("inf")
    given = {"base": origin, "experts": experts, "allow_nonfinite": True}
    one = fw.merge("linear", **given).state_dict()
    two = fw.merge("linear", **given, kernels=False).state_dict()
    assert same(one, two) and not torch.isfinite(one["layers.0.mlp.weight"]).all()


@pytest.mark.parametrize("method", ["linear", "ties", "ties per tensor"])
@pytest.mark.parametrize(("first", "then"), [(1, 8), (8, 1)])
def test_a_resume_may_cut_otherwise(
    tmp_path: Path, method: str, first: int, then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = on_disk(tmp_path, shapes=LONG)
    whole = fw.merge(METHODS[method], **given, out=tmp_path / "whole")
    wide(monkeypatch, first)
    killed(1, method, given, tmp_path / "out")
    wide(monkeypatch, then)
    resumed = fw.merge(METHODS[method], **given, out=tmp_path / "out")
    assert resumed.report["resumed_tasks"] == 0
    assert same(read(tmp_path / "whole"), read(tmp_path / "out"))
    assert resumed.report["inputs"] == whole.report["inputs"]
    assert fw.verify(tmp_path / "out").ok


@pytest.mark.parametrize("options", [{}, {"kernels": False}, {"memory": 2**25}])
def test_the_plan_knows_what_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    """Exactly: kept tensors, statistics, buffers and rounds."""
    shapes = {**LONG, "layers.0.huge.weight": (3000, 1000), "bn.running_mean": (9,)}
    given = on_disk(tmp_path, shapes=shapes)
    whole_matrices = {"iso_c"} if "memory" in options else set()
    for name in METHODS.keys() - whole_matrices:
        merged = fw.merge(METHODS[name], **given, **options)
        assert merged.report["bytes_read"] == merged.plan["costs"]["bytes_read"], name


def test_tensors_are_kept_only_where_compiled_kernels_leave_room(tmp_path: Path) -> None:
    """Its inputs take more than half of what the kernel leaves, less than half of the budget."""
    given = on_disk(tmp_path, shapes={"layers.0.mlp.weight": (4000, 1000)})
    memory = 64 * 2**20
    size = 2 * 4_000_000 * (1 + len(given["experts"]))
    assert (memory - jobs.COMPILED) // 2 < size < memory // 2
    merged = fw.merge(fw.Ties(scope="tensor"), **given, memory=memory)
    assert merged.report["bytes_read"] == merged.plan["costs"]["bytes_read"]


def planned(method: Any, given: Any, **options: Any) -> Any:
    recipe = make_recipe(method=method, **given)
    with open_inputs(recipe) as inputs:
        return make_plan(recipe, Options(**options), inputs)


def test_units_and_kept_tensors_have_half_of_the_memory_each(tmp_path: Path) -> None:
    given = on_disk(tmp_path, shapes={"layers.0.mlp.weight": (4000, 1000)})
    by_tensor = fw.Ties(scope="tensor")
    large = planned(by_tensor, given, memory=2**28, threads=2, kernels=False)
    assert all(job.kept for job in large.jobs.values())
    assert shares(large) == (2**27, 2**27)
    assert shares(planned("linear", given, memory=2**28, kernels=False)) == (2**28, 0)
    assert shares(planned("linear", given, memory=2**28)) == (2**28 - jobs.COMPILED, 0)
    # Units of so many threads leave no room for what would be kept.
    many = planned(by_tensor, given, memory=2**28, threads=64, kernels=False)
    assert not any(job.kept for job in many.jobs.values())


@pytest.mark.parametrize(("method", "temporaries"), [("linear", 4), ("iso_c", 14)])
def test_what_a_unit_of_the_definition_takes(
    tmp_path: Path, method: str, temporaries: int
) -> None:
    """Bytes as stored and float32 of two experts and the base, and temporaries of float32."""
    given = on_disk(tmp_path, shapes={"layers.0.mlp.weight": (200, 1000)})
    (job,) = planned(method, given, kernels=False).jobs.values()
    assert job.memory == 200_000 * (3 * (4 + 4) + 4 * temporaries)


def test_the_plan_knows_what_is_read_of_buffers() -> None:
    origin, _ = models()
    origin["steps"] = torch.tensor([3, 4])
    experts = {k: expert(origin, i) for i, k in enumerate("ab")}
    del experts["b"]["layers.1.norm.weight"]
    merged = fw.merge("ties", base=origin, experts=experts, optional=["layers.1.norm.weight"])
    assert merged.report["bytes_read"] == merged.plan["costs"]["bytes_read"]


MISLED = "layers.0.mlp.weight"


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("kernels", [True, False])
def test_sampled_thresholds_are_exact_even_where_the_sample_misleads(
    tmp_path: Path, scope: Any, kernels: bool
) -> None:
    """Blocks 0, 8, … are sampled; here they are a thousand times smaller than the others."""
    given = on_disk(tmp_path, dtype=torch.float32, shapes={MISLED: (1100, 1000)})
    origin, experts = read(given["base"]), {n: read(p) for n, p in given["experts"].items()}
    for tensors in experts.values():
        flat, of = tensors[MISLED].view(-1), origin[MISLED].view(-1)
        for start in range(0, len(flat), 8 * 65_536):
            cut = slice(start, start + 65_536)
            flat[cut] = of[cut] + (flat[cut] - of[cut]) / 1000
    method = fw.Ties(density=0.3, scope=scope, zero_sign="positive")
    merged = fw.merge(method, base=origin, experts=experts, kernels=kernels)
    assert merged.report["bytes_read"] > merged.plan["costs"]["bytes_read"] or scope == "tensor"
    taus = [(t[MISLED] - origin[MISLED]).view(-1) for t in experts.values()]
    kth = [t.abs().sort(descending=True).values[int(0.3 * len(t)) - 1] for t in taus]
    kept = torch.stack([torch.where(t.abs() >= k, t, 0.0) for t, k in zip(taus, kth, strict=True)])
    sign = torch.where(kept.sum(0) < 0, -1.0, 1.0)
    agrees = torch.where(kept.sign() == sign, kept, 0.0)
    mean = agrees.sum(0) / (agrees != 0).sum(0).clamp(min=1)
    expected = origin[MISLED] + mean.view(1100, 1000)
    assert torch.equal(merged.state_dict()[MISLED], expected)


@pytest.mark.parametrize("columns", [3, 1000, 70_000])
def test_a_range_of_low_rank_factors_is_that_of_the_product(columns: int) -> None:
    """And bit by bit the same, whatever else is asked for."""
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(200, 4, generator=draw), torch.randn(4, columns, generator=draw)
    delta, size = LowRank(up, down, 0.5), 200 * columns
    whole = low_rank_range(delta, 0, size, torch.float32)
    torch.testing.assert_close(whole, (up @ down * 0.5).reshape(-1))
    for start, stop in ((0, 1), (7, size // 2), (size // 3, size // 3 + 5), (size - 1, size)):
        assert torch.equal(low_rank_range(delta, start, stop, torch.float32), whole[start:stop])


def test_groups_of_rows_hold_a_block() -> None:
    """A range reads whole groups of rows, of 65,536 numbers or the least above, and no others."""
    rows = torch.full((300, 1), torch.nan)
    rows[66:132] = 1.0  # the second group: 66 rows of 1000 columns
    delta = LowRank(rows, torch.ones(1, 1000), 1.0)
    found = low_rank_range(delta, 66_000, 132_000, torch.float32)
    assert bool((found == 1).all()) and len(found) == 66_000
