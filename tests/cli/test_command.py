"""The command as a whole: help, completion, versions, colours, and what it costs to start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fusewright
from fusewright.errors import FusewrightWarning

COMMANDS = (
    "merge", "inspect", "check", "verify", "methods", "demo", "schema", "bench", "compare",
    "finetune",
)  # fmt: skip
HEAVY = ("torch", "numpy", "pydantic", "transformers", "yaml", "numba")


def python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_and_json(run: Any, command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"$ fusewright {command}" in result.stdout and "--json" in result.stdout


def test_help_names_every_command(run: Any) -> None:
    shown = run("--help").stdout
    assert all(f" {command} " in shown for command in COMMANDS)


def test_a_mistyped_command_is_answered_with_the_nearest(run: Any) -> None:
    result = run("merg")
    assert result.exit_code == 2 and "merge" in result.stderr


def test_version(run: Any) -> None:
    assert run("--version").stdout.strip() == f"fusewright {fusewright.__version__}"


@pytest.mark.parametrize("code", ["import fusewright", "import fusewright.cli.app"])
def test_importing_costs_nothing_heavy(code: str) -> None:
    heavy = f"[name for name in {HEAVY!r} if name in sys.modules]"
    assert python(f"import sys; {code}; print({heavy})").strip() == "[]"


def test_names_of_methods_complete(tmp_path: Path) -> None:
    shown = python(
        "from fusewright.cli import main; main()",
        _FUSEWRIGHT_COMPLETE="complete_bash", COMP_WORDS="fusewright methods ti", COMP_CWORD="2",
    )  # fmt: skip
    assert shown.split() == ["ties"]


def test_no_colour_when_not_a_terminal() -> None:
    code = "from fusewright.cli import main; import sys; sys.argv[1:] = ['methods', 'tie']; main()"
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "GITHUB_ACTIONS")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error:") and "\x1b" not in done.stderr


def test_warnings_are_sentences(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from fusewright import engine

    def warn(*_: object, **__: object) -> Any:
        warnings.warn("an expert is a stranger", FusewrightWarning, stacklevel=1)
        raise fusewright.FusewrightError("stop")

    monkeypatch.setattr(engine, "inspect_models", warn, raising=False)
    result = run("inspect", "anything")
    assert result.stderr.splitlines() == ["warning: an expert is a stranger", "error: stop"]
