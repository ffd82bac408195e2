"""Masks that are learned: numbers in (0, 1) for elements, rows or singular directions, drawn by a
relaxation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor, nn

Size = Literal["element", "row"]
SMALLEST_MEAN = 1e-6
"""A mask is divided by its mean or, of a mask that has all but vanished, by this."""
_POINTS, _NODES = 16_385, 256


class ConcreteMasks(nn.Module):
    """One mask for every tensor, a relaxed Bernoulli of learned logits x (*The Concrete
    Distribution*, 1611.00712), divided by its mean so that it changes no vector's size on average.

    m = σ((log u - log(1 - u) + x) / T), u uniform in (0, 1); then m / mean(m) over the tensor.

    ``shapes`` are those of the tensors. ``size``: a number for each element, or for each "row"
    along the first axis of tensors of two axes or more, which takes columns times less memory.
    ``temperature``: T. Logits are float32 and begin at 0. A draw is decided by ``seed``, its number
    and the tensor's name. ``spectra``: tensors with singular values σ (n, r) here have a number for
    each direction instead, (n, r, 1), and mean(m) = Σ σ m / Σ σ: the sum of singular values stays
    what it was, and directions without σ, of which an adapter's update has most, cannot scale the
    others.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], size: Size = "element", temperature: float = 0.5,
        seed: int = 0, spectra: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.temperature, self.seed = temperature, seed
        self._at = {name: at for at, name in enumerate(shapes)}
        self._shares = {name: _shares(sigma) for name, sigma in (spectra or {}).items()}
        self.logits = nn.ParameterList(
            nn.Parameter(torch.zeros(
                self._shares[name].shape if name in self._shares else mask_shape(shape, size)
            )) for name, shape in shapes.items()
        )  # fmt: skip

    def drawn(self, name: str, number: int) -> Tensor:
        """The mask of a tensor in a draw; gradients flow to the logits."""
        x = self.logits[self._at[name]]
        u = _uniform(x, self.seed, number, name)
        m = ((u.log() - (-u).log1p() + x) / self.temperature).sigmoid()
        return divided(m, self._shares.get(name))

    def expected(self, name: str) -> Tensor:
        """E[m] / mean(E[m]); no gradient."""
        x = self.logits[self._at[name]].detach()
        return divided(expectation(x, self.temperature), self._shares.get(name))

    def share(self) -> float:
        """The mean of σ(x), the probability that an element is more on than off."""
        elements = sum(x.numel() for x in self.logits)
        return sum(float(x.detach().sigmoid().double().sum()) for x in self.logits) / elements


class ProductMasks(nn.Module):
    """Two masks over the same tensors, one times the other; each is drawn, and can be trained, by
    itself."""

    def __init__(self, first: ConcreteMasks, second: ConcreteMasks) -> None:
        super().__init__()
        self.first, self.second = first, second

    def drawn(self, name: str, number: int) -> Tensor:
        """The product of both masks' draws; gradients flow to the logits that require them."""
        return self.first.drawn(name, number) * self.second.drawn(name, number)

    def expected(self, name: str) -> Tensor:
        """E[m₁] E[m₂] over their means: the masks are independent; no gradient."""
        return self.first.expected(name) * self.second.expected(name)

    def share(self) -> float:
        """As :meth:`ConcreteMasks.share`, of the first mask alone."""
        return self.first.share()


Masks = ConcreteMasks | ProductMasks


def divided(mask: Tensor, shares: Tensor | None = None) -> Tensor:
    """m / mean(m), each number weighted by its share if ``shares`` are given. A mask that is 0
    everywhere stays 0, instead of becoming no number."""
    if not mask.numel():
        return mask
    mean = mask.mean() if shares is None else (mask * shares.to(mask)).sum()
    return mask / mean.clamp_min(SMALLEST_MEAN)


def expectation(logits: Tensor, temperature: float) -> Tensor:
    """E_u[σ((log u - log(1 - u) + x) / T)], to about 1e-6.

    Only for some T is there a closed form (T = ½, p = σ(2x): p + 2x p(1 - p) - (π/2)(2p - 1)
    √(p(1 - p))); here it is a Gauss-Legendre sum over u, tabulated in x and read linearly.
    """
    edge = 16.0 * max(1.0, temperature)
    table = _table(edge, temperature).to(logits.device)
    place = ((logits.double() + edge) * ((_POINTS - 1) / (2 * edge))).clamp(0, _POINTS - 1)
    low = place.long().clamp_max(_POINTS - 2)
    return torch.lerp(table[low], table[low + 1], place - low).to(logits.dtype)


@cache
def _table(edge: float, temperature: float) -> Tensor:
    return _expected_at(torch.linspace(-edge, edge, _POINTS, dtype=torch.float64), temperature)


def _expected_at(x: Tensor, temperature: float) -> Tensor:
    from numpy.polynomial.legendre import leggauss

    nodes, weights = (torch.from_numpy(found) for found in leggauss(_NODES))
    u = (nodes + 1) / 2
    total = torch.zeros_like(x)
    for noise, weight in zip((u.log() - (-u).log1p()).tolist(), weights.tolist(), strict=True):
        total += weight / 2 * ((x + noise) / temperature).sigmoid()
    return total


def mask_shape(shape: torch.Size, size: Size) -> torch.Size:
    """Of a mask for a tensor of ``shape``: the same, or (rows, 1, …) for one number a row."""
    if size == "element" or len(shape) < 2:
        return shape
    return torch.Size((shape[0], *(1 for _ in shape[1:])))


def _shares(sigma: Tensor) -> Tensor:
    """σ / Σ σ, (n, r, 1); equal ones of a tensor that no one changed."""
    sigma = sigma if sigma.any() else torch.ones_like(sigma)
    return (sigma / sigma.sum())[..., None]


def _uniform(like: Tensor, seed: int, number: int, name: str) -> Tensor:
    """Numbers in the open interval (0, 1)."""
    key = blake2b(f"{seed}\x00{number}\x00{name}".encode(), digest_size=8).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    found = torch.rand(like.shape, generator=draw)
    tiny = torch.finfo(found.dtype).eps / 2
    return found.clamp(tiny, 1 - tiny).to(like.device)
