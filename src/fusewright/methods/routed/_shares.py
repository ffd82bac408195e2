"""How much of each expert routers ask for, task by task, and whether they have collapsed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from fusewright.errors import FusewrightWarning
from fusewright.methods.learned._fitting import Fitting, in_report
from fusewright.modules.mixture import Routing

_ALIKE = 0.01
"""Routers are alike for all tasks if their weights differ by no more than this share of the largest
one, in every mixture: what is left where hidden units are dead."""
_ALL = 0.9
"""An expert takes all if this share of every task's weight is its own."""


@dataclass(frozen=True)
class Shares:
    """Mean routing weights: (tasks, mixtures, experts)."""

    weights: Tensor
    tasks: Sequence[str]
    experts: Sequence[str]

    def table(self) -> dict[str, dict[str, float]]:
        """By task and expert, the mean over all mixtures."""
        rows = self.weights.mean(dim=1).tolist()
        return {task: dict(zip(self.experts, row, strict=True))
                for task, row in zip(self.tasks, rows, strict=True)}  # fmt: skip

    def collapse(self) -> str | None:
        """What the routers do instead of routing, if so: one expert has nine tenths of the weight
        of every task, or no mixture's weights differ between tasks by more than one per cent."""
        if len(self.tasks) < 2 or not self.weights.numel():
            return None
        means = self.weights.abs().mean(dim=1)
        shares = means / means.sum(dim=1, keepdim=True).clamp(min=torch.finfo(means.dtype).tiny)
        least, first = shares.amin(dim=0), int(shares.amin(dim=0).argmax())
        if float(least[first]) > _ALL:
            return f"give expert {self.experts[first]} nearly all weight, whatever the task"
        apart = (self.weights.amax(dim=0) - self.weights.amin(dim=0)).amax(dim=1)
        if bool((apart <= _ALIKE * self.weights.abs().amax(dim=(0, 2))).all()):
            return "weigh the experts alike for all tasks"
        return None


def asked_weights(fitting: Fitting, routing: Routing) -> Shares:
    """What a model's mixtures answer to each task's held-out inputs, else to its first ones."""
    experts = fitting.vectors.experts
    mine = {task: _of_task(fitting, routing, task, len(experts))
            for task in fitting.processes.mine(fitting.questions)}  # fmt: skip
    found = fitting.processes.gathered(mine, fitting.questions)
    every = [at for at in range(len(routing.mixtures)) if all(at in of for of in found.values())]
    rows = [torch.stack([of[at] for at in every]) for of in found.values() if every]
    return Shares(torch.stack(rows) if rows else torch.empty(0), tuple(found), experts)


@torch.no_grad()
def _of_task(fitting: Fitting, routing: Routing, task: str, experts: int) -> dict[int, Tensor]:
    """{a mixture's number: its mean w (experts,)} of those that the task's inputs come by; the
    mean of an expert's directions, where these are weighed one by one."""
    seen: dict[int, list[Tensor]] = {}
    for batch in fitting.held_out(task):
        for mixture in routing.mixtures:
            mixture.weights = None
        fitting.questions[task].logits(fitting.model, batch)
        for at, mixture in enumerate(routing.mixtures):
            if mixture.weights is not None:
                each = mixture.weights.float().cpu().unflatten(1, (experts, -1)).mean(dim=2)
                seen.setdefault(at, []).append(each)
    return {at: torch.cat(rows).mean(dim=0) for at, rows in seen.items()}


def told(kept: Shares, last: Shares | None, fixed: bool = False) -> dict[str, Any]:
    """What to report of the routers that are kept, and of the ``last`` ones where these are not;
    warns of a collapse of either. Routers that are ``fixed`` do not see the input."""
    report: dict[str, Any] = {"routing": kept.table() if kept.weights.numel() else {}}
    if last is not None and last.weights.numel():
        report["routing_at_end"] = last.table()
    if fixed:
        return report
    lasting, undone = kept.collapse(), None if last is None else last.collapse()
    if undone and undone != lasting:
        warn(f"the routers collapsed: in the last state they {undone}; that was undone, and the "
             "state that scored best is kept", FusewrightWarning, stacklevel=4)  # fmt: skip
    if lasting:
        warn(f"the routers {lasting}: {in_report('routing')}", FusewrightWarning, stacklevel=4)
    return report


def shares_of(weights: Mapping[str, Tensor], experts: Sequence[str]) -> Shares:
    """Of one mixture, its w (inputs, experts) by task."""
    means = torch.stack([w.mean(dim=0, keepdim=True) for w in weights.values()])
    return Shares(means, tuple(weights), experts)
