"""From a model's folder to its module, by the library that the suite's ``opens`` names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusewright.bench.suite_file import Opens, SuiteError
from fusewright.engine.libraries import TRANSFORMERS, quiet
from fusewright.errors import WeightsError
from fusewright.extras import needs

if TYPE_CHECKING:
    from torch import nn


def open_model(path: Path, opens: Opens) -> nn.Module:
    """The module of a checkpoint, as the suite says, in evaluation mode.

    Raises SuiteError or WeightsError if the library has no such model, cannot open what is there,
    or the checkpoint lacks tensors of it.
    """
    if opens.library == TRANSFORMERS:
        return _of_transformers(path, opens)
    from fusewright.engine.libraries import open_module

    return open_module(path, opens.library, opens.named, opens.arguments)


def _of_transformers(path: Path, opens: Opens) -> nn.Module:
    transformers: Any = needs("transformers", "demo")
    cls = getattr(transformers, opens.model, None)
    if cls is None:
        raise SuiteError(f"transformers has no class {opens.model!r}", where="opens.model",
                         fix="pip install --upgrade transformers, or name another")  # fmt: skip
    if not path.is_dir():  # transformers would take it for a model of the Hub
        raise WeightsError("transformers opens folders", where=path, expected="a model's folder",
                           found="a file", fix=f"'{path.parent}'")  # fmt: skip
    try:
        with quiet(transformers.utils.logging):
            module, loading = cls.from_pretrained(path, output_loading_info=True, **opens.arguments)
    except (OSError, ValueError) as error:
        raise WeightsError(f"transformers cannot open it as {opens.model}", where=path,
                           expected="config.json and the weights of such a model",
                           found=str(error).splitlines()[0][:200],
                           fix="a model's own folder") from error  # fmt: skip
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise SuiteError("the model lacks tensors of its class", where=path,
                         expected=f"all of transformers.{opens.model}",
                         found=f"without {', '.join(missing[:4])}",
                         fix="another class in the suite's opens: {model: ...}")  # fmt: skip
    found: nn.Module = module.eval()
    return found
