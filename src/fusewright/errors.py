"""Every refusal: what is wrong, where, what was expected and found, and what to do."""

from __future__ import annotations


class FusewrightError(Exception):
    """A refusal that a person can act on.

    ``where`` names the file, tensor or key; ``fix`` is something to copy or type. ``exit_code`` is
    what the command returns.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.where = problem, where
        self.expected, self.found, self.fix = expected, found, fix
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.problem]
        for label in ("where", "expected", "found", "fix"):
            value = getattr(self, label)
            if value is not None:
                lines.append(f"  {label + ':':<10}{value}")
        return "\n".join(lines)


class RecipeError(FusewrightError):
    """The recipe, a method name or a parameter is not understood."""

    exit_code = 2


class WeightsError(FusewrightError):
    """An input cannot be read, or is not what it says it is."""

    exit_code = 3


class PlanError(FusewrightError):
    """These inputs cannot be merged in this way; found from headers, before any bulk reading."""

    exit_code = 4


class OutputError(FusewrightError):
    """The output cannot be written, or is in use."""

    exit_code = 5


class NumericError(FusewrightError):
    """NaN, infinity or overflow where none is allowed."""

    exit_code = 6


class MemoryShortage(FusewrightError):
    """The machine has not the memory that a step needs; what was done before it is kept."""

    exit_code = 7


class FusewrightWarning(UserWarning):
    """Evidence that a merge may not mean what its author thinks; nothing is refused."""


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The known word closest to a misspelt one, if any is close."""
    import difflib

    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return found[0] if found else None
