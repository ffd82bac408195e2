"""The contract of every method: measure in rounds, solve, combine.

A method is a frozen value whose fields are its parameters. Its kinds:

* a **stage**: :class:`Transform` (of each task vector), :class:`Merger` (of all into one) or
  :class:`Finish` (of the merged vector). Stages compose with ``>>`` into a *Map*, a
  :class:`~fusewright.methods.pipeline.Pipeline`; a :class:`Composite` names such a pipeline.
* a :class:`Program` runs models or searches, and answers with the Map to be executed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fusewright.errors import RecipeError, nearest
from fusewright.layout.spec import TensorLayout
from fusewright.methods.partials import Partial
from fusewright.methods.random import Stream
from fusewright.methods.settings import OTHERS, Reach, plain, reach_of

if TYPE_CHECKING:
    from torch import nn

    from fusewright.methods.pipeline import Pipeline
    from fusewright.modules.layer import Layer
    from fusewright.modules.vectors import TaskVectors
    from fusewright.weights.spec import LowRank


Data = Literal["none", "unlabelled", "labelled"]
"""What a method learns from."""


@dataclass(frozen=True)
class Card:
    """What a method is and asks for: the source of tables, documentation and refusals.

    ``base``: whether a base is "required", "optional" or "unused". ``experts``: (fewest, most) or
    None for no bound. ``data``: "none", "unlabelled" or "labelled". ``output``: "weights",
    "parts", a "routed" module, or "answers" of models that stay apart. ``task_id``: whether the
    result must be told the task of every input (``module.set_task``). ``cost``: passes over the
    inputs and the dominant operation, in words. ``exempt`` names identities of the contract suite
    that do not hold, each with its reason.
    """

    title: str
    paper: str
    arxiv: str | None = None
    base: Literal["required", "optional", "unused"] = "required"
    experts: tuple[int, int | None] = (1, None)
    data: Data = "none"
    output: Literal["weights", "parts", "routed", "answers"] = "weights"
    task_id: bool = False
    cost: str = "one pass"
    exempt: Mapping[str, str] = field(default_factory=dict)


class Unit(StrEnum):
    """How much of a tensor must be seen at once."""

    CHUNK = "chunk"      # any run of canonical blocks, flat
    ROWS = "rows"        # whole rows of the last axis, as (rows, columns)
    TENSOR = "tensor"    # the whole tensor in its shape


@dataclass(frozen=True)
class At:
    """Where a unit lies, and everything a stage may know besides the numbers.

    ``params`` holds the stage's parameters for this tensor: scalars, or one for each expert (a
    tuple) where the field is PerExpert. ``solved`` holds what its rounds found, by round name.
    ``shape`` is the whole tensor's; elements [start, stop) of the flattened tensor are seen. In
    ``solve`` of a round over the model, ``shape`` is (number of elements of all tensors,).
    """

    tensor: str
    shape: tuple[int, ...]
    start: int
    stop: int
    experts: tuple[str, ...]
    layout: TensorLayout
    dtype: torch.dtype = torch.float32
    seed: int = 0
    params: SimpleNamespace = field(default_factory=SimpleNamespace)
    solved: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor (or, in model-wide solves, of all tensors)."""
        return int(torch.Size(self.shape).numel())

    def words(self, expert: int, device: torch.device | None = None) -> Tensor:
        """The random words of this unit for one expert: (stop - start,) int64 in [0, 2**32)."""
        stream = Stream.of(self.seed, self.experts[expert], self.tensor)
        return stream.words(self.start, self.stop, device)

    def replaced(self, **changes: Any) -> At:
        return replace(self, **changes)


@dataclass(frozen=True)
class Seen:
    """What a round measures: the vectors as they reach its stage (task vectors, or weights for a
    merger of weights), the base, and for a Finish the merged vector. For a Finish ``vectors`` are
    the original task vectors."""

    vectors: Sequence[Tensor]
    base: Tensor | None = None
    merged: Tensor | None = None


@dataclass(frozen=True)
class Round:
    """One round: ``measure`` every unit, combine the partials exactly, ``solve`` once.

    ``scope`` says over what: each "tensor" or the whole "model". What ``solve`` returns must be
    plain JSON (numbers, lists, dicts): it is journaled, reported, and given to later rounds and
    to combine as ``at.solved[name]``. Parameters in ``uniform`` must not vary over tensors when
    the scope is the model.

    A round may be a sample: of units that can be cut anywhere, it sees one canonical block in
    ``every``, from a tensor's first on; what is exact must not depend on it. And it may be
    ``needed`` only where earlier rounds did not suffice; where it is not, nothing is measured, and
    ``solve`` gets None.
    """

    name: str
    scope: Literal["tensor", "model"]
    measure: Callable[[Seen, At], Partial]
    solve: Callable[[Any, At], Any]
    uniform: tuple[str, ...] = ()
    every: int = 1
    needed: Callable[[At], bool] = lambda at: True
    seldom: bool = False
    """Whether it is hardly ever needed: plans leave it out of their costs."""

    @property
    def whole(self) -> bool:
        """Whether it sees every element, as a rule."""
        return self.every == 1 and not self.seldom


class Method(BaseModel, ABC):
    """A frozen value; its fields are its parameters, with its paper's defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    name: ClassVar[str] = ""
    card: ClassVar[Card]
    profiles: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Parameter values that other implementations use: "paper", "fusionbench", "mergekit"."""

    def __init__(self, **params: Any) -> None:
        try:
            super().__init__(**params)
        except ValidationError as error:
            raise _refusal(type(self), error, params) from error

    @classmethod
    def profile(cls, profile: str, **params: Any) -> Self:
        """The method with the defaults of another implementation, then ``params`` over them."""
        if profile not in cls.profiles and profile != "paper":
            known = sorted({"paper", *cls.profiles})
            raise RecipeError(
                f"{cls.name} has no profile {profile!r}", expected=f"one of {', '.join(known)}"
            )
        given = dict(cls.profiles.get(profile, {}))
        for name, value in params.items():
            by_expert = isinstance(value, Mapping) and set(value) != {"layers"}
            given[name] = {OTHERS: given[name], **value} if by_expert and name in given else value
        return cls(**given)

    @classmethod
    def per_expert_fields(cls) -> tuple[str, ...]:
        """The parameters that may be written beside an expert in a recipe."""
        reach = {k: reach_of(f.metadata) for k, f in cls.model_fields.items()}
        return tuple(k for k, r in reach.items() if r is Reach.EXPERT)

    @property
    def needs(self) -> Data:
        """What data it learns from with these parameters: its card's, unless they say otherwise."""
        return self.card.data

    def spec(self) -> dict[str, Any]:
        """The method as it is written in recipes: {name: parameters}."""
        return {self.name: {k: plain(getattr(self, k)) for k in type(self).model_fields}}

    def __hash__(self) -> int:
        return hash(repr(self))

    def __call__(self, base: Tensor | None, experts: Sequence[Tensor], **where: Any) -> Tensor:
        """Merge bare tensors: :func:`fusewright.methods.door.on_tensors`."""
        from fusewright.methods.door import on_tensors

        return on_tensors(self, base, experts, **where)


def _refusal(method: type[Method], error: ValidationError, params: dict[str, Any]) -> RecipeError:
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    known = sorted(method.model_fields)
    if first["type"] == "extra_forbidden":
        close = nearest(key, known)
        return RecipeError(
            f"{method.name} has no parameter {key!r}",
            expected=", ".join(known) or "no parameters",
            fix=f"did you mean {close!r}?" if close else None,
        )
    reason = first["msg"].removeprefix("Value error, ")
    if "ctx" in first and isinstance(first["ctx"].get("error"), ValidationError):
        reason = first["ctx"]["error"].errors()[0]["msg"]
    return RecipeError(
        f"{method.name}: parameter {key!r} is not valid", expected=reason,
        found=repr(params.get(key)),
    )  # fmt: skip


class Stage(Method):
    """A step of a Map: it may measure in rounds, then it acts on units."""

    def rounds(self, dtype: torch.dtype) -> tuple[Round, ...]:
        """What must be known before acting; ``dtype`` is that of the arithmetic."""
        return ()

    def unit(self, shape: tuple[int, ...], layout: TensorLayout) -> Unit:
        """How much of a tensor of this shape must be seen at once."""
        return Unit.CHUNK

    def check(self, at: At) -> None:
        """Refuse resolved parameters that do not go together, before anything is read: called for
        every tensor when a merge is planned. Raises PlanError."""

    def stages(self) -> tuple[Stage, ...]:
        return (self,)

    def __rshift__(self, other: Stage | Pipeline | Composite) -> Pipeline:
        from fusewright.methods.pipeline import Pipeline

        return Pipeline(chain=(*self.stages(), *other.stages()))


class Transform(Stage):
    """Changes each task vector by itself (Trim, Drop …)."""

    @abstractmethod
    def apply(self, vector: Tensor, expert: int, at: At) -> Tensor:
        """The transformed task vector of one expert; same shape; inputs are not changed."""


class Merger(Stage):
    """Makes one vector of all (Sum, Elect, IsoC …).

    ``frame`` says what it merges: task vectors ("deltas"; the result is added to the base) or
    the weights themselves ("weights"; no base is needed).
    """

    frame: ClassVar[Literal["deltas", "weights"]] = "deltas"

    @abstractmethod
    def merge(self, vectors: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
        """The merged vector, before it is added to the base; inputs are not changed."""

    def merge_factors(self, factors: Sequence[LowRank | None], at: At) -> LowRank | None:
        """The same on LoRA factors (None = untouched), or NotImplemented if it needs them dense."""
        return NotImplemented


class Finish(Stage):
    """Changes the merged vector, and may see the original task vectors (LiNeS …)."""

    @abstractmethod
    def finish(self, merged: Tensor, vectors: Sequence[Tensor], at: At) -> Tensor:
        """The merged vector in its final form; inputs are not changed."""


class Composite(Method):
    """A published method that is a pipeline of stages under a name of its own."""

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The stages, with this method's parameters passed on."""

    def __rshift__(self, other: Stage | Pipeline | Composite) -> Pipeline:
        from fusewright.methods.pipeline import Pipeline

        return Pipeline(chain=(*self.stages(), *other.stages()))


class Fold(Method):
    """A sequential method: each arrival is one Map over the base, what was merged so far, and the
    newcomer; its output, complete or absent as any other, is the state that the next one sees."""

    @abstractmethod
    def arrive(self, index: int, memory: Mapping[str, Any]) -> Stage | Pipeline | Composite:
        """The Map of the arrival ``index``: over the experts ("merged", "newcomer") of which the
        first arrival has only the newcomer. ``memory`` is what earlier arrivals left."""

    def remember(self, memory: Mapping[str, Any], solved: Mapping[str, Any]) -> dict[str, Any]:
        """The memory after an arrival whose rounds solved to ``solved``; plain JSON."""
        return dict(memory)


@dataclass(frozen=True)
class Fitted:
    """What a program found: the Map to execute, over which experts, and what it measured.

    What is no Map of the experts (a mask for each element) is given as ``state``: merged tensors
    under the names of the context's module, in float32 or better; the others are the base's.
    """

    method: Stage | Pipeline | Composite | None = None
    experts: tuple[str, ...] | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] | None = field(default=None, repr=False)


class Program(Method):
    """A method that runs models or searches; fitting returns a Map, which the engine executes, or
    the merged tensors."""

    @abstractmethod
    def fit(self, context: Context) -> Fitted:
        """Choose what to execute, by trials in ``context``."""


@dataclass(frozen=True)
class Parts:
    """What a routed method built: ``layers`` by the path where they go, those of
    :class:`~fusewright.modules.layer.Replacement` each holding the layer it replaces; ``tensors``
    of the rest of the module that are not the base's any more; what it measured."""

    layers: Mapping[str, Layer]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


class Routed(Method):
    """A method whose result sends each input its own way: a module with routed layers."""

    @property
    def routes(self) -> bool:
        """Whether that is so with these parameters; a method that is a Program too may answer with
        an ordinary merge instead."""
        return True

    @abstractmethod
    def build(self, context: Context) -> Parts:
        """The layers that take the place of the base's. ``context.module()`` may be changed: it is
        what they are put into."""


class Context(ABC):
    """What a program may use: trial merges, the evaluator and the data that the caller gave."""

    base: Any
    experts: Mapping[str, Any]
    data: Any
    seed: int
    tell: Callable[[int, int, float], None] | None = None
    """Hears of (steps done, steps in all, loss) of a fit."""
    device: torch.device = torch.device("cpu")
    """Where the module and the task vectors are."""

    @abstractmethod
    def merge(self, method: Method, experts: Sequence[str] | None = None) -> Mapping[str, Tensor]:
        """A trial merge in memory, as a state dict."""

    @abstractmethod
    def evaluate(self, weights: Mapping[str, Tensor]) -> float:
        """The score of a trial (larger is better) by the caller's ``evaluate`` function."""

    @abstractmethod
    def module(self) -> nn.Module:
        """The base as a module in evaluation mode: what is run with merged weights."""

    @abstractmethod
    def vectors(self) -> TaskVectors:
        """The experts' task vectors, under the names of the module's tensors."""

    @abstractmethod
    def stored(self, name: str) -> str:
        """What the checkpoints call a tensor of the module."""

    def layout(self, name: str) -> TensorLayout:
        """What is known of a tensor of the module."""
        return TensorLayout(self.stored(name))

    def checkpoint(self, stage: str, asked: Callable[[], str]) -> Path | None:
        """Where a long fit keeps its few numbers, so that a killed one goes on: a file of this
        recipe, these models, this ``stage`` and what is ``asked`` (a digest) alone. None where a
        merge has no output folder to keep it beside."""
        return None
