"""BatchNorm's running statistics, estimated anew: a merged model's are nobody's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusewright.errors import FusewrightError, FusewrightWarning

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Reestimated:
    """Which BatchNorm modules have new statistics, and from how many batches."""

    modules: tuple[str, ...]
    batches: int


def batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm modules that keep running statistics, by path."""
    return {
        path: part
        for path, part in model.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    }


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: a mapping gives keywords, a tuple or list gives arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def reestimate(model: nn.Module, batches: Iterable[Any], *, forward: Forward = call) -> Reestimated:
    """Replace BatchNorm's running statistics by those of unlabelled inputs, in place.

    A merge averages weights, not activations, so the merged statistics fit neither (*REPAIR*,
    2211.08403, resets them so). One pass: mean and (unbiased) variance are each the plain average
    over the batches, μ = 1/n Σ μ_b (``momentum=None``), so batches should have one size.
    Everything but BatchNorm runs as in evaluation; training flags, momenta and all other tensors
    are left as they were. A model without BatchNorm is left alone, with a FusewrightWarning.

    Raises FusewrightError if there are no batches; the statistics are then, and after any other
    error, the old ones.
    """
    found = batchnorms(model)
    if not found:
        warnings.warn("the model has no BatchNorm statistics to estimate: nothing was done",
                      FusewrightWarning, stacklevel=2)  # fmt: skip
        return Reestimated((), 0)
    count = 0
    with _estimating(model, found), torch.no_grad():
        for batch in batches:
            forward(model, batch)
            count += 1
        if not count:
            raise FusewrightError("there are no batches to estimate BatchNorm's statistics from",
                                  expected="at least one batch of unlabelled inputs")  # fmt: skip
    return Reestimated(tuple(found), count)


@contextmanager
def _estimating(model: nn.Module, found: Mapping[str, _BatchNorm]) -> Iterator[None]:
    flags = {part: part.training for part in model.modules()}
    momenta = {part: part.momentum for part in found.values()}
    old = [{k: b.clone() for k, b in part.named_buffers()} for part in found.values()]
    try:
        model.eval()
        for part in found.values():
            part.train()
            part.momentum = None
            part.reset_running_stats()
        yield
    except BaseException:
        for part, buffers in zip(found.values(), old, strict=True):
            for name, buffer in part.named_buffers():
                buffer.copy_(buffers[name])
        raise
    finally:
        for part, momentum in momenta.items():
            part.momentum = momentum
        for each, flag in flags.items():
            each.training = flag
