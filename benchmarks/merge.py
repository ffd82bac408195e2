"""Merging 1.1B parameters against the floor of plain reading and writing.

    python benchmarks/merge.py --work DIR [--rounds 7] [--tmpfs /dev/shm] [--methods linear,ties]

Alternates floor and methods; prints medians and their ratios, as a table and as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from floor import floor
from models import make_pool

import fusewright as fw


def methods() -> dict:
    return {
        "linear": (fw.Linear(), 3, False),
        "task_arithmetic": (fw.TaskArithmetic(scale=0.4), 3, True),
        "slerp": (fw.Slerp(t=0.4), 2, False),
        "ties": (fw.Ties.profile("mergekit", density=0.2), 3, True),
        "dare_linear": (fw.DareLinear(density=0.2), 3, True),
    }


BARS = {"linear": (1.5, 2.5), "task_arithmetic": (1.5, 2.5), "slerp": (1.5, 2.5),
        "ties": (2.5, 5.0), "dare_linear": (2.5, 5.0)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs")
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", default="")
    parser.add_argument("--places", default="disk,tmpfs")
    parser.add_argument("--no-kernels", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base, experts = make_pool(args.work / "llama-1b")
    wanted = args.methods.split(",") if args.methods else list(methods())
    results = {}
    for place in args.places.split(","):
        folder = args.work if place == "disk" else args.tmpfs
        for name in wanted:
            results[f"{name}/{place}"] = measure(name, base, experts, folder, place == "disk", args)
            print(json.dumps({f"{name}/{place}": results[f"{name}/{place}"]}), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def measure(name: str, base: Path, experts: list[Path], folder: Path, disk: bool, args) -> dict:
    method, count, needs_base = methods()[name]
    used = ([base] if needs_base else []) + experts[:count]
    files = [f for m in used for f in sorted(m.glob("*.safetensors"))]
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    out = folder / "fusewright-bench-out"
    floors, ours = [], []
    for _ in range(args.rounds + 1):  # the first round warms caches and kernels
        shutil.rmtree(out, ignore_errors=True)
        floors.append(floor(files, folder / "fusewright-bench-floor", size, args.threads, disk))
        merged = fw.merge(
            method, base=base, experts={e.name: e for e in experts[:count]}, out=out,
            threads=args.threads, durable=disk, kernels=not args.no_kernels,
        )  # fmt: skip
        ours.append(merged.report["seconds"])  # from opening the inputs to the rename
    shutil.rmtree(out, ignore_errors=True)
    low, high = statistics.median(floors[1:]), statistics.median(ours[1:])
    pairs = list(zip(floors[1:], ours[1:], strict=True))
    bar = BARS[name][0 if disk else 1]
    return {"floor": round(low, 2), "seconds": round(high, 2), "ratio": round(high / low, 2),
            "bar": bar, "met": high / low <= bar,
            "ratios": [round(b / a, 2) for a, b in pairs]}


if __name__ == "__main__":
    main()
