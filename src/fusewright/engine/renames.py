"""Which tensor of a module is which of its checkpoint, where transformers renames on loading.

It is found by loading tensors that each hold their own number; that the answer is right is proved
by the base, whose weights must arrive as transformers itself loads them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.engine.libraries import quiet
from fusewright.errors import PlanError
from fusewright.extras import needs

FIRST = 2**16
"""The first tensor's number: none that a fresh bias or norm is filled with."""


def renames(
    module: nn.Module, checkpoint: Mapping[str, Tensor], where: Path,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """{the module's tensor: the checkpoint's} of a module of transformers that holds the
    checkpoint's weights; {} where no name differs. ``arguments`` are those it was opened with.

    Raises PlanError if transformers changes tensors too when it loads them.
    """
    own = module.state_dict()
    if own.keys() == checkpoint.keys():
        return {}
    found = _found(module, checkpoint, where, arguments or {})
    if found and not _proved(own, checkpoint, found):
        raise _changed(module, where)
    return found


def _changed(module: nn.Module, where: Path, name: str = "") -> PlanError:
    does = f"{type(module).__name__} of transformers changes them when it loads"
    return PlanError("the module's tensors are not those of its checkpoint, renamed", where=where,
                     found=f"{does}: {name} is made of several" if name else does,
                     fix="pass base and experts as modules, not as folders")  # fmt: skip


def _found(
    module: nn.Module, checkpoint: Mapping[str, Tensor], where: Path, arguments: Mapping[str, Any]
) -> dict[str, str]:
    transformers: Any = needs("transformers", "transformers")
    config = copy.deepcopy(module.config)
    marked = {n: torch.full(t.shape, float(FIRST + i))
              for i, (n, t) in enumerate(checkpoint.items())}  # fmt: skip
    given = {**arguments, "config": config, "dtype": torch.float32}
    cls: Any = type(module)
    with quiet(transformers.utils.logging):
        loaded = cls.from_pretrained(None, state_dict=marked, **given).state_dict()
    names = list(checkpoint)
    found = {}
    for name, tensor in loaded.items():
        if tensor.numel() and tensor.is_floating_point():
            number = tensor.flatten()[0].item()
            if not number.is_integer() or not 0 <= number - FIRST < len(names):
                continue
            if not (tensor == number).all():
                raise _changed(module, where, name)
            found[name] = names[int(number) - FIRST]
    return found


def _proved(
    own: Mapping[str, Tensor], start: Mapping[str, Tensor], names: Mapping[str, str]
) -> bool:
    """Whether every tensor of the base's module is the one that it is said to be."""
    return all(
        own[name].shape == start[source].shape
        and torch.equal(own[name], start[source].to(own[name].dtype))
        for name, source in names.items() if name in own
    )  # fmt: skip
