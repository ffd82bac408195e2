"""What made a merge: the recipe and the method that a person wrote, the models, what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusewright.engine.inputs import Inputs
from fusewright.engine.read_digests import content_of
from fusewright.methods.contract import Composite, Method, Stage
from fusewright.methods.pipeline import Pipeline, as_pipeline


@dataclass(frozen=True)
class Source:
    """A model of a recipe: what it is called, where it lies, and the content that was read."""

    label: str
    root: Path | None = None
    files: tuple[tuple[str, int], ...] = ()
    """Their paths and bytes."""
    content: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        files = [{"path": path, "bytes": size} for path, size in self.files]
        return {"label": self.label, "files": files, **self.content}


def sources(inputs: Inputs, read: Mapping[str, Any] | None = None) -> dict[str, Source]:
    """A recipe's models, open; ``read``: their digests, where a run has read them already."""
    return {
        label: Source(
            weights.label, weights.root, tuple((str(i.path), i.size) for i in weights.identities()),
            content_of(weights) if read is None else read.get(label, {}),
        )
        for label, weights in inputs.all().items()
    }  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """The ``recipe``, as it would be written, and the ``method`` of a person, where what is written
    or executed is what came of them; ``report``: how that went. ``models``: those of the recipe,
    where what is executed does not read them."""

    recipe: Mapping[str, Any]
    method: Method
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)
    models: Mapping[str, Source] = field(default_factory=dict, repr=False)

    @property
    def stages(self) -> Sequence[Method]:
        """The methods whose papers are to be named."""
        if isinstance(self.method, Stage | Composite | Pipeline):
            return as_pipeline(self.method).chain
        return (self.method,)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        models = {label: source.to_json() for label, source in self.models.items()}
        return {"recipe": self.recipe, **self.report, "models": models}
