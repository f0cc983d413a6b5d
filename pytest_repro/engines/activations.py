"""What the modules of a torch model put out at a few positions, projected onto a few directions.

A tensor that passes through several modules is taken once, under the name of the first that put it out. What a module
is given, and no module put out, was computed by the module around it: attention itself, a residual sum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..sketch import PROJECTIONS, Sketch, given, signs

MEMORY = 16
"""Latest tensors that are kept alive: one that is handed on is known again by being the same object."""


class Activations:
    """Sketches of one forward pass, in the order in which its tensors came into being."""

    def __init__(self, positions: Sequence[int], length: int) -> None:
        self.positions, self.length = list(positions), length
        self.sketches: dict[str, NDArray[np.float32]] = {}
        self._seen: deque[torch.Tensor] = deque(maxlen=MEMORY)

    def take(self, name: str, value: Any) -> None:
        """Sketch a tensor that was not seen before, if it holds a row for each position."""
        tensor = value[0] if isinstance(value, tuple) and value else value
        if not isinstance(tensor, torch.Tensor) or any(tensor is other for other in self._seen):
            return
        self._seen.append(tensor)
        rows = self._rows(tensor)
        if rows is not None and name not in self.sketches:
            wide = rows.detach().cpu().double().numpy()
            self.sketches[name] = (wide @ _directions(wide.shape[1])).astype(np.float32)

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor's rows at the positions, shape (positions, features)."""
        if not tensor.is_floating_point() or tensor.dim() < 2:
            return None
        tokens = tensor if tensor.dim() == 2 else tensor[0]
        if tensor.dim() > 2 and len(tensor) != 1:
            return None
        if len(tokens) == self.length:
            return tokens[self.positions].flatten(1)
        return tokens.flatten(1) if len(tokens) == len(self.positions) else None


@contextmanager
def watched(model: Any, positions: Sequence[int], length: int) -> Iterator[Activations]:
    """Look on while the model computes one sequence of `length` tokens; nothing it computes is changed."""
    found = Activations(positions, length)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            leaf = not any(True for _ in module.children())
            if leaf and "." in name:
                handle = module.register_forward_pre_hook(partial(_before, found, name))
                hooks.callback(handle.remove)
            if name:
                hooks.callback(module.register_forward_hook(partial(_after, found, name)).remove)
        yield found


def _before(found: Activations, name: str, _module: Any, args: tuple[Any, ...]) -> None:
    if args:
        found.take(given(name), args[0])


def _after(found: Activations, name: str, _module: Any, _args: Any, out: Any) -> None:
    found.take(name, out)


@cache
def _directions(size: int) -> NDArray[np.float64]:
    directions: NDArray[np.float64] = signs(size, PROJECTIONS) / np.sqrt(size)
    return directions


def sketch_of(passes: Sequence[Activations]) -> Sketch:
    """The sketches of several sequences as one: of the places that all of them have."""
    first, *others = [found.sketches for found in passes]
    points = tuple(name for name in first if all(name in other for other in others))
    values = [np.concatenate([found[name] for found in (first, *others)]) for name in points]
    return Sketch(points, np.stack(values) if values else np.zeros((0, 0, PROJECTIONS), np.float32))
