"""Elementwise operations: smooth ones by name, and those with a kink.

Derivatives at a kink follow torch. A step function of x has derivative zero in CasADi, so
``(x > 0) * x`` differentiates to ``x > 0``: zero at x = 0, as torch's relu.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import casadi as ca
import numpy as np
import torch
from scipy import special

from ddn_solvers.lowering.casadi_tensor import (
    Call,
    Tensor,
    broadcast,
    column,
    concatenate,
    elementwise,
    gather,
    lowers,
)

Function = Callable[..., Any]  # of columns

SMOOTH: dict[str, Function] = {
    "acos": ca.acos,
    "acosh": ca.acosh,
    "asin": ca.asin,
    "asinh": ca.asinh,
    "atan": ca.atan,
    "atan2": ca.atan2,
    "atanh": ca.atanh,
    "cos": ca.cos,
    "cosh": ca.cosh,
    "erf": ca.erf,
    "exp": ca.exp,
    "exp2": lambda x: ca.exp(x * math.log(2)),
    "expm1": ca.expm1,
    "log": ca.log,
    "log10": ca.log10,
    "log1p": ca.log1p,
    "log2": lambda x: ca.log(x) / math.log(2),
    "mul": operator.mul,
    "neg": operator.neg,
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / ca.sqrt(x),
    "sin": ca.sin,
    "sinh": ca.sinh,
    "sqrt": ca.sqrt,
    "tan": ca.tan,
    "tanh": ca.tanh,
}
for _name, _function in SMOOTH.items():
    elementwise(_name)(_function)


@elementwise("add")
def add(x: Any, y: Any, alpha: float = 1) -> Any:
    return x + y if alpha == 1 else x + alpha * y


@elementwise("sub")
def sub(x: Any, y: Any, alpha: float = 1) -> Any:
    return x - y if alpha == 1 else x - alpha * y


@elementwise("rsub")
def rsub(x: Any, y: Any, alpha: float = 1) -> Any:
    return sub(y, x, alpha)


@elementwise("square")
def square(x: Any) -> Any:
    return x**2


@elementwise("lerp")
def lerp(x: Any, y: Any, weight: Any) -> Any:
    return x + weight * (y - x)


@elementwise("sinc", "special_sinc")
def sinc(x: Any) -> Any:
    """sin(t) / t with t = pi x; by its series up to t = 1, where derivatives of the quotient cancel."""
    t = math.pi * x
    near = t * t < 1
    squared, far = ca.if_else(near, t * t, 0), ca.if_else(near, 1, t)
    series = 1.0
    for degree in range(22, 0, -2):
        series = 1 - squared * series / (degree * (degree + 1))
    return ca.if_else(near, series, ca.sin(far) / far)


@elementwise("erfinv", "special_erfinv")
def erfinv(x: Any) -> Any:
    y = ca.erfinv(x)  # good to 1e-8; one Newton step makes it, and its derivatives, exact to rounding
    return y - (ca.erf(y) - x) * math.sqrt(math.pi) / 2 * ca.exp(y**2)


@lowers("pow")
def power(call: Call, base: Any, exponent: Any) -> Any:
    x, y = call.columns(base, exponent)
    if isinstance(exponent, int | float):
        return _constant_power(x, exponent)
    if isinstance(base, int | float):
        return base**y
    if not isinstance(exponent, torch.Tensor):
        # At x = 0 the derivatives of x^y hold log(x); there they are those of the polynomial that it is.
        regular = ca.logic_or(x != 0, ca.logic_and(y < 1, y != 0))
        at_zero = (y == 0) + (y == 1) * x + (y == 2) * x**2
        return ca.if_else(regular, ca.if_else(regular, x, 1) ** y, at_zero)
    distinct, which = torch.unique(exponent, return_inverse=True)
    count = call.output.numel()
    powers = [ca.MX.zeros(count) + _constant_power(x, value) for value in distinct.tolist()]
    places = which.expand(call.shape).reshape(-1) * count + torch.arange(count)
    return gather(concatenate(powers), places)


def _constant_power(x: Any, exponent: float) -> Any:
    """Products for whole exponents: CasADi's x^n has NaN among its derivatives at x = 0."""
    if exponent != int(exponent) or abs(exponent) > 64:
        return ca.sqrt(x) if exponent == 0.5 else x**exponent
    if exponent < 0:
        return 1 / _constant_power(x, -exponent)
    if exponent < 2:
        return x if exponent == 1 else ca.MX.ones(x.shape)
    half = _constant_power(x, exponent // 2)
    return half**2 * x if exponent % 2 else half**2


@elementwise("sigmoid")
def sigmoid(x: Any) -> Any:
    nonnegative = x >= 0
    decay = _decay(x, nonnegative)
    return ca.if_else(nonnegative, 1, decay) / (1 + decay)


@lowers("log_sigmoid_forward")
def log_sigmoid(call: Call, x: Any) -> tuple[Any, None]:
    (x,) = call.columns(x)
    return _log_sigmoid(x), None


def _log_sigmoid(x: Any) -> Any:
    nonnegative = x >= 0
    return (1 - nonnegative) * x - ca.log1p(_decay(x, nonnegative))


@elementwise("logaddexp")
def logaddexp(x: Any, y: Any) -> Any:
    first = x >= y
    return ca.if_else(first, x, y) + ca.log1p(_decay(x - y, first))


@elementwise("logaddexp2")
def logaddexp2(x: Any, y: Any) -> Any:
    return logaddexp(x * math.log(2), y * math.log(2)) / math.log(2)


def _decay(x: Any, nonnegative: Any) -> Any:
    """exp(-|x|), differentiated at zero as the branch that ``nonnegative`` chose."""
    return ca.exp(x * (1 - 2 * nonnegative))


@elementwise("silu")
def silu(x: Any) -> Any:
    return x * sigmoid(x)


@elementwise("softplus")
def softplus(x: Any, beta: float = 1, threshold: float = 20) -> Any:
    # As torch: x itself beyond the threshold, where it differs by less than exp(-threshold).
    linear = beta * x > threshold
    return linear * x + (1 - linear) * ca.log1p(ca.exp(beta * (1 - linear) * x)) / beta


@elementwise("gelu")
def gelu(x: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        return 0.5 * x * (1 + ca.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * _cdf(x)


def _cdf(x: Any) -> Any:
    """Of the normal distribution, to rounding beside one; ``ndtr`` is so beside itself."""
    return (1 + ca.erf(x / math.sqrt(2))) / 2


@elementwise("erfc", "special_erfc")
def erfc(x: Any) -> Any:
    """From erf where it is not small, else exp(-x^2) erfcx(x): 1 - erf(x) has no digit left at x = 6."""
    tail = x > 0.5
    t = ca.if_else(tail, x, 1)
    return ca.if_else(tail, ca.exp(-t * t) * _erfcx(t), 1 - ca.erf(ca.if_else(tail, 0, x)))


@elementwise("special_erfcx")
def erfcx(x: Any) -> Any:
    positive = x >= 0
    t, s = ca.if_else(positive, x, -x), ca.if_else(positive, 0, x)
    return ca.if_else(positive, _erfcx(t), 2 * ca.exp(s * s) - _erfcx(t))


def _erfcx(t: Any) -> Any:
    """exp(t^2) erfc(t) for t >= 0, by Clenshaw's recurrence."""
    mapped = (t - 3.75) / (t + 3.75)
    coefficients = _scaled_erfcx()
    ahead, current = 0.0, coefficients[-1]
    for coefficient in reversed(coefficients[1:-1]):
        ahead, current = current, coefficient + 2 * mapped * current - ahead
    return (coefficients[0] + mapped * current - ahead) / (1 + 2 * t)


@functools.cache
def _scaled_erfcx() -> list[float]:
    """Chebyshev coefficients of (1 + 2t) erfcx(t), t >= 0, in (t - 3.75) / (t + 3.75).

    After Shepherd and Laframboise, Chebyshev approximation of (1 + 2x) exp(x^2) erfc x (1981).
    """

    def scaled(mapped: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = 3.75 * (1 + mapped) / (1 - mapped)
            return np.where(mapped < 1, (1 + 2 * t) * special.erfcx(t), 2 / math.sqrt(math.pi))

    return list(np.polynomial.chebyshev.chebinterpolate(scaled, 40))


@elementwise("special_ndtr")
def ndtr(x: Any) -> Any:
    return erfc(-x / math.sqrt(2)) / 2


@elementwise("special_log_ndtr")
def log_ndtr(x: Any) -> Any:
    """log Phi(x): from erf where Phi is not small, else -x^2/2 + log(erfcx(-x / sqrt 2) / 2)."""
    tail = x < -1
    body = ca.log(_cdf((1 - tail) * x))
    t = ca.if_else(tail, -x, 1) / math.sqrt(2)
    return ca.if_else(tail, -t * t + ca.log(_erfcx(t) / 2), body)


@lowers("xlogy", "special_xlogy")
def xlogy(call: Call, x: Any, y: Any) -> Any:
    return _times_log(call, x, y, ca.log, 1)


@lowers("special_xlog1py")
def xlog1py(call: Call, x: Any, y: Any) -> Any:
    return _times_log(call, x, y, ca.log1p, 0)


@lowers("special_entr")
def entr(call: Call, x: Any) -> Any:
    negative = column(x) < 0
    return ca.if_else(negative, -math.inf, -_times_log(call, x, x, ca.log, 1))


def _times_log(call: Call, factor: Any, argument: Any, log: Function, root: float) -> Any:
    """factor * log(argument), zero where that is 0 log(0); ``root`` is that of ``log``, one above where it ends.

    The slope in a factor that varies is minus infinity there. A factor that is a parameter and zero leaves nothing to
    differentiate: 0 log(y) is zero for every y.
    """
    x, y = call.columns(factor, argument)
    undefined = ca.logic_and(x == 0, y <= root - 1)
    product = x * log(ca.if_else(undefined, root, y))
    if not isinstance(factor, Tensor) or not factor.varies:
        return product
    # A square root is zero there as well, and infinitely steep. Elsewhere it is that of 1, with finite derivatives, so that
    # nothing of them remains times zero.
    return product - undefined * ca.sqrt(ca.if_else(undefined, x, 1))


# ---------------------------------------------------------------------------- kinks


def safe_sqrt(x: Any) -> Any:
    """Square root of x >= 0 whose derivatives at zero are zero, as torch has them for norms."""
    zero = x == 0
    return (1 - zero) * ca.sqrt(x + zero)


def nearest(x: Any) -> Any:
    """Distance to the nearest integer, with sign."""
    return x - ca.floor(x + 0.5)


def truncate(x: Any) -> Any:
    return ca.if_else(x >= 0, ca.floor(x), ca.ceil(x))


def _round(x: Any) -> Any:
    up = ca.floor(x + 0.5)
    halfway_to_odd = ca.logic_and(up == x + 0.5, up / 2 != ca.floor(up / 2))
    return up - halfway_to_odd


def _leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    return (negative_slope + (1 - negative_slope) * (x > 0)) * x


# Each function with what is zero at its kinks.
AT_ZERO: dict[str, Function] = {
    "abs": ca.fabs,
    "leaky_relu": _leaky_relu,
    "relu": lambda x: (x > 0) * x,
    "sgn": ca.sign,
    "sign": ca.sign,
}
AT_STEPS: dict[str, tuple[Function, Function]] = {
    "ceil": (ca.ceil, nearest),
    "floor": (ca.floor, nearest),
    "round.default": (_round, lambda x: nearest(x + 0.5)),
}
WHERE_EQUAL: dict[str, Function] = {
    # Whatever is made of a comparison, a selection by `where` or a sum, it steps where x = y.
    "eq": operator.eq,
    "fmax": lambda x, y: ca.if_else(x >= y, x, y),
    "fmin": lambda x, y: ca.if_else(x <= y, x, y),
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "max.other": ca.fmax,
    "maximum": ca.fmax,
    "min.other": ca.fmin,
    "minimum": ca.fmin,
    "ne": operator.ne,
}


def _register_kinked(name: str, function: Function, residual: Function) -> None:
    @lowers(name)
    def rule(call: Call, *operands: Any, **options: Any) -> Any:
        columns = call.columns(*operands)
        call.kink(residual(*columns))
        return function(*columns, **options)


for _name, _function in AT_ZERO.items():
    _register_kinked(_name, _function, lambda x, *_: x)
for _name, (_function, _residual) in AT_STEPS.items():
    _register_kinked(_name, _function, _residual)
for _name, _function in WHERE_EQUAL.items():
    _register_kinked(_name, _function, operator.sub)


@lowers("elu")
def elu(call: Call, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    (x,) = call.columns(x)
    if alpha * input_scale != 1:
        call.kink(x)
    return scale * ((x > 0) * x + alpha * ca.expm1(input_scale * (x <= 0) * x))


@lowers("hardtanh")
def hardtanh(call: Call, x: Any, low: float = -1, high: float = 1) -> Any:
    (x,) = call.columns(x)
    call.kink(x - low)
    call.kink(x - high)
    below, above = x <= low, x >= high
    return below * low + above * high + (1 - below - above) * x


@lowers("clamp", "clip")
def clamp(call: Call, x: Any, min: Any = None, max: Any = None) -> Any:
    x, low, high = call.columns(x, min, max)
    result = x
    if low is not None:
        call.kink(x - low)
        result = ca.if_else(x < low, low, result)
    if high is not None:
        call.kink(x - high)
        above = x > high if low is None else ca.logic_or(x > high, low > high)
        result = ca.if_else(above, high, result)
    return result


@lowers("clamp_min")
def clamp_min(call: Call, x: Any, low: Any) -> Any:
    return clamp(call, x, low, None)


@lowers("clamp_max")
def clamp_max(call: Call, x: Any, high: Any) -> Any:
    return clamp(call, x, None, high)


@lowers("hypot")
def hypot(call: Call, x: Any, y: Any) -> Any:
    x, y = call.columns(x, y)
    result = safe_sqrt(x * x + y * y)
    call.kink(result)
    return result


@lowers("trunc")
def trunc(call: Call, x: Any) -> Any:
    return _truncated(call, *call.columns(x))


def _truncated(call: Call, x: Any) -> Any:
    """Towards zero, which steps at every whole number but zero."""
    call.kink(ca.if_else(ca.fabs(x) < 0.5, 1, nearest(x)))
    return truncate(x)


@lowers("frac")
def frac(call: Call, x: Any) -> Any:
    return column(x) - trunc(call, x)


@lowers("div")
def div(call: Call, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    x, y = call.columns(x, y)
    if rounding_mode is None:
        return x / y
    if rounding_mode == "trunc":
        return _truncated(call, x / y)
    call.kink(nearest(x / y))
    return ca.floor((x - _floored(x, y)) / y + 0.5)


@lowers("remainder")
def remainder(call: Call, x: Any, y: Any) -> Any:
    x, y = call.columns(x, y)
    call.kink(nearest(x / y))
    return _floored(x, y)


def _floored(x: Any, y: Any) -> Any:
    """x modulo y with the sign of y, from C's fmod, which is exact: the quotient 1 / 0.1 rounds up to 10."""
    rest = ca.fmod(x, y)
    return rest + y * ca.logic_and(rest != 0, (rest < 0) != (y < 0))


@lowers("fmod")
def fmod(call: Call, x: Any, y: Any) -> Any:
    x, y = call.columns(x, y)
    _truncated(call, x / y)  # steps where that does
    return ca.fmod(x, y)


@elementwise("isnan")
def isnan(x: Any) -> Any:
    return ca.logic_not(x <= math.inf)


@elementwise("isinf")
def isinf(x: Any) -> Any:
    return ca.fabs(x) >= math.inf


@elementwise("isfinite")
def isfinite(x: Any) -> Any:
    return ca.fabs(x) < math.inf


# ------------------------------------------------------------- losses, smooth in their first derivative


@lowers("huber_loss")
def huber_loss(call: Call, x: Any, target: Any, reduction: int = 1, delta: float = 1) -> Any:
    residual = _difference(x, target)
    clipped = ca.fmax(-delta, ca.fmin(residual, delta))
    return _reduced(clipped * (residual - clipped / 2), reduction)


@lowers("smooth_l1_loss")
def smooth_l1_loss(call: Call, x: Any, target: Any, reduction: int = 1, beta: float = 1) -> Any:
    if beta == 0:
        residual = _difference(x, target)
        call.kink(residual)
        return _reduced(ca.fabs(residual), reduction)
    return huber_loss(call, x, target, reduction, beta) / beta


@lowers("mse_loss")
def mse_loss(call: Call, x: Any, target: Any, reduction: int = 1) -> Any:
    return _reduced(_difference(x, target) ** 2, reduction)


@lowers("binary_cross_entropy_with_logits")
def bce_with_logits(
    call: Call, x: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Any:
    shape = tuple(torch.broadcast_shapes(x.shape, target.shape))
    logit, positive = broadcast(x, shape), broadcast(target, shape)
    share = 1 if pos_weight is None else 1 + (broadcast(pos_weight, shape) - 1) * positive
    losses = (1 - positive) * logit - share * _log_sigmoid(logit)
    return _reduced(losses if weight is None else broadcast(weight, shape) * losses, reduction)


def _difference(x: Any, target: Any) -> Any:
    shape = torch.broadcast_shapes(x.shape, target.shape)
    return broadcast(x, shape) - broadcast(target, shape)


def _reduced(losses: Any, reduction: int) -> Any:
    """0 keeps the entries, 1 is their mean, 2 their sum."""
    if reduction == 0:
        return losses
    return ca.sum1(losses) / (losses.numel() if reduction == 1 else 1)


# ---------------------------------------------------------------------------- truth values

LOGICAL: dict[str, Function] = {
    "and": ca.logic_and,
    "not": ca.logic_not,
    "or": ca.logic_or,
    "xor": lambda x, y: ca.logic_not(x) != ca.logic_not(y),
}
for _name, _function in LOGICAL.items():
    elementwise(f"logical_{_name}", f"bitwise_{_name}")(_function)


@lowers("to", "_to_copy", "type_as")
def convert(call: Call, x: Tensor, *_: Any, **__: Any) -> Any:
    if call.output.dtype.is_floating_point or x.dtype is torch.bool:
        return x.column
    return x.column != 0 if call.output.dtype is torch.bool else trunc(call, x)
