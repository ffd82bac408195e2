from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusewright.layout import canonical_order, pattern


def test_numbers_are_ordered_as_numbers() -> None:
    names = ["layers.10.w", "layers.2.w", "layers.2.b", "a", "layers.1"]
    assert canonical_order(names) == ["a", "layers.1", "layers.2.b", "layers.2.w", "layers.10.w"]


@given(st.lists(st.text("ab.0129", max_size=8), unique=True), st.randoms())
def test_the_order_is_total_and_does_not_depend_on_the_input_s(names, random) -> None:
    shuffled = names[:]
    random.shuffle(shuffled)
    assert canonical_order(shuffled) == canonical_order(names)


def test_a_pattern_hides_numbers_only() -> None:
    assert pattern("layers.12.conv1.weight") == "layers.*.conv1.weight"
