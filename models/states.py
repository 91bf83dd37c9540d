"""Checkpoints of a training run: any pytree of arrays on disk by orbax, whole or refused."""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from . import atomic

#
# <folder>/<step, 8 digits>/                 written by orbax
# <folder>/<step, 8 digits>.manifest.json    size and SHA-256 of every file, written last
#
# A step without a manifest was interrupted while it was written and does not count. A step with a
# manifest that does not match is damaged: it is refused by name, never passed over in silence,
# because going back to an older state is for a person to decide.


def save_checkpoint(
    folder: str | os.PathLike,
    step: int,
    state: Any,
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> None:
    """Saves a pytree of arrays as the checkpoint of a step, then deletes all but the last `keep`.

    Killed at any moment, it leaves the earlier checkpoints whole and this one whole or not there.

    Args:
      folder: of the checkpoints of one run.
      step: number of finished steps.
      state: any pytree of arrays.
      extra: JSON values kept with it.
      keep: how many checkpoints stay, at least 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} must be at least 1")
    folder = pathlib.Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{step:08d}"
    _manifest_path(target).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target, state)
    manifest = {"step": step, "extra": dict(extra or {}), "files": atomic.describe(target)}
    temporary = atomic.hidden_sibling(_manifest_path(target), "writing")
    atomic.write_bytes(temporary, atomic.json_bytes(manifest))
    os.replace(temporary, _manifest_path(target))
    atomic.sync_folder(folder)
    _delete_old(folder, keep)


def latest_checkpoint(folder: str | os.PathLike) -> int | None:
    """The step of the newest finished checkpoint, or None. Looks at names only."""
    steps = _finished_steps(pathlib.Path(folder))
    return steps[-1] if steps else None


def restore_checkpoint(
    folder: str | os.PathLike, step: int, like: Any
) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint back: the state bit for bit, and the `extra` saved with it.

    The arrays are on the default device and not committed to it, like freshly made ones.

    Args:
      folder: of the checkpoints of one run.
      step: see `latest_checkpoint`.
      like: the state's tree with shapes and dtypes (`jax.eval_shape` of what makes it).

    Raises:
      ValueError: a file is missing, has another size or another checksum, or the state is of
        another shape; names the folder.
    """
    target = pathlib.Path(folder).absolute() / f"{step:08d}"
    manifest = _read_manifest(target)
    found, recorded = atomic.describe(target), manifest["files"]
    if found != recorded:
        names = sorted(name for name in found | recorded if found.get(name) != recorded.get(name))
        raise ValueError(
            f"checkpoint {str(target)!r} is damaged: {', '.join(names)} "
            f"{'is' if len(names) == 1 else 'are'} missing or not what was written; delete it to "
            "go back to the one before"
        )
    # By way of numpy: arrays that orbax places itself are committed to a device, for which jit
    # compiles a second program, and a continued run should be the same program to the last bit.
    wanted = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            state = checkpointer.restore(target, wanted)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"checkpoint {str(target)!r} does not fit this run: {error}") from error
    shapes = zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True)
    if not all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in shapes):
        raise ValueError(f"checkpoint {str(target)!r} does not fit this run: shapes differ")
    return jax.tree.map(jnp.array, state), manifest["extra"]


def _read_manifest(target: pathlib.Path) -> dict[str, Any]:
    path = _manifest_path(target)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {str(target)!r} has no readable manifest: {error}") from error
    fields = {"step": int, "extra": dict, "files": dict}
    if not isinstance(manifest, dict) or not all(
        isinstance(manifest.get(name), kind) for name, kind in fields.items()
    ):
        raise ValueError(f"checkpoint {str(target)!r} has a damaged manifest {path.name}")
    return manifest


def _finished_steps(folder: pathlib.Path) -> list[int]:
    names = [path.name.removesuffix(".manifest.json") for path in folder.glob("*.manifest.json")]
    return sorted(int(name) for name in names if name.isdigit())


def _delete_old(folder: pathlib.Path, keep: int) -> None:
    """Deletes the older checkpoints and what interrupted saves have left; no other file."""
    steps = _finished_steps(folder)[-keep:]
    kept = {name for step in steps for name in (f"{step:08d}", f"{step:08d}.manifest.json")}
    unwanted = [
        path
        for path in folder.iterdir()
        if path.name not in kept and re.fullmatch(r"\.?\d{8,}(\..*)?", path.name)
    ]
    # Manifests first: a step folder without one does not count, one with half its files would.
    for path in sorted(unwanted, key=lambda path: path.is_dir()):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _manifest_path(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(target.name + ".manifest.json")
