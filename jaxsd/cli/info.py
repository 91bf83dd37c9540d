"""`jaxsd info`: what is this machine, and what is installed on it?"""

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

PACKAGES = (
    "jaxsd",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "orbax-checkpoint",
    "safetensors",
    "tokenizers",
)


def info() -> dict[str, Any]:
    """Shows devices, versions and the models that ship with the package.

    Returns:
      The same; JSON values.
    """
    from . import pair

    folders = {"target": pair.EMBEDDED_TARGET, "draft": pair.EMBEDDED_DRAFT}
    result = {
        "device": describe_device(),
        "devices": [
            {"id": device.id, "platform": device.platform, "kind": device.device_kind}
            for device in jax.devices()
        ],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "models": {role: _describe_model(folder) for role, folder in folders.items()},
    }
    _show(result)
    return result


def versions() -> dict[str, str | None]:
    """Installed versions of what results may depend on; None for what is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe_device() -> str:
    """The default device in words, for beside a measured time."""
    devices = jax.devices()
    first = devices[0]
    if first.platform == "cpu":
        return f"{_processor()}, {_num_cores()} cores"
    return f"{len(devices)} x {first.device_kind} ({first.platform})"


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "CPU"


def _describe_model(folder: pathlib.Path) -> dict[str, Any]:
    """Sizes and losses of a model folder, or its problem. Reads all of it, and so checks it."""
    from jaxsd import models
    from jaxsd.models import checkpoint

    if not folder.is_dir():
        return {"problem": "not in this installation"}
    try:
        model = checkpoint.load_model(folder, dtype=None)
    except ValueError as error:
        return {"folder": str(folder), "problem": str(error)}
    progress = model.metadata.get("progress")
    held_out = progress.get("held_out") if isinstance(progress, dict) else None
    held_out = held_out if isinstance(held_out, dict) else {}
    return {
        "folder": str(folder),
        "parameters": models.num_parameters(model.config),
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "held_out_nats_per_token": held_out.get("nats_per_token"),
        "held_out_nats_per_byte": held_out.get("nats_per_byte"),
        "config": model.config.to_dict(),
    }


def _show(result: dict[str, Any]) -> None:
    console = rich.console.Console(highlight=False)
    table = rich.table.Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("device", result["device"])
    for device in result["devices"]:
        table.add_row("", f"{device['platform']}:{device['id']} {device['kind']}")
    table.add_row("python", f"{result['python']} on {result['platform']}")
    for name, version in result["versions"].items():
        table.add_row(name, version or "not installed")
    console.print(table)

    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="Models in the package")
    table.add_column("")
    for name in ("parameters", "MB", "nats / token", "nats / byte"):
        table.add_column(name, justify="right")
    for role, model in result["models"].items():
        if "problem" in model:
            table.add_row(role, model["problem"])
            continue
        losses = (model["held_out_nats_per_token"], model["held_out_nats_per_byte"])
        table.add_row(
            role,
            f"{model['parameters']:,}",
            f"{model['bytes'] / 1e6:.1f}",
            *("" if loss is None else f"{loss:.3f}" for loss in losses),
        )
    console.print(table)
