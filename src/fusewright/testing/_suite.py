"""Properties applied to methods: one by one, all at once, or as pytest's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

from fusewright.methods import registry
from fusewright.methods.contract import Method
from fusewright.testing import _identities, _models, _robust  # noqa: F401  (promises register here)
from fusewright.testing._promise import PROPERTIES, ContractViolation, Property

if TYPE_CHECKING:
    from fusewright.testing._reference import Reference


def check_property(cls: type[Method], name: str) -> None:
    """Check one property of a method, registered or not. Raises ContractViolation."""
    found = PROPERTIES[name]
    if not found.applies(cls):
        return
    with _known(cls):
        if name in cls.card.exempt:
            _check_exemption(cls, found)
        else:
            _check_kept(cls, found)


@contextmanager
def _known(cls: type[Method]) -> Iterator[None]:
    """The method can be written by name, as if its package were installed."""
    known = {cls.name: cls, **registry.registry()}
    with patch.object(registry, "registry", lambda: known):
        yield


def _check_kept(cls: type[Method], found: Property) -> None:
    name = found.name
    for method in found.subjects(cls):
        wrong = found.broken_by(method)
        if wrong:
            raise ContractViolation(f"{cls.name} breaks {name!r} as {method!r}\n{wrong}")


def _check_exemption(cls: type[Method], found: Property) -> None:
    if not found.identity:
        raise ContractViolation(f"{cls.name}: {found.name!r} is owed by every method")
    if not any(map(found.broken_by, found.candidates(cls))):
        raise ContractViolation(
            f"{cls.name} is exempt from {found.name!r} because "
            f"{cls.card.exempt[found.name]!r}, but every variant keeps it: remove the exemption"
        )


def check_method(cls: type[Method], reference: Reference | None = None) -> None:
    """Check every property, and the reference if there is one. Raises ContractViolation that
    lists all that is broken."""
    from fusewright.testing._reference import check_reference

    broken = []
    for name in PROPERTIES:
        try:
            check_property(cls, name)
        except ContractViolation as error:
            broken.append(str(error))
    if reference is not None:
        try:
            check_reference(cls, reference)
        except ContractViolation as error:
            broken.append(str(error))
    if broken:
        raise ContractViolation("\n\n".join(broken))


def cases(methods: Iterable[type[Method]] | None = None) -> list[tuple[type[Method], str]]:
    """(method, property name) for each property that speaks of each method; every registered
    method unless some are given. Made for ``pytest.mark.parametrize``."""
    if methods is None:
        methods = registry.registry().values()
    return [(cls, name) for cls in methods for name, p in PROPERTIES.items() if p.applies(cls)]
