"""How does a round's acceptance go from one drafted token to the next?

Places where a draft does well come in runs: a token that follows accepted ones is accepted more
often than the first. So the share of rounds that accept i tokens lies above the i-th power of one
alpha, and a law by position says what it is: as it was measured of one draft, or as a function of
the draft's perplexity.
"""

import itertools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._inputs import FINITE, PROBABILITY, as_floats, is_traced, require
from .laws import PerplexityRange
from .shapes import Number


class PositionAcceptance(NamedTuple):
    """Acceptance measured by position, as the decoder reports it: not every position is alike."""

    # [K] share of rounds in which at least 1, 2, ..., K tokens were accepted; falling.
    by_position: Number
    fitted: PerplexityRange = PerplexityRange()

    def predict(self, draft_perplexity: Array, target_perplexity: Array) -> Array:
        """Acceptance at the first position."""
        return self.shares(draft_perplexity, target_perplexity)[..., 0]

    def shares(self, draft_perplexity: Array, target_perplexity: Array) -> Array:
        """`[..., K]` The constants, for whatever perplexities."""
        x, y = draft_perplexity[..., None], target_perplexity[..., None]
        return as_floats(_as_array(self.by_position), x, y)[0]

    def check(self) -> None:
        """Raises ValueError unless the shares are probabilities that do not rise."""
        shape = np.shape(_as_array(self.by_position))
        if len(shape) != 1 or shape[0] == 0:
            raise ValueError(f"PositionAcceptance.by_position of shape {shape} must have shape [K]")
        require("PositionAcceptance.by_position", self.by_position, PROBABILITY)
        require(
            "PositionAcceptance.by_position",
            self.by_position,
            (lambda x: np.diff(x, prepend=1.0) <= 0, "shares of rounds that do not rise"),
        )


class PositionAcceptanceLaw(NamedTuple):
    """Acceptance by position of drafts for one target: its odds are powers of the perplexity.

    Where all tokens before it were accepted, the i-th is accepted with probability c_i. Shares so
    made are probabilities that fall with i, and smooth, for any numbers: nothing is bent. With all
    slopes and all intercepts equal, every token is accepted with one alpha.

        ln(c_i / (1 - c_i)) = slope_i * ln(draft perplexity) + intercept_i
        share_i = c_1 c_2 ... c_i
    """

    slopes: Number  # [K]; or [..., K], and then the axes before broadcast with the perplexities
    intercepts: Number  # of the same shape
    fitted: PerplexityRange = PerplexityRange()

    def predict(self, draft_perplexity: Array, target_perplexity: Array) -> Array:
        """Acceptance at the first position."""
        return self.shares(draft_perplexity, target_perplexity)[..., 0]

    def shares(self, draft_perplexity: Array, target_perplexity: Array) -> Array:
        """`[..., K]` The products; the target is the one that the law was fitted for."""
        slopes, intercepts, x, _ = as_floats(
            _as_array(self.slopes),
            _as_array(self.intercepts),
            draft_perplexity[..., None],
            target_perplexity[..., None],
        )
        return cumulative_shares(slopes * jnp.log(x) + intercepts)

    def check(self) -> None:
        """Raises ValueError unless every position has a finite slope and intercept."""
        shape, other = (np.shape(_as_array(x)) for x in (self.slopes, self.intercepts))
        if not shape or not shape[-1] or shape != other:
            raise ValueError(
                f"PositionAcceptanceLaw.slopes of shape {shape} and intercepts of shape {other} "
                "must have one shape, [K] or [..., K]"
            )
        require("PositionAcceptanceLaw.slopes", self.slopes, FINITE)
        require("PositionAcceptanceLaw.intercepts", self.intercepts, FINITE)


def cumulative_shares(logits: Array) -> Array:
    """`[..., K]` Shares of rounds that accept so many tokens, from logits of conditional ones."""
    # By way of the logarithm: the slope s (1 - s) of the logistic function has no digits left in
    # float32 where s is nearly 1. One product after the other, which cannot rise by a rounding.
    conditional = jnp.exp(jax.nn.log_sigmoid(logits))
    every = [conditional[..., i] for i in range(conditional.shape[-1])]
    return jnp.stack(list(itertools.accumulate(every, operator.mul)), -1)


def _as_array(value: Any) -> Any:
    """A list of which a number is traced, as one array; anything else as it is."""
    if isinstance(value, list | tuple) and is_traced(value):
        return jnp.stack(as_floats(*value))
    return value
