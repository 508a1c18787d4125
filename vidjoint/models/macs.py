"""How many operations a model takes, counted without running or compiling it."""

import math
from collections.abc import Callable

import jax


def macs(function: Callable, *args) -> int:
    """Multiply-accumulate operations of all matrix products and convolutions in `function(*args)`, counted from its jaxpr.

    Arguments may be abstract. Of a `cond` the costliest branch counts; a `while` loop's body counts once, for nobody knows its number of turns.
    """
    return _macs(jax.make_jaxpr(function)(*args).jaxpr)


def _macs(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        inner = [_macs(jaxpr) for jaxpr in _inner_jaxprs(params)]
        if kind == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        elif kind == "cond":
            total += max(inner)
        else:  # a scan, or a wrapper such as jit, remat or custom_vjp
            total += params.get("length", 1) * sum(inner) if kind == "scan" else sum(inner)
    return total


def _inner_jaxprs(params: dict) -> list:
    """The programs among an equation's parameters."""
    values = (item for value in params.values() for item in (value if isinstance(value, tuple | list) else [value]))
    jaxprs = (getattr(value, "jaxpr", value) for value in values)
    return [jaxpr for jaxpr in jaxprs if hasattr(jaxpr, "eqns")]
