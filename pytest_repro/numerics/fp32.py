"""fp32: weights and compute in IEEE float32 (24 significant bits).

Three switches can undo it without changing a dtype, and each is set to IEEE while the mode holds: TF32 in cuBLAS
(11 significant bits), TF32 in cuDNN, and bf16 or TF32 products in oneDNN on a CPU. torch has two interfaces to them;
the legacy one (`set_float32_matmul_precision`) is set first, so that the two agree and neither getter raises.
Autocast, which would downcast inside any module, is switched off as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from . import Mode


@contextmanager
def ieee() -> Iterator[None]:
    """IEEE float32 products on every backend; restores what it found."""
    import torch

    backends: Any = torch.backends
    owners = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    before = [owner.fp32_precision for owner in owners]
    try:
        legacy: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = None  # the caller mixed both interfaces: only the new one is restored
    with ExitStack() as restore:
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
            restore.callback(_restore, owners, before)
            restore.callback(torch.set_float32_matmul_precision, legacy)
        else:
            restore.callback(_restore, owners, before)
        _restore(owners, ["ieee"] * len(owners))
        for device in ("cpu", "cuda"):
            restore.enter_context(torch.autocast(device, enabled=False))
        yield


def _restore(owners: list[Any], values: list[str]) -> None:
    for owner, value in zip(owners, values, strict=True):
        owner.fp32_precision = value


MODE = Mode("fp32", dtype="float32", compute_class="fp32", switches=ieee)
