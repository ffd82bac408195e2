"""What AdaMerging adds to a training step: time, and memory in projection mode.

    python benchmarks/adamerging.py [--experts 8] [--images 16] [--rounds 3] [--layers 12]

A vision model of CLIP ViT-B/32's shape. A step (all task vectors in memory; layer-wise
coefficients) is timed against a plain forward and backward pass of one model over the same batches;
rounds alternate and the fastest of each counts. Then memory: task vectors are made anew at every
read, as files would be read, and the growth of the process's own pages over one step is compared
with the base, the merged tensors, their gradients and one task vector of the largest tensor.
"""

from __future__ import annotations

import argparse
import gc
import json
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fusewright.methods.learned.coefficients import LinearCoefficients
from fusewright.methods.learned.objectives import entropy
from fusewright.modules.deltas import Delta, Dense
from fusewright.modules.parametrised import ParametrisedMerge
from fusewright.modules.vectors import TaskVectors

CLASSES = 100


def vision(layers: int) -> nn.Module:
    """CLIP ViT-B/32's vision tower at random, in evaluation mode."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12,
        image_size=224, patch_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return CLIPVisionModel(config).eval()


def task_vectors(model: nn.Module, experts: int) -> TaskVectors:
    """Random task vectors that are made when they are read."""
    base = {name: tensor.detach() for name, tensor in model.named_parameters()}

    def read(expert: str, name: str) -> Delta:
        draw = torch.Generator().manual_seed(hash((int(expert), len(name))) % 2**31)
        return Dense(torch.empty_like(base[name]).uniform_(-1e-3, 1e-3, generator=draw))

    return TaskVectors(tuple(map(str, range(experts))), base, read)


def merged(model: nn.Module, vectors: TaskVectors) -> ParametrisedMerge:
    start = LinearCoefficients(vectors.names, vectors.experts, lambda name: name, 0.3)
    return ParametrisedMerge(model, vectors, start)


def losses(model: nn.Module, batches: list[Tensor], head: Tensor):
    for batch in batches:
        yield entropy(model(pixel_values=batch).pooler_output @ head)


def plain(model: nn.Module, batches: list[Tensor], head: Tensor) -> float:
    started = time.perf_counter()
    for loss in losses(model, batches, head):
        loss.backward()
    elapsed = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return elapsed


def step(merge: ParametrisedMerge, batches: list[Tensor], head: Tensor) -> float:
    started = time.perf_counter()
    with merge.live() as live:
        for loss in losses(live.model, batches, head):
            live.backward(loss)
        live.collect()
    return time.perf_counter() - started


def anonymous() -> int:
    """RssAnon of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def peak(work) -> int:
    """Growth of RssAnon while ``work`` runs, looked at every 5 ms."""
    gc.collect()
    before, found, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            found.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("experts", 8), ("images", 16), ("rounds", 3), ("layers", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    model = vision(asked.layers)
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(asked.images, 3, 224, 224, generator=draw)
               for _ in range(asked.experts)]  # fmt: skip
    head = torch.randn(768, CLASSES, generator=draw)
    streamed = task_vectors(model, asked.experts)
    sizes = [tensor.nbytes for tensor in streamed.base.values()]
    training = peak(lambda: plain(model, batches[:1], head))
    model.requires_grad_(False)
    memory = peak(lambda: step(merged(model, streamed), batches[:1], head))
    kept = merged(model, streamed.kept())
    ones, others = [], []
    for _ in range(asked.rounds):
        model.requires_grad_(True)
        ones.append(plain(model, batches, head))
        model.requires_grad_(False)
        others.append(step(kept, batches, head))
    print(json.dumps({
        "threads": torch.get_num_threads(), "experts": asked.experts, "images": asked.images,
        "plain_s": min(ones), "step_s": min(others), "ratio": min(others) / min(ones),
        "model_MiB": sum(sizes) / 2**20, "largest_tensor_MiB": max(sizes) / 2**20,
        "plain_growth_MiB": training / 2**20, "step_growth_MiB": memory / 2**20,
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
