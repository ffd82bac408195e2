"""What single methods promise beyond the contract: variants, edges and refusals."""

from __future__ import annotations

import pytest
import torch

import fusewright.methods.static as fw
from fusewright.errors import PlanError, RecipeError
from fusewright.layout.spec import Role, TensorLayout
from fusewright.methods.contract import At, Unit
from fusewright.methods.pipeline import resolved
from fusewright.methods.random import Stream, threshold
from fusewright.methods.static._gram import gram_matrix, gram_partial
from fusewright.methods.static._iso_c import isotropic
from fusewright.testing import toy
from fusewright.weights.spec import LowRank

ZERO = torch.zeros(6)


def at(shape: tuple[int, ...] = (6,), experts: int = 2, **layout: object) -> At:
    keys = tuple(map(str, range(experts)))
    place = TensorLayout("w", **layout)  # type: ignore[arg-type]
    return At("w", shape, 0, torch.Size(shape).numel(), keys, place)


# -- sums and averages ---------------------------------------------------------------------------


def test_weights_are_normalised_and_named() -> None:
    x, y = torch.full((3,), 1.0), torch.full((3,), 4.0)
    assert fw.Linear(weight={"a": 1.0, "b": 2.0})(None, [x, y], keys=["a", "b"]).tolist() == [3] * 3
    assert fw.Linear(weight=0.5, normalize=False)(None, [x, y]).tolist() == [2.5] * 3


@pytest.mark.parametrize("method", [fw.Linear, fw.Mean, fw.Sum])
def test_weights_that_sum_to_zero_cannot_be_normalised(method: type[fw.Sum]) -> None:
    weighted = method(weight={"0": 1.0, "1": -1.0}, normalize=True)
    with pytest.raises(PlanError, match="sum to zero"):
        weighted(ZERO, [ZERO, ZERO])
    with pytest.raises(PlanError, match="sum to zero"):
        place = at()
        weighted.check(place.replaced(params=resolved(weighted, place.layout, place.experts)))


def test_negation_and_analogy() -> None:
    base, a, b, c = (torch.full((2,), float(v)) for v in (1, 2, 4, 8))
    assert fw.TaskArithmetic(scale=-1.0)(base, [a]).tolist() == [0.0, 0.0]
    analogy = fw.TaskArithmetic(scale=1.0, weight={"2": -1.0})(base, [a, b, c])
    assert analogy.tolist() == [1.0 + 1 + 3 - 7] * 2


def test_scale_varies_over_layers_and_tensors() -> None:
    method = fw.TaskArithmetic(scale={"layers": [0.0, 1.0]})
    place = TensorLayout("w", layer=1, depth=3)
    assert method(ZERO, [ZERO + 1], layout=place).tolist() == [0.5] * 6


def test_average_does_not_overflow() -> None:
    big = torch.full((2,), 3e38)
    assert torch.isfinite(fw.Average()(None, [big, big, big])).all()


@pytest.mark.parametrize("method", [fw.Sum(weight={"0": 0.3}, scale=2.0), fw.Mean(), fw.Linear()])
def test_factors_are_put_side_by_side(method: fw.Sum) -> None:
    place = at((5, 4))
    place = place.replaced(params=resolved(method, place.layout, place.experts))
    lora = [LowRank(torch.randn(5, r), torch.randn(r, 4), 0.5) for r in (2, 3)]
    merged = method.merge_factors(lora, place)
    assert merged is not None and merged.up.shape == (5, 5) and merged.down.shape == (5, 4)
    one = method.merge_factors([None, lora[1]], place)
    assert one is not None and one.up.shape == (5, 3)
    assert method.merge_factors([None, None], place) is None


@pytest.mark.parametrize("method", [fw.Sum(weight={"0": 0.3}, scale=2.0), fw.Mean()])
def test_factors_side_by_side_are_the_sum_of_the_products(method: fw.Sum) -> None:
    place = at((5, 4))
    place = place.replaced(params=resolved(method, place.layout, place.experts))
    draw = torch.Generator().manual_seed(0)
    lora = [LowRank(torch.randn(5, 2, generator=draw), torch.randn(2, 4, generator=draw), scale)
            for scale in (0.5, 3.0)]  # fmt: skip
    merged = method.merge_factors(lora, place)
    assert merged is not None
    whole = [f.up @ f.down * f.scale for f in lora]
    torch.testing.assert_close(merged.up @ merged.down * merged.scale,
                               method.merge(whole, None, place))  # fmt: skip


def test_tensors_of_two_shapes_are_refused() -> None:
    with pytest.raises(PlanError, match="one shape"):
        fw.Linear()(None, [torch.zeros(2), torch.zeros(3)])


def test_slerp_goes_from_the_base_to_its_one_expert() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.equal(fw.Slerp(t=0.2)(a, [b]), fw.Slerp(t=0.2)(None, [a, b]))
    assert torch.equal(fw.Slerp(t=0.2)(torch.zeros(2), [a, b]), fw.Slerp(t=0.2)(None, [a, b]))


def test_factors_of_weights_are_merged_only_by_weights_that_sum_to_one() -> None:
    assert fw.Linear(normalize=False).merge_factors([], at()) is NotImplemented
    assert fw.Elect().merge_factors([], at()) is NotImplemented


# -- trim, elect, ties ---------------------------------------------------------------------------


@pytest.mark.parametrize(("density", "kept"), [(0.01, 1), (0.2, 2), (0.25, 2), (1.0, 10)])
def test_trim_keeps_the_largest(density: float, kept: int) -> None:
    vector = torch.tensor([1.0, -9, 3, 8, -5, 2, 7, -4, 6, 10])
    merged = (fw.Trim(density=density) >> fw.Sum())(torch.zeros(10), [vector])
    assert int((merged != 0).sum()) == kept
    assert merged[9] == 10


def test_trim_keeps_all_that_equal_the_threshold() -> None:
    vector = torch.tensor([2.0, -2, 2, 1, 1, 1, 1, 1, 1, 1])
    merged = (fw.Trim(density=0.1) >> fw.Sum())(torch.zeros(10), [vector])
    assert merged.tolist() == [2, -2, 2] + [0] * 7


def test_trim_has_a_density_for_each_expert() -> None:
    method = fw.Trim(density={"0": 0.5, "1": 1.0}) >> fw.Sum()
    merged = method(torch.zeros(2), [torch.tensor([1.0, 2]), torch.tensor([10.0, 20])])
    assert merged.tolist() == [10, 22]


def test_keeping_everything_measures_nothing() -> None:
    assert fw.Trim(density=1.0).rounds(torch.float32) == ()
    assert sum(r.whole for r in fw.Trim().rounds(torch.float32)) == 1
    assert sum(r.whole for r in fw.Trim().rounds(torch.float64)) == 3


@pytest.mark.parametrize(
    ("zero_sign", "first"), [("majority", -1.0), ("positive", 1.0), ("zero", 0.0)]
)
def test_what_becomes_of_entries_that_cancel(zero_sign: str, first: float) -> None:
    a, b = torch.tensor([1.0, -3, -3]), torch.tensor([-1.0, -3, 1])
    merged = fw.Elect(zero_sign=zero_sign)(torch.zeros(3), [a, b])
    assert merged.tolist() == [first, -3, -3]


def test_a_drawn_vote_keeps_nothing_of_entries_that_cancel() -> None:
    a, b = torch.tensor([1.0, 3, -3]), torch.tensor([-1.0, 0, 0])
    assert fw.Elect()(torch.zeros(3), [a, b]).tolist() == [0, 3, -3]


def test_elect_weighs_votes_and_values() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([-0.5, 4.0])
    merged = fw.Elect(weight={"0": 1.0, "1": 3.0})(torch.zeros(2), [a, b])
    assert merged.tolist() == [-0.5, (2 + 12) / 4]
    summed = fw.Elect(weight={"0": 1.0, "1": 3.0}, normalize=False, scale=2.0)
    assert summed(torch.zeros(2), [a, b]).tolist() == [-3.0, 28.0]


def test_a_negative_weight_negates() -> None:
    assert fw.Elect(weight=-0.5)(torch.zeros(1), [torch.tensor([3.0])]).tolist() == [-3.0]


def test_float64_weights_are_not_rounded_to_float32() -> None:
    x, y = (torch.full((1,), v, dtype=torch.float64) for v in (1.0, 2.0))
    merged = fw.Elect(weight={"0": 0.1, "1": 0.3})(torch.zeros_like(x), [x, y])
    assert float(merged) == pytest.approx(0.7 / 0.4, rel=1e-15)


# -- drop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_drop_keeps_what_the_words_say(rescale: str) -> None:
    vector = torch.rand(1000) + 0.5
    merged = (fw.Drop(density=0.3, rescale=rescale, seed=3) >> fw.Sum())(
        torch.zeros(1000), [vector], keys=["math"], name="w"
    )
    keep = Stream.of(3, "math", "w").words(0, 1000) < threshold(0.3)
    assert torch.equal(merged != 0, keep)
    factor = {"inverse": 1 / 0.3, "none": 1.0, "l1": float(vector.sum() / vector[keep].sum())}
    torch.testing.assert_close(merged[keep], vector[keep] * factor[rescale])


def test_drop_uses_the_merge_seed_unless_it_has_its_own() -> None:
    base, vector = torch.zeros(256), torch.ones(256)
    method = fw.Drop(density=0.5) >> fw.Sum()
    assert not torch.equal(method(base, [vector], seed=1), method(base, [vector], seed=2))
    own = fw.Drop(density=0.5, seed=1) >> fw.Sum()
    assert torch.equal(own(base, [vector], seed=2), method(base, [vector], seed=1))


def test_l1_rescale_leaves_negligible_vectors_alone() -> None:
    tiny = torch.full((8,), 1e-9)
    merged = (fw.Drop(density=0.5, rescale="l1") >> fw.Sum())(torch.zeros(8), [tiny])
    assert set(merged.tolist()) <= {0.0, float(tiny[0])}


# -- spherical and weighted by norms -------------------------------------------------------------


def test_slerp_keeps_the_norm_on_the_arc() -> None:
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    assert float(fw.Slerp(t=0.25)(None, [a, b]).norm()) == pytest.approx(3.0)
    assert torch.equal(fw.Slerp(t=0.0)(None, [a, b]), a)


@pytest.mark.parametrize(
    "b", [torch.tensor([1.0, 0.01]), torch.tensor([-2.0, 0.0]), torch.zeros(2)]
)
def test_slerp_is_linear_without_an_arc(b: torch.Tensor) -> None:
    a = torch.tensor([2.0, 0.0])
    torch.testing.assert_close(fw.Slerp(t=0.25)(None, [a, b]), 0.75 * a + 0.25 * b)


def test_the_inner_products_of_three_vectors() -> None:
    vectors = [torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 4.0])]
    expected = [[1, 2, -1], [2, 13, 10], [-1, 10, 17]]
    assert gram_matrix(gram_partial(vectors)).tolist() == expected


def test_slerp_goes_half_of_the_way_by_default() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(fw.Slerp()(None, [a, b]), torch.full((2,), 0.5**0.5))


def test_model_stock_stays_at_the_base_when_experts_are_orthogonal_or_opposed() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert fw.ModelStock()(torch.zeros(2), [x, y]).tolist() == [0, 0]
    assert fw.ModelStock()(torch.zeros(2), [x, x * 0.5 - y]).tolist() != [0, 0]
    assert fw.ModelStock()(torch.zeros(2), [x, -0.5 * x + y]).tolist() == [0, 0]
    assert fw.ModelStock(clamp=False)(torch.zeros(2), [x, -0.5 * x + y]).tolist() != [0, 0]
    assert fw.ModelStock(clamp=False)(torch.zeros(2), [x, -x]).tolist() == [0, 0]


def test_metagpt_with_equal_norms_is_the_average() -> None:
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([-4.0, 3.0])
    torch.testing.assert_close(fw.MetaGPT()(torch.zeros(2), [x, y]), (x + y) / 2)
    torch.testing.assert_close(fw.MetaGPT()(torch.zeros(2), [x, 2 * y]), 0.2 * x + 1.6 * y)


# -- LiNeS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "depth", "factor"),
    [(None, 0, 0.1), (0, 1, 0.1), (0, 5, 0.1), (2, 5, 0.5), (4, 5, 0.9)],
)
def test_lines_grows_with_depth(layer: int | None, depth: int, factor: float) -> None:
    method = fw.Sum() >> fw.LiNeS(alpha=0.1, beta=0.8)
    place = TensorLayout("w", layer=layer, depth=depth)
    merged = method(ZERO, [ZERO + 1], layout=place)
    torch.testing.assert_close(merged, ZERO + factor)


def test_lines_undoes_the_scale_of_the_merger() -> None:
    models = toy(3)
    pair = [
        (fw.Sum(scale=s) >> fw.LiNeS(beta=0.0))(models.base, models.tensors) for s in (0.3, 1.0)
    ]
    torch.testing.assert_close(pair[0], pair[1])
    mean = fw.Mean()(models.base, models.tensors)
    torch.testing.assert_close(pair[1], mean)


# -- Iso-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_isotropic_flattens_the_spectrum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, dtype=dtype)
    flat = isotropic(matrix)
    mean = torch.linalg.svdvals(matrix).mean()
    torch.testing.assert_close(torch.linalg.svdvals(flat), mean.expand(min(shape)), rtol=1e-4,
                               atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_isotropic_leaves_null_directions_empty(dtype: torch.dtype) -> None:
    low = torch.randn(12, 3, dtype=dtype) @ torch.randn(3, 8, dtype=dtype)
    found = torch.linalg.svdvals(isotropic(low))
    mean = torch.linalg.svdvals(low).mean()
    torch.testing.assert_close(found[:3], mean.expand(3), rtol=1e-4, atol=1e-5)
    assert float(found[3:].max()) < 1e-4 * float(mean)
    assert not isotropic(torch.zeros(3, 4, dtype=dtype)).any()


def test_iso_c_treats_packed_matrices_as_one_unless_split() -> None:
    base, vector = torch.zeros(6, 5), torch.randn(6, 5)
    place = TensorLayout("qkv", matrix=True, role=Role.ATTENTION, packed=(2, 2, 2))
    one = fw.IsoC()(base, [vector], layout=place)
    split = fw.IsoC(split=True)(base, [vector], layout=place)
    torch.testing.assert_close(one, isotropic(vector))
    torch.testing.assert_close(split, torch.cat([isotropic(v) for v in vector.split(2)]))
    across = TensorLayout("qkv", matrix=True, packed=(2, 3), packed_axis=1)
    parts = torch.cat([isotropic(v) for v in vector.split([2, 3], dim=1)], dim=1)
    torch.testing.assert_close(fw.IsoC(split=True)(base, [vector], layout=across), parts)


def test_iso_c_sees_convolutions_and_stacks_of_experts_as_matrices() -> None:
    conv = torch.randn(4, 3, 2, 2)
    place = TensorLayout("conv", matrix=True, role=Role.CONV)
    merged = fw.IsoC()(torch.zeros_like(conv), [conv], layout=place)
    torch.testing.assert_close(merged, isotropic(conv.reshape(4, 12)).reshape(conv.shape))
    stack = torch.randn(3, 4, 5)
    place = TensorLayout("experts", matrix=True, role=Role.EXPERT, experts_first=True)
    merged = fw.IsoC()(torch.zeros_like(stack), [stack], layout=place)
    torch.testing.assert_close(merged, torch.stack([isotropic(m) for m in stack]))


@pytest.mark.parametrize("role", [Role.EMBEDDING, Role.POSITION, Role.HEAD, Role.PROJECTION])
def test_iso_c_averages_what_is_no_map_between_hidden_states(role: Role) -> None:
    place = TensorLayout("w", matrix=True, role=role)
    assert fw.IsoC().unit((4, 5), place) is Unit.CHUNK
    assert fw.IsoC(where="all_2d").unit((4, 5), place) is Unit.TENSOR
    models = toy(2, (4, 5))
    merged = fw.IsoC(scale=2.0)(models.base, models.tensors, layout=place)
    torch.testing.assert_close(merged, models.base + sum(x - models.base for x in models.tensors))


@pytest.mark.parametrize(("otherwise", "factor"), [("mean", 0.5), ("sum", 1.0), ("base", 0.0)])
def test_iso_c_scales_other_tensors_too(otherwise: str, factor: float) -> None:
    method = fw.IsoC(otherwise=otherwise, scale=3.0)
    merged = method(torch.zeros(2), [torch.ones(2), torch.ones(2)])
    assert merged.tolist() == [3.0 * factor * 2] * 2


# -- refusals ------------------------------------------------------------------------------------


def test_passthrough_takes_one_model() -> None:
    assert fw.Passthrough(scale=0.5)(None, [torch.ones(2)]).tolist() == [0.5, 0.5]
    with pytest.raises(PlanError, match="another number of experts"):
        fw.Passthrough()(None, [ZERO, ZERO])
    with pytest.raises(PlanError, match="another number of experts"):
        fw.Passthrough()(ZERO, [])


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan"), True, "much"])
def test_densities_outside_0_1_are_refused(density: object) -> None:
    for method in (fw.Trim, fw.Drop, fw.Ties, fw.DareLinear):
        with pytest.raises(RecipeError, match="density"):
            method(density=density)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), True])
def test_scales_and_weights_must_be_finite_numbers(bad: object) -> None:
    for name in ("scale", "weight"):
        with pytest.raises(RecipeError, match=name):
            fw.Sum(**{name: bad})


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="fusionbench, mergekit, paper"):
        fw.Ties.profile("nobody")
    assert fw.Ties.profile("paper") == fw.Ties()
    assert fw.Ties.profile("mergekit", density=0.3).density == 0.3


def test_a_base_is_asked_for_by_name() -> None:
    with pytest.raises(PlanError, match="elect needs a base"):
        fw.Ties()(None, [ZERO])
