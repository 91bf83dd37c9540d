"""What does the software make of a chip? Efficiencies and overheads from measured pass times."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._inputs import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, float64_on_host, require
from ._least_squares import Fit, Model, host_numbers, range_of, solve, value_and_jacobian
from .hardware import Chip, Stack, check_chip, check_stack, pass_time
from .shapes import BFLOAT16, Formats, Shape

# Measured times, and the formula, are off by some percent. A combination of overheads that such
# errors move by all of its value was not measured, and a fit that needs it is refused.
_THRESHOLD = 0.05
# What is not fitted and not given.
_START = Stack(0.8, 0.7, 0.0, 0.0, 0.0, 0.0, 8.0, 0.0)
_PASS_FIELDS = ("batch", "rows", "context", "tensor_parallel")


class TimedPass(NamedTuple):
    """One measured forward pass."""

    shape: Shape
    seconds: float
    batch: float = 1  # sequences
    rows: float = 1  # tokens of each in the pass
    context: float = 0  # tokens of each in the cache before it
    tensor_parallel: float = 1  # chips that share every layer
    formats: Formats = BFLOAT16


def fit_pass_times(
    passes: Sequence[TimedPass],
    chip: Chip,
    free: Sequence[str] | None = None,
    stack: Stack | None = None,
    groups: Sequence[Any] | None = None,
) -> Fit:
    """Returns the stack whose `pass_seconds` measured passes follow best.

    Minimises the squares of `ln(predicted / measured seconds)`, relative errors. Overheads stay at
    least 0; `at_bound` names those that the passes would have below. Quantised weights reach
    another share of the memory's speed than 16-bit ones: fit them by themselves, with the overheads
    of the 16-bit fit (`free=["memory_efficiency"], stack=fit.result`).

    Args:
      passes: the measurements; a decoding step has `rows=1`, verifying gamma + 1, a prompt as many
        rows as tokens.
      chip: its peaks.
      free: names of the fields of `Stack` to be fitted. By default `memory_efficiency` and
        `layer_seconds`; `collective_seconds` if a pass ran on several chips; `compute_efficiency`
        if, at the chip's peaks, some pass's arithmetic takes longer than its bytes.
      stack: values of the other fields; by default no overheads, 0.8 of the memory's and 0.7 of the
        arithmetic's peak, overlap 8.
      groups: a label per pass; the held-out error is of passes predicted without their group, for
        example without their model. By default every pass is a group.

    Returns:
      The fit, whose `result` is a `Stack`. As many passes as free fields are enough, but then
      nothing says how large the errors are.

    Raises:
      ValueError: an unknown field, a number outside its range or not finite, too few passes, or
        passes that do not determine the fields: for example of one width, where every layer brings
        the same bytes, so that time per layer and time per byte move together.

    Example:
      >>> from jaxsd import costmodel
      >>> a100 = costmodel.named_chip("a100-80gb")
      >>> eager = costmodel.Chip(*(1e30 for _ in a100))  # launches hide all else, so no peaks
      >>> wide = costmodel.Shape(32000, 2560, 12, 20, 20, 128, 9280, False)
      >>> deep = costmodel.Shape(32000, 2048, 24, 16, 16, 128, 5504, False)
      >>> passes = [costmodel.TimedPass(wide, 6.69e-3), costmodel.TimedPass(deep, 13.13e-3)]
      >>> fit = costmodel.fit_pass_times(passes, eager, ["fixed_seconds", "layer_seconds"])
      >>> f"{1e3 * fit.result.fixed_seconds:.3f} ms, {1e3 * fit.result.layer_seconds:.3f} ms"
      '0.250 ms, 0.537 ms'

    Source: the measurements of the example are Yan et al.'s, arXiv 2402.01528.
    """
    stack = _START if stack is None else stack
    data, seconds = _as_arrays(passes, chip)
    check_stack(stack)
    names = _default_free(data) if free is None else tuple(dict.fromkeys(free))
    if not names or any(name not in _KINDS for name in names):
        raise ValueError(f"free={list(names)} must be names among {', '.join(_KINDS)}")
    columns = [Stack._fields.index(name) for name in names]
    given = np.array([float(value) for value in stack])

    def fields(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The free fields, and how each moves with its unknown."""
        pairs = [_field(name, u) for name, u in zip(names, unknowns, strict=True)]
        values, slopes = zip(*pairs, strict=True)
        return np.array(values), np.array(slopes)

    def predict(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The logarithm of every pass's seconds."""
        everything = given.copy()
        everything[columns], slopes = fields(unknowns)
        value, jacobian = _LOG_SECONDS(everything, *data)
        return value, jacobian[:, columns] * slopes

    def report(unknowns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The fields, and a Jacobian without mixed terms."""
        values, slopes = fields(unknowns)
        return values, np.diag(slopes)

    def make_result(unknowns: np.ndarray) -> Stack:
        """The stack with its fitted fields."""
        values = map(float, fields(unknowns)[0])
        return stack._replace(**dict(zip(names, values, strict=True)))

    model = Model(
        evaluate=predict,
        measured=np.log(seconds),
        starts=_starts(names, seconds, data[0]),
        lower=np.array([_KINDS[name].lower for name in names]),
        upper=np.array([_KINDS[name].upper for name in names]),
        report=report,
        names=names,
        is_relative=np.array([name in _RELATIVE for name in names]),
        advice={name: kind.advice for name, kind in _KINDS.items()},
        threshold=_THRESHOLD,
        to_measurement=np.exp,
    )
    shape, _, *numbers, _ = data
    ranges = {name: getattr(shape, name) for name in ("n_layers", "d_model")}
    ranges |= dict(zip(_PASS_FIELDS, numbers, strict=True))
    ranges = {name: range_of(x) for name, x in ranges.items()}
    return solve(model, make_result, ranges, groups, spare_rows=0)


class _Kind(NamedTuple):
    """How a field of a stack is searched."""

    lower: float
    upper: float
    advice: str  # the passes that would tell it from others


_EFFICIENCIES = ("memory_efficiency", "compute_efficiency")
_RELATIVE = (*_EFFICIENCIES, "overlap")
_LOW, _HIGH = np.log(1e-4), np.log(1e2)  # efficiencies are searched as logarithms
_KINDS = {
    "memory_efficiency": _Kind(_LOW, _HIGH, "shapes of another width, with other bytes per layer"),
    "compute_efficiency": _Kind(_LOW, _HIGH, "passes of many tokens, as of a prompt"),
    "fixed_seconds": _Kind(0.0, np.inf, "shapes of few layers and few bytes"),
    "layer_seconds": _Kind(0.0, np.inf, "shapes of another depth that move the same bytes"),
    "collective_seconds": _Kind(0.0, np.inf, "passes on one chip and on several"),
    "hop_seconds": _Kind(0.0, np.inf, "passes on two chips and on more"),
    # Searched as 1 / overlap; above 100 it cannot be told from perfect.
    "overlap": _Kind(0.01, 1.0, "passes whose arithmetic takes as long as their bytes"),
}


def _field(name: str, unknown: float) -> tuple[float, float]:
    """A field from the coordinate in which it is searched, and its slope in it."""
    if name in _EFFICIENCIES:
        return np.exp(unknown), np.exp(unknown)
    if name == "overlap":
        return 1 / unknown, -1 / unknown**2
    return unknown, 1.0


def _starts(names: Sequence[str], seconds: np.ndarray, shape: Shape) -> np.ndarray:
    """[2, p] Most of the time for bytes, and most of it for overheads."""
    typical = float(np.median(seconds))
    layers = float(np.median(shape.n_layers))
    starts = []
    for overhead, log_efficiency in ((0.1, np.log(0.7)), (0.9, np.log(0.3))):
        per_layer = overhead * typical / layers
        values = {
            "fixed_seconds": 0.1 * overhead * typical,
            "layer_seconds": per_layer,
            "collective_seconds": 0.1 * per_layer,
            "hop_seconds": 0.01 * per_layer,
            "overlap": 0.2,
        }
        starts.append([values.get(name, log_efficiency) for name in names])
    return np.array(starts)


def _as_arrays(passes: Sequence[TimedPass], chip: Chip) -> tuple[tuple[Any, ...], np.ndarray]:
    """The arguments of `pass_time` with an axis of passes, and the seconds."""
    passes = [TimedPass(*one) for one in passes]
    if not passes:
        raise ValueError("passes is empty: there is nothing to fit")
    seconds, *numbers = (
        host_numbers(name, [getattr(one, name) for one in passes])
        for name in ("seconds", *_PASS_FIELDS)
    )
    for name, values in zip(("seconds", "batch", "rows"), (seconds, *numbers), strict=False):
        require(name, values, POSITIVE)
    require("context", numbers[2], NON_NEGATIVE)
    require("tensor_parallel", numbers[3], AT_LEAST_ONE)
    formats = Formats(
        *(
            host_numbers(f"Formats.{field}", [getattr(one.formats, field) for one in passes])
            for field in Formats._fields
        )
    )
    check_chip(chip, formats)
    return (_stack_shapes([one.shape for one in passes]), chip, *numbers, formats), seconds


def _stack_shapes(shapes: Sequence[Shape]) -> Shape:
    """The shapes as one, with an axis of shapes."""
    if any(shape.embedding_dim is not None for shape in shapes):
        # None, no projections, is a token table as wide as the layers, less the projections that
        # any width brings with it.
        shapes = [
            shape
            if shape.embedding_dim is not None
            else shape._replace(
                embedding_dim=shape.d_model,
                other_parameters=shape.other_parameters - 2 * shape.d_model**2,
            )
            for shape in shapes
        ]
    columns = zip(*shapes, strict=True)
    return Shape(
        *(
            None if column[0] is None else host_numbers(f"Shape.{name}", column)
            for name, column in zip(Shape._fields, columns, strict=True)
        )
    )


def _default_free(data: tuple[Any, ...]) -> tuple[str, ...]:
    """What passes of these kinds usually determine."""
    shape, chip, batch, rows, context, tensor_parallel, formats = data
    with float64_on_host():
        peak = _peak_times(shape, chip, batch, rows, context, tensor_parallel, formats)
        compute, memory = jax.device_get(peak)
    names = ["memory_efficiency", "layer_seconds"]
    if (tensor_parallel > 1).any():
        names.append("collective_seconds")
    if (compute > memory).any():
        names.append("compute_efficiency")
    return tuple(names)


@jax.jit
def _peak_times(*data: Any) -> tuple[Array, Array]:
    """Seconds of arithmetic and of bytes if the chip did both at its peaks."""
    peak = pass_time(*data, stack=_START._replace(memory_efficiency=1.0, compute_efficiency=1.0))
    return peak.compute_seconds, peak.memory_seconds


def _log_seconds(fields: Array, *data: Any) -> Array:
    """Logarithm of the seconds of every pass, of the fields of a stack."""
    return jnp.log(pass_time(*data, stack=Stack(*fields)).seconds)


_LOG_SECONDS = value_and_jacobian(_log_seconds)
