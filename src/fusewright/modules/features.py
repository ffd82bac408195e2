"""One w for all layers of a model, by what the model without its experts sees in the input."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.layout.config import is_encoder_decoder
from fusewright.modules.architecture import describe_module
from fusewright.modules.layer import Saved
from fusewright.modules.mixture import (
    Mixture,
    Routing,
    Text,
    check_order,
    input_reader,
    text_model,
)
from fusewright.modules.routers import Router


class FeatureRouter(nn.Module):
    """r(e) = W_3 h(W_2 h(W_1 e + b_1) + b_2) + b_3 with h = dropout(LeakyReLU(BatchNorm(·))):
    features (n, inputs) to (n, experts), through twice as many hidden as inputs (Twin-Merging,
    2406.15479). In float32, whatever the model is in.

    Drawn as torch draws linear layers, by ``seed``; W_3 and b_3 begin as zero, so that all experts
    are alike.
    """

    depth = 3

    def __init__(self, inputs: int, experts: int, dropout: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        self.inputs, self.experts = inputs, experts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wide = 2 * inputs
            layers = [*_hidden(inputs, wide, dropout), *_hidden(wide, wide, dropout)]
            last = nn.Linear(wide, experts)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.layers(features.to(self.layers[0].weight.dtype))  # type: ignore
        return found


def _hidden(inputs: int, outputs: int, dropout: float) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.LeakyReLU(),
            nn.Dropout(dropout)]  # fmt: skip


class SharedMixture(Mixture):
    """One w (samples, experts) for the whole model: softmax(r(e)), e the features of the input.

    Features are found where the model is given its input, at ``entry``, which runs once more
    without what experts add. A router of depth 0 says w itself. With a filled cache the w of the
    prompt stays. ``others`` are texts that the model reads after it, as T5's decoder does: each of
    their samples may be one of several of the entry's (beams).
    """

    others: Sequence[Text] = ()
    asleep = False
    """Whether experts add nothing."""
    over = False
    """Whether the call that w was routed for has ended."""

    def route(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the forward of the entry."""
        if self.asleep:
            return
        self.over = False
        for text in self.others:
            text.samples = None
        if self.text is not None and self.text.continues:
            self._check_prompt(_first(args, kwargs))
        elif isinstance(self.router, Router):
            self.weights = self.router.bias.detach()[None]
        else:
            with self.shared(), torch.no_grad():
                found = _alone(module, args, kwargs)
                self.weights = self.router(features(found, self.text)).softmax(dim=1)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, experts add nothing."""
        before, self.asleep = self.asleep, True
        try:
            yield
        finally:
            self.asleep = before

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the forward of an entry that is the whole model."""
        self.over = not self.asleep

    def weights_for(self, inputs: Tensor, where: str = "") -> Tensor | None:  # type: ignore[override]
        """w, for inputs (samples, …). None where experts add nothing."""
        if self.asleep:
            return None
        if self.weights is None and isinstance(self.router, Router):
            return self.router.bias.detach()[None]
        if self.over and self.sees:
            raise PlanError("a mixed layer was called outside of the model's call", where=where,
                            fix="call the whole model")  # fmt: skip
        return super().weights_for(inputs, where)

    def shared_by(self, inputs: Tensor, where: str = "") -> Tensor | None:
        """The same, or for inputs (1, …) that all samples share, as positions are."""
        if not self.asleep and not self.over and self.weights is not None and len(inputs) == 1:
            return self.weights
        return self.weights_for(inputs, where)

    def _reading(self) -> list[Text]:
        texts = [t for t in (self.text, *self.others) if t is not None and t.samples is not None]
        return [text for text in texts if text.running] or texts


class FeatureRouting(Routing):
    """The router and the mixture of a whole model."""

    kind: ClassVar[str] = "features"

    def __init__(self, model: nn.Module, router: Router | FeatureRouter) -> None:
        super().__init__([router])  # type: ignore[list-item]
        entry = entry_of(model)
        others = readers(model) - {entry}
        if router.depth:
            check_order(model)
            _check_towers(model, entry, others)
        for reader in (entry, *sorted(others)):
            if text_model(model, reader) == reader:
                self._texts[reader] = Text()
        mixture = SharedMixture(0, entry, router, "sample", self._texts.get(entry))  # type: ignore
        mixture.others = [text for reader, text in self._texts.items() if reader != entry]
        self.mixtures = [mixture]

    @property
    def mixture(self) -> SharedMixture:
        found = self.mixtures[0]
        assert isinstance(found, SharedMixture)
        return found

    def listen(self, model: nn.Module) -> None:
        if not self._listens and not self.mixture.entry:
            model.register_forward_hook(self.mixture.end)
        super().listen(model)

    @contextmanager
    def heard(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Inside, experts add nothing, and the features of all that the model is called with are
        collected: (samples, width) for each call. What goes on from a cache is left out: its
        prompt was seen."""
        found: list[Tensor] = []
        text = self.mixture.text

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if text is None or not text.continues:
                found.append(features(output, text).float())

        entry = model.get_submodule(self.mixture.entry)
        hooks = [entry.register_forward_hook(note)]
        if text is not None:
            hooks.append(entry.register_forward_pre_hook(text.note, with_kwargs=True))
        try:
            with self.mixture.shared():
                yield found
        finally:
            for hook in hooks:
                hook.remove()

    def described(self) -> dict[str, Any]:
        router = self.mixture.router
        return {"inputs": router.inputs, "experts": router.experts, "depth": router.depth}

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        inputs, experts, depth = (saved.said[key] for key in ("inputs", "experts", "depth"))
        router = FeatureRouter(inputs, experts) if depth else Router(inputs, experts, 0)
        return cls(saved.model, router)


def entry_of(model: nn.Module) -> str:
    """The module that is given the user's input and holds the first block; "" is the whole."""
    blocks = describe_module(model).blocks
    return (input_reader(model, blocks[0].path) or "") if blocks else ""


def readers(model: nn.Module) -> set[str]:
    """The modules that hold blocks and are given what a user has."""
    return {input_reader(model, block.path) or "" for block in describe_module(model).blocks}


def _check_towers(model: nn.Module, entry: str, others: set[str]) -> None:
    """Refuse a model of several towers that may be called apart: what one reads says nothing of
    what the others do. A decoder answers what its encoder read."""
    if others and not is_encoder_decoder(model):
        raise PlanError("the model reads its inputs in several places, and one w is for all of it",
                        where=", ".join(sorted(others)), expected=f"one, as {entry!r}",
                        fix="WEMoE, which routes each module by itself, or epochs=0")  # fmt: skip


def features(output: Any, text: Text | None) -> Tensor:
    """What a model sees in each input, (samples, width).

    Of text the mean of the last hidden state over tokens that are no padding; of others the pooled
    output, else the first token; of a bare tensor its mean over all but samples and width, which
    comes last of three axes and second of four. Raises PlanError where there is none.
    """
    hidden = getattr(output, "last_hidden_state", output)
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    pooled = getattr(output, "pooler_output", None)
    if text is None and isinstance(pooled, Tensor):
        hidden = pooled if pooled.dim() != 4 else pooled.mean(dim=(2, 3))
    if not isinstance(hidden, Tensor) or hidden.dim() not in (2, 3, 4):
        raise PlanError("the model's answer has no features to route by",
                        expected="last_hidden_state, pooler_output or a tensor",
                        found=type(output).__name__)  # fmt: skip
    if hidden.dim() == 3:
        if text is not None and text.mask is not None:
            counts = (text.mask != 0).to(hidden)[..., None]
            return (hidden * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)
        whole = text is not None or hidden is output
        return hidden.mean(dim=1) if whole else hidden[:, 0]
    return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden


def _alone(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The module's answer, which leaves no trace in a cache."""
    signature = inspect.signature(module.forward)
    if "past_key_values" not in signature.parameters:
        return module.forward(*args, **kwargs)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    given |= {"past_key_values": None, "use_cache": False}
    if "attention_mask" in given:
        given["attention_mask"] = _square(given["attention_mask"])
    return module.forward(**given)


def _square(mask: Any) -> Any:
    """An attention mask without the places that a static cache still has free."""
    if isinstance(mask, Mapping):
        return {kind: _square(of) for kind, of in mask.items()}
    pairs = isinstance(mask, Tensor) and mask.dim() == 4
    return mask[..., : mask.shape[2]] if pairs else mask


def _first(args: Any, kwargs: Any) -> Tensor:
    return next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
