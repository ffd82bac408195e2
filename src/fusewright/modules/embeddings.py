"""The input embeddings of a live model of tokens, changed on their way into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fusewright.layout.config import is_encoder_decoder

_ROWS = 4096
"""Tokens whose embeddings are measured, evenly over the vocabulary."""


def input_embeddings(model: nn.Module) -> nn.Embedding | None:
    """What turns tokens into vectors, of an encoder and decoder the encoder's; None for a model
    that is not of ``transformers``, or takes no tokens."""
    ask = getattr(_reader(model), "get_input_embeddings", None)
    try:
        found = None if ask is None else ask()
    except NotImplementedError:  # what models without embeddings raise there
        return None
    return found if isinstance(found, nn.Embedding) else None


@torch.no_grad()
def embedding_size(embeddings: nn.Embedding) -> float:
    """The root mean square of tokens' embeddings, as the model gets them."""
    count = embeddings.num_embeddings
    places = torch.linspace(0, count - 1, min(count, _ROWS), device=embeddings.weight.device)
    found: Tensor = embeddings(places.long())
    return float(found.double().square().mean().sqrt())


@torch.no_grad()
def table_scale(table: nn.Embedding) -> float | None:
    """s of a table that answers s E[i] (Gemma's and BART's have one of their own, PyTorch's 1);
    None of one that answers anything else."""
    if type(table) is nn.Embedding:
        return 1.0
    asked = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4], device=table.weight.device)
    count = max(len(asked), (table.padding_idx or 0) + 1)
    rows = torch.arange(1.0, count * table.embedding_dim + 1).cos().view(count, -1)
    rows = rows.to(table.weight)
    try:
        once, twice = (functional_call(table, {"weight": w}, (asked,)) for w in (rows, 2 * rows))
    except (LookupError, RuntimeError, TypeError, ValueError):  # it is asked otherwise
        return None
    found, own = once.double(), rows[asked].double()
    if found.shape != own.shape:
        return None
    scale = float((found * own).sum() / own.square().sum())
    alike = torch.allclose(found, scale * own, rtol=1e-2, atol=0)  # within bfloat16's rounding
    return scale if alike and torch.allclose(twice.double(), 2 * found, rtol=1e-2) else None


@contextmanager
def embedded(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Until the block ends, the model gets ``change(embeddings)`` of its tokens (n, tokens, width)
    instead, before it adds positions. A decoder beside an encoder is left alone, even where both
    have one table."""
    embeddings, reader = input_embeddings(model), _reader(model)
    assert embeddings is not None
    reads = [reader is model]

    def enter(module: nn.Module, args: Any) -> None:
        reads.append(True)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        reads.pop()

    def act(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return change(output) if reads[-1] else output

    handles = [embeddings.register_forward_hook(act)]
    if reader is not model:
        handles += [reader.register_forward_pre_hook(enter), reader.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reader(model: Any) -> Any:
    """What tokens are read by: the encoder of a model that has a decoder beside it."""
    return model.get_encoder() if is_encoder_decoder(model) else model
