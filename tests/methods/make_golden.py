"""Write golden.json: what other projects' own code answers on seeded toy tensors.

Not a test. It needs checkouts of mergekit and FusionBench (only read, never copied) and
mergekit's dependencies::

    git -C mergekit checkout a6e402884ba9bc30da7f23e8304a35f19485de95
    git -C fusion_bench checkout 54c9e8c9d9621620c720452cd8533332a32d3689
    pip install --target deps pydantic==2.10.6 immutables==0.21 networkx    # and: torch, peft
    PYTHONPATH=mergekit:deps python tests/methods/make_golden.py mergekit fusion_bench

Random masks are ours in both: the words of Philox streams (seed 5, experts "a", "b", "c") replace
what the other code would draw.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from references import words
from torch import Tensor, nn

SHAPES = {"wide": (6, 8), "tall": (8, 6), "vector": (8,), "row": (1, 5), "conv": (4, 3, 2, 2)}
KEYS = ("a", "b", "c")
SEED, DENSITY = 5, 0.5
WEIGHTS = (0.5, 1.0, 0.25)

Model = dict[str, Tensor]


def models() -> tuple[Model, list[Model]]:
    random = torch.Generator().manual_seed(2026)

    def draw(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=random) * scale

    base = {name: draw(shape, 1.0) for name, shape in SHAPES.items()}
    common = {name: draw(shape, 0.1) for name, shape in SHAPES.items()}
    experts = [{n: base[n] + common[n] + draw(s, 0.1) for n, s in SHAPES.items()} for _ in KEYS]
    return base, experts


def mask(expert: int, name: str) -> Tensor:
    count = int(torch.Size(SHAPES[name]).numel())
    keep = words(SEED, KEYS[expert], name, count) < round(DENSITY * 2**32)
    return torch.tensor(keep).reshape(SHAPES[name])


# -- mergekit ------------------------------------------------------------------------------------


def mergekit_task(name: str, **settings: Any) -> Model:
    """One of mergekit's task-vector methods on every tensor."""
    from mergekit.merge_methods.generalized_task_arithmetic import GTATask
    from mergekit.merge_methods.registry import REGISTERED_MERGE_METHODS
    from mergekit.sparsify import RescaleNorm

    method = REGISTERED_MERGE_METHODS[name]
    base, experts = models()
    density = settings.get("density", 1.0)
    params = {k: {"weight": w, "density": density} for k, w in zip(KEYS, WEIGHTS, strict=True)}
    rescale = settings.get("rescale", method.default_rescale)
    merged = {}
    for tensor in SHAPES:
        task = GTATask.model_construct(
            method=method, tensors=None, base_model="base", int8_mask=False,
            tensor_parameters=SimpleNamespace(data=params),
            weight_info=SimpleNamespace(name=tensor, is_embed=False, optional=False),
            normalize=settings.get("normalize", method.default_normalize),
            lambda_=settings.get("lambda", 1.0), rescale_norm=RescaleNorm.l1 if rescale else None,
        )  # fmt: skip
        given = {"base": base[tensor], **{k: e[tensor] for k, e in zip(KEYS, experts, strict=True)}}
        masks = (mask(t, tensor).float() for t in range(len(KEYS)))
        with patch("torch.bernoulli", lambda probability, m=masks: next(m)):
            merged[tensor] = task.execute(given)
    return merged


def mergekit_linear(normalize: bool) -> Model:
    from mergekit.merge_methods.linear import LinearMergeTask

    _, experts = models()
    merged = {}
    for tensor in SHAPES:
        params = {k: {"weight": w} for k, w in zip(KEYS, WEIGHTS, strict=True)}
        task = LinearMergeTask.model_construct(
            gather_tensors=None, tensor_parameters=params, normalize=normalize,
            weight_info=SimpleNamespace(name=tensor, is_embed=False),
        )  # fmt: skip
        given = {k: e[tensor] for k, e in zip(KEYS, experts, strict=True)}
        merged[tensor] = task.execute(given)
    return merged


def mergekit_slerp(t: float) -> Model:
    from mergekit.merge_methods.slerp import slerp

    base, experts = models()
    return {n: slerp(t, base[n], experts[0][n]) for n in SHAPES}


def mergekit_model_stock() -> Model:
    from mergekit.merge_methods.model_stock import ModelStockMergeTask

    base, experts = models()
    merged = {}
    for tensor in SHAPES:
        task = ModelStockMergeTask.model_construct(
            gather_tensors=None, base_model="base", filter_wise=False,
            weight_info=SimpleNamespace(name=tensor, is_embed=False, optional=False),
        )  # fmt: skip
        given = {"base": base[tensor], **{k: e[tensor] for k, e in zip(KEYS, experts, strict=True)}}
        merged[tensor] = task.execute(given)
    return merged


# -- FusionBench ---------------------------------------------------------------------------------


class _Stub(types.ModuleType):
    """Stands in for the parts of FusionBench that its kernels import but do not need."""

    def __getattr__(self, name: str) -> Any:
        if name == "timeit_context":
            return contextlib.nullcontext
        if name == "auto_register_config":
            return lambda cls: cls
        return type(name, (), {
            "profile": lambda self, label: contextlib.nullcontext(),
            "print_profile_summary": lambda self: None,
        })  # fmt: skip


def fusion_bench(root: Path, path: str) -> Any:
    """A file of FusionBench, by itself."""
    stubs = ["fusion_bench", "fusion_bench.utils", "fusion_bench.utils.type", "omegaconf",
             "fusion_bench.mixins", "fusion_bench.models"]  # fmt: skip
    with patch.dict(sys.modules, {name: _Stub(name) for name in stubs}):
        spec = importlib.util.spec_from_file_location(Path(path).stem, root / "fusion_bench" / path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def flat(model: Model) -> Tensor:
    return torch.cat([x.reshape(-1) for x in model.values()])


def deltas() -> tuple[Model, list[Model]]:
    base, experts = models()
    return base, [{n: e[n] - base[n] for n in SHAPES} for e in experts]


def fusion_bench_ties(root: Path, merge: str) -> Model:
    base, taus = deltas()
    ties = fusion_bench(root, "method/ties_merging/ties_merging_utils.py")
    stacked = torch.stack([flat(t) for t in taus])
    return {"model": flat(base) + 0.3 * ties.ties_merging(stacked, 20, merge)}


def fusion_bench_iso_c(root: Path) -> Model:
    base, taus = deltas()
    iso = fusion_bench(root, "method/isotropic_merging/iso_utils.py")
    merged = iso.iso_c(taus, accelerator="cpu")
    return {n: base[n] + 1.3 * merged[n] for n in SHAPES}


def fusion_bench_slerp(root: Path, t: float) -> Model:
    base, experts = models()
    slerp = fusion_bench(root, "method/slerp/slerp_utils.py").slerp
    return {n: slerp(t, base[n], experts[0][n]) for n in SHAPES}


class _Module(nn.Module):
    def __init__(self, weights: Model) -> None:
        super().__init__()
        for name, x in weights.items():
            self.register_buffer(name, x.clone())


def fusion_bench_model_stock(root: Path) -> Model:
    """Two experts: with more, FusionBench averages angles, which is another formula."""
    stock = fusion_bench(root, "method/model_stock/model_stock.py")
    stock.fusion_bench.LazyStateDict = type("LazyStateDict", (), {})
    base, experts = models()
    pool = SimpleNamespace(
        load_pretrained_model=lambda: _Module(base), model_names=[0, 1],
        load_model=lambda index: _Module(experts[index]),
    )  # fmt: skip
    algorithm = stock.ModelStock.__new__(stock.ModelStock)
    algorithm.ignore_keys, algorithm.model_save_path = [], None
    return dict(algorithm.run(pool).state_dict())


def fusion_bench_dare(root: Path) -> Model:
    base, taus = deltas()
    drop = fusion_bench(root, "method/dare/utils.py").param_random_drop_
    for t, tau in enumerate(taus):
        for name in SHAPES:
            keep = mask(t, name).float()
            with patch("torch.rand_like", lambda x, keep=keep: keep):
                drop(tau[name], 1 - DENSITY, rescale=True)
    return {n: base[n] + 0.3 * sum(t[n] for t in taus) for n in SHAPES}


# -- PEFT ----------------------------------------------------------------------------------------


def peft_ties(density: float) -> Model:
    """Unit weights: PEFT elects before it weighs and divides by counts, another formula."""
    from peft.utils.merge_utils import ties

    base, taus = deltas()
    weights = torch.ones(len(KEYS))
    return {n: base[n] + ties([t[n] for t in taus], weights, density) for n in SHAPES}


# -- the table -----------------------------------------------------------------------------------


def table(fb: Path) -> Iterator[dict[str, Any]]:
    by_name = dict(zip(KEYS, WEIGHTS, strict=True))

    def row(source: str, method: str, out: Model, /, **params: Any) -> dict[str, Any]:
        digits = {n: [float(f"{v:.9g}") for v in x.reshape(-1).tolist()] for n, x in out.items()}
        return {"source": source, "method": method, "params": params, "out": digits}

    weighted = {"weight": by_name}
    kit = {**weighted, "profile": "mergekit"}
    yield row("mergekit linear", "linear", mergekit_linear(True), **weighted)
    yield row("mergekit linear, normalize: false", "linear", mergekit_linear(False),
              normalize=False, **weighted)  # fmt: skip
    yield row("mergekit task_arithmetic, lambda 0.7", "task_arithmetic",
              mergekit_task("task_arithmetic", **{"lambda": 0.7}), scale=0.7, **kit)  # fmt: skip
    yield row("mergekit ties, density 0.4", "ties", mergekit_task("ties", density=0.4),
              density=0.4, **kit)  # fmt: skip
    yield row("mergekit ties, density 0.4, normalize: false", "ties",
              mergekit_task("ties", density=0.4, normalize=False), density=0.4, normalize=False,
              **kit)  # fmt: skip
    for name in ("dare_linear", "dare_ties"):
        out = mergekit_task(name, density=DENSITY)
        yield row(f"mergekit {name}", name, out, density=DENSITY, seed=SEED, **kit)
        out = mergekit_task(name, density=DENSITY, rescale=False)
        yield row(f"mergekit {name}, rescale: false", name, out, density=DENSITY, seed=SEED,
                  **{**kit, "rescale": "none"})  # fmt: skip
    for t in (0.3, 0.5):
        yield row(f"mergekit slerp, t {t}", "slerp", mergekit_slerp(t), t=t)
        yield row(f"fusion_bench slerp, t {t}", "slerp", fusion_bench_slerp(fb, t), t=t)
    yield row("mergekit model_stock", "model_stock", mergekit_model_stock(), profile="mergekit")
    yield row("fusion_bench model_stock, two experts", "model_stock",
              fusion_bench_model_stock(fb), profile="fusionbench")  # fmt: skip
    # The official trim keeps one entry more than ⌊0.2·n⌋: 31 of 157 become 32.
    for merge, normalize in (("sum", False), ("mean", True)):
        yield row(f"fusion_bench ties_merging, {merge}", "ties", fusion_bench_ties(fb, merge),
                  profile="fusionbench", density=32.5 / 157, normalize=normalize)  # fmt: skip
    yield row("fusion_bench iso_c, scaling_factor 1.3", "iso_c", fusion_bench_iso_c(fb),
              profile="fusionbench", scale=1.3)  # fmt: skip
    yield row("fusion_bench dare task arithmetic", "dare_linear", fusion_bench_dare(fb),
              profile="fusionbench", seed=SEED)  # fmt: skip
    yield row("peft ties, density 0.4", "ties", peft_ties(0.4), density=0.4, scope="tensor",
              zero_sign="positive")  # fmt: skip


def main() -> None:
    import peft

    kit, fb = map(Path, sys.argv[1:3])
    base, experts = models()

    def listed(model: Model) -> dict[str, list[float]]:
        return {n: [float(f"{v:.9g}") for v in x.reshape(-1).tolist()] for n, x in model.items()}

    found = {
        "about": "numbers answered by other projects' code; made by tests/methods/make_golden.py",
        "upstream": {"mergekit": sys.argv[3] if len(sys.argv) > 3 else commit(kit),
                     "fusion_bench": sys.argv[4] if len(sys.argv) > 4 else commit(fb),
                     "peft": peft.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "shapes": {n: list(s) for n, s in SHAPES.items()},
        "base": listed(base),
        "experts": {k: listed(e) for k, e in zip(KEYS, experts, strict=True)},
        "rows": list(table(fb)),
    }  # fmt: skip
    out = Path(__file__).with_name("golden.json")
    out.write_text(json.dumps(found, separators=(",", ":")).replace('{"source"', '\n{"source"'))
    print(f"{len(found['rows'])} rows, {out.stat().st_size} bytes")


def commit(folder: Path) -> str:
    return subprocess.check_output(["git", "-C", folder, "rev-parse", "HEAD"], text=True).strip()


if __name__ == "__main__":
    main()
