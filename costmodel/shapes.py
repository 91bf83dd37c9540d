"""How many parameters does a transformer of a given shape have, and how many does a pass read?"""

from typing import Any, NamedTuple

Number = Any  # int, float or (traced) array: the arithmetic below is the same


class Shape(NamedTuple):
    """A decoder-only transformer: grouped-query attention, gated MLP, RMSNorm, no biases.

    The fields are plain numbers and the counts plain arithmetic: exact on Python integers, and
    differentiable on floats (`jax.tree.map(float, shape)`; under `jax.jit` integers of 32 bits
    would overflow).
    """

    vocab_size: Number
    d_model: Number
    n_layers: Number
    n_heads: Number  # query heads
    n_kv_heads: Number  # key and value heads, shared by groups of query heads
    head_dim: Number
    d_ff: Number  # width of the gated MLP
    tied_embeddings: Number  # True: one table embeds tokens and yields logits


def parameters_non_embedding(shape: Shape) -> Number:
    """Returns the number of parameters outside the token tables, norms included.

        n_layers * (2 d h n_heads + 2 d h n_kv_heads + 3 d d_ff + 2 d) + d

    Args:
      shape: the transformer; d is its `d_model`, h its `head_dim`.

    Returns:
      The count, an int if the shape is integers.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> costmodel.parameters_non_embedding(llama_3_1_8b)
      6979588096
    """
    d = shape.d_model
    query_and_output = 2 * d * shape.n_heads * shape.head_dim
    key_and_value = 2 * d * shape.n_kv_heads * shape.head_dim
    gate_up_and_down = 3 * d * shape.d_ff
    norms = 2 * d
    final_norm = d
    return (
        shape.n_layers * (query_and_output + key_and_value + gate_up_and_down + norms) + final_norm
    )


def parameters_total(shape: Shape) -> Number:
    """Returns the number of parameters, as a checkpoint holds them.

    Args:
      shape: the transformer.

    Returns:
      The count: `parameters_non_embedding` and one token table if tied, two if not.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> costmodel.parameters_total(llama_3_1_8b)
      8030261248
    """
    num_tables = 2 - shape.tied_embeddings
    return parameters_non_embedding(shape) + num_tables * shape.vocab_size * shape.d_model


def parameters_read(shape: Shape) -> Number:
    """Returns the number of parameters that one forward pass streams from memory.

    The output head is read whole, for logits need every row of it. An input table of its own is
    not: a pass gathers one row of it per token. So tied or not, one table counts.

    Args:
      shape: the transformer.

    Returns:
      The count: `parameters_non_embedding` and one token table.

    Example:
      >>> from jaxsd import costmodel
      >>> llama_3_1_8b = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, False)
      >>> costmodel.parameters_read(llama_3_1_8b)
      7504924672
    """
    return parameters_non_embedding(shape) + shape.vocab_size * shape.d_model
