"""Many devices: which axis of every weight and cache lies along which axis of a mesh.

Weights and caches have *logical* axes: `vocab`, `embed`, `kv_heads`, `heads`, `mlp`, `batch`. Rules
say which mesh axis each lies along, if any; XLA does the rest, and puts in the collectives. The
program is the same on one device and on many, and so is its output, up to the order of sums.

Several processes, on one host or on many, are one program too: each calls
`jax.distributed.initialize` first, then does the same things in the same order. Weights go through
`place`; prompts, lengths, keys, settings and policies are given as ever, the same in every process;
`fetch` brings results to all of them.

>>> import jax
>>> from jaxsd import models
>>> from jaxsd.models import sharding
>>> mesh = sharding.make_mesh(data=1, model=1)
>>> config = models.CONFIGS["tiny"]
>>> params = sharding.place(models.init_params(config, jax.random.key(0)), mesh, sharding.TENSOR)
>>> tuple(params["layers"]["0"]["mlp"]["down"].sharding.spec)
(None, 'model')
>>> target = sharding.on_mesh(models.language_model(config), mesh, sharding.TENSOR)
>>> tuple(target.init_cache(2, 8)[0].keys.sharding.spec)
('data', 'model')

References:
  Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053 (tensor parallelism); Xu et al., 2021,
  https://arxiv.org/abs/2105.04663 (GSPMD).
"""

import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .configs import Config
from .transformer import abstract_params

Rules = Mapping[str, str | None]
"""From logical axis to mesh axis; what is absent, or None, is not divided."""

TENSOR: Rules = types.MappingProxyType(
    {
        "batch": "data",
        "kv_heads": "model",
        "heads": "model",
        "mlp": "model",
        "vocab": "model",
    }
)
"""Heads, hidden units and vocabulary along "model", rows along "data"."""

FULLY_SHARDED: Rules = types.MappingProxyType({**TENSOR, "embed": "data"})
"""As `TENSOR`, and the weights' other axis along "data": gathered where they are used."""

REPLICATED: Rules = types.MappingProxyType({})
"""Everything on every device: for a draft beside a divided target."""

# By the last names on a parameter's path. What is not here is small, and on every device.
_AXES: Mapping[tuple[str, ...], tuple[str | None, ...]] = types.MappingProxyType(
    {
        ("embedding",): ("vocab", "embed"),
        ("head",): ("vocab", "embed"),
        ("attention", "qkv"): ("kv_heads", None, None, "embed"),
        ("attention", "out"): ("embed", "heads"),
        ("mlp", "gate_up"): (None, "mlp", "embed"),
        ("mlp", "up"): ("mlp", "embed"),
        ("mlp", "down"): ("embed", "mlp"),
        ("attention", "qkv_bias"): ("kv_heads", None, None),
        ("mlp", "gate_up_bias"): (None, "mlp"),
        ("mlp", "up_bias"): ("mlp",),
    }
)
_CACHE_AXES = ("batch", "kv_heads", None, None)


def make_mesh(**sizes: int) -> Mesh:
    """All devices of the program, or the first of them, as a mesh of these axes.

    >>> make_mesh(data=1, model=1).axis_names
    ('data', 'model')

    Raises:
      ValueError: if there are fewer devices, or a size is not an integer of at least 1.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}={size!r} must be an integer of at least 1")
    wanted, devices = math.prod(sizes.values()), jax.devices()
    if wanted > len(devices):
        raise ValueError(f"a mesh of {sizes} takes {wanted} devices; there are {len(devices)}")
    automatic = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), automatic, devices=devices[:wanted])


def shardings(config: Config, mesh: Mesh, rules: Rules = TENSOR) -> dict[str, Any]:
    """Where every parameter of this shape lies: a tree of `NamedSharding`, as of `init_params`.

    An axis is divided only where the mesh axis divides its size; else it is whole on every device
    of that axis (four devices and two key heads: each has both).

    Args:
      config: the shape.
      mesh: devices with named axes.
      rules: from logical axis to mesh axis.

    Raises:
      ValueError: if a rule names an unknown logical axis or an axis that the mesh does not have.
    """
    return shardings_of(abstract_params(config), mesh, rules)


def cache_shardings(cache: Any, mesh: Mesh, rules: Rules = TENSOR) -> Any:
    """Where every buffer `[B, H_kv, S, D]` of a cache lies: a tree of `NamedSharding`.

    Args:
      cache: arrays or their shapes.
      mesh: devices with named axes.
      rules: from logical axis to mesh axis.

    Raises:
      ValueError: as of `shardings`.
    """
    _check(mesh, rules)
    return jax.tree.map(lambda leaf: _sharding(_CACHE_AXES, leaf.shape, mesh, rules), cache)


def shardings_of(tree: Any, mesh: Mesh, rules: Rules = TENSOR) -> Any:
    """Where every array of a tree lies, by the last names on its path, as parameters do.

    An optimiser's moments lie with their parameters, for they end in the same names; counts are
    whole on every device.

    Args:
      tree: of arrays or of their shapes (`jax.eval_shape` of what makes it).
      mesh: devices with named axes.
      rules: from logical axis to mesh axis.

    Raises:
      ValueError: as of `shardings`.
    """
    _check(mesh, rules)
    return jax.tree.map_with_path(
        lambda path, leaf: _sharding(_axes(path, np.ndim(leaf)), np.shape(leaf), mesh, rules), tree
    )


def shapes_on_mesh(tree: Any, mesh: Mesh, rules: Rules = TENSOR) -> Any:
    """Shapes, types and places of a tree's arrays: `shardings_of`, as `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings_of(tree, mesh, rules),
    )


def place(params: Any, mesh: Mesh, rules: Rules = TENSOR) -> Any:
    """The parameters on the mesh, each device holding its part.

    In a program of several processes each must have all of `params`, as NumPy arrays or on devices
    of its own. `load_hf`, `load_model` and `restore_checkpoint` place while they read.

    Args:
      params: nested dict of arrays, as `init_params` or `load_model` makes it, or a tree that
        holds some, such as a training state.
      mesh: devices with named axes.
      rules: from logical axis to mesh axis.

    Raises:
      ValueError: as of `shardings`.
    """
    return jax.tree.map(put, params, shardings_of(params, mesh, rules))


def placer(mesh: Mesh, rules: Rules = TENSOR) -> Callable[[str, Any], Array]:
    """As `place`, one array at a time: a function of its dotted name and the array.

    Args:
      mesh: devices with named axes.
      rules: from logical axis to mesh axis.

    Raises:
      ValueError: as of `shardings`.

    >>> put_one = placer(make_mesh(data=1, model=1))
    >>> tuple(put_one("layers.0.mlp.up", np.zeros((4, 2), np.float32)).sharding.spec)
    ('model',)
    """
    _check(mesh, rules)

    def put_one(name: str, array: Any) -> Array:
        axes = _axes(name.split("."), np.ndim(array))
        return put(array, _sharding(axes, np.shape(array), mesh, rules))

    return put_one


def put(array: Any, where: jax.sharding.Sharding) -> Array:
    """An array where it belongs, though it be on devices of other processes."""
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, host.__getitem__)


def fetch(tree: Any) -> Any:
    """Whole values as NumPy arrays, in every process: of a `Generation` on a mesh of several.

    Called by all processes together, for the parts go to each of them.

    Args:
      tree: of arrays; random keys go through `jax.random.key_data` first.

    >>> import jax.numpy as jnp
    >>> fetch({"a": jnp.arange(3)})
    {'a': array([0, 1, 2], dtype=int32)}
    """

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


class ModelOnMesh(NamedTuple):
    """A language model whose cache lies on a mesh as rules say; see `on_mesh`.

    model: with caches `[B, H_kv, S, D]`.
    mesh: devices with named axes.
    rules: from logical axis to mesh axis.
    """

    model: Any
    mesh: Mesh
    rules: Rules

    def init_cache(self, batch_size: int, max_len: int) -> Any:
        """The model's, divided."""
        return self._divided(self.model.init_cache(batch_size, max_len))

    def apply(self, params: Any, tokens: Array, positions: Array, cache: Any) -> tuple[Array, Any]:
        """The model's, its cache divided as before."""
        # Before too: a cache whose heads no axis divides would else take another layout inside a
        # loop, and come out of it as a copy.
        cache = self._divided(cache)
        tokens, positions = self._in_batches(tokens), self._in_batches(positions)
        logits, cache = self.model.apply(params, tokens, positions, cache)
        return self._by_rows(logits), self._divided(cache)

    def apply_tree(
        self, params: Any, tokens: Array, positions: Array, cache: Any, starts: Array, seen: Array
    ) -> tuple[Array, Any]:
        """The model's, its cache divided as before."""
        cache = self._divided(cache)
        tokens, positions = self._in_batches(tokens), self._in_batches(positions)
        logits, cache = self.model.apply_tree(params, tokens, positions, cache, starts, seen)
        return logits, self._divided(cache)

    def keep(self, cache: Any, starts: Array, sources: Array) -> Any:
        """The model's, its cache divided as before."""
        return self._divided(self.model.keep(cache, starts, sources))

    def _in_batches(self, tokens: Array) -> Array:
        """Integers `[B, T]` divided as the batch is, and whole along every other axis of the mesh.

        `_by_rows` spreads the rows over all devices, and tokens come out of sampling as they lie
        there. Left so, every matrix product of a pass would gather its activations anew.
        """
        where = _sharding(("batch", None), tokens.shape, self.mesh, self.rules)
        return jax.lax.with_sharding_constraint(tokens, where)

    def _by_rows(self, logits: Array) -> Array:
        """Every row's logits whole on one device, and the rows spread over all devices.

        What comes next sorts and sums over the vocabulary, row by row. Left to itself XLA divides
        that work anew for every operation of it: dozens of exchanges a round.
        """
        axes = [along for along in (self.rules.get("batch"), self.rules.get("vocab")) if along]
        while axes and logits.shape[0] % math.prod(self.mesh.shape[along] for along in axes):
            axes.pop()
        rows = NamedSharding(self.mesh, PartitionSpec(tuple(axes) or None))
        # First as the head's matrix lies: else XLA sends the matrix, and not the logits, around.
        parts = _sharding(("batch", None, "vocab"), logits.shape, self.mesh, self.rules)
        logits = jax.lax.with_sharding_constraint(logits, parts)
        return jax.lax.with_sharding_constraint(logits, rows)

    def _divided(self, cache: Any) -> Any:
        where = cache_shardings(cache, self.mesh, self.rules)
        return jax.tree.map(jax.lax.with_sharding_constraint, cache, where)


def on_mesh(model: Any, mesh: Mesh, rules: Rules = TENSOR) -> ModelOnMesh:
    """A language model whose cache is divided among devices, for `jaxsd.speculative`.

    Its weights are those that `place` puts on the same mesh by the same rules. Target and draft may
    have rules of their own.

    Args:
      model: a transformer of `jaxsd.models`, or another with caches `[B, H_kv, S, D]`.
      mesh: devices with named axes.
      rules: from logical axis to mesh axis.

    Raises:
      ValueError: as of `shardings`.
    """
    _check(mesh, rules)
    return ModelOnMesh(model, mesh, rules)


def bytes_per_device(tree: Any) -> dict[int, int]:
    """How many bytes of these arrays every device of this process holds, by its id.

    >>> import jax.numpy as jnp
    >>> list(bytes_per_device({"a": jnp.zeros((4,), jnp.float32)}).values())
    [16]
    """
    held: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return held


def _axes(path: Any, ndim: int) -> tuple[str | None, ...]:
    """The logical axes of the parameter at a path; a quantised kernel's are the kernel's."""
    # Of names or of keys; the fields of a quantised kernel, of an optimiser's state, are no names.
    names = [step if isinstance(step, str) else getattr(step, "key", None) for step in path]
    names = tuple(name for name in names if isinstance(name, str))
    for ending, axes in _AXES.items():
        if names[-len(ending) :] == ending and len(axes) == ndim:
            return axes
    return (None,) * ndim


def _sharding(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> NamedSharding:
    """Along which mesh axes an array of these logical axes lies."""
    spec: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        along = None if axis is None else rules.get(axis)
        is_divisible = along is not None and size % mesh.shape[along] == 0
        spec.append(along if is_divisible and along not in spec else None)
    while spec and spec[-1] is None:
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def _check(mesh: Mesh, rules: Rules) -> None:
    """Raises ValueError if the rules and the mesh do not fit together."""
    known = {axis for axes in (*_AXES.values(), _CACHE_AXES) for axis in axes} - {None}
    unknown = sorted(set(rules) - known)
    if unknown:
        raise ValueError(f"rules name {unknown}; wanted some of {sorted(map(str, known))}")
    if set(mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(f"mesh has axes of types {mesh.axis_types}; wanted Auto: see make_mesh")
    missing = sorted({along for along in rules.values() if along} - set(mesh.axis_names))
    if missing:
        raise ValueError(f"mesh has axes {mesh.axis_names}; the rules also name {missing}")
