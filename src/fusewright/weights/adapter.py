"""A PEFT LoRA adapter over its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WeightsError
from .adapter_config import parse_config
from .adapter_parts import ADAPTER_PREFIX, Parts, Pieces, sort_parts
from .directory import Directory, read_config
from .files import check_range
from .locate import ADAPTER_STEMS
from .lora_math import add, columns, fold, is_transposed, load, load_range, rows_per_group
from .recent import Recent
from .spec import DType, FileIdentity, LowRank, TensorInfo, Weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a tensor's values before the factors are added come from."""

    weights: Weights
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.weights[self.name]


class AdapterWeights(Weights):
    """W0 + s·B·A for each targeted weight of ``base``; s = alpha/r, or alpha/sqrt(r) (rsLoRA).

    Rank and alpha patterns, embeddings, convolutions, Conv1D, ``modules_to_save``, saved and added
    biases are followed as PEFT does. DoRA is exact: m · V / ‖V‖, V = W0 + s·B·A, the norm over all
    axes but the output's, in float64. ``delta`` gives the factors; ``read`` gives dense values in
    float32 (float64 over a float64 base), computed on groups of ceil(65536 / columns) whole rows
    counted from row 0, so that they do not depend on the range asked for. Raises WeightsError for
    anything that cannot be added exactly. The base stays open after ``close``.
    """

    def __init__(self, base: Weights, adapter_dir: str | Path, label: str | None = None) -> None:
        self.base, self.adapter_root = base, Path(adapter_dir)
        self.label = label or str(adapter_dir)
        self.root, self.config = base.root, base.config
        self.tied = getattr(base, "tied", ())
        where = self.adapter_root / "adapter_config.json"
        self.adapter_config = read_config(self.adapter_root, "adapter_config.json")
        self.lora = parse_config(self.adapter_config, where)
        self._file = Directory(self.adapter_root, self.label, ADAPTER_STEMS)
        try:
            self._parts = sort_parts(self._file, base, self.lora, self.adapter_root)
            spread = self._spread_to_tied()
            self._sources = self._find_sources()
            self._infos = {name: self._info(name) for name in self._sources}
            self._turned = self._orientations()
        except BaseException:
            self.close()
            raise
        self.notes = (*base.notes, *self._file.notes, *self._parts.notes, *spread)
        self._factors: Recent[LowRank] = Recent(8)
        self._norms: Recent[torch.Tensor] = Recent(64)

    @property
    def base_model(self) -> str | None:
        """The base that the adapter declares (``base_model_name_or_path``)."""
        declared = self.adapter_config.get("base_model_name_or_path")
        return declared if isinstance(declared, str) else None

    @property
    def parts(self) -> Parts:
        """What every tensor of the adapter's file does to which tensor of the base."""
        return self._parts

    # --- what is known without reading -------------------------------------------------------

    def identities(self) -> tuple[FileIdentity, ...]:
        return (*self.base.identities(), *self._file.identities())

    def close(self) -> None:
        self._file.close()

    def _spread_to_tied(self) -> list[str]:
        """What an adapter does to one name of a tied parameter it does to all of them."""
        notes = []
        for group in getattr(self.base, "tied", ()):
            for table in (self._parts.factors, self._parts.biases, self._parts.replaced):
                touched = [name for name in group if name in table]
                if len(touched) > 1 and table is not self._parts.replaced:
                    raise WeightsError(
                        "the adapter changes both names of one tied tensor",
                        where=self.adapter_root, expected="one of them", found=", ".join(touched),
                        fix="untie the base first: model.config.tie_word_embeddings = False",
                    )  # fmt: skip
                if len(touched) == 1:
                    one: Any = table[touched[0]]
                    table.update(dict.fromkeys(group, one))
                    notes.append(f"{', '.join(group)} are tied: all changed with {touched[0]}")
        return notes

    def _find_sources(self) -> dict[str, _Source]:
        sources = {name: _Source(self.base, name) for name in self.base}
        for name, key in self._parts.replaced.items():
            sources[name] = _Source(self._file, key)
        return sources

    def _info(self, name: str) -> TensorInfo:
        source = self._sources[name].info
        touched = name in self._parts.factors or name in self._parts.biases
        if touched and not source.dtype.is_float:
            raise WeightsError(
                "an adapter can only be added to floating-point weights",
                where=f"{self.base.label}: {name}", expected="a float dtype",
                found=source.dtype.code, fix="give the base as it was before quantisation",
            )  # fmt: skip
        dtype = source.dtype
        if touched:
            dtype = DType.F64 if dtype is DType.F64 else DType.F32
        return TensorInfo(name, dtype, source.shape)

    def _orientations(self) -> dict[str, bool]:
        """Whether each targeted weight is stored in x out: by shapes; for square ones by what the
        others are, else by the config. Also proves ranks and shapes, from headers alone."""
        turned: dict[str, bool | None] = {}
        for name, one in self._parts.factors.items():
            down, up = self._file[one.down], self._file[one.up]
            self._prove_rank(name, one, down, up)
            turned[name] = one.embedding or is_transposed(self._infos[name], down, up)
        known = {
            turned[name]
            for name, one in self._parts.factors.items()
            if not one.embedding and len(self._infos[name].shape) == 2 and turned[name] is not None
        }
        unsure = [name for name, value in turned.items() if value is None]
        if unsure and len(known) > 1:
            raise WeightsError(
                "cannot tell how a square weight is stored: others are stored both ways",
                where=f"{self.adapter_root}: {unsure[0]}", expected="in x out, or out x in",
                fix="merge it with peft first: model.merge_and_unload().save_pretrained(...)",
            )  # fmt: skip
        default = known.pop() if known else self.lora.in_first
        return {name: bool(default if value is None else value) for name, value in turned.items()}

    def _prove_rank(self, name: str, one: Pieces, down: TensorInfo, up: TensorInfo) -> None:
        rank, where = self.lora.rank_of(one.module), f"{self.adapter_root}: {one.module}"
        ranks = (down.shape[:1], up.shape[1:2])
        if len(down.shape) < 2 or ranks != ((rank,), (rank,)) or rank < 1:
            raise WeightsError(
                "the adapter's factors disagree with its config", where=where,
                expected=f"rank {rank}", found=f"A {list(down.shape)}, B {list(up.shape)}",
            )  # fmt: skip
        info = self._infos[name]
        sizes = down.numel * up.numel // rank**2
        floats = down.dtype.is_float and up.dtype.is_float
        if len(info.shape) < 2 or sizes != info.numel or not floats:
            raise WeightsError(
                "the adapter's factors do not fit the base tensor",
                where=f"{where} -> {name}", expected=f"B @ A of shape {list(info.shape)}",
                found=f"A {list(down.shape)}, B {list(up.shape)}",
                fix=f"give its own base: {self.base_model}",
            )  # fmt: skip

    # --- factors -----------------------------------------------------------------------------

    def delta(self, name: str) -> LowRank | float | None:
        if not self.has_delta(name):
            return None
        return self._low_rank(name) if name in self._parts.factors else 0.0

    def has_delta(self, name: str) -> bool:
        self._infos[name]
        dense = name in self._parts.replaced or name in self._parts.biases
        return not dense and not (self.lora.dora and name in self._parts.factors)

    def _low_rank(self, name: str) -> LowRank:
        return self._factors.get(name, lambda: self._fold(name))

    def _fold(self, name: str) -> LowRank:
        one, info = self._parts.factors[name], self._infos[name]
        down, up = load(self._file, one.down), load(self._file, one.up)
        wide = DType.of(down.dtype) is DType.F64 or DType.of(up.dtype) is DType.F64
        down, up = (down.double(), up.double()) if wide else (down.float(), up.float())
        scale = self.lora.scale(one.module, down.shape[0])
        where = f"{self.adapter_root}: {one.module}"
        return fold(down, up, scale, info, self._turned[name], where)

    def unfold(self, name: str, low: LowRank) -> dict[str, torch.Tensor]:
        """The inverse of ``delta``: factors of any rank as PEFT's file of an adapter with scaling 1
        names and shapes them for the module that this one changes ``name`` by."""
        one, rank, up = self._parts.factors[name], low.down.shape[0], low.up * low.scale
        down_shape, up_shape = self._file[one.down].shape, self._file[one.up].shape
        a, b = (up.T, low.down.T) if self._turned[name] else (low.down, up)
        kind = "lora_embedding_{}" if one.embedding else "lora_{}.weight"
        return {
            f"{ADAPTER_PREFIX}{one.module}.{kind.format('A')}": a.reshape(rank, *down_shape[1:]),
            f"{ADAPTER_PREFIX}{one.module}.{kind.format('B')}":
                b.reshape(up_shape[0], rank, *up_shape[2:]),
        }  # fmt: skip

    # --- dense values ------------------------------------------------------------------------

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        info, source = self._infos[name], self._sources[name]
        check_range(info, start, stop, out, self.label)
        if start == stop:
            return
        if name in self._parts.factors:
            self._read_rows(name, start, stop, out)
        elif name in self._parts.biases:
            self._read_bias(name, start, stop, out)
        else:
            source.weights.read(source.name, start, stop, out)

    def _read_bias(self, name: str, start: int, stop: int, out: memoryview) -> None:
        """b + s · (B's bias)."""
        import torch

        one, dtype = self._parts.biases[name], self._infos[name].dtype.torch
        source = self._sources[name]
        added = load(self._file, one.bias).to(dtype)[start:stop]
        scale = self.lora.scale(one.module, self._file[one.down].shape[0])
        value = load_range(source.weights, source.name, start, stop).to(dtype) + scale * added
        torch.frombuffer(out, dtype=dtype).copy_(value)

    def _read_rows(self, name: str, start: int, stop: int, out: memoryview) -> None:
        import torch

        info = self._infos[name]
        cols, step = columns(info), rows_per_group(info)
        target = torch.frombuffer(out, dtype=info.dtype.torch)
        magnitude = self._magnitude(name) if self.lora.dora else None
        for first in range(start // cols // step * step, -(-stop // cols), step):
            rows = self._group(name, first)
            if magnitude is not None:
                turned = self._turned[name]
                rows = rows * (magnitude if turned else magnitude[first : first + step, None])
            at = first * cols
            lo, hi = max(start, at), min(stop, at + rows.numel())
            target[lo - start : hi - start] = rows.reshape(-1)[lo - at : hi - at]

    def _group(self, name: str, first: int) -> torch.Tensor:
        """One canonical group of rows of W0 + s·B·A, in float64 for DoRA."""
        import torch

        info, source = self._infos[name], self._sources[name]
        cols = columns(info)
        last = min(info.shape[0], first + rows_per_group(info))
        dtype = torch.float64 if self.lora.dora else info.dtype.torch
        rows = load_range(source.weights, source.name, first * cols, last * cols).to(dtype)
        return add(rows.view(-1, cols), self._low_rank(name), first)

    def _magnitude(self, name: str) -> torch.Tensor:
        """DoRA's m / ‖V‖, one number an output, in float64."""
        return self._norms.get(name, lambda: self._compute_magnitude(name))

    def _compute_magnitude(self, name: str) -> torch.Tensor:
        import torch

        info, turned = self._infos[name], self._turned[name]
        squares = torch.zeros(columns(info) if turned else info.shape[0], dtype=torch.float64)
        for first in range(0, info.shape[0], rows_per_group(info)):
            part = self._group(name, first).square()
            if turned:
                squares += part.sum(dim=0)
            else:
                squares[first : first + part.shape[0]] = part.sum(dim=1)
        key = self._parts.factors[name].magnitude
        magnitude = load(self._file, key).double().reshape(-1)
        if magnitude.shape != squares.shape:
            raise WeightsError(
                "DoRA's magnitude does not fit the weight", where=f"{self.adapter_root}: {key}",
                expected=f"{squares.numel()} numbers", found=f"{magnitude.numel()}",
            )  # fmt: skip
        return magnitude / squares.sqrt()
