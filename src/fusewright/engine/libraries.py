"""Modules of timm and OpenCLIP: built by their own libraries, filled by fusewright's reader.

Their folders are laid out as on the Hub: timm's ``config.json`` names an ``architecture``,
OpenCLIP's ``open_clip_config.json`` holds a ``model_cfg``. Nothing is fetched. What libraries say
of their own while they load is kept quiet here too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.errors import FusewrightError, WeightsError, nearest
from fusewright.extras import needs

if TYPE_CHECKING:
    from torch import Tensor, nn

TRANSFORMERS, TIMM, OPEN_CLIP = "transformers", "timm", "open_clip"
EXTRAS = {TIMM: "timm", OPEN_CLIP: "openclip"}
CONFIGS = {TIMM: "config.json", OPEN_CLIP: "open_clip_config.json"}
"""The file that says what a folder's model is."""
_NAMES = {TIMM: "architecture", OPEN_CLIP: "model_cfg"}


def library_of(path: Path) -> str:
    """The library that a checkpoint's own config belongs to; "transformers" unless it says so,
    or if there is a config of transformers too."""
    if (_folder(path) / "config.json").is_file() and not own_config(path, TIMM):
        return TRANSFORMERS
    said = (name for name in (OPEN_CLIP, TIMM) if own_config(path, name))
    return next(said, TRANSFORMERS)


def own_config(path: Path, library: str) -> dict[str, Any]:
    """What a folder's (or the file's beside it) config says in this library's words; {} if it
    says nothing. Raises WeightsError if it is no JSON."""
    file = _folder(path) / CONFIGS[library]
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError("the config is not JSON", where=file, found=error) from error
    theirs = isinstance(said, dict) and _NAMES[library] in said and "model_type" not in said
    return said if theirs else {}


def known_config(path: Path, library: str, model: str | None) -> dict[str, Any]:
    """What is said of a model: by its own config, else by the library of a ``model`` it knows."""
    if (said := own_config(path, library)) or model is None:
        return said
    if library == TIMM:
        known = imported(TIMM).get_pretrained_cfg(model, allow_unregistered=True)
        return {"architecture": model, "pretrained_cfg": known.to_dict() if known else {}}
    found = imported(OPEN_CLIP).get_model_config(model)
    return {"model_cfg": found} if found else {}


def open_module(
    path: Path, library: str, model: str | None = None, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """A checkpoint's module of timm or OpenCLIP, in evaluation mode.

    ``model`` is a name that the library knows, None for what the checkpoint's own config says;
    ``arguments`` go to the library's ``create_model``. Tensors that the module has no place for
    (a head under ``num_classes=0``) are left; weights are cast to the module's dtype.

    Raises WeightsError if the library does not know the model, or the checkpoint lacks one of its
    tensors or has it in another shape; FusewrightError if the library cannot be imported.
    """
    from fusewright.engine.state import read_state

    with _without_logs():
        module = _built(path, library, model, dict(arguments or {}))
    _fill(module, read_state(path), path)
    return module.eval()


def tokenizer_of(path: Path, model: str | None = None) -> Any:
    """OpenCLIP's tokenizer of a model: texts -> (n, context) int64."""
    with _without_logs():
        return imported(OPEN_CLIP).get_tokenizer(_name(path, OPEN_CLIP, model))


def imported(library: str) -> Any:
    """The library itself. Raises FusewrightError that names the extra, or what keeps it from
    working: both stand on a torchvision that must be made for the torch that is installed."""
    try:
        return needs(library, EXTRAS[library])
    except (ImportError, OSError, RuntimeError) as error:
        raise FusewrightError(
            f"{library} cannot be imported", where=library, found=error,
            expected="a torchvision made for the torch that is installed",
            fix="pip install torchvision --index-url https://download.pytorch.org/whl/cpu"
                "  (cpu, cu128, …: as torch)",
        ) from error  # fmt: skip


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _name(path: Path, library: str, model: str | None) -> str:
    """What the library calls the model."""
    if model is not None:
        return model
    if own_config(path, library):
        return f"local-dir:{_folder(path)}"
    raise WeightsError(f"nothing says which model of {library} this is", where=path,
                       expected=f"{CONFIGS[library]} with {_NAMES[library]!r}",
                       fix=f"opens: {{library: {library}, model: NAME}}")  # fmt: skip


def _built(path: Path, library: str, model: str | None, arguments: dict[str, Any]) -> nn.Module:
    made, name = imported(library), _name(path, library, model)
    if model is not None and model.split(".")[0] not in (known := made.list_models()):
        close = nearest(model, known)
        raise WeightsError(f"{library} has no model {model!r}", where="opens.model",
                           fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    nothing = {"pretrained": False} if library == TIMM else {
        "load_weights": False, "pretrained_text": False
    }  # fmt: skip
    try:
        module: nn.Module = made.create_model(name, **{**arguments, **nothing})
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{library} cannot make the model", where=name, found=error,
                           fix="see the suite's opens: {arguments: ...}") from error  # fmt: skip
    return module


def _fill(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    from fusewright.weights.names import canonical_names

    given, _ = canonical_names(list(state), str(path))
    own = module.state_dict()
    missing = [name for name in own if name not in given]
    if missing:
        raise WeightsError("the model lacks tensors of its architecture", where=path,
                           expected=f"all {len(own)} of {type(module).__name__}",
                           found=f"without {', '.join(missing[:4])}",
                           fix="another model or arguments in opens: {...}, or name the file of "
                               "weights if the folder holds several")  # fmt: skip
    for name, tensor in own.items():
        if state[given[name]].shape != tensor.shape:
            raise WeightsError("a tensor is of another shape than its module's",
                               where=f"{path}: {name}", expected=tuple(tensor.shape),
                               found=tuple(state[given[name]].shape),
                               fix="another model or arguments in opens: {...}")  # fmt: skip
    module.load_state_dict({name: state[given[name]] for name in own})


@contextmanager
def _without_logs() -> Iterator[None]:
    """Without the warnings that no pretrained weights were loaded: they come next."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def quiet(logging: Any) -> Iterator[None]:
    """transformers without its bars and reports of what a checkpoint holds besides."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
