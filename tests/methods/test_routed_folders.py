"""Routed models of folders: dtypes in memory and on disk, the checkpoint's names, fused tensors."""

from __future__ import annotations

import pytest
import torch
from routed_toys import IDS, TEXT, answer, base_of, bert, experts_of, hf, sides
from safetensors.torch import load_file, save_file
from torch import nn

import fusewright as fw
from fusewright.engine.recipe import make_recipe
from fusewright.errors import NumericError, PlanError, WeightsError
from fusewright.methods import routed

QUICK = {"steps": 1, "batch": 3, "guard": 0}
ALL = {
    "smile": routed.Smile(rank=4, gate=2), "wemoe": routed.WEMoE(**QUICK),
    "e_wemoe": routed.EWEMoE(**QUICK), "rank_one_moe": routed.RankOneMoE(**QUICK, rank=3),
    "twin": fw.Twin(epochs=1, rate=5e-3), "emr": fw.EMR(), "tall": fw.Tall(),
    "surgery": routed.RepresentationSurgery(rank=4, steps=1),
    "pwe_moe": routed.ParetoSet(**QUICK, modules="all", objective="entropy"),
}  # fmt: skip
PRECISE = ("routing.", "masks.scales", "surgery.", "preferences.routers.", "preferences.preference")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    folder, base = tmp_path_factory.mktemp("models"), base_of(bert)
    for name, model in {"base": base, **experts_of(base)}.items():
        model.save_pretrained(folder / name)
    return {"base": folder / "base", "experts": {name: folder / name for name in ("a", "b")}}


def merged(method, folders, **options):
    return fw.merge(method, **folders, data=sides(bert, 2), **options)


def told(model: nn.Module) -> nn.Module:
    if hasattr(model, "set_task"):
        model.set_task("b")
    return model


def kinds(state: dict) -> set:
    return {t.dtype for n, t in state.items() if t.is_floating_point() and not
            n.startswith(PRECISE)}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_the_dtype_that_is_asked_for_is_that_of_all_but_what_was_learned(
    name, folders, tmp_path
) -> None:
    assert set(ALL) == {method.name for method in routed.METHODS}
    whole = merged(ALL[name], folders)
    half = merged(ALL[name], folders, dtype="bfloat16")
    merged(ALL[name], folders, out=tmp_path / "direct", out_dtype="bfloat16")
    whole.save(tmp_path / "later", out_dtype="bfloat16")
    half.save(tmp_path / "kept")
    assert kinds(whole.state_dict()) == {torch.float32}
    files = {at: load_file(tmp_path / at / "routed.safetensors")
             for at in ("direct", "later", "kept")}  # fmt: skip
    for state in (half.state_dict(), *files.values()):
        assert kinds(state) == {torch.bfloat16}
        precise = [t for n, t in state.items() if n.startswith(PRECISE) and t.is_floating_point()]
        assert all(tensor.dtype == torch.float32 for tensor in precise)
        assert state.keys() == files["kept"].keys()
        assert all(tensor.equal(files["kept"][n]) for n, tensor in state.items()
                   if not n.startswith("surgery."))  # which corrects the merge as it is stored
    wanted = answer(told(whole.module()), bert)
    found = answer(told(half.module()), bert)
    assert found.dtype == torch.bfloat16
    assert answer(told(fw.load(tmp_path / "direct")), bert).equal(found)
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_what_the_checkpoint_lacks_is_of_the_same_dtype(tmp_path) -> None:
    """A pooler that transformers adds: nobody knows its weights, and it is called all the same."""
    torch.manual_seed(0)
    base = hf.BertModel(hf.BertConfig(**TEXT)).eval()
    for name, model in {"base": base, **experts_of(base)}.items():
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        state = {n: t for n, t in load_file(file).items() if "pooler" not in n}
        save_file(state, file, metadata={"format": "pt"})
    experts = {name: tmp_path / name for name in ("a", "b")}
    fw.merge(ALL["smile"], base=tmp_path / "base", experts=experts, out=tmp_path / "out",
             out_dtype="bfloat16")  # fmt: skip
    with torch.no_grad():
        found = fw.load(tmp_path / "out")(input_ids=IDS)
    assert found.last_hidden_state.dtype == found.pooler_output.dtype == torch.bfloat16


def test_what_is_unloaded_has_that_dtype_too(folders, tmp_path) -> None:
    for method, given in ((fw.EMR(), ("a",)), (routed.WEMoE(steps=0, router=0), ()),
                          (fw.Twin(epochs=0), ())):  # fmt: skip
        plain = merged(method, folders, out_dtype="bfloat16").unload(*given)
        assert kinds(plain.state_dict()) == {torch.bfloat16}


def test_dtypes_that_cannot_be_are_refused(folders, tmp_path) -> None:
    with pytest.raises(PlanError, match=r"nothing runs in that dtype[\s\S]*bfloat16"):
        merged(fw.EMR(), folders, out_dtype="float8_e4m3fn")
    with pytest.raises(PlanError, match="nothing runs"):
        merged(fw.EMR(), folders).save(tmp_path / "out", out_dtype="float8_e4m3fn")
    with pytest.raises(PlanError, match="as precisely as the models"):
        merged(fw.EMR(), folders, dtype="float64")
    assert kinds(merged(fw.EMR(), folders, out_dtype="float64").state_dict()) == {torch.float64}
    assert not (tmp_path / "out").exists()


def test_what_overflows_is_told_of(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(2, 2))
    experts = {"a": nn.Sequential(nn.Linear(2, 2))}
    base[0].weight.data[0, 0] = 1e6
    with pytest.raises(NumericError, match=r"overflow[\s\S]*0\.weight"):
        fw.merge(fw.EMR(), base=base, experts=experts, out_dtype="float16")
    with pytest.raises(NumericError, match="overflow"):
        fw.merge(fw.EMR(), base=base, experts=experts).save(tmp_path / "a", out_dtype="float16")
    loose = fw.merge(fw.EMR(), base=base, experts=experts, out_dtype="float16",
                     allow_overflow=True)  # fmt: skip
    assert loose.state_dict()["0.weight"][0, 0].isinf()


@pytest.mark.parametrize("method", [fw.EMR(), fw.Tall()], ids=["emr", "tall"])
def test_a_tasks_plain_model_has_the_checkpoints_names(method, tmp_path) -> None:
    base, older = base_of(bert), {"weight": "gamma", "bias": "beta"}
    for name, model in {"base": base, **experts_of(base)}.items():
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        state = {n.replace(f"LayerNorm.{new}", f"LayerNorm.{old}"): t
                 for n, t in load_file(file).items()
                 for new, old in older.items() if n.endswith(new)}  # fmt: skip
        save_file(state, file, metadata={"format": "pt"})
    made = fw.merge(method, base=tmp_path / "base",
                    experts={name: tmp_path / name for name in ("a", "b")})  # fmt: skip
    plain = made.unload("a")
    assert plain.state_dict().keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    plain.save(tmp_path / "out")
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert answer(again, bert).equal(answer(told_a(made), bert))


def told_a(made) -> nn.Module:
    made.set_task("a")
    return made.module()


@pytest.mark.parametrize("method", [fw.EMR(), fw.Twin(epochs=0)], ids=["emr", "twin"])
def test_a_plain_model_of_folders_is_a_module_however_their_paths_are_given(
    method, folders
) -> None:
    named = {"base": str(folders["base"]),
             "experts": {name: str(path) for name, path in folders["experts"].items()}}  # fmt: skip
    made = fw.merge(method, **named)
    if isinstance(method, fw.EMR):
        made.set_task("b")
    plain = made.unload().module()
    torch.testing.assert_close(answer(plain, bert), answer(made.module(), bert))


@pytest.mark.parametrize("name", ["emr", "smile", "twin", "ada_rank", "adamerging"])
def test_tensors_that_are_fused_on_loading_are_told_of(name, tmp_path) -> None:
    torch.manual_seed(0)
    config = hf.MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2,
                              num_key_value_heads=2)  # fmt: skip
    base = hf.MixtralForCausalLM(config).eval()
    models = {"base": base, "a": experts_of(base)["a"]}
    for at, model in models.items():
        model.save_pretrained(tmp_path / at)
    method = {"emr": fw.EMR(), "smile": routed.Smile(rank=99, rest=1.0),
              "twin": fw.Twin(epochs=0, mask_rate=0),
              "ada_rank": fw.AdaRank(steps=0, scale=1.0, guard=0),
              "adamerging": fw.AdaMerging(steps=0, start=1.0, guard=0)}[name]  # fmt: skip
    data = {"a": [{"input_ids": IDS}]}
    with pytest.raises(PlanError, match=r"renamed[\s\S]*gate_up_proj[\s\S]*as modules"):
        fw.merge(method, base=tmp_path / "base", experts={"a": tmp_path / "a"}, data=data)
    made = fw.merge(method, base=base, experts={"a": models["a"]}, data=data)
    model = made.module()
    if name == "emr":
        made.set_task("a")
    with torch.no_grad():
        found, wanted = model(input_ids=IDS).logits, models["a"](input_ids=IDS).logits
    assert found.isfinite().all()
    if name != "twin":  # which shares what is no linear map
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for name, found in {"none": "nothing", "file": "a file"}.items():
        with pytest.raises(WeightsError, match=rf"no such folder[\s\S]*{name}[\s\S]*{found}"):
            fw.load(tmp_path / name)


@pytest.mark.parametrize("method", [fw.EMR(), routed.Smile(rank=4, gate=2)])
def test_a_routed_folder_is_not_taken_for_the_weights_of_a_model(method, folders, tmp_path) -> None:
    path = merged(method, folders, out=tmp_path / "routed").path
    for models in ({**folders, "experts": {"routed": path}}, {**folders, "base": path}):
        with pytest.raises(WeightsError, match="a routed model is no set of weights"):
            fw.merge(fw.Sum(), **models)
    with pytest.raises(WeightsError, match="a routed model is no set of weights"):
        fw.inspect([folders["base"], path])
    (found,) = [one for one in fw.check(folders["base"], [path]).findings
                if one.severity == "error"]  # fmt: skip
    assert "a routed model" in found.message
    fw.inspect([path])  # alone it may be looked at


def test_what_is_fitted_or_built_is_not_planned_and_says_so(folders) -> None:
    with pytest.raises(PlanError, match="planned from headers") as refusal:
        fw.plan(make_recipe(method="smile", base=str(folders["base"]), experts={
            name: {"model": str(path)} for name, path in folders["experts"].items()}))  # fmt: skip
    assert "smile" in str(refusal.value) and "--plan" in (refusal.value.fix or "")


def test_an_expert_that_no_data_are_of_says_how_to_bring_them(folders) -> None:
    names = {"c": folders["experts"]["a"], "b": folders["experts"]["b"]}
    with pytest.raises(PlanError, match="no data") as none:
        fw.merge("wemoe", **folders)
    with pytest.raises(PlanError, match="no data") as others:
        fw.merge("wemoe", base=folders["base"], experts=names, data=sides(bert, 2))
    assert "data: {suite: NAME}" in (none.value.fix or "")
    assert others.value.fix == "name experts as the data's tasks"
