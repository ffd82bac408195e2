"""Corrections of features: the formula, where they act, and for which task."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusewright.errors import PlanError
from fusewright.modules.surgery import Surgery, seen_by

WIDTH, RANK = 6, 2


def surgery(head: str = "") -> Surgery:
    made = Surgery(("a", "b"), WIDTH, RANK, head)
    with torch.no_grad():
        made.up.copy_(torch.randn(made.up.shape, generator=torch.Generator().manual_seed(1)))
    return made


def corrected(made: Surgery, z: torch.Tensor, task: int) -> torch.Tensor:
    """z - U ReLU(D z) for every row by itself."""
    down, up = made.down[task].detach(), made.up[task].detach()
    return torch.stack([row - up @ (down @ row).clamp(min=0) for row in z])


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(pixel_values))


class Output(dict):
    __getattr__ = dict.__getitem__


class Headless(nn.Module):
    def forward(self, pixel_values: torch.Tensor) -> Output:
        return Output(last_hidden_state=pixel_values, pooler_output=pixel_values[:, 1])


Z = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))


def test_it_is_the_formula_for_each_task_and_begins_as_no_change() -> None:
    made = surgery()
    for task in (0, 1):
        torch.testing.assert_close(made(Z, task), corrected(made, Z, task))
    assert made(Z.bfloat16(), 0).dtype == torch.bfloat16
    assert Surgery(("a",), WIDTH, RANK, "")(Z, 0).equal(Z)
    assert made.active == made.down[0].numel() + made.up[0].numel()


def test_it_is_drawn_by_the_seed_with_variance_one_over_the_width() -> None:
    one, two, three = (Surgery(("a",), 400, 50, "", seed=seed).down for seed in (0, 0, 1))
    assert one.equal(two) and not one.equal(three)
    assert float(one.detach().var()) == pytest.approx(1 / 400, rel=0.05)


def test_the_input_of_the_head_is_corrected_once() -> None:
    model, made = Headed(), surgery("head")
    made.listen(model)
    made.listen(model)
    with pytest.raises(PlanError, match="told the task"):
        model(Z)
    for task, name in enumerate("ab"):
        model.set_task(name)  # type: ignore[operator]
        expected = corrected(made, model.body(Z), task)
        torch.testing.assert_close(model(Z), model.head.forward(expected))


def test_without_a_head_every_feature_of_the_answer_is_corrected() -> None:
    model, made = nn.Sequential(Headless()), surgery()
    made.listen(model)
    made.set_task("b")
    hidden = Z.expand(2, 5, WIDTH) + torch.tensor([0.0, 1.0])[:, None, None]
    found = model(hidden)
    expected = torch.stack([corrected(made, rows, 1) for rows in hidden])
    torch.testing.assert_close(found.last_hidden_state, expected)
    torch.testing.assert_close(found.pooler_output, expected[:, 1])


def test_maps_are_corrected_at_every_place() -> None:
    model, made = nn.Sequential(nn.Identity()), surgery()
    made.listen(model)
    made.set_task("a")
    maps = torch.randn(2, WIDTH, 3, 4, generator=torch.Generator().manual_seed(2))
    found = model(maps).permute(0, 2, 3, 1).reshape(-1, WIDTH)
    torch.testing.assert_close(found, corrected(made, maps.permute(0, 2, 3, 1).flatten(0, 2), 0))


def test_what_the_head_sees_is_collected_only_inside() -> None:
    model = Headed()
    with seen_by(model, "head") as found:
        model(Z)
        model(Z.expand(2, 5, WIDTH))
    model(Z)
    assert [tuple(rows.shape) for rows in found] == [(5, WIDTH), (10, WIDTH)]
    torch.testing.assert_close(found[0], model.body(Z))


class Hidden(Output):
    """An answer without a pooled output."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__(last_hidden_state=hidden, pooler_output=None)


TOKENS = Z.expand(2, 5, WIDTH)


@pytest.mark.parametrize(("answer", "expected"), [
    (TOKENS, TOKENS[:, 0]),
    (Z, Z),
    (Z.T[None, :, :, None], Z.mean(dim=0)[None]),
    (Output(last_hidden_state=TOKENS, pooler_output=Z[3:]), Z[3:]),
    (Hidden(TOKENS), TOKENS[:, 0]),
], ids=["tokens", "rows", "maps", "pooled", "hidden"])  # fmt: skip
def test_without_a_head_it_is_what_one_over_pooled_features_would_see(answer, expected) -> None:
    class Answers(nn.Module):
        def forward(self, pixel_values: torch.Tensor):
            return answer

    model = nn.Sequential(Answers())
    with seen_by(model, "") as found:
        model(Z)
    torch.testing.assert_close(found[0], expected)


def test_answers_without_features_are_refused() -> None:
    class Answers(nn.Module):
        def forward(self, pixel_values: torch.Tensor):
            return (pixel_values,)

    model, made = nn.Sequential(Answers()), surgery()
    made.listen(model)
    made.set_task("a")
    with pytest.raises(PlanError, match="no features to correct"):
        model(Z)
