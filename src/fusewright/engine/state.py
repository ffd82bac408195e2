"""Merged models as torch sees them: state dicts, modules, and weights to save again."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusewright.errors import PlanError, WeightsError
from fusewright.weights import open_weights
from fusewright.weights.directory import read_config
from fusewright.weights.locate import MODEL_STEMS, is_routed
from fusewright.weights.memory import MemoryWeights
from fusewright.weights.names import canonical_names
from fusewright.weights.spec import Weights


class MergedWeights(MemoryWeights):
    """Tensors in memory that know the folder (or module) whose architecture they fill."""

    def __init__(
        self, tensors: Mapping[str, Tensor], source: Any,
        files: Mapping[str, bytes] | None = None, stem: str = MODEL_STEMS[0],
    ) -> None:  # fmt: skip
        super().__init__(tensors, label="merged in memory")
        self.files = {**self.files, **(files or {})}
        """Small files that belong to the model, by name."""
        self.stem = stem
        """What files of its weights are called."""
        if isinstance(source, str | Path) and Path(source).is_dir():
            self.root = Path(source)
            path = self.root / "config.json"
            self.config = json.loads(path.read_text()) if path.is_file() else {}
        elif isinstance(source, nn.Module):
            known = MemoryWeights(source)
            self.config, self.files = known.config, {**known.files, **self.files}


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put merged tensors into a module; its buffers that no input stores stay as they are.

    Raises PlanError where a tensor has no place in it, a parameter gets none, or names that the
    module ties got different tensors.
    """
    state = module.state_dict()
    own, _ = canonical_names(list(state), type(module).__name__)
    named = {own.get(name, name): tensor for name, tensor in tensors.items()}
    left = [n for n, _ in module.named_parameters() if n not in named]
    astray = [n for n in named if n not in state]
    first: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    for name in named.keys() & state.keys():
        place = (state[name].data_ptr(), state[name].shape, state[name].stride())
        other = first.setdefault(place, named[name])
        if other is not named[name] and state[name].numel() and not torch.equal(other, named[name]):
            astray.append(name)
    if left or astray:
        raise PlanError("the merged tensors do not fit the base's module", where=[*left, *astray],
                        fix="use .state_dict(), or .save(...) and fw.load(...)")  # fmt: skip
    module.load_state_dict(named, strict=False)
    return module


def read_state(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, in its storage dtype."""
    with open_weights(path) as weights:
        return {name: whole(weights, name) for name in weights}


def read_tensor(path: Path, name: str) -> Tensor | None:
    """One tensor of a checkpoint, in its storage dtype; None if it has no such tensor."""
    with open_weights(path) as weights:
        return whole(weights, name) if name in weights else None


def whole(weights: Weights, name: str) -> Tensor:
    """One tensor in its storage dtype."""
    info = weights[name]
    flat = torch.empty(info.numel, dtype=info.dtype.torch)
    if info.numel:
        weights.read(name, 0, info.numel, flat.view(torch.uint8).numpy().data)
    return flat.reshape(info.shape)


def load_module(path: Path) -> nn.Module:
    """The folder's model, of the class its config names, by transformers; by timm or OpenCLIP if
    the config is theirs."""
    from fusewright.engine.libraries import TRANSFORMERS, library_of, open_module, quiet

    library = library_of(path)
    if library != TRANSFORMERS:
        return open_module(path, library)
    try:
        import transformers
    except ImportError as error:
        raise PlanError("transformers is needed to make a module of a folder",
                        fix="pip install 'fusewright[transformers]'") from error  # fmt: skip
    cls = class_of(path) or transformers.AutoModel
    if not (path / "config.json").is_file():
        raise PlanError("the folder does not say what module it holds", where=path,
                        expected="config.json", found="none",
                        fix="load its tensors into the module that they are of")  # fmt: skip
    with quiet(transformers.utils.logging):
        module: nn.Module = cls.from_pretrained(path)
    return module


def class_of(path: Path) -> Any:
    """The class of transformers that a folder's config names; None if it names none that there
    is, or there is no config."""
    import transformers

    names = map(str, read_config(path, "config.json").get("architectures") or [])
    return next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)


def module_of(model: Any) -> nn.Module:
    """A copy of a module, or the module of a folder. Raises PlanError for bare tensors."""
    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    if isinstance(model, str | Path) and Path(model).is_dir():
        return load_module(Path(model))
    raise PlanError("the base is no module, and no folder that says what module it is",
                    found=type(model).__name__,
                    fix="pass the base as a module or a model's folder")  # fmt: skip


def load(path: str | Path, module: nn.Module | None = None) -> nn.Module:
    """Open a merged folder as a module.

    Of a routed model, ``module`` is the base's architecture where its config does not say it; it
    is changed. Raises WeightsError where there is no such folder.
    """
    from fusewright.engine.routed_folder import load_routed

    if not Path(path).is_dir():
        raise WeightsError("there is no such folder", where=path, expected="a folder",
                           found="a file" if Path(path).exists() else "nothing",
                           fix="the folder that the merge was written to")  # fmt: skip
    if is_routed(Path(path)):
        return load_routed(Path(path), module)
    return load_module(Path(path))
