"""Mutation testing by sample: change one operator of the core at a time, and see whether its tests
notice.

    python tools/mutants.py [--count 200] [--seed 0] [--only methods/order] [--json FILE]

Every mutant is one comparison, arithmetic operator, constant, condition or return value, changed in
a copy of the package; the tests of its room run until the first failure, in a forked process that
has the heavy libraries already. A mutant that no test notices, or that is never run, has survived.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "fusewright"
TIMEOUT = 240

_METHODS = (
    "methods/test_pipeline.py methods/test_order.py methods/test_sampled_bins.py "
    "methods/test_static.py methods/test_defaults.py methods/test_frozen.py"
)
_ENGINE = "engine/test_units.py engine/test_plan.py engine/test_run.py engine/test_bad_input.py"
_RECIPES = "methods/test_frozen.py engine/test_recipe.py engine/test_bad_input.py"
_FILES = "weights/test_staging.py weights/test_faults.py"

CORE = {
    "methods/order": "methods/test_order.py methods/test_sampled_bins.py",
    "methods/partials": _METHODS,
    "methods/random": "methods/test_random.py methods/test_frozen.py",
    "methods/settings": f"{_METHODS} engine/test_recipe.py",
    "methods/pipeline": f"{_METHODS} engine/test_recipe.py",
    "methods/door": _METHODS,
    "methods/static/": f"{_METHODS} methods/test_golden.py",
    "engine/codec": "engine/test_numerics.py",
    "engine/recipe": _RECIPES,
    "engine/options": f"{_RECIPES} engine/test_plan.py",
    "engine/jobs": f"methods/test_frozen.py {_ENGINE} engine/test_numerics.py",
    "engine/planner": f"methods/test_frozen.py {_ENGINE} engine/test_doors.py",
    "engine/schedule": f"{_ENGINE} engine/test_resume.py",
    "engine/work": f"{_ENGINE} engine/test_numerics.py engine/test_read_digests.py",
    "weights/journal": _FILES,
    "weights/digest": _FILES,
    "weights/shards": _FILES,
    "weights/staging": f"{_FILES} engine/test_resume.py",
    "weights/safetensors_header": "weights/test_read_safetensors.py methods/test_frozen.py",
}
"""Modules of the core (from the package's folder; a folder ends in /), and the tests of each."""

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or,
    ast.Or: ast.And, ast.Pow: ast.Mult,
}  # fmt: skip


class _Mutator(ast.NodeTransformer):
    """Applies the mutation of number ``wanted``; counts them all if that is negative."""

    def __init__(self, wanted: int = -1) -> None:
        self.wanted, self.count, self.what, self.line = wanted, 0, "", 0

    def _hit(self, node: ast.AST, what: str) -> bool:
        self.count += 1
        if self.count - 1 != self.wanted:
            return False
        self.what, self.line = what, getattr(node, "lineno", 0)
        return True

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        for i, op in enumerate(node.ops):
            if type(op) in SWAPS and self._hit(node, type(op).__name__):
                node.ops[i] = SWAPS[type(op)]()
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if type(node.op) in SWAPS and self._hit(node, type(node.op).__name__):
            node.op = SWAPS[type(node.op)]()
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        if self._hit(node, type(node.op).__name__):
            node.op = SWAPS[type(node.op)]()
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not | ast.USub) and self._hit(node, type(node.op).__name__):
            return node.operand
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            return ast.Constant(not node.value) if self._hit(node, "bool") else node
        if isinstance(node.value, int | float):
            return ast.Constant(node.value + 1) if self._hit(node, "number") else node
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is not None and not _is_none(node.value) and self._hit(node, "return"):
            node.value = ast.Constant(None)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        if self._hit(node, "if"):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:  # types are not run
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body = [self.visit(statement) for statement in node.body]
        return node


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def files(only: str) -> Iterator[tuple[Path, str]]:
    """Modules of the core with their tests."""
    for name, tests in CORE.items():
        if only and not name.startswith(only):
            continue
        if name.endswith("/"):
            found = sorted((PACKAGE / name).glob("_*.py"))
            yield from ((p, tests) for p in found if p.name != "__init__.py")
        else:
            yield PACKAGE / f"{name}.py", tests


def mutants(only: str) -> list[tuple[Path, str, int]]:
    """Every mutant: its module, its tests, its number in the module."""
    every = []
    for path, tests in files(only):
        counter = _Mutator()
        counter.visit(ast.parse(path.read_text("utf-8")))
        every += [(path, tests, i) for i in range(counter.count)]
    return every


def survives(path: Path, tests: str, number: int, scratch: Path) -> tuple[bool, str]:
    """Whether a mutant's tests pass, and what it is."""
    tree = ast.parse(path.read_text("utf-8"))
    mutator = _Mutator(number)
    changed = mutator.visit(copy.deepcopy(tree))
    target = scratch / "src" / path.relative_to(ROOT / "src")
    target.write_text(ast.unparse(ast.fix_missing_locations(changed)), "utf-8")
    try:
        passed = _passes([str(ROOT / "tests" / t) for t in tests.split()], scratch)
    finally:
        shutil.copyfile(path, target)
    return passed, f"{path.relative_to(PACKAGE)}:{mutator.line} {mutator.what}"


def _passes(tests: list[str], scratch: Path) -> bool:
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.alarm(TIMEOUT)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.path.insert(0, str(scratch / "src"))
        sys.dont_write_bytecode = True
        os.chdir(ROOT)
        import pytest

        code = pytest.main(
            ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", *tests]
        )
        os._exit(int(code))
    _, status = os.waitpid(child, 0)
    return status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import hypothesis  # noqa: F401
    import numba  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    torch.set_num_threads(1)
    every = mutants(args.only)
    chosen = random.Random(args.seed).sample(every, min(args.count, len(every)))
    killed, left = 0, []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shutil.copytree(ROOT / "src", scratch / "src", ignore=shutil.ignore_patterns("*cache*"))
        for tests in sorted({t for _, t, _ in chosen}):
            if not _passes([str(ROOT / "tests" / t) for t in tests.split()], scratch):
                raise SystemExit(f"these tests fail without any mutation: {tests}")
        for done, mutant in enumerate(chosen, start=1):
            began = time.perf_counter()
            survived, what = survives(*mutant, scratch)
            killed += not survived
            left += [what] if survived else []
            word = "SURVIVED" if survived else "killed"
            print(f"{done}/{len(chosen)} {word} {what} ({time.perf_counter() - began:.0f} s)",
                  flush=True)  # fmt: skip
    share = killed / max(len(chosen), 1)
    print(f"{killed} of {len(chosen)} killed ({share:.0%}), of {len(every)} mutants in all")
    if args.json:
        args.json.write_text(json.dumps({"killed": killed, "of": len(chosen), "survived": left}))


if __name__ == "__main__":
    main()
