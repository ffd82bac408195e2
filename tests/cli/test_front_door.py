"""``import fusewright as fw``: everything by name, nothing before it is asked for."""

from __future__ import annotations

import pytest

import fusewright as fw
from fusewright.methods.registry import registry


def test_every_method_is_reached_by_its_class_name() -> None:
    for cls in registry().values():
        assert getattr(fw, cls.__name__) is cls
        assert cls.__name__ in dir(fw)


def test_every_door_opens() -> None:
    doors = "merge", "plan", "load", "inspect", "check", "verify", "finetune", "Expert", "Merged"
    for name in doors:
        assert callable(getattr(fw, name)), name
        assert name in dir(fw)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(AttributeError, match="did you mean 'Ties'"):
        fw.Tiess  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fw.nothing  # noqa: B018


def test_asking_for_what_is_not_a_method_is_an_attribute_error() -> None:
    assert not hasattr(fw, "__wrapped__") and not hasattr(fw, "Nothing")
