"""A safetensors file is read exactly, and refused for every way in which its header can lie."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_help import fetch, said
from safetensors.torch import load_file, save_file

from fusewright.errors import WeightsError
from fusewright.weights import DType
from fusewright.weights.files import COUNT
from fusewright.weights.json_text import LARGEST
from fusewright.weights.safetensors_file import SafetensorsFile
from fusewright.weights.safetensors_header import header_length


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def one(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path, *words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        SafetensorsFile(path)
    for word in (*words, path.name):
        assert word in said(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("dtype", list(DType), ids=lambda d: d.code)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0, 2), (3, 5), (2, 3, 2, 2)])
def test_every_dtype_and_shape_is_what_the_library_wrote(
    file: Path, dtype: DType, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    tensor = torch.randint(0, 2, shape) if dtype.kind == "bool" else torch.randn(shape) * 50
    tensor = tensor.abs().to(dtype.torch)
    save_file({"a": tensor, "b": torch.ones(3)}, file, metadata={"format": "pt"})
    with SafetensorsFile(file) as weights:
        assert weights["a"].dtype is dtype and weights["a"].shape == shape
        assert weights.metadata == {"format": "pt"}
        assert torch.equal(fetch(weights, "a"), tensor.reshape(-1))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_range_is_the_slice(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    file = tmp_path_factory.mktemp("r") / "x.safetensors"
    tensors = {"a": torch.arange(7.0), "b": torch.arange(30, dtype=torch.int16).view(5, 6)}
    save_file(tensors, file)
    with SafetensorsFile(file) as weights:
        name = data.draw(st.sampled_from(sorted(tensors)))
        flat = tensors[name].reshape(-1)
        start = data.draw(st.integers(0, len(flat)))
        stop = data.draw(st.integers(start, len(flat)))
        assert torch.equal(fetch(weights, name, start, stop), flat[start:stop])


def test_only_the_range_is_read(file: Path) -> None:
    save_file({"a": torch.zeros(100_000)}, file)
    with SafetensorsFile(file) as weights:
        before = COUNT.bytes_read
        fetch(weights, "a", 10, 20)
        assert COUNT.bytes_read - before == 40


def test_many_threads_share_a_file(file: Path) -> None:
    tensor = torch.arange(10_000)
    save_file({"a": tensor}, file)
    wrong: list[int] = []
    with SafetensorsFile(file) as weights:

        def work(k: int) -> None:
            for start in range(k, 9_000, 97):
                if not torch.equal(
                    fetch(weights, "a", start, start + 50), tensor[start : start + 50]
                ):
                    wrong.append(start)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert wrong == []


def test_short_reads_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(100)
    save_file({"a": tensor}, file)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:7]], at))
    with SafetensorsFile(file) as weights:
        assert torch.equal(fetch(weights, "a"), tensor)


def test_file_cut_while_open_names_file_and_tensor(file: Path) -> None:
    save_file({"a": torch.arange(1000)}, file)
    with SafetensorsFile(file) as weights:
        os.truncate(file, 4000)
        with pytest.raises(WeightsError, match="ends too early") as caught:
            fetch(weights, "a")
        assert str(file) in str(caught.value) and ": a" in str(caught.value)


def test_io_error_is_a_weights_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.arange(10)}, file)
    weights = SafetensorsFile(file)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(WeightsError, match="Input/output"):
        fetch(weights, "a")


def test_identity_is_the_opened_files(file: Path) -> None:
    save_file({"a": torch.arange(10)}, file)
    (seen,) = SafetensorsFile(file).identities()
    stat = file.stat()
    assert (seen.path, seen.size, seen.mtime_ns, seen.inode) == (
        file, stat.st_size, stat.st_mtime_ns, stat.st_ino,
    )  # fmt: skip


@pytest.mark.parametrize("span", [(-1, 2), (2, 1), (0, 11)])
def test_range_outside_the_tensor(file: Path, span: tuple[int, int]) -> None:
    save_file({"a": torch.arange(10)}, file)
    with pytest.raises(WeightsError, match="range outside"):
        SafetensorsFile(file).read("a", *span, memoryview(bytearray(8)))


@pytest.mark.parametrize("buffer", [memoryview(bytearray(15)), memoryview(bytes(16))])
def test_buffer_that_does_not_fit(file: Path, buffer: memoryview) -> None:
    save_file({"a": torch.arange(10)}, file)
    with pytest.raises(WeightsError, match="does not fit"):
        SafetensorsFile(file).read("a", 0, 2, buffer)


def test_trailing_spaces_in_the_header_are_allowed(file: Path) -> None:
    text = json.dumps({"a": one()}).encode() + b"   "
    assert list(SafetensorsFile(write(file, text, bytes(8)))) == ["a"]


def test_no_tensors(file: Path) -> None:
    assert len(SafetensorsFile(write(file, {}))) == 0


# --- lengths --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7])
def test_shorter_than_its_length_field(file: Path, size: int) -> None:
    file.write_bytes(bytes(size))
    refused(file, "truncated", f"{size} bytes")


def test_header_longer_than_the_file(file: Path) -> None:
    path = write(file, {"a": one()}, bytes(8), length=1000)
    refused(path, "beyond the end of the file")
    size = path.stat().st_size
    path.write_bytes((size - 7).to_bytes(8, "little") + path.read_bytes()[8:])
    refused(path, "beyond the end of the file", f"{size - 7} bytes")


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_header_beyond_the_bound(file: Path, length: int) -> None:
    refused(write(file, {}, length=length), "format's bound")


def test_header_shorter_than_it_is(file: Path) -> None:
    refused(write(file, {"a": one()}, bytes(8), length=5), "not valid JSON")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "not a regular file")


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none", "cannot open")


# --- text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"[]", "not a JSON object"),
        (b"  {}", "not a JSON object"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"\xff": 1}', "UTF-8"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
        (b'{"__metadata__": []}', "__metadata__"),
        (b'{"\\ud800": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "not valid text"),
    ],
)  # fmt: skip
def test_text_that_is_no_header(file: Path, text: bytes, word: str) -> None:
    refused(write(file, text), word)


def test_duplicate_tensor_name(file: Path) -> None:
    entry = json.dumps(one())
    refused(write(file, f'{{"a":{entry},"a":{entry}}}'.encode(), bytes(8)), "twice", "'a'")


def test_duplicate_key_in_a_tensor(file: Path) -> None:
    text = b'{"a":{"dtype":"F32","dtype":"F64","shape":[2],"data_offsets":[0,8]}}'
    refused(write(file, text, bytes(8)), "twice", "'dtype'")


@pytest.mark.parametrize(
    "value", [1, [], {}, {"dtype": "F32", "shape": [2]}, {**one(), "extra": 1}]
)
def test_tensor_not_described_as_the_format_asks(file: Path, value: Any) -> None:
    refused(write(file, {"a": value}, bytes(8)), "not described", ": a")


# --- dtypes and shapes ----------------------------------------------------------------------


@pytest.mark.parametrize("code", ["F33", "f32", "", None, 4, ["F32"], "C64", "F8_E8M0", "__init__"])
def test_unknown_dtype(file: Path, code: Any) -> None:
    refused(write(file, {"a": one(code)}, bytes(8)), "unknown dtype", ": a", repr(code))


@pytest.mark.parametrize("shape", [[-2], [2, -1], [2.0], [True], ["2"], [None], 2, None, {"0": 2}])
def test_shape_that_is_no_list_of_counts(file: Path, shape: Any) -> None:
    refused(write(file, {"a": one(shape=shape)}, bytes(8)), "non-negative integers", ": a")


@pytest.mark.parametrize("shape", [[2**63], [2**32, 2**32], [2**40, 2**40, 0]])
def test_shape_whose_product_overflows(file: Path, shape: list[int]) -> None:
    refused(write(file, {"a": one(shape=shape, offsets=[0, 0])}), "overflow", ": a")


# --- offsets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offsets", [[0, 7], [0, 16], [8, 0], [-8, 0], [0], [0, 8, 8], [0.0, 8], [False, 8], "08", None]
)
def test_offsets_that_disagree_with_the_shape(file: Path, offsets: Any) -> None:
    refused(write(file, {"a": one(offsets=offsets)}, bytes(8)), "disagree", ": a")


@pytest.mark.parametrize("second", [[0, 8], [4, 12]])
def test_overlapping_tensors(file: Path, second: list[int]) -> None:
    header = {"a": one(), "b": one(offsets=second)}
    refused(write(file, header, bytes(second[1])), "overlap", "a, b")


def test_empty_tensor_inside_another(file: Path) -> None:
    header = {"a": one(), "b": one(shape=[0], offsets=[4, 4])}
    refused(write(file, header, bytes(8)), "overlap")


def test_hole_between_tensors(file: Path) -> None:
    header = {"a": one(), "b": one(offsets=[12, 20])}
    refused(write(file, header, bytes(20)), "hole", "begins at 12")


def test_hole_before_the_first_tensor(file: Path) -> None:
    refused(write(file, {"a": one(offsets=[4, 12])}, bytes(12)), "hole", "begins at 4")


def test_truncated_data(file: Path) -> None:
    refused(write(file, {"a": one()}, bytes(7)), "truncated", "8 bytes of data", "7 bytes")


def test_trailing_bytes(file: Path) -> None:
    refused(write(file, {"a": one()}, bytes(9)), "trailing", "9 bytes")


def test_data_far_beyond_the_file(file: Path) -> None:
    header = {"a": one("U8", [2**62], [0, 2**62])}
    refused(write(file, header, bytes(8)), "truncated")


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 300), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_agrees_with_the_library(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    """Whatever byte is changed: opening raises WeightsError, or gives the library's answer."""
    file = tmp_path_factory.mktemp("f") / "x.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, file)
    data = bytearray(file.read_bytes())
    data[position % len(data)] = value
    file.write_bytes(data)
    try:
        weights = SafetensorsFile(file)
    except WeightsError:
        return
    known = load_file(file)
    assert set(known) == set(weights)
    for name, tensor in known.items():
        assert torch.equal(
            fetch(weights, name).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


def test_a_prefix_cut_short_is_refused() -> None:
    """Even where the file itself is said to be long enough."""
    with pytest.raises(WeightsError, match="too short"):
        header_length(bytes(7), 100, "x")
    with pytest.raises(WeightsError, match="too short"):
        header_length(bytes(8), 7, "x")
    assert header_length((2).to_bytes(8, "little"), 10, "x") == 2
    assert header_length(bytes(8), 8, "x") == 0
    assert header_length(LARGEST.to_bytes(8, "little"), LARGEST + 8, "x") == LARGEST
