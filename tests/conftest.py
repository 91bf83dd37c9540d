"""What holds for every test: what JAX would forgive is an error, nothing is cached on disk."""

import contextlib
import os

import hypothesis
import jax
import pytest

# Most of a test's time is LLVM's, on programs that run once. XLA's own passes, which decide what is
# copied, fused and written in place, are the same.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*flags, "--xla_backend_optimization_level=0"])

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_compilation_cache", False)

# Compiling dominates the first example of a property, and machines are shared.
hypothesis.settings.register_profile("jaxsd", deadline=None, derandomize=True, max_examples=100)
hypothesis.settings.load_profile("jaxsd")


def enable_x64() -> contextlib.AbstractContextManager:
    """64-bit types within a `with` block, under the name that this JAX has for it."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64 as old

    return old()


@pytest.fixture
def x64():
    """The test runs with 64-bit types."""
    with enable_x64():
        yield
