"""``fusewright merge``: a recipe's models into one, on disk."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusewright.cli._errors import Terminated
from fusewright.cli._print import duration, print_json, print_tables, size
from fusewright.cli._progress import shown
from fusewright.cli._shared import Json, Memory, Threads, add, devices, dtypes

if TYPE_CHECKING:
    from fusewright.engine import Options

_ENGINE, _CARE = "How to run", "What to allow"

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.", dir_okay=False)]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="The folder to write; it must not exist yet.")
]
OnlyPlan = Annotated[
    bool, typer.Option("--plan", help="Only say what would be done, from headers alone.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe. Repeatable."),
]
DType = Annotated[str | None, typer.Option(help="The result's dtype.", autocompletion=dtypes)]
OutDType = Annotated[
    str | None, typer.Option(help="Store it in another dtype.", autocompletion=dtypes)
]
Seed = Annotated[int | None, typer.Option(help="For methods that draw at random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")]
Device = Annotated[
    str, typer.Option(help="Where to compute.", autocompletion=devices, rich_help_panel=_ENGINE)
]
ShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="Largest output file.", rich_help_panel=_ENGINE)
]
NoSync = Annotated[
    bool,
    typer.Option(
        "--no-fsync", rich_help_panel=_ENGINE,
        help="Do not wait for the disk: faster, not safe against power loss.",
    ),
]  # fmt: skip
Untie = Annotated[
    bool,
    typer.Option(
        "--untie",
        rich_help_panel=_CARE,
        help="Merge models of which some tie tensors and some do not.",
    ),
]
NonFinite = Annotated[
    bool,
    typer.Option("--allow-nonfinite", rich_help_panel=_CARE, help="Let NaN and infinity pass."),
]
Overflow = Annotated[
    bool,
    typer.Option(
        "--allow-overflow",
        rich_help_panel=_CARE,
        help="Let values become infinite in a narrower dtype.",
    ),
]
CopyCode = Annotated[
    bool, typer.Option("--copy-code", rich_help_panel=_CARE, help="Copy the base's .py files, too.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def register(app: typer.Typer) -> None:
    """Add ``merge``."""
    add(
        app,
        merge,
        "fusewright merge recipe.yaml -o merged/",
        "fusewright merge recipe.yaml --plan",
        "fusewright merge recipe.yaml -o merged/ --set parameters.density=0.3 --memory 2GiB",
        "fusewright merge recipe.yaml -o merged/ --overwrite --json > report.json",
    )


def merge(
    recipe: RecipeFile,
    out: Out = None,
    plan: OnlyPlan = False,
    set_: Set = None,
    dtype: DType = None,
    out_dtype: OutDType = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
    threads: Threads = None,
    memory: Memory = "1GiB",
    device: Device = "cpu",
    shard_size: ShardSize = "5GB",
    no_fsync: NoSync = False,
    untie: Untie = False,
    allow_nonfinite: NonFinite = False,
    allow_overflow: Overflow = False,
    copy_code: CopyCode = False,
) -> None:
    """Merge the models of a recipe into one folder that stock loaders open.

    The output appears complete or not at all. A run that was stopped is taken up by the same
    command, which reads again only what was not finished.
    """
    if out is None and not plan:
        raise typer.BadParameter("is needed, unless --plan is given", param_hint="'--out' / '-o'")
    from fusewright.engine import Options, load_recipe, parse_size

    given = {"dtype": dtype, "out_dtype": out_dtype, "seed": seed}
    overrides = [*(set_ or ()), *(f"{k}={v}" for k, v in given.items() if v is not None)]
    options = Options(
        threads=threads, memory=parse_size(memory), device=device, overwrite=overwrite,
        shard_size=parse_size(shard_size), untie=untie, allow_nonfinite=allow_nonfinite,
        allow_overflow=allow_overflow, copy_code=copy_code, durable=not no_fsync,
    )  # fmt: skip
    read = load_recipe(recipe, overrides)
    if plan:
        show_plan(read, options, out, json)
    elif out is not None:
        execute(read, options, out, quiet=quiet or json, as_json=json)


def show_plan(recipe: Any, options: Options, out: Path | None, as_json: bool) -> None:
    """Print what a merge would do."""
    from fusewright.engine import plan

    decided = plan(recipe, options, out)
    if as_json:
        print_json(decided.to_json())
    else:
        print_tables(decided.tables())


def execute(recipe: Any, options: Options, out: Path, *, quiet: bool, as_json: bool) -> None:
    """Merge, and say what was read, written and how fast."""
    from fusewright.engine import run
    from fusewright.methods.learned.processes import Processes

    given = {}
    if recipe.data is not None:
        from fusewright.bench.adaptation import data_of
        from fusewright.engine.planner import recipe_method

        given["data"] = data_of(recipe.data, recipe_method(recipe).needs == "labelled")
    if not Processes.started().first:  # the first of several speaks for all
        quiet, as_json = True, False
    with resumable(out), shown(quiet) as progress:
        merged = run(recipe, out, options, progress, **given)
    if as_json:
        print_json({"out": str(out), **merged.report})
    elif not quiet:
        print(summary(out, merged.report))


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind in order and say what is kept and how to go on."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        raise type(error)(_kept(out)) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise Terminated


def _kept(out: Path) -> str:
    from fusewright.engine.program import fits_folder
    from fusewright.weights.target import resolve_target, staging_folder

    target = resolve_target(out)
    kept = [folder for folder in (staging_folder(target), fits_folder(target)) if folder.exists()]
    if not kept:
        return "nothing was written"
    folders = " and ".join(map(str, kept))
    return f"finished work is kept in {folders}\n  fix:      run the same command to go on"


def summary(out: Path, report: Mapping[str, Any]) -> str:
    """What moved, how long it took, and how near that is to plain reading and writing."""
    read, written, seconds = (report[k] for k in ("bytes_read", "bytes_written", "seconds"))
    lines = [
        f"{out}: complete",
        *_fit_told(report),
        f"  {size(read)} read, {size(written)} written in {duration(seconds)} "
        f"({size((read + written) / max(seconds, 1e-9))}/s, {report['threads']} threads)",
    ]
    if speed := report.get("bandwidth"):
        lines.append(f"  {speed['share']:.0%} of this device's plain read and write speed")
    if again := report.get("resumed_tasks"):
        lines.append(f"  resumed: {again} of {report['tasks']} tasks were finished before")
    return "\n".join(lines + [f"  note: {note}" for note in report.get("notes", ())])


def _fit_told(report: Mapping[str, Any]) -> Iterator[str]:
    """What a program found before anything was written, how long it took, and what is kept."""
    fit = report.get("fitted", {})
    if "fit_seconds" in report:
        learned = f", {fit['trained']:,} numbers learned" if fit.get("trained") else ""
        yield f"  fitted in {duration(report['fit_seconds'])}{learned}"
    scores = dict(fit.get("agreement", ()))
    if scores:
        kept = fit["kept"]
        better = f"{scores[0]:.3f} at the start, {scores[kept]:.3f} in what is kept, step {kept}"
        same = f"{scores[0]:.3f} at the start, which is kept: no later state was better"
        yield f"  agreement with the experts: {better if kept else same}"
