"""One decoder-only Flax transformer: training forward, and the cached forward of decoding.

The module classes hold parameters and the mathematics of one layer. Everything outside this file
sees pure functions on a plain nested dict of arrays: Flax's graph definition is static, made once
per config, and the weights are traced arguments of every compiled program.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from . import positions as places
from .configs import Config
from .positions import Masks
from .quantise import (
    QuantisedKernel,
    as_matrix,
    quantise_vectors,
    quantised_product,
    take_rows,
)

Params = Mapping[str, Any]


class LayerCache(NamedTuple):
    """Keys and values of one layer.

    keys: `[B, H_kv, S, D]`, rotated.
    values: `[B, H_kv, S, D]`.
    key_scales: `[B, H_kv, S, 1]` float32 if the keys are int8, else None.
    value_scales: the same of the values.
    """

    keys: Array
    values: Array
    key_scales: Array | None = None
    value_scales: Array | None = None


Cache = tuple[LayerCache, ...]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 whatever the parameters' type."""

    def __init__(self, config: Config, size: int):
        self.adds_one = config.norm_adds_one
        self.scale = nnx.Param(jnp.zeros((size,)) if self.adds_one else jnp.ones((size,)))
        self.eps = config.norm_eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32)
        if self.adds_one:
            scale = 1.0 + scale
        normed = x32 * lax.rsqrt(mean_square + self.eps) * _as_last_axis(scale, x)
        return normed.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias, in float32 whatever the parameters' type."""

    def __init__(self, config: Config, size: int):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,)))
        self.eps = config.norm_eps

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        normed = centred * lax.rsqrt(variance + self.eps) * _as_last_axis(scale, x)
        return (normed + _as_last_axis(bias, x)).astype(x.dtype)


_NORMS = {"rms": RMSNorm, "layer": LayerNorm}
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Attention(nnx.Module):
    """Grouped-query attention, with rotary positions unless they are learned.

    The three input projections are one matrix, grouped by key head: slice `[h]` holds the query
    heads that share key head `h`, then its key, then its value. One product instead of three, and
    the leading axis is the one to shard.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        group = config.n_heads // config.n_kv_heads
        self.qkv = nnx.Param(
            _normal(rngs, (config.n_kv_heads, group + 2, config.head_dim, config.d_model))
        )
        out_scale = (2 * config.n_layers) ** -0.5
        self.out = nnx.Param(
            _normal(rngs, (config.d_model, config.n_heads * config.head_dim), out_scale)
        )
        if config.qkv_bias:
            self.qkv_bias = nnx.Param(jnp.zeros(self.qkv.shape[:3]))
        if config.output_bias:
            self.out_bias = nnx.Param(jnp.zeros((config.d_model,)))
        if config.qk_norm:
            self.query_norm = RMSNorm(config, config.head_dim)
            self.key_norm = RMSNorm(config, config.head_dim)
        self.config = config

    def __call__(
        self, x: Array, rotation: Array | None, masks: Masks, cache: LayerCache | None
    ) -> tuple[Array, LayerCache]:
        """Attends over what the masks let through of the cache and of the block itself.

        Returns the output and the block's own keys and values `[B, H_kv, T, D]`, not yet written,
        in the form that the cache has.
        """
        config = self.config
        batch, length, _ = x.shape
        heads, size = config.n_kv_heads, config.head_dim
        group = config.n_heads // heads
        # One matrix: the axis that may be divided among devices is the first, so no row moves.
        qkv = _linear(x, as_matrix(self.qkv.get_value()))
        if config.qkv_bias:
            qkv = qkv + _as_last_axis(self.qkv_bias[...].reshape(-1), qkv)
        qkv = qkv.reshape(batch, length, heads, group + 2, size)
        qk = qkv[:, :, :, : group + 1]
        if config.qk_norm:
            normed = [self.query_norm(qk[:, :, :, :group]), self.key_norm(qk[:, :, :, group:])]
            qk = jnp.concatenate(normed, axis=3)
        if rotation is not None:
            qk = places.rotate(qk, rotation)
        queries = qk[:, :, :, :group].transpose(0, 2, 3, 1, 4)  # [B, H_kv, G, T, D]
        queries = queries.reshape(batch, heads, group * length, size)
        keys = qk[:, :, :, group].transpose(0, 2, 1, 3)  # [B, H_kv, T, D]
        values = qkv[:, :, :, group + 1].transpose(0, 2, 1, 3)

        fresh = LayerCache(keys, values)
        if cache is not None and cache.key_scales is not None:
            # The block reads itself as later blocks will read it. What a token sees must not depend
            # on how the text was cut into blocks: drafting would change the target's law.
            fresh, keys, values = _as_in_int8_cache(keys, values)
        mixed = _attend(config, queries, keys, values, masks, cache)
        mixed = mixed.reshape(batch, heads, group, length, size).transpose(0, 3, 1, 2, 4)
        out = _linear(mixed.reshape(batch, length, -1), self.out.get_value())
        if config.output_bias:
            out = out + _as_last_axis(self.out_bias[...], out)
        return out, fresh


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)), gate and up in one matrix; SwiGLU with silu."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate_up = nnx.Param(_normal(rngs, (2, config.d_ff, config.d_model)))
        out_scale = (2 * config.n_layers) ** -0.5
        self.down = nnx.Param(_normal(rngs, (config.d_model, config.d_ff), out_scale))
        if config.mlp_bias:
            self.gate_up_bias = nnx.Param(jnp.zeros((2, config.d_ff)))
            self.down_bias = nnx.Param(jnp.zeros((config.d_model,)))
        self.config = config

    def __call__(self, x: Array) -> Array:
        act, has_bias = _ACTIVATIONS[self.config.activation], self.config.mlp_bias
        both = _linear(x, self.gate_up.get_value())  # [B, T, 2, F]
        if has_bias:
            both = both + self.gate_up_bias[...][None, None]
        out = _linear(act(both[:, :, 0]) * both[:, :, 1], self.down.get_value())
        return out + _as_last_axis(self.down_bias[...], out) if has_bias else out


class PlainMLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.up = nnx.Param(_normal(rngs, (config.d_ff, config.d_model)))
        out_scale = (2 * config.n_layers) ** -0.5
        self.down = nnx.Param(_normal(rngs, (config.d_model, config.d_ff), out_scale))
        if config.mlp_bias:
            self.up_bias = nnx.Param(jnp.zeros((config.d_ff,)))
            self.down_bias = nnx.Param(jnp.zeros((config.d_model,)))
        self.config = config

    def __call__(self, x: Array) -> Array:
        act, has_bias = _ACTIVATIONS[self.config.activation], self.config.mlp_bias
        up = _linear(x, self.up.get_value())
        if has_bias:
            up = up + _as_last_axis(self.up_bias[...], up)
        out = _linear(act(up), self.down.get_value())
        return out + _as_last_axis(self.down_bias[...], out) if has_bias else out


class Block(nnx.Module):
    """Pre-norm residual block: MLP after attention, or both side by side."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm, width = _NORMS[config.norm], config.d_model
        self.attention_norm = norm(config, width)
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm(config, width)
        self.mlp = GatedMLP(config, rngs) if config.gated_mlp else PlainMLP(config, rngs)
        if config.post_norms:
            self.attention_post_norm = norm(config, width)
            self.mlp_post_norm = norm(config, width)
        self.config = config

    def __call__(
        self, x: Array, rotation: Array | None, masks: Masks, cache: LayerCache | None
    ) -> tuple[Array, LayerCache]:
        with jax.named_scope("attention"):
            mixed, fresh = self.attention(self.attention_norm(x), rotation, masks, cache)
            if self.config.post_norms:
                mixed = self.attention_post_norm(mixed)
        with jax.named_scope("mlp"):
            between = x + mixed
            out = self.mlp(self.mlp_norm(x if self.config.parallel_blocks else between))
            if self.config.post_norms:
                out = self.mlp_post_norm(out)
            return between + out, fresh


class Transformer(nnx.Module):
    """Embedding, blocks, final norm and head."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embedding = nnx.Param(_normal(rngs, (config.vocab_size, config.d_model)))
        if config.learned_positions is not None:
            shape = (config.learned_positions, config.d_model)
            self.position_embedding = nnx.Param(_normal(rngs, shape))
        self.layers = nnx.Dict(
            {str(index): Block(config, rngs) for index in range(config.n_layers)}
        )
        self.final_norm = _NORMS[config.norm](config, config.d_model)
        if not config.tie_embeddings:
            self.head = nnx.Param(_normal(rngs, (config.vocab_size, config.d_model)))
        self.config = config

    def __call__(
        self, tokens: Array, positions: Array, masks: Mapping[int, Masks], cache: Cache | None
    ) -> tuple[Array, Array, Cache]:
        """Logits `[B, T, V]` float32, final hidden states, and the block's keys and values.

        The masks are those of each window that a layer has.
        """
        config = self.config
        x = take_rows(self.embedding.get_value(), tokens)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.learned_positions is not None:
            # Clipped: places beyond the table occur behind the end of a text, where all is masked.
            rows = positions + config.position_offset
            x = x + jnp.take(self.position_embedding[...], rows, axis=0, mode="clip")
        rotations = {window: places.rotation(config, positions, window) for window in masks}
        fresh = []
        # Unrolled: a scan over layers copied weights and caches each step, 1.8x to 3.1x slower.
        for index in range(config.n_layers):
            layer_cache = None if cache is None else cache[index]
            window = config.window(index)
            with jax.named_scope(f"layer_{index}"):
                layer = self.layers[str(index)]
                x, block = layer(x, rotations[window], masks[window], layer_cache)
            fresh.append(block)
        x = self.final_norm(x)
        head = self.embedding if config.tie_embeddings else self.head
        with jax.named_scope("head"):
            logits = _softcap(
                _linear(x, head.get_value()).astype(jnp.float32), config.logit_softcap
            )
        return logits, x, tuple(fresh)


def init_params(config: Config, key: Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random weights as a nested dict of arrays; the same key gives the same weights.

    Matrices are normal with standard deviation 1/sqrt(fan-in), the two that write to the residual
    stream divided by sqrt(2 n_layers) more; norm scales are one.
    """
    return _initializer(config, jnp.dtype(dtype))(key)


def forward(config: Config, params: Params, tokens: Array) -> Array:
    """Next-token logits of whole sequences, without a cache: the forward of training.

    Args:
      config: the shape `params` has.
      params: nested dict as `init_params` makes it; its dtype is the dtype of the computation.
      tokens: `[B, T]` int32.

    Returns:
      `[B, T, V]` float32; `logits[:, t]` depends on `tokens[:, :t + 1]` only.

    Raises:
      ValueError: more tokens than learned positions.
    """
    _check_positions(config, tokens.shape[1], "tokens")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    masks = places.text_masks(places.windows(config), tokens.shape[1])
    logits, _, _ = _merge(config, params)(tokens, positions, masks, None)
    return logits


def num_parameters(config: Config) -> int:
    """Number of parameters, embeddings included.

    >>> from jaxsd.models import CONFIGS
    >>> num_parameters(CONFIGS["tiny"])
    125248
    """
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))


def abstract_params(config: Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The tree of `init_params` as shapes and dtypes, allocating nothing."""
    return jax.eval_shape(
        functools.partial(init_params, config, dtype=dtype), jax.eval_shape(jax.random.key, 0)
    )


class TransformerLM(NamedTuple):
    """A `Config` as a `jaxsd.LanguageModel`: two pure functions, no state.

    config: the shape.
    cache_dtype: type of the cached keys and values; int8 is with a scale per token and head.
    """

    config: Config
    cache_dtype: Any = jnp.float32

    def init_cache(self, batch_size: int, max_len: int) -> Cache:
        """Zeroed keys and values for `max_len` positions, or a few more, of `batch_size` rows.

        Raises:
          ValueError: more positions than were learned, where they are.
        """
        config = self.config
        _check_positions(config, max_len, "slots (a decoder asks for its max_len and K more)")
        # Whole tiles: a TPU copies the caches of other sizes in every pass.
        tile = _TILE if max_len >= 2 * _TILE else _MIN_TILE
        num_slots = -(-max_len // tile) * tile
        shape = (batch_size, config.n_kv_heads, num_slots, config.head_dim)

        def one() -> LayerCache:
            keys, values = jnp.zeros(shape, self.cache_dtype), jnp.zeros(shape, self.cache_dtype)
            if self.cache_dtype != jnp.int8:
                return LayerCache(keys, values)
            sizes = (*shape[:3], 1)
            return LayerCache(keys, values, jnp.zeros(sizes), jnp.zeros(sizes))

        return tuple(one() for _ in range(config.n_layers))

    def apply(
        self, params: Params, tokens: Array, positions: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """Logits of a block of tokens, and the cache with the block's keys and values in it.

        Args:
          params: nested dict of arrays.
          tokens: `[B, T]` int32.
          positions: `[B, T]` int32, consecutive within a row.
          cache: as `init_cache` made it or `apply` returned it.

        Returns:
          logits `[B, T, V]` float32 and the new cache.
        """
        starts = positions[:, 0]
        sizes = places.windows(self.config)
        masks = places.block_masks(sizes, positions, starts, _num_slots(cache))
        logits, hidden, fresh = _merge(self.config, params)(tokens, positions, masks, cache)
        return logits, _write(cache, fresh, starts, hidden)

    def apply_tree(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        cache: Cache,
        starts: Array,
        seen: Array,
    ) -> tuple[Array, Cache]:
        """Logits of some nodes of a tree, and the cache with their keys and values in it.

        Args:
          params: nested dict of arrays.
          tokens: `[B, T]` int32, nodes W - T to W - 1.
          positions: `[B, T]` int32, those of their depths.
          cache: with the nodes before them at slots `starts` to `starts + W - T - 1`.
          starts: `[B]` int32, where the tree begins.
          seen: `[B, T, W]` bool, the nodes on each node's path, itself included.

        Returns:
          logits `[B, T, V]` float32 and the new cache.
        """
        sizes = places.windows(self.config)
        masks = places.tree_masks(sizes, positions, _num_slots(cache), starts, seen)
        logits, hidden, fresh = _merge(self.config, params)(tokens, positions, masks, cache)
        before = seen.shape[2] - tokens.shape[1]
        return logits, _write(cache, fresh, starts + before, hidden)

    def keep(self, cache: Cache, starts: Array, sources: Array) -> Cache:
        """Moves slots `sources` `[B, D]` to `starts` and the slots after it."""

        batch_size, depth = sources.shape

        def read(row: Array, path: Cache) -> Cache:
            def one(buffer: Array, path: Array) -> Array:
                # Slices, and no gather: for that a TPU would give whole caches another layout.
                size = (1, buffer.shape[1], 1, buffer.shape[3])
                kept = [
                    lax.dynamic_slice(buffer, (row, 0, sources[row, level], 0), size)
                    for level in range(depth)
                ]
                return lax.dynamic_update_slice_in_dim(path, jnp.concatenate(kept, 2), row, 0)

            return jax.tree.map(one, cache, path)

        # Read in a loop of its own: XLA would merge the read with the writes before it, into a
        # program that needs each buffer as it was, and copies it.
        path = jax.tree.map(lambda buffer: jnp.zeros_like(buffer[:, :, :depth]), cache)
        path = lax.fori_loop(0, batch_size, read, path)
        return jax.tree.map(lambda buffer, rows: _write_rows(buffer, rows, starts), cache, path)


def language_model(config: Config, cache_dtype: Any = jnp.float32) -> TransformerLM:
    """The decoding interface of a transformer of this shape.

    Args:
      config: the shape.
      cache_dtype: type of the cached keys and values: a floating type, or int8. With int8 a token's
        keys and values are rounded in every head to 127 steps of their largest, wherever they are
        read: a model a little off the one with a float cache, decoded as exactly as that, except
        that a value within rounding of the middle between two steps can fall to either side.

    Raises:
      ValueError: if it is another type.

    >>> import jax, jax.numpy as jnp
    >>> from jaxsd import models
    >>> config = models.CONFIGS["tiny"]
    >>> model, params = models.language_model(config), models.init_params(config, jax.random.key(0))
    >>> tokens, positions = jnp.array([[1, 2, 3]]), jnp.array([[0, 1, 2]])
    >>> logits, cache = model.apply(params, tokens, positions, model.init_cache(1, 8))
    >>> logits.shape
    (1, 3, 512)
    """
    dtype = jnp.dtype(cache_dtype)
    if not jnp.issubdtype(dtype, jnp.floating) and dtype != jnp.int8:
        raise ValueError(f"cache_dtype={dtype.name} must be a floating type or int8")
    return TransformerLM(config, cache_dtype)


# Slots of a cache come in multiples of these.
_TILE, _MIN_TILE = 128, 16

# A score that no softmax can see, finite so that a row of nothing else stays finite.
_MASKED = -1e30


@functools.lru_cache(maxsize=64)
def _graph(config: Config) -> Any:
    """The static half of the Flax module, made once per shape."""
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))[0]


@functools.lru_cache(maxsize=64)
def _initializer(config: Config, dtype: Any) -> Any:
    """`init_params` of one shape, compiled once."""

    def init(key: Array) -> dict[str, Any]:
        params = nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(key))))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return jax.jit(init)


def _merge(config: Config, params: Params) -> Transformer:
    return nnx.merge(_graph(config), params)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = 1.0) -> Array:
    return scale * shape[-1] ** -0.5 * jax.random.normal(rngs.params(), shape)


def _as_last_axis(vector: Array, x: Array) -> Array:
    """A vector with axes of one in front, as many as it takes to meet `x`."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


def _softcap(x: Array, cap: float | None) -> Array:
    """c tanh(x / c); None does nothing."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _check_positions(config: Config, wanted: int, what: str) -> None:
    if config.learned_positions is None:
        return
    room = config.learned_positions - config.position_offset
    if wanted > room:
        raise ValueError(f"{wanted} {what} exceed the {room} positions that this model learned")


def _num_slots(cache: Cache) -> int:
    return cache[0].keys.shape[2]


def _per_group(mask: Array, group: int) -> Array:
    """A mask `[B, T or 1, S]` for scores `[B, H_kv, G T, S]`: the query heads share it."""
    batch, length, slots = mask.shape
    if length == 1:
        return mask[:, None]
    mask = jnp.broadcast_to(mask[:, None], (batch, group, length, slots))
    return mask.reshape(batch, 1, group * length, slots)


def _attend(
    config: Config,
    queries: Array,
    keys: Array,
    values: Array,
    masks: Masks,
    cache: LayerCache | None,
) -> Array:
    """What queries `[B, H_kv, G T, D]` take from the cache and from their own block's keys, values.

    The cache is read as it was before this block, and no further than it is filled: as far as the
    least of a few lengths that holds every row's text, chosen on the device. The block is written
    after the last layer has read (see `_write`).
    """
    length = keys.shape[2]
    group = queries.shape[2] // length
    block = jnp.where(_per_group(masks.block, group), _scores(config, queries, keys), _MASKED)

    visible = masks.cache

    def over(slots: int) -> Array:
        scores, part = block, None
        if cache is not None and visible is not None and slots:
            part = jax.tree.map(lambda leaf: leaf[:, :, :slots], cache)
            past = _scores(config, queries, part.keys, part.key_scales)
            past = jnp.where(_per_group(visible[..., :slots], group), past, _MASKED)
            scores = jnp.concatenate([past, block], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
        mixed = weights[..., -length:] @ values
        if part is not None:
            mixed = mixed + _mixed(weights[..., :-length], part.values, part.value_scales)
        return mixed

    if cache is None or masks.reach is None:
        return over(0)
    sizes = _attended_lengths(cache.keys.shape[2], length)
    if len(sizes) == 1:
        return over(sizes[0])
    index = jnp.sum(masks.reach > jnp.array(sizes[:-1], jnp.int32), dtype=jnp.int32)
    return lax.switch(index, [functools.partial(over, slots) for slots in sizes])


def _attended_lengths(num_slots: int, length: int) -> list[int]:
    """How much of a cache a pass may read: a few lengths; the least that is enough is taken.

    A part of a cache is copied before it is read, on CPU as on TPU, so that reading half of it
    costs as much as reading all: each length is four times the one before. A block of a prompt
    has a length of none, for its beginning.
    """
    lengths = [0] if length >= _MIN_PROMPT_BLOCK else []
    part = _MIN_PART
    while 4 * part <= num_slots:
        lengths.append(part)
        part *= 4
    return [*lengths, num_slots]


_MIN_PART = 256
_MIN_PROMPT_BLOCK = 17  # of more tokens than are drafted


def _scores(config: Config, queries: Array, keys: Array, key_scales: Array | None = None) -> Array:
    """Scaled dot products `[B, H_kv, G T, S]` in float32."""
    if key_scales is not None:
        keys = keys.astype(queries.dtype)
    scores = jnp.einsum("bhqd,bhsd->bhqs", queries, keys, preferred_element_type=jnp.float32)
    if key_scales is not None:
        scores = scores * jnp.swapaxes(key_scales, 2, 3)
    scale = config.attention_scale
    scores = scores * (queries.shape[-1] ** -0.5 if scale is None else scale)
    return _softcap(scores, config.attention_softcap)


def _mixed(weights: Array, values: Array, value_scales: Array | None) -> Array:
    """Sums of cached values `[B, H_kv, G T, D]` by attention weights `[B, H_kv, G T, S]`."""
    if value_scales is not None:
        dtype = weights.dtype
        weights = (weights.astype(jnp.float32) * jnp.swapaxes(value_scales, 2, 3)).astype(dtype)
        values = values.astype(dtype)
    return weights @ values


def _as_in_int8_cache(keys: Array, values: Array) -> tuple[LayerCache, Array, Array]:
    """What an int8 cache holds of keys and values, and what is read of it."""
    stored = [quantise_vectors(x) for x in (keys, values)]
    read = [(x.astype(jnp.float32) * scales).astype(keys.dtype) for x, scales in stored]
    (small_keys, key_scales), (small_values, value_scales) = stored
    return LayerCache(small_keys, small_values, key_scales, value_scales), read[0], read[1]


def _linear(x: Array, weight: Any) -> Array:
    """x `[B, T, in]` times a kernel `[..., in]` of either kind, to `[B, T, ...]`.

    The one place where a kernel is multiplied. Two matrices `[2, out, in]` are not made one here:
    where `out` is divided among devices, rows would have to change places, all weights in every
    pass.
    """
    batch, length, width = x.shape
    rows = x.reshape(batch * length, width)
    if isinstance(weight, QuantisedKernel):
        channels = weight.values.shape[:-1]
        return quantised_product(rows, as_matrix(weight)).reshape(batch, length, *channels)
    if len(rows) <= _MAX_THIN_ROWS:
        out = lax.platform_dependent(rows, weight, cpu=_thin_product_on_cpu, default=_product)
    else:
        out = _product(rows, weight)
    return out.reshape(batch, length, *weight.shape[:-1])


def _product(rows: Array, weight: Array) -> Array:
    """rows `[M, in]` times weight `[..., in]`, contracted on their last, contiguous axis."""
    return lax.dot_general(rows, weight, (((rows.ndim - 1,), (weight.ndim - 1,)), ((), ())))


def _thin_product_on_cpu(rows: Array, weight: Array) -> Array:
    """The same product of few rows, in the form that XLA's CPU backend runs best.

    Measured on 2 cores with jaxlib 0.10, best of 12 or more interleaved runs. Milliseconds for all
    matrices of the 18M target:

        rows                 1      2      3      4      5      7
        `_product`         2.69   4.57   4.55   4.66   5.23   5.78
        halves             2.25   6.18   7.17   6.33   6.84   7.26
        weight on the left 2.73   2.97   3.30   3.51   4.69   5.04

    and for a kernel of gates and of what they gate, `[2, d_ff, d_model]`, of a draft (best of 9,
    microseconds, other work beside it): `_product` makes a transposed copy of it in every pass.

        [2, 432, 128], rows  1      2      4      8     40
        `_product`          43     52     55     58    152
        weight on the left   6     14     31     23    154
        [2, 640, 192], rows  1      2      4      8     40
        `_product`         138    231    185    424    452
        weight on the left  16     27     27     56    293

    More rows, best of 9, for all matrices of the 30M model one after the other:

        rows                        4     16     32     64    256   1024
        `_product`                 33     38     46     55    120    401
        weight on the left        6.5     10     16     30    109    529
        left, without the barrier 9.0     15     21     30     95    372

    In whole passes of it the last was 0.72 and 0.93 of `_product`'s time at 96 and 128 rows, and no
    better from 256 on.
    """
    num_rows = len(rows)
    is_large = weight.size >= _MIN_LARGE_WEIGHT
    if num_rows == 1 and is_large and weight.size // weight.shape[-1] % 2 == 0:
        # One row is a matrix-vector product, which XLA gives to one thread. As a batch of two
        # halves it reads the weights with two.
        halves = weight.reshape(2, -1, weight.shape[-1])
        both = jnp.broadcast_to(rows[None], (2, *rows.shape))
        out = lax.dot_general(halves, both, (((2,), (2,)), ((0,), (0,))))  # [2, out / 2, 1]
        return out.reshape(1, *weight.shape[:-1])
    out = _product(weight, rows)
    if num_rows <= _MAX_ROWS_ON_THE_RIGHT:
        # Without the barrier XLA swaps the operands back.
        out = lax.optimization_barrier(out)
    return jnp.moveaxis(out, -1, 0)


# What counts as few rows and as a large matrix in `_thin_product_on_cpu`.
_MAX_THIN_ROWS = 128
_MAX_ROWS_ON_THE_RIGHT = 64
_MIN_LARGE_WEIGHT = 2**18


def _write(cache: Cache, fresh: Cache, starts: Array, hidden: Array) -> Cache:
    """Puts each row's block at its start, in place inside a compiled loop.

    Two things keep XLA from copying whole caches every pass. The write of all layers comes after
    the last read of any, which the impossible offset below tells the compiler (an argmax is never
    negative, but it cannot know). And each row is one `dynamic_update_slice`: vmapped, that becomes
    a scatter, and a TPU copies the operand of a scatter.
    """
    never = (jnp.argmax(hidden.reshape(hidden.shape[0], -1), axis=-1) < 0).astype(starts.dtype)
    starts = starts + never

    return jax.tree.map(lambda buffer, block: _write_rows(buffer, block, starts), cache, fresh)


def _write_rows(buffer: Array, block: Array, starts: Array) -> Array:
    """Puts rows `[B, H_kv, T, D]` into a buffer, each at its own slot."""
    block = block.astype(buffer.dtype)
    if buffer.shape[0] > _MAX_UNROLLED_ROWS:

        def row(index: Array, buffer: Array) -> Array:
            one = lax.dynamic_slice_in_dim(block, index, 1, axis=0)
            return lax.dynamic_update_slice(buffer, one, (index, 0, starts[index], 0))

        return lax.fori_loop(0, buffer.shape[0], row, buffer)
    for index in range(buffer.shape[0]):
        buffer = lax.dynamic_update_slice(
            buffer, block[index : index + 1], (index, 0, starts[index], 0)
        )
    return buffer


# Beyond this many rows the program text would grow past what unrolling saves.
_MAX_UNROLLED_ROWS = 64
