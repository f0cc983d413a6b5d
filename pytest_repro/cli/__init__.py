"""The `pytest-repro` shell, a module for each group of commands. Needs neither torch nor an engine.

Exit codes: 0 done; 1 something is pending (`pending`), differs (`diff`) or fails (`merge --report`, `verify`), a check left
no report (`report --to github`), no cause was found (`bisect`), a machine moves too much (`calibrate`), or no cell has
answers (`study`); 2 bad usage or input; 4 bad configuration (`study`); 130 interrupted.
"""

from . import (  # noqa: F401, I001  (importing them registers their commands, in the order of --help)
    goldens,
    fetching,
    verifying,
    bisecting,
    calibrating,
    studying,
    starting,
    surfaces,
    shards,
    machine,
    law,
    ladders,
    auditing,
)
from .shell import app


def main() -> None:
    """Entry point of the console script."""
    app()
