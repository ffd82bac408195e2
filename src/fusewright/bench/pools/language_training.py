"""How a language pool's base and experts are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright.bench.descent import OneCycle
from fusewright.bench.pools.language_data import crops, mixed, shares_of
from fusewright.bench.pools.making import PoolRecipe
from fusewright.bench.pools.training import Tell
from fusewright.modules.tensors import device_of


@dataclass(frozen=True)
class LanguageRecipe(PoolRecipe):
    """What a pool's training depends on, beside data and seed.

    The base learns a mixture of all domains for ``base_steps`` batches of ``batch`` crops of
    ``length`` tokens; ``mixture`` is the exponent of :func:`shares_of`. Each expert goes on from
    it on its own domain for ``expert_steps``, in small steps, so that experts stay close to the
    base.

    ``start`` and ``start_tokenizer`` are a checkpoint of llama2.c and its tokenizer, below the
    folder of data: the base then goes on from there, or is that very model where ``base_steps`` is
    0, and all sizes but ``vocabulary`` are the checkpoint's.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    hidden: int = 352
    vocabulary: int = 1024
    length: int = 128
    batch: int = 16
    mixture: float = 0.5
    base_steps: int = 1600
    base_rate: float = 3e-3
    base_decay: float = 0.05
    expert_steps: int = 100
    expert_rate: float = 1e-3
    lora_rate: float = 5e-3  # adapters start from no change at all
    start: str = ""
    start_tokenizer: str = ""
    bfloat16: bool = True

    @property
    def reports(self) -> tuple[int, int]:
        return REPORTS, REPORTS


BETAS = (0.9, 0.95)
"""AdamW's: as language models are trained since GPT-3 (Brown et al. 2020, arXiv:2005.14165)."""
REPORTS = 10
"""How often a training tells its loss."""


def pretrain(
    model: nn.Module, streams: Mapping[str, Tensor], recipe: LanguageRecipe,
    draw: torch.Generator, tell: Tell,
) -> float:  # fmt: skip
    """Train the base on the mixture; answers with the mean loss of the last tenth, in nats (NaN
    without steps)."""
    shares = shares_of({name: len(stream) for name, stream in streams.items()}, recipe.mixture)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.base_decay},
              {"params": others, "weight_decay": 0.0}]  # fmt: skip

    def batch() -> Tensor:
        return mixed(streams, shares, recipe.batch, recipe.length, draw)

    return _descend(model, groups, batch, recipe.base_steps, recipe.base_rate, recipe, tell)


def fine_tune(
    model: nn.Module, stream: Tensor, recipe: LanguageRecipe, rate: float, draw: torch.Generator,
    tell: Tell,
) -> float:  # fmt: skip
    """Train all that can be trained of a copy of the base on one domain; answers as
    :func:`pretrain` does."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": 0.0}]

    def batch() -> Tensor:
        return crops(stream, recipe.batch, recipe.length, draw)

    return _descend(model, groups, batch, recipe.expert_steps, rate, recipe, tell)


def _descend(
    model: nn.Module, groups: list[dict[str, Any]], batch: Callable[[], Tensor], steps: int,
    rate: float, recipe: LanguageRecipe, tell: Tell,
) -> float:  # fmt: skip
    if not steps:
        return float("nan")
    descent = OneCycle(groups, steps, rate, betas=BETAS)
    model.train()
    ends = [ceil(steps * part / REPORTS) for part in range(1, REPORTS + 1)]
    seen, mean = [], float("nan")
    for step in range(1, steps + 1):
        descent.begin()
        found = _loss(model, batch(), recipe)
        found.backward()
        descent.step()
        seen.append(found.detach())
        for _ in range(ends.count(step)):
            mean, seen = float(torch.stack(seen).mean()) if seen else mean, []
            tell(f"loss {mean:.3f}")
    model.eval()
    return mean


def _loss(model: Any, ids: Tensor, recipe: LanguageRecipe) -> Tensor:
    """Mean cross-entropy of every token after the first, in nats."""
    ids = ids.to(device_of(model))
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=recipe.bfloat16):
        logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
