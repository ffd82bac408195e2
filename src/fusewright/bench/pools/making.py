"""How any pool is made: the claim to a folder, part after part, and the provenance."""

from __future__ import annotations

import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from fusewright.bench.digits.model import threads
from fusewright.bench.pools import parts
from fusewright.bench.progress import Step
from fusewright.bench.suite_file import SuiteError, SuiteSpec
from fusewright.errors import OutputError, nearest
from fusewright.extras import needs

BASE = "base"
TUNINGS = {"full": "experts", "lora": "lora"}
"""How experts are tuned, and the folder of those that are."""
_TUNINGS = "tunings"


@dataclass(frozen=True)
class PoolRecipe:
    """What every pool depends on, beside data and seed.

    ``tunings`` ("full", "lora") are made besides those of the suite's experts. Rates are peaks of
    one cycle; ``lora_rank`` is that of adapters.
    """

    expert_rate: float = 1.5e-4
    tunings: tuple[str, ...] = ()
    lora_rank: int = 8
    lora_rate: float = 1e-3
    threads: int = 1  # sums depend on the number

    @property
    def reports(self) -> tuple[int, int]:
        """How often the base's training reports, and an expert's."""
        raise NotImplementedError

    def claim(self) -> dict[str, Any]:
        """What a pool of this recipe is made by; ``tunings`` say what is made, not how."""
        return {name: value for name, value in asdict(self).items() if name != _TUNINGS}


Parameters = TypeVar("Parameters")
P = TypeVar("P", bound=PoolRecipe)


def read_parameters(spec: SuiteSpec, recipe: type[Parameters]) -> Parameters:
    """The suite's ``build.parameters`` as a recipe. Raises SuiteError for one that is not known."""
    given = dict(spec.build.parameters if spec.build is not None else {})
    known = [field.name for field in fields(recipe)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            close = nearest(key, known)
            raise SuiteError("the recipe has an unknown parameter", where="build.parameters",
                             found=key, expected=", ".join(known),
                             fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    if _TUNINGS in given:
        given[_TUNINGS] = tuple(given[_TUNINGS])
        if odd := set(given[_TUNINGS]) - set(TUNINGS):
            raise SuiteError("experts are tuned in no such way", where="build.parameters.tunings",
                             found=", ".join(sorted(odd)), expected=", ".join(TUNINGS))  # fmt: skip
    return recipe(**given)


def versions(*modules: str) -> dict[str, str]:
    """What a training's last digits may depend on."""
    import torch

    import fusewright

    return {
        "fusewright": fusewright.__version__, "torch": torch.__version__,
        **{name: needs(name, "demo").__version__ for name in ("transformers", *modules)},
        "python": platform.python_version(), "processor": platform.machine(),
    }  # fmt: skip


class Maker(ABC, Generic[P]):
    """A pool of one recipe and seed in the folder ``out``; what it has already is kept.

    Kinds of pools say how their data are read (``load``), what they were (``read``), and how their
    parts are made from them (``make``). A pool can be given more parts later.
    """

    libraries: ClassVar[tuple[str, ...]] = ()
    """Named in the provenance, beside torch and transformers."""

    def __init__(
        self, spec: SuiteSpec, out: Path, recipe: P, seed: int, device: str = "cpu"
    ) -> None:
        self.spec, self.out, self.recipe, self.seed = spec, out, recipe, seed
        self.device = device
        self.experts = [name for name in spec.tasks if name in spec.experts]
        self.made: dict[str, Mapping[str, Any]] = {}

    @abstractmethod
    def load(self, data: Path | None) -> None:
        """Read the training rows."""

    @abstractmethod
    def read(self) -> Mapping[str, Mapping[str, Any]]:
        """Of every task that was loaded: "sha256", the same for the same rows from any source,
        and how much it was."""

    @abstractmethod
    def wanted(self) -> Sequence[str]:
        """The names of the last parts: with these, a pool is finished."""

    @abstractmethod
    def make(self, progress: bool) -> None:
        """Make all parts that are not there yet, each by :meth:`part`."""

    def run(self, data: Path | None, progress: bool) -> None:
        """All parts that are not there yet, then the provenance.

        Raises OutputError if the folder holds models of another recipe or of other data.
        """
        path = self.out / parts.PROVENANCE
        claim = {"recipe": self.recipe.claim(), "seed": self.seed, "tasks": list(self.spec.tasks),
                 "experts": self.experts}  # fmt: skip
        with parts.pool(self.out, claim), threads(self.recipe.threads):
            earlier = json.loads(path.read_text("utf-8")) if path.exists() else {}
            parts.claim(self.out / parts.SOURCES, self.spec.sources(), "other training data")
            if earlier and all(part in earlier["parts"] for part in self.wanted()):
                return
            self.load(data)
            sources = self._sources()
            _check_same(earlier.get("data", {}), sources, path)
            self.make(progress)
            parts.write_json(path, {**claim, "data": sources, **self._facts(earlier)})

    def part(
        self, name: str, reports: int, step: Step, make: Callable[[Path, Step], dict[str, Any]]
    ) -> None:
        """A part of an earlier run, or made now; ``make`` reports so many steps."""

        def said(what: str) -> None:
            step(f"{name}, {what}")

        path = self.out / name
        if path.exists():
            for _ in range(reports):
                said("kept")
        path.parent.mkdir(exist_ok=True)
        self.made[name] = parts.make_part(path, lambda at: make(at, said))

    def _sources(self) -> dict[str, Any]:
        tasks = self.spec.tasks
        return {
            name: {
                "data": tasks[name].data, "hub": tasks[name].hub,
                "rows": tasks[name].splits.get("train"), **said, "licence": tasks[name].licence,
            }
            for name, said in self.read().items()
        }  # fmt: skip

    def _facts(self, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """Of every part. One added later names its versions, where they are others."""
        now = versions(*self.libraries)
        old, first = earlier.get("parts", {}), earlier.get("versions", now)
        own = {} if first == now else {"versions": now}
        added = {name: {**facts, **own} for name, facts in self.made.items() if name not in old}
        return {"parts": {**old, **added}, "versions": first}


def _check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raises OutputError if the pool that is there was trained on other rows."""
    for name in earlier.keys() & now.keys():
        before, found = earlier[name]["sha256"], now[name]["sha256"]
        if before != found:
            raise OutputError(
                f"the pool was trained on other rows of {name!r}", where=path,
                expected=f"sha256 {before}", found=f"sha256 {found}",
                fix=f"--data of the folder that it was built from, or remove '{path.parent}'",
            )  # fmt: skip
