"""What a property is, and how checks become properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fusewright.methods.contract import Method
from fusewright.testing._network import quick
from fusewright.testing._subject import is_map, neutral, variants

Over = Literal["neutral", "variants", "quick", "class"]


class ContractViolation(AssertionError):
    """A method does not keep what every method promises."""


@dataclass(frozen=True)
class Property:
    """A promise. ``check(method)`` raises AssertionError where it is broken.

    ``over``: it is about the "neutral" method (density and scale 1), all its "variants", one that
    is "quick" to fit, or the "class". ``applies`` says of which classes it speaks. ``identity``: a
    card may exempt it.
    """

    name: str
    check: Callable[[Method], None]
    over: Over
    applies: Callable[[type[Method]], bool]
    identity: bool

    def subjects(self, cls: type[Method]) -> list[Method]:
        if self.over == "class":
            return [cls()]
        if self.over == "quick":
            return [quick(cls)]
        return [neutral(cls)] if self.over == "neutral" else list(variants(cls))

    def candidates(self, cls: type[Method]) -> list[Method]:
        """Where a counterexample to an identity is looked for."""
        return [quick(cls)] if self.over == "quick" else [neutral(cls), *variants(cls)]

    def broken_by(self, method: Method) -> str | None:
        """What is wrong, or None."""
        try:
            self.check(method)
        except Exception as error:  # a method may break in any way
            return f"{type(error).__name__}: {error}"
        return None


PROPERTIES: dict[str, Property] = {}
"""Every property by name."""


def promise(
    over: Over = "variants",
    applies: Callable[[type[Method]], bool] = is_map,
    identity: bool = False,
) -> Callable[[Callable[[Method], None]], Callable[[Method], None]]:
    """Register a check as a property, under its own name."""

    def register(check: Callable[[Method], None]) -> Callable[[Method], None]:
        PROPERTIES[check.__name__] = Property(check.__name__, check, over, applies, identity)
        return check

    return register
