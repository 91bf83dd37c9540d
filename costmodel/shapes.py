"""How many parameters, bytes and FLOPs does a transformer of a given shape have, hold and move?

The counts of parameters are plain arithmetic: exact on Python integers and differentiable on
floats (`jax.tree.map(float, shape)`; under `jax.jit` integers of 32 bits would overflow). Bytes and
FLOPs of a pass are floating-point arrays.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import NON_NEGATIVE, POSITIVE, as_floats, require

Number = Any  # int, float or (traced) array: the arithmetic below is the same


class Shape(NamedTuple):
    """A transformer decoder. The defaults are those of Llama: gated MLP, RMSNorm, no biases."""

    vocab_size: Number
    d_model: Number
    n_layers: Number
    n_heads: Number  # query heads
    n_kv_heads: Number  # key and value heads, shared by groups of query heads
    head_dim: Number
    d_ff: Number  # width of the MLP, or of each expert
    tied_embeddings: Number  # True: one table embeds tokens and yields logits
    mlp_matrices: Number = 3  # 3: gated (up, gate, down); 2: plain (up, down)
    n_shared_experts: Number = 1  # MLPs that every token passes: one in a dense model
    n_experts: Number = 0  # MLPs that a router chooses from; 0 in a dense model
    experts_per_token: Number = 0  # how many it chooses
    qkv_bias: Number = False
    output_bias: Number = False  # of the attention's output projection
    mlp_bias: Number = False
    norm_vectors_per_layer: Number = 2  # vectors of d_model: RMSNorm has one, LayerNorm two
    final_norm_vectors: Number = 1
    head_norm_vectors: Number = (
        0  # vectors of head_dim per layer: 2 where queries and keys have a norm
    )
    position_rows: Number = 0  # rows of a learned table of positions
    embedding_dim: Number | None = None  # width of the token table; None: d_model, no projections
    cross_attention: Number = False  # True: every layer also attends to an encoder's output
    n_local_layers: Number = 0  # layers that attend to the last `window` tokens only
    window: Number = 0
    other_parameters: Number = 0  # whatever no field above counts


class Formats(NamedTuple):
    """Bytes per number of what a pass moves. The default is 16 bits for everything."""

    weight_bytes: Number = 2.0  # scales of a quantised format included: int4 by 32s is 0.5625
    kv_bytes: Number = 2.0
    activation_bytes: Number = 2.0
    # Activations read and written per token and layer, in units of d_model numbers: 10 to 20 where
    # a compiler fuses little. Beside weights they are nothing until hundreds of tokens pass.
    activations_per_layer: Number = 0.0
    # Share of the arithmetic done at the chip's rate for 8-bit numbers, the rest at that for 16.
    # 8-bit weights alone do not make it 1: most kernels widen them and multiply in 16 bits.
    int8_arithmetic: Number = 0.0
    fp8_arithmetic: Number = 0.0


# 16 bits for weights, keys and values, activations.
BFLOAT16 = Formats()
# Weights of 8 bits, the rest of 16.
INT8 = Formats(weight_bytes=1.0)
# Weights of 4 bits with a 16-bit scale per 32 of them, the rest of 16.
INT4 = Formats(weight_bytes=0.5625)


def parameters_non_embedding(shape: Shape) -> Number:
    """Returns the number of parameters outside the tables of tokens and positions, norms included.

        n_layers * (2 d h (n_heads + n_kv_heads) + m d d_ff n_mlps + norms + biases) + final norm

    Args:
      shape: the transformer; d is its `d_model`, h its `head_dim`, m its `mlp_matrices`.

    Returns:
      The count, an int if the shape is integers.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> costmodel.parameters_non_embedding(llama_3_1_8b)
      6979588096
    """
    shape = _count_flags(shape)
    num_mlps = shape.n_shared_experts + shape.n_experts
    return _outside_mlps(shape) + shape.n_layers * num_mlps * _mlp(shape)


def parameters_total(shape: Shape) -> Number:
    """Returns the number of parameters, as a checkpoint holds them.

    Args:
      shape: the transformer.

    Returns:
      The count: `parameters_non_embedding`, one token table if tied and two if not, and the table
      of positions if there is one.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> costmodel.parameters_total(llama_3_1_8b)
      8030261248
    """
    shape = _count_flags(shape)
    num_tables = 2 - shape.tied_embeddings
    positions = shape.position_rows * shape.d_model
    return parameters_non_embedding(shape) + num_tables * _token_table(shape) + positions


def parameters_active(shape: Shape) -> Number:
    """Returns the number of parameters that take part in the arithmetic for one token.

    Twice this is its FLOPs outside attention. The output head counts, the tables of inputs, from
    which a row is gathered, do not; of the experts only the chosen ones do; of attention to an
    encoder not the keys and values, which are computed once, before decoding.

    Args:
      shape: the transformer.

    Returns:
      The count.

    Example:
      >>> from jaxsd import costmodel
      >>> mixtral = costmodel.named_shape("mixtral-8x7b")
      >>> costmodel.parameters_total(mixtral), costmodel.parameters_active(mixtral)
      (46702792704, 12748853248)
    """
    shape = _count_flags(shape)
    num_mlps = shape.n_shared_experts + shape.experts_per_token
    mlps = shape.n_layers * num_mlps * _mlp(shape)
    return _outside_mlps(shape) - _encoder_side(shape) + mlps + _token_table(shape)


def parameters_read(shape: Shape, tokens: ArrayLike | None = None) -> Number:
    """Returns the number of parameters that one forward pass streams from memory.

    The output head is read whole, for logits need every row of it. An input table of its own is
    not: a pass gathers one row of it per token. So tied or not, one table counts. Keys and values
    of an encoder's output are computed before decoding, and their projections not read again. Of a
    mixture of experts, those are read that at least one of the pass's tokens is sent to; with a
    router that spreads them evenly that is, on average,

        n_experts * (1 - (1 - experts_per_token / n_experts)^tokens)

    Args:
      shape: the transformer.
      tokens: number of tokens in the pass, sequences times tokens of each; matters to experts
        alone. None: so many that every expert is read.

    Returns:
      The count: an int if the shape is integers and `tokens` is None or there are no experts.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> costmodel.parameters_read(llama_3_1_8b)
      7504924672
    """
    shape = _count_flags(shape)
    if tokens is None or (isinstance(shape.n_experts, int) and shape.n_experts == 0):
        every_expert = parameters_non_embedding(shape)
        return every_expert - _encoder_side(shape) + _token_table(shape)
    require("tokens", tokens, POSITIVE)
    experts, chosen, tokens_ = as_floats(shape.n_experts, shape.experts_per_token, tokens)
    routed = experts > 0
    share_left = 1 - chosen / jnp.where(routed, experts, 1)
    # A power as an exponential: 0^tokens, all experts chosen by every token, has a finite gradient.
    left = jnp.exp(tokens_ * jnp.log(jnp.maximum(share_left, jnp.finfo(tokens_.dtype).tiny)))
    read = jnp.where(routed, experts * (1 - left), 0)
    layers, mlp, shared, rest, table = as_floats(
        shape.n_layers,
        _mlp(shape),
        shape.n_shared_experts,
        _outside_mlps(shape) - _encoder_side(shape),
        _token_table(shape),
    )
    return rest + layers * (shared + read) * mlp + table


def kv_bytes_per_token(shape: Shape, formats: Formats = BFLOAT16) -> Number:
    """Returns the bytes of keys and values that one token of one sequence leaves in the cache.

        2 n_layers n_kv_heads head_dim * kv_bytes

    Args:
      shape: the transformer. Layers with a window count whole: they hold as much per token, of
        fewer tokens.
      formats: bytes per number.

    Returns:
      Bytes.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> costmodel.kv_bytes_per_token(llama_3_1_8b)
      131072.0
    """
    return 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * formats.kv_bytes


def kv_cache_bytes(shape: Shape, context: ArrayLike, formats: Formats = BFLOAT16) -> Array:
    """Returns the bytes of one sequence's cache.

    Layers with a window hold the last `window` tokens. With an encoder, its output is taken to be
    as long as the context.

        kv_bytes_per_token * (context - (n_local_layers / n_layers) * max(context - window, 0))

    Args:
      shape: the transformer.
      context: number of tokens in the cache, at least 0.
      formats: bytes per number.

    Returns:
      Bytes.

    Raises:
      ValueError: `context` is negative or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> float(costmodel.kv_cache_bytes(llama_3_1_8b, 1000))
      131072000.0
    """
    shape = _count_flags(shape)
    require("context", context, NON_NEGATIVE)
    per_layer, positions, cross = as_floats(
        2 * shape.n_kv_heads * shape.head_dim * formats.kv_bytes,
        _attended(shape, context),
        _cross_attended(shape, context),
    )
    return per_layer * (positions + cross)


def pass_flops(shape: Shape, batch: ArrayLike, rows: ArrayLike, context: ArrayLike) -> Array:
    """Returns the floating-point operations of one forward pass.

    Prefilling is `rows=prompt_length, context=0`; a decoding step `rows=1`; verifying
    `rows=gamma + 1`. A multiplication and an addition are two. Row i of a block sees the context
    and i + 1 tokens of the block, `context + (rows + 1) / 2` on average; in a layer with a window
    at most so many.

        batch * rows * (2 parameters_active + 4 n_heads head_dim * sum over layers of seen tokens)

    Args:
      shape: the transformer.
      batch: sequences, positive.
      rows: tokens of each sequence in this pass, positive.
      context: tokens of each sequence in the cache before it, at least 0.

    Returns:
      FLOPs.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> f"{float(costmodel.pass_flops(llama_3_1_8b, batch=1, rows=1, context=4095)):.5g}"
      '1.7157e+10'

    Source: Kaplan et al., arXiv 2001.08361, table 1.
    """
    _check_pass(batch, rows, context)
    shape = _count_flags(shape)
    per_token, attention, seen, cross, batch_, rows_ = as_floats(
        2 * parameters_active(shape),
        4 * shape.n_heads * shape.head_dim,
        _seen(shape, rows, context),
        _cross_attended(shape, context),
        batch,
        rows,
    )
    return batch_ * rows_ * (per_token + attention * (seen + cross))


def pass_bytes(
    shape: Shape,
    batch: ArrayLike,
    rows: ArrayLike,
    context: ArrayLike,
    formats: Formats = BFLOAT16,
) -> Array:
    """Returns the bytes that one forward pass moves between memory and the arithmetic units.

    Weights once; the cache of every sequence once, however many rows read it; the rows' own keys
    and values, written; activations, if `formats` says how many.

        weight_bytes * parameters_read + batch * (cache of context + rows tokens) + activations

    Args:
      shape: the transformer.
      batch: sequences, positive.
      rows: tokens of each sequence in this pass, positive.
      context: tokens of each sequence in the cache before it, at least 0.
      formats: bytes per number.

    Returns:
      Bytes.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> f"{float(costmodel.pass_bytes(llama_3_1_8b, batch=1, rows=1, context=4095)):.5g}"
      '1.5547e+10'

    Source: Chen et al. (MagicDec), arXiv 2408.11049, section 3.
    """
    _check_pass(batch, rows, context)
    batch_, rows_, context_ = as_floats(batch, rows, context)
    cache = kv_cache_bytes(shape, context_, formats)
    written = kv_bytes_per_token(shape, formats)
    read = parameters_read(shape, batch_ * rows_)
    read, weight_bytes, cache, written, batch_, rows_, activations = as_floats(
        read,
        formats.weight_bytes,
        cache,
        written,
        batch,
        rows,
        shape.n_layers * shape.d_model * formats.activations_per_layer * formats.activation_bytes,
    )
    return read * weight_bytes + batch_ * (cache + rows_ * (written + activations))


def memory_bytes(
    shape: Shape, batch: ArrayLike, context: ArrayLike, formats: Formats = BFLOAT16
) -> Array:
    """Returns the bytes that a model occupies while it serves: all weights, and every cache.

        weight_bytes * parameters_total + batch * kv_cache_bytes(context)

    Args:
      shape: the transformer.
      batch: sequences, at least 0.
      context: tokens that each cache has room for, at least 0.
      formats: bytes per number.

    Returns:
      Bytes.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> f"{float(costmodel.memory_bytes(llama_3_1_8b, batch=16, context=8192)):.5g}"
      '3.324e+10'
    """
    require("batch", batch, NON_NEGATIVE)
    cache = kv_cache_bytes(shape, context, formats)
    total, weight_bytes, cache, batch_ = as_floats(
        parameters_total(shape), formats.weight_bytes, cache, batch
    )
    return total * weight_bytes + batch_ * cache


def training_flops(shape: Shape, tokens: ArrayLike) -> Array:
    """Returns the floating-point operations of training on a number of tokens.

    Two for the forward and four for the backward pass, for every parameter that takes part.
    Attention's own products, small beside these for contexts up to a few times d_model, are left
    out, as they are where budgets are written as 6 N D.

        6 parameters_active * tokens

    Args:
      shape: the transformer.
      tokens: training tokens, positive.

    Returns:
      FLOPs.

    Raises:
      ValueError: `tokens` is not positive and finite.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> f"{float(costmodel.training_flops(llama_3_1_8b, 15e12)):.4g}"
      '6.754e+23'

    Source: Kaplan et al., arXiv 2001.08361, section 2.1.
    """
    require("tokens", tokens, POSITIVE)
    active, tokens_ = as_floats(parameters_active(shape), tokens)
    return 6 * active * tokens_


def _count_flags(shape: Shape) -> Shape:
    """The shape with its flags as numbers: no boolean meets a float, which a caller may forbid."""

    def number(value: Any) -> Any:
        if isinstance(value, bool | np.bool_):
            return int(value)
        if isinstance(value, Array | np.ndarray) and value.dtype == bool:
            return as_floats(value)[0]
        return value

    return Shape(*map(number, shape))


def _mlp(shape: Shape) -> Number:
    """Parameters of one MLP, or of one expert."""
    hidden_layers = shape.mlp_matrices - 1
    biases = shape.mlp_bias * (hidden_layers * shape.d_ff + shape.d_model)
    return shape.mlp_matrices * shape.d_model * shape.d_ff + biases


def _outside_mlps(shape: Shape) -> Number:
    """Parameters that are neither in an MLP nor in a table of tokens or positions."""
    d, queries = shape.d_model, shape.n_heads * shape.head_dim
    keys = shape.n_kv_heads * shape.head_dim
    attention = 2 * d * queries + 2 * d * keys
    attention += shape.qkv_bias * (queries + 2 * keys) + shape.output_bias * d
    attention = attention * (1 + shape.cross_attention)
    norms = shape.norm_vectors_per_layer * d + shape.head_norm_vectors * shape.head_dim
    router = shape.n_experts * d
    final_norm = shape.final_norm_vectors * d
    layers = shape.n_layers * (attention + norms + router)
    return layers + final_norm + _projections(shape) + shape.other_parameters


def _encoder_side(shape: Shape) -> Number:
    """Parameters that see an encoder's output only, once for all tokens: its keys and values."""
    keys = shape.n_kv_heads * shape.head_dim
    return shape.n_layers * shape.cross_attention * 2 * keys * (shape.d_model + shape.qkv_bias)


def _token_table(shape: Shape) -> Number:
    """Parameters of one table of tokens."""
    width = shape.d_model if shape.embedding_dim is None else shape.embedding_dim
    return shape.vocab_size * width


def _projections(shape: Shape) -> Number:
    """Between a token table of another width and the layers, one in and one out."""
    return 0 if shape.embedding_dim is None else 2 * shape.embedding_dim * shape.d_model


def _attended(shape: Shape, tokens: ArrayLike) -> Array:
    """Tokens that attention looks at in all layers together, of so many in the cache."""
    layers, local, window, tokens_ = as_floats(
        shape.n_layers, shape.n_local_layers, shape.window, tokens
    )
    return (layers - local) * tokens_ + local * jnp.minimum(tokens_, window)


def _seen(shape: Shape, rows: ArrayLike, context: ArrayLike) -> Array:
    """Tokens that attention looks at in all layers together: the average over a block's rows."""
    layers, local, window, rows_, context_ = as_floats(
        shape.n_layers, shape.n_local_layers, shape.window, rows, context
    )
    # Not the smaller of the window and the average: of a long prompt's rows the first see less.
    inside = jnp.clip(window - context_, 0, rows_)  # rows that the window does not cut
    nearby = (inside * (context_ + (inside + 1) / 2) + (rows_ - inside) * window) / rows_
    return (layers - local) * (context_ + (rows_ + 1) / 2) + local * nearby


def _cross_attended(shape: Shape, tokens: ArrayLike) -> Array:
    """Tokens of an encoder's output that attention looks at in all layers together."""
    layers, cross, tokens_ = as_floats(shape.n_layers, shape.cross_attention, tokens)
    return layers * cross * tokens_


def _check_pass(batch: ArrayLike, rows: ArrayLike, context: ArrayLike) -> None:
    require("batch", batch, POSITIVE)
    require("rows", rows, POSITIVE)
    require("context", context, NON_NEGATIVE)
