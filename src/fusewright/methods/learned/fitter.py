"""A descent on few numbers: the same seed gives the same end, and a killed one goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from math import isfinite
from pathlib import Path
from time import monotonic
from typing import Any, Literal
from warnings import warn

import torch
from torch import Tensor, nn

from fusewright.errors import FusewrightWarning, MemoryShortage, NumericError
from fusewright.methods.learned.processes import Processes
from fusewright.weights.checkpoint import read_checkpoint, write_checkpoint

Step = Callable[[int], Mapping[str, float]]
"""Leaves gradients in the parameters and answers with the losses by task."""
Tell = Callable[[int, int, float], None]
"""Hears of (steps done, steps in all, mean loss)."""
SAVED_EVERY = 60.0
"""Seconds of work that a killed fit loses at most, beside the step it is in."""


@dataclass(frozen=True)
class Fit:
    """How a descent went: mean loss of each step, held-out scores (step, score), the step whose
    state was kept, the losses of each step by task, the step at which it ended early, since a loss
    was no longer finite, and what ``ending`` found."""

    losses: tuple[float, ...]
    scores: tuple[tuple[int, float], ...] = ()
    kept: int = 0
    tasks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    stopped: int | None = None
    ended: Any = None


@dataclass(frozen=True)
class Fitter:
    """Adam (1412.6980) on the parameters of a small module.

    ``score`` (larger is better) is asked before the first step, every ``every`` steps and at the
    end; the state that scored best is kept, the earliest of equals: what makes it worse is undone.
    ``constrain`` is called after each step. ``schedule`` "cosine" ends at ``floor`` times the rate.
    ``ending`` looks at the last state, while it is still there, where another is kept.
    ``checkpoint``: a file that is written at every score and every minute, and gone on from if it
    is there, with torch's own generator as it then was; the caller's draws are left alone.

    Where a loss, a gradient or a score is no longer finite, the descent ends with a
    FusewrightWarning and the state that scored best, if one was scored after the first step; else
    it raises NumericError, since nothing says that what was learned so far is any good (``advice``
    is what else to do about it). Raises MemoryShortage where memory runs out: the best state so far
    is then in place, and the checkpoint is of the step before.
    """

    steps: int
    rate: float
    _: KW_ONLY
    schedule: Literal["constant", "cosine"] = "constant"
    floor: float = 0.0
    every: int = 50
    checkpoint: Path | None = None
    constrain: Callable[[], None] | None = field(default=None, repr=False)
    ending: Callable[[], Any] | None = field(default=None, repr=False)
    advice: str = ""
    score: Callable[[], float] | None = field(default=None, repr=False)
    tell: Tell | None = field(default=None, repr=False)

    def run(self, trained: nn.Module, step: Step) -> Fit:
        """Descend; ``trained`` is left in the state that is kept."""
        optimiser = torch.optim.Adam(trained.parameters(), lr=self.rate)
        run, stopped, ended = _Run(self, trained, optimiser), None, None
        processes = Processes.started()
        with torch.random.fork_rng(devices=[]):
            run.resume()
            processes.wait()  # until all have read the checkpoint: it may be replaced then
            processes.same_draws()
            try:
                self._descend(run, step)
                ended = self._ended(run)
            except NumericError as error:
                if len(run.scores) < 2:
                    raise
                stopped = run.done
                self._warn(run, error)
            except (MemoryError, RuntimeError) as error:
                if not is_shortage(error):
                    raise
                if not run.moving:
                    run.rewind()
                    run.save()
                raise self._shortage(run.done, error) from error
            finally:
                run.restore()
        tasks = {task: tuple(losses) for task, losses in run.tasks.items()}
        return Fit(tuple(run.losses), tuple(run.scores), run.kept, tasks, stopped, ended)

    def _descend(self, run: _Run, step: Step) -> None:
        while run.done < self.steps:
            if run.done % self.every == 0:
                run.measure()
            self._move(run, step)
        run.measure()

    def _ended(self, run: _Run) -> Any:
        undone = self.score is not None and run.kept != run.done
        return self.ending() if undone and self.ending is not None else None

    def _move(self, run: _Run, step: Step) -> None:
        run.begin()
        run.optimiser.zero_grad()
        for group in run.optimiser.param_groups:
            group["lr"] = self._rate(run.done)
        losses = step(run.done)
        odd = {name: loss for name, loss in losses.items() if not isfinite(loss)}
        if odd:
            raise NumericError("a loss is no longer finite", where=f"step {run.done}", found=odd,
                               fix=self.instead(run.done))  # fmt: skip
        self._check_gradients(run)
        run.moving = True
        run.optimiser.step()
        if self.constrain is not None:
            self.constrain()
        run.moving = False
        run.end()
        run.note(losses)
        if self.tell is not None:
            self.tell(run.done, self.steps, run.losses[-1])

    def _check_gradients(self, run: _Run) -> None:
        """They may be infinite where the loss is not; a step along them would spoil the state."""
        for name, parameter in run.trained.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise NumericError("a gradient is no longer finite", where=f"step {run.done}",
                                   found=name, fix=self.instead(run.done))  # fmt: skip

    def instead(self, done: int) -> str:
        """What to do where a number is no longer finite."""
        if not done:
            return "look at the first inputs, and at what the fit begins from"
        return f"a smaller rate, or fewer steps: {done} went well{self.advice}"

    def _warn(self, run: _Run, error: NumericError) -> None:
        warn(f"{error.problem} ({error.where}: {error.found}): the fit ended there, before its "
             f"{self.steps} steps; the state that scored best, of step {run.kept}, is kept",
             FusewrightWarning, stacklevel=3)  # fmt: skip

    def _shortage(self, done: int, error: Exception) -> MemoryShortage:
        again = f"; the same command goes on at step {done}"
        if self.checkpoint is None:
            again = "; with out=FOLDER what was learned until then is kept, and gone on from"
        return shortage(error, f"step {done}", f"a smaller batch, or more memory{again}")

    def _rate(self, done: int) -> float:
        if self.schedule == "constant":
            return self.rate
        share = float(1 + torch.cos(torch.tensor(torch.pi * done / self.steps))) / 2
        return self.rate * (self.floor + (1 - self.floor) * share)


class _Run:
    """A descent under way; ``moving`` while a step is made, half of which is no state to keep."""

    def __init__(self, fitter: Fitter, trained: nn.Module, optimiser: torch.optim.Adam) -> None:
        self.fitter, self.trained, self.optimiser = fitter, trained, optimiser
        self.done, self.kept, self.moving = 0, 0, False
        self.losses: list[float] = []
        self.tasks: dict[str, list[float]] = {}
        self._saved = monotonic()
        self.scores: list[tuple[int, float]] = []
        self._best: dict[str, Any] | None = None
        self._began: tuple[Tensor, dict[str, Tensor]] | None = None

    def begin(self) -> None:
        """A step begins: it may draw and write to buffers before it moves what is learned."""
        buffers = {name: buffer.clone() for name, buffer in self.trained.named_buffers()}
        self._began = torch.get_rng_state(), buffers

    def end(self) -> None:
        self.done, self._began = self.done + 1, None

    def rewind(self) -> None:
        """To where the step began that memory ran out in."""
        if self._began is not None:
            draws, buffers = self._began
            torch.set_rng_state(draws)
            self.trained.load_state_dict(buffers, strict=False)

    def note(self, losses: Mapping[str, float]) -> None:
        """A step was made."""
        self.losses.append(sum(losses.values()) / len(losses))
        for task, loss in losses.items():
            self.tasks.setdefault(task, []).append(loss)
        if monotonic() - self._saved > SAVED_EVERY:
            self.save()

    def measure(self) -> None:
        if self.scores and self.scores[-1][0] == self.done:
            return
        if self.fitter.score is not None:
            score = self.fitter.score()
            if not isfinite(score):
                raise NumericError("the score of what is learned is not finite",
                                   where=f"step {self.done}", found=score,
                                   fix=self.fitter.instead(self.done))  # fmt: skip
            if self._best is None or score > max(found for _, found in self.scores):
                self.kept, self._best = self.done, _copied(self.trained)
            self.scores.append((self.done, score))
        self.save()

    def restore(self) -> None:
        if self._best is not None:
            self.trained.load_state_dict(self._best)
        else:
            self.kept = self.done

    def resume(self) -> None:
        path = self.fitter.checkpoint
        if path is None or not path.exists():
            return
        held = read_checkpoint(path)
        self.trained.load_state_dict(held["trained"])
        self.optimiser.load_state_dict(held["optimiser"])
        torch.set_rng_state(held["draws"])
        self._best, self.done, self.kept = held["best"], held["done"], held["kept"]
        self.tasks = held["tasks"]
        self.losses, self.scores = held["losses"], [(int(s), v) for s, v in held["scores"]]

    def save(self) -> None:
        path = self.fitter.checkpoint
        if path is None or not Processes.started().first:
            return
        write_checkpoint(path, {
            "trained": self.trained.state_dict(), "optimiser": self.optimiser.state_dict(),
            "best": self._best, "done": self.done, "kept": self.kept, "losses": self.losses,
            "scores": self.scores, "tasks": self.tasks, "draws": torch.get_rng_state(),
        })  # fmt: skip
        self._saved = monotonic()


def shortage(error: Exception, where: str, fix: str) -> MemoryShortage:
    """The refusal that such an error becomes."""
    found = (str(error) or type(error).__name__).splitlines()[0]
    return MemoryShortage("memory ran out", where=where, found=found, fix=fix)


_SHORT = ("not enough memory", "can't allocate memory", "out of memory",
          "cublas_status_alloc_failed")  # fmt: skip
"""What torch says of it, of the CPU and of the libraries of a GPU."""


def is_shortage(error: Exception) -> bool:
    """Whether an error says that memory ran out; torch says so of the CPU by a RuntimeError."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in said for words in _SHORT)


def _copied(module: nn.Module) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
