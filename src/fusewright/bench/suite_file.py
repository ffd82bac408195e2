"""What a suite's YAML may say, and how it is read: models and tasks as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusewright.errors import FusewrightError, nearest
from fusewright.strict_yaml import StrictYAML

VERSION = 1
SHIPPED = Path(__file__).parent / "suites"


class SuiteError(FusewrightError):
    """A suite is not understood, or names what is not there."""

    exit_code = 2


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Opens(_Part):
    """How a model's folder becomes a module: ``transformers.MODEL.from_pretrained(folder,
    **arguments)``, or ``create_model(MODEL, **arguments)`` of timm or OpenCLIP, filled with the
    folder's tensors."""

    library: Literal["transformers", "timm", "open_clip"] = "transformers"
    model: str = Field("AutoModel", description="a class of transformers, or a name that timm or "
                       "OpenCLIP knows; AutoModel: what the folder's own config says")  # fmt: skip
    arguments: dict[str, Any] = Field({}, description="what makes the module is called with them")

    @property
    def named(self) -> str | None:
        """The model's name, if it is not left to the folder's config."""
        return None if self.model == "AutoModel" else self.model


class TaskSpec(_Part):
    """A question about a data set. ``splits`` are slices as ``datasets`` writes them:
    "train[200:]"; ``train`` may be absent where nothing is trained."""

    kind: str = Field(description='"image-classification", "text-classification", …')
    question: str = ""
    data: str | None = Field(None, description="folder of parquet files, or texts, under --data")
    hub: str | None = Field(None, description="data set on the Hugging Face Hub")
    config: str | None = Field(None, description="its configuration, if it has several")
    revision: str | None = Field(None, description="its revision on the Hub")
    columns: dict[str, str] = Field({}, description="role: column (image, text, label, target)")
    splits: dict[str, str] = Field({})
    shuffle: int | None = Field(None, description="seed of the rows' order before they are cut")
    head: str | None = Field(None, description="its tensor among the suite's heads; its own name")
    classes: list[str] | int | None = Field(None, description="names or number of classes")
    groups: dict[str, list[str]] | None = Field(None, description="coarser classes, of the data's")
    options: dict[str, Any] = Field({}, description="what else tasks of its kind take")
    licence: str = Field("", description="of the data")
    note: str = ""

    @property
    def named(self) -> list[str] | None:
        """The names of the classes that are told apart, where the suite says them."""
        if self.groups is not None:
            return list(self.groups)
        return self.classes if isinstance(self.classes, list) else None

    def rows(self, task: str, part: str) -> str:
        """A part's slice. Raises SuiteError, naming the ``task``, if there is none."""
        if part not in self.splits:
            raise SuiteError(f"the task {task!r} has no {part} split",
                             expected=", ".join(self.splits) or "splits: {test: ...}",
                             found=part)  # fmt: skip
        return self.splits[part]

    def source(self, part: str) -> dict[str, Any]:
        """What the rows of a part depend on, as far as the suite says: where they are, their
        slice, how columns are read. What is not said is left out."""
        asked = {"question", "licence", "note", "head", "options", "splits"}
        said = self.model_dump(exclude=asked, exclude_defaults=True)
        return said | {"rows": self.splits[part]}


class ZeroShot(_Part):
    """Heads from class names, by a CLIP model's text encoder: means over ``templates``."""

    model: str = Field(description="a CLIP model with both encoders")
    templates: list[str] = Field(["a photo of a {}."], description="unless a task has its own")


class Build(_Part):
    """How the pool is made where no public checkpoints are used."""

    builder: str = Field(description="a pool builder's name")
    parameters: dict[str, Any] = {}


class Variant(_Part):
    """Other models for the same tasks: LoRA experts, another size."""

    base: str | None = None
    experts: dict[str, str] | None = None
    heads: str | None = None
    axes: dict[str, str] = Field(
        {}, description='how results call it, {tuning: "LoRA"}; by its name, if nothing is said'
    )


class SuiteSpec(_Part):
    """A suite. With ``build``, or ``models_of`` another suite that has it, models are paths inside
    the pool's folder of one seed (POOL/seed-0); else they are Hub ids (org/name@revision). A file
    may start from another: ``extends: NAME`` takes over what it says; mappings are merged key by
    key, null removes a key, and the rest is replaced (a JSON merge patch, RFC 7396)."""

    suite: int = Field(VERSION, description="the schema's version")
    title: str
    about: str = ""
    licence: str = Field("", description="notes on the licences of models and data")
    opens: Opens = Field(default_factory=lambda: Opens.model_validate({}))
    base: str
    experts: dict[str, str]
    heads: str | None = Field(None, description="safetensors with a head (classes, width) by task")
    zero_shot: ZeroShot | None = None
    own_heads: str | None = Field(None, description="tensor of a task's expert that is its head")
    optional: list[str] = Field([], description="patterns of tensors that base or experts lack")
    crop_vocabulary: bool = Field(False, description="cut experts' rows beyond the base's")
    extras: dict[str, str] = Field({}, description="more models by row, such as joint training")
    tasks: dict[str, TaskSpec]
    merged: list[str] = Field([], description="tasks whose experts are merged; all with experts")
    unseen: list[str] = Field([], description="tasks left out of the merge; the other tasks")
    seeds: list[int] = Field([0], description="seeds of the pool's training")
    axes: dict[str, str] = Field({}, description='what cells say of it: {size: "small"}')
    variants: dict[str, Variant] = {}
    build: Build | None = None
    models_of: str | None = Field(None, description="the suite that trains these models")
    rows: str | None = Field(None, description="a manifest of its data's rows: its name, or YAML")

    def model_post_init(self, context: Any) -> None:
        if not self.merged:
            found = [name for name in self.tasks if name in self.experts]
            object.__setattr__(self, "merged", found)
        if not self.unseen:
            left = [name for name in self.tasks if name not in self.merged]
            object.__setattr__(self, "unseen", left)

    @property
    def is_trained(self) -> bool:
        """Whether its models are trained on the user's machine."""
        return self.build is not None or self.models_of is not None

    def digest(self) -> str:
        """Twelve hex digits of what the suite says and results can depend on; models count by
        their bytes, wherever they come from."""
        whole = ("title", "about", "licence", "seeds", "variants", "build", "models_of", "rows")
        left: Any = {key: True for key in whole}
        left["tasks"] = {"__all__": {"question", "licence", "note"}}
        said = self.model_dump_json(exclude=left, exclude_defaults=True)
        return sha256(said.encode()).hexdigest()[:12]

    def sources(self) -> dict[str, dict[str, Any]]:
        """What the training rows of each task that has some depend on."""
        return {n: t.source("train") for n, t in self.tasks.items() if "train" in t.splits}

    def pool_digest(self) -> str:
        """Twelve hex digits of what the pool is trained from: a test split is no part of it."""
        tasks = {name: self.sources().get(name, {}) for name in self.tasks}
        build = self.build.model_dump() if self.build is not None else None
        if build is not None:  # a pool can be given another tuning later
            build["parameters"].pop("tunings", None)
        said = json.dumps([build, self.base, self.experts, tasks], sort_keys=True, default=str)
        return sha256(said.encode()).hexdigest()[:12]


def shipped() -> dict[str, Path]:
    """The suites that come with fusewright, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def find_suite(name: str | Path) -> Path:
    """The file of a shipped suite's name, or of a path. SuiteError names the nearest."""
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    if path.is_file():
        return path
    close = nearest(str(name), list(known))
    raise SuiteError(
        f"there is no suite {str(name)!r}", expected=f"{', '.join(known)}, or a suite's YAML file",
        fix=f"did you mean {close!r}?" if close else "see `fusewright suite list`",
    )  # fmt: skip


def read_suite(path: Path) -> SuiteSpec:
    """A suite from its file. YAML anchors, tags and repeated keys are refused, as in recipes.

    Raises SuiteError for a file that is not one, a newer schema, unknown keys (naming the
    nearest), and names that do not go together.
    """
    fields = _fields(path)
    try:
        spec = SuiteSpec(**{str(key): value for key, value in fields.items()})
    except ValidationError as error:
        raise _refusal(error, path) from error
    _check_names(spec, path)
    return spec


def _fields(path: Path, above: tuple[Path, ...] = ()) -> dict[Any, Any]:
    """What a file says, together with the suites that it extends; ``above`` extend this one."""
    fields = _parsed(path)
    _check_version(fields, path)
    name = fields.pop("extends", None)
    if fields.get("models_of") is not None:
        fields["models_of"] = str(_beside(path, fields["models_of"]))
    if name is None:
        return fields
    other = find_suite(_beside(path, name))
    if other.resolve() in (*above, path.resolve()):
        raise SuiteError("the suites extend each other", where=path, found=f"extends: {name}")
    return _patched(_fields(other, (*above, path.resolve())), fields)


def _beside(path: Path, name: Any) -> Path | str:
    """A suite that another names: a file beside it, or whatever has that name."""
    beside = path.parent / str(name)
    return beside if beside.is_file() else str(name)


def _patched(below: Mapping[Any, Any], patch: Mapping[Any, Any]) -> dict[Any, Any]:
    """A JSON merge patch (RFC 7396) applied."""
    found = {key: value for key, value in below.items() if patch.get(key, value) is not None}
    for key, value in patch.items():
        if isinstance(value, dict):
            own = below.get(key)
            found[key] = _patched(own if isinstance(own, dict) else {}, value)
        elif value is not None:
            found[key] = value
    return found


def _parsed(path: Path) -> dict[Any, Any]:
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictYAML)
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError("the suite cannot be read", where=path, found=error) from error
    except yaml.YAMLError as error:
        raise SuiteError("the suite is not plain YAML", where=path, found=error) from error
    if not isinstance(fields, dict):
        raise SuiteError("a suite is a mapping", where=path, found=type(fields).__name__)
    return fields


def _check_version(fields: Mapping[str, Any], path: Path) -> None:
    version = fields.get("suite", VERSION)
    if type(version) is not int or version < 1:
        raise SuiteError("the suite's schema version is not understood", where=path,
                         expected=f"suite: {VERSION}", found=f"suite: {version!r}")  # fmt: skip
    if version > VERSION:
        raise SuiteError("the suite is of a newer schema", where=path,
                         expected=f"suite: {VERSION}", found=f"suite: {version}",
                         fix="pip install --upgrade fusewright")  # fmt: skip


_MODELS: dict[str, type[BaseModel]] = {
    "opens": Opens, "zero_shot": ZeroShot, "tasks": TaskSpec, "build": Build, "variants": Variant,
}  # fmt: skip


def _refusal(error: ValidationError, path: Path) -> SuiteError:
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    where, key = ".".join(map(str, first["loc"])), str(first["loc"][-1])
    model = _MODELS.get(str(first["loc"][0]), SuiteSpec) if len(first["loc"]) > 1 else SuiteSpec
    if first["type"] == "extra_forbidden":
        known = list(model.model_fields)
        close = nearest(key, known)
        return SuiteError(f"the suite has an unknown key {where!r}", where=path,
                          expected=", ".join(known),
                          fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    missing = first["type"] == "missing"
    return SuiteError(
        f"the suite's {where!r} is {'missing' if missing else 'not valid'}", where=path,
        expected=None if missing else first["msg"].removeprefix("Value error, "),
        found=None if missing else repr(first["input"]),
    )  # fmt: skip


def _check_names(spec: SuiteSpec, path: Path) -> None:
    """Every name that one part of a suite uses of another must be there."""
    experts = list(spec.experts)
    uses = [("merged", spec.merged, list(spec.tasks)), ("unseen", spec.unseen, list(spec.tasks))]
    uses += [("merged", spec.merged, experts)]
    if spec.own_heads is not None:
        uses += [("own_heads", list(spec.tasks), experts)]
    uses += [(f"variants.{n}", list(v.experts or ()), experts) for n, v in spec.variants.items()]
    for key, names, known in uses:
        for name in names:
            if name not in known:
                close = nearest(name, known)
                what = "expert" if known is experts else "task"
                raise SuiteError(f"{key} names {name!r}, which is no {what} of the suite",
                                 where=path, expected=", ".join(known) or "none",
                                 fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    for key in ("merged", "unseen", "seeds"):
        listed: list[Any] = getattr(spec, key)
        twice = next((one for one in listed if listed.count(one) > 1), None)
        if twice is not None:  # it would count twice in means
            raise SuiteError(f"{key} names {twice!r} twice", where=path,
                             fix="leave one of them out")  # fmt: skip
    said = [k for k in ("heads", "zero_shot", "own_heads") if getattr(spec, k) is not None]
    if len(said) > 1:
        raise SuiteError("heads come from one place", where=path, found=", ".join(said))
    both = set(spec.merged) & set(spec.unseen)
    if both or not spec.merged:
        raise SuiteError(
            "a task is merged or unseen, not both" if both else "nothing is merged", where=path,
            found=", ".join(sorted(both)) or "no task has an expert",
        )  # fmt: skip
