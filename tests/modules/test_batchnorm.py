"""BatchNorm statistics estimated anew: exact averages, and nothing else touched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fusewright.errors import FusewrightError, FusewrightWarning
from fusewright.modules import reestimate


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(64, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False),
    )  # fmt: skip


def images(count: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 6, 6, generator=draw) + n for n in range(count)]


def test_statistics_are_the_plain_average_over_batches() -> None:
    net = network()
    found = reestimate(net, images())
    assert (found.modules, found.batches) == (("1", "5"), 3)
    outputs = [net[0](batch).transpose(0, 1).flatten(1) for batch in images()]
    norm = net[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([o.mean(1) for o in outputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([o.var(1) for o in outputs]).mean(0))
    assert norm.num_batches_tracked == 3


def test_old_statistics_leave_no_trace() -> None:
    one, two = network(), network()
    two[1].running_mean.fill_(100)
    two[1].num_batches_tracked.fill_(9)
    two[5].running_var.fill_(1e6)
    reestimate(one, images())
    reestimate(two, images())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_dropout_is_off_and_the_random_state_untouched() -> None:
    net = network().train()
    state = torch.get_rng_state()
    reestimate(net, images())
    assert torch.equal(torch.get_rng_state(), state)


def test_flags_momenta_and_all_other_tensors_stay() -> None:
    net = network().train()
    net[0].eval()
    net[0].weight.requires_grad_(False)
    flags = [part.training for part in net.modules()]
    kept = {k: v.clone() for k, v in net.state_dict().items() if "running" not in k}
    reestimate(net, images())
    assert [part.training for part in net.modules()] == flags
    assert (net[1].momentum, net[5].momentum) == (0.3, 0.1)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in kept.items() if "num_b" not in k)
    assert all(p.grad is None for p in net.parameters())


def test_without_batchnorm_it_says_so_and_reads_nothing() -> None:
    def never() -> Iterator[Tensor]:
        raise AssertionError("read")
        yield

    with pytest.warns(FusewrightWarning, match="no BatchNorm"):
        assert reestimate(nn.Linear(2, 2), never()).modules == ()


def test_no_batches_are_refused_and_the_old_statistics_stay() -> None:
    net = network().train()
    net[1].running_mean.fill_(7)
    with pytest.raises(FusewrightError, match="no batches"):
        reestimate(net, [])
    assert net[1].running_mean.tolist() == [7] * 4
    assert net[1].momentum == 0.3 and net[1].training


def test_an_error_in_the_middle_leaves_the_old_statistics() -> None:
    net = network().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError):
        reestimate(net, [*images(), torch.zeros(8, 2, 6, 6)])
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    assert not any(part.training for part in net.modules())


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x + shift)


@pytest.mark.parametrize("form", ["mapping", "tuple", "forward"])
def test_batches_are_keywords_arguments_or_the_callers(form: str) -> None:
    net, x, shift = Named(), torch.randn(6, 2), torch.full((2,), 5.0)
    if form == "mapping":
        reestimate(net, [{"x": x, "shift": shift}])
    elif form == "tuple":
        reestimate(net, [(x, shift)])
    else:
        reestimate(net, [x], forward=lambda model, batch: model(batch, shift))
    torch.testing.assert_close(net.norm.running_mean, x.mean(0) + 5)


def test_a_merge_of_two_networks_is_mended() -> None:
    """Averaged weights with averaged statistics are off; after re-estimation outputs are of
    zero mean and unit variance again."""
    torch.manual_seed(3)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.randn(500, 4)
    net[1].running_mean.fill_(3)
    net[1].running_var.fill_(25)
    assert net.eval()(x).std() < 0.5
    reestimate(net, x.split(250))
    out = net(x)
    assert out.mean(0).abs().max() < 0.1 and (out.std(0) - 1).abs().max() < 0.1
