"""Peak private memory of merges against the promise: interpreter with torch + --memory + 64 MB.

    python benchmarks/memory.py --work DIR [--memory 64MiB,1GiB] [--experts 3,8] [--sizes 1,4]

Each case runs in a process of its own, whose RssAnon is read from outside every 5 ms. The models
are sparse files of zeros: Llama-shaped, of 1.1B parameters and of four times as many. ``--pool``
merges models of random weights (made there if need be) instead. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from models import llama_tensors, make_pool

from fusewright.engine.options import parse_size
from fusewright.weights import DType, TensorInfo
from fusewright.weights.shards import plan_shards

ALLOWANCE = 64 * 2**20
METHODS = {
    "linear": "fw.Linear()",
    "ties": "fw.Ties(density=0.2, scope='tensor')",
    "iso_c": "fw.IsoC()",
}
MERGE = """
import json, sys, fusewright as fw
case = json.loads(sys.argv[1])
fw.merge(METHOD, base=case["base"], experts=case["experts"], out=case["out"], durable=False,
         overwrite=True,
         memory=case["memory"], threads=case["threads"], kernels=case["kernels"])
"""
BASELINE = "import time, torch; torch.ones(9).sum(); time.sleep(1)"
COLUMNS = ("size", "method", "experts", "memory", "peak MB", "above torch", "over --memory", "met")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs")
    parser.add_argument("--pool", type=Path, help="folder of models of random weights")
    parser.add_argument("--memory", default="64MiB,1GiB")
    parser.add_argument("--experts", default="3,8")
    parser.add_argument("--sizes", default="1,4")
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-kernels", action="store_true", help="torch only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {"baseline": peak([sys.executable, "-c", BASELINE]), "cases": []}
    print(f"interpreter with torch: {results['baseline'] / 2**20:.0f} MiB")
    print(" ".join(f"{c:>13}" for c in COLUMNS))
    sizes, counts = numbers(args.sizes), numbers(args.experts)
    for size, method, experts, memory in itertools.product(
        sizes, args.methods.split(","), counts, args.memory.split(",")
    ):
        row = measure(args, size, method, experts, memory, results["baseline"])
        results["cases"].append(row)
        print(" ".join(f"{row[c]!s:>13}" for c in COLUMNS), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    sys.exit(not all(row["met"] for row in results["cases"]))


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def measure(
    args: argparse.Namespace, size: int, method: str, experts: int, memory: str, baseline: int
) -> dict:
    """One merge: what its peak is above the baseline, and above the budget."""
    base, models = models_for(args, size, experts)
    out = args.work / "memory-bench-out"
    case = {"base": str(base), "experts": {m.name: str(m) for m in models}, "out": str(out),
            "memory": parse_size(memory), "threads": args.threads,
            "kernels": not args.no_kernels}  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    try:
        code = MERGE.replace("METHOD", METHODS[method])
        most = peak([sys.executable, "-c", code, json.dumps(case)])
    finally:
        shutil.rmtree(out, ignore_errors=True)
    over = most - baseline - case["memory"]
    return {
        "size": f"{size} x 1.1B", "method": method, "experts": experts, "memory": memory,
        "peak MB": round(most / 1e6), "above torch": round((most - baseline) / 1e6),
        "over --memory": round(over / 1e6), "met": over <= ALLOWANCE,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def peak(command: list[str]) -> int:
    """The largest RssAnon of a command while it runs, in bytes. Raises if it fails."""
    process, most = subprocess.Popen(command), 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        line = next((x for x in status.read_text().splitlines() if x.startswith("RssAnon")), None)
        most = max(most, int(line.split()[1]) * 1024 if line else 0)
        time.sleep(0.005)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return most


def models_for(args: argparse.Namespace, size: int, experts: int) -> tuple[Path, list[Path]]:
    if args.pool:
        return make_pool(args.pool, experts)
    root = args.work / f"sparse-{size}"
    return sparse(root / "base", size), [sparse(root / f"e{i}", size) for i in range(experts)]


def sparse(folder: Path, size: int) -> Path:
    """A checkpoint of zeros that takes no room: a header, and the end of the file. Its matrices
    have ``size`` times the elements (a square number)."""
    folder.mkdir(parents=True, exist_ok=True)
    side = round(size**0.5)
    infos = [TensorInfo(n, DType.BF16, tuple(side * d for d in s))
             for n, s in llama_tensors().items()]  # fmt: skip
    (shard,) = plan_shards(infos, 2**40, {"format": "pt"})
    with open(folder / shard.file, "wb") as file:
        file.write(shard.header)
        file.truncate(shard.size)
    return folder


if __name__ == "__main__":
    main()
