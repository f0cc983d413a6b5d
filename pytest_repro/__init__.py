"""pytest-repro: golden greedy generations, checked on every build, with rounding told from regression.

Importing this package imports nothing heavy: the pytest plugin loads in every project that has it installed.
"""

__version__ = "0.1.0"
