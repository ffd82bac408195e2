"""What methods that learn do with data of which nothing, or nothing good, can be learned."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from learned_toys import data, experts, network
from routed_toys import base_of, bert, experts_of, gpt2, sides, t5
from torch import nn
from torch.utils.data import DataLoader

import fusewright as fw
from fusewright.errors import FusewrightWarning, MemoryShortage, NumericError, PlanError
from fusewright.methods.learned import AdaMerging
from fusewright.methods.learned._fitting import Fitting
from fusewright.methods.registry import parse_method
from fusewright.methods.routed import RepresentationSurgery, Twin, WEMoE
from fusewright.tasks import DataError
from fusewright.tasks.adaptation import adaptation
from fusewright.tasks.pictures import Pictures
from fusewright.testing._network import network as small_network
from fusewright.testing._network import problem, quick

GIVEN = problem(2)
FIRST, SECOND = GIVEN.batches
GUARDED = ("adamerging", "concrete", "ada_rank", "fw_merging", "pwe_moe", "dam", "anp", "awm",
           "sau", "wemoe", "e_wemoe", "rank_one_moe")  # fmt: skip
LEARN = (*GUARDED, "twin", "surgery")
EACH = pytest.mark.parametrize("name", LEARN)


def merged(name: str, batches: Any, heads: Any = None, out: Any = None, **params: Any):
    method = quick(type(parse_method(name))).model_copy(update=params)
    asked = adaptation(batches, heads, Pictures())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "expert .* does not seem to descend")
        return fw.merge(method, base=GIVEN.base, experts=dict(GIVEN.experts), data=asked,
                        out=out)  # fmt: skip


def first_of(count: int) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {task: [{k: v[:count] for k, v in batches[0].items()}]
            for task, batches in GIVEN.batches.items()}  # fmt: skip


# -- nothing to learn from -----------------------------------------------------------------------


def test_batches_that_can_be_gone_over_once_are_refused_before_anything_runs() -> None:
    once = {"a": iter(data()["a"]), "b": data()["b"]}
    with pytest.raises(DataError, match=r"to learn from[\s\S]*task a[\s\S]*not an iterator"):
        adaptation(once)


@pytest.mark.parametrize("given", [[torch.ones(2, 6)], "folder", DataLoader(torch.ones(2, 6))])
def test_data_and_heads_that_are_not_by_task_are_refused(given: Any) -> None:
    with pytest.raises(DataError, match=r"data are not given by task[\s\S]*suite\.unlabelled"):
        adaptation(given)
    with pytest.raises(DataError, match="heads are not given by task"):
        adaptation(data(), given)
    for batches in (None, "folder"):
        with pytest.raises(DataError, match=r"no batches[\s\S]*task a"):
            adaptation({"a": batches})


@pytest.mark.parametrize("batch", [{"input_ids": torch.ones(2, 3)}, (torch.ones(2, 3),)])
def test_a_matrix_is_no_head_of_batches_without_pictures(batch: Any) -> None:
    asked = adaptation({"a": [batch]}, {"a": torch.ones(3, 4)}).questions["a"]
    with pytest.raises(DataError, match=r"holds no pictures[\s\S]*task a[\s\S]*input_ids|tuple"):
        asked.logits(network(), batch)


def test_heads_beside_data_that_bring_their_own_are_refused() -> None:
    asked = adaptation(data())
    with pytest.raises(DataError, match=r"bring their own heads[\s\S]*found: +a, b"):
        adaptation(asked, dict.fromkeys("ab", torch.ones(3, 4)))


@pytest.mark.parametrize("head", [nn.Linear(4, 3), torch.ones(3, 4).numpy()])
def test_a_head_that_is_no_function_and_no_tensor_is_refused_with_what_to_write(head: Any) -> None:
    with pytest.raises(DataError, match=r"head is not understood[\s\S]*task a[\s\S]*fix: .*'a': "):
        adaptation(data(), {"a": head, "b": None})


@pytest.mark.parametrize("label", [4, -1, 1.5])
def test_a_label_that_is_no_class_of_the_answers_is_refused(label: float) -> None:
    base, labels = network(), torch.tensor([0.0, 3.0, -100.0, label])
    given = {n: [{"input": batches[0][:4], "labels": labels}] for n, batches in data().items()}
    with pytest.raises(DataError, match=rf"no class of the answers[\s\S]*task a[\s\S]*{label}"):
        fw.merge(AdaMerging(steps=1, objective="cross_entropy"), base=base, experts=experts(base),
                 data=given)  # fmt: skip


@EACH
def test_no_batches_are_refused_with_the_tasks_name(name: str) -> None:
    with pytest.raises(DataError, match=rf"nothing to learn from[\s\S]*task {SECOND}"):
        merged(name, {**GIVEN.batches, SECOND: []})


@EACH
def test_a_batch_without_rows_is_refused_with_the_tasks_name(name: str) -> None:
    none = {**first_of(6), FIRST: first_of(6)[FIRST] + first_of(0)[FIRST]}
    with pytest.raises(DataError, match=rf"no rows[\s\S]*task {FIRST}, batch 1[\s\S]*\(0, 3, 4, 4"):
        merged(name, none)


@pytest.mark.parametrize("batch", [torch.ones(0, 6), (torch.ones(0, 6),), [torch.ones(0, 6)]])
def test_tensors_and_arguments_without_rows_are_refused_too(batch: Any) -> None:
    base = network()
    with pytest.raises(DataError, match=r"no rows[\s\S]*task a"):
        fw.merge(AdaMerging(steps=1), base=base, experts=experts(base),
                 data={**data(), "a": [batch]})  # fmt: skip


@EACH
def test_one_input_of_each_task_is_enough_or_refused(name: str) -> None:
    if name == "twin":  # one to learn from, one to be judged by
        with pytest.raises(PlanError, match="two inputs or more"):
            merged(name, first_of(1))
        assert merged(name, first_of(2)).report["fitted"]["recognised"]
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FusewrightWarning)
        state = merged(name, first_of(1)).state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())


# -- heads of some tasks -------------------------------------------------------------------------


def test_heads_of_some_tasks_are_refused_unless_the_others_are_the_models_own() -> None:
    head, base = (lambda model, batch: model(batch)), network()
    how = {"base": base, "experts": experts(base), "data": data()}
    with pytest.raises(DataError, match=r"some tasks[\s\S]*task b[\s\S]*None"):
        fw.merge(AdaMerging(steps=1), **how, heads={"a": head})
    own, none, all_ = (
        fw.merge(AdaMerging(steps=2, guard=0), **how, heads=heads).state_dict()
        for heads in ({"a": head, "b": None}, None, {"a": head, "b": head})
    )
    assert all(t.equal(none[n]) and t.equal(all_[n]) for n, t in own.items())


# -- one class -----------------------------------------------------------------------------------


ALIKE = {task: [{"pixel_values": batches[0]["pixel_values"][:1].expand(6, -1, -1, -1)}]
         for task, batches in GIVEN.batches.items()}  # fmt: skip


@pytest.mark.parametrize("guard", [0, 8])
@pytest.mark.parametrize("name", [n for n in GUARDED if n not in ("fw_merging", "pwe_moe")])
def test_experts_that_name_one_class_are_told_of_with_and_without_a_guard(
    name: str, guard: int
) -> None:
    with pytest.warns(FusewrightWarning, match=f"experts answer all inputs of {FIRST}, {SECOND} "):
        merged(name, ALIKE, guard=guard)


@pytest.mark.parametrize("name", ["fw_merging", "pwe_moe"])
def test_labels_of_one_class_are_told_of(name: str) -> None:
    one = {**GIVEN.batches, SECOND: [{**b, "labels": torch.tensor([2, 2, -100, 2, 2, 2])}
                                     for b in GIVEN.batches[SECOND]]}  # fmt: skip
    with pytest.warns(FusewrightWarning, match=f"labels answer all inputs of {SECOND} with one"):
        merged(name, one, guard=0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        merged(name, GIVEN.batches, guard=0)
    assert not [one for one in found if "the labels answer" in str(one.message)]


# -- padding alone -------------------------------------------------------------------------------


BLANK = {
    "adamerging": AdaMerging(steps=2, guard=6, batch=6), "wemoe": WEMoE(steps=2, guard=6, batch=6),
    "twin": Twin(epochs=1), "surgery": RepresentationSurgery(steps=1),
}  # fmt: skip


@pytest.mark.parametrize("make", [bert, gpt2, t5])
@pytest.mark.parametrize("name", BLANK)
def test_a_row_of_padding_alone_is_refused(name: str, make) -> None:
    base, batches = base_of(make), sides(make, 2)
    batches["b"][1]["attention_mask"][4] = 0
    with pytest.raises(DataError, match=r"padding alone[\s\S]*task b, batch 1: atte[\s\S]*rows 4"):
        fw.merge(BLANK[name], base=base, experts=experts_of(base), data=batches)


def test_a_decoders_row_of_padding_is_refused_too() -> None:
    base, batches = base_of(t5), sides(t5, 1)
    batches["a"][0]["decoder_attention_mask"] = torch.zeros(6, 4, dtype=torch.long)
    with pytest.raises(DataError, match=r"batch 0: decoder_attention_mask[\s\S]*rows 0, 1, 2"):
        fw.merge(BLANK["adamerging"], base=base, experts=experts_of(base), data=batches)


@pytest.mark.parametrize("name", BLANK)
def test_texts_whose_next_token_nobody_asks_for_are_refused(name: str) -> None:
    """A window of one token: everything that is predicted is padding."""
    from fusewright.tasks.language_modelling import LanguageModelling

    task, base = LanguageModelling("a", tokenizer=None), base_of(gpt2)
    batches = sides(gpt2, 1)
    for batch in batches.values():
        batch[0]["attention_mask"][:, 1:] = 0
    with pytest.raises(DataError, match=r"asks for no answer[\s\S]*task a"):
        fw.merge(BLANK[name], base=base, experts=experts_of(base), data=batches,
                 heads={"a": task.answered, "b": task.answered})  # fmt: skip


# -- numbers that are not finite -----------------------------------------------------------------


CONSTANT = [name for name in GUARDED if name not in ("wemoe", "pwe_moe")]
"""Methods whose rate does not depend on how many steps there are."""


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first task's loss is no number from step 4 on."""
    plain = Fitting.descend

    def descend(self, stage, trained, step, *more, **options):
        def poison(number: int):
            losses = step(number)
            return {**losses, FIRST: float("nan")} if number >= 4 else losses

        return plain(self, stage, trained, poison, *more, **options)

    monkeypatch.setattr(Fitting, "descend", descend)


LONG = {"steps": 6, "every": 2, "guard": 8}


@pytest.mark.parametrize("name", GUARDED)
def test_a_loss_that_is_no_number_leaves_what_agreed_best(name: str, poisoned) -> None:
    with pytest.warns(FusewrightWarning, match=rf"no longer finite \(step 4: [\s\S]*{FIRST}"):
        made = merged(name, GIVEN.batches, **LONG)
    found = made.report["fitted"]
    assert found["stopped"] == 4 and [at for at, _ in found["agreement"]] == [0, 2, 4]
    agreed = dict(found["agreement"])
    assert agreed[found["kept"]] == max(agreed.values())
    state = made.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    if name in CONSTANT:  # as if that had been all
        other = merged(name, GIVEN.batches, **{**LONG, "steps": 4})
        assert other.report["fitted"]["stopped"] is None
        assert all(tensor.equal(other.state_dict()[n]) for n, tensor in state.items())


@pytest.mark.parametrize("name", GUARDED)
def test_without_a_guard_it_is_an_error_that_says_what_to_do(name: str, poisoned, tmp_path) -> None:
    with pytest.raises(NumericError, match=r"step 4[\s\S]*fewer steps: 4 went[\s\S]*guard=128"):
        merged(name, GIVEN.batches, **{**LONG, "guard": 0}, out=tmp_path / "out")
    with pytest.raises(NumericError, match=r"step 4[\s\S]*a smaller `every` than 5"):
        merged(name, GIVEN.batches, **{**LONG, "every": 5})
    assert not (tmp_path / "out").exists()


def test_a_fit_that_ended_early_is_written(tmp_path) -> None:
    base, batches = network(), data()
    batches["b"][3] = torch.full((16, 6), float("nan"))
    method = AdaMerging(steps=9, every=1, batch=16, guard=16)
    with pytest.warns(FusewrightWarning, match="of step"):
        made = fw.merge(method, base=base, experts=experts(base), data=batches,
                        out=tmp_path / "out")  # fmt: skip
    assert made.report["fitted"]["stopped"] == 3 and not list(tmp_path.glob(".*.fit"))
    assert all(tensor.isfinite().all() for tensor in made.state_dict().values())


def test_inputs_that_are_no_numbers_from_the_start_are_an_error_with_a_guard_too() -> None:
    base, batches = network(), data()
    batches["b"][0][3] = float("nan")
    with pytest.raises(NumericError, match=r"step 0[\s\S]*'b'[\s\S]*first inputs"):
        fw.merge(AdaMerging(steps=9, guard=16), base=base, experts=experts(base), data=batches)


def test_a_gradient_that_is_no_number_does_not_spoil_what_is_kept() -> None:
    def head(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        said = model(batch)
        return said if seen.append(said) or len(seen) < 9 else Spoilt.apply(said)

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, said: torch.Tensor) -> torch.Tensor:
            return said.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient / 0

    base, seen = network(), []
    how = {"base": base, "experts": experts(base), "data": data(), "heads": {"a": head, "b": None}}
    with pytest.raises(NumericError, match="a gradient is no longer finite"):
        fw.merge(AdaMerging(steps=20, guard=0), **how)
    seen.clear()
    with pytest.warns(FusewrightWarning, match="a gradient is no longer finite"):
        made = fw.merge(AdaMerging(steps=20, every=1, guard=16), **how)
    assert all(tensor.isfinite().all() for tensor in made.state_dict().values())


@pytest.mark.parametrize("name", ["twin", "surgery"])
def test_features_that_are_no_numbers_name_their_task(name: str) -> None:
    odd = {task: [{k: v.clone() for k, v in batches[0].items()}]
           for task, batches in GIVEN.batches.items()}  # fmt: skip
    odd[SECOND][0]["pixel_values"][4] = float("inf")
    with pytest.raises(NumericError, match=rf"{SECOND}[\s\S]*1 of 6, first number 4"):
        merged(name, odd)


# -- memory that runs out ------------------------------------------------------------------------


SHORT = {
    "python": MemoryError(), "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried ..."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate "
                        "memory: you tried to allocate 9 bytes."),
}  # fmt: skip


class Scarce:
    """A head that runs out of memory at the n-th call, of those with a gradient or of all."""

    def __init__(self, at: int, error: Exception, learning: bool = True) -> None:
        self.calls, self.at, self.error, self.learning = 0, at, error, learning

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.calls += torch.is_grad_enabled() or not self.learning
        if self.calls == self.at:
            raise self.error
        return model(batch["pixel_values"])


@pytest.mark.parametrize("name", LEARN)
def test_memory_that_runs_out_before_the_first_step_is_told(name: str) -> None:
    head = Scarce(1, SHORT["cpu"], learning=False)
    with pytest.raises(MemoryShortage, match=rf"{name}, outside[\s\S]*can't all[\s\S]*less of ba"):
        merged(name, GIVEN.batches, dict.fromkeys((FIRST, SECOND), head))


@pytest.mark.parametrize("short", SHORT)
@pytest.mark.parametrize("name", ["adamerging", "wemoe", "pwe_moe"])
def test_memory_that_runs_out_in_mid_fit_is_told_and_gone_on_from(
    name: str, short: str, tmp_path
) -> None:
    head, out = Scarce(9, SHORT[short]), tmp_path / "out"  # two calls a step: in step 4
    heads = dict.fromkeys((FIRST, SECOND), head)
    with pytest.raises(MemoryShortage, match=r"step 4[\s\S]*smaller batch[\s\S]*with out=FOLDER"):
        merged(name, GIVEN.batches, heads, **LONG)
    head.calls = 0
    with pytest.raises(MemoryShortage, match="goes on at step 4"):
        merged(name, GIVEN.batches, heads, out, **LONG)
    assert not out.exists() and list((tmp_path / ".out.fit").glob("*.pt"))
    head.calls, head.at = 0, -1
    made = merged(name, GIVEN.batches, heads, out, **LONG)
    assert head.calls == 2 * 2 and len(made.report["fitted"]["losses"]) == 6


def test_what_is_no_shortage_stays_as_it_is() -> None:
    def broken(model: nn.Module, batch: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        merged("wemoe", GIVEN.batches, dict.fromkeys((FIRST, SECOND), broken))


# -- other models --------------------------------------------------------------------------------


@EACH
def test_an_expert_of_another_width_is_refused_with_its_tensor(name: str) -> None:
    method, other = quick(type(parse_method(name))), {**GIVEN.experts, SECOND: small_network(6)}
    asked = adaptation(GIVEN.batches, pictures=Pictures())
    with pytest.raises(fw.FusewrightError, match=rf"embed[\s\S]*{SECOND}"):
        fw.merge(method, base=GIVEN.base, experts=other, data=asked)
