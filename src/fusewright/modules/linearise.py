"""A model that is linear in its weights: its first-order expansion around where they began."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from fusewright.errors import PlanError
from fusewright.modules.functional import with_weights

Selector = Callable[[str], bool]
"""Whether a parameter of this name is linearised."""

_ANSWERS = ("encode_image", "encode_text", "get_image_features", "get_text_features")
"""Methods that answer as ``forward`` does: they are linearised too."""
_PIECES = ("forward_features", "forward_head")
"""Methods that compute a part of an answer. A composition of two linear expansions is not one."""


def linearise(
    module: nn.Module, selector: Selector | None = None, *,
    start: Mapping[str, Tensor] | None = None,
) -> Linearised:  # fmt: skip
    """The module in the tangent space of its weights (2305.12827; in parts, 2310.04742).

    f_lin(x; θ) = f(x; θ_0) + J_θ0(x) (θ - θ_0), one ``torch.func.jvp``, about twice a forward pass.
    Trainable are the module's own parameters θ. ``selector`` takes those that are linearised (all);
    the others act as they are. ``start``: θ_0 by name, the present values by default; give the
    base's parameters to ask a merged model how it answers in the tangent space.

    Raises PlanError if nothing is selected, or ``start`` lacks a selected tensor or has it in
    another shape.
    """
    chosen = {n: p for n, p in module.named_parameters() if selector is None or selector(n)}
    if not chosen:
        raise PlanError("no parameter is selected to be linearised", where=type(module).__name__,
                        expected="a selector of names as in module.named_parameters()")  # fmt: skip
    given: Mapping[str, Tensor] = chosen if start is None else start
    for name, tensor in chosen.items():
        if name not in given or given[name].shape != tensor.shape:
            raise PlanError("the start does not fit the module", where=name,
                            expected=tuple(tensor.shape),
                            found=tuple(given[name].shape) if name in given else "no such tensor",
                            fix="start=dict(base_module.named_parameters())")  # fmt: skip
    copies = {n: given[n].detach().to(p.device, p.dtype, copy=True) for n, p in chosen.items()}
    return Linearised(module, _Start(copies))


class _Start(nn.Module):
    """θ_0 as buffers, so that it moves with the module; no part of a state dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for number, tensor in enumerate(tensors.values()):
            self.register_buffer(str(number), tensor, persistent=False)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Those below a submodule, by their names in it."""
        found = zip(self.names, self.buffers(), strict=True)
        return {n.removeprefix(prefix): t for n, t in found if n.startswith(prefix)}


class Linearised(nn.Module):
    """A module's expansion around its start; made by :func:`linearise`.

    It takes and returns what the module does, and has its attributes; of what it returns, floating
    tensors are expanded, others are those at the start, and caches are left out: what goes on from
    one would be no expansion of the whole, so texts are read ``in_one_call``, and ``generate``
    raises PlanError. Dropout draws one
    mask for value and derivative. BatchNorm keeps its statistics, also in training: with a batch's
    own statistics, the start would not answer as the base. Attention is computed without fused
    kernels, which have no forward derivative; autocast is not supported by all operators.
    """

    in_one_call = True

    def __init__(self, module: nn.Module, start: _Start, prefix: str = "") -> None:
        super().__init__()
        self.module, self._start, self._prefix = module, start, prefix
        # What is asked below a model's own head is told from the name of the model's class.
        self.__class__ = type(f"Linearised{type(module).__name__}", (Linearised,), {})
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._expanded(self.module, args, kwargs)

    def train(self, mode: bool = True) -> Linearised:
        super().train(mode)
        for module in self.module.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _expanded(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        start, shape = self._start.tensors(self._prefix), _Shape()
        now = dict(self.module.named_parameters())
        moved = {name: now[name] - tensor for name, tensor in start.items()}

        def answer(weights: dict[str, Tensor]) -> list[Tensor]:
            with with_weights(self.module, weights):
                return shape.taken(call(*args, **kwargs))

        with _differentiable():
            found: Any = jvp(answer, (start,), (moved,))
        values, slopes = found
        return shape.given([v + s for v, s in zip(values, slopes, strict=True)])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _PIECES:
                raise
        found = getattr(self.module, name)
        if name == "generate":
            return self._written
        if name in _ANSWERS:
            return partial(self._method, found)
        return self._below(name, found) if isinstance(found, nn.Module) else found

    def _method(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._expanded(call, args, kwargs)

    def _written(self, *args: Any, **kwargs: Any) -> Any:
        raise PlanError(
            "a linearised model writes no texts: its answer is of one call, without a cache",
            where=type(self.module).__name__, expected="a task whose answers are logits",
            fix="linearised.module.generate(...), the same weights in the ordinary model",
        )  # fmt: skip

    def _below(self, name: str, part: nn.Module) -> nn.Module:
        """A submodule, linearised around the same start."""
        path = next((n for n, m in self.module.named_modules() if m is part), name)
        prefix = f"{self._prefix}{path}." if path else self._prefix
        return Linearised(part, self._start, prefix) if self._start.tensors(prefix) else part


@contextmanager
def _differentiable() -> Iterator[None]:
    """Without the kernels that have no forward derivative: fused attention, and what torch's own
    attention and encoder layers take in evaluation mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Shape:
    """What an answer is beside its floating tensors."""

    def taken(self, answer: Any) -> list[Tensor]:
        leaves, self.spec = tree_flatten(answer)
        self.expanded = [isinstance(x, Tensor) and x.is_floating_point() for x in leaves]
        self.leaves = [x if isinstance(x, Tensor | int | float | str) else None for x in leaves]
        return [x for x, chosen in zip(leaves, self.expanded, strict=True) if chosen]

    def given(self, tensors: list[Tensor]) -> Any:
        left = iter(tensors)
        whole = [next(left) if chosen else x
                 for x, chosen in zip(self.leaves, self.expanded, strict=True)]  # fmt: skip
        return tree_unflatten(whole, self.spec)
