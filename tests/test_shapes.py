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


MIXTRAL = costmodel.Shape(
    32000, 4096, 32, 32, 8, 128, 14336, False, n_shared_experts=0, n_experts=8, experts_per_token=2
)
WINDOWED = LLAMA_3_2_1B._replace(n_local_layers=10, window=512)


def passes_of(shape, batch, rows, context):
    """FLOPs and cache bytes of a pass, token by token and layer by layer."""
    flops = moved = 0
    attention_width = shape.n_heads * shape.head_dim
    for layer in range(shape.n_layers):
        local = layer < shape.n_local_layers
        held = min(context, shape.window) if local else context
        moved += batch * (held + rows) * 2 * shape.n_kv_heads * shape.head_dim * 2
        for row in range(rows):
            seen = context + row + 1
            flops += batch * 4 * attention_width * (min(seen, shape.window) if local else seen)
    return flops + batch * rows * 2 * costmodel.parameters_active(shape), moved


@pytest.mark.parametrize("shape", [LLAMA_3_1_8B, LLAMA_3_2_1B, WINDOWED])
@pytest.mark.parametrize(("rows", "context"), [(1, 2000), (6, 1000), (300, 0)])
def test_a_pass_equals_its_sum_over_tokens_and_layers(shape, rows, context):
    flops, cache = passes_of(shape, 3, rows, context)
    assert float(costmodel.pass_flops(shape, 3, rows, context)) == pytest.approx(flops, rel=1e-6)
    moved = 2 * costmodel.parameters_read(shape) + cache
    assert float(costmodel.pass_bytes(shape, 3, rows, context)) == pytest.approx(moved, rel=1e-6)


def test_cache_bytes_are_the_published_ones():
    assert costmodel.kv_bytes_per_token(LLAMA_3_1_8B) == 131072
    assert float(costmodel.kv_cache_bytes(WINDOWED, 2000)) == 2 * 8 * 64 * 2 * (6 * 2000 + 10 * 512)
    eight_bit = costmodel.Formats(kv_bytes=1.0)
    assert costmodel.kv_bytes_per_token(LLAMA_3_1_8B, eight_bit) == 65536


def test_formats_scale_what_they_name():
    int4 = costmodel.INT4._replace(activations_per_layer=12.0)
    plain = float(costmodel.pass_bytes(LLAMA_3_1_8B, 2, 5, 100))
    weights = costmodel.parameters_read(LLAMA_3_1_8B)
    expected = plain - 2 * weights + 0.5625 * weights + 2 * 5 * 32 * 4096 * 12 * 2
    got = float(costmodel.pass_bytes(LLAMA_3_1_8B, 2, 5, 100, int4))
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 50])
def test_experts_read_are_those_that_any_token_chose(tokens):
    """The expectation over all choices, exact: an expert is missed by a token with chance 3/4."""
    shared = costmodel.parameters_read(MIXTRAL._replace(n_experts=0, experts_per_token=0))
    one = 3 * 4096 * 14336 * 32
    router = 32 * 8 * 4096
    expected = shared + router + 8 * (1 - 0.75**tokens) * one
    assert float(costmodel.parameters_read(MIXTRAL, tokens)) == pytest.approx(expected, rel=1e-6)
    everything = costmodel.parameters_read(MIXTRAL)
    assert everything == shared + router + 8 * one
    assert float(costmodel.parameters_read(MIXTRAL, 1e6)) == pytest.approx(everything, rel=1e-6)
    every_token_all = MIXTRAL._replace(experts_per_token=8)
    slope = jax.grad(lambda k: costmodel.parameters_read(every_token_all._replace(
        experts_per_token=k), 1.0))(8.0)  # fmt: skip
    assert np.isfinite(slope)


def test_memory_and_training_are_their_formulas():
    cache = 131072 * 1000 * 4
    weights = 2 * costmodel.parameters_total(LLAMA_3_1_8B)
    assert float(costmodel.memory_bytes(LLAMA_3_1_8B, 4, 1000)) == pytest.approx(weights + cache)
    flops = 6 * costmodel.parameters_active(MIXTRAL) * 1e12
    assert float(costmodel.training_flops(MIXTRAL, 1e12)) == pytest.approx(flops, rel=1e-6)


def test_flags_may_be_traced():
    """A shape is a pytree: its flags become arrays of booleans inside a jit."""
    total = jax.jit(lambda shape: costmodel.pass_bytes(shape, 1, 1, 100))(WINDOWED)
    assert float(total) == pytest.approx(float(costmodel.pass_bytes(WINDOWED, 1, 1, 100)), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: costmodel.pass_flops(ODD, 0, 1, 1), "batch=0 must be positive"),
        (lambda: costmodel.pass_bytes(ODD, 1, -2, 1), "rows=-2 must be positive"),
        (lambda: costmodel.kv_cache_bytes(ODD, -1), "context=-1 must be at least 0"),
        (lambda: costmodel.memory_bytes(ODD, -1, 5), "batch=-1 must be at least 0"),
        (lambda: costmodel.training_flops(ODD, 0), "tokens=0 must be positive"),
        (lambda: costmodel.parameters_read(MIXTRAL, 0), "tokens=0 must be positive"),
    ],
)
def test_wrong_numbers_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
