"""Models that take their tensors from files as they are used, and hold nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fusewright.errors import WeightsError
from fusewright.layout.names import leaf
from fusewright.layout.names import module as owner_of
from fusewright.modules.tensors import same_tensor


@contextmanager
def hollow() -> Iterator[None]:
    """Inside, modules are made without memory for their parameters, and none is drawn; buffers are
    made as ever, since files lack some of them."""

    def emptied(module: nn.Module, name: str, parameter: Tensor | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def mapped(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, read from there when it is used: what is never
    used costs no memory, and the system can drop the rest. What is written to them stays in memory.

    Raises WeightsError if there is no such file, or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError("the folder has no weights", where=folder, expected="*.safetensors")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as held:
                found |= {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise WeightsError("the file is damaged", where=file, found=str(error),
                               fix="merge or copy it again") from error  # fmt: skip
    return found


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Put tensors into a model as they are, without a copy; one that has several names in the model
    is given under any. Answers with the parameters that are still hollow, and the tensors that the
    model has no place for."""
    known: set[str] = set()
    hollow: list[str] = []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for names in same_tensor(model):
        known.update(names)
        given = next((tensors[name] for name in names if name in tensors), None)
        if given is None:
            hollow += [name for name in names[:1] if name in parameters]
            continue
        new = nn.Parameter(given, False) if names[0] in parameters else given
        for name in names:
            owner = model.get_submodule(owner_of(name))
            held = leaf(name) in owner._parameters
            store: dict[str, Any] = owner._parameters if held else owner._buffers
            store[leaf(name)] = new
    return hollow, [name for name in tensors if name not in known]


def zero(model: nn.Module, names: Sequence[str], dtype: torch.dtype | None = None) -> None:
    """Give parameters that nothing is known of memory, and zeros; of a dtype, if one is named."""
    own = dict(model.named_parameters(remove_duplicate=False))
    fill(model, {n: torch.zeros_like(own[n], device="cpu", dtype=dtype) for n in names})
