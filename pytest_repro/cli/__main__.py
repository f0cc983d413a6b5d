"""`python -m pytest_repro.cli`."""

from . import main

if __name__ == "__main__":
    main()
