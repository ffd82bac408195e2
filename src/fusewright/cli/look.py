"""``inspect``, ``check`` and ``verify``: looking at models before and after a merge."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fusewright.cli._print import print_json, print_tables, size
from fusewright.cli._progress import shown
from fusewright.cli._shared import Folder, Json, Memory, Models, Threads, add, devices
from fusewright.cli.suite import Data, Pool, suite_names
from fusewright.errors import RecipeError


def register(app: typer.Typer) -> None:
    """Add the commands that look at models and change nothing."""
    add(
        app,
        inspect,
        "fusewright inspect base/",
        "fusewright inspect base/ math/ code/ --png differences.png",
        "fusewright inspect base/ math/ --json > math.json",
        "fusewright inspect base/ math/ code/ --subspace",
        "fusewright inspect --backdoor merged/ --suite vision-mini --data data/",
    )
    add(
        app,
        check,
        "fusewright check base/ math/ code/",
        "fusewright check org/base lora-adapter/ --json",
    )
    add(app, verify, "fusewright verify merged/", "fusewright verify merged/ --json")


def inspect(
    models: Models,
    png: Annotated[Path | None, typer.Option(help="Draw it, too.", dir_okay=False)] = None,
    subspace: Annotated[
        bool,
        typer.Option("--subspace", help="Also say in which singular directions of the base's "
                     "matrices the task vectors lie."),
    ] = False,
    backdoor: Annotated[
        bool,
        typer.Option("--backdoor", help="Search each model for classes that one small change of "
                     "all pictures leads to; needs --suite."),
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(help="Whose pictures and heads the search uses.", autocompletion=suite_names),
    ] = None,
    pool: Pool = None,
    data: Data = None,
    limit: Annotated[int, typer.Option(min=2, help="Pictures of each task for the search.")] = 256,
    device: Annotated[
        str, typer.Option(help="Where the search runs.", autocompletion=devices)
    ] = "cpu",
    threads: Threads = None,
    memory: Memory = "1GiB",
    json: Json = False,
) -> None:
    """Show the tensors of a model, or how others differ from it.

    Of two models or more, the first is the base; shown are norms of task vectors, cosines and sign
    conflicts, over the model, by layer, and norms by kind of module.

    With --subspace, also the share of each task vector's energy in the leading directions of the
    base's matrices (those that hold half of the sum of singular values), in the lesser ones, in
    their null space, and across, each beside the share that a random matrix would have there.

    With --backdoor, each model is searched on unlabelled pictures of a suite's tasks, with the
    suite's heads: a class that is much easier to lead to than others is a reason to look closer. It
    is an estimate, and never shows that a model is clean.
    """
    if backdoor or suite is not None:
        if subspace:
            raise RecipeError("these are two searches", found="--subspace with --backdoor",
                              fix="run the command twice")  # fmt: skip
        _look(models, backdoor, suite, pool, data, device, limit, threads, json)
        return
    from fusewright.engine import Options, inspect_models, parse_size

    workers = Options(threads=threads).workers
    with shown(json) as progress:
        found = inspect_models(
            models, subspace=subspace, threads=workers, memory=parse_size(memory),
            progress=progress,
        )  # fmt: skip
    if png is not None:
        found.save_png(png)
    _show(found, json)


def _look(
    models: list[str], backdoor: bool, suite: str | None, pool: Path | None, data: Path | None,
    device: str, limit: int, threads: int | None, json: bool,
) -> None:  # fmt: skip
    if not backdoor or suite is None:
        raise RecipeError(
            "a search for backdoors takes --backdoor and --suite together", found=(
                "--backdoor alone" if backdoor else "--suite alone"
            ), fix="fusewright inspect --backdoor MODEL --suite NAME --data DIR",
        )  # fmt: skip
    from fusewright.bench.backdoors.looking import look
    from fusewright.bench.digits.model import threads as using
    from fusewright.bench.suite import suite as open_suite
    from fusewright.engine import Options
    from fusewright.weights.open import found_path

    opened = open_suite(suite, pool=pool, data=data, device=device)
    paths = {model: found_path(model) for model in models}  # all, before the first long search
    tell = None if json else lambda task: print(f"searching {task}", file=sys.stderr)
    with using(Options(threads=threads).workers):
        found = {model: look(opened, path, limit=limit, progress=tell)
                 for model, path in paths.items()}  # fmt: skip
    if json:
        print_json({model: one.to_json() for model, one in found.items()})
        return
    for model, one in found.items():
        print(model)
        print_tables(one.tables())


def check(
    base: Annotated[str, typer.Argument(help="The model that the experts come from.")],
    experts: Models,
    full: Annotated[bool, typer.Option(help="Read everything, not a sample.")] = False,
    threads: Threads = None,
    memory: Memory = "1GiB",
    json: Json = False,
) -> None:
    """Say whether models will merge, and whether they should.

    Looks at shapes, dtypes, vocabularies, configuration, descent from the base, and licences.
    Exit code 1 if they will not merge.
    """
    from fusewright.engine import Options, check_models, parse_size

    workers = Options(threads=threads).workers
    with shown(json) as progress:
        found = check_models(
            base, experts, full=full, threads=workers, memory=parse_size(memory),
            progress=progress,
        )  # fmt: skip
    _show(found, json)
    raise typer.Exit(0 if found.ok else 1)


def verify(folder: Folder, threads: Threads = None, json: Json = False) -> None:
    """Hash an output again and compare it with its manifest.

    Exit code 1 if anything differs.
    """
    from fusewright.engine import Options
    from fusewright.engine import verify as verify_output
    from fusewright.engine.progress import Progress

    with shown(json) as progress:

        def heard(name: str, done: int, total: int) -> None:
            if progress is not None:
                progress(Progress(done, total, "verify", name))

        found = verify_output(folder, Options(threads=threads).workers, heard)
    differences = {
        kind: list(getattr(found, kind)) for kind in ("missing", "changed", "extra", "tensors")
    }
    if json:
        digest = {"expected": found.expected_digest, "found": found.content_digest}
        print_json({"ok": found.ok, "bytes": found.bytes, "content_digest": digest, **differences})
    elif found.ok:
        print(f"{folder}: intact ({size(found.bytes)}, content {found.content_digest})")
    else:
        print(f"{folder}: not as it was published")
        for kind, names in differences.items():
            print("\n".join(f"  {kind}: {name}" for name in names), end="\n" if names else "")
    raise typer.Exit(0 if found.ok else 1)


def _show(found: Any, as_json: bool) -> None:
    if as_json:
        print_json(found.to_json())
    else:
        print_tables(found.tables())
