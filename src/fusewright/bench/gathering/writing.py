"""A data set's folder in the layout that suites read."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.bench.gathering.manifest import DataSet, RowList
from fusewright.errors import OutputError
from fusewright.extras import needs

if TYPE_CHECKING:
    from PIL.Image import Image

PARTIAL = ".partial"


def write(one: DataSet, pictures: Mapping[int, Image], folder: Path) -> None:
    """``{train,test}.parquet`` from pictures by hash, in a folder that appears when it is whole.

    Raises OutputError if it cannot be written.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        if partial.exists():  # of a run that was killed
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        for split, rows in one.splits.items():
            files = [_png(pictures[hashed]) for hashed in rows.hashes.tolist()]
            _write_split(partial / f"{split}.parquet", files, rows, one.classes)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError("a data set cannot be written", where=folder, found=error) from error


def _png(picture: Image) -> bytes:
    bare = needs("PIL.Image", "tasks").frombytes(picture.mode, picture.size, picture.tobytes())
    file = io.BytesIO()
    bare.save(file, "PNG")  # without a copy's resolution, colour profile, …
    return file.getvalue()


def _write_split(path: Path, files: Sequence[bytes], rows: RowList, classes: Sequence[str]) -> None:
    arrow, parquet = needs("pyarrow", "tasks"), needs("pyarrow.parquet", "tasks")
    image = arrow.struct({"bytes": arrow.binary(), "path": arrow.string()})
    features: Any = {
        "image": {"_type": "Image"}, "label": {"names": list(classes), "_type": "ClassLabel"}
    }  # fmt: skip
    columns = {
        "image": arrow.array([{"bytes": file, "path": None} for file in files], image),
        "label": arrow.array(rows.labels, arrow.int64()),
    }
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    table = arrow.table(columns).replace_schema_metadata(said)
    parquet.write_table(table, path, compression="zstd")
