"""What evening out a merge's singular values costs or gains, at equal length.

    python benchmarks/flattening.py SUITE --data DIR --pool DIR -o DIR
        [--variant lora] [--limit 500]

Of each matrix that Iso-C treats, the sum of the task vectors is stretched to a length (Frobenius
norm, times the sum's), or its leading directions are made equally long to that length and the
others dropped: all of them (Iso-C), half, a quarter. Other tensors stay the base's. Test rows of
the merged tasks; it prints a table, the share of directions that are not empty, the effective rank,
and the length that Iso-C gives by itself, and writes DIR/SUITE[-VARIANT].md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

import fusewright as fw
from fusewright.bench.exchange import Exchange
from fusewright.bench.suite import Suite
from fusewright.engine.state import read_state
from fusewright.layout.describe import describe
from fusewright.methods.static._matrices import is_treated

LENGTHS, SHARES = (0.15, 0.3, 0.6, 1.0), (1.0, 0.5, 0.25)
EMPTY = 1e-6
Split = tuple[Tensor, Tensor, Tensor]


def sums(suite: Suite, base: dict[str, Tensor]) -> dict[str, Split]:
    """The singular value decomposition of each treated matrix' summed task vectors."""
    experts = {task: suite.experts[task] for task in suite.spec.merged}
    whole = fw.TaskArithmetic(scale=1.0)
    state = fw.merge(whole, base=suite.base, experts=experts, dtype="float32").state_dict()
    layout = describe({name: tuple(tensor.shape) for name, tensor in base.items()})
    found = {}
    for name, start in base.items():
        if is_treated("matrices", tuple(start.shape), layout[name]):
            moved = (state[name].double() - start.double()).flatten(1)
            if bool(moved.any()):
                found[name] = torch.linalg.svd(moved, full_matrices=False)
    return found


def effective_rank(sigma: Tensor) -> float:
    """(Σσ)² / (r Σσ²): 1 if all r singular values are equal, 1 / r if there is one."""
    return float(sigma.sum() ** 2 / sigma.square().sum() / len(sigma))


def real(sigma: Tensor) -> int:
    return int((sigma > EMPTY * sigma[0]).sum())


def flattened(sigma: Tensor, share: float) -> Tensor:
    """As long as it was, over so many of its leading directions."""
    kept = max(1, round(share * real(sigma)))
    flat = torch.zeros_like(sigma)
    flat[:kept] = sigma.norm() / kept**0.5
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite")
    for name in ("--data", "--pool", "--out"):
        parser.add_argument(name, *(["-o"] if name == "--out" else []), type=Path, required=True)
    parser.add_argument("--variant")
    parser.add_argument("--limit", type=int, default=500)
    asked = parser.parse_args()
    suite = fw.suite(asked.suite, pool=asked.pool, data=asked.data, variant=asked.variant)
    base = read_state(suite.base)
    splits = sums(suite, base)
    exchange = Exchange(suite.open(suite.base), suite.base, suite.spec.opens)

    def score(length: float, share: float | None) -> float:
        state = dict(base)
        for name, (left, sigma, right) in splits.items():
            kept = length * (sigma if share is None else flattened(sigma, share))
            moved = ((left * kept) @ right).reshape(base[name].shape)
            state[name] = (base[name].double() + moved).to(base[name].dtype)
        module = exchange.filled(state)
        return mean(100 * suite.evaluate(module, task, "test", asked.limit).value
                    for task in suite.spec.merged)  # fmt: skip

    lines = ["| length | the sum | " + " | ".join(f"flat, leading {s:.0%}" for s in SHARES) + " |",
             "| --: | --: | " + " | ".join("--:" for _ in SHARES) + " |"]  # fmt: skip
    for length in LENGTHS:
        row = " | ".join(f"{score(length, share):.1f}" for share in (None, *SHARES))
        lines.append(f"| {length} | {row} |")
        print(lines[-1], flush=True)
    spectra = [sigma for _, sigma, _ in splits.values()]
    share, rank = mean(real(s) / len(s) for s in spectra), mean(map(effective_rank, spectra))
    own = mean(float(s.mean() * real(s) ** 0.5 / s.norm()) for s in spectra)
    lines += ["", f"directions that are not empty: {share:.2f}; effective rank: {rank:.2f}; "
              f"Iso-C's own length: {own:.2f} of the sum's", ""]  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    name = asked.suite + (f"-{asked.variant}" if asked.variant else "")
    (asked.out / f"{name}.md").write_text("\n".join([f"# {name}", "", *lines]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
