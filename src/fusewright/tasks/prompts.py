"""Prompts that are run once, and gone on from by the key-value cache that a model makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fusewright.layout.config import is_encoder_decoder
from fusewright.tasks.errors import DataError
from fusewright.tasks.tokens import IGNORED, on_the_left, positions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompted:
    """What a model made of prompts: the ``logits`` (n, vocabulary) of the token after each, and
    the ``cache`` to go on from; ``mask`` (n, tokens) and, of an encoder-decoder, the encoder's
    ``hidden`` states (n, tokens, width) are those of the prompts."""

    model: Any = field(repr=False)
    logits: Tensor
    cache: Any
    mask: Tensor
    hidden: Tensor | None = None

    def repeated(self, count: int) -> Prompted:
        """Each prompt ``count`` times, one behind the other; with a cache of its own."""
        cache = _copied(self.cache)
        if count == 1:
            return replace(self, cache=cache)
        cache.batch_repeat_interleave(count)
        hidden = None if self.hidden is None else self.hidden.repeat_interleave(count, dim=0)
        logits, mask = (held.repeat_interleave(count, dim=0) for held in (self.logits, self.mask))
        return Prompted(self.model, logits, cache, mask, hidden)

    def going_on(self, ids: Tensor, real: Tensor) -> Tensor:
        """Logits (n, 1 + tokens, vocabulary) of the token after each prompt, and after each of
        ``ids`` (n, tokens), of which those that are not ``real`` are padding, on the right. The
        cache is used up."""
        import torch

        first = self.logits[:, None]
        if not ids.shape[1]:
            return first
        if self.hidden is None:
            mask = torch.cat([self.mask, real.to(self.mask)], dim=1)
            given = _decoder(self.model, ids, mask)
        else:
            given = {"encoder_outputs": (self.hidden,), "attention_mask": self.mask,
                     "decoder_input_ids": ids}  # fmt: skip
        found = self.model(**given, past_key_values=self.cache, use_cache=True)
        return torch.cat([first, found.logits], dim=1)


@dataclass(frozen=True)
class Unread:
    """Prompts (n, tokens) of a model that answers in one call (:func:`prompted`): they are read
    with all that follows, each time anew."""

    model: Any = field(repr=False)
    ids: Tensor
    mask: Tensor
    start: int | None

    def repeated(self, count: int) -> Unread:
        """Each prompt ``count`` times, one behind the other."""
        ids, mask = (held.repeat_interleave(count, dim=0) for held in (self.ids, self.mask))
        return replace(self, ids=ids, mask=mask)

    def going_on(self, ids: Tensor, real: Tensor) -> Tensor:
        """As :meth:`Prompted.going_on`."""
        import torch

        last = torch.full_like(ids[:, :1], IGNORED)  # what the last logits are of is not said
        targets = torch.cat([ids.masked_fill(~real.bool(), IGNORED), last], dim=1)
        return taught(self.model, self.ids, self.mask, targets, 0, self.start)


def prompted(
    model: Any, ids: Tensor, mask: Tensor, start: int | None = None
) -> Prompted | Unread:
    """What a model makes of prompts (n, tokens), padded on either side. An encoder-decoder's
    decoder is given the token ``start``, or its own. A model that says ``in_one_call`` (a
    linearised one, whose answer to a text does not follow from its answer to a part) keeps no cache
    and reads the prompt again with what follows.

    Raises DataError if another model keeps no cache, or answers with no logits.
    """
    import torch

    if getattr(model, "in_one_call", False):
        return Unread(model, ids, mask, start)
    writes = not is_encoder_decoder(model)
    if writes:
        ids, mask = on_the_left(ids, mask)  # so that the last is each prompt's own
        given = _decoder(model, ids, mask) | _keeping(model, 1)
    else:
        first = torch.full_like(ids[:, :1], _start(model, start))
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": first}
    if not {"past_key_values", "kwargs"} & set(_takes(model)):
        raise _without(model, "past_key_values", "keeps no key-value cache of a prompt")
    found = model(**given, use_cache=True)
    for name, said in (("past_key_values", "keeps no key-value cache of a prompt"),
                       ("logits", "answers with no logits of tokens")):  # fmt: skip
        if getattr(found, name, None) is None:
            raise _without(model, name, said)
    hidden = None if writes else found.encoder_last_hidden_state
    return Prompted(model, found.logits[:, -1], found.past_key_values, mask, hidden)


def taught(
    model: Any, ids: Tensor, mask: Tensor, targets: Tensor, pad: int, start: int | None = None
) -> Tensor:
    """Logits (n, tokens, vocabulary) of ``targets`` (n, tokens; IGNORED after their ends), all of
    which are given with their prompts, in one pass."""
    import torch

    found: Tensor
    if is_encoder_decoder(model):
        before = shifted(targets, _start(model, start), pad)
        found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=before).logits
        return found
    ids, mask = on_the_left(ids, mask)
    real, last = targets != IGNORED, targets.shape[1] + 1
    joined = torch.cat([ids, targets.masked_fill(~real, pad)], dim=1)
    seen = torch.cat([mask, real.to(mask)], dim=1)
    found = model(**_decoder(model, joined, seen), **_keeping(model, last)).logits
    return found[:, -last:-1]


def shifted(targets: Tensor, start: int, pad: int) -> Tensor:
    """What a decoder is given so that it answers the targets: start, then all but the last."""
    import torch

    first = torch.full_like(targets[:, :1], start)
    rest = targets[:, :-1]
    return torch.cat([first, rest.masked_fill(rest == IGNORED, pad)], dim=1)


def decoder_start(model: Any) -> int:
    """The token with which a model starts to decode. Raises DataError if its config has none."""
    found = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    if found is None:
        raise DataError(
            "the model does not say with which token decoding starts", where=type(model).__name__,
            expected="config.decoder_start_token_id", fix="give the task start=TOKEN_ID",
        )  # fmt: skip
    return int(found)


def writes(model: Any) -> bool:
    """Whether a model of transformers writes texts, rather than names classes of them."""
    generates = getattr(model, "can_generate", None)
    return callable(generates) and bool(generates())


def predicted(mask: Tensor, given: int = 1) -> Tensor:
    """Which places of texts after the first ``given`` hold a token that the one before predicts:
    (n, tokens - given) bool, of a mask (n, tokens)."""
    real = mask != 0
    return real[:, given:] & real[:, given - 1 : -1]


def _start(model: Any, given: int | None) -> int:
    return decoder_start(model) if given is None else given


def _keeping(model: Any, last: int) -> dict[str, int]:
    """That so many last logits are enough, to models that can be told."""
    return {"logits_to_keep": last} if "logits_to_keep" in _takes(model) else {}


def _decoder(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """What a decoder is given of ``ids``, the last of the tokens of ``mask``; its positions, where
    it does not count them by the mask."""
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if {"position_ids", "kwargs"} & set(_takes(model)):
        given["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    return given


def _takes(model: Any) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


def _without(model: Any, name: str, said: str) -> DataError:
    return DataError(
        f"the model {said}", where=type(model).__name__, expected=f"{name} in its answer",
        fix="opens: {model: AutoModelForCausalLM}, or AutoModelForSeq2SeqLM",
    )  # fmt: skip


def _copied(cache: Any) -> Any:
    """A cache that grows by itself, of the same tensors."""
    return deepcopy(cache, {id(tensor): tensor for tensor in _tensors(cache, set())})


def _tensors(held: Any, seen: set[int]) -> Iterator[Tensor]:
    from torch import Tensor

    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        yield held
        return
    inside = held if isinstance(held, Mapping) else getattr(held, "__dict__", {})
    parts = held if isinstance(held, list | tuple) else inside.values()
    for part in parts:
        yield from _tensors(part, seen)
