"""The scaling law of floating-point quantised training ("Capybara", Sun et al., arXiv 2501.02423v3), as functions.

    L(N, D, E, M, B) = n / N^alpha + d / D^beta + eps + (D^beta / N^alpha) * log2(B) / (gamma (E+1/2)^delta (M+1/2)^nu)

N parameters are trained on D tokens; E exponent and M mantissa bits store the weights, in blocks of B that share a scale.
The last term is what low precision costs: it grows with the data, so that beyond a critical data size more data hurts.

The law was fitted with the *weights* quantised in the forward pass, and weights and activations in the backward pass
(targets P2, P4 and P6, section 3.1); activations of the forward pass, attention products and the classifier stayed in
high precision. `outside` says what of a question lies beyond the sizes that were fitted.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from .errors import ConfigError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Constants:
    """The law's constants; the published ones are `PUBLISHED`."""

    n: float
    alpha: float
    d: float
    beta: float
    eps: float
    gamma: float
    delta: float
    nu: float

    @property
    def gamma_rho(self) -> float:
        """gamma under the best layout, where (E+1/2)^delta (M+1/2)^nu = gamma_rho / gamma * P^(delta+nu) (Eq. 20)."""
        s = self.delta + self.nu
        return float(self.gamma * self.delta**self.delta * self.nu**self.nu / s**s)


PUBLISHED = Constants(69.2343, 0.2368, 68973.0621, 0.5162, 1.9061, 11334.5197, 3.1926, 2.9543)
"""Table 2 of the paper."""
COST = 6 / 16
"""k of the cost model C = k P N D of the paper's figures: 6 N D operations at 16 bits."""
FITTED = {
    "params": (41e6, 70e9),
    "tokens": (10e9, 100e9),
    "block": (1.0, 512.0),
    "bits": (3.0, 16.0),
}
"""What the paper trained: 41M to 679M parameters in the fit and up to 70B in its validation, 10B to 100B tokens, blocks of
up to 512 (1: high precision), formats of 3 to 16 bits."""


@dataclass(frozen=True)
class Layout:
    """How P bits are best split: one sign bit, E exponent and M mantissa bits."""

    bits: int
    exponent: int
    mantissa: int
    exponent_real: float
    """Before rounding to whole bits (Eq. 19)."""
    mantissa_real: float

    @property
    def name(self) -> str:
        """`E4M3`."""
        return f"E{self.exponent}M{self.mantissa}"


@dataclass(frozen=True)
class Optimum:
    """Where a compute budget is spent best."""

    bits: float
    params: float
    tokens: float
    loss: float


def loss(
    params: ArrayLike,
    tokens: ArrayLike,
    exponent: ArrayLike,
    mantissa: ArrayLike,
    block: ArrayLike,
    c: Constants = PUBLISHED,
) -> Floats:
    """Predicted loss, nats a token (Eq. 1). The arguments broadcast.

    Args:
        params: N.
        tokens: D.
        exponent: E, exponent bits.
        mantissa: M, mantissa bits.
        block: B, numbers that share a scale; 1 is high precision.
        c: the law's constants.
    """
    n, d = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
    return c.n / n**c.alpha + c.d / d**c.beta + c.eps + penalty(n, d, exponent, mantissa, block, c)


def penalty(
    params: ArrayLike,
    tokens: ArrayLike,
    exponent: ArrayLike,
    mantissa: ArrayLike,
    block: ArrayLike,
    c: Constants = PUBLISHED,
) -> Floats:
    """What low precision adds to the loss, nats a token: the last term of Eq. 1."""
    n, d = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
    e, m = np.asarray(exponent, np.float64), np.asarray(mantissa, np.float64)
    out: Floats = d**c.beta / n**c.alpha * np.log2(block) / (c.gamma * (e + 0.5) ** c.delta * (m + 0.5) ** c.nu)
    return out


def best_layout(bits: int, c: Constants = PUBLISHED) -> Layout:
    """The split of P bits with the least loss, whatever N, D and B are (Eq. 19).

    Raises:
        ConfigError: fewer bits than a sign, an exponent and a mantissa bit.
    """
    if bits < 3:
        raise ConfigError(f"{bits} bits hold no sign, exponent and mantissa", fix="3 bits or more")
    s = c.delta + c.nu
    whole = max(range(1, bits), key=lambda e: (e + 0.5) ** c.delta * (bits - 1 - e + 0.5) ** c.nu)
    return Layout(bits, whole, bits - 1 - whole, c.delta * bits / s - 0.5, c.nu * bits / s - 0.5)


def critical_tokens(params: float, exponent: float, mantissa: float, block: float, c: Constants = PUBLISHED) -> float:
    """D beyond which more data makes the loss larger (Eq. 21); infinite at block 1, where nothing is quantised."""
    if block <= 1:
        return math.inf
    room = c.d * c.gamma * params**c.alpha * (exponent + 0.5) ** c.delta * (mantissa + 0.5) ** c.nu / math.log2(block)
    return float(room ** (1 / (2 * c.beta)))


def best_bits_for_tokens(tokens: float, block: float, c: Constants = PUBLISHED) -> float:
    """P that is best for D tokens under a compute budget that N takes up (Eq. 22)."""
    s = c.delta + c.nu
    gamma_d = (s - c.alpha) / (c.n * c.alpha * c.gamma_rho)
    return float((gamma_d * tokens**c.beta * math.log2(block)) ** (1 / s))


def best_bits_for_params(
    params: float, compute: float, block: float, c: Constants = PUBLISHED, k: float = COST
) -> float:
    """P that is best for N parameters and a compute budget C = k P N D that D takes up (Eq. 23)."""
    s = c.delta + c.nu
    gamma_n = (c.beta + s) / (c.d * c.beta * c.gamma_rho)
    room = gamma_n * (compute / k) ** (2 * c.beta) * params ** -(c.alpha + 2 * c.beta) * math.log2(block)
    return float(room ** (1 / (s + 2 * c.beta)))


def best_for_compute(compute: float, block: float, c: Constants = PUBLISHED, k: float = COST) -> Optimum:
    """P, N and D that are best for a compute budget C = k P N D (Eq. 25).

    P is the paper's closed form; D follows from Eq. 22 turned round, N from the budget.
    """
    s = c.delta + c.nu
    gamma_d = (s - c.alpha) / (c.n * c.alpha * c.gamma_rho)
    ratio = (c.d * c.beta) / (c.n * c.alpha) * (s - c.alpha) / (s + c.beta)
    power = s * (c.alpha + c.beta) / c.beta + c.alpha
    scale = (gamma_d * math.log2(block)) ** ((c.alpha + c.beta) / c.beta)
    bits = float((ratio * scale * (compute / k) ** c.alpha) ** (1 / power))
    tokens = float((bits**s / (gamma_d * math.log2(block))) ** (1 / c.beta))
    params = compute / (k * bits * tokens)
    return Optimum(bits, params, tokens, loss_at_best_layout(params, tokens, bits, block, c))


def loss_at_best_layout(params: float, tokens: float, bits: float, block: float, c: Constants = PUBLISHED) -> float:
    """Predicted loss with P bits split in the best way, whole bits or not (Eq. 20)."""
    exponent, mantissa = (x * bits / (c.delta + c.nu) - 0.5 for x in (c.delta, c.nu))
    return float(loss(params, tokens, exponent, mantissa, block, c))


def outside(**asked: float) -> list[str]:
    """What of a question lies beyond the sizes that the law was fitted and validated on, in words.

    Args:
        asked: any of `params`, `tokens`, `block`, `bits`.
    """
    return [
        f"{name} {value:.4g} is outside {low:.4g} to {high:.4g}"
        for name, value in asked.items()
        for low, high in [FITTED[name]]
        if not low <= value <= high
    ]


# --- constants of one's own -----------------------------------------------------------------------------------------

COLUMNS = ("N", "D", "E", "M", "B", "loss")
FOLDS = 5
CONFIDENCE = 0.95
_STARTS = 8


@dataclass(frozen=True)
class Fitted:
    """The law fitted to measured losses."""

    constants: Constants
    low: Constants
    """Lower ends of the 95 % confidence intervals."""
    high: Constants
    rows: int
    residual: float
    """Standard deviation of log(measured / predicted) over the rows fitted."""
    held_out_error: float
    """Mean |measured / predicted - 1| of rows that the fit had not seen, five-fold."""
    held_out_r2: float
    """Share of the variance of log loss in such rows that the law predicted."""


def read_losses(path: Path) -> Floats:
    """A CSV file with the columns N, D, E, M, B and loss, as an array of shape (rows, 6).

    Raises:
        ConfigError: with file, line and column.
    """
    columns = ", ".join(COLUMNS)
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot be read: {exc}", where=path, fix=f"a CSV file with the columns {columns}") from None
    reader = csv.DictReader(lines)
    names = {(name or "").strip().lower(): name for name in reader.fieldnames or ()}
    if missing := [c for c in COLUMNS if c.lower() not in names]:
        raise ConfigError(f"no column {missing[0]}", where=f"{path}:1", fix=f"the columns are {columns}")
    try:
        rows = [[_cell(row[names[c.lower()]], f"{path}:{reader.line_num} [{c}]") for c in COLUMNS] for row in reader]
    except csv.Error as exc:
        raise ConfigError(f"not CSV: {exc}", where=f"{path}:{reader.line_num}") from None
    return np.asarray(rows, np.float64).reshape(-1, len(COLUMNS))


def _cell(text: str | None, where: str) -> float:
    try:
        value = quantity(text or "")
    except ValueError:
        raise ConfigError(f"{(text or '')[:40]!r} is not a number", where=where, fix="e.g. 85M, 8.5e7, 2.97") from None
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{value} cannot be", where=where, fix="a finite number, not negative")
    return value


def quantity(text: str) -> float:
    """A number with K, M, B (or G) or T behind it.

    Raises:
        ValueError: it is none.
    """
    stripped = text.strip().replace("_", "")
    suffix = stripped[-1:].upper()
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}.get(suffix)
    return float(stripped) if scale is None else float(stripped[:-1]) * scale


def fit(rows: Floats, where: str = "") -> Fitted:
    """The law's constants from measured losses, by least squares on log loss; intervals from the curvature.

    Args:
        rows: shape (R, 6), as `read_losses` gives them.
        where: what an error names.

    Raises:
        ConfigError: too few rows, or rows that leave a constant open.
    """
    _check(rows, where)
    found, spread = _fitted(rows)
    error, r2 = _held_out(rows)
    middle = np.array(found)
    quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, len(rows) - len(found))
    low, high = middle - quantile * spread.deviations, middle + quantile * spread.deviations
    return Fitted(_natural(middle), _natural(low), _natural(high), len(rows), spread.residual, error, r2)


def _check(rows: Floats, where: str) -> None:
    wanted = 2 * len(fields(Constants))
    if len(rows) < wanted:
        raise ConfigError(f"{len(rows)} rows cannot fix eight constants", where=where, fix=f"measure {wanted} or more")
    for column, name in enumerate(COLUMNS):
        if name not in ("E", "M") and (bad := np.flatnonzero(rows[:, column] <= 0)).size:
            raise ConfigError(f"{name} is not above 0 in row {bad[0] + 1}", where=where)
        if name not in ("B", "loss") and len(np.unique(rows[:, column])) < 3:
            raise ConfigError(f"{name} takes fewer than three values: its exponent is left open", where=where)
    if (bad := np.flatnonzero(rows[:, 4] < 1)).size:
        raise ConfigError(f"B is below 1 in row {bad[0] + 1}", where=where, fix="1 is high precision")
    if (rows[:, 4] <= 1).all():
        raise ConfigError("every row is high precision (B = 1): what low precision costs is left open", where=where)


@dataclass(frozen=True)
class _Spread:
    deviations: Floats
    residual: float


def _natural(x: Floats) -> Constants:
    """From what is fitted (logarithms of the factors, exponents as they are) to the constants."""
    a, b = x.tolist(), np.exp(np.clip(x, -700, 700)).tolist()
    return Constants(b[0], a[1], b[2], a[3], b[4], b[5], a[6], a[7])


def _fitted_form(c: Constants) -> Floats:
    values = np.array(astuple(c))
    logs = [0, 2, 4, 5]
    values[logs] = np.log(values[logs])
    return values


def _residuals(x: Floats, rows: Floats) -> Floats:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        n, d, e, m, b = rows[:, :5].T
        predicted = loss(n, d, e, m, b, _natural(x))
        out: Floats = np.nan_to_num(np.log(rows[:, 5] / predicted), nan=1e3, posinf=1e3, neginf=-1e3)
    return out


def _fitted(rows: Floats) -> tuple[Floats, _Spread]:
    """Best of several starts around the published constants: the surface has flat valleys."""
    start = _fitted_form(PUBLISHED)
    rng = np.random.default_rng(0)
    starts = [start, *(start * (1 + 0.2 * rng.standard_normal((_STARTS - 1, len(start)))))]
    done = [optimize.least_squares(_residuals, x, args=(rows,), x_scale="jac", max_nfev=2000) for x in starts]
    best = min(done, key=lambda r: float(r.cost))
    freedom = len(rows) - len(start)
    variance = 2 * best.cost / freedom
    covariance = np.linalg.pinv(best.jac.T @ best.jac) * variance
    return best.x, _Spread(np.sqrt(np.maximum(np.diag(covariance), 0)), float(np.sqrt(variance)))


def _held_out(rows: Floats) -> tuple[float, float]:
    order = np.random.default_rng(0).permutation(len(rows))
    found = np.empty(len(rows))
    for fold in range(FOLDS):
        left_out = order[fold::FOLDS]
        kept = np.setdiff1d(order, left_out)
        found[left_out] = _residuals(_fitted(rows[kept])[0], rows[left_out])
    logs = np.log(rows[:, 5])
    return float(np.mean(np.abs(np.expm1(found)))), float(1 - np.sum(found**2) / np.sum((logs - logs.mean()) ** 2))


def described(constants: Iterable[Constants]) -> list[tuple[str, Sequence[Any]]]:
    """Constant by constant, the values of several sets beside each other."""
    sets = list(constants)
    return [(f.name, [getattr(c, f.name) for c in sets]) for f in fields(Constants)]
