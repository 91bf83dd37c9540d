"""What holds for every test: what JAX would forgive is an error, nothing is cached on disk."""

import contextlib
import gc
import json
import os
import subprocess
import sys

import hypothesis
import jax
import pytest

# Most of a test's time is LLVM's, on programs that run once: level 1 takes half the time of the
# default, and level 0 makes the searches, which compute for a while, twice as slow. The passes that
# decide what is copied, fused and written in place are XLA's own, and the same.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*flags, "--xla_backend_optimization_level=1"])

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


def run_on_devices(code, num_devices):
    """What a program prints last, as JSON, run apart on so many virtual devices.

    In a process of its own: JAX makes its devices once.
    """
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(autouse=True, scope="module")
def no_programs_left():
    """Each file leaves no compiled programs behind.

    JAX keeps all of them and each maps memory several times: one file comes to 16 thousand maps,
    and Linux allows a process 65530. A worker that kept all crashed in the compiler.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """The test runs with 64-bit types."""
    with enable_x64():
        yield
