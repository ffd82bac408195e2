"""What of a base is trained, and how it is saved: all weights, adapters, or the tangent space."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusewright.bench.finetuning.recipe import ADAPTERS, L_LORA, LINEAR, FineTuning
from fusewright.engine.artefacts import COPIED
from fusewright.engine.libraries import quiet
from fusewright.errors import OutputError, RecipeError, nearest
from fusewright.extras import needs
from fusewright.modules.linearise import linearise
from fusewright.modules.tensors import tied_names

_ADAPTED = ("Linear", "Conv1D", "Conv2d", "Embedding")
"""Classes of modules that PEFT adapts and fusewright merges."""
_ALL = ("Linear", "Conv1D")
_NAMES = 4


@dataclass(frozen=True)
class Expert:
    """A model in training. ``asked`` is what tasks ask; it holds what is trained. ``targets`` are
    the modules that have an adapter; ``adapters`` is PEFT's model around ``model``."""

    model: nn.Module
    asked: nn.Module
    dtype: torch.dtype
    targets: tuple[str, ...] = ()
    adapters: Any = None

    def save(self, at: Path, base: Path) -> None:
        """An ordinary folder of the base's library, or a PEFT adapter's. Raises OutputError."""
        with writing(at):
            if self.adapters is not None:
                self.adapters.save_pretrained(at)
                return
            self.model.to(self.dtype)
            _save_whole(self.model, at, base)
            for name in COPIED:
                if (base / name).is_file() and not (at / name).exists():
                    shutil.copyfile(base / name, at / name)


def expert_of(model: nn.Module, recipe: FineTuning) -> Expert:
    """What is trained of a base's module, which is changed; in float32, whatever it is stored in.

    Raises RecipeError for targets that match nothing.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype.itemsize < 4:
        model.float()
    if recipe.how in ADAPTERS:
        return _adapted(model, recipe, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    asked = linearise(model) if recipe.how == LINEAR else model
    return Expert(model, asked, dtype)


def _adapted(model: nn.Module, recipe: FineTuning, dtype: torch.dtype) -> Expert:
    """LoRA (2106.09685) on the targets. Its first factors follow from ``recipe.start``, so those of
    all tasks are the same; L-LoRA (2310.04742) keeps them."""
    peft = needs("peft", "peft")
    targets = targeted(model, recipe.targets)
    across = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in targets)
    config = peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout,
        # An expression, because PEFT takes a name of a list for the end of one.
        target_modules="|".join(map(re.escape, targets)), fan_in_fan_out=across,
    )  # fmt: skip
    seed = int.from_bytes(sha256(f"{recipe.start} adapters".encode()).digest()[:7], "little")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = peft.get_peft_model(model, config)
    if recipe.how == L_LORA:
        for layer in model.modules():
            freeze_start(layer)
    return Expert(model, model, dtype, targets, adapters)


def freeze_start(layer: nn.Module) -> None:
    """Keep the factor of a PEFT layer whose partner begins at zero: its linearisation.

    Around (A_0, B_0) an adapter's change is s (B A_0 + B_0 A - B_0 A_0) in first order. With
    B_0 = 0 the gradient of A vanishes: linearised LoRA is LoRA with A_0 kept, without a ``jvp``.
    Where A_0 is the same for all tasks, Σ_t λ_t B_t A_0 has the rank of one of them.
    """
    pairs = (("lora_A", "lora_B", "weight"), ("lora_embedding_A", "lora_embedding_B", None))
    for first, second, leaf in pairs:
        for name in getattr(layer, first, None) or ():
            a, b = (getattr(layer, which)[name] for which in (first, second))
            a, b = (a.weight, b.weight) if leaf else (a, b)
            for kept, partner in ((a, b), (b, a)):
                if not partner.detach().any():
                    kept.requires_grad_(False)


def targeted(model: nn.Module, pattern: str | None) -> tuple[str, ...]:
    """Modules that get an adapter, by the pattern of their whole names; all linear ones below the
    model's own head, whose weights nothing else uses, if there is none. Raises RecipeError naming
    near ones, and for a weight that something else uses."""
    known = {name: type(part).__name__ for name, part in model.named_modules()}
    known = {name: kind for name, kind in known.items() if kind in _ADAPTED}
    tied = {name: group for group in tied_names(model) for name in group}
    if pattern is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found = [n for n, k in known.items() if k in _ALL and f"{n}.weight" not in tied
                 and model.get_submodule(n) is not head]  # fmt: skip
        pattern = "all linear modules"
    else:
        found = [name for name in known if re.fullmatch(pattern, name)]
    if twice := next((tied[f"{n}.weight"] for n in found if f"{n}.weight" in tied), None):
        raise RecipeError(
            "an adapter would change one use of a tensor that has several, and its merge all",
            where=f"targets {pattern!r}", expected="modules whose weights nothing else uses",
            found=" is ".join(twice), fix="leave it out, or --how full",
        )  # fmt: skip
    if not found:
        close = nearest(pattern, list(known)) or next((n for n in known if pattern in n), None)
        raise RecipeError(
            "the targets match no module of the model", where=f"targets {pattern!r}",
            expected=f"an expression of whole names such as {', '.join([*known][:_NAMES])}",
            fix=f"'{re.escape(close)}', or '.*{re.escape(close.rsplit('.', 1)[-1])}'"
                if close else f"'.*{[*known][-1].rsplit('.', 1)[-1]}'" if known else None,
        )  # fmt: skip
    return tuple(found)


def _save_whole(model: Any, at: Path, base: Path) -> None:
    if hasattr(model, "save_pretrained"):
        with quiet(needs("transformers", "transformers").utils.logging):
            model.save_pretrained(at)
        return
    from safetensors.torch import save_model

    files = sorted(base.glob("*.safetensors"))
    save_model(model, str(at / (files[0].name if len(files) == 1 else "model.safetensors")))


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """What the system, or the library that writes tensors, says of a disk, as a refusal."""
    from safetensors import SafetensorError

    from fusewright.weights._fs import explained

    with explained("Writing the expert", where, "the same command goes on"):
        try:
            yield
        except SafetensorError as error:
            full = "No space left" in str(error) or "os error 28" in str(error)
            raise OutputError(
                f"Writing the expert failed: {'the disk is full' if full else error}", where=where,
                fix="make room; the same command goes on" if full else None,
            ) from error
