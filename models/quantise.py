"""Weights in 8 or 4 bits: fewer bytes read per pass, for a little accuracy; a free draft.

A kernel `[..., out, in]` becomes integers and scales. Everything else of the parameter tree stays
as it is, and the transformer multiplies by either kind of kernel (see `quantised_product`): a
quantised tree goes where the other went. It is a pytree like any other: it can be compiled over,
donated, placed on a mesh and checkpointed.

>>> import jax
>>> from jaxsd import models
>>> config = models.CONFIGS["tiny"]
>>> params = models.init_params(config, jax.random.key(0))
>>> small = models.quantise(params, bits=4, group_size=16)
>>> down = small["layers"]["0"]["mlp"]["down"]
>>> down.values.shape, str(down.values.dtype), down.scales.shape
((64, 88), 'uint8', (64, 11))
>>> models.forward(config, small, jax.numpy.array([[1, 2, 3]])).shape
(1, 3, 512)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

import jaxsd


class QuantisedKernel(NamedTuple):
    """A matrix as integers times scales: w = values * scale of their group.

    values: `[..., out, in]` int8, or `[..., out, in / 2]` uint8 with two neighbouring columns of
      4 bits each, the first one low.
    scales: `[..., out, in / group]`, of the type that the weights had: that of the computation.
    """

    values: Array
    scales: Array


# The last names on the paths of what `quantise` replaces.
_KERNELS = ("qkv", "out", "gate_up", "up", "down")
_EMBEDDINGS = ("embedding", "head")
# The largest integer of each width; symmetric, so that zero is exact and -w as good as w.
_LARGEST = {8: 127, 4: 7}


# -- trees ----------------------------------------------------------------------------------------


def quantise(
    params: Mapping[str, Any],
    bits: int = 8,
    group_size: int | None = None,
    *,
    embeddings: bool = False,
) -> Any:
    """The same parameters with their kernels in few bits, rounded to nearest.

    Every group of weights has the scale s = max |w| / 127 (or / 7), so that no weight moves by more
    than s / 2. No data is needed, and nothing is fitted. Norms, biases and positions stay.

    Args:
      params: nested dict of arrays, as `init_params` or `load_model` makes it; it can be traced, so
        `jax.eval_shape` gives the shapes of the result.
      bits: 8, or 4 (two weights per byte).
      group_size: inputs that share a scale; divides the inputs of every kernel, and is even for 4
        bits. None: all inputs of an output channel. Small groups cost bytes for their scales.
      embeddings: also the embedding table and the head, which decide directly over tokens.

    Returns:
      A tree whose kernels are `QuantisedKernel`s.

    Raises:
      ValueError: another width, groups that do not fit (every kernel is named), nothing to
        quantise, or kernels that already are.

    Example:
      >>> import jax
      >>> from jaxsd import models
      >>> params = models.init_params(models.CONFIGS["tiny"], jax.random.key(0))
      >>> small = models.quantise(params, embeddings=True)
      >>> 3.5 < models.bytes_of(params) / models.bytes_of(small) < 4
      True

    References:
      Dettmers et al., 2022, https://arxiv.org/abs/2208.07339 (8 bits); Frantar et al., 2022,
      https://arxiv.org/abs/2210.17323 (groups of 4 bits, rounded better than to nearest).
    """
    if isinstance(bits, bool) or bits not in _LARGEST:
        raise ValueError(f"bits={bits!r} must be 8 or 4")
    if group_size is not None and (
        isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1
    ):
        raise ValueError(f"group_size={group_size!r} must be an integer of at least 1, or None")
    chosen = (*_KERNELS, *_EMBEDDINGS) if embeddings else _KERNELS
    problems: list[str] = []
    num_found = 0

    def one(path: Any, leaf: Any) -> Any:
        nonlocal num_found
        if isinstance(leaf, QuantisedKernel):
            problems.append(f"{_name(path)} is quantised already")
        elif getattr(path[-1], "key", None) in chosen:
            num_found += 1
            if problem := _group_problem(leaf.shape[-1], bits, group_size):
                problems.append(f"{_name(path)} of shape {leaf.shape} {problem}")
            elif not problems:
                return _quantiser(bits, group_size)(leaf)
        return leaf

    tree = jax.tree.map_with_path(one, params, is_leaf=_is_quantised)
    if problems:
        raise ValueError(f"params cannot be quantised: {'; '.join(problems)}")
    if not num_found:
        raise ValueError(f"params hold no kernel; wanted leaves named {', '.join(chosen)}")
    return tree


def dequantise(params: Mapping[str, Any]) -> Any:
    """The tree with arrays again, of the type of the scales: what the integers stand for.

    Example:
      >>> import jax
      >>> from jaxsd import models
      >>> params = models.init_params(models.CONFIGS["tiny"], jax.random.key(0))
      >>> back = models.dequantise(models.quantise(params))
      >>> jax.tree.structure(back) == jax.tree.structure(params)
      True
    """

    def one(leaf: Any) -> Any:
        return _weights(leaf, leaf.scales.dtype) if isinstance(leaf, QuantisedKernel) else leaf

    return jax.tree.map(one, params, is_leaf=_is_quantised)


def bytes_of(tree: Any) -> int:
    """Bytes that the arrays of a tree take, or would take where they are only shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxsd import models
      >>> models.bytes_of({"a": jnp.zeros((4,), jnp.float32), "b": jnp.zeros((3,), jnp.int8)})
      19
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def quantised_self(
    model: Any, num_tokens: int, *, name: str = "draft", shares_noise: bool = False
) -> Any:
    """The target, quantised, as its own draft: no second model to find, train or load.

    The output keeps the law of the target whose weights stand under "target". The draft has a cache
    of its own, as its keys and values are not the target's: give it a smaller one by passing
    `language_model(config, cache_dtype=jnp.int8)`.

    It pays where a pass costs what its weights cost to read, and then by no more than the ratio of
    the bytes: a round reads K quantised copies and one original.

    Args:
      model: the target's language model; a quantised kernel needs no other.
      num_tokens: K, at least 1.
      name: the entry of `params` with the quantised weights.
      shares_noise: as of `jaxsd.model_drafter`.

    Returns:
      A `jaxsd.Drafter`.

    Raises:
      ValueError: if `num_tokens` is not an integer of at least 1.

    Example:
      >>> import jax, jaxsd
      >>> from jaxsd import models
      >>> config = models.CONFIGS["tiny"]
      >>> target = models.language_model(config)
      >>> drafter = models.quantised_self(target, num_tokens=2)
      >>> decoder = jaxsd.speculative(target, drafter, max_len=8)
      >>> weights = models.init_params(config, jax.random.key(0))
      >>> params = {"target": weights, "draft": models.quantise(weights, bits=4)}
      >>> int(decoder.generate(params, [[1, 2]], None, jax.random.key(1)).lengths[0])
      8
    """
    return jaxsd.model_drafter(model, num_tokens, name=name, shares_noise=shares_noise)


# -- products -------------------------------------------------------------------------------------


def quantised_product(rows: Array, kernel: QuantisedKernel) -> Array:
    """rows `[M, in]` times a kernel `[out, in]`, to `[M, out]`.

    One scale per channel is applied to the product, and the integers go into it as they are: exact
    in bfloat16 too. Scales of groups have to be applied before the sum over groups.
    """
    return lax.platform_dependent(rows, kernel, cpu=_product_on_cpu, default=_product)


def _product(rows: Array, kernel: QuantisedKernel) -> Array:
    """As accelerators fuse it: they read the small type, and widen it on its way to the product."""
    return _sum_of_products([(rows, _integers(kernel))], kernel.scales)


def _product_on_cpu(rows: Array, kernel: QuantisedKernel) -> Array:
    """The same product, a few output channels at a time.

    XLA's CPU backend does not fuse the change of type into the product: it would write the whole
    matrix anew, in the type of the rows, and read it back. Of a few channels at a time that stays
    in a core's cache, and memory is read in the small type alone. Two products, of even and of odd
    columns, spare 4-bit columns being interleaved, which costs the most of all forms.

    All matrices of a 35M chain (512 wide, 2 cores, jaxlib 0.10, loaded machine, best of 15
    interleaved runs, milliseconds):

        rows                                    1       4
        float32                               8.9     9.9
        int8, whole matrix                   65.6    93.5
        int8, a few channels at a time        5.3     8.9
        int4 by jnp.int4, a few at a time    63.1    73.8
        int4 by a bitcast to jnp.int4        45.1    47.2
        int4, even and odd columns            7.8    12.9
    """
    num_channels, size = kernel.values.shape[0], rows.shape[1]
    at_a_time = max(_MIN_CHANNELS, _BLOCK_SIZE // size)
    num_blocks = num_channels // at_a_time
    if num_blocks <= 1:
        return _block_product(rows, kernel)

    def block(index: Array) -> Array:
        part = [lax.dynamic_slice_in_dim(leaf, index * at_a_time, at_a_time) for leaf in kernel]
        return _block_product(rows, QuantisedKernel(*part)).T

    out = lax.map(block, jnp.arange(num_blocks)).reshape(-1, len(rows)).T
    done = num_blocks * at_a_time
    if done < num_channels:
        rest = QuantisedKernel(kernel.values[done:], kernel.scales[done:])
        out = jnp.concatenate([out, _block_product(rows, rest)], axis=1)
    return out


# Weights in a block, 128 KiB of float32, and the fewest channels worth a product of their own.
_BLOCK_SIZE = 2**15
_MIN_CHANNELS = 8


def as_matrix(kernel: Any) -> Any:
    """A kernel `[..., in]` of either kind as a matrix `[out, in]`."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), kernel)


def take_rows(table: Any, indices: Array) -> Array:
    """Rows of a table `[N, in]` of either kind: `[..., in]`."""
    taken = jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0), table)
    return _weights(taken, taken.scales.dtype) if isinstance(taken, QuantisedKernel) else taken


# -- a cache in 8 bits ----------------------------------------------------------------------------


def quantise_vectors(x: Array) -> tuple[Array, Array]:
    """x `[..., D]` to int8 of that shape and one float32 scale per vector, `[..., 1]`."""
    x = x.astype(jnp.float32)
    scales = _scale(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 8, x.dtype)
    return jnp.round(x / scales).astype(jnp.int8), scales


# -- one kernel -----------------------------------------------------------------------------------


def _is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, QuantisedKernel)


def _name(path: Any) -> str:
    return ".".join(str(getattr(step, "key", step)) for step in path)


def _group_problem(size: int, bits: int, group_size: int | None) -> str | None:
    """Why a kernel of so many inputs has no such groups, if it has none."""
    if group_size is not None and size % group_size:
        return f"has inputs that group_size={group_size} does not divide"
    if bits == 4 and (group_size or size) % 2:
        return f"has groups of {group_size or size}; 4 bits need an even number"
    return None


def _scale(largest: Array, bits: int, dtype: Any) -> Array:
    """Of groups with this largest |w|; 1 where all is zero, or too small for the type."""
    scale = (largest / _LARGEST[bits]).astype(dtype)
    return jnp.where(scale > 0, scale, jnp.ones_like(scale))


@functools.lru_cache(maxsize=16)
def _quantiser(bits: int, group_size: int | None) -> Callable[[Array], QuantisedKernel]:
    """`_quantised`, compiled once per shape: no more than one kernel is in memory twice."""
    return jax.jit(functools.partial(_quantised, bits=bits, group_size=group_size))


def _quantised(weight: Array, bits: int, group_size: int | None) -> QuantisedKernel:
    size = group_size or weight.shape[-1]
    grouped = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, size)
    scales = _scale(jnp.max(jnp.abs(grouped), axis=-1), bits, weight.dtype)
    # By the scale as it is stored. Rounded down to bfloat16 it would let the largest out of range.
    values = jnp.round(grouped / scales.astype(jnp.float32)[..., None])
    values = jnp.clip(values, -_LARGEST[bits], _LARGEST[bits]).astype(jnp.int8)
    values = values.reshape(weight.shape)
    if bits == 4:
        # Not jnp.int4: NumPy, files and transfers hold that in a byte each, and the CPU unpacks it
        # slowly (see `_product_on_cpu`). On an accelerator these bytes are bit for
        # bit an array of jnp.int4.
        values = lax.bitcast_convert_type(values, jnp.uint8)
        values = (values[..., 0::2] & 15) | (values[..., 1::2] << 4)
    return QuantisedKernel(values, scales)


def _is_packed(kernel: QuantisedKernel) -> bool:
    return kernel.values.dtype == jnp.uint8


def _integers(kernel: QuantisedKernel) -> Array:
    """`[..., out, in]` of int8 or int4."""
    values = kernel.values
    if not _is_packed(kernel):
        return values
    pairs = lax.bitcast_convert_type(values, jnp.int4)  # [..., in / 2, 2], the low one first
    return pairs.reshape(*values.shape[:-1], -1)


def _weights(kernel: QuantisedKernel, dtype: Any) -> Array:
    """`[..., out, in]`."""
    return _scaled(_integers(kernel).astype(dtype), kernel.scales)


def _scaled(integers: Array, scales: Array) -> Array:
    """Integers `[..., in]`, or every second of them, times their groups' scales `[..., G]`."""
    grouped = integers.reshape(*scales.shape, -1) * scales.astype(integers.dtype)[..., None]
    return grouped.reshape(integers.shape)


def _block_product(rows: Array, kernel: QuantisedKernel) -> Array:
    """The product in the form that is best for a matrix that fits into a CPU's cache."""
    if not _is_packed(kernel):
        return _product(rows, kernel)
    pair, four = lax.bitcast_convert_type(kernel.values, jnp.int8), jnp.int8(4)
    # Moved up and back down, the low one has its sign filled in.
    even = lax.shift_right_arithmetic(lax.shift_left(pair, four), four)
    odd = lax.shift_right_arithmetic(pair, four)
    return _sum_of_products([(rows[:, 0::2], even), (rows[:, 1::2], odd)], kernel.scales)


def _sum_of_products(parts: list[tuple[Array, Array]], scales: Array) -> Array:
    """Sum of rows `[M, n]` times integers `[out, n]`, scaled: `[M, out]`, summed in float32."""
    dtype = parts[0][0].dtype
    is_per_channel = scales.shape[-1] == 1
    terms = []
    for rows, integers in parts:
        weights = integers.astype(dtype)
        if not is_per_channel:
            weights = _scaled(weights, scales)
        contracted = (((1,), (1,)), ((), ()))
        terms.append(lax.dot_general(rows, weights, contracted, preferred_element_type=jnp.float32))
    out = functools.reduce(jnp.add, terms)
    if is_per_channel:
        out = out * scales[:, 0].astype(out.dtype)[None, :]
    return out.astype(dtype)
