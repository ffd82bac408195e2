"""One module kept open, its weights exchanged: what makes evaluation of many merges quick."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fusewright.bench.suite_file import Opens, SuiteError
from fusewright.engine.libraries import TRANSFORMERS
from fusewright.engine.renames import renames

if TYPE_CHECKING:
    from torch import Tensor, nn


class Exchange:
    """A module of a base's architecture that takes state dicts in the names of checkpoints."""

    def __init__(self, module: nn.Module, base: Path, opens: Opens) -> None:
        from fusewright.engine.state import read_state

        self._module = module
        start = read_state(base)
        self.names: Mapping[str, str] = {}
        """{the module's tensor: the checkpoint's}, where any name differs."""
        if opens.library == TRANSFORMERS:
            self.names = renames(module, start, base, opens.arguments)

    def filled(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The module with these weights, in its own dtype. SuiteError if one has no place."""
        own = self._module.state_dict()
        with torch.no_grad():
            for name, tensor in own.items():
                source = self.names.get(name, name)
                if source in state and state[source].shape == tensor.shape:
                    tensor.copy_(state[source])
                elif name in dict(self._module.named_parameters()):
                    raise SuiteError("the merged tensors do not fill the module", where=name,
                                     expected=f"{source} {tuple(tensor.shape)}",
                                     found="nothing of that shape")  # fmt: skip
        return self._module
