"""Tiny data, tokenizers and random models; no network."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pa = pytest.importorskip("pyarrow")
pytest.importorskip("PIL")
transformers = pytest.importorskip("transformers")

import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "good", "bad", "yes",
         "no", "maybe", "so")  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def picture(number: int, size=(8, 8), mode: str = "RGB"):
    """A picture that differs for every number."""
    rng = np.random.default_rng(number)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def png(number: int, **options) -> bytes:
    file = io.BytesIO()
    picture(number, **options).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def make_picture() -> Callable:
    return picture


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes DATA/vision/toy/{train,test}.parquet of 8x8 pictures; answers with DATA."""

    def write(
        rows: int = 10, classes=("a", "b", "c"), group: int = 4, labels=None, **options
    ) -> Path:
        folder = tmp_path / "data" / "vision" / "toy"
        folder.mkdir(parents=True, exist_ok=True)
        for part, name in enumerate(("train", "test")):
            pictures = [{"bytes": png(100 * part + i, **options), "path": None}
                        for i in range(rows)]  # fmt: skip
            chosen = [i % len(classes) for i in range(rows)] if labels is None else labels
            table = pa.table({"image": pictures, "label": pa.array(chosen, pa.int64())})
            features = {"label": {"_type": "ClassLabel", "names": list(classes)}}
            note = {"huggingface": json.dumps({"info": {"features": features}})}
            table = table.replace_schema_metadata(note)
            pq.write_table(table, folder / f"{name}.parquet", row_group_size=group)
        return tmp_path / "data"

    return write


@pytest.fixture
def tokenizer() -> Callable[..., object]:
    """A word tokenizer of ``transformers``: one id a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    def make(side: str = "right", special: bool = True):
        vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, padding_side=side, unk_token="<unk>",
            eos_token="</s>" if special else None, pad_token="<pad>" if special else None,
        )  # fmt: skip

    return make
