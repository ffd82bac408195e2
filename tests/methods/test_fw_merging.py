"""FW-Merging on small modules: each step by hand, the hull, what it writes and refuses."""

from __future__ import annotations

import pytest
import torch
from learned_toys import Killed, data, experts, network, stop_at
from torch.func import functional_call

import fusewright as fw
from fusewright.errors import NumericError
from fusewright.methods.learned import FWMerging
from fusewright.methods.learned.objectives import cross_entropy, entropy, self_label
from fusewright.tasks.errors import DataError

HALF = torch.float64
QUICK = {"objective": "self_label", "steps": 4, "rows": 32, "batch": 16, "size": 0.4}


def merged(**params):
    base = network(HALF)
    options = {k: params.pop(k) for k in ("out", "progress") if k in params}
    method = FWMerging(**{**QUICK, **params})
    return fw.merge(method, base=base, experts=experts(base), data=data(HALF), **options)


def same(one, two) -> bool:
    other = two.state_dict()
    return all(tensor.equal(other[name]) for name, tensor in one.state_dict().items())


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def slope(theta, tasks: str, first: int) -> dict[str, torch.Tensor]:
    """∂/∂θ of the mean loss over two batches, summed over tasks."""
    leaves = {n: t.clone().requires_grad_() for n, t in theta.items()}
    models = experts(network(HALF))
    total = sum(self_label(functional_call(network(HALF), leaves, (data(HALF)[t][i % 4],)),
                           models[t](data(HALF)[t][i % 4])) / 2
                for t in tasks for i in (first, first + 1))  # fmt: skip
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one * two).sum() / (one.norm() * two.norm()))


def scores(g, theta, measure: str) -> dict[str, float]:
    """How far a model lies up the gradient, tensor by tensor."""
    if measure == "cosine":
        return {n: cosine(g[n], theta[n]) for n in g}
    return {n: float((g[n] * theta[n]).sum()) for n in g}


@pytest.mark.parametrize("measure", ["inner", "cosine"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_each_hard_step_goes_to_the_lowest_vertex(granularity: str, measure: str) -> None:
    start = parameters(network(HALF))
    models = [parameters(model) for model in experts(network(HALF)).values()]
    first = {n: t + 0.3 * sum(m[n] - t for m in models) for n, t in start.items()}
    vertices, theta = [*models, first], dict(first)
    for k in range(4):
        g = slope(theta, "ab", 2 * k)
        found = [scores(g, vertex, measure) for vertex in vertices]
        for n in theta:
            judged = [of[n] if granularity == "layer" else sum(of.values()) for of in found]
            best = vertices[judged.index(min(judged))]
            theta[n] = theta[n] + 0.4 * 2 / (k + 2) * (best[n] - theta[n])
    made = merged(granularity=granularity, measure=measure)
    for name, tensor in made.state_dict().items():
        torch.testing.assert_close(tensor, theta[name], rtol=1e-5, atol=1e-6)
    chosen = made.report["fitted"]["chosen"]
    assert len(chosen) == 4
    assert all(sum(row.values()) == (1 if granularity == "task" else 4) for row in chosen)


def test_the_answer_is_a_sum_of_task_vectors_in_the_hull() -> None:
    weights = merged(granularity="layer").report["fitted"]["method"]["sum"]["weight"]
    values = {e: [r["value"] for r in rules[:-1]] for e, rules in weights.items()}
    for pair in zip(values["a"], values["b"], strict=True):
        assert min(pair) >= 0 and 0.6 - 1e-6 <= sum(pair) <= 1 + 1e-6
    assert len(set(values["a"])) > 1


def test_a_full_first_step_is_an_expert() -> None:
    found = merged(size=1.0, steps=1)
    chosen = found.report["fitted"]["chosen"][0]
    name = next(name for name, count in chosen.items() if count)
    base = network(HALF)
    vertex = experts(base).get(name)
    assert vertex is not None, "the start is left where an expert is better"
    for key, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, vertex.state_dict()[key], rtol=1e-5, atol=1e-6)


def test_no_step_is_task_arithmetic() -> None:
    base = network(HALF)
    plain = fw.merge(fw.TaskArithmetic(scale=0.3), base=base, experts=experts(base)).state_dict()
    for name, tensor in merged(steps=0).state_dict().items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-7)


def test_soft_steps_pick_an_expert_by_each_tasks_gradient_and_learn_how_far() -> None:
    """Two steps of two steps of Adam, by hand."""
    start = parameters(network(HALF))
    models = {n: parameters(model) for n, model in experts(network(HALF)).items()}
    theta, batch = dict(start), 0
    for k in range(2):
        picked: list[str] = []
        for task in "ab":
            g = slope(theta, task, batch)
            batch += 2
            left = {n: sum(scores(g, m, "inner").values()) for n, m in models.items()
                    if n not in picked}  # fmt: skip
            picked.append(min(left, key=lambda n: left[n]))
        moves = {n: torch.full((2,), 0.0 if k else 0.3).requires_grad_() for n in theta}
        adam = torch.optim.Adam(moves.values(), lr=0.05)

        def moved(theta=theta, moves=moves, picked=picked):
            return {n: t + sum(w * (models[s][n] - t) for w, s in
                               zip(moves[n].double(), picked, strict=True))
                    for n, t in theta.items()}  # fmt: skip

        for _ in range(2):
            x = {t: data(HALF)[t][batch % 4] for t in "ab"}
            loss = sum(self_label(functional_call(network(HALF), moved(), (x[t],)),
                                  experts(network(HALF))[t](x[t])) for t in "ab")  # fmt: skip
            adam.zero_grad()
            loss.backward()
            adam.step()
            batch += 1
        theta = {n: t.detach() for n, t in moved().items()}
    found = merged(form="soft", steps=2, weight_steps=2, weight_rate=0.05)
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, theta[name], rtol=1e-4, atol=1e-5)
    assert found.report["fitted"]["chosen"] == [{"a": 4, "b": 4}] * 2


@pytest.mark.parametrize("form", [{}, {"form": "soft", "weight_steps": 4}], ids=["hard", "soft"])
def test_it_is_repeatable_and_goes_on_where_it_was_killed(form, tmp_path) -> None:
    whole = merged(**form)
    assert same(merged(**form), whole)
    with pytest.raises(Killed):
        merged(**form, out=tmp_path / "out", progress=stop_at(3))
    seen = []
    again = merged(**form, out=tmp_path / "out", progress=seen.append)
    assert same(again, whole)
    steps = [now.done for now in seen if now.unit == "steps"]
    assert form or steps[0] == 3
    assert again.report["fitted"]["chosen"] == whole.report["fitted"]["chosen"]


def test_a_tensor_that_no_loss_depends_on_is_left_alone() -> None:
    base = network()
    base.add_module("spare", torch.nn.Linear(2, 2))
    base.forward = lambda x: base[2](base[1](base[0](x)))
    found = fw.merge(FWMerging(**QUICK, granularity="layer"), base=base, experts=experts(base),
                     data=data())  # fmt: skip
    weights = found.report["fitted"]["method"]["sum"]["weight"]["a"]
    spare = {rule["filter"]: rule["value"] for rule in weights[:-1] if "spare" in rule["filter"]}
    assert spare and list(spare.values()) == pytest.approx([0.3] * len(spare))


def test_labels_are_asked_for_and_used() -> None:
    base = network()
    given = {"base": base, "experts": experts(base)}
    with pytest.raises(DataError, match="needs labels"):
        fw.merge(FWMerging(steps=1), data=data(), **given)
    labels = torch.arange(16) % 4
    rows = {n: [(x, labels) for x in batches] for n, batches in data().items()}
    loaded = {n: [{"input": x, "labels": y} for x, y in of] for n, of in rows.items()}
    found = fw.merge(FWMerging(steps=8, size=0.5, granularity="layer", rows=64, batch=16),
                     data=loaded, **given)  # fmt: skip
    plain = fw.merge("task_arithmetic", **given)

    def loss(merge) -> float:
        model = network()
        model.load_state_dict(merge.state_dict())
        with torch.no_grad():
            return sum(float(cross_entropy(model(x), y)) for of in rows.values() for x, y in of)

    assert loss(found) < loss(plain)


@pytest.mark.parametrize("batch", [1, 5, 32])
def test_rows_are_counted_whatever_size_batches_were_given_in(batch: int) -> None:
    assert same(merged(batch=batch), merged(batch=16))  # batches of 16 rows all the same


def test_entropy_may_be_the_objective() -> None:
    def total(made) -> float:
        model = network(HALF)
        model.load_state_dict(made.state_dict())
        with torch.no_grad():
            return sum(float(entropy(model(x))) for of in data(HALF).values() for x in of)

    assert total(merged(objective="entropy", granularity="layer")) < total(merged(steps=0))


class Rooted(torch.nn.Linear):
    """The slope at a bias of 0 is no number; the answer is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias.abs().sqrt())


@pytest.mark.parametrize("form", ["hard", "soft"])
def test_no_expert_lies_down_what_is_no_number(form: str) -> None:
    def asked(layer: type[torch.nn.Linear], given) -> None:
        torch.manual_seed(0)
        base = layer(6, 4)
        torch.nn.init.zeros_(base.bias)
        models = experts(base)
        with torch.no_grad():
            models["b"].bias.copy_(-models["a"].bias)  # so that it is 0 in the merge
        method = FWMerging(**QUICK, form=form, weight_steps=0)
        fw.merge(method, base=base, experts=models, data=given)

    with pytest.raises(NumericError, match=r"gradient[\s\S]*found: +bias"):
        asked(Rooted, data())
    spoilt = {"a": data()["a"], "b": [x * torch.inf for x in data()["b"]]}
    with pytest.raises(NumericError, match=r"loss[\s\S]*found: +\{'b': nan\}"):
        asked(torch.nn.Linear, spoilt)
