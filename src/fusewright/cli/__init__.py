"""The ``fusewright`` command: parse, call, print. Nothing is decided here.

Each command lives in one file, imports the engine only when it runs (so that ``--help`` stays
quick), prints tables for people or one JSON object with ``--json``, and leaves with an exit code:

====  ===================================================================
code  meaning
====  ===================================================================
0     done
1     a check or a verification found something wrong; an unexpected error
2     the command line or the recipe is not understood
3     an input cannot be read, or is not what it says it is
4     these inputs cannot be merged in this way
5     the output cannot be written, or is in use
6     NaN, infinity or overflow
7     memory ran out; what was learned before is kept
130   interrupted (143: terminated); what a merge finished is kept
====  ===================================================================
"""

from __future__ import annotations


def main() -> None:
    """The console script's entry point."""
    from fusewright.cli.app import app

    app(prog_name="fusewright")
