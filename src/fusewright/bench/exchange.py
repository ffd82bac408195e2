"""One module kept open, its weights exchanged: what makes evaluation of many merges quick.

Checkpoints and modules may name the same tensor differently (transformers renames on loading).
Which is which is found once, by loading tensors that each hold their own number; that the answer
is right is proved by the base, whose weights must arrive as transformers itself loads them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusewright.bench.opening import quiet
from fusewright.bench.suite_file import Opens, SuiteError
from fusewright.engine.libraries import TRANSFORMERS
from fusewright.extras import needs

if TYPE_CHECKING:
    from torch import Tensor, nn


class Exchange:
    """A module of a base's architecture that takes state dicts in the names of checkpoints."""

    def __init__(self, module: nn.Module, base: Path, opens: Opens) -> None:
        from fusewright.engine.state import read_state

        self._module, self._base, self._opens = module, base, opens
        start = read_state(base)
        own = module.state_dict()
        renames = opens.library == TRANSFORMERS and own.keys() != start.keys()
        self.names: Mapping[str, str] = self._found(start) if renames else {}
        """{the module's tensor: the checkpoint's}, where any name differs."""
        if self.names and not _proved(own, start, self.names):
            raise SuiteError(
                "the module's tensors are not those of its checkpoint, renamed", where=base,
                found=f"{opens.model} of transformers changes them when it loads",
                fix="save the model again with save_pretrained of this transformers",
            )

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

    def _found(self, start: Mapping[str, Tensor]) -> dict[str, str]:
        """{the module's name: the checkpoint's}."""
        transformers: Any = needs("transformers", "demo")
        config = copy.deepcopy(self._module.config)
        marked = {n: torch.full(t.shape, float(i)) for i, (n, t) in enumerate(start.items())}
        arguments = {**self._opens.arguments, "config": config, "dtype": torch.float32}
        cls: Any = type(self._module)
        with quiet(transformers.utils.logging):
            loaded = cls.from_pretrained(None, state_dict=marked, **arguments).state_dict()
        names = list(start)
        found = {}
        for name, tensor in loaded.items():
            if tensor.numel() and tensor.is_floating_point():
                number = tensor.flatten()[0].item()
                if number.is_integer() and 0 <= number < len(names) and (tensor == number).all():
                    found[name] = names[int(number)]
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
