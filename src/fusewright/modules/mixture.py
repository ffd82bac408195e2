"""Which experts a part of a model mixes for an input: asked once where the part begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from fusewright.errors import PlanError
from fusewright.modules.layer import Layer, Saved
from fusewright.modules.mixed import Mixed
from fusewright.modules.routers import Router

Per = Literal["sample", "batch"]


_PROMPTS = count(1)
_PROMPT = "_fusewright_prompt"
"""What a cache is told the number of its prompt by."""


class Text:
    """What a text model was called with, for the mixtures inside it: how many ``samples`` of how
    many ``tokens``, which tokens are padding, and whether they go on from a cache: of the prompt
    that came last, or one of which nothing else is ``known``."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.continues = self.running = False
        self.samples: int | None = None
        self.tokens: int | None = None
        self.prompt = 0
        self.known = True

    def listen(self, part: nn.Module) -> None:
        """Have the model tell what it is called with."""
        part.register_forward_pre_hook(self.note, with_kwargs=True)
        part.register_forward_hook(self._end, always_call=True)

    def note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the model's forward."""
        given = _given(module, args, kwargs)
        cache = given.get("past_key_values")
        self.continues = cache is not None and int(cache.get_seq_length()) > 0
        self.samples, self.tokens = _size(given)
        self.mask = _counting(given.get("attention_mask"), self.samples)
        self.running = True
        if self.continues:
            self.known = getattr(cache, _PROMPT, self.prompt) == self.prompt
        else:
            self.prompt, self.known = next(_PROMPTS), True

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.known and (cache := getattr(output, "past_key_values", None)) is not None:
            with suppress(AttributeError):  # copies of a cache are of its prompt, too
                setattr(cache, _PROMPT, self.prompt)
        self.running = False

    def holds(self, inputs: Tensor) -> bool:
        """Whether the inputs of a layer are of its samples, one row each."""
        return self.samples is None or len(inputs) == self.samples

    def flat(self, inputs: Tensor) -> bool:
        """Whether they are rows of its tokens, one sample's behind the other's."""
        if self.samples is None or self.tokens is None or inputs.dim() != 2:
            return False
        return inputs.is_floating_point() and len(inputs) == self.samples * self.tokens

    def __getstate__(self) -> dict[str, Any]:
        return vars(Text())


def _given(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    given = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
    return given | given.pop("kwargs", {})


def _counting(mask: Any, samples: int | None) -> Tensor | None:
    """Which tokens are no padding, (samples, tokens), of an attention mask; None where it does not
    say. Generation with a static cache makes one of pairs beforehand, (samples, 1, queries, keys),
    added (0 where a query sees a key) or boolean, for each kind of attention: padding does not even
    see itself. Samples and queries may be one for all."""
    if isinstance(mask, Mapping):
        mask = next((of for of in mask.values() if isinstance(of, Tensor)), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask
    pairs = mask[:, 0]
    itself = pairs[:, 0] if pairs.shape[1] == 1 else pairs.diagonal(dim1=1, dim2=2)
    itself = itself.expand(samples or 1, -1) if len(itself) == 1 else itself
    return itself == 0 if itself.is_floating_point() else itself != 0


def _size(given: Mapping[str, Any]) -> tuple[int, int] | tuple[None, None]:
    """Samples and tokens of a text; None where it is not among what is given."""
    text = next((v for n in ("input_ids", "inputs_embeds")
                 if isinstance(v := given.get(n), Tensor) and v.dim() > 1), None)  # fmt: skip
    return (None, None) if text is None else (text.shape[0], text.shape[1])


class Mixture:
    """Linear maps that share one w: routed at the input of the module ``entry``, the first floating
    tensor that it is called with, (samples, …, width), or of ``maps`` (samples, width, …).

    ``per`` "sample": every sample has its own w, whatever it is in one batch with. "batch": the
    mean over the batch, for all. With a filled cache the w of the prompt stays: what is cached was
    made with it. What does not keep samples apart, one row each and first, is refused: no sample's
    answer depends on the others.
    """

    def __init__(
        self, number: int, entry: str, router: Router, per: Per, text: Text | None,
        maps: bool = False,
    ) -> None:  # fmt: skip
        self.number, self.entry, self.per = number, entry, per
        self.router, self.text, self.maps = router, text, maps
        self.weights: Tensor | None = None

    def route(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the forward of the entry."""
        inputs = next((v for v in (*args, *kwargs.values())
                       if isinstance(v, Tensor) and v.is_floating_point()), None)  # fmt: skip
        if inputs is not None and self.maps and inputs.dim() > 2:
            inputs = inputs.movedim(1, -1)
        if inputs is None or inputs.dim() < 2 or inputs.shape[-1] != self.router.inputs:
            raise PlanError("a mixture is routed by tensors (samples, ..., width)",
                            where=self.entry, expected=f"(samples, ..., {self.router.inputs})",
                            found=None if inputs is None else tuple(inputs.shape),
                            fix="select modules with that input")  # fmt: skip
        if self.text is not None and self.text.continues:
            self._check_prompt(inputs)
            return
        for text in self._reading():
            if text.flat(inputs):
                inputs = inputs.unflatten(0, (text.samples, -1))
            if (self.sees or self._padded) and not text.holds(inputs):
                raise not_apart(inputs, text.samples, self.entry)
        tokens = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        weights = self.router(tokens, self._mask(tokens))
        self.weights = weights.mean(dim=0, keepdim=True) if self.per == "batch" else weights

    @property
    def sees(self) -> bool:
        """Whether every sample has its own w."""
        return self.per == "sample" and self.router.depth > 0

    def weights_for(self, inputs: Tensor, where: str = "") -> Tensor:
        """w, for inputs inside the part, of the layer at ``where``. Where samples have become
        several rows each, one behind the other (beams, or continuations of a cached prompt, or
        their tokens), each has its sample's w."""
        if self.weights is None:
            raise PlanError("a mixed layer was called before its mixture", where=self.entry,
                            fix="call the whole model, or at least that module")  # fmt: skip
        rows, count, texts = len(inputs), len(self.weights), self._reading()
        if count == 1:
            return self.weights
        known = not texts or any(text.holds(inputs) or text.flat(inputs) for text in texts)
        if not known or rows % count or (rows != count and not texts):
            raise not_apart(inputs, texts[0].samples if texts else count, where or self.entry)
        if rows == count:
            return self.weights
        return self.weights.repeat_interleave(rows // count, dim=0)

    def _reading(self) -> list[Text]:
        """Those that say how many samples there are now."""
        text = self.text
        return [text] if text is not None and text.running and text.samples is not None else []

    def settled(self) -> Tensor:
        """One w (experts,) for all inputs: that of a router without input, or the mean of what was
        routed last."""
        if self.router.depth == 0:
            return self.router.chosen(self.router.bias.detach()[None])[0]
        if self.weights is None:
            raise PlanError("nothing was routed yet", where=self.entry,
                            fix="unload(inputs)")  # fmt: skip
        return self.weights.detach().mean(dim=0)

    @property
    def _padded(self) -> bool:
        """Whether the router must know which tokens are padding."""
        return self.text is not None and self.text.mask is not None and self.router.depth > 0

    def _mask(self, tokens: Tensor) -> Tensor | None:
        if not self._padded:
            return None
        assert self.text is not None and self.text.mask is not None
        mask = self.text.mask
        if mask.shape != tokens.shape[:2]:
            raise PlanError("the attention mask is of other tokens than the mixture sees",
                            where=self.entry, expected=tuple(tokens.shape[:2]),
                            found=tuple(mask.shape))  # fmt: skip
        return mask != 0

    def _check_prompt(self, inputs: Tensor) -> None:
        known = self.text is None or self.text.known or not self.router.depth
        if not known or self.weights is None or len(inputs) % len(self.weights):
            count = 0 if self.weights is None else len(self.weights)
            raise PlanError("a cache is given whose prompt was not the last that was routed here",
                            where=self.entry, expected=f"{count} samples, of the last prompt",
                            found=f"{len(inputs)} samples" + ("" if known else ", of another"),
                            fix="begin with the prompt, and without a cache")  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": None}


class Routing(Layer):
    """All mixtures of a model and their ``routers``, each of which is held once, however many
    mixtures share it. A child of the model under :data:`ROUTING`."""

    kind: ClassVar[str] = "routing"

    def __init__(self, routers: Sequence[Router]) -> None:
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.mixtures: list[Mixture] = []
        self._texts: dict[str, Text] = {}
        self._listens = False

    def add(
        self, model: nn.Module, entry: str, router: int, per: Per, maps: bool = False
    ) -> Mixture:
        """A mixture of the part of ``model`` that begins at ``entry``."""
        reader, text = text_model(model, entry), None
        if reader is not None:
            text = self._texts.setdefault(reader, Text())
        gate = self.routers[router]
        assert isinstance(gate, Router)
        if per == "sample" and gate.depth:
            check_order(model)
        self.mixtures.append(Mixture(len(self.mixtures), entry, gate, per, text, maps))
        return self.mixtures[-1]

    def listen(self, model: nn.Module) -> None:
        """Have the model's modules tell the mixtures when they are called: once the layers are in
        their places. Once is enough, for copies too: what is bound to an object is copied with
        it."""
        if self._listens:
            return
        self._listens = True
        for path, text in self._texts.items():
            text.listen(model.get_submodule(path))
        for path, part in model.named_modules():
            if isinstance(part, Mixed):
                part.path = path
        for mixture in self.mixtures:
            entry = model.get_submodule(mixture.entry)
            entry.register_forward_pre_hook(mixture.route, with_kwargs=True)

    @property
    def precise(self) -> tuple[str, ...]:
        return tuple(self.state_dict())

    @property
    def active(self) -> int:
        return self.trained

    def described(self) -> dict[str, Any]:
        places = {id(router): at for at, router in enumerate(self.routers)}
        return {
            "routers": [router.described() for router in self.routers],  # type: ignore
            "mixtures": [{"entry": m.entry, "router": places[id(m.router)], "per": m.per,
                          **({"maps": True} if m.maps else {})} for m in self.mixtures],
        }  # fmt: skip

    @classmethod
    def restored(cls, saved: Saved) -> Self:
        made = cls([Router.restored(router) for router in saved.said["routers"]])
        for mixture in saved.said["mixtures"]:
            made.add(saved.model, **mixture)
        return made


ROUTING = "routing"
"""The name under which a model holds its :class:`Routing`."""


_INPUTS = frozenset({"input_ids", "pixel_values", "input_features", "input_values"})


def input_reader(model: nn.Module, path: str) -> str | None:
    """The innermost module around a path that is called with what a user has."""
    parts = path.split(".")
    outer = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    return next((each for each in outer if _takes(model, each) & _INPUTS), None)


def text_model(model: nn.Module, path: str) -> str | None:
    """The same, if that is ``input_ids`` and an ``attention_mask``: it reads text. T5's encoder and
    decoder are two."""
    reader = input_reader(model, path)
    if reader is None or not {"input_ids", "attention_mask"} <= _takes(model, reader):
        return None
    return reader


def _takes(model: nn.Module, path: str) -> set[str]:
    try:
        part = model.get_submodule(path)
    except AttributeError:  # a map of an attention that is not taken apart yet
        return set()
    return set(inspect.signature(part.forward).parameters)


def not_apart(inputs: Tensor, samples: int | None, where: str) -> PlanError:
    """The refusal of inputs that do not hold one row of each sample, samples first."""
    return PlanError("a mixed layer got other samples than its mixture routed", where=where,
                     expected=f"inputs ({samples}, ...), samples first", found=tuple(inputs.shape),
                     fix="one w for all (per='batch', router=0 or epochs=0), or modules that keep "
                         "samples apart")  # fmt: skip


def fixed(routing: Routing) -> bool:
    """Whether no mixture depends on the input."""
    return all(mixture.router.depth == 0 for mixture in routing.mixtures)


def looks_ahead(model: nn.Module) -> bool:
    """Whether layers are mixed by all that a model is given at once, so that what it answers at one
    token depends on those after it, too."""
    return any(isinstance(part, Routing) and not fixed(part) for part in model.modules())


def check_order(model: nn.Module) -> None:
    """Refuse a model whose tokens come before its samples: no layer could tell them apart."""
    for path, part in model.named_modules():
        if isinstance(part, nn.MultiheadAttention) and not part.batch_first:
            raise PlanError("the model attends to (tokens, samples, width), so that no sample can "
                            "have its own weights", where=path, expected="batch_first=True",
                            found="batch_first=False",
                            fix="per='batch', or the model with batch_first=True")  # fmt: skip


