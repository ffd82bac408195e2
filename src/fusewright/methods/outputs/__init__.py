"""Output ensembles: every model runs, and what they answer is combined.

References for every merge, at as many times the cost of inference as there are models. They act on
answers, not on weights, and are no Maps: the registry of weight methods does not list them. What
they return are logits again: their softmax is the ensemble's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusewright.errors import RecipeError, nearest
from fusewright.methods.outputs._contract import OutputEnsemble
from fusewright.methods.outputs._max import MaxEnsemble
from fusewright.methods.outputs._simple import SimpleEnsemble
from fusewright.methods.outputs._weighted import WeightedEnsemble

ENSEMBLES: dict[str, type[OutputEnsemble]] = {
    cls.name: cls for cls in (SimpleEnsemble, WeightedEnsemble, MaxEnsemble)
}

__all__ = [
    "ENSEMBLES", "MaxEnsemble", "OutputEnsemble", "SimpleEnsemble", "WeightedEnsemble", "combine",
]  # fmt: skip


def combine(logits: Sequence[Tensor], how: str, weights: Sequence[float] | None = None) -> Tensor:
    """The ensemble's logits, by the name of the ensemble with its defaults.

    ``logits``: each model's, all (…, classes) of one shape. ``how``: "simple", "weighted", "max".
    ``weights``: one for each model, for "weighted" only.

    Raises RecipeError for another name, for weights where none belong or none where they do, and
    what the ensemble refuses.
    """
    if how not in ENSEMBLES:
        close = nearest(how, list(ENSEMBLES))
        raise RecipeError(f"there is no output ensemble {how!r}", expected=", ".join(ENSEMBLES),
                          fix=f"did you mean {close!r}?" if close else None)  # fmt: skip
    if (weights is not None) != (how == WeightedEnsemble.name):
        raise RecipeError(
            "weights belong to the weighted ensemble, and it to them", where=f"ensemble {how!r}",
            found=f"weights={weights}", fix="combine(logits, 'weighted', weights=[…])",
        )  # fmt: skip
    if weights is not None:
        return WeightedEnsemble(tuple(weights))(logits)
    return ENSEMBLES[how]()(logits)
