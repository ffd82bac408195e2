"""Which of our methods is which of FusionBench's, and with which parameters they are equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiny_clip import TASKS

import fusewright as fw

WEIGHTS = (0.5, 0.3, 0.4)


@dataclass
class Case:
    """One method in both. ``peer`` makes FusionBench's algorithm."""

    method: Any
    peer: Any
    experts: tuple[str, ...] = TASKS
    density: float | None = None
    base: bool = True
    note: str = ""


def cases(elements: int) -> dict[str, Case]:
    """By what the table calls them. ``elements``: of one expert."""
    import fusion_bench.method as their
    from fusion_bench.method.dare import DareSimpleAverage, DareTaskArithmetic, DareTiesMerging
    from fusion_bench.method.isotropic_merging import ISO_C_Merge
    from fusion_bench.method.linear.expo import ExPOAlgorithm
    from fusion_bench.method.model_stock import ModelStock
    from fusion_bench.method.slerp import SlerpMergeAlgorithm

    def ties(merge: str) -> Any:
        return their.TiesMergingAlgorithm(
            scaling_factor=0.3, threshold=20, remove_keys=[], merge_func=merge
        )

    def weighted(normalize: bool) -> Any:
        return their.WeightedAverageAlgorithm(normalize, list(WEIGHTS), verbose=False)

    def dare_ties() -> Any:
        return DareTiesMerging(
            sparsity_ratio=0.5, only_on_linear_weights=False, rescale=True, scaling_factor=0.5,
            threshold=20, remove_keys=[], merge_func="sum",
        )  # fmt: skip

    weight = dict(zip(TASKS, WEIGHTS, strict=True))
    one_more = (int(0.2 * elements) + 1.5) / elements
    more = f"density {one_more:.6f} keeps one entry more an expert, as its k-th value does"
    elect: dict[str, Any] = {"normalize": False, "scale": 0.5}
    dare = {"sparsity_ratio": 0.5, "only_on_linear_weights": False}
    one = TASKS[:1]
    return {
        "average": Case(fw.Average(), their.SimpleAverageAlgorithm()),
        "linear": Case(fw.Linear(weight=weight), weighted(True)),
        "linear, normalize: false": Case(fw.Linear(weight=weight, normalize=False),
                                         weighted(False)),
        "linear, base and one expert": Case(
            fw.TaskArithmetic(scale=0.4), their.LinearInterpolationAlgorithm(t=0.4), one,
            note="it compares a list with 2, so it always does",
        ),
        "task_arithmetic": Case(fw.TaskArithmetic(), their.TaskArithmeticAlgorithm(0.3)),
        "mean, scale 1.1": Case(fw.Mean(scale=1.1), ExPOAlgorithm(extrapolation_factor=0.1)),
        "ties, its profile": Case(fw.Ties.profile("fusionbench"), ties("sum"),
                                  note="one entry fewer an expert is kept; see the next row"),
        "ties, its profile, its count": Case(
            fw.Ties.profile("fusionbench", density=one_more), ties("sum"), note=more),
        "ties, scale 0.3, its count": Case(
            fw.Ties(scale=0.3, density=one_more), ties("mean"), note=more),
        "slerp": Case(fw.Slerp(), SlerpMergeAlgorithm(t=0.5), TASKS[:2], base=False),
        "slerp, base and one expert, t 0.3": Case(fw.Slerp(t=0.3), SlerpMergeAlgorithm(t=0.3), one),
        "drop >> mean": Case([fw.Drop(density=0.5), fw.Mean()],
                             DareSimpleAverage(**dare), density=0.5),
        "dare_linear, its profile": Case(
            fw.DareLinear.profile("fusionbench"), DareTaskArithmetic(scaling_factor=0.3, **dare),
            density=0.5),
        "dare_ties, its profile": Case(
            fw.DareTies.profile("fusionbench"), dare_ties(), density=0.5,
            note="it also trims what DARE left, which the paper does not; see the next row"),
        "drop >> trim >> elect, its count": Case(
            [fw.Drop(density=0.5), fw.Trim(density=one_more), fw.Elect(**elect)], dare_ties(),
            density=0.5, note=more),
        "iso_c": Case(fw.IsoC(), ISO_C_Merge(scaling_factor=1.0),
                      note="it flattens position embeddings too, and no convolution"),
        "iso_c, its profile": Case(fw.IsoC.profile("fusionbench"), ISO_C_Merge(scaling_factor=1.0)),
        "model_stock, two experts": Case(fw.ModelStock.profile("fusionbench"), ModelStock(),
                                         TASKS[:2]),
        "model_stock, three experts": Case(
            fw.ModelStock.profile("fusionbench"), ModelStock(),
            note="it averages angles, we average cosines: no parameter makes them equal"),
    }  # fmt: skip
