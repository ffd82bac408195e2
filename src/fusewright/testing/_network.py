"""A small model for methods that run models: tasks of pictures, experts, data, and answers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.errors import FusewrightWarning
from fusewright.methods.contract import Method
from fusewright.modules.told import tell
from fusewright.tasks.adaptation import Adaptation, adaptation
from fusewright.tasks.pictures import Pictures
from fusewright.testing._subject import SEED, count

STEPS = ("steps", "epochs", "weight_steps")
QUICK = {**dict.fromkeys(STEPS, 3), "batch": 4, "every": 2, "guard": 8, "inputs": 12}
"""What makes a fit short, of the house's words for parameters."""
_SIDE, _PATCH, _CLASSES = 4, 12, 3
WIDTH, INNER = 24, 36
"""Wider than gates and ranks usually are, which would be complete otherwise."""


class Block(nn.Module):
    """Attention that looks at all tokens alike, and a feed-forward part."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, INNER), nn.GELU(), nn.Linear(INNER, width))

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.attention(self.norm(tokens)).mean(dim=1, keepdim=True)
        mixed: Tensor = tokens + seen
        return mixed + self.mlp(self.norm(mixed))


class Network(nn.Module):
    """Pictures (n, 3, 4, 4) as four tokens; blocks; logits (n, 3) of their mean."""

    def __init__(self, width: int = WIDTH, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(_PATCH, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.classifier = nn.Linear(width, _CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.embed(nn.functional.pixel_unshuffle(pixel_values, 2).flatten(2).mT)
        for layer in self.layers:
            tokens = layer(tokens)
        found: Tensor = self.classifier(tokens.mean(dim=1))
        return found


def network(width: int = WIDTH, depth: int = 2, seed: int = 0) -> Network:
    """A seeded one, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(width, depth).eval()


@dataclass(frozen=True)
class Problem:
    """Models and batches of their tasks, by expert; ``pictures`` are inputs of all tasks."""

    base: nn.Module
    experts: Mapping[str, nn.Module]
    batches: Mapping[str, list[dict[str, Tensor]]]
    pictures: Tensor = field(repr=False)

    def data(self, method: Method) -> Adaptation | None:
        """What the method's card asks for: without labels, if it needs none."""
        wanted = {"pixel_values"} | ({"labels"} if method.card.data == "labelled" else set())
        seen = {task: [{k: v for k, v in batch.items() if k in wanted} for batch in batches]
                for task, batches in self.batches.items()}  # fmt: skip
        return None if method.card.data == "none" else adaptation(seen, pictures=Pictures())

    def with_inputs_of(self, other: Problem) -> Problem:
        return replace(self, batches=other.batches)


def problem(experts: int = 2, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    """A base, experts that moved from it, and two batches of each one's task: pictures around a
    place of its own."""
    draw, base = torch.Generator().manual_seed(seed + 1), network().to(dtype)
    names = [f"expert {number}" for number in range(experts)]
    moved = {name: _moved(base, draw) for name in names}
    pictures = {name: [torch.randn(6, 3, _SIDE, _SIDE, generator=draw) + place for _ in range(2)]
                for place, name in enumerate(names)}  # fmt: skip
    batches = {
        name: [{"pixel_values": x.to(dtype), "labels": torch.arange(6) % _CLASSES} for x in several]
        for name, several in pictures.items()
    }
    shown = torch.cat([several[0][:3] for several in pictures.values()]).to(dtype)
    return Problem(base, moved, batches, shown)


def _moved(base: nn.Module, draw: torch.Generator) -> nn.Module:
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for tensor in expert.parameters():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=draw).to(tensor))
    return expert


def quick(cls: type[Method], **params: Any) -> Method:
    """The method with few steps and small batches, if it has them."""
    return cls(**{k: v for k, v in QUICK.items() if k in cls.model_fields}, **params)


def problem_for(cls: type[Method], **options: Any) -> Problem:
    """A problem of as many experts as the card allows, two if it does."""
    return problem(count(cls, 2), **options)


def built(method: Method, given: Problem, **options: Any) -> Any:
    """What the engine makes of the problem: a :class:`~fusewright.engine.front.Merged`."""
    from fusewright.engine import merge

    experts = given.experts
    scored: Callable[[Any], float] = lambda state: -_distance(state, experts)  # noqa: E731
    how = {"data": given.data(method), "evaluate": scored, "seed": SEED, **options}
    with warnings.catch_warnings():  # nobody trained these models
        warnings.simplefilter("ignore", FusewrightWarning)
        return merge(method, base=given.base, experts=dict(experts), **how)


def _distance(state: Mapping[str, Tensor], experts: Mapping[str, nn.Module]) -> float:
    """Of merged weights to those of all experts."""
    apart = [state[name] - tensor for expert in experts.values()
             for name, tensor in expert.state_dict().items()]  # fmt: skip
    return sum(float(each.double().square().sum()) for each in apart)


def answers(model: nn.Module, pictures: Tensor, task: str | None = None) -> Tensor:
    """The model's logits; where it must be told the task, of that."""
    if task is not None:
        tell(model, task)
    with torch.no_grad():
        found: Tensor = model(pictures)
    return found
