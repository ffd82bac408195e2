"""ProDistill: every step by hand, identities, what a killed fit learns, and what is held."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from learned_toys import Killed, moved, stop_at
from torch import nn
from torch.func import functional_call

import fusewright as fw
from fusewright.errors import NumericError, OutputError, PlanError
from fusewright.methods.learned import ProDistill
from fusewright.methods.learned import _prodistill as inside
from fusewright.modules.calls import counted, inputs_of, outputs_of, without_cache
from fusewright.modules.elementwise import ElementWise
from fusewright.modules.functional import with_weights

WIDE = torch.float64
QUICK: dict[str, Any] = {"steps": 6, "batch": 5, "inputs": 15, "every": 2, "rate": 0.05}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor, *, gain: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + gain * self.down(torch.tanh(self.up(x))), "and something else"


class Model(nn.Module):
    """What enters its blocks are a tensor and a keyword; what leaves them is not a tensor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden, _ = layer(hidden, gain=x.mean(-1, keepdim=True).exp())
        return self.head(hidden)


def model(dtype: torch.dtype = WIDE) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def experts(base: nn.Module) -> dict[str, nn.Module]:
    return {name: moved(base, seed, 0.3) for seed, name in enumerate("ab")}


def data(dtype: torch.dtype = WIDE) -> dict[str, list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return {n: [torch.randn(5, 4, generator=draw).to(dtype) for _ in range(4)] for n in "ab"}


def merged(base: nn.Module | None = None, given: Any = None, **params: Any) -> Any:
    options = {k: params.pop(k) for k in ("out", "progress", "data") if k in params}
    base = base or model()
    how = {"base": base, "experts": given or experts(base), "data": data(), **options}
    return fw.merge(ProDistill(**{**QUICK, **params}), **how)


def by_hand(granularity: str) -> tuple[dict[str, torch.Tensor], list[list[float]]]:
    """The merged tensors, and every block's squared error on all inputs, step by step."""
    base, rows, start = model(), {t: data()[t][:3] for t in "ab"}, 0.3
    own = dict(base.named_parameters())
    models = {t: dict(e.named_parameters()) for t, e in experts(base).items()}
    now = {n: (p + start * sum(m[n] - p for m in models.values())).detach()
           for n, p in own.items()}  # fmt: skip
    errors: list[list[float]] = []
    for at, block in enumerate(base.layers):
        names = [n for n, _ in block.named_parameters()]
        full = {n: f"layers.{at}.{n}" for n in names}
        shape = {"element": lambda x: x.shape, "tensor": lambda x: [1] * x.dim(),
                 "row": lambda x: [len(x), 1] if x.dim() == 2 else x.shape,
                 }[granularity]  # fmt: skip
        lambdas = {t: {n: torch.full(shape(own[full[n]]), start, dtype=WIDE, requires_grad=True)
                       for n in names} for t in "ab"}  # fmt: skip

        def theta(names=names, full=full, lambdas=lambdas) -> dict[str, torch.Tensor]:
            return {n: own[full[n]].detach() + sum(
                lambdas[t][n] * (models[t][full[n]] - own[full[n]]).detach() for t in "ab"
            ) for n in names}  # fmt: skip

        def until(weights, x, at=at):
            hidden = functional_call(base.embed, part(weights, "embed."), (x,))
            gain = x.mean(-1, keepdim=True).exp()
            for number in range(at):
                hidden, _ = functional_call(
                    base.layers[number], part(weights, f"layers.{number}."), (hidden,),
                    {"gain": gain})  # fmt: skip
            return hidden.detach(), gain

        enter = {t: [until(now, x) for x in rows[t]] for t in "ab"}
        wanted = {t: [functional_call(block, part(models[t], f"layers.{at}."), (z,), {"gain": g})[0]
                      .detach() for z, g in (until(models[t], x) for x in rows[t])]
                  for t in "ab"}  # fmt: skip

        def error(number, block=block, theta=theta, enter=enter, wanted=wanted):
            weights = theta()
            return sum((functional_call(block, weights, (enter[t][number][0],),
                                        {"gain": enter[t][number][1]})[0]
                        - wanted[t][number]).square().sum() for t in "ab")  # fmt: skip

        adam = torch.optim.Adam([v for each in lambdas.values() for v in each.values()], lr=0.05)
        errors.append([float(sum(error(n).detach() for n in range(3)))])
        kept, least = theta(), errors[-1][0]
        for step in range(6):
            adam.zero_grad()
            error(step % 3).backward()
            adam.step()
            errors[-1].append(float(sum(error(n).detach() for n in range(3))))
            if step % 2 == 1 and errors[-1][-1] < least:
                kept, least = theta(), errors[-1][-1]
        now |= {full[n]: tensor.detach() for n, tensor in kept.items()}
    return now, errors


def part(weights: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
def test_every_step_is_that_of_plain_autograd_block_after_block(granularity: str) -> None:
    found, (wanted, errors) = merged(granularity=granularity), by_hand(granularity)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)
    for told, block in zip(found.report["fitted"]["blocks"].values(), errors, strict=True):
        sizes = 3 * 5 * 6  # batches, rows, features
        assert sum(told["before"].values()) == pytest.approx(block[0] / sizes, rel=1e-5)
        assert sum(told["after"].values()) == pytest.approx(min(block[::2]) / sizes, rel=1e-5)
        assert min(block[::2]) < 0.95 * block[0], "nothing was learned: the test sees little"


@pytest.mark.parametrize("start", [0.2, [{"filter": "layers.1", "value": 0.5}, 0.2]])
def test_outside_blocks_and_before_the_first_step_it_is_task_arithmetic(start) -> None:
    base = model()
    given = {"base": base, "experts": experts(base)}
    plain = fw.merge(fw.TaskArithmetic(scale=start), **given).state_dict()
    for steps in (0, 6):
        for name, tensor in merged(steps=steps, start=start).state_dict().items():
            same = torch.allclose(tensor, plain[name], rtol=0, atol=1e-7)
            assert same == (steps == 0 or not name.startswith("layers.")), name


@pytest.mark.parametrize(("names", "start"), [("a", 1.0), ("ab", 0.5)])
def test_experts_that_agree_come_back_without_a_loss(names: str, start: float) -> None:
    base = model()
    expert = experts(base)["a"]
    alike = {name: copy.deepcopy(expert) for name in names}
    found = merged(base, alike, start=start, data={n: data()[n] for n in names})
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, expert.state_dict()[name], rtol=1e-9, atol=1e-9)
    for told in found.report["fitted"]["blocks"].values():
        assert max(told["before"].values()) < 1e-25 and max(told["after"].values()) < 1e-25


@pytest.mark.parametrize("rate", [0.05, 5.0])
def test_no_blocks_error_rises_whatever_the_rate(rate: float) -> None:
    for told in merged(rate=rate, steps=12).report["fitted"]["blocks"].values():
        before, after = (sum(told[when].values()) for when in ("before", "after"))
        assert after < before if rate < 1 else after <= before


def test_repeatable_and_resumed_after_a_kill(tmp_path) -> None:
    whole = merged().state_dict()
    again = merged().state_dict()
    assert all(tensor.equal(whole[name]) for name, tensor in again.items())
    for number, killed_at in enumerate((3, 9)):  # in the first block, and in the second
        out = tmp_path / str(number)
        with pytest.raises(Killed):
            merged(out=out, progress=stop_at(killed_at))
        seen: list[Any] = []
        found = merged(out=out, progress=seen.append)
        done = [now.done for now in seen if now.unit == "steps"]
        assert done == list(range((killed_at - 1) // 2 * 2 + 1, 13)), "it began anew"
        assert all(t.equal(whole[n]) for n, t in found.state_dict().items())
        assert found.report["fitted"] == merged().report["fitted"]


def test_what_a_killed_fit_keeps_is_small(tmp_path) -> None:
    with pytest.raises(Killed):
        merged(out=tmp_path / "out", progress=stop_at(9))
    (kept,) = tmp_path.glob(".out.fit")
    assert sorted(path.name.split("-")[0] + path.name.split("-")[1][0] for path in kept.iterdir()
                  ) == ["block0", "fit1"]  # fmt: skip


def test_what_was_cut_is_named_with_what_to_remove(tmp_path) -> None:
    with pytest.raises(Killed):
        merged(out=tmp_path / "out", progress=stop_at(9))
    (kept,) = tmp_path.glob(".out.fit/block-0*")
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(OutputError, match="damaged") as refusal:
        merged(out=tmp_path / "out")
    assert refusal.value.where == kept and f"rm '{kept}'" in (refusal.value.fix or "")


def test_coefficients_of_one_block_are_held_at_a_time(monkeypatch) -> None:
    alive: list[weakref.ref[Any]] = []
    most = []
    real = ElementWise.__init__

    def counting(self: ElementWise, *args: Any) -> None:
        gc.collect()
        most.append(sum(each() is not None for each in alive))
        alive.append(weakref.ref(self))
        real(self, *args)

    monkeypatch.setattr(ElementWise, "__init__", counting)
    found = merged().report["fitted"]
    assert most == [0, 0]
    block = sum(p.numel() for p in Block().parameters())
    assert found["trained"] == 2 * block
    assert found["outside"] == 4
    assert merged(granularity="tensor").report["fitted"]["trained"] == 2 * 4


def test_the_blocks_of_a_model_that_has_no_answer_learn() -> None:
    class Headless(Model):
        def forward(self, x: torch.Tensor) -> Any:
            super().forward(x)
            return "no logits"

    torch.manual_seed(0)
    base = Headless().to(WIDE)
    found, wanted = merged(base).state_dict(), merged().state_dict()
    assert all(tensor.equal(wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize(("size", "looked"), [(1, 9), (4, 12), (5, 10), (8, 16), (40, 20)])
def test_few_inputs_are_taken_in_whole_batches_of_any_size(monkeypatch, size, looked) -> None:
    seen: dict[str, list[int]] = {}
    real = inside._Distillation._lesson

    def lesson(self: Any, unit: Any, task: str) -> Any:
        found = real(self, unit, task)
        seen.setdefault(task, []).append(sum(len(each[0]) for each in found.wanted))
        return found

    monkeypatch.setattr(inside._Distillation, "_lesson", lesson)
    merged(inputs=9, data={n: list(torch.cat(each)[:20].split(size)) for n, each in data().items()})
    assert seen == {"a": [looked, looked], "b": [looked, looked]}


def test_what_is_wrong_is_said() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    plain = Plain().to(WIDE)
    with pytest.raises(PlanError, match=r"has no blocks[\s\S]*Plain[\s\S]*adamerging"):
        merged(plain, {n: copy.deepcopy(plain) for n in "ab"})
    with pytest.raises(PlanError, match=r"data of an expert's task[\s\S]*b"):
        merged(data={"a": data()["a"]})
    with pytest.raises(fw.FusewrightError, match="nothing to learn from"):
        merged(data={"a": data()["a"], "b": []})
    odd = {n: [x.clone() for x in each] for n, each in data().items()}
    odd["b"][0][0, 0] = torch.inf
    with pytest.raises(NumericError, match="finite"):
        merged(data=odd)


def test_a_stage_learns_what_is_its_own_after_the_blocks_inside() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6))
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x, _ = block(self.gain * x, gain=torch.ones(1))
            return x

    class Staged(Model):
        def __init__(self) -> None:
            super().__init__()
            del self.layers
            self.stages = nn.ModuleList([Stage()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stages[0](self.embed(x)))

    torch.manual_seed(0)
    base = Staged().to(WIDE)
    found = merged(base)
    plain = fw.merge(fw.TaskArithmetic(), base=base, experts=experts(base)).state_dict()
    blocks = found.report["fitted"]["blocks"]
    assert {path: told["trained"] for path, told in blocks.items()} == {
        "stages.0.blocks.0": 2 * 123, "stages.0.blocks.1": 2 * 123, "stages.0": 2 * 6}  # fmt: skip
    for name, tensor in found.state_dict().items():
        assert torch.allclose(tensor, plain[name], atol=1e-7) == ("stages" not in name), name


class Mute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def test_a_block_without_features_is_named() -> None:
    mute = Mute()
    mute.layers[0].register_forward_hook(lambda part, args, output: {"text": "none"})
    with pytest.raises(PlanError, match=r"layers\.0[\s\S]*expected"):
        outputs_of(mute, "layers.0", 1, lambda: mute(torch.ones(2, 4)))


def test_inputs_are_kept_as_they_were_and_the_model_runs_no_further() -> None:
    class InPlace(Mute):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.layers[0](x)
                x += 1
                ran.append(1)
            return x

    ran: list[int] = []
    each, counts = InPlace(), {}
    counted(each, ["layers.0"], lambda: each(torch.ones(2, 4)), counts)
    assert counts == {"layers.0": 3} and ran == [1, 1, 1]
    first, second = inputs_of(each, "layers.0", 2, lambda: each(torch.ones(2, 4)))
    assert len(ran) == 4 and first[0][0].equal(torch.ones(2, 4))
    with torch.no_grad():
        once = each.layers[0](torch.ones(2, 4))
    assert second[0][0].equal(once + 1)
    found = outputs_of(each, "layers.0", 2, lambda: each(torch.ones(2, 4)))
    assert len(ran) == 5 and found[0].equal(once), "what came after was written into it"
    assert not each.layers[0]._forward_hooks and not each.layers[0]._forward_pre_hooks


def test_blocks_that_write_to_their_inputs_learn_as_others() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.up(x)

    class Written(Kept):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(self.up(x.clone()))

    class Twice(nn.Module):
        def __init__(self, block: type[nn.Module]) -> None:
            super().__init__()
            self.layers = nn.ModuleList([block(), block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            for layer in (*self.layers, *self.layers):
                x = layer(x)
            return x

    found = []
    for block in (Kept, Written):
        torch.manual_seed(0)
        base = Twice(block).to(WIDE)
        found.append(merged(base).state_dict())
    assert all(tensor.equal(found[1][name]) for name, tensor in found[0].items())


def test_a_module_that_is_called_twice_learns_from_both_calls() -> None:
    class Shared(Mute):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](torch.tanh(self.layers[0](x)))

    torch.manual_seed(0)
    base = Shared().to(WIDE)
    found = merged(base, experts(base), granularity="tensor", steps=0).report["fitted"]["blocks"]
    start = {n: t.detach() for n, t in merged(base, experts(base), steps=0).state_dict().items()}
    expert, x = experts(base)["a"], torch.cat(data()["a"][:3])
    with torch.no_grad():
        wanted = [expert.layers[0](x)]
        wanted.append(expert.layers[0](torch.tanh(wanted[0])))
        with with_weights(base, start):
            said = [base.layers[0](x)]
            said.append(base.layers[0](torch.tanh(said[0])))
        error = (torch.cat(said) - torch.cat(wanted)).square().mean()
    assert found["layers.0"]["before"]["a"] == pytest.approx(float(error))


def test_a_cache_is_not_filled_and_the_config_is_as_it_was() -> None:
    hf = pytest.importorskip("transformers")
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=20)).eval()  # fmt: skip
    asks = lambda: llama(input_ids=torch.ones(1, 4, dtype=torch.long))  # noqa: E731
    assert asks().past_key_values is not None
    with without_cache(llama):
        assert asks().past_key_values is None
    ((_, kwargs),) = inputs_of(llama, "model.layers.0", 1, asks)
    assert kwargs.get("past_key_values") is None and llama.config.use_cache
