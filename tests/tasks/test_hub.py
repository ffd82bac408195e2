"""The Hub: the same rows as from a folder, and a clear error when it cannot be reached."""

from __future__ import annotations

import pytest

from fusewright.tasks import DataError, DataSource, open_split
from fusewright.tasks.hub import HubSplit

datasets = pytest.importorskip("datasets")

SOURCE = DataSource(hub="org/name@main", folder="vision/toy")


def test_the_hub_and_a_folder_give_the_same(image_folder, monkeypatch, tmp_path) -> None:
    data = image_folder()
    local = open_split(SOURCE, "train[2:7]", data)

    def load(name, config, *, split, revision):
        assert (name, config, split, revision) == ("org/name", None, "train", "main")
        file = str(data / "vision/toy/train.parquet")
        table = datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path / "cache"))
        return table.cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load)
    remote = open_split(SOURCE, "train[2:7]", tmp_path / "elsewhere")
    assert remote.classes == local.classes == ("a", "b", "c")
    assert remote.labels().tolist() == local.labels().tolist()
    ours, theirs = remote.rows([3, 0]), local.rows([3, 0])
    assert [p.tobytes() for p in ours["image"]] == [p.tobytes() for p in theirs["image"]]


def test_offline_the_error_says_how_to_give_a_folder(monkeypatch) -> None:
    def load(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("FUSEWRIGHT_DATA", raising=False)
    with pytest.raises(DataError, match=r"offline[\s\S]*no route[\s\S]*--data DIR") as caught:
        open_split(SOURCE, "test")
    assert "DIR/vision/toy/test.parquet" in str(caught.value)


def test_a_missing_column_and_an_empty_table_are_refused() -> None:
    table = datasets.Dataset.from_dict({"sentence": ["x"]})
    with pytest.raises(DataError, match=r"'text'[\s\S]*sentence"):
        HubSplit(table, "org/name", {"text": "words"})
    assert HubSplit(table, "org/name", {"text": "sentence"}).rows([0]) == {"text": ["x"]}
    with pytest.raises(DataError, match="empty"):
        HubSplit(datasets.Dataset.from_dict({"text": []}), "org/name", {})
