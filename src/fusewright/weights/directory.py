"""A Hugging Face directory: one file of weights, or shards and an index, with a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from .inside import inside
from .json_text import read_object
from .locate import MODEL_STEMS, locate
from .safetensors_file import SafetensorsFile
from .spec import FileIdentity, TensorInfo, Weights
from .torch_file import TorchFile


class Directory(Weights):
    """A model's directory, proven when opened: the index and its shards name the same tensors,
    each in one file, and no path leaves the directory. Raises WeightsError.

    ``metadata`` is the first safetensors file's.
    """

    def __init__(
        self,
        root: str | Path,
        label: str | None = None,
        stems: tuple[str, ...] = MODEL_STEMS,
    ) -> None:
        self.root = Path(root)
        self.label = label or str(root)
        self.config: Mapping[str, Any] = read_config(self.root, "config.json")
        located = locate(self.root, stems)
        self._files: dict[str, SafetensorsFile | TorchFile] = {}
        try:
            for name in located.files:
                self._files[name] = _open(inside(self.root, name, self.root))
            self._owner = self._owners()
            if located.index:
                _prove_index(self._owner, located.weight_map, self.root / located.index)
        except BaseException:
            self.close()
            raise
        kinds = [note for file in self._files.values() for note in file.notes]
        self.notes = (*located.notes, *kinds)
        first = self._files[located.files[0]]
        self.metadata = dict(getattr(first, "metadata", {}))

    def _owners(self) -> dict[str, str]:
        owner: dict[str, str] = {}
        for file, weights in self._files.items():
            for tensor in weights:
                if tensor in owner:
                    raise WeightsError(
                        "the same tensor is in two shards",
                        where=f"{self.root}: {tensor}",
                        expected="one shard", found=f"{owner[tensor]}, {file}",
                    )  # fmt: skip
                owner[tensor] = file
        return owner

    @property
    def shards(self) -> Mapping[str, tuple[str, ...]]:
        """File name to the tensors in it."""
        return {file: tuple(weights) for file, weights in self._files.items()}

    def __getitem__(self, name: str) -> TensorInfo:
        return self._files[self._owner[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)

    def read(self, name: str, start: int, stop: int, out: memoryview) -> None:
        self._files[self._owner[name]].read(name, start, stop, out)

    def identities(self) -> tuple[FileIdentity, ...]:
        return tuple(one for file in self._files.values() for one in file.identities())

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def read_config(root: Path, name: str) -> dict[str, Any]:
    """A directory's JSON config, or {} if it has none. Raises WeightsError if it is broken."""
    path = inside(root, name, root)
    return read_object(path, unique=False) if path.exists() else {}


def _open(path: Path) -> SafetensorsFile | TorchFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _prove_index(owner: dict[str, str], weight_map: dict[str, str], index: Path) -> None:
    """Both directions: what the index promises is there, and nothing is there unpromised."""
    wrong = [name for name, file in weight_map.items() if owner.get(name) != file]
    if wrong:
        name = wrong[0]
        raise WeightsError(
            f"the index and the shards disagree on {len(wrong)} tensors",
            where=f"{index}: {name}",
            expected=f"in {weight_map[name]}",
            found=f"in {owner[name]}" if name in owner else "in no shard",
            fix="download the model again; index and shards come from different versions",
        )
    extra = [name for name in owner if name not in weight_map]
    if extra:
        raise WeightsError(
            f"a shard holds {len(extra)} tensors that the index does not name",
            where=f"{index}: {extra[0]}", expected="named in weight_map",
            found=f"in {owner[extra[0]]}",
            fix="download the model again; index and shards come from different versions",
        )  # fmt: skip
