"""Derivatives, checked against differences."""

import jax
import numpy as np


def assert_gradient_is_a_difference(function, point, rel=1e-6):
    """Compares the gradient of a function of `[n]` numbers with central differences, in float64."""
    gradient = np.asarray(jax.jit(jax.grad(function))(np.asarray(point)))
    value = jax.jit(function)
    for i, number in enumerate(point):
        step = np.zeros(len(point))
        step[i] = 1e-6 * abs(number)
        ends = [float(value(np.asarray(point) + sign * step)) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * step[i])
        np.testing.assert_allclose(gradient[i], expected, rtol=rel, atol=1e-9, err_msg=str(i))
