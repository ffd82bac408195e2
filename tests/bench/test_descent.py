"""The descent that everything is trained by: finite and clipped for every number of steps."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from fusewright.bench.descent import OneCycle  # noqa: E402


@pytest.mark.parametrize("steps", range(1, 21))
def test_every_number_of_steps_can_be_made(steps):
    weight = torch.nn.Parameter(torch.ones(3))
    descent = OneCycle([{"params": [weight]}], steps, 0.1)
    for _ in range(steps):
        descent.begin()
        weight.square().sum().backward()
        descent.step()
    assert torch.isfinite(weight).all() and (weight < 1).all()


def test_rates_rise_to_each_groups_own_peak_and_fall():
    one, other = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    groups = [{"params": [one]}, {"params": [other], "lr": 0.5}]
    descent, rates = OneCycle(groups, 50, 0.1), []
    for _ in range(50):
        descent.begin()
        (one + other).sum().backward()
        rates.append([group["lr"] for group in descent._optimiser.param_groups])
        descent.step()
    peaks = [max(each) for each in zip(*rates, strict=True)]
    assert peaks == pytest.approx([0.1, 0.5], rel=0.01)
    assert 0 < rates[-1][0] < rates[0][0] < 0.1


def test_only_what_is_named_is_clipped():
    ours, learned = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    descent = OneCycle([{"params": [ours]}, {"params": [learned]}], 5, 0.1, clipped=[ours])
    ours.grad, learned.grad = torch.full((4,), 100.0), torch.full((4,), 100.0)
    descent.step()
    assert ours.grad.norm() == pytest.approx(1, rel=1e-4)
    assert learned.grad.norm() == pytest.approx(200)


def test_the_cycle_moves_the_first_beta_against_the_rate_and_keeps_the_second():
    weight = torch.nn.Parameter(torch.ones(1))
    descent, betas = OneCycle([{"params": [weight]}], 50, 0.1, betas=(0.5, 0.97)), []
    for _ in range(50):
        descent.begin()
        weight.sum().backward()
        betas.append(descent._optimiser.param_groups[0]["betas"])
        descent.step()
    first, second = zip(*betas, strict=True)
    assert first[0] == 0.95 and min(first) == pytest.approx(0.85, abs=0.005)
    assert set(second) == {0.97}
