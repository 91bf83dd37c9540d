"""How many tokens should be drafted, given how many sequences are decoded together?

Verifying more tokens costs nothing while reading the weights takes longer than the arithmetic, and
costs in full from there on. With the batch the second comes earlier, so the best number of draft
tokens falls. Here are the time of a round by batch and draft length, and the length that is best.
"""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import (
    AT_LEAST_ONE,
    NON_NEGATIVE,
    POSITIVE,
    as_floats,
    is_traced,
    require,
)
from .accepted_length import as_one_dtype
from .hardware import Chip, Stack, check_chip, check_stack, pass_seconds, smooth_maximum
from .shapes import BFLOAT16, Formats, Shape

# The largest draft length that is looked at where the times do not say how far they reach.
_MAX_GAMMA = 32
_BISECTIONS = 60  # of an interval of two tokens: to the last digit of float64


class AnyRoundTimes(Protocol):
    """Any NamedTuple with these three methods is a model of times."""

    def draft(self, batch: Array) -> Array:
        """Seconds to draft one more token for every sequence."""
        ...

    def verify(self, batch: Array, gamma: Array) -> Array:
        """Seconds of the target's pass over gamma + 1 tokens of every sequence."""
        ...

    def check(self) -> None:
        """Raises ValueError if a field is wrong."""
        ...


class LinearTimes(NamedTuple):
    """Verification takes a fixed time and a time for every drafted token, by batch.

    Between the batch sizes times are interpolated; below the first they are constant, beyond the
    last they rise on as they did before it.
    """

    batches: ArrayLike  # [n] batch sizes, positive, rising; one size stands for all
    fixed_seconds: ArrayLike  # [n] plain decoding step of the target, b in a_b s + b
    token_seconds: ArrayLike  # [n] what every drafted token adds to it, a_b
    draft_seconds: ArrayLike  # [n] one draft step

    def draft(self, batch: Array) -> Array:
        """The draft step, interpolated."""
        return _interpolate(batch, self.batches, self.draft_seconds)

    def verify(self, batch: Array, gamma: Array) -> Array:
        """The line at this batch size."""
        fixed = _interpolate(batch, self.batches, self.fixed_seconds)
        fixed, slope, gamma = as_floats(
            fixed, _interpolate(batch, self.batches, self.token_seconds), gamma
        )
        return fixed + slope * gamma

    def check(self) -> None:
        """Raises ValueError unless there is a positive time for every batch size."""
        _check_knots("LinearTimes.batches", self.batches, POSITIVE)
        for name, test in zip(
            self._fields[1:], (POSITIVE, NON_NEGATIVE, NON_NEGATIVE), strict=True
        ):
            _check_shape(f"LinearTimes.{name}", getattr(self, name), np.shape(self.batches))
            require(f"LinearTimes.{name}", getattr(self, name), test)


class Roofline(NamedTuple):
    """One model's pass over some tokens: flat while weights are read, then rising with each."""

    weight_seconds: ArrayLike  # reading the weights once, positive
    token_seconds: ArrayLike  # arithmetic of one token of one sequence, positive
    cache_seconds: ArrayLike = 0.0  # reading the cache of one sequence
    fixed_seconds: ArrayLike = 0.0  # launches and waits that nothing hides
    sharpness: ArrayLike = 8.0  # of the smooth maximum: 1 adds both up, infinity is the hinge

    def seconds(self, batch: Array, rows: Array) -> Array:
        """Fixed time and the smooth maximum of memory and arithmetic."""
        weight, token, cache, fixed, sharpness, batch, rows = as_floats(*self, batch, rows)
        return fixed + smooth_maximum(weight + batch * cache, token * batch * rows, sharpness)


class RooflineTimes(NamedTuple):
    """Draft and target as rooflines: a round takes gamma passes of one and one of the other."""

    target_pass: Roofline
    draft_pass: Roofline

    def draft(self, batch: Array) -> Array:
        """A pass over one token of every sequence."""
        return self.draft_pass.seconds(batch, jnp.ones_like(batch))

    def verify(self, batch: Array, gamma: Array) -> Array:
        """A pass over gamma + 1 tokens of every sequence."""
        return self.target_pass.seconds(batch, gamma + 1)

    def check(self) -> None:
        """Raises ValueError unless weights and arithmetic take time."""
        for name, roofline in zip(self._fields, self, strict=True):
            for field in ("weight_seconds", "token_seconds"):
                require(f"{name}.{field}", getattr(roofline, field), POSITIVE)
            for field in ("cache_seconds", "fixed_seconds"):
                require(f"{name}.{field}", getattr(roofline, field), NON_NEGATIVE)
            require(f"{name}.sharpness", roofline.sharpness, AT_LEAST_ONE)


class HardwareTimes(NamedTuple):
    """The times that shapes, a chip and its software predict, by `pass_seconds`."""

    target_shape: Shape
    draft_shape: Shape
    chip: Chip
    stack: Stack
    context: ArrayLike  # tokens of each sequence in the cache
    tensor_parallel: ArrayLike = 1
    target_formats: Formats = BFLOAT16
    draft_formats: Formats = BFLOAT16

    def draft(self, batch: Array) -> Array:
        """The draft's pass over one token of every sequence."""
        return self._seconds(self.draft_shape, batch, jnp.ones_like(batch), self.draft_formats)

    def verify(self, batch: Array, gamma: Array) -> Array:
        """The target's pass over gamma + 1 tokens of every sequence, and the host's turn."""
        seconds, host = as_floats(
            self._seconds(self.target_shape, batch, gamma + 1, self.target_formats),
            self.stack.host_seconds,
        )
        return seconds + host

    def check(self) -> None:
        """Raises ValueError unless chip, stack and context are in range."""
        check_chip(self.chip, self.target_formats)
        check_chip(self.chip, self.draft_formats)
        check_stack(self.stack)
        require("HardwareTimes.context", self.context, NON_NEGATIVE)
        require("HardwareTimes.tensor_parallel", self.tensor_parallel, AT_LEAST_ONE)

    def _seconds(self, shape: Shape, batch: Array, rows: Array, formats: Formats) -> Array:
        return pass_seconds(
            shape,
            self.chip,
            batch,
            rows,
            self.context,
            self.tensor_parallel,
            formats,
            stack=self.stack,
        )


class MeasuredTimes(NamedTuple):
    """Times measured on a grid of batch sizes and draft lengths, interpolated linearly in both.

    Below the smallest batch times are constant; beyond the largest they rise on as before it.
    """

    batches: ArrayLike  # [n] batch sizes, positive, rising
    gammas: ArrayLike  # [m] draft lengths, rising from 0, which is plain decoding
    verify_seconds: ArrayLike  # [n, m] the target's pass over gamma + 1 tokens of every sequence
    draft_seconds: ArrayLike  # [n] one draft step; 0 where verify_seconds is of whole rounds

    def draft(self, batch: Array) -> Array:
        """The draft step, interpolated."""
        return _interpolate(batch, self.batches, self.draft_seconds)

    def verify(self, batch: Array, gamma: Array) -> Array:
        """The grid, interpolated."""
        seconds, batch, gamma = as_one_dtype(self.verify_seconds, batch, gamma)
        batch, gamma = as_floats(batch, gamma)
        row, below = _segment(batch, self.batches)
        column, left = _segment(gamma, self.gammas)
        ends = []
        for step in (0, 1):
            start = seconds[row + step, column]
            rise = seconds[row + step, jnp.minimum(column + 1, seconds.shape[1] - 1)] - start
            ends.append(start + left * _rise(left, rise))
        return ends[0] + below * _rise(below, ends[1] - ends[0])

    def check(self) -> None:
        """Raises ValueError unless there is a positive time for every point of the grid."""
        _check_knots("MeasuredTimes.batches", self.batches, POSITIVE)
        _check_knots("MeasuredTimes.gammas", self.gammas, NON_NEGATIVE)
        if not is_traced(self.gammas) and np.asarray(self.gammas)[0] != 0:
            raise ValueError(
                f"MeasuredTimes.gammas begin at {np.asarray(self.gammas)[0]:g} and must begin at "
                "0, plain decoding, with which every length is compared"
            )
        shape = (*np.shape(self.batches), *np.shape(self.gammas))
        _check_shape("MeasuredTimes.verify_seconds", self.verify_seconds, shape)
        _check_shape("MeasuredTimes.draft_seconds", self.draft_seconds, shape[:1])
        require("MeasuredTimes.verify_seconds", self.verify_seconds, POSITIVE)
        require("MeasuredTimes.draft_seconds", self.draft_seconds, NON_NEGATIVE)
