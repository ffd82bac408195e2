"""Staged outputs: which are refused, what is laid out and published, and what verify sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors
import staging_toy as toy
from hypothesis import given, settings
from hypothesis import strategies as st

from fusewright.errors import OutputError, WeightsError
from fusewright.weights import _fs
from fusewright.weights.digest import (
    BLOCK,
    LEAF,
    block_digests,
    content_digest,
    hash_range,
    tensor_digest,
)
from fusewright.weights.shards import index_json, index_name, plan_shards
from fusewright.weights.sink import MemorySink
from fusewright.weights.spec import DType, TensorInfo
from fusewright.weights.staging import Staging
from fusewright.weights.target import staging_folder
from fusewright.weights.verify import verify


def _open(out: Path, *, inputs: tuple[Path, ...] = (), overwrite: bool = False) -> Staging:
    return Staging.open(out, "plan-1", toy.shards(), overwrite=overwrite, inputs=inputs)


# -- which outputs are refused ------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("place", ["models/base", "models/base/out", "models", "models/base/a/b"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_touches_an_input_is_refused(
    tmp_path: Path, model: Path, place: str, overwrite: bool
) -> None:
    before = toy.snapshot(tmp_path)
    with pytest.raises(OutputError, match="inputs are never changed"):
        _open(tmp_path / place, inputs=(model,), overwrite=overwrite)
    with pytest.raises(OutputError, match="inputs are never changed"):
        _open(tmp_path / place, inputs=(model / "model.safetensors", model), overwrite=overwrite)
    assert toy.snapshot(tmp_path) == before


@pytest.mark.parametrize("place", ["link", "link/out", "models/x/../base", "models/y/../base/o"])
def test_links_and_dots_do_not_hide_an_input(tmp_path: Path, model: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(OutputError, match="inputs are never changed"):
        _open(tmp_path / place, inputs=(model,), overwrite=True)


def test_an_input_that_is_a_link_is_followed(tmp_path: Path, model: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(model)
    with pytest.raises(OutputError, match="inputs are never changed"):
        _open(model / "out", inputs=(link,))


def test_a_sibling_of_an_input_is_fine(tmp_path: Path, model: Path) -> None:
    toy.run(model.parent / "base-merged", inputs=[model])
    assert verify(model.parent / "base-merged").ok
    assert verify(f"{model.parent}/base-merged").ok  # as every other path may be a text


def test_an_output_that_exists_is_refused_without_overwrite(model: Path) -> None:
    with pytest.raises(OutputError, match="--overwrite"):
        _open(model)
    toy.run(model, overwrite=True)
    assert verify(model).ok and os.listdir(model.parent) == ["base"]


def test_an_output_that_appears_during_the_run_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _open(out) as staging:
        toy.work(staging)
        out.mkdir()
        with pytest.raises(OutputError, match="exists already"):
            staging.publish(toy.MANIFEST)
    assert not os.listdir(out)
    out.rmdir()
    assert toy.run(out) == []


def test_overwrite_does_not_replace_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(OutputError, match="does not look like one"):
        _open(tmp_path / "thesis", overwrite=True)
    assert toy.snapshot(tmp_path) == {"thesis/chapter.tex": b"years of work"}


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("text")
    with pytest.raises(OutputError, match="a file"):
        _open(tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="not a folder"):
        _open(tmp_path / "out" / "deeper")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="permissions"):
        _open(tmp_path / "out")
    tmp_path.chmod(0o700)


def test_missing_parents_are_made_and_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep" / "out")
    toy.run(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert verify(tmp_path / "elsewhere" / "deep" / "out").ok


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), _open(tmp_path / "out"):
        raise RuntimeError("a mistake in the first tensor")
    assert not os.listdir(tmp_path)


def test_interrupted_by_the_keyboard_finished_work_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), _open(tmp_path / "out") as staging:
        toy.work(staging)
        raise KeyboardInterrupt
    with _open(tmp_path / "out") as staging:
        assert staging.resumed and len(staging.finished(threads=2)) == len(toy.TASKS)
        assert staging.noted() == {"scale": 0.2}


def test_notes_and_extras_come_back_exactly(tmp_path: Path) -> None:
    value = {"thresholds": [0.1, 1e-45, 3.4e38, -0.0, 2**60], "text": "π\n"}
    leaf = block_digests(memoryview(bytes(8)), 8)
    with _open(tmp_path / "out") as staging:
        staging.write("count", 0, memoryview(bytes(8)))
        staging.commit("count", [("count", 0, 8, leaf)], value)
        staging.note("solved", value)
    with _open(tmp_path / "out") as staging:
        assert staging.noted() == {"solved": value}
        record = staging.finished()["count"]
        assert record.extra == value and record.outputs == (("count", 0, 8, leaf),)


# -- what is written ------------------------------------------------------------------------------


def test_an_unfinished_output_is_not_published(tmp_path: Path) -> None:
    with _open(tmp_path / "out") as staging:
        toy.work(MemorySink(toy.TENSORS))
        with pytest.raises(OutputError, match="not finished"):
            staging.publish(toy.MANIFEST)
    assert not (tmp_path / "out").exists()


def test_writes_and_commits_outside_a_tensor_are_refused(tmp_path: Path) -> None:
    with _open(tmp_path / "out") as staging:
        for start, size in ((-1, 1), (1, 1), (0, 2)):
            with pytest.raises(ValueError, match="flag"):
                staging.write("flag", start, memoryview(bytes(size)))
        for start, stop, leaves in ((2, 300_000, LEAF * 3), (0, 1000, LEAF), (0, 300_000, LEAF)):
            with pytest.raises(ValueError, match=r"a\.weight"):
                staging.commit("t", [("a.weight", start, stop, bytes(leaves))])


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "", ".", "a//b", "a\\..\\x", "a\0b", "fusewright.json",
     "model-00001-of-00002.safetensors", "model.safetensors.index.json"],
)  # fmt: skip
def test_added_files_stay_inside_and_apart_from_the_weights(tmp_path: Path, name: str) -> None:
    with _open(tmp_path / "out") as staging, pytest.raises(OutputError, match="cannot be added"):
        staging.add_file(name, b"")


def test_added_files_are_copied_from_paths_and_links(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x" * 100)
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "blob")
    with _open(tmp_path / "out") as staging:
        toy.work(staging)
        staging.add_file("tokenizer.json", b"first, longer " * 20)
        staging.add_file("tokenizer.json", tmp_path / "tokenizer.json")
        assert staging.publish({}) == tmp_path / "out"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"x" * 100
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_the_output_opens_in_stock_loaders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    toy.run(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == toy.DATA_BYTES
    for info in toy.TENSORS:
        with safetensors.safe_open(out / index["weight_map"][info.name], "pt") as file:
            tensor = file.get_tensor(info.name)
            assert tensor.shape == info.shape and tensor.dtype == info.dtype.torch
            assert file.metadata() == {"format": "pt"}


def test_published_numbers_come_from_the_bytes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    toy.run(out)
    output = json.loads((out / "fusewright.json").read_text())["output"]
    digests = {}
    for info in toy.TENSORS:
        data = bytes(toy.compute(info, 0, info.nbytes, 0.2))
        leaves = block_digests(memoryview(data), info.dtype.itemsize)
        digests[info.name] = tensor_digest(leaves, info)
        assert output["tensors"][info.name]["digest"] == digests[info.name]
    assert output["content_digest"] == content_digest(digests)
    sizes = {name: len(data) for name, data in toy.snapshot(out).items()}
    sizes.pop("fusewright.json")
    index = "model.safetensors.index.json"
    assert {name: entry["size"] for name, entry in output["files"].items()} == sizes
    assert index in sizes


def test_many_threads_and_memory_give_the_same_content(tmp_path: Path) -> None:
    toy.run(tmp_path / "one")
    sink = MemorySink(toy.TENSORS)
    with pytest.raises(ValueError, match="not finished"):
        sink.tensors()

    def one(task: tuple[str, TensorInfo, int, int]) -> None:
        name, info, start, stop = task
        data = toy.compute(info, start, stop, 0.2)
        leaves = block_digests(data, info.dtype.itemsize)
        for target in (staging, sink):
            target.write(info.name, start, data)
            target.commit(name, [(info.name, start, stop, leaves)], {"count": stop - start})

    with _open(tmp_path / "two") as staging, ThreadPoolExecutor(4) as pool:
        list(pool.map(one, reversed(toy.TASKS)))
        for name, content in toy.FILES.items():
            staging.add_file(name, content)
        staging.publish(toy.MANIFEST)
    assert toy.snapshot(tmp_path / "one") == toy.snapshot(tmp_path / "two")
    assert sink.content_digest() == verify(tmp_path / "one", threads=2).content_digest
    for info, data in sink.tensors().values():
        assert data == bytes(toy.compute(info, 0, info.nbytes, 0.2))


def test_nothing_here_imports_torch() -> None:
    code = (
        "import fusewright.weights.staging, fusewright.weights.verify, sys; assert 'torch' not in"
    )
    subprocess.run([sys.executable, "-c", f"{code} sys.modules"], check=True)


# -- shards and digests ---------------------------------------------------------------------------

_INFOS = st.lists(
    st.builds(
        TensorInfo,
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.sampled_from(DType),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    max_size=12,
    unique_by=lambda info: info.name,
)


@settings(deadline=None, max_examples=80)
@given(_INFOS, st.integers(1, 400), st.sampled_from([{}, {"format": "pt"}, {"π": '"\n'}]))
def test_any_plan_opens_with_the_safetensors_library(
    infos: list[TensorInfo], shard_size: int, metadata: dict[str, str]
) -> None:
    shards = plan_shards(infos, shard_size, metadata)
    seen = []
    for shard in shards:
        data = bytearray(np.arange(shard.size, dtype=np.uint8).tobytes())
        data[: len(shard.header)] = shard.header
        assert len(shard.header) % 64 == 0
        opened = {name: entry for name, entry in safetensors.deserialize(bytes(data))}
        assert opened.keys() == shard.tensors.keys()
        for name, (info, at) in shard.tensors.items():
            assert opened[name]["shape"] == list(info.shape)
            assert bytes(opened[name]["data"]) == bytes(data[at : at + info.nbytes])
            assert at % info.dtype.itemsize == 0
            seen.append(info)
        total = sum(info.nbytes for info, _ in shard.tensors.values())
        assert total <= shard_size or any(
            info.nbytes > shard_size for info, _ in shard.tensors.values()
        )
        assert total <= shard_size or total == max(i.nbytes for i, _ in shard.tensors.values())
    assert sorted(i.name for i in seen) == sorted(i.name for i in infos)
    order = [info.name for info in infos]
    first = [min(order.index(name) for name in shard.tensors) for shard in shards if shard.tensors]
    assert first == sorted(first)


def test_shards_are_named_as_loaders_expect() -> None:
    infos = [TensorInfo(f"t{i}", DType.F32, (10,)) for i in range(3)]
    one = plan_shards(infos, 1000, {})
    assert [s.file for s in one] == ["model.safetensors"] and index_json(one) is None
    three = plan_shards(infos, 40, {}, stem="adapter_model")
    assert [s.file for s in three] == [
        f"adapter_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert index_name(three) == "adapter_model.safetensors.index.json"
    index = json.loads(index_json(three) or b"")
    assert index["metadata"] == {"total_size": 120}
    assert index["weight_map"]["t1"] == three[1].file


def test_mixed_dtypes_load_in_place(tmp_path: Path) -> None:
    infos = [TensorInfo("flag", DType.BOOL, (1,)), TensorInfo("x", DType.F64, (3,))]
    (shard,) = plan_shards(infos, 1000, {})
    path = tmp_path / "m.safetensors"
    path.write_bytes(shard.header + np.array([1.0, 2.0, 3.0]).tobytes() + b"\1")
    with safetensors.safe_open(path, "pt") as file:
        assert file.get_tensor("x").tolist() == [1.0, 2.0, 3.0]
        assert file.get_tensor("flag").tolist() == [True]


@pytest.mark.parametrize("names", [["a", "a"], ["__metadata__"]])
def test_names_the_format_cannot_hold_are_refused(names: list[str]) -> None:
    with pytest.raises(OutputError, match="cannot hold"):
        plan_shards([TensorInfo(name, DType.F32, (1,)) for name in names], 100, {})


def test_leaves_do_not_depend_on_how_a_tensor_was_cut(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(2 * (70 * BLOCK + 12_345))
    whole, step = block_digests(memoryview(data), 2), 2 * BLOCK
    for blocks in (1, 7):
        cuts = range(0, len(data), blocks * step)
        parts = [block_digests(memoryview(data)[at : at + blocks * step], 2) for at in cuts]
        assert b"".join(parts) == whole
    (tmp_path / "data").write_bytes(b"head" + data)
    fd = os.open(tmp_path / "data", os.O_RDONLY)
    assert hash_range(fd, 4, len(data), 2) == whole
    assert hash_range(fd, 5, len(data), 2) != whole
    os.close(fd)
    assert len(whole) == LEAF * 71


def test_a_digest_covers_dtype_shape_and_name() -> None:
    leaves = block_digests(memoryview(bytes(24)), 4)
    infos = [
        TensorInfo("x", dtype, shape)
        for dtype in (DType.F32, DType.I32)
        for shape in ((6,), (2, 3), (3, 2))
    ]
    digests = {tensor_digest(leaves, info) for info in infos}
    assert len(digests) == 6
    one, two = sorted(digests)[:2]
    assert content_digest({"x": one, "y": two}) == content_digest({"y": two, "x": one})
    assert content_digest({"x": one, "y": two}) != content_digest({"x": two, "y": one})


# -- verify --------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path) -> Path:
    toy.run(tmp_path / "out")
    return tmp_path / "out"


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_verify_passes_what_was_published(published: Path) -> None:
    report = verify(published, threads=2)
    assert report.ok and report.content_digest == report.expected_digest
    everything = sum(len(data) for data in toy.snapshot(published).values())
    assert report.bytes == everything - (published / "fusewright.json").stat().st_size


def test_verify_names_the_tensor_of_a_flipped_bit(published: Path) -> None:
    for shard in toy.shards():
        for name, (info, at) in shard.tensors.items():
            for place in {at, at + info.nbytes - 1} if info.nbytes else ():
                _flip(published / shard.file, place)
                report = verify(published)
                assert not report.ok and report.tensors == (name,)
                assert report.changed == (shard.file,)
                assert report.content_digest != report.expected_digest
                _flip(published / shard.file, place)
    assert verify(published).ok


def test_verify_sees_changed_missing_and_extra_files(published: Path) -> None:
    (published / "config.json").write_bytes(b'{"toy": True}')
    (published / "extra" / "notes.txt").unlink()
    (published / "extra" / "code.py").write_text("import os")
    report = verify(published)
    assert report.changed == ("config.json",)
    assert report.missing == ("extra/notes.txt",)
    assert report.extra == ("extra/code.py",)
    assert report.tensors == () and not report.ok


def test_verify_counts_a_link_as_missing(published: Path, tmp_path: Path) -> None:
    (published / "config.json").rename(tmp_path / "config.json")
    (published / "config.json").symlink_to(tmp_path / "config.json")
    assert verify(published).missing == ("config.json",)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1, -100_000])
def test_verify_names_what_a_truncated_shard_lost(published: Path, size: int) -> None:
    shard = toy.shards()[0]
    path = published / shard.file
    os.truncate(path, size if size >= 0 else shard.size + size)
    report = verify(published)
    assert report.changed == (shard.file,) and report.tensors
    assert set(report.tensors) <= set(shard.tensors)


def test_verify_sees_a_changed_header_and_a_missing_shard(published: Path) -> None:
    first, second = toy.shards()[:2]
    _flip(published / first.file, 20)
    (published / second.file).unlink()
    report = verify(published)
    assert first.file in report.changed and report.missing == (second.file,)
    assert set(second.tensors) <= set(report.tensors)
    assert report.content_digest is None


def test_verify_needs_an_intact_manifest(published: Path) -> None:
    path = published / "fusewright.json"
    text = path.read_text()
    path.write_text(text.replace('"recipe": "toy"', '"recipe": "joy"'))
    with pytest.raises(WeightsError, match="checksum"):
        verify(published)
    for damaged in (text[:-40], "[]", "{}", "3", ""):
        path.write_text(damaged)
        with pytest.raises(WeightsError, match="damaged"):
            verify(published)
    path.unlink()
    with pytest.raises(WeightsError, match="not published by fusewright"):
        verify(published)


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd"])
def test_verify_reads_nothing_outside_the_folder(published: Path, name: str) -> None:
    from fusewright.weights.publish import seal_manifest

    path = published / "fusewright.json"
    manifest = json.loads(path.read_text())
    manifest["output"]["files"][name] = {"size": 1, "sha256": "0"}
    path.write_bytes(seal_manifest(manifest))
    with pytest.raises(WeightsError, match="leaves the folder"):
        verify(published)


def test_where_two_folders_cannot_be_exchanged_two_renames_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.run(tmp_path / "out", plan="plan-0")
    (tmp_path / "out" / "config.json").write_text("older")
    monkeypatch.setattr(_fs.fs, "exchange", lambda one, other: False)
    toy.run(tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out").ok and os.listdir(tmp_path) == ["out"]
    assert not staging_folder(tmp_path / "out").exists()


def test_verifying_says_how_far_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    toy.run(out)
    heard: list[tuple[str, int, int]] = []
    assert verify(out, 2, lambda *now: heard.append(now)).ok
    sizes = [done for _, done, _ in heard]
    assert sizes == sorted(sizes) and sizes[-1] == heard[-1][2] > 0
