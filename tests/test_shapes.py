"""Parameter counts against published checkpoints, and against a list of every matrix."""

import jax
import numpy as np
import pytest

from jaxsd import costmodel

LLAMA_3_1_8B = costmodel.Shape(128256, 4096, 32, 32, 8, 128, 14336, tied_embeddings=False)
LLAMA_2_7B = costmodel.Shape(32000, 4096, 32, 32, 32, 128, 11008, tied_embeddings=False)
LLAMA_3_2_1B = costmodel.Shape(128256, 2048, 16, 32, 8, 64, 8192, tied_embeddings=True)
# A head size that is not d_model / n_heads, and no two sizes equal: a swapped factor shows.
ODD = costmodel.Shape(97, 24, 3, 5, 1, 7, 41, tied_embeddings=False)


def arrays_of(shape):
    """Sizes of all arrays of such a model, written out one by one."""
    d, q, kv = shape.d_model, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    layer = [(d, q), (d, kv), (d, kv), (q, d)]  # q, k, v, o
    layer += [(d, shape.d_ff), (d, shape.d_ff), (shape.d_ff, d)]  # gate, up, down
    layer += [(d,), (d,)]
    table = (shape.vocab_size, d)
    return {
        "layers": layer * shape.n_layers,
        "final_norm": [(d,)],
        "input": [table],
        "head": [table],
    }


def count(arrays):
    return sum(int(np.prod(array)) for array in arrays)


@pytest.mark.parametrize(
    ("shape", "total"),
    [(LLAMA_3_1_8B, 8030261248), (LLAMA_2_7B, 6738415616), (LLAMA_3_2_1B, 1235814400)],
)
def test_total_equals_published_checkpoints(shape, total):
    assert costmodel.parameters_total(shape) == total


@pytest.mark.parametrize("shape", [ODD, LLAMA_3_1_8B, LLAMA_3_2_1B])
@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_a_list_of_every_array(shape, tied):
    shape = shape._replace(tied_embeddings=tied)
    arrays = arrays_of(shape)
    body = count(arrays["layers"]) + count(arrays["final_norm"])
    assert costmodel.parameters_non_embedding(shape) == body
    assert costmodel.parameters_read(shape) == body + count(arrays["head"])
    stored = count(arrays["input"]) + (0 if tied else count(arrays["head"]))
    assert costmodel.parameters_total(shape) == body + stored


def test_counts_of_integers_are_exact_integers():
    for function in (
        costmodel.parameters_total,
        costmodel.parameters_non_embedding,
        costmodel.parameters_read,
    ):
        assert isinstance(function(LLAMA_3_1_8B), int)


def test_counts_trace_and_differentiate_on_floats():
    """One more layer costs what a layer holds: the derivative is exact, the count being affine."""
    shape = jax.tree.map(float, ODD)
    gradient = jax.jit(jax.grad(costmodel.parameters_total))(shape)
    one_more = ODD._replace(n_layers=ODD.n_layers + 1)
    layer = costmodel.parameters_total(one_more) - costmodel.parameters_total(ODD)
    assert float(gradient.n_layers) == layer
    assert float(gradient.vocab_size) == 2 * ODD.d_model
    assert float(gradient.tied_embeddings) == -ODD.vocab_size * ODD.d_model
