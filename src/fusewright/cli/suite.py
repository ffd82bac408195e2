"""``fusewright suite list|show|gather|build|check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusewright.cli._print import print_json, print_tables
from fusewright.cli._shared import Json, add, devices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fusewright.bench.gathering.check import Gathered
    from fusewright.bench.suite import Suite
    from fusewright.engine.tables import Table


def register(app: typer.Typer) -> None:
    """Add ``suite`` and its commands."""
    group = typer.Typer(no_args_is_help=True, help="Suites: models and tasks to measure with.")
    add(group, list_, "fusewright suite list", name="list")
    add(group, show, "fusewright suite show digits")
    add(group, gather, "fusewright suite gather vision-mini --from sources/ -o data/",
        "fusewright suite gather vision-mini --from mnist=ylecun/mnist -o data/",
        "fusewright suite gather vision-mini -o data/ --check")  # fmt: skip
    add(group, build, "fusewright suite build digits --seeds 3",
        "fusewright suite build vision-mini --data data/ --pool pools/vision-mini",
        "fusewright suite build vision-mini --data data/ --variant lora")  # fmt: skip
    add(group, check, "fusewright suite check digits")
    app.add_typer(group, name="suite")


def suite_names(incomplete: str) -> list[str]:
    """Names of suites that begin so: for the shell's completion."""
    from fusewright.bench.suite_file import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


Name = Annotated[
    str, typer.Argument(help="A suite's name, or its YAML file.", autocompletion=suite_names)
]
Pool = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="The folder of the suite's models (in the user's cache)."),
]
Data = Annotated[
    Path | None,
    typer.Option(file_okay=False, envvar="FUSEWRIGHT_DATA", help="The folder of data sets."),
]
Seeds = Annotated[
    int, typer.Option(min=1, metavar="K", help="How many of the pool's trainings, from the first.")
]
Device = Annotated[
    str, typer.Option(help="Where models are trained and asked.", autocompletion=devices)
]
Variant = Annotated[
    str | None, typer.Option(metavar="NAME", help="One of the suite's other kinds of models.")
]


def list_(json: Json = False) -> None:
    """List the suites that come with fusewright."""
    from fusewright.bench.suite_file import read_suite, shipped
    from fusewright.engine.tables import Table

    found = {name: read_suite(path) for name, path in shipped().items()}
    if json:
        print_json({name: {"title": s.title, "merged": s.merged, "unseen": s.unseen,
                           "trained here": s.is_trained}
                    for name, s in found.items()})  # fmt: skip
        return
    rows = tuple(
        (name, s.title, len(s.merged), len(s.unseen),
         "trained on your machine" if s.is_trained else "public checkpoints")
        for name, s in found.items()
    )  # fmt: skip
    print_tables([Table("Suites", ("suite", "", "merged", "unseen", "models"), rows)])


def show(name: Name, pool: Pool = None, data: Data = None, json: Json = False) -> None:
    """Show a suite: its tasks, models and licences, and whether its models are there."""
    from fusewright.bench.suite import suite

    found = suite(name, pool=pool, data=data)
    if json:
        print_json({"name": found.name, "digest": found.spec.digest(), "pool": str(found.pool),
                    **found.spec.model_dump()})  # fmt: skip
        return
    print(f"{found.spec.title}\n\n{found.spec.about.strip()}\n")
    print_tables([_tasks(found), _facts(found)])


def _tasks(suite: Suite) -> Table:
    from fusewright.engine.tables import Table

    spec = suite.spec
    rows = tuple(
        (task, said.question, "merged" if task in spec.merged else "unseen",
         said.data or said.hub or said.kind, said.licence)
        for task, said in spec.tasks.items()
    )  # fmt: skip
    return Table("Tasks", ("task", "question", "", "data", "licence"), rows)


def _facts(suite: Suite) -> Table:
    from fusewright.engine.tables import Table

    spec = suite.spec
    built = [seed for seed in spec.seeds if suite.at(seed).root.is_dir()]
    models = "public checkpoints" if not spec.is_trained else (
        f"{suite.pool}; trained: {', '.join(map(str, built)) or 'none'}"
        f" of seeds {', '.join(map(str, spec.seeds))}"
    )  # fmt: skip
    rows = (("models", models), ("opened as", f"{spec.opens.library}.{spec.opens.model}"),
            ("data", _data(suite)),
            ("variants", ", ".join(spec.variants) or "none"),
            ("licence", spec.licence), ("digest", spec.digest()))  # fmt: skip
    return Table("", ("", " "), rows)


def _data(suite: Suite) -> str:
    """Where rows come from."""
    tasks = suite.spec.tasks.values()
    if suite.data is not None:
        return str(suite.data)
    if any(task.hub for task in tasks):
        return "the Hugging Face Hub"
    return "not given: --data DIR" if any(task.data for task in tasks) else "none to be given"


def gather(
    name: Name,
    out: Annotated[Path, typer.Option("-o", "--out", file_okay=False, help="The data folder.")],
    sources: Annotated[list[str] | None, typer.Option(
        "--from", metavar="WHERE", help="A folder with one for each data set, by name; or "
        "NAME=FOLDER; or NAME=org/name of the Hub. May be repeated.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only look whether -o has them.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Make a suite's data folder from public copies: exactly the rows our numbers are of.

    The rows are published as hashes of pictures, with their labels and sources; pictures are not
    shipped. Copies may be parquet files, idx files, images in folders named by class, also zipped;
    a data set without a source is fetched from the Hub where it is there. What is complete stays;
    the exit code is 1 where rows are missing or differ.
    """
    from fusewright.bench.gathering.check import check as compare
    from fusewright.bench.gathering.gather import gather as make
    from fusewright.bench.suite_file import find_suite, read_suite

    spec = read_suite(find_suite(name))
    shown = not json
    found = compare(spec, out, shown) if check else make(spec, sources or (), out, shown)
    _print_gathered(found, json)
    if any(one.problem for one in found):
        raise typer.Exit(1)


def _print_gathered(found: Sequence[Gathered], json: bool) -> None:
    from fusewright.cli._errors import error_object, report
    from fusewright.engine.tables import Table

    if json:
        print_json([{"data": one.name, "rows": one.rows, "found": one.found, "read": one.read,
                     "error": one.problem and error_object(one.problem)}
                    for one in found])  # fmt: skip
        return
    for one in found:
        if one.problem is not None:
            report(one.problem, as_json=False)
    rows = tuple((one.name, one.rows, one.found, one.said) for one in found)
    print_tables([Table("Data", ("data set", "rows", "found", ""), rows)])


def build(
    name: Name, pool: Pool = None, data: Data = None, seeds: Seeds = 1, variant: Variant = None,
    device: Device = "cpu", json: Json = False,
) -> None:  # fmt: skip
    """Train a suite's models: a base, experts and heads.

    What is trained already stays; a build that was killed goes on where it was. With --variant,
    the experts are that variant's, in the same pool.
    """
    from fusewright.bench.suite import suite

    first = suite(name, pool=pool, data=data, variant=variant, device=device)
    built = []
    for seed in first.seeds(seeds):
        one = first.at(seed, variant)
        one.build(progress=not json)
        one.check()
        built.append(str(one.root))
    if json:
        print_json({"pool": str(first.pool), "built": built})
    else:
        print("\n".join(built))


def check(
    name: Name, pool: Pool = None, data: Data = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each split, at most.")] = None,
    variant: Variant = None, device: Device = "cpu", json: Json = False,
) -> None:  # fmt: skip
    """Measure a suite's regime: whether it can tell methods apart.

    The gap between base and experts, cosines and norms of task vectors, the barrier between base
    and experts, what averaging gains, and whether low entropy means low loss. The exit code is 1
    where the suite's numbers would say little.
    """
    from dataclasses import asdict

    from fusewright.bench.gathering.check import matches
    from fusewright.bench.regime import check_suite
    from fusewright.bench.suite import suite

    found = suite(name, pool=pool, data=data, variant=variant, device=device)
    found.check()
    regime = check_suite(found, limit=limit, progress=not json)
    rows = matches(found.spec, found.data)
    if json:
        cosines = [{"a": a, "b": b, "cosine": c} for (a, b), c in regime.cosines.items()]
        print_json({**asdict(regime), "cosines": cosines, "doubts": regime.doubts(),
                    **({"data": rows} if rows else {})})  # fmt: skip
    else:
        print(regime.table())
        if rows:
            print(f"\nThe data are {rows}.")
    if regime.doubts():
        raise typer.Exit(1)
