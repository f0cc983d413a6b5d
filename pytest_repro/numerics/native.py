"""native: the model as its checkpoint and the user's own settings have it. Nothing is set, so nothing is claimed."""

from contextlib import nullcontext

from . import Mode

MODE = Mode("native", dtype=None, compute_class=None, switches=nullcontext)
