"""A random function's draws as choices that somebody enumerates, so that its law is exact."""

import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import sampling as sampling_lib


class CannotReplay(ValueError):
    """The function draws in a way that has no exact replay; test it by samples."""


# What draws nothing. Every sampler but the four that `_Replay` has ends the replay when reached.
_KEY_FUNCTIONS = {"key", "PRNGKey", "split", "fold_in", "clone", "wrap_key_data", "key_data"}
_KEY_FUNCTIONS |= {"key_dtype", "key_impl"}

_Choose = Callable[[Array], Array]  # weights [m, n] to indices [m]


def _current_trace() -> Any:
    """Something equal within one trace and different between two; older JAX has it elsewhere."""
    home = jax.extend.core if hasattr(jax.extend.core, "get_opaque_trace_state") else jax.core
    return home.get_opaque_trace_state(convention="nnx")


class _Replay:
    """Stands in for jax.random's samplers during one run of a function."""

    def __init__(self, choose: _Choose):
        self.choose = choose
        self.trace = _current_trace()
        self.samplers: list[str] = []
        self.keys: list[Array] = []  # their key data, draw by draw
        # What is known of every uniform so far: it lies in [low, high).
        self.low: list[Array] = []
        self.high: list[Array] = []

    def _use(self, key: Array, sampler: str) -> None:
        # A draw that is traced apart (under vmap, in the body of a compiled loop) stands for many
        # draws, and its trace could be remembered: it must not come to its end.
        if _current_trace() != self.trace:
            raise CannotReplay(f"{sampler} under vmap or inside a compiled loop or branch")
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        self.keys.append(jax.random.key_data(key) if is_typed else key)
        self.samplers.append(sampler)

    def bernoulli(self, key: Array, p: Any = 0.5, shape: Any = None, **options: Any) -> Array:
        del options
        self._use(key, "bernoulli")
        p = _as_float(p)
        p = jnp.broadcast_to(p, p.shape if shape is None else shape)
        index = self.choose(_coin(p.reshape(-1)))
        return (index == 1).reshape(p.shape)

    def categorical(
        self,
        key: Array,
        logits: Any,
        axis: int = -1,
        shape: Any = None,
        replace: bool = True,
        **options: Any,
    ) -> Array:
        del options
        self._use(key, "categorical")
        if shape is not None or not replace:
            raise CannotReplay("categorical with a shape or without replacement")
        logits = jnp.moveaxis(_as_float(logits), axis, -1)
        index = self.choose(_softmax_weights(logits.reshape(-1, logits.shape[-1])))
        return index.reshape(logits.shape[:-1]).astype(jnp.asarray(0).dtype)

    def token(self, key: Array, probs: Any) -> Array:
        """For `jaxsd.categorical`, whose two-level inversion has a test of its own."""
        self._use(key, "jaxsd.categorical")
        probs = _as_float(probs)
        rows = probs.reshape(-1, probs.shape[-1])
        drawn = self.choose(rows / jnp.sum(rows, axis=1, keepdims=True))
        return drawn.reshape(probs.shape[:-1])

    def choice(
        self,
        key: Array,
        a: Any,
        shape: Any = (),
        replace: bool = True,
        p: Any = None,
        axis: int = 0,
        **options: Any,
    ) -> Array:
        del options
        self._use(key, "choice")
        values = jnp.arange(a) if np.ndim(a) == 0 else jnp.asarray(a)
        count = math.prod(shape)
        if values.ndim != 1 or axis != 0 or (not replace and count > 1):
            raise CannotReplay("choice of subarrays or without replacement")
        weights = jnp.ones(values.shape) if p is None else _as_float(p)
        weights = weights / jnp.sum(weights)
        index = self.choose(jnp.broadcast_to(weights[None, :], (count, values.size)))
        return values[index].reshape(shape)

    def uniform(
        self, key: Array, shape: Any = (), dtype: Any = None, minval: Any = 0.0, maxval: Any = 1.0
    ) -> "_Uniform":
        self._use(key, "uniform")
        dtype = jnp.ones(()).dtype if dtype is None else jnp.dtype(dtype)
        low, high = (jnp.asarray(x, dtype) for x in (minval, maxval))
        first, count = len(self.low), math.prod(shape)
        self.low += [jnp.zeros((), dtype)] * count
        self.high += [jnp.ones((), dtype)] * count
        ids = np.arange(first, first + count).reshape(shape)
        return _Uniform(
            self, ids, jnp.broadcast_to(high - low, shape), jnp.broadcast_to(low, shape)
        )

    def is_below(self, uniform: "_Uniform", other: Any) -> Array:
        """Decides scale * u + offset < other; every element is a draw among what is still open."""
        other = jnp.asarray(other).astype(uniform.scale.dtype)
        shape = np.broadcast_shapes(uniform.ids.shape, other.shape)
        ids = np.broadcast_to(uniform.ids, shape).reshape(-1)
        scale, offset, other = (
            jnp.broadcast_to(x, shape).reshape(-1) for x in (uniform.scale, uniform.offset, other)
        )
        bound = (other - offset) / jnp.where(scale == 0, jnp.ones_like(scale), scale)
        # A uniform that occurs once may be decided together with others; one at a time if it
        # recurs.
        whole = len(set(ids.tolist())) == ids.size
        parts = [np.arange(ids.size)] if whole else [np.array([i]) for i in range(ids.size)]
        decided = [jnp.zeros((0,), bool)]
        for part in parts:
            if not part.size:
                continue
            low = jnp.stack([self.low[i] for i in ids[part]])
            high = jnp.stack([self.high[i] for i in ids[part]])
            at = jnp.clip(bound[part], low, high)
            open_ = high > low
            p = jnp.where(
                open_, (at - low) / jnp.where(open_, high - low, 1), (low < at).astype(at.dtype)
            )
            below = self.choose(_coin(p)) == 1
            low, high = jnp.where(below, low, at), jnp.where(below, at, high)
            for place, i in enumerate(ids[part]):
                self.low[i], self.high[i] = low[place], high[place]
            decided.append(below)
        below = jnp.concatenate(decided)
        below = jnp.where(scale > 0, below, jnp.where(scale < 0, ~below, offset < other))
        return (below & ~jnp.isnan(other)).reshape(shape)


class _Uniform:
    """A uniform number not yet drawn: scale * u + offset, elementwise; it can be compared."""

    __array_ufunc__ = None  # numpy leaves comparisons and arithmetic with it to this class
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, replay: _Replay, ids: np.ndarray, scale: Array, offset: Array):
        self.replay, self.ids, self.scale, self.offset = replay, ids, scale, offset
        self.shape, self.ndim, self.dtype = ids.shape, ids.ndim, scale.dtype

    def _affine(self, factor: Any, shift: Any) -> "_Uniform":
        factor, shift = (jnp.asarray(x).astype(self.dtype) for x in (factor, shift))
        shape = np.broadcast_shapes(self.ids.shape, factor.shape, shift.shape)
        factor, shift, scale, offset = (
            jnp.broadcast_to(x, shape) for x in (factor, shift, self.scale, self.offset)
        )
        ids = np.broadcast_to(self.ids, shape)
        return _Uniform(self.replay, ids, scale * factor, offset * factor + shift)

    def __mul__(self, other: Any) -> "_Uniform":
        return self._affine(other, 0.0)

    def __add__(self, other: Any) -> "_Uniform":
        return self._affine(1.0, other)

    def __sub__(self, other: Any) -> "_Uniform":
        return self._affine(1.0, -jnp.asarray(other))

    def __rsub__(self, other: Any) -> "_Uniform":
        return self._affine(-1.0, other)

    def __truediv__(self, other: Any) -> "_Uniform":
        return self._affine(1.0 / jnp.asarray(other), 0.0)

    __rmul__, __radd__ = __mul__, __add__

    # That a uniform equals a bound exactly has probability zero, so "<" and "<=" are one.
    def __lt__(self, other: Any) -> Array:
        return self.replay.is_below(self, other)

    def __gt__(self, other: Any) -> Array:
        return ~self.replay.is_below(self, other) & ~jnp.isnan(jnp.asarray(other))

    __le__, __ge__ = __lt__, __gt__

    def __getitem__(self, index: Any) -> "_Uniform":
        return _Uniform(self.replay, self.ids[index], self.scale[index], self.offset[index])

    def __len__(self) -> int:
        return len(self.ids)

    def reshape(self, *shape: Any) -> "_Uniform":
        scale, offset = self.scale.reshape(*shape), self.offset.reshape(*shape)
        return _Uniform(self.replay, self.ids.reshape(*shape), scale, offset)


def _as_float(value: Any) -> Array:
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.ones(()).dtype)


def _coin(p: Array) -> Array:
    """Weights `[m, 2]` of false and true; as the sampler's `u < p` has it, NaN is false."""
    p = jnp.where(p > 0, jnp.minimum(p, 1), 0)
    return jnp.stack([1 - p, p], axis=-1)


def _softmax_weights(logits: Array) -> Array:
    """Weights `[m, n]` of `categorical`, also where its argmax is decided by an inf or a NaN."""
    decided = ~jnp.isfinite(jnp.max(logits, axis=-1, keepdims=True))
    only = jnp.arange(logits.shape[-1])[None, :] == jnp.argmax(logits, axis=-1, keepdims=True)
    soft = jax.nn.softmax(jnp.where(decided, 0, logits), axis=-1)
    return jnp.where(decided, only.astype(soft.dtype), soft)


@contextlib.contextmanager
def _patched(replay: _Replay) -> Iterator[None]:
    """`jax.random` draws from `replay` and jitted functions run as Python; undone in any case."""

    def opaque(name: str) -> Callable[..., Any]:
        def sampler(*args: Any, **options: Any) -> Any:
            raise CannotReplay(f"jax.random.{name} has no exact replay")

        return sampler

    samplers: dict[str, Any] = {
        name: getattr(replay, name) for name in ("bernoulli", "categorical", "choice", "uniform")
    }
    for name in set(dir(jax.random)) - set(samplers) - _KEY_FUNCTIONS:
        if not name.startswith("_") and callable(getattr(jax.random, name)):
            samplers[name] = opaque(name)
    replaced = [(jax.random, name, sampler) for name, sampler in samplers.items()]
    package = sys.modules["jaxsd"]
    replaced += [(module, "categorical", replay.token) for module in (package, sampling_lib)]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, sampler in replaced:
            setattr(module, name, sampler)
        with jax.disable_jit():
            yield
    finally:
        for module, name, sampler in originals:
            setattr(module, name, sampler)


def walk(
    sample: Callable[[Array], Any], key: Array, max_paths: int
) -> Iterator[tuple[Any, float, _Replay]]:
    """Every run of `sample` with its probability, depth first."""
    pending: list[list[int]] = [[]]
    for _ in range(max_paths):
        if not pending:
            return
        path = _Path(pending.pop())
        replay = _Replay(path.choose)
        with _patched(replay):
            outcome = sample(key)
        pending += path.others
        yield outcome, path.weight, replay
    if pending:
        raise CannotReplay(f"more than {max_paths} ways to draw")


class _Path:
    """Draws that follow `decided` and then take the first possible outcome, noting the others."""

    def __init__(self, decided: list[int]):
        self.decided, self.chosen, self.weight = decided, [], 1.0
        self.others: list[list[int]] = []

    def choose(self, weights: Array) -> Array:
        start = len(self.chosen)
        for row in np.asarray(weights, np.float64):
            at = len(self.chosen)
            if at < len(self.decided):
                outcome = self.decided[at]
            else:
                outcome, *rest = np.flatnonzero(row > 0).tolist()
                self.others += [[*self.chosen, other] for other in rest]
            self.chosen.append(outcome)
            self.weight *= float(row[outcome])
        return jnp.asarray(self.chosen[start:], jnp.int32)


class Runs(NamedTuple):
    """Runs of a function over N stacked arguments and all outcomes of its draws.

    outputs: what it returned, arrays `[M, ...]`.
    weights: `[M]`, the chance of the run given its argument; above 0.
    owners: `[M]`, index of the argument.
    notes: what was found wrong with its keys.
    """

    outputs: tuple[np.ndarray, ...]
    weights: np.ndarray
    owners: np.ndarray
    notes: list[str]


def lanes(fn: Callable[..., Any], args: tuple[np.ndarray, ...], max_lanes: int = 1 << 19) -> Runs:
    """All runs at once, compiled; needs draws that are the same in number and kind in every run."""
    arities: list[int] = []

    def first(weights: Array) -> Array:
        arities.extend([weights.shape[1]] * weights.shape[0])
        return jnp.zeros(weights.shape[:1], jnp.int32)

    key, other_key = jax.random.key(0), jax.random.key(1)

    def discover(*args: Any) -> Any:
        with _patched(_Replay(first)):
            return fn(*args)

    jax.eval_shape(discover, key, *(x[0] for x in args))
    num_paths, size = math.prod(arities), len(args[0])
    if num_paths * size > max_lanes:
        raise CannotReplay(f"{num_paths} ways to draw for each of {size} inputs")
    paths = np.array(list(itertools.product(*map(range, arities))), np.int32)
    paths = paths.reshape(num_paths, len(arities))
    samplers: list[str] = []

    def lane(key: Array, path: Array, *args: Array) -> tuple[Any, Array, list[Array]]:
        at, weight = 0, jnp.ones(())

        def choose(weights: Array) -> Array:
            nonlocal at, weight
            num, arity = weights.shape
            if arities[at : at + num] != [arity] * num:
                raise CannotReplay("draws that depend on earlier draws in number or kind")
            index = path[at : at + num]
            at += num
            chosen = jnp.take_along_axis(weights, index[:, None], axis=1)
            weight = weight * jnp.prod(chosen).astype(weight.dtype)
            return index

        replay = _Replay(choose)
        with _patched(replay):
            outputs = fn(key, *args)
        if at != len(arities):
            raise CannotReplay("fewer draws than in another run")
        samplers[:] = replay.samplers
        return jax.tree.map(jnp.asarray, outputs), weight, replay.keys

    axes = (None, 0, *(0 for _ in args))
    run_all = jax.jit(jax.vmap(lane, in_axes=axes))
    stacked = [np.tile(x, (num_paths,) + (1,) * (x.ndim - 1)) for x in args]
    results = []
    for one in (key, other_key):
        outputs, weight, keys = run_all(one, np.repeat(paths, size, axis=0), *stacked)
        possible = np.asarray(weight) > 0
        arrays = [np.asarray(x)[possible] for x in (*outputs, weight)]
        results.append((arrays, [np.asarray(data)[possible] for data in keys], possible))
    (arrays, keys, possible), (other_arrays, other_keys, _) = results
    _check_same(arrays, other_arrays)
    notes = []
    for i, j in itertools.combinations(range(len(keys)), 2):
        if np.any(np.all(keys[i] == keys[j], axis=-1)):
            notes.append(_REUSED.format(samplers[i], samplers[j]))
    if any(np.any(np.all(a == b, axis=-1)) for a, b in zip(keys, other_keys, strict=True)):
        notes.append(_CONSTANT)
    owners = np.tile(np.arange(size), num_paths)[possible]
    *outputs, weights = arrays
    return Runs(tuple(outputs), weights.astype(np.float64), owners, notes)


def one_by_one(fn: Callable[..., Any], args: tuple[np.ndarray, ...]) -> Runs:
    """All runs one after another, for code that branches in Python on what it drew; slow."""
    outputs: list[tuple[np.ndarray, ...]] = []
    weights: list[float] = []
    owners: list[int] = []
    notes: list[str] = []
    for index in range(len(args[0])):
        inputs = [jnp.asarray(x[index]) for x in args]
        # The second key only shows whether anything but the draws depends on it: a few inputs do.
        runs = []
        for key in (jax.random.key(0), jax.random.key(1))[: 2 if index % 16 == 0 else 1]:
            runs.append(list(walk(lambda key: fn(key, *inputs), key, 5_000)))  # noqa: B023
        for output, weight, replay in runs[0]:
            outputs.append(tuple(np.asarray(x) for x in output))
            weights.append(weight)
            owners.append(index)
            keys = [np.asarray(data).tobytes() for data in replay.keys]
            for i, j in itertools.combinations(range(len(keys)), 2):
                if keys[i] == keys[j]:
                    notes.append(_REUSED.format(replay.samplers[i], replay.samplers[j]))
        if len(runs) == 2:
            drawn = [[out for out, _, _ in run] for run in runs]
            _check_same(*(jax.tree.leaves(jax.tree.map(np.asarray, out)) for out in drawn))
            used = [{np.asarray(k).tobytes() for *_, r in run for k in r.keys} for run in runs]
            if used[0] & used[1]:
                notes.append(_CONSTANT)
    stacked = tuple(np.stack(parts) for parts in zip(*outputs, strict=True))
    return Runs(stacked, np.array(weights), np.array(owners), list(dict.fromkeys(notes)))


_REUSED = "a key is used twice, by {} and by {}: the two draws are not independent"
_CONSTANT = "a draw does not depend on the key given: it repeats in every call"


def _check_same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> None:
    """Two keys, all draws replayed, must give the same outputs."""
    same = len(first) == len(second)
    if not same or not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)):
        raise CannotReplay("the output depends on the key beyond the draws that were seen")


def freeze(tree: Any) -> Hashable:
    """An outcome as something a dict can hold."""

    def tuples(value: Any) -> Hashable:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    if isinstance(tree, Mapping):
        return tuple((name, freeze(value)) for name, value in sorted(tree.items()))
    if isinstance(tree, tuple | list):
        return tuple(map(freeze, tree))
    return tuples(np.asarray(tree).tolist())
