"""A torch ``.bin``, ``.pt`` or ``.pth`` file, read without executing what it asks for."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from .files import identity_of, open_regular
from .memory import MemoryWeights
from .spec import FileIdentity

CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts keep the state dict, in a dict with optimizer, epoch …"""


class TorchFile(MemoryWeights):
    """A file written by ``torch.save``: a state dict, or a dict that holds one.

    Loaded with ``weights_only=True``, which builds tensors and containers and calls nothing else.
    Zip files (torch >= 1.6) are mapped into memory, so only what is read is loaded; the older
    format is loaded whole. If the file's top level is not a mapping to tensors and has exactly one
    of the keys ``CONTAINERS`` that holds a mapping, that is taken (again, up to three deep) and
    noted. Raises WeightsError.
    """

    def __init__(self, path: str | Path, label: str | None = None) -> None:
        self.path = Path(path)
        fd = open_regular(self.path)
        try:
            self._identity = identity_of(fd, self.path)
            zipped = os.pread(fd, 4, 0) == b"PK\x03\x04"
        finally:
            os.close(fd)
        state, notes = _unpack(_load(self.path, zipped), self.path)
        super().__init__(state, label or str(path))
        if not zipped:
            notes.append("torch's older format: the whole file is in memory")
        self.notes = (*notes, *self.notes)

    def identities(self) -> tuple[FileIdentity, ...]:
        return (self._identity,)

    def close(self) -> None:
        self._tensors = {}


def _load(path: Path, zipped: bool) -> Any:
    import torch

    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from None
    except Exception as error:  # torch raises many kinds for a broken file
        if "TorchScript" in str(error):
            raise WeightsError(
                "a TorchScript archive holds code, not only weights",
                where=path, fix="torch.save(torch.jit.load(PATH).state_dict(), 'weights.pt')",
            ) from None  # fmt: skip
        raise WeightsError(
            "not a readable torch file (truncated?)",
            where=path, found=f"{type(error).__name__}: {str(error)[:200]}",
            fix="copy or download the file again",
        ) from error  # fmt: skip


def _refusal(path: Path, text: str) -> WeightsError:
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found is None:
        # torch's own text goes on to advise weights_only=False, which would run whatever is there.
        said = re.search(r"WeightsUnpickler error: (.*)", text)
        return WeightsError(
            "not a torch file that can be read without running code",
            where=path,
            expected="torch.save of a state dict",
            found=said.group(1)[:200] if said else "a pickle with other instructions",
            fix="get the weights as safetensors",
        )
    return WeightsError(
        "the file asks to run code while it is loaded; nothing was run",
        where=path,
        expected="tensors and containers only",
        found=f"global {found.group(1)}",
        fix="get the weights as safetensors, or, if you trust the file, convert it yourself",
    )


def _is_state(value: object) -> bool:
    import torch

    return isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())


def _unpack(loaded: object, path: Path) -> tuple[Mapping[Any, Any], list[str]]:
    notes: list[str] = []
    for _ in range(3):
        if _is_state(loaded) or not isinstance(loaded, Mapping):
            break
        keys = [key for key in CONTAINERS if isinstance(loaded.get(key), Mapping)]
        if len(keys) != 1:
            break
        left = ", ".join(str(key) for key in loaded if key != keys[0])
        notes.append(f"weights taken from '{keys[0]}'" + (f"; not read: {left}" if left else ""))
        loaded = loaded[keys[0]]
    if not isinstance(loaded, Mapping) or (loaded and not _is_state(loaded)):
        keys_found = ", ".join(map(str, loaded)) if isinstance(loaded, Mapping) else ""
        raise WeightsError(
            "no state dict in the file", where=path,
            expected=f"a mapping from name to tensor, or one under one of {', '.join(CONTAINERS)}",
            found=f"{type(loaded).__name__} {keys_found}"[:200],
            fix="torch.save(model.state_dict(), 'weights.pt')",
        )  # fmt: skip
    return loaded, notes
