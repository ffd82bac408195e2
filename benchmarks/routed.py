"""What routed models cost beside the dense model: seconds, parameters, bytes.

    python benchmarks/routed.py [--batch 64] [--experts 8] [--turns 3] [--clock processor]
                                [--only wemoe,e_wemoe] [--layers 12] [--files DIR]

A vision tower of the shape of CLIP ViT-B/32 (width 768, 12 blocks, 50 tokens) with random weights;
experts are the base with a little noise on every linear map. All models answer the same batch, in
turns, and the least time of each counts; a ratio is to the dense model. "sample" mixes the weights
of every input by itself, "batch" once for all. The fewer --layers, the sooner; ratios hardly
change. --files saves WEMoE and E-WEMoE there, compares what they take, and what opening them takes.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from torch import nn

import fusewright as fw
from fusewright.methods.contract import Routed
from fusewright.methods.routed import EWEMoE, Smile, WEMoE

BARS = {"smile": 1.6, "wemoe sample": 2.5, "wemoe batch": 1.15}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = tower(args.layers)
    experts = {str(t): noisy(base, t) for t in range(args.experts)}
    pixels = torch.randn(args.batch, 3, 224, 224)
    models, sizes = {"dense": base}, {"dense": {}}
    for name, method in methods(args.only).items():
        made = fw.merge(method, base=base, experts=experts)
        models[name], sizes[name] = made.module(), made.report["parameters"]
        if args.files is not None and name in ("wemoe sample", "e_wemoe sample"):
            made.save(args.files / name.replace(" ", "-"))
    del experts
    print(f"{args.layers} blocks, {args.experts} experts, batch {args.batch}, "
          f"{args.threads} threads, {args.clock} seconds, torch {torch.__version__}")  # fmt: skip
    report(best(models, pixels, args.turns, CLOCKS[args.clock]), sizes)
    if args.files is not None:
        one, two = (folder(args.files / n) for n in ("e_wemoe-sample", "wemoe-sample"))
        print(f"E-WEMoE's files are {one / two:.3f} of WEMoE's ({one:,} and {two:,} bytes)")
        for name in ("wemoe-sample", "e_wemoe-sample"):
            base.config.architectures = [type(base).__name__]
            base.config.save_pretrained(args.files / name)
            loaded(args.files / name, pixels[:1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--only", default="", help="names that begin so, separated by commas")
    parser.add_argument("--files", type=Path)
    return parser.parse_args()


def tower(layers: int) -> nn.Module:
    config = transformers.CLIPVisionConfig(num_hidden_layers=layers)  # else its defaults: B/32
    return transformers.CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


def noisy(base: nn.Module, seed: int) -> nn.Module:
    draw, expert = torch.Generator().manual_seed(seed), copy.deepcopy(base)
    for part in expert.modules():
        if isinstance(part, nn.Linear):
            part.weight.add_(torch.randn(part.weight.shape, generator=draw), alpha=1e-3)
    return expert


def methods(only: str) -> dict[str, Routed]:
    """Untrained: learning changes no time."""
    found = {
        "smile": Smile(gate=16, rank=32, top=1),
        "wemoe sample": WEMoE(steps=0), "wemoe batch": WEMoE(steps=0, per="batch"),
        "e_wemoe sample": EWEMoE(steps=0), "e_wemoe batch": EWEMoE(steps=0, per="batch"),
    }  # fmt: skip
    return {n: m for n, m in found.items() if n.startswith(tuple(only.split(",")))}


def best(models: dict[str, nn.Module], pixels: torch.Tensor, turns: int, clock) -> dict[str, float]:
    seconds = dict.fromkeys(models, float("inf"))
    with torch.inference_mode():
        for turn in range(turns + 1):  # the first is not counted
            for name, model in models.items():
                start = clock()
                model(pixel_values=pixels)
                if turn:
                    seconds[name] = min(seconds[name], clock() - start)
    return seconds


def report(seconds: dict[str, float], sizes: dict[str, dict[str, int]]) -> None:
    for name, took in seconds.items():
        size, bar = sizes[name], BARS.get(name)
        said = f"{name:<16}{took:8.2f} s {took / seconds['dense']:6.2f} x"
        said += f" (at most {bar})" if bar else ""
        if size:
            said += (f"   stored {size['stored']:,}, trained {size['trained']:,}, active "
                     f"{size['active']:,}, {size['bytes']:,} bytes")  # fmt: skip
        print(said, flush=True)


def loaded(path: Path, pixels: torch.Tensor) -> None:
    """Seconds and memory of its own (RssAnon) that opening a saved model takes, in a process that
    has loaded the libraries, and that one answer adds."""
    code = "import sys; from routed import opened; opened(sys.argv[1], sys.argv[2])"
    torch.save(pixels, path.parent / "pixels.pt")
    subprocess.run([sys.executable, "-c", code, path, path.parent / "pixels.pt"], check=True,
                   cwd=Path(__file__).parent)  # fmt: skip


def opened(path: str, pixels: str) -> None:
    """What :func:`loaded` runs."""
    inputs = torch.load(pixels)
    tower(1)  # libraries import what they need when they are first used
    before, began = anonymous(), time.perf_counter()
    model = fw.load(path)
    seconds, held = time.perf_counter() - began, anonymous() - before
    with torch.no_grad():
        model(pixel_values=inputs)
    size = folder(Path(path)) / 2**20
    print(f"{Path(path).name}: {size:.0f} MiB of files opened in {seconds:.2f} s and {held:.0f} "
          f"MiB; with one answer {anonymous() - before:.0f} MiB")  # fmt: skip


def anonymous() -> float:
    """RssAnon of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def folder(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


if __name__ == "__main__":
    main()
