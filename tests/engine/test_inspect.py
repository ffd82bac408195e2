"""Inspections say of models what a direct computation says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_llamas import Tensors, llama, lora, saved, tuned

from fusewright.engine.inspect import inspect_models
from fusewright.errors import PlanError, WeightsError
from fusewright.weights import TensorInfo, Weights, open_weights
from fusewright.weights.files import COUNT


def random(seed: int, **shapes: tuple[int, ...]) -> Tensors:
    draws = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}


def vectors(base: Tensors, *experts: Tensors) -> list[torch.Tensor]:
    flat = [torch.cat([t[k].double().flatten() for k in base]) for t in (base, *experts)]
    return [x - flat[0] for x in flat[1:]]


def numbers(*models: Any, **options: Any) -> dict[str, Any]:
    done = inspect_models(models, **options).comparison
    assert done is not None
    return done.numbers(done.whole)


def test_one_model_is_listed_with_totals_that_are_its_files(tmp_path: Path) -> None:
    path = saved(llama(), tmp_path / "model")
    stored = load_file(path / "model.safetensors")
    found = inspect_models([path])
    (model,) = found.models
    assert found.comparison is None
    assert {row.name: (row.shape, row.nbytes) for row in model.tensors} == {
        name: (tuple(t.shape), t.nbytes) for name, t in stored.items()
    }
    for totals in (model.totals(lambda row: row.role), model.totals(lambda row: row.dtype)):
        assert sum(nbytes for _, _, nbytes in totals.values()) == sum(
            t.nbytes for t in stored.values()
        )
    rows = {row.name: row for row in model.tensors}
    assert rows["model.layers.1.mlp.up_proj.weight"].role == "mlp"
    assert rows["model.layers.1.mlp.up_proj.weight"].layer == "model.layers.1"
    assert rows["lm_head.weight"].layer == "head"


def test_norms_cosines_and_conflicts_are_those_of_the_whole_vectors(tmp_path: Path) -> None:
    base = llama()
    paths = [saved(base, tmp_path / "base")]
    paths += [saved(tuned(base, s), tmp_path / f"e{s}") for s in (1, 2, 3)]
    zero, *others = [load_file(p / "model.safetensors") for p in paths]
    a, b, c = taus = vectors(zero, *others)
    found = numbers(*paths)
    theta = torch.cat([t.double().flatten() for t in zero.values()])
    for key, tau in zip(("e1", "e2", "e3"), taus, strict=True):
        assert found["norm"][key] == pytest.approx(float(tau.norm()), rel=1e-12)
        assert found["relative_norm"][key] == pytest.approx(float(tau.norm() / theta.norm()))
        assert found["changed"][key] == float((tau != 0).double().mean())
    assert found["cosines"]["e1"]["e3"] == pytest.approx(float(a @ c / (a.norm() * c.norm())))
    assert found["cosines"]["e2"]["e2"] == pytest.approx(1.0)
    signs = torch.stack([a, b, c]).sign()
    shared = (signs != 0).sum(0) >= 2
    conflicts = (signs == 1).any(0) & (signs == -1).any(0)
    assert found["shared"] == int(shared.sum())
    assert found["sign_conflicts"] == int(conflicts.sum()) / int(shared.sum())


def test_layers_hold_what_their_tensors_hold(tmp_path: Path) -> None:
    base = llama()
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 0.1
    done = inspect_models([saved(base, tmp_path / "base"), saved(other, tmp_path / "x")]).comparison
    assert done is not None
    assert list(done.layers) == ["embedding", "model.layers.0", "model.layers.1", "norm", "head"]
    changed = {name: pairs.norm(0) > 0 for name, pairs in done.layers.items()}
    assert changed == {**dict.fromkeys(done.layers, False), "model.layers.1": True}
    assert done.layers["model.layers.1"].norm(0) == pytest.approx(
        0.1 * math.sqrt(48 * 32), rel=1e-5
    )


def test_kinds_of_modules_are_measured_as_on_open_modules() -> None:
    from fusewright.modules.critical import critical
    from fusewright.modules.deltas import Dense
    from fusewright.modules.vectors import TaskVectors

    base = llama()
    experts = {f"e{s}": tuned(base, s) for s in (1, 2)}
    done = inspect_models([base, *experts.values()]).comparison
    assert done is not None
    start = {name: p.detach() for name, p in base.named_parameters()}
    vectors = TaskVectors(tuple(experts), start, lambda expert, name: Dense(
        experts[expert].get_parameter(name).detach() - start[name]))  # fmt: skip
    expected = critical(vectors, base)
    found = {kind: done.critical(pairs) for kind, pairs in done.kinds.items()}
    assert found.keys() == expected.keys()
    for kind, numbers in found.items():
        assert numbers == pytest.approx(expected[kind], rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 1), min_size=7, max_size=7), min_size=2, max_size=4))
def test_conflicts_are_counted_where_two_experts_or_more_move(taus: list[list[int]]) -> None:
    base = {"w": torch.arange(7.0)}
    found = numbers(base, *({"w": base["w"] + torch.tensor(t)} for t in taus))
    columns = [[sign for sign in column if sign] for column in zip(*taus, strict=True)]
    shared = [column for column in columns if len(column) > 1]
    assert found["shared"] == len(shared)
    expected = sum(len(set(column)) > 1 for column in shared) / len(shared) if shared else None
    assert found["sign_conflicts"] == expected


def test_threads_and_memory_do_not_change_a_bit() -> None:
    shapes = {"a": (700, 1000), "b": (131_072,), "c": (), "d": (0, 4), "e": (3, 5)}
    models = [random(seed, **shapes) for seed in range(3)]
    runs = [
        inspect_models(models, threads=threads, memory=memory).to_json()
        for threads, memory in ((1, "1GiB"), (2, "1GiB"), (2, "20MiB"))
    ]
    assert runs[0] == runs[1] == runs[2]


class Watched(Weights):
    """Weights that remember the largest range read."""

    def __init__(self, inner: Weights) -> None:
        self.inner, self.label, self.largest = inner, inner.label, 0

    def __getitem__(self, name: str) -> TensorInfo:
        return self.inner[name]

    def __iter__(self) -> Any:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        self.largest = max(self.largest, stop - start)
        self.inner.read(name, start, stop, out)


@pytest.mark.parametrize(("memory", "largest"), [("1GiB", 262_144), ("20MiB", 65_536)])
def test_reads_are_bounded_whatever_the_tensor(memory: str, largest: int) -> None:
    models = [Watched(open_weights(random(s, w=(1000, 700)))) for s in range(2)]
    inspect_models(models, memory=memory)
    assert [model.largest for model in models] == [largest, largest]


def test_too_little_memory_is_refused_with_what_is_needed() -> None:
    models = [random(seed, w=(4, 4)) for seed in range(2)]
    with pytest.raises(PlanError, match=r"fix:\s+--memory 13MiB"):
        inspect_models(models, memory=1000)
    numbers(*models, memory="13MiB")


def test_differences_are_listed_and_count_as_unchanged() -> None:
    base = random(0, a=(4, 4), b=(6, 2), c=(3,), d=(2, 2))
    same = {k: v + 1 for k, v in base.items()}
    odd = {"a": base["a"] + 1, "b": torch.ones(7, 2), "d": same["d"].bfloat16(), "new": base["c"]}
    found = inspect_models([base, same, odd]).comparison
    assert found is not None
    same_name, odd_name = found.experts
    assert {(d.tensor, d.kind, d.base, d.found) for d in found.differences} == {
        ("b", "shape", "float32 [6, 2]", "float32 [7, 2]"),
        ("c", "missing", "float32 [3]", None),
        ("d", "dtype", "float32 [2, 2]", "bfloat16 [2, 2]"),
        ("new", "extra", None, "float32 [3]"),
    }
    assert {d.expert for d in found.differences} == {odd_name}
    b = found.numbers(found.tensors["b"])
    assert b["norm"] == {same_name: pytest.approx(math.sqrt(12), rel=1e-6), odd_name: 0.0}
    assert b["relative_norm"][odd_name] is None and b["changed"][odd_name] is None
    theta = torch.cat([base["a"].flatten(), base["d"].flatten()]).double()
    tau = torch.cat([odd[k].double().flatten() for k in "ad"]) - theta
    assert found.whole.relative(1) == pytest.approx(float(tau.norm() / theta.norm()))


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    found = inspect_models([base, tuned(base, 1)]).comparison
    assert found is not None
    assert "model.embed_tokens.weight" in found.tensors and "lm_head.weight" not in found.tensors
    on_disk = [saved(base, tmp_path / "a"), saved(tuned(base, 1), tmp_path / "b")]
    assert numbers(*on_disk)["norm"] == {"b": found.whole.norm(0)}


def test_an_adapter_is_its_factors_even_below_the_bases_precision(tmp_path: Path) -> None:
    base = saved(llama().bfloat16(), tmp_path / "base")
    adapter = lora(base, tmp_path / "adapter")
    factors = load_file(adapter / "adapter_model.safetensors")
    scale, squares = 1e-6, 0.0
    for name, tensor in factors.items():
        if "lora_B" in name:
            tensor *= scale
            down = factors[name.replace("lora_B", "lora_A")]
            squares += float((2.0 * tensor.double() @ down.double()).square().sum())
    from safetensors.torch import save_file

    save_file(factors, adapter / "adapter_model.safetensors")
    found = inspect_models([base, adapter]).comparison
    assert found is not None and found.differences == ()
    assert found.whole.norm(0) == pytest.approx(math.sqrt(squares), rel=1e-9)
    moved = {name for name, pairs in found.tensors.items() if pairs.norm(0)}
    assert moved == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def test_what_an_adapter_leaves_alone_is_read_once(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    adapter = lora(base, tmp_path / "adapter")
    before = COUNT.bytes_read
    inspect_models([base, adapter])
    files = (base / "model.safetensors", adapter / "adapter_model.safetensors")
    assert COUNT.bytes_read - before <= sum(file.stat().st_size for file in files) + 10_000


def test_an_adapters_chunks_fit_together() -> None:
    """Ranges that begin and end within rows."""
    from fusewright.engine._pairs import Source, Span, _from_factors
    from fusewright.weights import LowRank

    low = LowRank(torch.randn(5, 2), torch.randn(2, 7), 0.5)
    dense = (0.5 * low.up.double() @ low.down.double()).flatten()
    source = Source("w", "w", ("w",), 35, 8, True)
    for start, stop in ((0, 35), (3, 5), (6, 15), (7, 14), (34, 35)):
        assert torch.allclose(_from_factors(low, Span(source, start, stop)), dense[start:stop])


def test_nan_is_counted_where_it_is_and_left_out_of_the_sums() -> None:
    base = {"w": torch.ones(8)}
    one, two = {"w": torch.full((8,), 3.0)}, {"w": torch.full((8,), 2.0)}
    base["w"][0], one["w"][1], two["w"][2] = math.nan, math.inf, math.nan
    found = numbers(base, one, two)
    keys = list(found["norm"])
    assert list(found["nonfinite"].values()) == [1, 1, 1]
    assert found["norm"] == {
        keys[0]: pytest.approx(2 * math.sqrt(6)), keys[1]: pytest.approx(math.sqrt(6))
    }  # fmt: skip
    assert found["relative_norm"][keys[0]] == pytest.approx(2 * math.sqrt(6 / 7))


def test_integers_are_compared_but_have_no_norm() -> None:
    found = numbers({"i": torch.arange(4)}, {"i": torch.tensor([0, 1, 9, 9])})
    (key,) = found["norm"]
    assert found["norm"][key] == 0.0 and found["changed"][key] == 0.5
    assert found["shared"] == 0


def test_results_are_plain_and_every_row_is_as_long_as_its_heading(tmp_path: Path) -> None:
    base = llama()
    one = saved(base, tmp_path / "a")
    for refs in ([one], [one, saved(tuned(base, 1), tmp_path / "b"), llama(vocab_size=97)]):
        found = inspect_models(refs)
        json.dumps(found.to_json(), allow_nan=False)
        for table in found.tables():
            assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
            assert table.text().startswith(table.title)


def test_pictures_are_written_for_one_and_for_several(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base = llama()
    for number, refs in enumerate(([base], [base, tuned(base, 1)], [base, base, tuned(base, 2)])):
        path = tmp_path / f"{number}.png"
        inspect_models(refs).save_png(path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_names_are_short_and_never_the_same(tmp_path: Path) -> None:
    base = llama()
    paths = [saved(base, tmp_path / p) for p in ("base", "a/model", "b/model")]
    found = inspect_models([*paths, paths[0]])
    names = [model.name for model in found.models]
    assert names == [f"{paths[0]}#1", str(paths[1]), str(paths[2]), f"{paths[0]}#2"]


def test_a_given_base_leaves_all_others_to_be_experts(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    adapter = lora(base, tmp_path / "adapter")
    found = inspect_models([adapter], base=base).comparison
    assert found is not None and (found.base, found.experts) == ("base", ("adapter",))


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    adapter = lora(saved(llama(), tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(WeightsError, match="needs its base"):
        inspect_models([adapter])


def test_progress_ends_with_every_byte() -> None:
    heard: list[Any] = []
    inspect_models([random(s, w=(300, 1000)) for s in range(3)], progress=heard.append)
    assert heard[-1].done == heard[-1].total == 3 * 4 * 300_000
