"""The descent that everything here is trained by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WARM_UP = 0.1
"""The share of steps in which the rate rises to its peak."""
CLIPPED_AT = 1.0
"""The norm of all gradients together that none exceeds."""


def relative(
    parameters: Iterable[Tensor], rate: float, decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for :class:`OneCycle`: each tensor at ``rate`` times the root mean square that it
    begins with; ``decay`` is for matrices alone.

    So does Adafactor (Shazeer & Stern 2018, arXiv:1804.04235), by which T5 was made: a T5's
    embeddings begin eighty times as large as its queries, and at one rate for both the queries blow
    up before the embeddings move.
    """
    return [
        {"params": [p], "lr": rate * float(p.detach().square().mean().sqrt()),
         "weight_decay": decay if p.dim() > 1 else 0.0}
        for p in parameters
    ]  # fmt: skip


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global random numbers (dropout, PCGrad's order) from the seed."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def draws_of(device: torch.device) -> list[Tensor]:
    """The state of torch's random numbers: the CPU's, and a GPU's own."""
    more = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *more]


def draws_on(device: torch.device, states: Sequence[Tensor]) -> None:
    """Go on with those of :func:`draws_of`; a GPU's, if they were one's too."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


class OneCycle:
    """AdamW (1711.05101) under a one-cycle schedule, gradients clipped at norm 1.

    ``groups`` are as torch's optimisers take them ("params", "weight_decay"; "lr" where its peak
    is not ``rate``). ``clipped``: the parameters whose gradients are clipped together; all of
    them by default. ``betas``: torch's by default.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], steps: int, rate: float,
        *, clipped: Sequence[Tensor] | None = None, betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:  # fmt: skip
        own = [{"lr": rate, **group, "params": list(group["params"])} for group in groups]
        everything = [p for group in own for p in group["params"]]
        self._clipped = everything if clipped is None else list(clipped)
        self._optimiser = torch.optim.AdamW(own, lr=rate, betas=betas)
        total = steps + 1  # one more than there are: the last step's rate would be all but zero
        # Where the rise ends at step 0 exactly, torch divides by its length of 0.
        rise = WARM_UP if WARM_UP * total != 1 else 1.01 * WARM_UP
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, [group["lr"] for group in own], total_steps=total, pct_start=rise
        )

    def begin(self) -> None:
        """Forget the gradients of the last step."""
        self._optimiser.zero_grad()

    def step(self) -> None:
        """Move by the gradients that were left in the parameters."""
        torch.nn.utils.clip_grad_norm_(self._clipped, CLIPPED_AT)
        self._optimiser.step()
        self._schedule.step()
