"""bf16: weights, activations and KV cache in bfloat16 (8 significant bits), the switches as the user has them."""

from contextlib import nullcontext

from . import Mode

MODE = Mode("bf16", dtype="bfloat16", compute_class="bf16", switches=nullcontext)
