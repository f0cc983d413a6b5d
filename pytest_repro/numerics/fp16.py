"""fp16: weights, activations and KV cache in IEEE half precision (11 significant bits)."""

from contextlib import nullcontext

from . import Mode

MODE = Mode("fp16", dtype="float16", compute_class="fp16", switches=nullcontext)
