"""How long does a round of speculation take, by batch and by draft length?

A round drafts gamma tokens one after the other and then verifies them in one pass of the target,
for all sequences of the batch at once. With gamma = 0 it is a step of plain decoding.
"""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, as_floats, is_traced, require
from .hardware import Chip, Stack, check_chip, check_stack, pass_seconds, smooth_maximum
from .length_curves import as_one_dtype, in_dtype_of
from .shapes import BFLOAT16, Formats, Shape


class AnyRoundTimes(Protocol):
    """Any NamedTuple with these three methods is a model of times."""

    def draft(self, batch: Array) -> Array:
        """Seconds to draft one more token for every sequence."""
        ...

    def verify(self, batch: Array, gamma: Array) -> Array:
        """Seconds of the target's pass over gamma + 1 tokens of every sequence, host included."""
        ...

    def check(self) -> None:
        """Raises ValueError if a field is wrong."""
        ...


class LinearTimes(NamedTuple):
    """Verification takes a fixed time and a time for every drafted token: lines, one per batch.

    Between batch sizes they are interpolated; below the first they stay as there, beyond the last
    they rise on as before it.
    """

    batches: ArrayLike  # [n] batch sizes, positive, rising; one size stands for all
    fixed_seconds: ArrayLike  # [n] plain decoding step of the target, positive
    token_seconds: ArrayLike  # [n] what every drafted token adds to it
    draft_seconds: ArrayLike  # [n] one draft step

    def draft(self, batch: Array) -> Array:
        """The draft step, interpolated."""
        return _interpolate(batch, self.batches, self.draft_seconds)

    def verify(self, batch: Array, gamma: Array) -> Array:
        """The line of this batch size."""
        fixed = _interpolate(batch, self.batches, self.fixed_seconds)
        slope = _interpolate(batch, self.batches, self.token_seconds)
        fixed, slope, gamma = as_floats(fixed, slope, gamma)
        return fixed + slope * gamma

    def check(self) -> None:
        """Raises ValueError unless there is a time for every batch size."""
        _check_knots("LinearTimes.batches", self.batches, POSITIVE)
        tests = (POSITIVE, NON_NEGATIVE, NON_NEGATIVE)
        for field, test in zip(self._fields[1:], tests, strict=True):
            _check_shape(f"LinearTimes.{field}", getattr(self, field), np.shape(self.batches))
            require(f"LinearTimes.{field}", getattr(self, field), test)


class Roofline(NamedTuple):
    """One model's pass: as long as reading its weights, or as its arithmetic if that is longer."""

    weight_seconds: ArrayLike  # reading the weights once, positive
    token_seconds: ArrayLike  # arithmetic of one token of one sequence, positive
    cache_seconds: ArrayLike = 0.0  # reading the cache of one sequence
    fixed_seconds: ArrayLike = 0.0  # launches and waits that nothing hides
    sharpness: ArrayLike = 8.0  # of the smooth maximum: 1 adds both, infinity is a hinge

    def seconds(self, batch: Array, rows: Array) -> Array:
        """Fixed time and the smooth maximum of memory and arithmetic."""
        weight, token, cache, fixed, sharpness, batch, rows = as_floats(*self, batch, rows)
        return fixed + smooth_maximum(weight + batch * cache, token * batch * rows, sharpness)


class RooflineTimes(NamedTuple):
    """Flat, then linear: the verification of few tokens is free, that of many is not."""

    target_pass: Roofline
    draft_pass: Roofline

    def draft(self, batch: Array) -> Array:
        """A pass of the draft over one token of every sequence."""
        return self.draft_pass.seconds(batch, jnp.ones_like(batch))

    def verify(self, batch: Array, gamma: Array) -> Array:
        """A pass of the target over gamma + 1 tokens of every sequence."""
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
    """What shapes, a chip and its software predict, by `pass_seconds`."""

    target: Shape
    draft_model: Shape
    chip: Chip
    stack: Stack
    context: ArrayLike  # tokens of each sequence in the cache
    tensor_parallel: ArrayLike = 1
    target_formats: Formats = BFLOAT16
    draft_formats: Formats = BFLOAT16

    def draft(self, batch: Array) -> Array:
        """A pass of the draft over one token of every sequence."""
        return self._seconds(self.draft_model, batch, jnp.ones_like(batch), self.draft_formats)

    def verify(self, batch: Array, gamma: Array) -> Array:
        """A pass of the target over gamma + 1 tokens of every sequence, and the host's turn."""
        seconds = self._seconds(self.target, batch, gamma + 1, self.target_formats)
        seconds, host = as_floats(seconds, self.stack.host_seconds)
        return seconds + host

    def check(self) -> None:
        """Raises ValueError unless chip, stack and context are in range."""
        for formats in (self.target_formats, self.draft_formats):
            check_chip(self.chip, formats)
        check_stack(self.stack)
        require("HardwareTimes.context", self.context, NON_NEGATIVE)
        require("HardwareTimes.tensor_parallel", self.tensor_parallel, AT_LEAST_ONE)

    def _seconds(self, shape: Shape, batch: Array, rows: Array, formats: Formats) -> Array:
        """The time of one pass on this chip."""
        degree, stack = self.tensor_parallel, self.stack
        return pass_seconds(
            shape, self.chip, batch, rows, self.context, degree, formats, stack=stack
        )


class MeasuredTimes(NamedTuple):
    """Times measured on a grid of batch sizes and draft lengths, interpolated linearly in both.

    Below the smallest batch they stay as there; beyond the largest batch, and beyond the largest
    length, they rise on as before it.
    """

    batches: ArrayLike  # [n] batch sizes, positive, rising
    gammas: ArrayLike  # [m] draft lengths, rising from 0, which is plain decoding
    verify_seconds: ArrayLike  # [n, m] the target's pass over gamma + 1 tokens of every sequence
    draft_seconds: ArrayLike  # [n] one draft step; 0 where verify_seconds are of whole rounds

    def draft(self, batch: Array) -> Array:
        """The draft step, interpolated."""
        return _interpolate(batch, self.batches, self.draft_seconds)

    def verify(self, batch: Array, gamma: Array) -> Array:
        """The grid, interpolated."""
        batch, gamma = as_floats(batch, gamma)
        batches, gammas, grid, batch, gamma = as_one_dtype(*self[:3], batch, gamma)
        low, high, below = _segment(batch, batches)
        left, right, beside = _segment(gamma, gammas)
        at_low = _between(grid[low, left], grid[low, right], beside)
        at_high = _between(grid[high, left], grid[high, right], beside)
        return _between(at_low, at_high, below)

    def check(self) -> None:
        """Raises ValueError unless there is a time for every point of the grid."""
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


def round_seconds(times: AnyRoundTimes, batch: ArrayLike, gamma: ArrayLike) -> Array:
    """Returns the time of one round for all sequences of a batch.

    Continuous in both, and at `gamma=0` a step of plain decoding.

        T(b, gamma) = gamma t_draft(b) + t_verify(b, gamma)

    Args:
      times: `LinearTimes`, `RooflineTimes`, `HardwareTimes`, `MeasuredTimes` or your own.
      batch: b, sequences decoded together, positive.
      gamma: draft tokens of each per round, at least 0; a real number interpolates.

    Returns:
      Seconds, in the broadcast shape of batch and gamma.

    Raises:
      ValueError: a field of the times or an argument is outside its range, NaN or of the wrong
        shape.

    Example:
      >>> from jaxsd import costmodel
      >>> times = costmodel.RooflineTimes(
      ...     costmodel.Roofline(weight_seconds=10e-3, token_seconds=0.1e-3),
      ...     costmodel.Roofline(weight_seconds=0.2e-3, token_seconds=0.002e-3),
      ... )
      >>> for batch in (1, 32):  # verifying is free for one sequence, not for 32
      ...     print([f"{costmodel.round_seconds(times, batch, gamma):.4f}" for gamma in (0, 4)])
      ['0.0100', '0.0108']
      ['0.0100', '0.0168']

    Source: Su et al., arXiv 2310.18813 (lines by batch); Leviathan et al., arXiv 2211.17192,
    section 3.3 (gamma draft steps and one pass of the target).
    """
    times.check()
    require("batch", batch, POSITIVE)
    require("gamma", gamma, NON_NEGATIVE)
    return checked_round_seconds(times, *as_floats(*in_dtype_of(times, batch, gamma)))


def checked_round_seconds(times: AnyRoundTimes, batch: Array, gamma: Array) -> Array:
    """`round_seconds` of arguments that need no check."""
    draft, verify, gamma = as_floats(times.draft(batch), times.verify(batch, gamma), gamma)
    return gamma * draft + verify


def fit_linear_times(measured: MeasuredTimes) -> LinearTimes:
    """Returns the straight lines in the draft length that are nearest to measured times.

    Ordinary least squares for every batch size on its own. A slope that would be negative, as noise
    makes one where verification is free, is 0.

        verify_seconds[b, gamma] = fixed_seconds[b] + token_seconds[b] gamma

    Args:
      measured: times at two draft lengths at least.

    Returns:
      The lines, with the draft steps as they were measured.

    Raises:
      ValueError: a field is outside its range, NaN or of the wrong shape, there is one length, or
        times bend up so much that a line through them leaves no time for plain decoding.

    Example:
      >>> from jaxsd import costmodel
      >>> times = costmodel.MeasuredTimes(
      ...     batches=[1, 8],
      ...     gammas=[0, 2, 4],
      ...     verify_seconds=[[0.010, 0.010, 0.010], [0.011, 0.013, 0.015]],
      ...     draft_seconds=[0.001, 0.001],
      ... )
      >>> print(costmodel.fit_linear_times(times).token_seconds)
      [0.    0.001]

    Source: Su et al., arXiv 2310.18813.
    """
    measured.check()
    if np.shape(measured.gammas)[0] < 2:
        raise ValueError("MeasuredTimes.gammas of one length do not make a line: measure more")
    batches, gammas, grid, draft = as_one_dtype(*measured)
    centred = gammas - gammas.mean()
    means = grid.mean(1)
    slopes = ((grid - means[:, None]) * centred[None, :]).sum(1) / jnp.square(centred).sum()
    slopes = jnp.maximum(slopes, 0)
    fixed = means - slopes * gammas.mean()
    _require_positive_fixed(fixed)
    return LinearTimes(batches, fixed, slopes, draft)


def _require_positive_fixed(fixed_seconds: Array) -> None:
    """Raises ValueError if a line does not begin at a positive time."""
    wanted = "positive: times that bend up so much are no line, use MeasuredTimes as they are"
    require("fixed_seconds of the fitted line", fixed_seconds, (lambda x: x > 0, wanted))


def last_gamma(times: AnyRoundTimes) -> float | None:
    """The longest draft that was measured; None where a formula knows no end."""
    if not isinstance(times, MeasuredTimes) or is_traced(times.gammas):
        return None
    return float(np.asarray(times.gammas)[-1])


def _interpolate(x: Array, knots: ArrayLike, values: ArrayLike) -> Array:
    """Straight lines through the values at the knots: constant before, rising on after."""
    knots_, values_, x = as_one_dtype(knots, values, x)
    low, high, weight = _segment(x, knots_)
    return _between(values_[low], values_[high], weight)


def _segment(x: Array, knots: Array) -> tuple[Array, Array, Array]:
    """Indices of the knots on both sides of x, and how far it is from one to the other."""
    if knots.shape[0] == 1:
        index = jnp.zeros(x.shape, jnp.int32)
        return index, index, jnp.zeros_like(x)
    low = jnp.searchsorted(knots[1:-1], x, side="right").astype(jnp.int32)
    weight = (x - knots[low]) / (knots[low + 1] - knots[low])
    # A maximum would have half the slope at the first knot. Only a batch is ever below it.
    return low, low + 1, jnp.where(weight < 0, 0, weight)


def _between(low: Array, high: Array, weight: Array) -> Array:
    """The line through two values; beyond the second one it does not fall."""
    rise = high - low
    return jnp.where(weight > 1, high + (weight - 1) * jnp.maximum(rise, 0), low + weight * rise)


def _check_knots(name: str, knots: ArrayLike, test: tuple) -> None:
    """Raises ValueError unless these are some numbers in rising order."""
    if np.ndim(knots) != 1 or np.shape(knots)[0] == 0:
        raise ValueError(f"{name} of shape {np.shape(knots)} must have shape [n]")
    require(name, knots, test)
    if not is_traced(knots):
        rises = np.diff(np.asarray(knots, np.float64)) > 0
        if not rises.all():
            raise ValueError(f"{name}={np.asarray(knots).tolist()} must be in rising order")


def _check_shape(name: str, value: ArrayLike, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a value has that shape."""
    if np.shape(value) != shape:
        raise ValueError(f"{name} of shape {np.shape(value)} must have shape {shape}")
