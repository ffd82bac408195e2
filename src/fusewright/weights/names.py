"""Names as the model itself would write them, and buffers that it recomputes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ..errors import WeightsError
from .spec import FileIdentity, LowRank, TensorInfo, Weights

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PARALLEL = "module."
_INTEGER = ("int", "bool")
_RECOMPUTED = (  # what it is, by name; where a name could mislead, see below
    (re.compile(r"(^|\.)(original_)?inv_freq$"), "rotary frequencies"),
    (re.compile(r"(^|\.)rotary\w*\.(cos|sin)_cached$"), "rotary tables"),
    (re.compile(r"(^|\.)(attn|attention|crossattention)\.masked_bias$"), "mask's fill value"),
)  # fmt: skip
_MASK = re.compile(r"(^|\.)(attn|attention|crossattention)\.bias$")
_IDS = re.compile(r"(^|\.)(position_ids|token_type_ids)$")


def recomputed(info: TensorInfo) -> str | None:
    """What a tensor is, if it is a buffer that every model builds anew from its config.

    Rotary ``inv_freq`` and tables; GPT-2's ``attn.masked_bias`` and its causal mask ``attn.bias``
    (of shape 1 x 1 x n x n, which no bias has); integer ``position_ids`` and ``token_type_ids``.
    """
    for pattern, kind in _RECOMPUTED:
        if pattern.search(info.name):
            return kind
    square = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
    if _MASK.search(info.name) and square:
        return "causal mask"
    if _IDS.search(info.name) and info.dtype.kind in _INTEGER:
        return "position or type ids"
    return None


def canonical_names(names: list[str], label: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Canonical name to given name, and notes.

    ``_orig_mod.`` (torch.compile) and the wrappers of FSDP and checkpointing are removed wherever
    they are; ``module.`` (data parallelism) only in front, and only if every name carries it.
    Raises WeightsError if two names become one.
    """
    stripped, notes = {name: _WRAPPERS.sub("", name) for name in names}, []
    if any(given != name for given, name in stripped.items()):
        notes.append("removed '_orig_mod.' and other wrappers from names")
    while stripped and all(name.startswith(_PARALLEL) for name in stripped.values()):
        stripped = {given: name.removeprefix(_PARALLEL) for given, name in stripped.items()}
        notes.append(f"removed '{_PARALLEL}' from every name")
    back: dict[str, str] = {}
    for given, name in stripped.items():
        if name in back:
            raise WeightsError(
                "two tensors have the same name once wrappers are removed",
                where=f"{label}: {name}", expected="one of them", found=f"{back[name]}, {given}",
            )  # fmt: skip
        back[name] = given
    return back, tuple(notes)


class Renamed(Weights):
    """Weights under other names. ``given`` maps each name to the one underneath."""

    def __init__(self, inner: Weights, given: Mapping[str, str], notes: tuple[str, ...]) -> None:
        self.inner, self.given = inner, dict(given)
        self.label, self.root, self.config = inner.label, inner.root, inner.config
        self.notes = (*inner.notes, *notes)
        new = {old: name for name, old in self.given.items()}
        tied = getattr(inner, "tied", ())
        self.tied = tuple(tuple(new[name] for name in group) for group in tied)

    def __getitem__(self, name: str) -> TensorInfo:
        info = self.inner[self.given[name]]
        return TensorInfo(name, info.dtype, info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        self.inner.read(self.given[name], start, stop, out)

    def delta(self, name: str) -> LowRank | float | None:
        return self.inner.delta(self.given[name])

    def has_delta(self, name: str) -> bool:
        return self.inner.has_delta(self.given[name])

    def identities(self) -> tuple[FileIdentity, ...]:
        return self.inner.identities()

    def close(self) -> None:
        self.inner.close()


def canonical(weights: Weights) -> Weights:
    """``weights`` under canonical names: itself if they are, else a view with notes."""
    given, notes = canonical_names(list(weights), weights.label)
    return Renamed(weights, given, notes) if notes else weights
