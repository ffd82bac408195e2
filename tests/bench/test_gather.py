"""A suite's data gathered from public copies: the published rows in their order, or a refusal."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import yaml
from PIL import Image
from typer.testing import CliRunner

from fusewright.bench.gathering import gather as gathering
from fusewright.bench.gathering.check import check, matches
from fusewright.bench.gathering.gather import gather
from fusewright.bench.gathering.manifest import fingerprint, manifest_of, write_manifest
from fusewright.bench.gathering.pictures import repaired
from fusewright.bench.gathering.writing import _png
from fusewright.bench.suite_file import SuiteError, find_suite, read_suite
from fusewright.cli.app import app
from fusewright.tasks.errors import DataError
from fusewright.tasks.parquet import ParquetSplit
from fusewright.tasks.rows import Rows

CLASSES = ["zero", "one", "two"]
ROWS = {"train": 9, "test": 5}


def picture(seed: int, grey: bool = True, size: int = 8) -> Image.Image:
    shape = (size, size) if grey else (size, size, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def write_rows(path: Path, pictures, labels, classes=CLASSES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"label": {"_type": "ClassLabel", "names": list(classes)}}
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    images = [{"bytes": _png(p), "path": None} for p in pictures]
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    pq.write_table(table.replace_schema_metadata(note), path)


def labelled(name: str, split: str):
    """The rows of a made-up data set: "ink" is grey, "paint" has colours."""
    first = 100 * list(ROWS).index(split) + 1000 * (name == "paint")
    numbers = range(first, first + ROWS[split])
    return [picture(n, name == "ink") for n in numbers], [n % 3 for n in numbers]


def everything(name: str, extra: int = 0):
    pairs = [pair for s in ROWS for pair in zip(*labelled(name, s), strict=True)]
    return pairs + [(picture(5000 + n, name == "ink"), n % 3) for n in range(extra)]


@pytest.fixture
def published(tmp_path):
    """(suite, the data folder that its rows are published of)"""
    data = tmp_path / "data"
    for name in ("ink", "paint"):
        for split in ROWS:
            write_rows(data / f"vision/{name}/{split}.parquet", *labelled(name, split))
    origin = {"source": {"https://example.org/a/copies@abc123": ["all/*.png"]}, "licence": "CC0"}
    manifest = tmp_path / "toys.yaml"
    manifest.write_text(yaml.safe_dump({f"vision/{n}": dict(origin) for n in ("ink", "paint")}))
    write_manifest(manifest, data)
    task = {"kind": "image-classification", "splits": {"train": "train", "test": "test"}}
    tasks = {name: task | {"data": f"vision/{name}"} for name in ("ink", "paint")}
    suite = tmp_path / "toy.yaml"
    suite.write_text(json.dumps({
        "title": "toys", "base": "base", "experts": {"ink": "ink"}, "tasks": tasks,
        "rows": str(manifest), "build": {"builder": "vision"},
    }))  # fmt: skip
    return suite, data


def spec_of(published):
    return read_suite(published[0])


def shuffled_parquet(root: Path, name: str, pairs=None, classes=CLASSES) -> None:
    pairs = everything(name, extra=20) if pairs is None else pairs
    order = np.random.default_rng(7).permutation(len(pairs))
    write_rows(root / name / "pool.parquet", [pairs[i][0] for i in order],
               [pairs[i][1] for i in order], classes)  # fmt: skip


def idx(root: Path, name: str, pairs) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    pixels = np.stack([np.asarray(p) for p, _ in pairs])
    head = b"\0\0\x08\x03" + np.array(pixels.shape, ">u4").tobytes()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
    labels = bytes(label for _, label in pairs)
    head = b"\0\0\x08\x01" + np.array([len(labels)], ">u4").tobytes()
    (folder / "t10k-labels-idx1-ubyte").write_bytes(head + labels)


def class_folders(root: Path, name: str, pairs, named: str = "names") -> None:
    for number, (image, label) in enumerate(pairs):
        folder = root / name / "somewhere" / (CLASSES[label] if named == "names" else f"0{label}")
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png", dpi=(72, 72))
    image.save(root / name / "logo.png")  # no class's


def zipped(root: Path, name: str, pairs) -> None:
    class_folders(root / "unpacked", name, pairs)
    (root / name).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / name / "images.zip", "w") as packed:
        for path in (root / "unpacked").rglob("*.png"):
            packed.write(path, path.relative_to(root / "unpacked"))


FORMS = {
    "parquet": shuffled_parquet, "idx": idx, "names": class_folders,
    "numbers": lambda *a: class_folders(*a, named="numbers"), "zip": zipped,
}  # fmt: skip


def rows_of(path: Path):
    split = ParquetSplit(path)
    pictures = [
        np.asarray(p.convert("RGB")).tolist() for p in split.rows(range(len(split)))["image"]
    ]
    return pictures, split.labels().tolist(), split.classes


@pytest.mark.parametrize("form", FORMS)
def test_rows_come_back_in_order_from_a_shuffled_superset_of_any_form(tmp_path, published, form):
    spec, sources, out = spec_of(published), tmp_path / "sources", tmp_path / "out"
    shuffled_parquet(sources, "paint")
    FORMS[form](sources, "ink", everything("ink", extra=10)[::-1])
    found = gather(spec, [str(sources)], out)
    assert [(one.said, one.found, one.rows) for one in found] == [("gathered", 14, 14)] * 2
    for name in ("ink", "paint"):
        for split in ROWS:
            file = f"vision/{name}/{split}.parquet"
            assert rows_of(out / file) == rows_of(published[1] / file)
    assert matches(spec, out) == "the published rows"
    assert not list(out.rglob("*.partial"))


def test_the_folder_is_the_same_from_every_form(tmp_path, published):
    written = set()
    for form in ("parquet", "idx", "zip", "names"):
        sources, out = tmp_path / form, tmp_path / f"out-{form}"
        FORMS[form](sources, "ink", everything("ink"))
        gather(spec_of(published), [str(sources)], out)
        written.add((out / "vision/ink/train.parquet").read_bytes())
    assert len(written) == 1


def test_a_hash_is_of_the_pixels_and_size_alone(tmp_path):
    grey = picture(1)
    grey.save(tmp_path / "a.png")
    grey.convert("RGB").save(tmp_path / "b.bmp")
    other = Image.frombytes("L", (4, 16), grey.tobytes())
    a, b = (fingerprint(Image.open(tmp_path / name)) for name in ("a.png", "b.bmp"))
    assert a == b == fingerprint(grey) != fingerprint(other)
    changed = np.asarray(grey).copy()
    changed[3, 4] ^= 1
    assert fingerprint(Image.fromarray(changed)) != a


def test_a_hash_is_the_same_on_every_machine():
    whole = b"\2\0\0\0\1\0\0\0" + bytes([1, 2, 3, 1, 2, 3])
    found = fingerprint(Image.new("RGB", (2, 1), (1, 2, 3)))
    assert found == xxhash.xxh3_64_intdigest(whole) == 9516546135740150047


def test_a_missing_row_is_refused_and_the_other_data_sets_go_on(tmp_path, published):
    sources, out = tmp_path / "sources", tmp_path / "out"
    shuffled_parquet(sources, "ink", everything("ink")[1:])
    shuffled_parquet(sources, "paint")
    ink, paint = gather(spec_of(published), [str(sources)], out)
    assert (ink.found, paint.found, paint.problem) == (13, 14, None)
    for part in ("1 of 14 rows", "13 pictures", "https://example.org/a/copies", "git clone"):
        assert part in str(ink.problem)
    assert [p.name for p in (out / "vision").iterdir()] == ["paint"]


def test_swapped_labels_are_refused_with_their_names(tmp_path, published):
    pairs = everything("ink")
    (a, _), (b, other), *rest = pairs
    shuffled_parquet(tmp_path / "sources", "ink", [(a, other), (b, pairs[0][1]), *rest])
    ink, _ = gather(spec_of(published), [str(tmp_path / "sources")], tmp_path / "out")
    assert "2 of them have another label" in str(ink.problem) and "'zero'" in str(ink.problem)
    assert not (tmp_path / "out/vision/ink").exists()


def test_classes_in_another_order_are_matched_by_name(tmp_path, published):
    turned = {0: 2, 1: 0, 2: 1}  # "one", "two", "zero"
    pairs = [(image, turned[label]) for image, label in everything("ink")]
    shuffled_parquet(tmp_path / "sources", "ink", pairs, ["One", "Two", "Zero"])
    ink, _ = gather(spec_of(published), [str(tmp_path / "sources")], tmp_path / "out")
    assert ink.problem is None


def test_a_copy_with_another_label_does_not_harm_beside_the_right_one(tmp_path, published):
    pairs = everything("ink")
    wrong = [(image, (label + 1) % 3) for image, label in pairs]
    shuffled_parquet(tmp_path / "sources", "ink", wrong + pairs + pairs)
    ink, _ = gather(spec_of(published), [str(tmp_path / "sources")], tmp_path / "out")
    assert ink.problem is None and matches(spec_of(published), published[1])


@pytest.mark.parametrize("damage", [b"", b"no parquet", None])
def test_a_corrupt_source_is_refused_by_name(tmp_path, published, damage):
    sources = tmp_path / "sources"
    shuffled_parquet(sources, "ink")
    shuffled_parquet(sources, "paint")
    path = sources / "ink/pool.parquet"
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    ink, paint = gather(spec_of(published), [str(sources)], tmp_path / "out")
    assert str(path) in str(ink.problem) and paint.problem is None


def test_idx_pictures_without_their_labels_are_refused(tmp_path, published):
    idx(tmp_path / "sources", "ink", everything("ink"))
    (tmp_path / "sources/ink/t10k-labels-idx1-ubyte").unlink()
    ink, _ = gather(spec_of(published), [str(tmp_path / "sources")], tmp_path / "out")
    assert "t10k-labels-idx1-ubyte" in str(ink.problem)


def test_broken_pictures_are_counted_where_rows_are_missing(tmp_path, published):
    class_folders(tmp_path / "sources", "ink", everything("ink"))
    next((tmp_path / "sources/ink").rglob("0.png")).write_bytes(b"\x89PNG broken")
    ink, _ = gather(spec_of(published), [str(tmp_path / "sources")], tmp_path / "out")
    assert "1 files cannot be decoded; 1 are in no class" in str(ink.problem)


def test_what_is_complete_stays_and_what_is_other_is_not_overwritten(tmp_path, published):
    spec, sources, out = spec_of(published), tmp_path / "sources", tmp_path / "out"
    shuffled_parquet(sources, "ink")
    gather(spec, [str(sources)], out)
    kept = (out / "vision/ink/train.parquet").stat().st_mtime_ns
    shuffled_parquet(sources, "paint")
    write_rows(out / "vision/paint/train.parquet", *labelled("ink", "train"))
    ink, paint = gather(spec, [str(sources)], out)
    assert ink.said == "the published rows"
    assert (out / "vision/ink/train.parquet").stat().st_mtime_ns == kept
    assert "other data are in the way" in str(paint.problem)
    assert rows_of(out / "vision/paint/train.parquet")[1] == labelled("ink", "train")[1]


def test_what_a_killed_run_left_is_cleared(tmp_path, published):
    left = tmp_path / "out/vision/ink.partial"
    left.mkdir(parents=True)
    (left / "train.parquet").write_bytes(b"half")
    shuffled_parquet(tmp_path / "sources", "ink")
    ink, _ = gather(spec_of(published), [str(tmp_path / "sources")], tmp_path / "out")
    assert ink.problem is None and not left.exists()


def test_a_fault_while_writing_leaves_nothing(tmp_path, published, monkeypatch):
    monkeypatch.setattr(pq, "write_table", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    sources = tmp_path / "sources"
    class_folders(sources, "ink", everything("ink"))
    ink, _ = gather(spec_of(published), [str(sources)], tmp_path / "out")
    assert "full" in str(ink.problem) and not list((tmp_path / "out/vision").iterdir())


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda p, y: (p[::-1], y[::-1]), "8 of the first 9 are other pictures"),
        (lambda p, y: (p, [(y[0] + 1) % 3, *y[1:]]), "1 have another label"),
        (lambda p, y: (p[:-1], y[:-1]), "8 rows"),
        (lambda p, y: ([*p, p[0]], [*y, y[0]]), "10 rows"),
    ],
)
def test_check_says_what_differs(published, change, found):
    suite, data = published
    write_rows(data / "vision/ink/train.parquet", *change(*labelled("ink", "train")))
    ink, paint = check(read_suite(suite), data)
    assert found in str(ink.problem) and paint.said == "the published rows"
    assert matches(read_suite(suite), data) == "not the published rows: vision/ink"


def test_pictures_of_another_size_are_prepared_as_the_manifest_says(tmp_path, published):
    large = [(picture(n, size=21), n % 3) for n in range(14)]
    small = [
        Image.eval(p.resize((8, 8), Image.Resampling.BOX), lambda v: 255 - v) for p, _ in large
    ]
    labels = [label for _, label in large]
    write_rows(published[1] / "vision/ink/train.parquet", small[:9], labels[:9])
    write_rows(published[1] / "vision/ink/test.parquet", small[9:], labels[9:])
    manifest = tmp_path / "toys.yaml"
    said = yaml.safe_load(manifest.read_text())
    said["vision/ink"]["prepare"] = {"size": 8, "resample": "box", "invert": True}
    manifest.write_text(yaml.safe_dump(said))
    write_manifest(manifest, published[1])
    class_folders(tmp_path / "sources", "ink", large)
    ink, _ = gather(spec_of(published), [str(tmp_path / "sources")], tmp_path / "out")
    assert ink.problem is None


def test_a_ppm_file_whose_line_ends_were_changed_is_mended():
    pixels = bytes(range(48)) * 4
    whole = b"P6\n8 8\n255\n" + pixels
    damaged = whole.replace(b"\n", b"\r\n")
    assert len(damaged) > len(whole) and repaired(damaged) == whole
    assert repaired(whole) == whole and repaired(damaged + b"x") == damaged + b"x"


def test_a_hub_data_set_is_read_where_no_folder_is_given(tmp_path, published, monkeypatch):
    manifest = tmp_path / "toys.yaml"
    said = yaml.safe_load(manifest.read_text())
    said["vision/ink"] |= {"hub": "org/ink", "hub_splits": ["test"]}
    manifest.write_text(yaml.safe_dump(said))
    asked = []

    def opened(source, split):
        asked.append((source.hub, split))
        pictures, labels = zip(
            *everything("paint" if "paint" in source.hub else "ink"), strict=True
        )
        return Rows({"image": pictures, "label": labels}, CLASSES)

    monkeypatch.setattr(gathering, "open_split", opened)
    found = gather(spec_of(published), ["paint=org/paint@main"], tmp_path / "out")
    assert [one.problem for one in found] == [None, None]
    assert asked == [("org/ink", "test"), ("org/paint@main", "train")]


def test_a_hub_that_cannot_be_reached_is_said_with_another_way(tmp_path, published, monkeypatch):
    def unreachable(source, split):
        raise DataError("org/ink cannot be fetched from the Hub", where=split, found="offline")

    monkeypatch.setattr(gathering, "open_split", unreachable)
    ink, _ = gather(spec_of(published), ["ink=org/ink"], tmp_path / "out")
    for part in ("cannot be fetched", "git clone https://example.org/a/copies sources/ink/copies"):
        assert part in str(ink.problem)


@pytest.mark.parametrize(
    "source, part",
    [("nowhere", "not there"), ("inc=org/ink", "no data set"), ("ink=x", "not there")],
)
def test_a_source_that_is_not_understood_is_refused(tmp_path, published, source, part):
    with pytest.raises(SuiteError, match=part):
        gather(spec_of(published), [source], tmp_path / "out")


def test_a_suite_without_published_rows_is_refused(tmp_path):
    with pytest.raises(SuiteError, match="not published"):
        gather(read_suite(find_suite("digits")), [], tmp_path)
    assert matches(read_suite(find_suite("digits")), tmp_path) is None


def test_a_manifest_that_is_not_there_or_damaged_is_refused(tmp_path, published):
    (tmp_path / "toys.parquet").write_bytes(b"no parquet")
    with pytest.raises(Exception, match="cannot be read") as caught:
        manifest_of(spec_of(published))
    assert "toys.parquet" in str(caught.value)
    (tmp_path / "toys.yaml").unlink()
    with pytest.raises(SuiteError, match="manifest"):
        manifest_of(spec_of(published))


def test_naming_a_manifest_does_not_change_what_results_depend_on(published):
    spec = spec_of(published)
    without = spec.model_copy(update={"rows": None})
    assert spec.digest() == without.digest() and spec.pool_digest() == without.pool_digest()


@pytest.mark.parametrize("name", ["vision-mini", "vision-mini-narrow"])
def test_the_shipped_manifest_has_every_row_of_its_suite_once(name):
    spec = read_suite(find_suite(name))
    found = manifest_of(spec)
    assert list(found) == [task.data for task in spec.tasks.values()]
    for task in spec.tasks.values():
        one = found[task.data]
        hashes = np.concatenate([rows.hashes for rows in one.splits.values()])
        assert len(np.unique(hashes)) == len(hashes) == len(one)
        assert list(one.classes) == task.classes and one.origin.licence and one.origin.source
        for rows in one.splits.values():
            assert set(rows.labels.tolist()) == set(range(len(one.classes)))


def test_a_sweep_says_whether_its_data_are_the_published_rows(tmp_path, published, monkeypatch):
    from fusewright.bench.suite import suite
    from fusewright.bench.sweep import run

    path, data = published
    assert run._published(suite(path, data=data), tmp_path) == {"data": "the published rows"}
    asked = []
    monkeypatch.setattr(run, "matches", lambda *given: asked.append(given) or "looked again")
    assert run._published(suite(path, data=data), tmp_path) == {"data": "the published rows"}
    assert not asked  # the files are the same
    empty, other = tmp_path / "empty", tmp_path / "other"
    other.mkdir()
    assert run._published(suite(path, data=empty), tmp_path) == {"data": "looked again"}
    monkeypatch.undo()
    found = run._published(suite(path, data=empty), other)
    assert found == {"data": "not the published rows: vision/ink, vision/paint"}
    assert run._published(suite("digits", data=data), tmp_path) == {}


def run(*words: object):
    return CliRunner().invoke(app, ["suite", "gather", *map(str, words)])


def test_the_command_gathers_checks_and_says_so_by_its_exit_code(tmp_path, published):
    suite, data = published
    assert run(suite, "-o", data, "--check").exit_code == 0
    shuffled_parquet(tmp_path / "sources", "ink")
    out = run(suite, "--from", tmp_path / "sources", "-o", tmp_path / "out")
    assert out.exit_code == 1
    assert "vision/ink" in out.output and "14 of 14 rows were not found" in out.output
    shuffled_parquet(tmp_path / "sources", "paint")
    out = run(suite, "--from", tmp_path / "sources", "-o", tmp_path / "out", "--json")
    assert out.exit_code == 0
    assert [one["found"] for one in json.loads(out.stdout)] == [14, 14]
    shutil.rmtree(tmp_path / "out/vision/ink")
    out = run(suite, "-o", tmp_path / "out", "--check", "--json")
    assert out.exit_code == 1
    assert [one["error"] is None for one in json.loads(out.stdout)] == [False, True]
