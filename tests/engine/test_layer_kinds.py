"""Layers of other packages: known where their class is, refused with a fix where it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fusewright as fw
from fusewright.errors import PlanError, WeightsError
from fusewright.methods import registry
from fusewright.methods.contract import Card, Context, Parts, Routed
from fusewright.modules.layer import Layer, Replacement, Saved, layer_kinds, restorable
from fusewright.modules.routed import RoutedLinear

FACTOR = """
from typing import ClassVar
import torch
from fusewright.modules.layer import Replacement

class Factor(Replacement):
    kind: ClassVar[str] = "elsewhere_factor"

    def __init__(self, base, factor):
        super().__init__(base)
        self.register_buffer("factor", factor)

    def forward(self, inputs):
        return self.base(inputs) * self.factor

    active = property(lambda self: 1)

    def described(self):
        return {}

    @classmethod
    def restored(cls, saved):
        return cls(saved.base, saved.tensors["factor"])
"""


class Doubled(Replacement):
    kind: ClassVar[str] = "doubled"

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = 2 * self.base(inputs)
        return found

    @property
    def active(self) -> int:
        return 0

    def described(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restored(cls, saved: Saved) -> Doubled:
        return cls(saved.base)


class Kindless(Doubled):
    def forward(self, inputs: Tensor) -> Tensor:
        return 3 * super().forward(inputs)


class Doubles(Routed):
    name: ClassVar[str] = "doubles"
    card: ClassVar[Card] = Card("Doubles", "none", output="routed")
    layer: ClassVar[type[Doubled]] = Doubled

    def build(self, context: Context) -> Parts:
        return Parts({"0": self.layer(context.module().get_submodule("0"))})


class Triples(Doubles):
    name: ClassVar[str] = "triples"
    layer: ClassVar[type[Doubled]] = Kindless


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


def built(method: Routed) -> Any:
    return fw.merge(method, base=network(), experts={"a": network(), "b": network()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    built(Doubles()).save(tmp_path / "out")
    return tmp_path / "out"


def test_a_layer_of_this_process_comes_back(folder: Path) -> None:
    inputs = torch.randn(5, 3)
    loaded = fw.load(folder, module=network())
    assert torch.equal(loaded(inputs), built(Doubles()).module()(inputs))
    assert isinstance(loaded.get_submodule("0"), Doubled)


def test_a_kind_that_is_not_known_names_file_layer_kind_method_and_fix(folder: Path) -> None:
    said = json.loads((folder / "routed.json").read_text())
    said["layers"]["0"]["kind"] = "os.system"
    (folder / "routed.json").write_text(json.dumps(said))
    with pytest.raises(WeightsError) as refused:
        fw.load(folder, module=network())
    for part in (str(folder / "routed.json"), ": 0", "'os.system'", "'doubles'", "linear",
                 "install the package", "import the module"):  # fmt: skip
        assert part in str(refused.value)


@pytest.mark.parametrize("kind", [None, ["linear"], {"a": 1}, "", "collections:OrderedDict"])
def test_a_kind_is_a_name_and_nothing_is_imported_for_it(folder: Path, kind: Any) -> None:
    said = json.loads((folder / "routed.json").read_text())
    said["layers"]["0"]["kind"] = kind
    del said["method"]
    (folder / "routed.json").write_text(json.dumps(said))
    with pytest.raises(WeightsError, match="of a kind that is not known"):
        fw.load(folder, module=network())


class _Point:
    """An installed package's method, whose module defines a layer."""

    name, value = "far", "far_away:Far"

    def load(self) -> object:
        names: dict[str, Any] = {"__name__": "far_away"}
        exec(FACTOR, names)
        far = {"name": "far", "card": Card("Far", "none"), "__module__": "far_away",
               "__annotations__": {}}  # fmt: skip
        return type("Far", (Routed,), far)


def test_a_package_that_offers_a_method_offers_its_layers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    file = next(folder.glob("*.safetensors"))
    save_file({**load_file(file), "0.factor": torch.tensor(3.0)}, file)
    said = json.loads((folder / "routed.json").read_text())
    said["layers"]["0"]["kind"] = "elsewhere_factor"
    (folder / "routed.json").write_text(json.dumps(said))
    monkeypatch.setattr(registry, "entry_points", lambda group: [_Point()])
    registry.registry.cache_clear()
    try:
        loaded = fw.load(folder, module=network())
    finally:
        registry.registry.cache_clear()
    inputs = torch.randn(5, 3)
    first = network()[0](inputs) * 3  # type: ignore[index]
    assert torch.equal(loaded.get_submodule("0")(inputs), first)


def test_two_classes_of_one_kind_are_refused() -> None:
    with pytest.raises(PlanError, match="two classes of layers have the kind 'linear'") as refused:
        class Mine(RoutedLinear):
            kind: ClassVar[str] = "linear"
    assert "fusewright.modules.routed.RoutedLinear" in str(refused.value)
    assert layer_kinds()["linear"] is RoutedLinear


def test_a_class_may_be_written_again() -> None:
    def again() -> type[Layer]:
        class Cell(Doubled):
            kind: ClassVar[str] = "cell"
        return Cell

    first, second = again(), again()
    assert first is not second and layer_kinds()["cell"] is second
    assert restorable(first(nn.Linear(1, 1))), "a model that was built before can be saved still"


def test_a_layer_that_could_not_come_back_is_not_saved(tmp_path: Path) -> None:
    made = built(Triples())
    with pytest.raises(PlanError, match="no kind of its own") as refused:
        made.save(tmp_path / "out")
    assert "0: Kindless" in str(refused.value) and not (tmp_path / "out").exists()


def test_a_base_of_other_shapes_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match="a base of other shapes") as refused:
        fw.load(folder, module=network(5))
    assert "expected: (5,)" in str(refused.value) and "found:    (4,)" in str(refused.value)


def test_every_built_in_kind_is_known_in_a_fresh_process_whatever_packages_offer() -> None:
    own = [k for k, cls in layer_kinds().items() if cls.__module__.startswith("fusewright.")]
    code = f"""
import fusewright.engine.routed_folder as engine
del engine.registry.registry  # a package whose import fails
for kind in {own!r}:
    engine._kind(kind, "", {{}})
"""
    assert {"linear", "masks", "mixed", "routing"} <= set(own)
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
