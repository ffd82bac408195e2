"""``fusewright merge``: what it hands to the engine, what it prints, how it leaves."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fusewright.engine as engine
from fusewright.engine import Merged, Options, Progress
from fusewright.errors import NumericError


def test_a_recipe_becomes_a_folder(run: Any, models: Path) -> None:
    result = run("merge", models / "recipe.yaml", "-o", models / "out")
    assert result.exit_code == 0, result.output
    assert "out: complete" in result.stdout and "read" in result.stdout
    base = load_file(models / "base/model.safetensors")
    for name, merged in load_file(models / "out/model.safetensors").items():
        assert np.allclose(merged, base[name] + 0.03, atol=1e-6)


def test_json_is_one_object(run: Any, models: Path) -> None:
    result = run("merge", models / "recipe.yaml", "-o", models / "out", "--json")
    report = json.loads(result.stdout)
    assert report["out"] == str(models / "out") and report["bytes_written"] > 0
    assert result.stderr == ""


def test_quiet_prints_nothing(run: Any, models: Path) -> None:
    result = run("merge", models / "recipe.yaml", "-o", models / "out", "--quiet")
    assert result.exit_code == 0 and result.output == ""


def test_plan_writes_nothing_and_needs_no_output(run: Any, models: Path) -> None:
    before = sorted(models.iterdir())
    text = run("merge", models / "recipe.yaml", "--plan")
    assert text.exit_code == 0 and "Parameters" in text.stdout and "Costs" in text.stdout
    decided = json.loads(run("merge", models / "recipe.yaml", "--plan", "--json").stdout)
    assert decided["costs"]["bytes_written"] == 2 * 8 * 8 * 4
    assert sorted(models.iterdir()) == before


def test_no_output_is_a_usage_error(run: Any, models: Path) -> None:
    result = run("merge", models / "recipe.yaml")
    assert result.exit_code == 2 and "--out" in result.stderr


def test_every_option_reaches_the_engine(
    run: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def record(recipe: Any, out: Path, options: Options, progress: Any) -> Merged:
        seen.update(recipe=recipe, out=out, options=options)
        return Merged(out, {"bytes_read": 0, "bytes_written": 0, "seconds": 1.0, "threads": 3}, {})

    monkeypatch.setattr(engine, "run", record, raising=False)
    words = (
        "--threads 3 --memory 2GiB --device cuda --seed 7 --dtype float32 --out-dtype bfloat16 "
        "--shard-size 1GB --untie --allow-nonfinite --allow-overflow --copy-code --no-fsync "
        "--overwrite --set parameters.scale=0.5 --set experts.a.weight=2"
    )
    result = run("merge", models / "recipe.yaml", "-o", "somewhere", *words.split())
    assert result.exit_code == 0, result.output
    assert seen["options"] == Options(
        threads=3, memory=2 * 2**30, device="cuda", overwrite=True, shard_size=10**9, untie=True,
        allow_nonfinite=True, allow_overflow=True, copy_code=True, durable=False,
    )  # fmt: skip
    recipe = seen["recipe"]
    assert (recipe.dtype, recipe.out_dtype, recipe.seed) == ("float32", "bfloat16", 7)
    assert recipe.parameters == {"scale": 0.5} and recipe.experts["a"].params == {"weight": 2}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--set", "method=tiess"], 2, "did you mean 'ties'"),
        (["--set", "parameters.scael=1"], 2, "did you mean 'scale'"),
        (["--set", "base=/nowhere"], 3, "/nowhere"),
        (["--memory", "much"], 2, "much"),
    ],
)
def test_a_refusal_is_text_on_stderr_and_an_exit_code(
    run: Any, models: Path, words: list[str], code: int, said: str
) -> None:
    result = run("merge", models / "recipe.yaml", "-o", models / "out", *words)
    assert result.exit_code == code
    assert result.stderr.startswith("error: ") and said in result.stderr
    assert result.stdout == "" and not (models / "out").exists()


def test_with_json_a_refusal_is_an_object_on_stdout(run: Any, models: Path) -> None:
    result = run(
        "merge", models / "recipe.yaml", "-o", models / "out", "--json", "--set", "method=tiess"
    )
    told = json.loads(result.stdout)["error"]
    assert result.exit_code == told["exit_code"] == 2 and result.stderr == ""
    assert told["kind"] == "RecipeError" and "ties" in told["fix"]


def test_an_existing_output_is_refused_then_overwritten(run: Any, models: Path) -> None:
    merge = ("merge", models / "recipe.yaml", "-o", models / "out")
    assert run(*merge).exit_code == 0
    assert run(*merge).exit_code == 5
    assert run(*merge, "--overwrite").exit_code == 0


def test_an_unexpected_error_keeps_its_traceback(
    run: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(engine, "run", fail, raising=False)
    result = run("merge", models / "recipe.yaml", "-o", models / "out")
    assert result.exit_code == 1 and isinstance(result.exception, ZeroDivisionError)


def test_numeric_errors_have_their_exit_code(
    run: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NumericError("3 values are NaN", where="layers.0")

    monkeypatch.setattr(engine, "run", fail, raising=False)
    assert run("merge", models / "recipe.yaml", "-o", models / "out").exit_code == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_says_what_is_kept_and_the_same_command_goes_on(
    run: Any,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    number: int,
    code: int,
) -> None:
    # A shell that starts tests in the background has SIGINT ignored; then nothing is interrupted.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, ignored))
    handler = signal.getsignal(signal.SIGTERM)
    real = engine.run

    def interrupted(recipe: Any, out: Path, options: Options, progress: Any) -> Merged:
        def stop(now: Progress) -> None:
            if now.done >= now.total:
                os.kill(os.getpid(), number)
                time.sleep(0.5)  # the main thread hears of it while this unit is under way

        return real(recipe, out, options, stop)

    monkeypatch.setattr(engine, "run", interrupted, raising=False)
    merge = ("merge", models / "recipe.yaml", "-o", models / "out")
    result = run(*merge, "--threads", 1)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("interrupted:") and not (models / "out").exists()
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.setattr(engine, "run", real, raising=False)
    assert run(*merge).exit_code == 0
