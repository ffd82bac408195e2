"""Plans: made from headers alone, complete, the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import METHODS, on_disk, read, saved

import fusewright as fw
from fusewright.engine import Options, load_recipe, make_recipe
from fusewright.engine.inputs import open_inputs
from fusewright.engine.planner import make_plan
from fusewright.errors import FusewrightError


def planned(given: Any, method: Any = "ties", **options: Any) -> Any:
    return fw.plan(make_recipe(method=method, **given), Options(**options))


def decided(given: Any, method: Any) -> Any:
    """A plan without the rehearsal that says how long it takes."""
    recipe, options = make_recipe(method=method, **given), Options()
    with open_inputs(recipe, options.untie) as inputs:
        return make_plan(recipe, options, inputs)


def test_planning_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.weights.safetensors_file import SafetensorsFile

    given = on_disk(tmp_path)

    def never(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsFile, "read", never)
    for method in METHODS.values():
        assert decided(given, method).costs["bytes_read"] > 0


def test_every_tensor_is_in_the_plan_once_and_its_units_cover_it(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    for method in METHODS.values():
        plan = planned(given, method)
        assert set(plan.jobs) == set(read(given["base"]))
        for job in plan.jobs.values():
            edges = [0, *(stop for _, stop in job.spans)]
            assert edges[-1] == job.info.numel
            assert [start for start, _ in job.spans] == edges[:-1]


def test_a_plan_is_json_and_the_same_every_time(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    one, two = planned(given), planned(given)
    assert json.loads(json.dumps(one.to_json())) == json.loads(json.dumps(two.to_json()))


def test_threads_and_memory_do_not_change_the_digest(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    digests = {
        planned(given, **options).digest
        for options in ({}, {"threads": 3}, {"memory": 2**26}, {"kernels": False})
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"parameters": {"density": 0.3}}, {"dtype": "float32"}, {"method": "linear"},
     {"out_dtype": "float16"}],
)  # fmt: skip
def test_what_changes_the_bytes_changes_the_digest(tmp_path: Path, change: Any) -> None:
    given = {**on_disk(tmp_path), "method": "ties"}
    plain, other = (fw.plan(make_recipe(**{**given, **more})) for more in ({}, change))
    assert plain.digest != other.digest


def test_other_input_files_change_it(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    before = planned(given).digest
    saved(read(given["experts"]["a"]), given["experts"]["a"])
    assert planned(given).digest != before


def test_experts_in_another_order_are_another_plan(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    turned = {**given, "experts": dict(reversed(given["experts"].items()))}
    assert planned(given).digest != planned(turned).digest


def test_the_parameters_table_says_what_values_mean(tmp_path: Path) -> None:
    given = on_disk(tmp_path)
    given["experts"] = {
        "a": {"model": given["experts"]["a"], "weight": {"layers": [0.0, 1.0]}},
        "b": given["experts"]["b"],
    }
    table = planned(given, "task_arithmetic").to_json()["parameters"]
    rows = {row["parameter"]: row["means"] for row in table}
    assert rows["scale"] == "0.3" and "values, by tensor" in rows["weight"]


@pytest.mark.parametrize("name", ["ties", "dare_linear"])
def test_the_kernel_is_in_the_plan(tmp_path: Path, name: str) -> None:
    given = on_disk(tmp_path)
    assert planned(given, name).kernel is not None
    assert planned(given, name, kernels=False).kernel is None
    assert planned(on_disk(tmp_path / "wide", torch.float64), name).kernel is None


def test_refusals_of_headers_come_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusewright.weights.safetensors_file import SafetensorsFile

    given = on_disk(tmp_path)
    broken = read(given["experts"]["b"])
    broken["layers.1.norm.weight"] = torch.zeros(63)
    saved(broken, given["experts"]["b"])
    monkeypatch.setattr(SafetensorsFile, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(FusewrightError):
        fw.merge("ties", **given, out=tmp_path / "out")


def test_a_recipe_file_plans(tmp_path: Path) -> None:
    on_disk(tmp_path)
    (tmp_path / "r.yaml").write_text(
        f"method: [drop: {{density: 0.5}}, elect: {{}}, lines: {{beta: 0.5}}]\n"
        f"base: {tmp_path}/base\nexperts:\n  a: {tmp_path}/a\n"
        f"  b: {{model: {tmp_path}/b, density: 0.9}}\n"
    )
    plan = fw.plan(load_recipe(tmp_path / "r.yaml"))
    assert [s.name for s in plan.method.chain] == ["drop", "elect", "lines"]


def test_another_scale_of_an_adapter_changes_the_digest(tmp_path: Path) -> None:
    from tiny_llamas import llama, lora

    llama().save_pretrained(tmp_path / "base")
    adapter = lora(tmp_path / "base", tmp_path / "a")
    given = {"base": tmp_path / "base", "experts": {"a": adapter}}
    before = planned(given).digest
    assert planned(given).digest == before
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert planned(given).digest != before
