"""What stands for the code of a method: a module's source; in a notebook, what was compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest

from fusewright.bench.sweep.identity import code_digest, files_digest

CELL = """
FACTOR = 2
WORDS = {}

def times(x):
    return FACTOR * x if x not in {"a", "b", "c"} else x

class Method:
    least = 0
    def merge(self, x):
        return max(times(x), self.least)
    @property
    def both(self):
        return [self.merge(i) for i in (1, 2)]
"""


def notebook(code, monkeypatch):
    """The class of a cell that was run in a module without a file."""
    module = ModuleType("a_notebook")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(code, module.__dict__)
    return code_digest([module.Method])


def test_a_method_of_a_notebook_is_another_when_its_code_is(monkeypatch):
    first = notebook(CELL, monkeypatch)
    assert notebook("\n# moved, with a remark\nelse_where = 3" + CELL, monkeypatch) == first
    for old, new in (("max(", "min("), ("FACTOR * x", "FACTOR + x"), ("= 2", "= 3"),
                     ("least = 0", "least = 1"), ("(1, 2)", "(1, 3)"), ('"b"', '"d"')):  # fmt: skip
        assert notebook(CELL.replace(old, new), monkeypatch) != first


def test_the_same_code_is_the_same_in_another_process():
    code = (
        "from types import ModuleType; import sys; from fusewright.bench.sweep import identity\n"
        "module = sys.modules['a_notebook'] = ModuleType('a_notebook')\n"
        f"exec({CELL!r}, module.__dict__)\nprint(identity.code_digest([module.Method]))"
    )

    def said(seed):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run([sys.executable, "-c", code], env=env, text=True,
                              capture_output=True, check=True).stdout  # fmt: skip

    assert said("1") == said("2") != ""


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "chat_template.jinja"])
def test_a_tokenizer_is_part_of_a_model(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("one")
    (tmp_path / name).write_text("a b")
    first = files_digest(tmp_path)
    (tmp_path / "README.md").write_text("another")
    assert files_digest(tmp_path) == first
    (tmp_path / name).write_text("b a c")
    assert files_digest(tmp_path) != first
