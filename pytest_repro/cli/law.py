"""`pytest-repro capybara`: the scaling law of floating-point quantised training as a calculator."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .. import capybara
from ..errors import ConfigError
from .shell import AsJson, app, console, reported

law = typer.Typer(
    help="Which precision a training run bears: the scaling law of arXiv 2501.02423. Numbers take K, M, B and T.",
    no_args_is_help=True,
)
app.add_typer(law, name="capybara")

VALIDITY = (
    "fitted on 41M to 679M parameters (validated up to 70B) and 10B to 100B tokens, with weights quantised in the forward "
    "pass, weights and activations in the backward pass; forward activations, attention and classifier were not"
)


def _amount(text: str) -> float:
    try:
        value = capybara.quantity(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{text!r} is no number above 0; e.g. 1.2B, 85M, 1e9")
    return value


def _option(name: str, what: str) -> Any:
    return typer.Option(name, help=what, parser=_amount, metavar="NUMBER")


Params = Annotated[float, _option("--params", "N, the model's parameters.")]
Tokens = Annotated[float, _option("--tokens", "D, tokens trained on.")]
Block = Annotated[float, typer.Option("--block", help="B, numbers that share a scale.", min=1)]
Exponent = Annotated[int, typer.Option("--exponent", "-E", help="Exponent bits.", min=1, max=11)]
Mantissa = Annotated[int, typer.Option("--mantissa", "-M", help="Mantissa bits.", min=0, max=52)]
Extrapolate = Annotated[bool, typer.Option("--extrapolate", help="Answer beyond the sizes that the law was fitted on.")]


def _within(extrapolate: bool, **asked: float) -> list[str]:
    """What lies outside; refused unless it was asked for."""
    beyond = capybara.outside(**asked)
    if beyond and not extrapolate:
        raise ConfigError(
            f"the law was not fitted there: {'; '.join(beyond)}", fix="--extrapolate answers all the same"
        )
    return beyond


def _tell(answer: dict[str, Any], lines: list[str], beyond: list[str], as_json: bool) -> None:
    """The answer, and with it what it rests on."""
    if as_json:
        print(json.dumps({**answer, "outside": beyond, "validity": VALIDITY}, indent=1))
        return
    for line in lines:
        console.print(Text(line))
    if beyond:
        console.print(Text(f"extrapolated: {'; '.join(beyond)}", style="yellow"))
    console.print(Text(f"the law: {VALIDITY}", style="dim"))


def _short(value: float) -> str:
    """1.73e15 as 1730T."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.4g}{letter}"
    return f"{value:.4g}"


@law.command()
@reported
def loss(
    params: Params,
    tokens: Tokens,
    exponent: Exponent,
    mantissa: Mantissa,
    block: Block = 128,
    extrapolate: Extrapolate = False,
    as_json: AsJson = False,
) -> None:
    """Predicted loss of a training run whose weights are E1M1 to E8M7 and the like, and what the low precision costs."""
    beyond = _within(extrapolate, params=params, tokens=tokens, block=block, bits=exponent + mantissa + 1)
    total = float(capybara.loss(params, tokens, exponent, mantissa, block))
    cost = float(capybara.penalty(params, tokens, exponent, mantissa, block))
    critical = capybara.critical_tokens(params, exponent, mantissa, block)
    lines = [
        f"loss {total:.4f} nats a token, of which E{exponent}M{mantissa} costs {cost:.2g}",
        f"more data helps up to {_short(critical)} tokens"
        if math.isfinite(critical)
        else "block 1: nothing is quantised",
    ]
    _tell({"loss": total, "penalty": cost, "critical_tokens": _finite(critical)}, lines, beyond, as_json)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@law.command()
@reported
def layout(
    bits: Annotated[int, typer.Option("--bits", "-P", help="Bits in all, the sign included.", min=3, max=64)],
    extrapolate: Extrapolate = False,
    as_json: AsJson = False,
) -> None:
    """The best split of a number of bits into exponent and mantissa."""
    beyond = _within(extrapolate, bits=bits)
    found = capybara.best_layout(bits)
    lines = [f"{bits} bits: {found.name} (before rounding E {found.exponent_real:.2f}, M {found.mantissa_real:.2f})"]
    _tell({"name": found.name, **asdict(found)}, lines, beyond, as_json)


@law.command()
@reported
def critical(
    params: Params,
    exponent: Exponent,
    mantissa: Mantissa,
    block: Block = 128,
    extrapolate: Extrapolate = False,
    as_json: AsJson = False,
) -> None:
    """The data size beyond which more data makes the model worse."""
    beyond = _within(extrapolate, params=params, block=block, bits=exponent + mantissa + 1)
    found = capybara.critical_tokens(params, exponent, mantissa, block)
    beyond += capybara.outside(tokens=found) if math.isfinite(found) else []
    lines = [f"{_short(params)} parameters in E{exponent}M{mantissa}, blocks of {block:g}: {_short(found)} tokens"]
    if not math.isfinite(found):
        lines = ["none: at block 1 nothing is quantised"]
    _tell({"critical_tokens": _finite(found)}, lines, beyond, as_json)


@law.command()
@reported
def precision(
    params: Annotated[float | None, _option("--params", "A fixed model size; needs --compute.")] = None,
    tokens: Annotated[float | None, _option("--tokens", "A fixed data size.")] = None,
    compute: Annotated[float | None, _option("--compute", "A budget C = k P N D of operations.")] = None,
    block: Annotated[float, typer.Option("--block", help="B, numbers that share a scale.", min=1.000001)] = 128,
    cost: Annotated[float, typer.Option("--cost", help="k of the budget.", min=1e-9)] = capybara.COST,
    extrapolate: Extrapolate = False,
    as_json: AsJson = False,
) -> None:
    """The best number of bits: for a data size, for a model size under a budget, or for a budget alone."""
    answer: dict[str, Any]
    if tokens is not None and params is None and compute is None:
        beyond = _within(extrapolate, tokens=tokens, block=block)
        answer = {"bits": capybara.best_bits_for_tokens(tokens, block)}
        lines = [f"{_short(tokens)} tokens: {answer['bits']:.2f} bits"]
    elif params is not None and compute is not None and tokens is None:
        bits = capybara.best_bits_for_params(params, compute, block, k=cost)
        spent = compute / (cost * bits * params)
        answer = {"bits": bits, "tokens": spent}
        beyond = _within(extrapolate, params=params, tokens=spent, block=block)
        lines = [f"{_short(params)} parameters, {compute:.3g} operations: {bits:.2f} bits, {_short(spent)} tokens"]
    elif compute is not None and params is None and tokens is None:
        found = capybara.best_for_compute(compute, block, k=cost)
        beyond = _within(extrapolate, params=found.params, tokens=found.tokens, block=block)
        answer = asdict(found)
        lines = [
            f"{compute:.3g} operations: {found.bits:.2f} bits, {_short(found.params)} parameters, "
            f"{_short(found.tokens)} tokens, loss {found.loss:.3f}"
        ]
    else:
        raise ConfigError("say what is fixed", fix="--tokens D, or --params N --compute C, or --compute C")
    beyond += capybara.outside(bits=answer["bits"])
    _tell(answer, lines, beyond, as_json)


@law.command()
@reported
def fit(
    losses: Annotated[Path, typer.Argument(help="CSV with the columns N, D, E, M, B, loss; a header line.")],
    as_json: AsJson = False,
) -> None:
    """Fit the law's constants to losses of your own, with 95 % intervals, and say how well it predicts held-out rows."""
    found = capybara.fit(capybara.read_losses(losses), str(losses))
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    table = Table("constant", "fitted", "95 % interval", "published", box=None)
    sets = (found.constants, found.low, found.high, capybara.PUBLISHED)
    for name, (value, low, high, published) in capybara.described(sets):
        table.add_row(name, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{published:.4g}")
    console.print(table)
    console.print(Text(f"{found.rows} rows, fitted to within {100 * found.residual:.2g} % (standard deviation)"))
    console.print(
        Text(
            f"rows held out (five-fold): {100 * found.held_out_error:.2g} % off on average, "
            f"R² of log loss {found.held_out_r2:.3f}"
        )
    )
    if found.held_out_r2 < 0.5:
        console.print(
            Text("the law does not describe these losses: it predicts little more than their mean", style="red")
        )
