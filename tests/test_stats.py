"""Counts turned into the field's figures."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsd
from jaxsd import stats

COUNTS = jaxsd.Statistics(
    num_rounds=jnp.array([4, 0, 2], jnp.int32),
    num_drafted=jnp.array([12, 0, 0], jnp.int32),
    num_accepted=jnp.array([6, 0, 0], jnp.int32),
    accepted_by_position=jnp.array([[3, 2, 1], [0, 0, 0], [0, 0, 0]], jnp.int32),
)


@pytest.mark.parametrize(
    ("figure", "want"),
    [
        (stats.acceptance_rate, [0.5, 0.0, 0.0]),
        (stats.mean_acceptance_length, [2.5, 1.0, 1.0]),
        (stats.acceptance_by_position, [[0.75, 0.5, 0.25], [0, 0, 0], [0, 0, 0]]),
    ],
)
def test_figures_follow_their_definitions_also_where_nothing_was_counted(figure, want):
    np.testing.assert_allclose(figure(COUNTS), want)


def test_total_weighs_rows_by_their_counts():
    total = stats.total(COUNTS)
    assert float(stats.acceptance_rate(total)) == 0.5
    assert float(stats.mean_acceptance_length(total)) == 2.0
    np.testing.assert_allclose(stats.acceptance_by_position(total), [0.5, 1 / 3, 1 / 6])


def test_acceptances_by_position_sum_to_the_accepted():
    assert int(COUNTS.accepted_by_position.sum()) == int(COUNTS.num_accepted.sum())
