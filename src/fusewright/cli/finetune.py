"""``fusewright finetune``: an expert from a suite's base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusewright.cli._print import print_json, print_tables
from fusewright.cli._shared import Json, add
from fusewright.cli.suite import Data, Device, Name, Pool

HOWS = ("full", "lora", "l-lora", "linear")


def register(app: typer.Typer) -> None:
    """Add ``finetune``."""
    add(
        app, finetune, "fusewright finetune digits --task parity -o experts/parity",
        "fusewright finetune vision-mini --task gtsrb --how l-lora --data data/ -o experts/gtsrb",
        r"fusewright finetune text-mini --task NAME --how lora --targets '.*\.(query|value)' "
        "--epochs 2 --rate 5e-4 -o experts/NAME",
    )  # fmt: skip


def _hows(incomplete: str) -> list[str]:
    return [name for name in HOWS if name.startswith(incomplete)]


def _tasks(context: typer.Context, incomplete: str) -> list[str]:
    """Tasks of the suite that was typed, for the shell's completion."""
    from fusewright.bench.suite_file import find_suite, read_suite
    from fusewright.errors import FusewrightError

    # An option without its value ends the parsing before arguments are given their names.
    typed = context.params.get("suite") or next(iter(context.args), "")
    try:
        spec = read_suite(find_suite(typed))
    except FusewrightError:
        return []
    return [name for name in spec.tasks if name.startswith(incomplete)]


def finetune(
    suite: Name,
    task: Annotated[str, typer.Option(help="One of its tasks.", autocompletion=_tasks)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the expert goes.")],
    how: Annotated[
        str, typer.Option(metavar="|".join(HOWS), help="What is trained.", autocompletion=_hows)
    ] = "full",
    rank: Annotated[int | None, typer.Option(min=1, help="Of adapters (16).")] = None,
    alpha: Annotated[float | None, typer.Option(help="Adapters are scaled by alpha/rank (32).")] = (
        None
    ),
    targets: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Whole names of adapted modules (all linear ones)."),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Before adapters (0).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="As the suite's experts take.")] = None,
    epochs: Annotated[float | None, typer.Option(help="In place of steps.")] = None,
    rate: Annotated[float | None, typer.Option(help="The peak, as the suite's experts have; "
                    "of all of a T5, relative to each tensor's size.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="As the suite's experts have.")] = None,
    decay: Annotated[float | None, typer.Option(help="Of matrices' weights (0).")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of order, augmentation and dropout (the pool's).")
    ] = None,
    pool_seed: Annotated[
        int | None, typer.Option(help="Which of the pool's trainings is the base (the first).")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Sums depend on it (as the suite's experts took).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Validation rows, at most.")] = None,
    pool: Pool = None,
    data: Data = None,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Fine-tune a suite's base on one of its tasks: an expert to merge.

    full trains all weights; lora an adapter; l-lora an adapter linearised around its start, which
    merges without cross terms and, from the same start for every task, keeps its rank; linear all
    weights in the tangent space. The result is a model's folder, or a PEFT adapter's. The same
    command goes on after a kill. Scores are of validation rows, before and after.
    Needs the extras: pip install 'fusewright\\[demo,tasks,peft]'.
    """
    from fusewright.bench.finetuning import finetune as tune
    from fusewright.bench.suite import suite as open_suite

    opened = open_suite(suite, pool=pool, data=data, seed=pool_seed, device=device)
    found = tune(
        opened, task, out=out, how=how, rank=rank,
        alpha=alpha, targets=targets, dropout=dropout, steps=steps, epochs=epochs, rate=rate,
        batch=batch, decay=decay, seed=seed, threads=threads, limit=limit, progress=not json,
    )  # fmt: skip
    if json:
        print_json(found.plain())
    else:
        print_tables([found.table()])
