"""The public contract suite over every registered method."""

from __future__ import annotations

import pytest

from fusewright.methods.contract import Method
from fusewright.testing import cases, check_property


@pytest.mark.parametrize(
    ("method", "name"), [pytest.param(m, n, id=f"{m.name}-{n}") for m, n in cases()]
)
def test_every_method_keeps_every_promise(method: type[Method], name: str) -> None:
    check_property(method, name)
