"""``python -m fusewright``: the command, where scripts are not on the path."""

from fusewright.cli import main

main()
