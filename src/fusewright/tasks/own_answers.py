"""What a model without a head of ours says of a batch of one's own, and the labels of that."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusewright.errors import PlanError
from fusewright.layout.config import is_encoder_decoder
from fusewright.tasks.prompts import predicted, writes
from fusewright.tasks.tokens import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

LABELS = ("label", "labels")
"""What a batch's labels are called."""
_FIX = ("data=suite.unlabelled() of tasks.LanguageModelling, or heads={task: function(model, "
        "batch)} that answers with (answers, classes)")  # fmt: skip


def held_labels(batch: Any) -> Tensor | None:
    """A batch's labels as they are, if it has any."""
    from torch import as_tensor

    held = [batch[key] for key in LABELS if key in batch] if isinstance(batch, Mapping) else []
    return as_tensor(held[0]) if held else None


def own_logits(task: str, model: nn.Module, batch: Any) -> Any:
    """The logits that a model returns of a batch, of the answers that are asked for.

    Of tokens (n, tokens, classes) those without padding (``attention_mask``, of an encoder-decoder
    ``decoder_attention_mask``) and, where the batch has a label for each, without those that are
    -100: (answers, classes). A model of transformers that writes without an encoder says the next
    token at each place: the last place of a text has nothing to be compared with.

    Raises PlanError where it cannot be told which token such a model predicts where.
    """
    from torch import Tensor

    from fusewright.modules.batchnorm import call

    found = call(model, _shown(model, batch))
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor):
        return found
    asked = _asked(task, model, batch, found.shape[:-1])
    return found if asked is None else _next(model, found, 0)[asked]


def own_labels(task: str, model: nn.Module, batch: Any) -> Tensor | None:
    """The labels of these answers, if a batch has any: the token that follows, where that is what
    the model says."""
    labels = held_labels(batch)
    if labels is None:
        return None
    asked = _asked(task, model, batch, labels.shape)
    return labels if asked is None else _next(model, labels, 1)[asked]


def check_own_labels(task: str, model: nn.Module, batch: Any) -> None:
    """Raises PlanError where labels are not what they are taken for: a model's own loss compares
    them with other answers, or they repeat the tokens that a module of another library is shown."""
    labels = held_labels(batch)
    if labels is None:
        return
    if decodes(model):
        _check_loss(task, model, {**_shown(model, batch), "labels": labels}, labels)
    elif not is_encoder_decoder(model) and _repeats(labels, batch):
        raise PlanError(
            "labels repeat the tokens that the model is shown, and it is not known to predict the "
            "next ones", where=f"task {task}", fix=_FIX, found=type(model).__name__,
            expected="a causal language model of transformers, or labels of each place's answer",
        )  # fmt: skip


def decodes(model: nn.Module) -> bool:
    """Whether a model's logits are those of the next token: it writes, without an encoder."""
    return writes(model) and not is_encoder_decoder(model)


def _translates(model: nn.Module) -> bool:
    return writes(model) and is_encoder_decoder(model)


def _check_loss(task: str, model: nn.Module, batch: Mapping[str, Any], labels: Tensor) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    if "labels" not in inspect.signature(model.forward).parameters:
        return
    with torch.no_grad():
        said = model(**batch)
    own = getattr(said, "loss", None)
    if own is None:
        return
    logits = said.logits.float()
    if logits.shape[:-1] != labels.shape:
        raise _unclear(task, model, logits.shape[:-1], labels)
    following, same = (
        float(cross_entropy(x.flatten(0, 1), y.flatten().long(), ignore_index=IGNORED))
        for x, y in ((logits[:, :-1], labels[:, 1:]), (logits, labels))
    )
    if abs(float(own) - following) > max(abs(float(own) - same), 1e-3 * following):
        raise PlanError(
            "a model's own loss compares its answers with the labels of the same places, not with "
            "the tokens that follow", where=f"task {task}: {type(model).__name__}",
            expected=f"{following:.4f}, of the next tokens", fix=_FIX,
            found=f"{float(own):.4f}; of the same places {same:.4f}",
        )  # fmt: skip


def _shown(model: nn.Module, batch: Any) -> Any:
    """A batch without labels; what an encoder-decoder's decoder is given is made of them."""
    if not isinstance(batch, Mapping):
        return batch
    shown = {key: value for key, value in batch.items() if key not in LABELS}
    labels, given = held_labels(batch), {"decoder_input_ids", "decoder_inputs_embeds"} & set(shown)
    if not given and labels is not None and labels.dim() == 2 and _translates(model):
        make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if make is None:
            raise PlanError("an encoder-decoder makes no decoder_input_ids of labels",
                            where=type(model).__name__, expected="decoder_input_ids in the batch",
                            found=", ".join(batch), fix="add them")  # fmt: skip
        shown["decoder_input_ids"] = make(labels=labels)
    return shown


def _asked(task: str, model: nn.Module, batch: Any, shape: torch.Size) -> Tensor | None:
    """Which of a text's answers are asked for, where ``shape`` is that of tokens (n, tokens); None
    where answers are not of tokens."""
    from torch import ones

    decoder, both = decodes(model), _translates(model)
    mask = _named(model, batch).get("decoder_attention_mask" if both else "attention_mask")
    if mask is None and (decoder or both) and len(shape) == 2:
        mask = ones(shape)
    if mask is None or mask.shape != shape:
        if decoder:
            raise _unclear(task, model, shape, mask)
        return None
    real = predicted(mask) if decoder else mask != 0
    labels = held_labels(batch)
    if labels is None or labels.shape != shape:
        return real
    return real.to(labels.device) & (_next(model, labels, 1) != IGNORED)


def _next(model: nn.Module, places: Tensor, first: int) -> Tensor:
    """Of a decoder (n, tokens - 1, …): all places but the last (``first`` 0) predict all but the
    first (1). Of other models all."""
    if not decodes(model):
        return places
    return places[:, 1:] if first else places[:, :-1]


def _repeats(labels: Tensor, batch: Mapping[str, Any]) -> bool:
    """Whether the labels of all places but padding are the tokens there."""
    from torch import Tensor

    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape != labels.shape:
        return False
    alike = labels == ids
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        alike = alike[mask != 0]
    return bool(alike.all())


def _named(model: nn.Module, batch: Any) -> Mapping[str, Any]:
    """A batch as the keywords that it is to the model."""
    if isinstance(batch, Mapping):
        return batch
    arguments = batch if isinstance(batch, tuple | list) else (batch,)
    return inspect.signature(model.forward).bind_partial(*arguments).arguments


def _unclear(
    task: str, model: nn.Module, shape: torch.Size, other: Tensor | None
) -> PlanError:
    return PlanError(
        "it cannot be told which token a language model predicts where",
        where=f"task {task}: {type(model).__name__}", fix=_FIX,
        expected="logits, attention_mask and labels of the same places (n, tokens)",
        found=f"{tuple(shape)} and {'no mask' if other is None else tuple(other.shape)}",
    )  # fmt: skip
