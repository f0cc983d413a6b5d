"""The precision that a model's own arithmetic shows, on its own device: observed, whatever a dtype or a switch says.

The probe of docs/numerics.md. It runs in the process that holds the model, before anything is compared. torch is imported
inside functions only, since every engine knows what an `Observation` is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FP32_PRODUCT_BITS = 21.0
"""Products with at least so many correct bits are FP32-class: FP32 gives 24, TF32 and fp16 about 11, bf16 about 8."""
FP32_SUM_BITS = 20.0
"""Long sums are FP32-class above this: FP32 stays over 22 bits of sum |w||x|, TF32 operands give about 17 at K = 576."""


@dataclass(frozen=True)
class Observation:
    """Effective precision of the arithmetic, seen through the model's own layers."""

    compute_class: str
    """fp32, tf32, fp16, bf16, lower; `unknown` where nothing can be observed."""
    product_bits: float
    """Correct significant bits of single products, the worst layer's."""
    sum_bits: float
    """Correct bits of long sums, relative to sum |w||x|, the worst layer's."""
    detail: str
    """Which layer was the worst, and in what dtype it answered."""

    @property
    def fp32_class(self) -> bool:
        """Whether FP32-class products and sums were found."""
        return self.compute_class == "fp32"

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "compute_class": self.compute_class,
            "product_bits": round(self.product_bits, 1),
            "sum_bits": round(self.sum_bits, 1),
            "detail": self.detail,
        }


def observe(model: Any) -> Observation:
    """The worst precision that the model's own arithmetic shows, on its own device.

    Two ways, since each sees what the other cannot. Crafted operands go through one linear layer of every kind that the
    model has: whatever a layer does to its input inside shows. Then a few tokens go through the whole model, and every
    product that torch computes for it (attention's, routers', experts') is held against float64.
    """
    import torch

    with torch.inference_mode():
        seen = [o for name, layer in _linear_layers(model) if (o := _crafted(name, layer)) is not None]
        worst = min(seen, key=lambda o: (o.product_bits, o.sum_bits), default=None)
        if worst is not None and not worst.fp32_class:
            return worst
        watched, cache = _watched(model)
    if cache != "none" and DTYPE_BITS.get(cache, 0) < 24:
        narrow = {"bfloat16": "bf16", "float16": "fp16"}.get(cache, "lower")
        bits = float(DTYPE_BITS.get(cache, 0))
        return Observation(narrow, bits, bits, f"the KV cache holds {cache}")
    if watched is None:
        return worst or Observation("unknown", 0.0, 0.0, "the model has no product to probe")
    if worst is None:
        return watched
    return worst if watched.fp32_class else replace(watched, product_bits=min(worst.product_bits, watched.product_bits))


def _linear_layers(model: Any) -> list[tuple[str, Any]]:
    """The first and the last layer of each kind (class, shape, dtype): a mode may treat some modules otherwise."""
    import torch

    first: dict[tuple[Any, ...], tuple[str, Any]] = {}
    last: dict[tuple[Any, ...], tuple[str, Any]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and (isinstance(module, torch.nn.Linear) or _is_conv1d(module)):
            kind = (type(module), tuple(weight.shape), weight.dtype)
            first.setdefault(kind, (name, module))
            last[kind] = (name, module)
    return list({name: (name, module) for name, module in (*first.values(), *last.values())}.values())


def _is_conv1d(module: Any) -> bool:
    """GPT-2's linear layer of transformers, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _crafted(name: str, layer: Any) -> Observation | None:
    precision = _precision(layer)
    if precision is None:
        return None
    return _of_layer(name, *precision)


def _of_layer(name: str, products: float, sums: float, answered: torch.dtype) -> Observation:
    kind = _class_of(products, sums, answered)
    return Observation(kind, products, sums, f"{name} answers in {str(answered).removeprefix('torch.')}")


MOST_OUTPUTS = 256
"""Outputs of a layer that are held against float64: spread over all of them, since an lm_head has hundreds of thousands."""
MOST_INPUTS = 256
"""Inputs of a layer whose weight is read through its answers, one row each."""


def observe_layer(name: str, apply: Any, width: int, count: int, dtype: torch.dtype, device: Any) -> Observation:
    """The precision of a layer of which only the answers are seen: its weight may be packed in a form of its own.

    The weight is read through the layer, by rows of the unit matrix, which every format multiplies exactly.

    Args:
        name: for the observation.
        apply: rows of shape (n, width), as `dtype` on `device` -> answers of shape (n, count), without a bias.
        width: number of inputs.
        count: number of outputs.
        dtype: of the inputs.
        device: of the inputs.
    """
    import torch

    outputs, support = _spread(count, MOST_OUTPUTS), _spread(width, MOST_INPUTS)

    def answer(x: Any) -> tuple[Any, torch.dtype]:
        y = apply(x.to(device, dtype))
        return y[:, outputs.to(y.device)].to("cpu", torch.float64), y.dtype

    units = torch.zeros(len(support), width)
    units[torch.arange(len(support)), support] = 1
    weight = torch.cat([answer(rows)[0] for rows in units.split(32)]).T
    products, sums, answered = _measured(answer, weight, width, support)
    return _of_layer(name, products, sums, answered)


def _precision(layer: Any) -> tuple[float, float, torch.dtype] | None:
    """(product bits, sum bits, dtype of the answer) of one linear layer; None for a router that answers otherwise."""
    import torch

    weight = layer.weight.T if _is_conv1d(layer) else layer.weight
    outputs = _spread(weight.shape[0], MOST_OUTPUTS)
    exact_weight = weight.detach()[outputs.to(weight.device)].to("cpu", torch.float64)
    # A bias would be added before the answer is rounded, and hide the product's own bits: it is zero for the probe.
    without = {} if layer.bias is None else {"bias": torch.zeros_like(layer.bias)}

    def raw(x: Any) -> Any:
        moved = x.to(weight.device, weight.dtype if weight.dtype.is_floating_point else torch.float32)
        return torch.func.functional_call(layer, without, (moved,))

    def answer(x: Any) -> tuple[Any, torch.dtype]:
        y = raw(x)
        return y[:, outputs.to(y.device)].to("cpu", torch.float64), y.dtype

    width = weight.shape[1]
    if not isinstance(raw(torch.ones(1, width)), torch.Tensor):
        return None
    return _measured(answer, exact_weight, width, torch.arange(width))


def _measured(answer: Any, weight: Any, width: int, support: Any) -> tuple[float, float, torch.dtype]:
    """(product bits, sum bits, dtype of the answer) of a layer with a known weight.

    Products: an input with a single nonzero element v makes each output one product w * v, whatever the layer's width;
    v has all 24 bits of a float32 significand, so that any narrower format on the way shows. Sums: random rows against
    float64.

    Args:
        answer: rows of shape (n, width) -> (answers in float64, the dtype they came in).
        weight: the columns of `support`, float64.
        width: number of inputs.
        support: places of the inputs that are not zero.
    """
    import torch

    generator = torch.Generator().manual_seed(20250609)
    rows = 16
    columns = torch.randint(len(support), (rows,), generator=generator)
    values = 1 + torch.rand(rows, generator=generator)
    single = torch.zeros(rows, width)
    single[torch.arange(rows), support[columns]] = values
    some_dense = torch.randn(8, len(support), generator=generator)
    dense = torch.zeros(8, width)
    dense[:, support] = some_dense

    product = total = 0.0
    wanted = weight[:, columns].T * values.double()[:, None]
    size = wanted.abs()
    noticeable = size > 1e-3 * size.max()  # as a subnormal, a tiny product says nothing
    scale = (some_dense.double().abs() @ weight.abs().T).clamp(min=1e-300)
    for some in (slice(None), slice(0, 1)):  # libraries choose other kernels for a single row
        seen, dtype = answer(single[some])
        errors = ((seen - wanted[some]).abs() / size[some])[noticeable[some]]
        product = max(product, _worst(errors))
        seen, _ = answer(dense[some])
        total = max(total, _worst((seen - some_dense[some].double() @ weight.T).abs() / scale[some]))
    return _bits(product), _bits(total), dtype


def _spread(count: int, most: int) -> torch.Tensor:
    import torch

    return torch.arange(count) if count <= most else torch.linspace(0, count - 1, most).long().unique()


def _worst(errors: Any) -> float:
    """The largest error; one, no bit correct, if there is none to see or one is NaN."""
    value = float(errors.max()) if errors.numel() else 1.0
    return 1.0 if math.isnan(value) else value


def _bits(error: float) -> float:
    return -math.log2(error) if error > 2.0**-53 else 53.0


def _class_of(product_bits: float, sum_bits: float, answered: torch.dtype) -> str:
    import torch

    if product_bits >= FP32_PRODUCT_BITS and sum_bits >= FP32_SUM_BITS:
        return "fp32"
    if product_bits >= 9.5:
        return "fp16" if answered == torch.float16 else "tf32"
    return "bf16" if product_bits >= 6.5 else "lower"


WATCHED_TOKENS = 8
WATCHED_BITS = 18.0
"""A watched product is FP32-class above this, relative to sum |a||b|: FP32 shows over 20, TF32 under 17 up to K = 4096."""
ATTENTION_BITS = 20.0
"""Fused attention is FP32-class above this, relative to its largest value times the largest sum |q||k|: FP32 shows 24 and
more, TF32 and fp16 14 to 17. Only a softmax so saturated that it chooses one token hides them."""
MOST_WATCHED = 2**24
"""Elements of an operand that is still held against float64."""
DTYPE_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8, "float8_e4m3fn": 4, "float8_e5m2": 3}
"""Significant bits of a dtype."""


def _watched(model: Any) -> tuple[Observation | None, str]:
    """(the worst of a real forward pass, the narrowest dtype that it leaves in the cache).

    Every product that torch computes is held against float64, and every tensor that comes out of any operation is seen if
    it is narrower than FP32. None if torch computed nothing that can be watched.
    """
    from torch.overrides import TorchFunctionMode

    found: list[Observation] = []
    with inside(model) as modules:

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                seen = _narrow(func, out) or _product(func, args, kwargs or {}, out)
                if seen is not None:
                    found.append(replace(seen, detail=f"{modules[-1]}: {seen.detail}"))
                return out

        with Watch():
            out = a_few_tokens(model)
    # Where several things are narrow, the first is nearest to the cause.
    first = next((o for o in found if not o.fp32_class), None)
    return first or min(found, key=lambda o: o.sum_bits, default=None), _cache_dtype(out)


@contextmanager
def inside(model: Any) -> Iterator[list[str]]:
    """Names of the modules whose forward pass is under way, the innermost last."""
    from torch.nn.modules import module as hooks

    names = {id(module): name for name, module in model.named_modules()}
    stack = ["the model"]
    handles = [
        hooks.register_module_forward_pre_hook(lambda module, *_: stack.append(names.get(id(module)) or "the model")),
        hooks.register_module_forward_hook(lambda *_: stack.__delitem__(-1), always_call=True),
    ]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def a_few_tokens(model: Any) -> Any:
    """The model's output for some tokens, with a cache."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(WATCHED_TOKENS, device=model.device)[None] % vocabulary
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=True)


def kv_cache_dtype(model: Any) -> str:
    """The narrowest dtype of what tokens leave in the cache, `none` without one: observed by running some."""
    return _cache_dtype(a_few_tokens(model))


def cached(out: Any) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(layer, `keys` or `values`, what tokens left there) of a model's output; nothing without a cache."""
    import torch

    for i, layer in enumerate(getattr(getattr(out, "past_key_values", None), "layers", None) or []):
        for name in ("keys", "values"):
            if isinstance(held := getattr(layer, name, None), torch.Tensor):
                yield i, name, held


def _cache_dtype(out: Any) -> str:
    names = {str(tensor.dtype).removeprefix("torch.") for _, _, tensor in cached(out)}
    return min(names, key=lambda name: DTYPE_BITS.get(name, 0), default="none")


def _narrow(func: Any, out: Any) -> Observation | None:
    """An operation whose answer is a floating-point tensor narrower than FP32: norms, activations, casts, anything."""
    import torch

    for tensor in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(tensor, torch.Tensor) and tensor.dtype.is_floating_point and tensor.dtype.itemsize < 4:
            name = str(tensor.dtype).removeprefix("torch.")
            bits = float(DTYPE_BITS.get(name, 2))
            kind = {"bfloat16": "bf16", "float16": "fp16"}.get(name, "lower")
            return Observation(kind, bits, bits, f"{getattr(func, '__name__', func)} answers in {name}")
    return None


def _product(func: Any, args: Any, kwargs: Any, out: Any) -> Observation | None:
    """How near one product is to the same product in float64; None for what is none, or too large to be looked at."""
    import torch

    if not isinstance(out, torch.Tensor) or not out.dtype.is_floating_point:
        return None
    if "grouped_mm" in getattr(func, "__name__", ""):
        return _grouped(out, *args, **kwargs)
    if func is torch._C._nn.linear:
        args, kwargs, out = _sampled(out, *args, **kwargs)
    elif func not in _watchable() or any(_size(v) > MOST_WATCHED for v in (*args, *kwargs.values())):
        return None
    exact_args, exact_kwargs = [_wide(a) for a in args], {k: _wide(v) for k, v in kwargs.items() if k != "out"}
    exact = func(*exact_args, **exact_kwargs)
    attention = func is torch._C._nn.scaled_dot_product_attention
    if attention:
        scale = _attention_scale(*exact_args, **exact_kwargs)
    else:
        scale = func(*map(_magnitude, exact_args), **{k: _magnitude(v) for k, v in exact_kwargs.items()})
    shapes = " and ".join(str(tuple(a.shape)) for a in args if isinstance(a, torch.Tensor))
    name = f"{getattr(func, '__name__', func)} of {shapes}"
    return _seen(name, _wide(out), exact, scale, ATTENTION_BITS if attention else WATCHED_BITS)


def observe_attention(
    name: str, q: Any, k: Any, v: Any, out: Any, scale: float, softcap: float = 0.0
) -> Observation | None:
    """Causal attention of one whole prompt, held against float64.

    Args:
        name: for the observation.
        q: queries, shape (T, heads, D).
        k: keys, shape (T, KV heads, D).
        v: values, shape (T, KV heads, D).
        out: the answer, shape (T, heads, D).
        scale: of the logits.
        softcap: logits are softcap * tanh(logits / softcap); 0 for none.
    """
    import torch

    q, k, v, out = (_wide(t).transpose(0, 1) for t in (q, k, v, out))
    k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
    logits = q @ k.transpose(1, 2) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    exact = logits.masked_fill(hidden, -math.inf).softmax(-1) @ v
    size = v.abs().max() * (1 + (q.abs() @ k.abs().transpose(1, 2)).max() * scale)
    return _seen(name, out, exact, size, ATTENTION_BITS)


def observe_narrow(name: str, out: Any) -> Observation | None:
    """What an answer says that is narrower than FP32; None for any other."""
    seen = _narrow(None, out)
    return None if seen is None else replace(seen, detail=seen.detail.replace("None", name, 1))


def _seen(name: str, out: Any, exact: Any, scale: Any, enough: float) -> Observation | None:
    """The correct bits of an answer; None if nothing of it can be compared."""
    errors = ((out - exact).abs() / scale.clamp(min=1e-30))[exact.isfinite()]
    if not errors.numel():
        return None
    bits = _bits(_worst(errors))
    narrow = "tf32" if bits >= 9.5 else "bf16" if bits >= 6.5 else "lower"
    return Observation("fp32" if bits >= enough else narrow, bits, bits, f"{name} has {bits:.1f} correct bits")


def _grouped(out: Any, x: Any, weight: Any, *, offs: Any, **_: Any) -> Observation | None:
    """Experts' products in one call: rows [offs[i-1], offs[i]) of x times weight[i], (in, out)."""
    some = _spread(weight.shape[-1], MOST_OUTPUTS).to(weight.device)
    worst: list[Observation] = []
    first = 0
    for expert, last in enumerate(offs.tolist()):
        if first < last:
            rows, columns = _wide(x[first:last]), _wide(weight[expert][:, some])
            seen = _seen(
                "grouped_mm", _wide(out[first:last][:, some]), rows @ columns, rows.abs() @ columns.abs(), WATCHED_BITS
            )
            worst += [seen] if seen else []
        first = last
    return min(worst, key=lambda o: o.sum_bits, default=None)


def _watchable() -> tuple[Any, ...]:
    """The functions themselves, not the names that a wrapper may have been put in the place of."""
    import torch

    tensor: Any = torch.Tensor
    return (
        torch.matmul, tensor.matmul, tensor.__matmul__, torch.mm, tensor.mm, torch.bmm, tensor.bmm, torch.addmm,
        tensor.addmm, torch.baddbmm, tensor.baddbmm, torch.einsum, torch._C._nn.scaled_dot_product_attention,
    )  # fmt: skip


def _sampled(out: Any, input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """(args, kwargs, answer) of a linear layer for some of its outputs."""
    some = _spread(weight.shape[0], MOST_OUTPUTS) if weight.dim() == 2 else slice(None)
    return (input, weight[some], None if bias is None else bias[some]), {}, out[..., some] if weight.dim() == 2 else out


def _attention_scale(query: Any, key: Any, value: Any, *_: Any, scale: float | None = None, **__: Any) -> Any:
    """What an error of attention is relative to: values, and logits whose rounding grows with the sum of |q||k|."""
    heads = query.shape[-3] // key.shape[-3] if query.dim() > 2 else 1
    logits = (
        query.abs() @ key.abs().repeat_interleave(heads, -3).transpose(-1, -2)
        if heads > 1
        else (query.abs() @ key.abs().transpose(-1, -2))
    )
    return value.abs().max() * (1 + logits.max() * (query.shape[-1] ** -0.5 if scale is None else scale))


def _size(value: Any) -> int:
    import torch

    return value.numel() if isinstance(value, torch.Tensor) else 0


def _wide(value: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cpu", torch.float64) if value.dtype.is_floating_point else value.cpu()


def _magnitude(value: Any) -> Any:
    import torch

    return value.abs() if isinstance(value, torch.Tensor) and value.dtype.is_floating_point else value
