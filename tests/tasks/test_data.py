"""Data sets: what is read, in which order, and every refusal."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fusewright.tasks import DataError, DataSource, Rows, open_split
from fusewright.tasks.data import _part
from fusewright.tasks.parquet import ParquetSplit

TOY = DataSource(folder="vision/toy")


def bytes_of(picture) -> bytes:
    return picture.tobytes()


def test_rows_come_in_the_order_asked_for_across_row_groups(image_folder, make_picture) -> None:
    split = open_split(TOY, "train", image_folder())
    rows = split.rows([9, 0, 5, 5])
    assert [bytes_of(p) for p in rows["image"]] == [
        bytes_of(make_picture(n)) for n in (9, 0, 5, 5)
    ]
    assert rows["label"] == [0, 0, 2, 2]


def test_classes_and_labels_are_those_of_the_file(image_folder) -> None:
    split = open_split(TOY, "test", image_folder())
    assert isinstance(split, ParquetSplit)
    assert split.classes == ("a", "b", "c")
    assert split.labels().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert split.labels().dtype == "int64"


def test_classes_come_from_the_note_beside_the_file(image_folder) -> None:
    data = image_folder()
    path = data / "vision/toy/train.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    assert open_split(TOY, "train", data).classes is None
    (path.parent / "dataset_info.json").write_text(
        '{"features": {"label": {"names": ["x", "y", "z"]}}}'
    )
    assert open_split(TOY, "train", data).classes == ("x", "y", "z")


def test_given_classes_win(image_folder) -> None:
    source = DataSource(folder="vision/toy", classes=("one", "two", "three"))
    assert open_split(source, "train", image_folder()).classes == ("one", "two", "three")


def test_only_row_groups_in_use_are_held(image_folder) -> None:
    path = image_folder(rows=40, group=4) / "vision/toy/train.parquet"
    split = ParquetSplit(path, kept=1)
    for number in range(40):
        split.rows([number])
        assert len(split._held) == 1
    assert ParquetSplit(path).rows(range(40))["label"] == split.rows(range(40))["label"]


@given(st.integers(1, 50), st.none() | st.integers(-60, 60), st.none() | st.integers(-60, 60))
def test_slices_are_those_of_python(size: int, start: int | None, stop: int | None) -> None:
    whole = Rows({"n": list(range(size))})
    expected = list(range(size))[start:stop]
    bounds = [None if b is None else str(b) for b in (start, stop)]
    if not expected:
        with pytest.raises(DataError, match="empty"):
            _part(whole, *bounds, "part")
        return
    part = _part(whole, *bounds, "part")
    assert part.rows(range(len(part)))["n"] == expected


@pytest.mark.parametrize(
    ("split", "rows"),
    [("train[:3]", [0, 1, 2]), ("train[7:]", [7, 8, 9]), ("train[:25%]", [0, 1]),
     ("train[80%:]", [8, 9]), ("train[-2:]", [8, 9]), ("train[2:4]", [2, 3])],
)  # fmt: skip
def test_slices_of_a_file(image_folder, split: str, rows: list[int]) -> None:
    part = open_split(TOY, split, image_folder())
    assert len(part) == len(rows)
    assert part.labels().tolist() == [r % 3 for r in rows]
    assert part.rows(range(len(part)))["label"] == [r % 3 for r in rows]
    with pytest.raises(IndexError):
        part.rows([len(rows)])


def test_the_data_folder_may_come_from_the_environment(image_folder, monkeypatch) -> None:
    monkeypatch.setenv("FUSEWRIGHT_DATA", str(image_folder()))
    assert len(open_split(TOY, "train")) == 10


def test_columns_are_renamed_and_only_known_ones_given(tmp_path) -> None:
    (tmp_path / "set").mkdir()
    table = pa.table({"sentence": ["x", "y"], "gold": ["neg", "pos"], "other": [1, 2]})
    pq.write_table(table, tmp_path / "set/test.parquet")
    source = DataSource(
        folder="set", columns={"text": "sentence", "label": "gold"}, classes=("neg", "pos")
    )
    split = open_split(source, "test", tmp_path)
    assert split.rows([1, 0]) == {"text": ["y", "x"], "label": ["pos", "neg"]}
    assert split.labels().tolist() == [0, 1]


def test_json_lines_and_text_files(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": "é", '
                                      '"answer": "e"}\n')  # fmt: skip
    (tmp_path / "b.txt").write_text("one\ntwo\n\nthree")
    source = DataSource(files={"test": "a.jsonl", "train": "b.txt"}, columns={"text": "question"})
    assert open_split(source, "test", tmp_path).rows([1]) == {"text": ["é"], "answer": ["e"]}
    train = open_split(source, "train", tmp_path)
    assert "".join(train.rows(range(len(train)))["text"]) == "one\ntwo\n\nthree"


def test_without_any_folder_the_error_says_how_to_give_one(monkeypatch) -> None:
    monkeypatch.delenv("FUSEWRIGHT_DATA", raising=False)
    with pytest.raises(DataError, match=r"--data DIR, or export FUSEWRIGHT_DATA=DIR"):
        open_split(TOY, "train")


def test_a_missing_folder_names_what_was_expected(tmp_path) -> None:
    with pytest.raises(DataError, match=r"vision/toy/train\.parquet[\s\S]*FUSEWRIGHT_DATA"):
        open_split(TOY, "train", tmp_path)


def test_a_missing_split_lists_what_is_there(image_folder) -> None:
    with pytest.raises(DataError, match=r"test\.parquet, train\.parquet"):
        open_split(TOY, "validation", image_folder())


def test_a_missing_column_names_those_there_are(image_folder) -> None:
    source = DataSource(folder="vision/toy", columns={"text": "sentence"})
    with pytest.raises(DataError, match=r"'sentence'[\s\S]*train\.parquet[\s\S]*image, label"):
        open_split(source, "train", image_folder())


@pytest.mark.parametrize("keep", [0, 3, 200, -9])
def test_a_corrupt_parquet_is_named(image_folder, keep: int) -> None:
    data = image_folder()
    path = data / "vision/toy/test.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"cannot be read[\s\S]*test\.parquet"):
        open_split(TOY, "test", data)


def test_damaged_pages_are_an_error_of_the_file(image_folder) -> None:
    data = image_folder()
    path = data / "vision/toy/test.parquet"
    content = bytearray(path.read_bytes())
    content[4:600] = bytes(596)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"test\.parquet"):
        open_split(TOY, "test", data).rows(range(4))


def test_an_image_that_is_none_is_named_by_its_row(tmp_path) -> None:
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")
    images = [{"bytes": file.getvalue(), "path": None}, {"bytes": b"nothing", "path": None}]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "train.parquet")
    split = open_split(DataSource(folder="."), "train", tmp_path)
    split.rows([0])
    with pytest.raises(DataError, match="row 1"):
        split.rows([1])


def test_shuffled_rows_are_cut_after_they_are_mixed(image_folder, make_picture) -> None:
    """Data sorted by class would give validation rows of the first classes alone."""
    data = image_folder()
    mixed = TOY.model_copy(update={"shuffle": 0})
    order = [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]  # of NumPy's legacy generator, which is frozen
    first, rest = (open_split(mixed, part, data) for part in ("train[:4]", "train[4:]"))
    plain = open_split(TOY, "train", data).labels()
    assert first.labels().tolist() == plain[order[:4]].tolist()
    assert rest.labels().tolist() == plain[order[4:]].tolist()
    shown = [bytes_of(p) for p in rest.rows([5, 0])["image"]]
    assert shown == [bytes_of(make_picture(order[n])) for n in (9, 4)]
    assert len(open_split(mixed, "train", data)) == 10


def grouped(tmp_path, classes, groups, labels=(0, 3, 1, 2)):
    lines = [json.dumps({"text": str(n), "label": label}) for n, label in enumerate(labels)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    source = DataSource(folder=".", classes=classes, groups=groups)
    return open_split(source, "train[1:]", tmp_path)


FINE, COARSE = ("cat", "rose", "dog", "oak"), {"animal": ("dog", "cat"), "plant": ("rose", "oak")}


def test_groups_gather_classes_of_the_data_under_coarser_ones(tmp_path) -> None:
    split = grouped(tmp_path, FINE, COARSE)
    assert split.classes == ("animal", "plant")
    assert split.labels().tolist() == [1, 1, 0]
    assert [*split.rows([2, 0])["label"]] == [0, 1] and split.rows([0])["text"] == ["1"]


@pytest.mark.parametrize(
    ("classes", "groups", "named"),
    [
        (FINE, {"animal": ("cat",), "plant": ("rose", "oak")}, "dog"),
        (FINE, COARSE | {"stone": ("slate",)}, "slate"),
        (FINE, COARSE | {"pet": ("cat",)}, "cat"),
        (None, COARSE, "named by the data"),
    ],
)  # fmt: skip
def test_groups_hold_each_class_once(tmp_path, classes, groups, named) -> None:
    with pytest.raises(DataError, match=rf"each class of the data once[\s\S]*{named}"):
        grouped(tmp_path, classes, groups)


def test_a_label_that_is_in_no_group_is_refused(tmp_path) -> None:
    split = grouped(tmp_path, FINE, COARSE, labels=(0, 4))
    with pytest.raises(DataError, match=r"no class of the data[\s\S]*0 to 3[\s\S]*4"):
        split.labels()


def test_an_empty_file_and_an_empty_slice_are_refused(image_folder) -> None:
    with pytest.raises(DataError, match="empty"):
        open_split(TOY, "train", image_folder(rows=0, labels=[]))
    with pytest.raises(DataError, match=r"empty[\s\S]*rows 10 to 10 of 10"):
        open_split(TOY, "train[10:]", image_folder())


def test_labels_without_class_names_are_refused(tmp_path) -> None:
    pq.write_table(pa.table({"text": ["x"], "label": ["pos"]}), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"row 0[\s\S]*'pos'"):
        open_split(DataSource(folder="."), "test", tmp_path).labels()


@pytest.mark.parametrize("split", ["train[3]", "train[:x]", "", "train[1:2:3]", "train["])
def test_a_split_that_is_not_understood(image_folder, split: str) -> None:
    with pytest.raises(DataError, match="not understood"):
        open_split(TOY, split, image_folder())


def test_lines_that_are_no_objects_and_uneven_ones_are_named(tmp_path) -> None:
    source = DataSource(files={"test": "a.jsonl"})
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(DataError, match="line 2"):
        open_split(source, "test", tmp_path)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        open_split(source, "test", tmp_path)
    (tmp_path / "a.jsonl").write_text('[{"text": "x", "label": 0}]\n')  # dict() would take it
    with pytest.raises(DataError, match=r"line 1[\s\S]*found: +list"):
        open_split(source, "test", tmp_path)


def test_objects_name_their_fields_in_any_order(tmp_path) -> None:
    rows = '{"text": "x", "label": 0}\n{"label": 1, "text": "y"}\n'
    (tmp_path / "test.jsonl").write_text(rows)
    found = open_split(DataSource(folder="."), "test", tmp_path)
    assert found.rows([1, 0]) == {"text": ["y", "x"], "label": [1, 0]}


@pytest.mark.parametrize("order", [("fine", "label"), ("label", "fine")])
def test_a_named_column_wins_over_one_that_has_the_role_for_its_name(tmp_path, order) -> None:
    values = {"fine": [0, 1], "label": [7, 8]}
    lines = [json.dumps({name: values[name][row] for name in order}) for row in (0, 1)]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({name: values[name] for name in order}), tmp_path / "train.parquet")
    source = DataSource(folder=".", columns={"label": "fine"})
    for part in ("test", "train"):
        assert open_split(source, part, tmp_path).labels().tolist() == [0, 1]


def test_data_of_another_kind_are_told_of_the_kinds_that_are_read(tmp_path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/test.csv").write_text("text,label\nx,0\n")
    with pytest.raises(DataError) as caught:
        open_split(DataSource(folder="set"), "test", tmp_path)
    assert "set/test.parquet, .jsonl or .txt" in str(caught.value)
    assert "test.csv" in str(caught.value) and "of one of these kinds" in str(caught.value)


def test_a_source_needs_a_place() -> None:
    with pytest.raises(ValueError, match="folder, files or a Hub id"):
        DataSource(columns={"text": "x"})


def test_lines_of_json_end_where_json_says(tmp_path):
    """Texts of the web hold separators that Python takes for the end of a line."""
    texts = ["one\u2028still one", "two\x85", "three"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(rows).encode())
    found = open_split(DataSource(files={"test": "a.jsonl"}), "test", tmp_path)
    assert found.rows(range(3))["text"] == texts
