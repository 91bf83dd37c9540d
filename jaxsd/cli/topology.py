"""Which devices does a command compile for: those of this machine, or some that are not there?"""

import importlib.util
import os
import pathlib
import re
from typing import Any, NamedTuple

# What XLA asks of a GPU, for those that have a name here: counts and sizes of its datasheet and of
# its CUDA device properties. A file of the same form describes any other.
GPUS = {
    "h100": """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
}
# TPU generations by the name that the compiler has for them, and their names in the catalogue.
TPUS = {"v4": "tpu-v4", "v5e": "tpu-v5e", "v5p": "tpu-v5p", "v6e": "tpu-v6e"}
HERE = "here"


class Topology(NamedTuple):
    """Devices to compile for."""

    name: str
    kind: str  # "tpu", "gpu" or "here"
    devices: list[Any]
    chip: str | None  # in the cost model's catalogue
    memory_bytes: float | None  # of one device; None: not known


def find(name: str) -> Topology:
    """The devices of a name, there or not.

    Args:
      name: a TPU topology such as "v5e:2x2"; a GPU as "h100", "h100:4", or the path of a text file
        that describes one, with or without a number; or "here".

    Raises:
      ValueError: the name is none of these, or the compiler for it is not installed.
    """
    if name == HERE:
        return _here()
    base, _, rest = name.partition(":")
    if base in TPUS:
        return _tpu(name, base, rest)
    path, _, count = name.rpartition(":") if re.search(r":\d+$", name) else (name, "", "1")
    if path in GPUS:
        return _gpu(name, path, GPUS[path], int(count))
    if pathlib.Path(path).is_file():
        return _gpu(name, path, _read(path), int(count))
    raise ValueError(
        f"topology={name!r} must be a TPU such as v5e:2x2 (of {', '.join(TPUS)}), a GPU "
        f"({', '.join(GPUS)}, or a text file that describes one; {next(iter(GPUS))}:4 for four), "
        f"or {HERE!r}"
    )


def _here() -> Topology:
    import jax

    devices = jax.devices()
    stats = devices[0].memory_stats() or {}
    return Topology(HERE, HERE, devices, None, stats.get("bytes_limit"))


def _tpu(name: str, generation: str, grid: str) -> Topology:
    if not re.fullmatch(r"\d+(x\d+){1,2}", grid):
        raise ValueError(f"topology={name!r} must name a grid of chips, such as {generation}:2x2")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology={name!r} needs the TPU's compiler, which is not installed: "
            "pip install 'jaxsd[tpu]'"
        )
    # No TPU is asked for, nor the server that a machine with TPUs would ask; and another process
    # may be compiling too.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "none"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(variable, value)
    from jaxsd import costmodel

    chip = TPUS[generation]
    # Both cores of a v4 chip as one device, as JAX has them on a real one; else a device is half.
    cores = {"chip_config_name": "megacore"} if generation == "v4" else {}
    devices = _described(name, platform="tpu", topology_name=name, **cores)
    return Topology(name, "tpu", devices, chip, float(costmodel.named_chip(chip).memory_bytes))


def _gpu(name: str, label: str, description: str, count: int) -> Topology:
    if count < 1:
        raise ValueError(f"topology={name!r} must have at least one GPU")
    if not any(map(_is_installed, ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"))):
        raise ValueError(
            f"topology={name!r} needs the GPU's compiler, which is not installed: "
            "pip install 'jaxsd[cuda]'"
        )
    memory = re.search(r"device_memory_size: *(\d+)", description)
    devices = _described(
        name,
        platform="cuda",
        topology_name=pathlib.Path(label).name,
        topology=f"1x1x{count}",
        target_config=description,
    )
    return Topology(name, "gpu", devices, None, float(memory[1]) if memory else None)


def _described(name: str, **description: str) -> list[Any]:
    """Devices that XLA can compile for and that are not there."""
    import jax
    from jax.experimental import topologies

    # What is computed on the way, of shapes alone, is computed here.
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(**description).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"topology={name!r}: the compiler says: {first}") from error


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def _read(path: str) -> str:
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"topology={path!r} is no text file") from error
    if "gpu_device_info" not in text:
        raise ValueError(
            f"topology={path!r} must be a text that describes a GPU: gpu_device_info {{ ... }}"
        )
    return text
