"""Which rows a suite was measured on: a hash of every picture and its label, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from fusewright.bench.suite_file import SuiteError, SuiteSpec
from fusewright.extras import needs
from fusewright.tasks.errors import DataError
from fusewright.tasks.parquet import ParquetSplit
from fusewright.tasks.rows import DataSplit

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = Path(__file__).with_name("manifests")
SPLITS = ("train", "test")
BLOCK = 256
"""Rows that are read at once."""


class Preparation(BaseModel):
    """What was done to pictures of another size: resized to a square of ``size`` pixels by one of
    Pillow's filters, then perhaps inverted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    resample: str = "lanczos"
    invert: bool = False


class Origin(BaseModel):
    """Where a data set came from: files of a public repository at a commit, what became of them,
    and which data set of the Hub (``org/name``, its ``hub_splits``) should have the same rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: dict[str, list[str]]
    licence: str
    hub: str | None = None
    hub_splits: list[str] = ["train", "test"]
    prepare: Preparation | None = None
    note: str = ""


@dataclass(frozen=True)
class RowList:
    """Rows of one split, in order: hashes (n,) uint64 of :func:`fingerprint`, labels (n,) int64."""

    hashes: NDArray[np.uint64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.hashes)

    @classmethod
    def of(cls, split: DataSplit) -> RowList:
        """What a split holds. Raises DataError if a row cannot be read."""
        found = [fingerprint(picture) for picture in pictures_of(split)]
        return cls(np.array(found, np.uint64), split.labels())


@dataclass(frozen=True)
class DataSet:
    """A data set of a manifest; ``name`` is its folder below the data folder ("vision/mnist")."""

    name: str
    origin: Origin
    classes: tuple[str, ...]
    splits: Mapping[str, RowList]

    @property
    def short(self) -> str:
        """Its last name ("mnist")."""
        return self.name.rpartition("/")[2]

    @property
    def fix(self) -> str:
        """Commands that fetch its repositories to where they are looked for."""
        commands = []
        for source in self.origin.source:
            url, _, commit = source.partition("@")
            folder = f"sources/{self.short}/{url.rpartition('/')[2]}"
            commands.append(f"git clone {url} {folder} && git -C {folder} checkout -q {commit}")
        return f"{' && '.join(commands)}, then --from sources"

    def __len__(self) -> int:
        return sum(map(len, self.splits.values()))


def fingerprint(picture: Image) -> int:
    """XXH3 (64 bits) of width and height (little-endian uint32) and the pixels as RGB, uint8, row
    by row: the same for the same picture, whatever file it was kept in."""
    width, height = picture.size
    found = xxhash.xxh3_64(width.to_bytes(4, "little") + height.to_bytes(4, "little"))
    found.update(picture.convert("RGB").tobytes())
    return found.intdigest()


def pictures_of(split: DataSplit) -> Iterator[Image]:
    """The pictures of a split in order, a block of rows at a time."""
    for start in range(0, len(split), BLOCK):
        yield from split.rows(range(start, min(start + BLOCK, len(split))))["image"]


def manifest_of(spec: SuiteSpec) -> dict[str, DataSet]:
    """The data sets of a suite whose rows are published.

    Raises SuiteError if the suite names no manifest, or it does not have a task's data.
    """
    if spec.rows is None:
        raise SuiteError("the rows of this suite's data are not published", where=spec.title,
                         expected="rows: NAME in its YAML, of a manifest")  # fmt: skip
    found = read_manifest(spec.rows)
    wanted = dict.fromkeys(task.data for task in spec.tasks.values() if task.data)
    if absent := [name for name in wanted if name not in found]:
        raise SuiteError("the manifest lacks data of the suite", where=spec.rows,
                         expected=", ".join(absent), found=", ".join(found))  # fmt: skip
    return {name: found[name] for name in wanted if name}


def manifest_files(name: str) -> tuple[Path, Path]:
    """Where a manifest's origins and rows are, whether they are there or not."""
    path = FOLDER / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    return path, path.with_suffix(".parquet")


def read_manifest(name: str) -> dict[str, DataSet]:
    """The data sets of a manifest: one that comes with fusewright, or the path of its YAML.

    Raises SuiteError if there is none or it is not understood, DataError if its rows are damaged.
    """
    path, rows_at = manifest_files(name)
    origins = read_origins(path)
    table = _table(rows_at)
    classes = json.loads((table.schema.metadata or {}).get(b"classes", b"{}"))
    columns = {key: table.column(key).to_numpy() for key in ("hash", "label")}
    columns |= {key: table.column(key).to_numpy().astype(str) for key in ("data", "split")}
    found = {}
    for one, origin in origins.items():
        mine = columns["data"] == one
        parts = {split: mine & (columns["split"] == split) for split in SPLITS}
        if not all(map(np.any, parts.values())) or one not in classes:
            raise DataError(f"the manifest has no rows of {one}", where=rows_at,
                            fix=f"python tools/manifest.py '{path}' --data DIR")  # fmt: skip
        rows = {split: RowList(columns["hash"][at], columns["label"][at].astype(np.int64))
                for split, at in parts.items()}  # fmt: skip
        found[one] = DataSet(one, origin, tuple(classes[one]), rows)
    return found


def read_origins(path: Path) -> dict[str, Origin]:
    """What a manifest's YAML says of each data set. Raises SuiteError if it is not understood."""
    try:
        said = yaml.safe_load(path.read_text("utf-8"))
        return {name: Origin.model_validate(one) for name, one in said.items()}
    except (OSError, AttributeError, ValidationError, yaml.YAMLError) as error:
        shipped = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise SuiteError("a manifest of rows cannot be read", where=path, found=error,
                         expected=f"one of {shipped}, or a YAML file") from error  # fmt: skip


def write_manifest(path: Path, data: Path) -> dict[str, DataSet]:
    """Write the rows of all data sets that the manifest ``path`` (YAML) names, as they lie in the
    folder ``data``, beside it. Raises DataError if one cannot be read or names no classes."""
    found = {name: _read(name, origin, data) for name, origin in read_origins(path).items()}
    arrow, parquet = needs("pyarrow", "tasks"), needs("pyarrow.parquet", "tasks")
    parts = [(one, split, rows) for one in found.values() for split, rows in one.splits.items()]
    columns: dict[str, Any] = {
        "data": np.repeat([one.name for one, _, _ in parts], [len(r) for _, _, r in parts]),
        "split": np.repeat([split for _, split, _ in parts], [len(r) for _, _, r in parts]),
        "hash": np.concatenate([rows.hashes for _, _, rows in parts]),
        "label": np.concatenate([rows.labels for _, _, rows in parts]).astype(np.int16),
    }
    classes = json.dumps({name: one.classes for name, one in found.items()})
    table = arrow.table(columns).replace_schema_metadata({"classes": classes})
    dictionary = ["data", "split", "label"]  # hashes do not repeat
    parquet.write_table(table, path.with_suffix(".parquet"), compression="zstd",
                        compression_level=19, use_dictionary=dictionary)  # fmt: skip
    return found


def _read(name: str, origin: Origin, data: Path) -> DataSet:
    splits = {split: ParquetSplit(data / name / f"{split}.parquet") for split in SPLITS}
    classes: Sequence[str] | None = splits["train"].classes
    if classes is None:
        raise DataError("a data set does not name its classes", where=splits["train"].path)
    return DataSet(name, origin, tuple(classes), {k: RowList.of(s) for k, s in splits.items()})


def _table(path: Path) -> Any:
    arrow, parquet = needs("pyarrow", "tasks"), needs("pyarrow.parquet", "tasks")
    try:
        return parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError("the rows of a manifest cannot be read", where=path, found=error) from error
