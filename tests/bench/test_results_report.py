"""What a report says of results, and that it says it in every format."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.synthetic_results import QUALITY, TASKS, cell, results
from fusewright.bench.published import published, tables
from fusewright.bench.report import write_results
from fusewright.bench.report.files import to_csv, to_json, to_latex, to_markdown
from fusewright.bench.report.html import render
from fusewright.bench.report.marks import Axis, Point, axis, scatter
from fusewright.bench.report.summary import Section, Summary, summarise
from fusewright.errors import RecipeError
from fusewright.tasks.outcomes import Outcomes

pytest.importorskip("scipy")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(results(), resamples=400)


@pytest.fixture(scope="module")
def section(summary: Summary) -> Section:
    return summary.sections[0]


def test_the_own_expert_is_exactly_whole(section: Section) -> None:
    own = section.line("own expert")
    assert own and own.normalised
    assert (own.normalised.value, own.normalised.low, own.normalised.high) == (100, 100, 100)


def test_normalised_is_the_mean_over_tasks_of_ratios(section: Section) -> None:
    ties, own = section.line("ties"), section.line("own expert")
    assert ties and own and ties.normalised
    found = {c.seed: c for c in results().of("ties")}
    experts = {c.seed: c for c in results().of("own expert")}
    ratios = [found[s].outcomes[t]["clean"].value / experts[s].outcomes[t]["clean"].value
              for s in found for t in TASKS]  # fmt: skip
    assert ties.normalised.value == pytest.approx(100 * np.mean(ratios))
    assert ties.normalised.low < ties.normalised.value < ties.normalised.high


def test_the_worst_task_is_the_one_that_lost_most(section: Section) -> None:
    for line in section.lines:
        assert line.worst and line.worst[1] == min(line.shares.values())


def test_ranks_stay_inside_a_class_and_do_not_part_what_is_not_told_apart(section: Section) -> None:
    ranks = {line.row: line.rank for line in section.lines}
    assert ranks["ties"] == ranks["task_arithmetic"] == 1 and ranks["average"] == 3
    assert ranks["wemoe"] == ranks["ties, tuned"] == 1
    assert ranks["base"] is None and ranks["own expert"] is None
    ties = section.line("ties")
    assert ties and ties.level_with == ("task_arithmetic",)


def test_a_method_tuned_on_labels_is_ranked_apart(section: Section) -> None:
    classes = {kind: [line.row for line in lines] for kind, lines in section.classes().items()}
    assert classes["labelled"] == ["ties, tuned"] and "ties, tuned" not in classes["none"]


def test_every_row_is_compared_with_the_average_and_corrected(section: Section) -> None:
    assert section.baseline == "average"
    for line in section.lines:
        assert (line.versus is None) == (line.row == "average")
        if line.versus:
            assert line.versus.theirs == "average" and line.versus.adjusted >= line.versus.p


def test_seeds_are_shown_and_do_not_widen_intervals() -> None:
    one, three = (summarise(results({"ties": 0.7, "own expert": 0.9}, seeds=s), resamples=400)
                  for s in ((0,), (0, 0, 0)))  # fmt: skip
    a, b = one.sections[0].line("ties"), three.sections[0].line("ties")
    assert a and b and a.mean == b.mean and len(b.pools) == 3


def test_corruptions_and_unseen_tasks_are_apart_from_the_mean(section: Section) -> None:
    line = section.line("ties")
    assert line and line.mean and line.unseen
    assert set(line.corruptions) == {"clean", "contrast", "jpeg"}
    assert line.corruptions["clean"].value == pytest.approx(line.mean.value)
    assert line.corruptions["jpeg"].value < line.corruptions["contrast"].value < line.mean.value
    assert line.unseen.value == line.tasks["stl10"].value
    assert line.calibration is not None and 0 < line.calibration < 100


def test_subsets_have_a_place_of_their_own_draw_by_draw() -> None:
    more = [cell("ties", 0.8, s, experts=("mnist", t)) for s in (0, 1) for t in ("dtd", "eurosat")]
    found = summarise(results(more=more), resamples=100)
    (subset,) = found.subsets
    assert (subset.row, subset.merged, len(subset.pools)) == ("ties", 2, 4)
    assert all(pool.normalised is not None for pool in subset.pools)
    ties = found.sections[0].line("ties")
    assert ties and len(ties.pools) == 3


def test_tables_show_how_many_experts_were_merged() -> None:
    more = [cell("ties", 0.8, s, experts=("mnist", t)) for s in (0, 1) for t in ("dtd", "eurosat")]
    found = summarise(results(more=more), resamples=100)
    each = [pool.normalised for pool in found.subsets[0].pools]
    for text in (to_markdown(found), to_latex(found)):
        assert f"{sum(each) / 4:.1f} ({min(each):.1f} to {max(each):.1f}; 4)" in text
    plain = summarise(results(), resamples=100)
    assert "that were merged" not in to_markdown(plain)


def test_references_of_a_subset_do_not_touch_those_of_the_whole() -> None:
    chosen = ("mnist", "dtd")
    more = [cell(row, rate, 0, experts=chosen) for row, rate in QUALITY.items()]
    more = [replace(c, outcomes={t: c.outcomes[t] for t in chosen}) for c in more]
    plain, mixed = (summarise(results(more=m), resamples=100) for m in ((), more))
    assert mixed.sections == plain.sections
    assert {subset.row for subset in mixed.subsets} == set(QUALITY) - {"own expert"}


def test_each_setting_of_the_axes_is_a_section() -> None:
    cells = [cell(row, rate, axes={"size": size}) for size in ("small", "large")
             for row, rate in QUALITY.items()]  # fmt: skip
    found = summarise(results({}, more=cells), resamples=100)
    assert [dict(s.axes) for s in found.sections] == [{"size": "small"}, {"size": "large"}]
    assert all(line.normalised for s in found.sections for line in s.lines)


def test_without_experts_nothing_is_normalised_and_nothing_fails(tmp_path: Path) -> None:
    found = results({"ties": 0.7, "average": 0.6})
    line = summarise(found, resamples=100).sections[0].line("ties")
    assert line and line.normalised is None and line.mean and line.rank == 1
    write_results(found, tmp_path)
    assert "nothing is normalised" in (tmp_path / "report.html").read_text("utf-8")


def test_language_models_show_perplexity(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(-2, 0.3, 60)
    cells = [
        replace(cell(row, 0.5), outcomes={
            "mnist": {"clean": Outcomes("log_likelihood", scores + shift, np.ones(60))}})
        for row, shift in (("own expert", 0.5), ("ties", 0.0), ("average", -0.5))
    ]  # fmt: skip
    found = results({}, more=cells, merged=("mnist",), unseen=())
    line = summarise(found, resamples=200).sections[0].line("ties")
    assert line and line.mean and line.normalised
    assert line.mean.value == pytest.approx(np.exp(-scores.mean()))
    assert line.mean.low < line.mean.value < line.mean.high
    assert line.normalised.value == pytest.approx(100 * np.exp(-0.5))
    write_results(found, tmp_path)
    assert "perplexity" in (tmp_path / "report.html").read_text("utf-8")


def test_everything_is_written_and_agrees(tmp_path: Path) -> None:
    paths = write_results(results(), tmp_path, against="published")
    assert [path.name for path in paths] == [f"report.{kind}" for kind in
                                             ("html", "md", "csv", "tex", "json")]  # fmt: skip
    told = json.loads((tmp_path / "report.json").read_text("utf-8"))
    rows = {row["row"]: row for row in told["sections"][0]["rows"]}
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO(
        (tmp_path / "report.csv").read_text("utf-8")))}  # fmt: skip
    for row, line in lines.items():
        assert float(line["normalised"]) == rows[row]["normalised"]["value"]
        shown = f"{rows[row]['normalised']['value']:.1f}"
        assert all(shown in path.read_text("utf-8") for path in paths
                   if path.suffix in (".html", ".md", ".tex"))  # fmt: skip


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = (write_results(results(), tmp_path)[0]).read_text("utf-8")
    assert not re.search(r"(src|href)=|@import|url\(", page)
    assert "fusewright bench toy" in page and page.count("<table") == page.count("</table>")


def test_results_write_their_own_page(tmp_path: Path) -> None:
    path = results({"ties": 0.7, "own expert": 0.9}).to_html(tmp_path / "one.html")
    assert "ties" in path.read_text("utf-8") and list(tmp_path.iterdir()) == [path]


def test_what_a_sweep_says_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    made = results({"base": 0.4, evil: 0.7, "own expert": 0.9}, facts={"command": evil, "x": evil})
    page = (write_results(replace(made, title=evil), tmp_path)[0]).read_text("utf-8")
    assert evil not in page


def test_corruptions_are_a_table_of_their_own(summary: Summary) -> None:
    for text in (to_markdown(summary), to_latex(summary)):
        main, corrupted = text.split("inputs corrupted")
        assert "jpeg" in corrupted and "jpeg" not in main and "own expert" in corrupted
    clean = results({}, more=[cell("base", 0.4, corrupted=False)])
    assert "corrupted" not in to_markdown(summarise(clean, resamples=100))


def test_published_numbers_are_visibly_not_ours(summary: Summary) -> None:
    table = published("published", "toy")
    assert not table.same
    text = to_markdown(summary, table)
    assert "Not ours" in text and table.source in text and "only the order" in text
    assert "published" not in to_markdown(summary) and "published" not in to_csv(summary)


@pytest.mark.parametrize("name", tables())
def test_published_tables_name_their_source_and_are_whole(name: str) -> None:
    table = published(name, "clip-vit-b32")
    assert table.source and table.models and "own expert" in table.rows
    for row, found in table.rows.items():
        assert not isinstance(found, tuple) or len(found) == len(table.tasks), row
        mean = table.of(row)
        assert mean is not None and 0 < mean < 100


def test_a_suite_of_the_literature_meets_its_own_table() -> None:
    table = published("published", "clip-vit-l14")
    assert table.same and table.name == "clip-vit-l14-fusionbench"
    assert table.normalised("own expert") == pytest.approx(100)
    assert table.of("ties, tuned") == table.of("ties") and table.of("nothing") is None


def test_an_unknown_table_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="clip-vit-b32-fusionbench"):
        published("clip-vit-b32-fusionbenhc", "toy")


def test_sizes_are_in_the_costs_of_every_format() -> None:
    sizes = {"trained": 7168.0, "stored": 547.97e6, "active": 120e6, "bytes": 2.19e9}
    more = [cell("smile", 0.88, requirement="routed", costs=sizes)]
    found = summarise(results(more=more, seeds=[0]), resamples=20)
    (line,) = [one for one in to_markdown(found).splitlines()
               if one.startswith("| smile") and "548" in one]  # fmt: skip
    assert [text.strip() for text in line.split("|")[3:7]] == ["7,168", "548", "120", "2,190"]
    (row,) = [r for r in csv.DictReader(io.StringIO(to_csv(found))) if r["row"] == "smile"]
    assert float(row["stored"]) == sizes["stored"] and float(row["trained"]) == 7168
    assert to_json(found)["sections"][0]["rows"][-1]["costs"] == sizes
    page = render(found)
    assert "7,168" in page and "active, M" in page
    assert "7,168" in to_latex(found)


def test_latex_escapes_names_and_closes_what_it_opens(summary: Summary) -> None:
    text = to_latex(summary)
    assert "task\\_arithmetic" in text and "task_arithmetic" not in text
    tables = text.split("\\begin{tabular}")[1:]
    assert len(tables) == text.count("\\end{tabular}") == 3
    for table in tables:
        rows = [line for line in table.splitlines()
                if line.endswith("\\\\") and "multicolumn" not in line]  # fmt: skip
        assert len({line.count("&") for line in rows}) == 1


def test_labels_of_a_scatter_do_not_overlap() -> None:
    points = [Point(f"method_{i}", 1 + i % 3 * 0.01, 50 + i // 3 * 0.5, "#000") for i in range(12)]
    points += [Point("edge", 5.0, 60.0, "#000")]
    drawn = scatter(points, "x", "y")
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)" fill="#000">(\w+)<',
                        drawn)  # fmt: skip
    boxes = []
    for x, y, anchor, name in labels:
        wide = 7.0 * len(name)
        start = float(x) - {"start": 0, "end": wide, "middle": wide / 2}[anchor]
        boxes.append((start, float(y) - 11, start + wide, float(y) + 3))
    assert len(boxes) > 3
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= 760
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
                       for b in boxes[:i])  # fmt: skip


def test_axes_hold_their_values_and_have_round_ticks() -> None:
    plain, log = axis([61.3, 98.2], 100), axis([0.02, 40], 100, log=True)
    assert all(0 <= plain(v) <= 100 for v in (61.3, 98.2)) and 3 <= len(plain.ticks()) <= 9
    assert all(0 <= log(v) <= 100 for v in (0.02, 40)) and {0.1, 1.0, 10.0} <= set(log.ticks())
    assert axis([5.0], 10)(5.0) == pytest.approx(5) and Axis(0, 1, 100).ticks()[-1] <= 1


def test_what_was_tuned_on_each_pool_is_said_of_each() -> None:
    cells = [cell("ties, tuned", 0.8, seed, note=f"scale = {scale}", method={"ties": scale})
             for seed, scale in ((0, 1), (1, 2))]  # fmt: skip
    rest = {row: rate for row, rate in QUALITY.items() if row != "ties, tuned"}
    found = summarise(results(rest, seeds=(0, 1), more=cells), resamples=20)
    line = found.sections[0].line("ties, tuned")
    assert line is not None and line.note == "seed 0: scale = 1; seed 1: scale = 2"
    assert line.method == {"seed 0": {"ties": 1}, "seed 1": {"ties": 2}}
    assert found.sections[0].line("ties").method == "ties"  # type: ignore[union-attr]


@pytest.mark.parametrize("metric", ["accuracy", "log_likelihood"])
def test_forgetting_is_above_the_base_where_smaller_is_better(metric: str) -> None:
    unseen = results().unseen
    cells = [
        replace(one, outcomes={**one.outcomes, **{task: {"clean": replace(
            one.outcomes[task]["clean"], metric=metric)} for task in unseen}})
        for one in results().cells
    ]  # fmt: skip
    page = render(summarise(replace(results(), cells=tuple(cells)), resamples=20))
    log = metric == "log_likelihood"
    assert f"What lies {'above' if log else 'below'} <b>base</b> forgot" in page
    assert ("unseen tasks: mean perplexity, smaller is better" in page) == log
