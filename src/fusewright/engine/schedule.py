"""Runs a plan's units on threads: pass by pass, under the memory budget.

A pass ends where something must be known of the whole model (a round of scope "model") or with
the combination. Within a pass each tensor goes through waves: its own rounds that are not solved
yet, each solved when its last unit is measured, then the pass's goal. Which thread does what does
not change a bit of the result.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fusewright.engine.jobs import Action, Job, memory_of_tensors
from fusewright.engine.planner import Plan
from fusewright.engine.work import Kept, Unit, Worker, ensure_finite_solution
from fusewright.methods.contract import At
from fusewright.methods.partials import Partial
from fusewright.methods.pipeline import Key, Place, Step, resolved

Tick = Callable[[str, str, int], None]
"""Called after each unit with (phase, tensor, bytes of the output that it stands for)."""


@dataclass
class _TensorState:
    """One tensor on its way through a pass."""

    job: Job
    waves: deque[Step | None]
    units: Sequence[Unit]
    solved: dict[Key, Any]
    kept: Kept | None = None
    pending: int = 0
    partials: dict[int, Partial] = field(default_factory=dict)
    """What each thread has measured of the wave: histograms are large, so they are not made anew
    for each unit, and need no lock."""

    @property
    def own(self) -> Partial | None:
        return self.partials.get(threading.get_ident())

    def add(self, partial: Partial) -> None:
        """Add what this thread measured of a unit, unless it was added already."""
        if self.own is None:
            self.partials[threading.get_ident()] = partial
        elif self.own is not partial:
            self.partials[threading.get_ident()] += partial

    def measured(self) -> Partial | None:
        """All threads' together, once."""
        parts = list(self.partials.values())
        self.partials.clear()
        for other in parts[1:]:
            parts[0] += other
        return parts[0].rounded() if parts else None


@dataclass
class Schedule:
    """The passes over a plan. ``model_solved`` and ``tensor_solved`` hold every statistic."""

    plan: Plan
    worker: Worker
    done: frozenset[str] = frozenset()
    tick: Tick = lambda phase, tensor, size: None
    model_solved: dict[Key, Any] = field(default_factory=dict)
    tensor_solved: dict[str, dict[Key, Any]] = field(default_factory=dict)
    _of_model: Partial | None = None
    """What the tensors measured for the model's round that ends this pass, added at once: a
    histogram for each tensor of a large model would not fit."""

    def run(self) -> None:
        """All passes in order; raises the first failure of any thread."""
        self._restore()
        merged = any(j.spans for j in self.plan.jobs.values() if j.action is Action.MERGE)
        steps = self.plan.method.steps(self.plan.dtype) if merged else ()
        for step in steps:
            if step.round.scope == "model" and step.key not in self.model_solved:
                if step.round.needed(self._model_at(step)):
                    self._pass(step, self._before(steps, step))
                else:
                    self._solve_model(step, None)
        self._pass(None, [s for s in steps if s.round.scope == "tensor"])

    def _before(self, steps: Sequence[Step], goal: Step) -> list[Step]:
        return [s for s in steps[: steps.index(goal)] if s.round.scope == "tensor"]

    def _restore(self) -> None:
        steps = self.plan.method.steps(self.plan.dtype)
        by_key = {f"{s.index}.{s.round.name}": s.key for s in steps}
        for note, value in self.worker.sink.noted().items():
            scope, _, rest = note.partition(":")
            key, _, tensor = rest.partition(":")
            if scope == "model" and key in by_key:
                self.model_solved[by_key[key]] = value
            elif scope == "tensor" and key in by_key:
                self.tensor_solved.setdefault(tensor, {})[by_key[key]] = value

    def _pass(self, goal: Step | None, own: Sequence[Step]) -> None:
        self._of_model = None
        _Pool(self, self._states(goal, own)).run()
        if goal is not None and self._of_model is not None:
            self._solve_model(goal, self._of_model.rounded())

    def _solve_model(self, step: Step, partial: Partial | None) -> None:
        value = step.round.solve(partial, self._model_at(step))
        self.model_solved[step.key] = ensure_finite_solution(
            step.round.name, value, "the whole model"
        )
        self.worker.sink.note(f"model:{step.index}.{step.round.name}", value)

    def _states(self, goal: Step | None, own: Sequence[Step]) -> Iterable[_TensorState]:
        for name, job in self.plan.jobs.items():
            merged = job.action is Action.MERGE
            if goal is not None and not merged:
                continue
            solved = {**self.model_solved, **self.tensor_solved.get(name, {})} if merged else {}
            waves: list[Step | None] = [s for s in own if merged and s.key not in solved]
            units = [Unit(job, *span) for span in job.spans]
            left = [u for u in units if u.task not in self.done] if goal is None else units
            if not left:
                continue
            # What is still to be measured needs every unit, finished or not (a journal may have
            # lost a statistic and kept its tensor's first units).
            units = units if waves else left
            yield _TensorState(job, deque([*waves, goal]), units, solved)

    def _model_at(self, step: Step) -> At:
        jobs = [j for j in self.plan.jobs.values() if j.action is Action.MERGE]
        total = sum(j.info.numel for j in jobs)
        stage = self.plan.method.chain[step.index]
        params = resolved(stage, jobs[0].layout, self.plan.keys)
        where = At("", (total,), 0, total, self.plan.keys, jobs[0].layout, self.plan.dtype,
                   self.plan.recipe.seed)  # fmt: skip
        blank = tuple(params for _ in self.plan.method.chain)
        return Place(where, blank, dict(self.model_solved)).at(step.index)

    # -- called by the pool's threads -----------------------------------------------------------

    def act(self, state: _TensorState, wave: Step | None, unit: Unit) -> Partial | None:
        """Do one unit of a wave."""
        partial = None
        if wave is None:
            self.worker.combine(unit, state.solved)
        else:
            partial = self.worker.measure(wave, unit, state.solved, state.own)
        if wave is None or wave.round.whole:
            size = (unit.stop - unit.start) * unit.job.info.dtype.itemsize
            self.tick("merge" if wave is None else wave.round.name, unit.name, size)
        return partial

    def close_wave(self, state: _TensorState, wave: Step | None) -> None:
        """A wave's last unit is done: solve it, or hand its partial to the model's."""
        partial = state.measured()
        if wave is None or partial is None:
            return
        if wave.round.scope == "model":
            self._of_model = partial if self._of_model is None else self._of_model + partial
        else:
            self._solve_tensor(state, wave, partial)

    def skips(self, state: _TensorState, wave: Step | None) -> bool:
        """Solve a round of a tensor that is not needed, without a look at it."""
        if wave is None or wave.round.scope == "model" or wave.round.needed(self._at(state, wave)):
            return False
        self._solve_tensor(state, wave, None)
        return True

    def _at(self, state: _TensorState, wave: Step) -> At:
        whole = Unit(state.job, 0, state.job.info.numel)
        return self.worker.place(whole, state.solved).at(wave.index)

    def _solve_tensor(self, state: _TensorState, wave: Step, partial: Partial | None) -> None:
        at, name = self._at(state, wave), state.job.info.name
        value = ensure_finite_solution(wave.round.name, wave.round.solve(partial, at), name)
        state.solved[wave.key] = value
        self.tensor_solved.setdefault(name, {})[wave.key] = value
        self.worker.sink.note(f"tensor:{wave.index}.{wave.round.name}:{name}", value)


def shares(plan: Plan) -> tuple[int, int]:
    """The memory of units, and of tensors that are kept between waves."""
    memory = memory_of_tensors(plan.options, plan.kernel)
    some = any(job.kept for job in plan.jobs.values())
    return (memory // 2, memory // 2) if some else (memory, 0)


class _Pool:
    """Threads that take units of open tensors first, then open the next tensor."""

    def __init__(self, schedule: Schedule, states: Iterable[_TensorState]) -> None:
        self.schedule, self.states = schedule, iter(states)
        self.waiting: _TensorState | None = None
        self.ready: deque[tuple[_TensorState, Step | None, Unit]] = deque()
        self.budget, self.room = shares(schedule.plan)
        self.changed = threading.Condition()
        self.active = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        workers = self.schedule.plan.options.workers
        threads = [threading.Thread(target=self._loop, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():  # a timeout keeps Ctrl-C alive
                    thread.join(0.2)
        except BaseException as error:
            with self.changed:
                self.failure = self.failure or error
                self.changed.notify_all()
            for thread in threads:
                thread.join()
            raise
        if self.failure is not None:
            raise self.failure

    def _loop(self) -> None:
        import torch

        with torch.inference_mode():
            while (item := self._take()) is not None:
                state, wave, unit = item
                failure = None
                try:
                    partial = self.schedule.act(state, wave, unit)
                    if partial is not None:
                        state.add(partial)
                except BaseException as error:
                    failure = error
                self._give(state, wave, unit, failure)

    def _take(self) -> tuple[_TensorState, Step | None, Unit] | None:
        with self.changed:
            while self.failure is None:
                if not self.ready:
                    self._open_next()
                if self.ready:
                    need = self.ready[0][2].job.memory
                    if need <= self.budget or self.active == 0:
                        self.budget -= need
                        self.active += 1
                        return self.ready.popleft()
                elif self.active == 0:
                    break
                self.changed.wait()
            self.changed.notify_all()
            return None

    def _open_next(self) -> None:
        """Open the next tensor, unless it must wait for the room of those that are kept."""
        state = self.waiting = self.waiting or next(self.states, None)
        if state is None:
            return
        if state.job.kept and len(state.waves) > 1:
            if state.job.nbytes > self.room:
                return
            self.room -= state.job.nbytes
            kept: Kept = {}
            state.kept = kept
            state.units = [replace(unit, kept=kept) for unit in state.units]
        self.waiting = None
        self._queue(state)

    def _release(self, state: _TensorState) -> None:
        if state.kept is not None:
            self.schedule.worker.spare.give(raw for raw, _ in state.kept.values())
            state.kept.clear()
            self.room += state.job.nbytes

    def _queue(self, state: _TensorState) -> None:
        wave = state.waves.popleft()
        while self.schedule.skips(state, wave):
            wave = state.waves.popleft()
        units = state.units
        if wave is not None and wave.round.every > 1:
            units = [Unit(state.job, *span) for span in state.job.sampled(wave.round.every)]
        state.pending = len(units)
        self.ready.extend((state, wave, unit) for unit in units)

    def _give(
        self,
        state: _TensorState,
        wave: Step | None,
        unit: Unit,
        failure: BaseException | None,
    ) -> None:
        with self.changed:
            self.budget += unit.job.memory
            self.active -= 1
            self.failure = self.failure or failure
            state.pending -= 1
            if state.pending == 0 and self.failure is None:
                try:
                    self.schedule.close_wave(state, wave)
                    if state.waves:
                        self._queue(state)
                    else:
                        self._release(state)
                except BaseException as error:
                    self.failure = error
            self.changed.notify_all()
