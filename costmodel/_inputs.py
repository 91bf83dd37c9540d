"""What every public function does with its arguments: refuse wrong numbers, agree on a dtype."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

_Test = tuple[Callable[[np.ndarray], Any], str]

# Every test is false for NaN, so NaN is refused along with what is out of range.
PROBABILITY: _Test = (lambda x: (x >= 0) & (x <= 1), "in [0, 1]")
POSITIVE: _Test = (lambda x: (x > 0) & (x < np.inf), "positive and finite")
NON_NEGATIVE: _Test = (lambda x: (x >= 0) & (x < np.inf), "at least 0 and finite")
FINITE: _Test = (np.isfinite, "finite")
AT_LEAST_ONE: _Test = (lambda x: x >= 1, "at least 1")


def is_traced(*trees: Any) -> bool:
    """Whether any leaf is inside a jit, grad or vmap and has no value to look at."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def require(name: str, value: Any, test: _Test) -> None:
    """Raises ValueError if a concrete `value` fails `test`; a traced value passes unchecked."""
    if is_traced(value):
        return
    passes, wanted = test
    numbers = np.asarray(value, dtype=np.float64)
    wrong = ~np.asarray(passes(numbers))
    if wrong.any():
        came = f"{np.broadcast_to(numbers, wrong.shape)[wrong][0]:.9g}"
        where = "" if numbers.ndim == 0 else f" (in an array of shape {numbers.shape})"
        raise ValueError(f"{name}={came}{where} must be {wanted}")


def as_floats(*values: Any) -> list[Array]:
    """Arrays of one floating dtype and one shape: float32 or wider, Python scalars adapt."""
    arrays = [x for x in values if isinstance(x, (Array, np.ndarray, np.generic))]
    # The caller may forbid implicit promotion of dtypes and ranks; agreeing here, explicitly, lets
    # a float32 measurement meet a float64 constant, and a column meet a grid.
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(jnp.result_type(float, *arrays), jnp.float32)
    # numpy first: a Python integer above 2^31 (a parameter count) does not pass through int32.
    floats = [
        x.astype(dtype) if isinstance(x, Array) else jnp.asarray(np.asarray(x, dtype))
        for x in values
    ]
    shape = jnp.broadcast_shapes(*(x.shape for x in floats))
    return [jnp.broadcast_to(x, shape) for x in floats]


@contextlib.contextmanager
def float64_on_host() -> Iterator[None]:
    """Double precision on the CPU within the block, in this thread only."""
    # The name in new versions of JAX, or else the one in old versions; no version has both to stay.
    home = jax if hasattr(jax, "enable_x64") else jax.experimental
    enable_x64 = getattr(home, "enable_x64")  # noqa: B009 (a type checker knows one of the two)
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out; then wherever arrays go
        cpu = None
    with enable_x64(True), jax.default_device(cpu):
        yield
