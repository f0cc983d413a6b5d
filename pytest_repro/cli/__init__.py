"""The `pytest-repro` shell, a module for each group of commands. Needs neither torch nor an engine.

Exit codes: 0 done; 1 something is pending (`pending`), differs (`diff`) or fails (`merge --report`); 2 bad usage or input.
"""

from . import goldens, law, machine, shards  # noqa: F401  (importing them registers their commands)
from .shell import app


def main() -> None:
    """Entry point of the console script."""
    app()
