"""Checkpoints: any pytree of arrays on disk by orbax, whole or refused.

    <folder>/<step, 8 digits>/                 written by orbax
    <folder>/<step, 8 digits>.manifest.json    size and SHA-256 of every file, written last

A step without a manifest was interrupted while it was written and does not count. A step with a
manifest that does not match is damaged: it is refused by name, never passed over in silence,
because going back to an older state is for a person to decide.

What was saved from one mesh is restored onto any other, or onto one device: every device writes its
part, and reads the parts it is to hold. In a program of several processes all of them call these
functions, with one folder that all of them see.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from . import atomic, sharding

CHECKPOINT_FORMAT = "jaxsd-checkpoint-1"


class PendingCheckpoint:
    """A checkpoint that is being written; what `start_checkpoint` returns."""

    def __init__(self, finish: Callable[[], None]):
        executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        # A program that ends meanwhile ends when this has.
        self._future = executor.submit(finish)
        executor.shutdown(wait=False)
        self._is_agreed = False
        self._has_told = False

    def is_done(self) -> bool:
        """Whether this process has written its part; does not wait."""
        return self._future.done()

    def wait(self) -> None:
        """Returns when the checkpoint counts, in every process.

        Raises:
          Exception: what went wrong while it was written; the checkpoint does not count.
        """
        error = self._future.exception()
        if error is not None:
            self._has_told = True
            raise error
        if not self._is_agreed:
            agree("checkpoint written")
            self._is_agreed = True

    def wait_unless_told(self) -> None:
        """`wait`, but a failure that somebody has heard of is not raised again."""
        if not self._has_told:
            self.wait()


# By folder, the last checkpoint that was begun. Tidying up after one would sweep away what another
# one has written so far, so that each waits for the one before.
_PENDING: dict[pathlib.Path, PendingCheckpoint] = {}


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
      state: any pytree of arrays, on one device or divided among many.
      extra: JSON values kept with it.
      keep: how many checkpoints stay, at least 1.

    Raises:
      ValueError: `keep` or `step` is out of range, or `extra` is not JSON.

    >>> import tempfile, jax.numpy as jnp
    >>> folder = tempfile.mkdtemp()
    >>> save_checkpoint(folder, 7, {"a": jnp.arange(3)}, extra={"loss": 0.5})
    >>> latest_checkpoint(folder)
    7
    >>> restore_checkpoint(folder, 7, {"a": jax.ShapeDtypeStruct((3,), jnp.int32)})
    ({'a': Array([0, 1, 2], dtype=int32)}, {'loss': 0.5})
    """
    start_checkpoint(folder, step, state, extra=extra, keep=keep).wait()


def start_checkpoint(
    folder: str | os.PathLike,
    step: int,
    state: Any,
    *,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> PendingCheckpoint:
    """As `save_checkpoint`, but returns as soon as the arrays are copied: training goes on.

    The state may be donated or overwritten at once. Another checkpoint in the same folder first
    waits for this one, and raises what went wrong with it unless `wait` has. The checkpoint counts
    when `wait` has returned.

    Args:
      folder: of the checkpoints of one run.
      step: number of finished steps.
      state: any pytree of arrays, on one device or divided among many.
      extra: JSON values kept with it.
      keep: how many checkpoints stay, at least 1.

    Raises:
      ValueError: `keep` or `step` is out of range, or `extra` is not JSON.

    >>> import tempfile, jax.numpy as jnp
    >>> folder = tempfile.mkdtemp()
    >>> pending = start_checkpoint(folder, 7, {"a": jnp.arange(3)})
    >>> pending.wait()
    >>> latest_checkpoint(folder)
    7
    """
    for name, value, low in (("step", step, 0), ("keep", keep, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name}={value!r} must be at least {low}, an integer")
    content = {"format": CHECKPOINT_FORMAT, "step": step, "extra": dict(extra or {})}
    atomic.json_bytes(content)  # what is no JSON is found before anything is written
    folder = pathlib.Path(folder).absolute()
    if (before := _PENDING.pop(folder, None)) is not None:
        before.wait_unless_told()
    target = folder / f"{step:08d}"
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        _manifest_path(target).unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
    agree("old checkpoint deleted")
    checkpointer = start_writing(target, state)

    def finish() -> None:
        checkpointer.close()
        if not is_first_process():
            return
        temporary = atomic.hidden_sibling(_manifest_path(target), "writing")
        manifest = {**content, "files": atomic.describe(target)}
        atomic.write_bytes(temporary, atomic.json_bytes(manifest))
        os.replace(temporary, _manifest_path(target))
        atomic.sync_folder(folder)
        _delete_old(folder, keep)

    _PENDING[folder] = PendingCheckpoint(finish)
    return _PENDING[folder]


def latest_checkpoint(folder: str | os.PathLike) -> int | None:
    """The step of the newest finished checkpoint, or None. Looks at names only."""
    steps = _finished_steps(pathlib.Path(folder))
    return steps[-1] if steps else None


def restore_checkpoint(
    folder: str | os.PathLike,
    step: int,
    like: Any,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules = sharding.TENSOR,
) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint back: the state bit for bit, and the `extra` saved with it.

    Without a mesh the arrays are on the default device and not committed to it, like freshly made
    ones. With one they are divided among its devices as the rules say, wherever they lay when they
    were saved.

    Args:
      folder: of the checkpoints of one run.
      step: see `latest_checkpoint`.
      like: the state's tree with shapes and dtypes (`jax.eval_shape` of what makes it).
      mesh: devices to divide the arrays among, by their names as `sharding.shardings_of` does.
      rules: from logical axis to mesh axis.

    Raises:
      ValueError: a file is missing, has another size or another checksum, or the state is of
        another shape; names the folder. Also if the rules do not fit the mesh.
    """
    # By way of numpy: arrays that orbax places itself are committed to a device, for which jit
    # compiles a second program, and a continued run should be the same program to the last bit.
    wanted = on_host(like) if mesh is None else sharding.shapes_on_mesh(like, mesh, rules)
    target = pathlib.Path(folder).absolute() / f"{step:08d}"
    manifest = _read_manifest(target)
    if damage := atomic.damage(target, manifest["files"]):
        raise ValueError(
            f"checkpoint {str(target)!r} is damaged: {damage}; delete it to go back to the one "
            "before"
        )
    try:
        state = read(target, wanted)
    except ValueError as error:
        raise ValueError(f"checkpoint {str(target)!r} does not fit this run: {error}") from error
    return jax.tree.map(jnp.array, state) if mesh is None else state, manifest["extra"]


def start_writing(target: pathlib.Path, tree: Any) -> ocp.StandardCheckpointer:
    """Arrays on their way to a folder that is not there yet: all there after `close`."""
    checkpointer = ocp.StandardCheckpointer()
    try:
        checkpointer.save(target, tree)
    except BaseException:
        checkpointer.close()
        raise
    return checkpointer


def on_host(like: Any) -> Any:
    """For `read`: NumPy arrays of these shapes and types, which take no memory themselves."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), like)


def read(target: pathlib.Path, wanted: Any) -> Any:
    """What `start_writing` wrote, in the shapes, types and places of `wanted`.

    Raises:
      ValueError: what is there has another structure or other shapes.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(target, wanted)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(str(error)) from error
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True)
    if not all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs):
        raise ValueError("shapes differ")
    return tree


def is_first_process() -> bool:
    """Whether it is this process that writes what only one may write."""
    return jax.process_index() == 0


def agree(name: str) -> None:
    """Returns when all processes have come here; at once if there is only one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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
    # The first manifests named no format, and are as those of the first one that has a name.
    if (found := manifest.get("format", CHECKPOINT_FORMAT)) != CHECKPOINT_FORMAT:
        raise ValueError(
            f"checkpoint {str(target)!r} has format {found!r}, not {CHECKPOINT_FORMAT!r}"
        )
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
