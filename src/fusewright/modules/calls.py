"""What a part of a model is called with, and what it answers, while the model is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fusewright.errors import PlanError

Ask = Callable[[], Any]
"""Runs the model once."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments and keywords of one call."""


class _Enough(Exception):
    """The rest of the forward pass is not wanted."""


@torch.no_grad()
def counted(model: nn.Module, paths: Iterable[str], ask: Ask, into: dict[str, int]) -> None:
    """Write ``into`` how often each of the modules at ``paths`` answers, in the order of their
    first answers: what lies inside another comes before it. So far as it came, where ``ask``
    fails."""

    def note(path: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, output: Any) -> None:
            into[path] = into.get(path, 0) + 1

        return hook

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(model.get_submodule(path).register_forward_hook(note(path)))
        with without_cache(model):
            ask()


@torch.no_grad()
def inputs_of(model: nn.Module, path: str, count: int, ask: Ask) -> list[Call]:
    """What the module at ``path`` is called with, ``count`` times at most; the model runs no
    further."""
    found: list[Call] = []

    def note(part: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(copied((args, kwargs)))
        if len(found) == count:
            raise _Enough

    handle = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    with handle, without_cache(model), suppress(_Enough):
        ask()
    return found


@torch.no_grad()
def outputs_of(model: nn.Module, path: str, count: int, ask: Ask) -> list[Tensor]:
    """What the module at ``path`` answers, ``count`` times at most; the model runs no further."""
    found: list[Tensor] = []

    def note(part: nn.Module, args: Any, output: Any) -> None:
        found.append(hidden(output, path).clone())
        if len(found) == count:
            raise _Enough

    handle = model.get_submodule(path).register_forward_hook(note)
    with handle, without_cache(model), suppress(_Enough):
        ask()
    return found


def hidden(output: Any, where: str = "") -> Tensor:
    """The features in what a block answers: itself, or the first of several. Raises PlanError if
    that is no tensor of numbers with fractions."""
    if isinstance(output, Mapping):
        output = tuple(output.values())
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise PlanError("a block does not answer with features", where=where,
                        expected="a tensor of floats, or several, those first",
                        found=type(first).__name__)  # fmt: skip
    return first


def copied(call: Call) -> Call:
    """With tensors of its own, which a module may then write to."""
    found: Call = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, call)
    return found


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, the model fills no key-value cache, so that its blocks answer a call alike however
    often it is repeated."""
    held: list[Any] = [getattr(part, "config", None) for part in model.modules()]
    configs = {id(each): each for each in held if getattr(each, "use_cache", False)}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
