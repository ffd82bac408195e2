"""What the contract suite promises of methods that learn and route, and that it can fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fusewright.engine.routed_folder as engine
from fusewright.methods.contract import Card, Context, Fitted, Method, Parts, Program, Routed
from fusewright.methods.learned import asked
from fusewright.methods.routed import WEMoE
from fusewright.methods.static import Sum
from fusewright.modules import Replacement, Saved
from fusewright.modules.mixed import MixedLinear
from fusewright.testing import ContractViolation, check_method, check_property

AT = "classifier"


class Gate(Replacement):
    """f_0(x) + σ(mean x) Δ x."""

    kind: ClassVar[str] = "contract_gate"
    delta: Tensor

    def __init__(self, base: nn.Module, delta: Tensor) -> None:
        super().__init__(base)
        self.register_buffer("delta", delta)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.base(inputs) + self.gate(inputs) * (inputs @ self.delta.mT)
        return found

    def gate(self, inputs: Tensor) -> Tensor:
        return inputs.mean(dim=-1, keepdim=True).sigmoid()

    @property
    def active(self) -> int:
        return self.delta.numel()

    def described(self) -> dict[str, Any]:
        return {}

    @classmethod
    def restored(cls, saved: Saved) -> Gate:
        return cls(saved.base, saved.tensors["delta"])


class Gated(Routed):
    """Add the task vectors of the head as far as a gate says.

    It has no parameters.
    """

    name: ClassVar[str] = "contract_gated"
    card: ClassVar[Card] = Card("Gated", "none", output="routed")
    layer: ClassVar[type[Gate]] = Gate

    def build(self, context: Context) -> Parts:
        base = context.module().get_submodule(AT)
        return Parts({AT: self.layer(base, self.delta(context))})

    def delta(self, context: Context) -> Tensor:
        vectors = context.vectors()
        total = vectors.combined(f"{AT}.weight", torch.ones(len(vectors.experts)))
        return total.to(vectors.base[f"{AT}.weight"].dtype)


class Shifted(Program):
    """Weigh all task vectors alike, by the mean of the inputs.

    ``steps``: how far it goes, 2.
    """

    name: ClassVar[str] = "contract_shifted"
    card: ClassVar[Card] = Card("Shifted", "none", data="unlabelled")
    steps: int = 2

    def fit(self, context: Context) -> Fitted:
        weight = 0.3 + 0.01 * self.steps * self.mean(asked(context))
        return Fitted(Sum(weight=weight), report={"weight": weight})

    def mean(self, questions: Mapping[str, Any]) -> float:
        seen = [batch["pixel_values"] for q in questions.values() for batch in q.epoch(4, 0)]
        return float(torch.cat(seen).double().mean().tanh())


class OfTheBatch(Gate):
    kind: ClassVar[str] = "contract_of_the_batch"

    def gate(self, inputs: Tensor) -> Tensor:
        return inputs.mean().sigmoid()


class Adds(Gate):
    kind: ClassVar[str] = "contract_adds"

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + 1e-3


class Kindless(Gate):
    pass


class Forgets(Gate):
    kind: ClassVar[str] = "contract_forgets"

    def __init__(self, base: nn.Module, delta: Tensor, scale: float = 2.0) -> None:
        super().__init__(base, delta)
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * super().forward(inputs)

    @classmethod
    def restored(cls, saved: Saved) -> Forgets:
        return cls(saved.base, saved.tensors["delta"], 1.0)


class _OfTheBatch(Gated):
    layer: ClassVar[type[Gate]] = OfTheBatch


class _Adds(Gated):
    layer: ClassVar[type[Gate]] = Adds


class _Kindless(Gated):
    layer: ClassVar[type[Gate]] = Kindless


class _Forgets(Gated):
    layer: ClassVar[type[Gate]] = Forgets


class _Draws(Gated):
    def delta(self, context: Context) -> Tensor:
        return super().delta(context) + torch.randn(1)


class _ChangesAnExpert(Gated):
    def delta(self, context: Context) -> Tensor:
        next(iter(context.experts.values())).get_submodule(AT).weight.data.mul_(2)
        return super().delta(context)


class _NeedsTwo(Gated):
    def delta(self, context: Context) -> Tensor:
        assert context.vectors().experts[1]
        return super().delta(context)


class _Widens(Gated):
    def delta(self, context: Context) -> Tensor:
        return super().delta(context).float()


class _SaysItIsTold(Gated):
    card: ClassVar[Card] = Card("Gated", "none", output="routed", task_id=True)


class _ExemptWithoutNeed(Gated):
    card: ClassVar[Card] = Card("Gated", "none", output="routed", exempt={"each_alone": "so"})


class _ExemptFromManners(Gated):
    card: ClassVar[Card] = Card("Gated", "none", output="routed", exempt={"saved": "so"})


class _WrongMixed(MixedLinear):
    kind: ClassVar[str] = "contract_wrong_mixed"

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        return {name: 2 * tensor for name, tensor in super().merged(weights).items()}


class _WrongUnload(WEMoE):
    def _layer(self, linear: Any, model: Any, vectors: Any, mixture: Any) -> MixedLinear:
        made = super()._layer(linear, model, vectors, mixture)
        made.__class__ = _WrongMixed
        return made


class _LearnsAnyway(Shifted):
    def fit(self, context: Context) -> Fitted:
        return Fitted(Sum(weight=self.mean(asked(context))))


class _NeedsNoData(Shifted):
    def fit(self, context: Context) -> Fitted:
        return Fitted(Sum(weight=0.3 + 0.01 * len(getattr(context.data, "questions", {}))))


class _LearnsFromSome(Shifted):
    def fit(self, context: Context) -> Fitted:
        some = getattr(context.data, "questions", None) or asked(context)
        return Fitted(Sum(weight=0.3 + 0.01 * self.steps * self.mean(some)))


class _DrawsAWeight(Shifted):
    def fit(self, context: Context) -> Fitted:
        asked(context)
        return Fitted(Sum(weight=float(torch.rand(()))))


class _ReportsATensor(Shifted):
    def fit(self, context: Context) -> Fitted:
        asked(context)
        return Fitted(Sum(), report={"losses": torch.ones(2)})


class _ChangesData(Shifted):
    def mean(self, questions: Mapping[str, Any]) -> float:
        for question in questions.values():
            for batch in question.epoch(4, 0):
                batch["pixel_values"].mul_(2)
        return 0.0


class _KnowsWhereItGoes(Shifted):
    def fit(self, context: Context) -> Fitted:
        asked(context)
        written = context.checkpoint("any", lambda: "") is not None
        return Fitted(Sum(weight=0.4 if written else 0.3))


@pytest.mark.parametrize("sound", [Gated, Shifted])
def test_a_sound_method_passes(sound: type[Method]) -> None:
    check_method(sound)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (_OfTheBatch, "each_alone"),
        (_Adds, "nothing_changed"),
        (_Kindless, "saved"),
        (_Forgets, "saved"),
        (_Draws, "repeated"),
        (_ChangesAnExpert, "models_unchanged"),
        (_NeedsTwo, "one_model"),
        (_Widens, "narrow"),
        (_SaysItIsTold, "told"),
        (_ExemptWithoutNeed, "each_alone"),
        (_ExemptFromManners, "saved"),
        (_WrongUnload, "unloaded"),
        (_LearnsAnyway, "no_steps"),
        (_NeedsNoData, "missing_data"),
        (_LearnsFromSome, "missing_data"),
        (_DrawsAWeight, "repeated"),
        (_ReportsATensor, "repeated"),
        (_ChangesData, "models_unchanged"),
        (_KnowsWhereItGoes, "streamed"),
    ],
)
def test_a_broken_method_fails(broken: type[Method], promise: str) -> None:
    with pytest.raises(ContractViolation, match=promise):
        check_property(broken, promise)


def test_a_file_that_opens_over_any_base_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_property(Gated, "another_base")
    monkeypatch.setattr(engine, "_check_shapes", lambda *given: None)
    with pytest.raises(ContractViolation, match="another base"):
        check_property(Gated, "another_base")


def test_an_exemption_is_backed_by_a_counterexample() -> None:
    exempt = Card("Gated", "none", output="routed", exempt={"each_alone": "the batch decides"})
    members = {"card": exempt, "__module__": __name__, "__doc__": Gated.__doc__}
    check_property(type("Exempt", (_OfTheBatch,), members), "each_alone")
