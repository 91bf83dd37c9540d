"""How long does one model's pass take, from a table over the number of tokens in it?

Kernels work in tiles: on a CPU a pass over five tokens may take half as long again as one over
four, and one over eight no longer than that. No roofline says so, but a table of measured passes
does, and a pass of many sequences falls on the same table as one over many tokens of one sequence.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import NON_NEGATIVE, POSITIVE, as_floats, require
from ._least_squares import host_numbers
from .fit_times import TimedPass
from .length_curves import as_one_dtype
from .round_times import _check_knots, _check_shape, _interpolate


class TokenTimes(NamedTuple):
    """A pass takes what its tokens take, and a time for every token that they look back at.

    Between the numbers of tokens it is interpolated; below the first it stays as there, beyond the
    last it rises on as before it.
    """

    tokens: ArrayLike  # [n] tokens of a pass, all sequences together, positive, rising
    seconds: ArrayLike  # [n] of a pass over so many with an empty cache, positive
    # For every token in the cache of every sequence: reading its keys and values.
    context_seconds: ArrayLike = 0.0
    # For every such token and every row that looks at it: the arithmetic of attention.
    row_context_seconds: ArrayLike = 0.0

    def pass_seconds(self, batch: Array, rows: Array, context: ArrayLike) -> Array:
        """A pass over `rows` tokens of each of `batch` sequences, after `context` tokens each."""
        table = _interpolate(batch * rows, self.tokens, self.seconds)
        fields = as_one_dtype(table, batch, rows, context, *self[2:])
        table, batch, rows, context, each, each_row = fields
        return table + batch * context * (each + rows * each_row)

    def check(self) -> None:
        """Raises ValueError unless there is a positive time for every number of tokens."""
        _check_knots("TokenTimes.tokens", self.tokens, POSITIVE)
        _check_shape("TokenTimes.seconds", self.seconds, np.shape(self.tokens))
        require("TokenTimes.seconds", self.seconds, POSITIVE)
        for field in self._fields[2:]:
            require(f"TokenTimes.{field}", getattr(self, field), NON_NEGATIVE)


class TokenRoundTimes(NamedTuple):
    """Rounds of two models with such tables, for `round_seconds`.

    Beside the passes a round samples, decides and commits: so long in plain decoding, longer by a
    fixed time as soon as anything is drafted (the decision, and caches of the processor that each
    model finds full of the other), and longer by a time for every drafted token.
    """

    target_pass: TokenTimes
    draft_pass: TokenTimes
    context: ArrayLike  # tokens of each sequence in the cache
    host_seconds: ArrayLike = 0.0  # of every round, plain or not, beside its passes
    switch_seconds: ArrayLike = 0.0  # of every round that drafts
    token_seconds: ArrayLike = 0.0  # of every drafted token

    def draft(self, batch: Array) -> Array:
        """A pass of the draft over one token of every sequence, and that token's own time."""
        seconds = self.draft_pass.pass_seconds(batch, jnp.ones_like(batch), self.context)
        seconds, own = as_floats(seconds, self.token_seconds)
        return seconds + own

    def verify(self, batch: Array, gamma: Array) -> Array:
        """A pass of the target over gamma + 1 tokens of every sequence, and the round's own."""
        seconds = self.target_pass.pass_seconds(batch, gamma + 1, self.context)
        host, switch = self.host_seconds, self.switch_seconds
        seconds, gamma, host, switch = as_floats(seconds, gamma, host, switch)
        # Continuous, for searches: of half a token the round is half a speculative one.
        return seconds + host + switch * gamma.clip(0, 1)

    def check(self) -> None:
        """Raises ValueError unless both tables and all times are in range."""
        self.target_pass.check()
        self.draft_pass.check()
        for field in self._fields[2:]:
            require(f"TokenRoundTimes.{field}", getattr(self, field), NON_NEGATIVE)


def fit_token_times(passes: Sequence[TimedPass]) -> TokenTimes:
    """Returns the table that measured passes of one model follow best.

    Least squares of relative errors. Every number of tokens that was measured, sequences times
    tokens of each, is a row of the table. Times per cached token are fitted if contexts differ, and
    that per row if rows do too; else they are 0. One that would be negative, or leave nothing for
    the table, as noise makes it where attention is nearly free, is 0.

        seconds = table[batch * rows] + batch * context * (context_seconds
                                                           + rows * row_context_seconds)

    Args:
      passes: of one shape and format, on one device.

    Returns:
      The table.

    Raises:
      ValueError: passes of several shapes, formats or degrees, a number outside its range, fewer
        passes than unknowns.

    Example:
      >>> import numpy as np
      >>> from jaxsd import costmodel
      >>> shape = costmodel.Shape(2048, 512, 6, 8, 2, 64, 1408, True)
      >>> rows_and_times = [(1, 3.2e-3), (4, 5.2e-3), (5, 7.3e-3), (8, 7.4e-3)]
      >>> passes = [costmodel.TimedPass(shape, s, rows=r) for r, s in rows_and_times]
      >>> table = costmodel.fit_token_times(passes)
      >>> print(np.asarray(table.seconds), float(table.context_seconds))
      [0.0032 0.0052 0.0073 0.0074] 0.0
    """
    passes = [TimedPass(*one) for one in passes]
    if not passes:
        raise ValueError("passes is empty: there is nothing to fit")
    for field in ("shape", "formats", "tensor_parallel"):
        kinds = {getattr(one, field) for one in passes}
        if len(kinds) > 1:
            raise ValueError(f"passes have {len(kinds)} values of {field}; a table is of one")
    seconds, batch, rows, context = (
        host_numbers(name, [getattr(one, name) for one in passes])
        for name in ("seconds", "batch", "rows", "context")
    )
    for name, values in (("seconds", seconds), ("batch", batch), ("rows", rows)):
        require(name, values, POSITIVE)
    require("context", context, NON_NEGATIVE)
    tokens = np.unique(batch * rows)
    table = [(batch * rows == count).astype(np.float64) for count in tokens]
    slopes = {}
    if len(np.unique(context)) > 1:
        slopes["context_seconds"] = batch * context
        if len(np.unique(rows)) > 1:
            slopes["row_context_seconds"] = batch * context * rows
    while True:
        found = _relative_least_squares([*table, *slopes.values()], seconds)
        if found is None:
            raise ValueError(
                f"{len(passes)} passes do not determine {len(tokens)} numbers of tokens and "
                f"{len(slopes)} times per cached token: add passes of the same numbers of tokens "
                "with other contexts"
            )
        fitted = dict(zip(slopes, found[len(tokens) :].tolist(), strict=True))
        wrong = [name for name, value in fitted.items() if value < 0]
        if not wrong and (found > 0).all():
            return TokenTimes(tokens, found[: len(tokens)], **fitted)
        # Noise gave one too much and so another too little: without it the rest is fitted anew.
        # Without any, every time of the table is a mean of measured ones, and so positive.
        del slopes[wrong[-1] if wrong else list(slopes)[-1]]


def _relative_least_squares(columns: list[np.ndarray], seconds: np.ndarray) -> np.ndarray | None:
    """Coefficients with the least squares of relative errors; None if they are not determined."""
    design = np.stack(columns, 1) / seconds[:, None]
    scale = np.linalg.norm(design, axis=0)
    found, _, rank, _ = np.linalg.lstsq(design / scale, np.ones(len(seconds)), rcond=1e-9)
    return found / scale if rank == len(columns) else None
