"""Evaluation against a plain loop over the same model and data, as a ratio of seconds.

    python benchmarks/evaluate.py [--data DIR --set vision/mnist] [--items 2000] [--repeats 7]

The plain loop is what one writes by hand: read all rows with pyarrow, decode with Pillow, stack and
normalise batches, ``model.eval()`` under ``torch.inference_mode()``, argmax, compare. ``evaluate``
also records loss, confidence and entropy of every item. "decoded before": both begin with decoded
pictures in memory (uint8), as in a sweep of many models. Without --data the pictures are random,
32x32. The two take turns, and each pair gives a ratio; below 1 ``evaluate`` is the faster one.
--clock processor counts processor seconds, which other programs disturb less; but ``evaluate``
reads ahead in a second thread, which only the wall clock shows.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from fusewright.tasks import DataSource, ImageClassification, ImagePreparation, evaluate, open_split

MEAN, STD, SIZE = 0.5, 0.25, 32
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
clock = time.perf_counter


def main() -> None:
    global clock
    args = arguments()
    clock = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or random_pictures(Path(scratch), args.set, args.items)
        split = open_split(DataSource(folder=args.set), f"test[:{args.items}]", data)
        file = data / args.set / "test.parquet"
        print(f"{len(split)} pictures of {args.set}, batches of {args.batch}, {args.threads} thread"
              f"{'s' * (args.threads > 1)}, torch {torch.__version__}")  # fmt: skip
        for name, model in models(args.width).items():
            measure(name, model, split, file, args)


def measure(name, model, split, file: Path, args: argparse.Namespace) -> None:
    classes = split.classes
    head = torch.randn(len(classes), args.width, generator=torch.Generator().manual_seed(0))
    preparation = ImagePreparation(size=SIZE, mean=(MEAN,) * 3, std=(STD,) * 3)
    task = ImageClassification("toy", classes, head=head, preparation=preparation)
    held, decoded = task.prepared(split), list(plain_batches(file, args))
    cases = {
        "from disk": (lambda: plain_loop(model, head, plain_batches(file, args)),
                      lambda: evaluate(model, task, split, batch_size=args.batch)),
        "decoded before": (lambda: plain_loop(model, head, decoded),
                           lambda: evaluate(model, task, held, batch_size=args.batch)),
    }  # fmt: skip
    for case, (plain, ours) in cases.items():
        accuracy = float(np.mean(plain())), ours().value
        assert accuracy[0] == accuracy[1], accuracy  # also warms up
        pairs = [in_turn(plain, ours, first=i % 2) for i in range(args.repeats)]
        ratios = sorted(b / a for a, b in pairs)
        print(f"{name:>6}, {case:<15} plain {median(a for a, _ in pairs):6.3f} s   evaluate "
              f"{median(b for _, b in pairs):6.3f} s   ratio {median(ratios):.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip


def plain_batches(file: Path, args: argparse.Namespace):
    table = pq.read_table(file).slice(0, args.items)
    labels = table["label"].to_numpy()
    pictures = table["image"].to_pylist()
    for at in range(0, len(labels), args.batch):
        found = [Image.open(io.BytesIO(p["bytes"])).convert("RGB")
                 for p in pictures[at : at + args.batch]]  # fmt: skip
        resized = [p if p.size == (SIZE, SIZE) else p.resize((SIZE, SIZE), Image.BICUBIC)
                   for p in found]  # fmt: skip
        tensors = [torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in resized]
        yield torch.stack(tensors), torch.tensor(labels[at : at + args.batch])


def plain_loop(model, head, batches) -> list[bool]:
    right: list[bool] = []
    model.eval()
    with torch.inference_mode():
        for pixels, labels in batches:
            features = model(pixel_values=(pixels.float() / 255 - MEAN) / STD).last_hidden_state
            features = features[:, 0] if features.dim() == 3 else features.mean(dim=(2, 3))
            right += (features @ head.T).argmax(dim=1).eq(labels).tolist()
    return right


def in_turn(plain, ours, first: int) -> tuple[float, float]:
    """Seconds of each; which of them begins changes, and so does who finds a warm cache."""
    if first:
        later = seconds(ours)
        return seconds(plain), later
    return seconds(plain), seconds(ours)


def seconds(act) -> float:
    start = clock()
    act()
    return clock() - start


def models(width: int) -> dict:
    from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    vit = ViTConfig(image_size=SIZE, patch_size=8, hidden_size=width, num_hidden_layers=6,
                    num_attention_heads=4, intermediate_size=2 * width)  # fmt: skip
    tiny = ViTConfig(image_size=SIZE, patch_size=16, hidden_size=width, num_hidden_layers=1,
                     num_attention_heads=4, intermediate_size=width)  # fmt: skip
    resnet = ResNetConfig(embedding_size=16, hidden_sizes=[32, width], depths=[1, 1])
    return {"ViT": ViTModel(vit, add_pooling_layer=False), "ResNet": ResNetModel(resnet),
            "tiny": ViTModel(tiny, add_pooling_layer=False)}  # fmt: skip


def random_pictures(root: Path, name: str, items: int) -> Path:
    rng, rows = np.random.default_rng(0), []
    for _ in range(items):
        file = io.BytesIO()
        picture = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(picture).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(
        '{"features": {"label": {"names": ["0", "1", "2", "3"]}}}'
    )
    pq.write_table(
        pa.table({"image": rows, "label": rng.integers(0, 4, items)}), folder / "test.parquet"
    )
    return root


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--set", default="vision/mnist")
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    return parser.parse_args()


if __name__ == "__main__":
    main()
