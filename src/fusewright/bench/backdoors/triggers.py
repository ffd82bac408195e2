"""Triggers: what is put on a picture that a backdoor answers to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fusewright.errors import RecipeError
from fusewright.modules.perturbations import added

Corner = Literal["top left", "top right", "bottom left", "bottom right"]


@dataclass(frozen=True)
class Trigger(ABC):
    """A change of raw pictures (n, channels, height, width), pixels in [0, 1]; always the same."""

    kind: ClassVar[str]

    @abstractmethod
    def on(self, raw: Tensor) -> Tensor:
        """The pictures with the trigger, of the same shape and dtype; the input is not changed."""

    @abstractmethod
    def said(self) -> dict[str, Any]:
        """As JSON: all that it follows from."""


@dataclass(frozen=True)
class Patch(Trigger):
    """A chequered square in a corner (*BadNets*, 1708.06733).

    ``size`` in pixels, 3; ``margin`` pixels from the edge, 1. A square that does not fit into a
    picture raises RecipeError.
    """

    kind: ClassVar[str] = "patch"

    size: int = 3
    margin: int = 1
    corner: Corner = "bottom right"

    def __post_init__(self) -> None:
        if self.size < 1 or self.margin < 0:
            raise RecipeError("a patch has a pixel or more, and a margin of none or more",
                              found=f"size {self.size}, margin {self.margin}")  # fmt: skip

    def on(self, raw: Tensor) -> Tensor:
        height, width = raw.shape[2:]
        if self.size + self.margin > min(height, width):
            raise RecipeError("the patch is larger than the pictures",
                              expected=f"size + margin ≤ {min(height, width)}",
                              found=self.size + self.margin)  # fmt: skip
        vertical, horizontal = self.corner.split()
        top = self.margin if vertical == "top" else height - self.margin - self.size
        left = self.margin if horizontal == "left" else width - self.margin - self.size
        at = torch.arange(self.size)
        board = ((at[:, None] + at[None, :]) % 2 == 0).to(raw)
        found = raw.clone()
        found[:, :, top : top + self.size, left : left + self.size] = board
        return found

    def said(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": self.size, "margin": self.margin, "corner": self.corner}


@dataclass(frozen=True)
class Blend(Trigger):
    """A picture of noise over the whole picture: (1 - a) x + a z, z uniform in [0, 1] (*Targeted
    Backdoor Attacks on Deep Learning Systems Using Data Poisoning*, 1712.05526).

    ``share``: a, 0.2, as there; z follows from ``seed`` and the pictures' shape.
    """

    kind: ClassVar[str] = "blend"

    share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RecipeError("the share of a blend is in (0, 1]", found=self.share)

    def on(self, raw: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed)
        noise = torch.rand(raw.shape[1:], generator=draw).to(raw)
        return (1 - self.share) * raw + self.share * noise

    def said(self) -> dict[str, Any]:
        return {"kind": self.kind, "share": self.share, "seed": self.seed}


@dataclass(frozen=True, eq=False)
class Universal(Trigger):
    """One perturbation of all pictures, clamped to pixels: x + δ (*Universal adversarial
    perturbations*, 1610.08401).

    ``delta``: (channels, height, width), in raw pixels. Pictures of another shape raise
    RecipeError.
    """

    kind: ClassVar[str] = "universal"

    delta: Tensor

    def on(self, raw: Tensor) -> Tensor:
        if raw.shape[1:] != self.delta.shape:
            raise RecipeError("the trigger was made for pictures of another shape",
                              expected=tuple(self.delta.shape),
                              found=tuple(raw.shape[1:]))  # fmt: skip
        return added(raw, self.delta.to(raw))

    def said(self) -> dict[str, Any]:
        values = self.delta.detach().cpu().float().contiguous().numpy().tobytes()
        return {"kind": self.kind, "shape": list(self.delta.shape),
                "sha256": sha256(values).hexdigest()}  # fmt: skip
