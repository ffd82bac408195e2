"""What a merge on disk leaves: files, manifest, report; buffers, ties, shards; programs, folds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import METHODS, WIDE, base, expert, models, on_disk, read, same, saved
from toy_methods import Search, Soup, Stream

import fusewright as fw
from fusewright.engine import verify
from fusewright.errors import PlanError

WIDE_ONE = "layers.0.mlp.weight"
SHAPES = {"layers.0.mlp.weight": (6, 8), "layers.1.mlp.weight": (6, 8)}


def test_the_folder_is_whole_and_verified(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    (given["base"] / "tokenizer.json").write_text("{}")
    (given["base"] / "modeling_toy.py").write_text("raise SystemExit")
    merged = fw.merge("ties", **given, out=tmp_path / "out")
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found >= {"model.safetensors", "config.json", "tokenizer.json", "fusewright.json"}
    assert "README.md" in found and "modeling_toy.py" not in found
    assert any("modeling_toy.py" in note for note in merged.report["notes"])
    verify(tmp_path / "out")


def test_the_manifest_repeats_the_merge(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    fw.merge(fw.DareTies(density=0.4), **given, out=tmp_path / "out", seed=3)
    manifest = json.loads((tmp_path / "out/fusewright.json").read_text())
    written = manifest["recipe"]
    assert written["seed"] == 3
    from fusewright.engine import load_recipe, run

    run(load_recipe(written), tmp_path / "again")
    assert same(read(tmp_path / "out"), read(tmp_path / "again"))
    again = json.loads((tmp_path / "again/fusewright.json").read_text())
    assert {k: v["content"] for k, v in manifest["inputs"].items()} == {
        k: v["content"] for k, v in again["inputs"].items()
    }


def test_the_report_counts_what_moved(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    size = sum(t.numel() * 2 for t in read(given["base"]).values())
    report = fw.merge("task_arithmetic", **given, out=tmp_path / "out").report
    assert (report["bytes_read"], report["bytes_written"]) == (3 * size, size)
    assert report["resumed_tasks"] == 0 and report["tasks"] >= 7


def test_the_plans_costs_are_what_the_run_moves(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    for method in METHODS.values():
        merged = fw.merge(method, **given)
        costs = merged.plan["costs"]
        assert merged.report["bytes_written"] == costs["bytes_written"], method
        assert merged.report["tasks"] == costs["tasks"], method
        assert merged.report["bytes_read"] == costs["bytes_read"], method


def test_a_tensor_with_rounds_is_read_once_if_it_fits(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    origin = read(given["base"])
    size = sum(t.numel() * t.element_size() for t in origin.values())
    models = 1 + len(given["experts"])
    for kernels in (True, False):
        merged = fw.merge(fw.Ties.profile("mergekit", density=0.2), **given, kernels=kernels)
        sample = 65_536 * 2 + sum(2 * t.numel() for n, t in origin.items() if n != WIDE_ONE)
        assert merged.report["bytes_read"] == models * (size + sample)


@pytest.mark.parametrize("size", [1, 4000, 200_000])
def test_shards_of_any_size_hold_the_same(tmp_path: Path, size: int) -> None:
    given = on_disk(tmp_path)
    whole = fw.merge("ties", **given).state_dict()
    fw.merge("ties", **given, out=tmp_path / "out", shard_size=size)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert same(read(tmp_path / "out"), whole)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    verify(tmp_path / "out")


def test_overwriting_replaces_the_folder(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    fw.merge("linear", **given, out=tmp_path / "out")
    fw.merge("ties", **given, out=tmp_path / "out", overwrite=True)
    assert same(read(tmp_path / "out"), fw.merge("ties", **given).state_dict())


def test_integers_and_booleans_come_from_the_base_and_disagreement_is_told() -> None:
    origin = {"w": torch.randn(4, 4), "count": torch.tensor([1, 2]), "mask": torch.tensor([True])}
    a = {**expert(origin, 1), "count": torch.tensor([1, 9])}
    merged = fw.merge("task_arithmetic", base=origin, experts={"a": a, "b": expert(origin, 2)})
    state = merged.state_dict()
    assert state["count"].tolist() == [1, 2] and state["mask"].tolist() == [True]
    assert merged.report["disagreeing_buffers"] == ["count"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_running_statistics_become_the_experts_mean(method: str) -> None:
    def net(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        with torch.no_grad():
            model[1].running_mean.normal_()
            model[1].running_var.uniform_(0.5, 2)
            model[1].num_batches_tracked += seed
        return model

    origin, a, b = net(0), net(1), net(2)
    with pytest.warns(UserWarning, match="descend"):
        merged = fw.merge(method, base=origin, experts={"a": a, "b": b})
    state = merged.state_dict()
    for name in ("1.running_mean", "1.running_var"):
        wanted = (a.state_dict()[name] + b.state_dict()[name]) / 2
        assert torch.allclose(state[name], wanted)
    assert state["1.num_batches_tracked"].item() == 0
    assert any("running statistics" in note for note in merged.report["notes"])
    assert merged.module()(torch.randn(2, 3, 8, 8)).shape == (2, 4, 6, 6)


def test_empty_scalar_and_strided_tensors(tmp_path: Path) -> None:
    origin = {"w": torch.randn(6, 4).T, "s": torch.tensor(2.0), "e": torch.zeros(0, 3)}
    experts = {n: expert(origin, i) for i, n in enumerate("ab")}
    for method in METHODS.values():
        found = fw.merge(method, base=origin, experts=experts).state_dict()
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in origin.items()}
    fw.merge("ties", base=origin, experts=experts, out=tmp_path / "out")
    assert read(tmp_path / "out")["e"].shape == (0, 3)


def test_only_empty_tensors() -> None:
    nothing = {"e": torch.zeros(0, 3)}
    for method in METHODS.values():
        found = fw.merge(method, base=nothing, experts={"a": nothing, "b": nothing})
        assert found.state_dict()["e"].shape == (0, 3)


def score(wanted: dict[str, torch.Tensor]) -> Any:
    def evaluate(state: Any) -> float:
        return -sum(float((state[n].float() - t.float()).square().sum()) for n, t in wanted.items())

    return evaluate


@pytest.mark.parametrize("on_a_disk", [True, False])
def test_a_program_searches_and_the_engine_makes_what_it_chose(
    tmp_path: Path, on_a_disk: bool
) -> None:
    given = on_disk(tmp_path, torch.float32, SHAPES)
    wanted = fw.merge(fw.TaskArithmetic(scale=0.5), **given).state_dict()
    out = tmp_path / "out" if on_a_disk else None
    merged = fw.merge(Search(), **given, evaluate=score(wanted), out=out)
    assert same(merged.state_dict(), wanted)
    assert merged.report["fitted"]["method"] == fw.TaskArithmetic(scale=0.5).spec()
    assert len(merged.report["fitted"]["scores"]) == 3
    assert out is None or same(read(out), wanted)


def test_a_program_may_leave_experts_out() -> None:
    origin, experts = models(torch.float32, SHAPES)
    wanted = fw.merge(fw.TaskArithmetic(scale=1.0), base=origin, experts={"a": experts["a"]})
    merged = fw.merge(Soup(), base=origin, experts=experts, evaluate=score(wanted.state_dict()))
    assert merged.report["fitted"]["experts"] == ["a"]
    assert same(merged.state_dict(), wanted.state_dict())


def test_a_program_without_an_evaluator_says_what_to_pass() -> None:
    origin, experts = models(torch.float32, SHAPES)
    with pytest.raises(PlanError, match="evaluate=") as error:
        fw.merge(Search(), base=origin, experts=experts)
    assert error.value.fix


def test_a_fold_takes_experts_in_their_order(tmp_path: Path) -> None:
    origin, experts = models(torch.float32, SHAPES)
    in_memory = fw.merge(Stream(), base=origin, experts=experts).state_dict()
    for name, tensor in in_memory.items():
        taus = [experts[e][name] - origin[name] for e in ("a", "b")]
        assert torch.allclose(tensor, origin[name] + taus[0] + 0.5 * taus[1], atol=1e-6)
    given = on_disk(tmp_path, torch.float32, SHAPES)
    fw.merge(Stream(), **given, out=tmp_path / "out")
    assert same(read(tmp_path / "out"), in_memory)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("tmp")]


def test_what_was_merged_in_memory_saves_as_it_is(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    merged = fw.merge("ties", **given)
    merged.save(tmp_path / "out")
    assert same(read(tmp_path / "out"), merged.state_dict())
    assert (tmp_path / "out/config.json").is_file()
    verify(tmp_path / "out")


def test_rows_of_any_width_are_written_by_whole_blocks(tmp_path: Path) -> None:
    from fusewright.methods.contract import Unit
    from fusewright.methods.static import Sum

    class ByRow(Sum):
        """A merger that wants whole rows."""

        def unit(self, shape: Any, layout: Any) -> Unit:
            return Unit.ROWS if len(shape) == 2 else Unit.CHUNK

    given = on_disk(tmp_path, torch.float32, {"layers.0.mlp.weight": WIDE, "v": (70_000, 7)})
    fw.merge(ByRow(), **given, out=tmp_path / "out")
    assert same(read(tmp_path / "out"), fw.merge(fw.Sum(), **given).state_dict())


def test_a_base_and_one_expert_interpolate() -> None:
    origin = base(torch.float32, SHAPES)
    one = expert(origin, 1)
    found = fw.merge(fw.Slerp(t=0.0), base=origin, experts={"a": one}).state_dict()
    assert all(torch.allclose(found[n], origin[n]) for n in origin)
    found = fw.merge(fw.Slerp(t=1.0), base=origin, experts={"a": one}).state_dict()
    assert all(torch.allclose(found[n], one[n]) for n in origin)


def test_an_expert_stored_elsewhere_gives_the_same(tmp_path: Path) -> None:
    given = on_disk(tmp_path, torch.float32, SHAPES)
    moved = saved(read(given["experts"]["a"]), tmp_path / "moved")
    one = fw.merge(METHODS["dare_linear"], **given).state_dict()
    given["experts"]["a"] = moved
    assert same(one, fw.merge(METHODS["dare_linear"], **given).state_dict())


@pytest.mark.parametrize("method", [fw.Ties(), Stream()])
def test_the_outputs_parents_are_made(tmp_path: Path, method: Any) -> None:
    given = on_disk(tmp_path, torch.float32, SHAPES)
    fw.merge(method, **given, out=tmp_path / "new/deep/out")
    assert same(read(tmp_path / "new/deep/out"), fw.merge(method, **given).state_dict())


def test_models_of_integers_alone_are_copied() -> None:
    counts = {"count": torch.tensor([1, 2])}
    merged = fw.merge("ties", base=counts, experts={"a": counts})
    assert merged.state_dict()["count"].tolist() == [1, 2]


def test_models_without_tensors_are_refused() -> None:
    with pytest.raises(PlanError, match="no tensors"):
        fw.merge("linear", experts={"a": {}})
