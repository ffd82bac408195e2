"""Every method by name: those of this package and those that other packages offer.

A third party's package lists its methods under the entry-point group ``fusewright.methods``::

    [project.entry-points."fusewright.methods"]
    my_method = "my_package:MyMethod"
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from fusewright.errors import RecipeError, nearest
from fusewright.methods.contract import Composite, Method, Stage
from fusewright.methods.pipeline import Pipeline
from fusewright.methods.written import called, listed

GROUP = "fusewright.methods"


@cache
def registry() -> dict[str, type[Method]]:
    """All methods and stages by recipe name, in alphabetical order."""
    from fusewright.methods import learned, routed, static

    found = {cls.name: cls for cls in (*static.METHODS, *learned.METHODS, *routed.METHODS)}
    for point in entry_points(group=GROUP):
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise RecipeError(
                f"the entry point {point.name!r} is not a fusewright method", found=point.value
            )
        if cls.name in found:
            raise RecipeError(f"two packages offer a method named {cls.name!r}", found=point.value)
        found[cls.name] = cls
    return dict(sorted(found.items()))


def method_class(name: str) -> type[Method]:
    """The method of a name; the error names the nearest."""
    known = registry()
    if name not in known:
        close = nearest(name, list(known))
        raise RecipeError(
            f"there is no method {name!r}",
            expected=", ".join(known),
            fix=f"did you mean {close!r}?" if close else "see `fusewright methods`",
        )
    return known[name]


def parse_method(spec: Any, params: dict[str, Any] | None = None) -> Method:
    """A method from its written form.

    ``"ties"``; ``{"ties": {"density": 0.2}}``, or ``"ties(density=0.2)"``; a list of such (a
    pipeline), or ``"drop >> elect"``.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, str) and len(stages := listed(spec, ">>")) > 1:
        spec = stages
    if isinstance(spec, list | tuple):
        if params:
            raise RecipeError(
                "a pipeline's parameters are written on its stages",
                found=f"parameters: {params}",
                fix="method: [drop: {density: 0.1}, elect: {}]",
            )
        return Pipeline(chain=tuple(s for part in spec for s in _stages(parse_method(part))))
    if isinstance(spec, dict) and len(spec) == 1:
        (name, own), *_ = spec.items()
        return _build(str(name), {**(own or {}), **(params or {})})
    if isinstance(spec, str):
        name, own = called(spec)
        return _build(name, {**own, **(params or {})})
    raise RecipeError(
        "a method is written as a name, {name: parameters}, or a list of such", found=repr(spec)
    )


def _build(name: str, params: dict[str, Any]) -> Method:
    cls, params = method_class(name), dict(params)
    profile = params.pop("profile", None)
    return cls.profile(profile, **params) if profile else cls(**params)


def _stages(method: Method) -> tuple[Stage, ...]:
    if isinstance(method, Stage | Composite | Pipeline):
        return method.stages()
    raise RecipeError(f"{method.name} is not a stage and cannot be part of a pipeline")
