"""Parameter counts against published checkpoints, and against a list of every matrix."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

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
# Every option at once, and once more no two sizes equal.
EVERYTHING = ODD._replace(
    mlp_matrices=2,
    n_shared_experts=2,
    n_experts=6,
    experts_per_token=3,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    norm_vectors_per_layer=4,
    final_norm_vectors=2,
    head_norm_vectors=2,
    position_rows=19,
    embedding_dim=11,
    cross_attention=True,
    n_local_layers=2,
    window=13,
    other_parameters=23,
)


def arrays_with_options(shape, num_routed):
    """Sizes of all arrays outside the tables, with so many routed experts; what an encoder sees."""
    d, q, kv = shape.d_model, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    keys_and_values = [(d, kv)] * 2 + [(kv,)] * (2 * shape.qkv_bias)
    attention = [(d, q), (q, d)] + [(q,)] * shape.qkv_bias + [(d,)] * shape.output_bias
    mlp = [(d, shape.d_ff)] * (shape.mlp_matrices - 1) + [(shape.d_ff, d)]
    mlp += ([(shape.d_ff,)] * (shape.mlp_matrices - 1) + [(d,)]) * shape.mlp_bias
    layer = (attention + keys_and_values) + attention * shape.cross_attention
    layer += mlp * (shape.n_shared_experts + num_routed) + [(d, shape.n_experts)]
    layer += [(d,)] * shape.norm_vectors_per_layer + [(shape.head_dim,)] * shape.head_norm_vectors
    rest = [(d,)] * shape.final_norm_vectors + [(shape.other_parameters,)]
    if shape.embedding_dim is not None:
        rest += [(shape.embedding_dim, d), (d, shape.embedding_dim)]
    return layer * shape.n_layers + rest, keys_and_values * shape.n_layers * shape.cross_attention


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [EVERYTHING, EVERYTHING._replace(embedding_dim=None), ODD])
def test_every_option_counts_once(shape, tied):
    """The keys and values of an encoder's output are held, and neither read nor used again."""
    shape = shape._replace(tied_embeddings=tied)
    held, of_encoder = arrays_with_options(shape, shape.n_experts)
    used, _ = arrays_with_options(shape, shape.experts_per_token)
    table = shape.vocab_size * (shape.embedding_dim or shape.d_model)
    body = count(held) + count(of_encoder)
    assert costmodel.parameters_non_embedding(shape) == body
    tables = table * (1 if tied else 2) + shape.position_rows * shape.d_model
    assert costmodel.parameters_total(shape) == body + tables
    assert costmodel.parameters_read(shape) == count(held) + table
    assert costmodel.parameters_active(shape) == count(used) + table


def passes_of(shape, batch, rows, context):
    """FLOPs and cache bytes of a pass, token by token and layer by layer."""
    flops = moved = 0
    attention_width = shape.n_heads * shape.head_dim
    for layer in range(shape.n_layers):
        local = layer < shape.n_local_layers
        held = min(context, shape.window) if local else context
        moved += batch * (held + rows) * 2 * shape.n_kv_heads * shape.head_dim * 2
        moved += shape.cross_attention * batch * context * 2 * shape.n_kv_heads * shape.head_dim * 2
        for row in range(rows):
            seen = context + row + 1
            seen = min(seen, shape.window) if local else seen
            seen += shape.cross_attention * context
            flops += batch * 4 * attention_width * seen
    return flops + batch * rows * 2 * costmodel.parameters_active(shape), moved


@pytest.mark.parametrize("shape", [LLAMA_3_1_8B, WINDOWED, EVERYTHING._replace(n_experts=0)])
@pytest.mark.parametrize(
    ("rows", "context"), [(1, 2000), (1, 511), (6, 1000), (6, 509), (300, 0), (900, 0), (40, 10)]
)
def test_a_pass_equals_its_sum_over_tokens_and_layers(shape, rows, context):
    """Also where the window cuts some rows of the block only."""
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


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_experts_read_on_average_over_every_possible_choice(tokens):
    """Each token takes 2 of 5 experts, all pairs alike: every sequence of pairs is listed."""
    shape = ODD._replace(n_shared_experts=0, n_experts=5, experts_per_token=2)
    pairs = list(itertools.combinations(range(5), 2))
    touched = [len(set().union(*choice)) for choice in itertools.product(pairs, repeat=tokens)]
    without, _ = arrays_with_options(shape, 0)
    one, _ = arrays_with_options(shape, 1)
    head = shape.vocab_size * shape.d_model
    expected = count(without) + head + np.mean(touched) * (count(one) - count(without))
    assert float(costmodel.parameters_read(shape, tokens)) == pytest.approx(expected, rel=1e-6)


def numbers_of(shape, batch, rows, context, formats):
    """Every public function of the file at one point."""
    tokens = batch * rows
    return jnp.stack(
        [
            costmodel.parameters_total(shape),
            costmodel.parameters_non_embedding(shape),
            costmodel.parameters_active(shape),
            costmodel.parameters_read(shape, tokens),
            costmodel.parameters_read(shape),
            costmodel.kv_bytes_per_token(shape, formats),
            costmodel.kv_cache_bytes(shape, context, formats),
            costmodel.pass_flops(shape, batch, rows, context),
            costmodel.pass_bytes(shape, batch, rows, context, formats),
            costmodel.memory_bytes(shape, batch, context, formats),
            costmodel.training_flops(shape, tokens),
        ]
    )


def test_gradients_match_finite_differences(x64):
    """Of every function, in every number; two of the block's four rows reach beyond the window."""
    formats = costmodel.Formats(1.1, 1.3, 1.7, 12.0)
    point = (EVERYTHING._replace(tied_embeddings=0.4, qkv_bias=0.7), 2.5, 4.0, 10.5, formats)
    leaves, structure = jax.tree.flatten(jax.tree.map(float, point))
    numbers = jax.jit(lambda leaves: numbers_of(*jax.tree.unflatten(structure, list(leaves))))
    leaves = np.array(leaves)
    values, jacobian = numbers(leaves), jax.jit(jax.jacrev(numbers))(leaves)
    paths = jax.tree_util.tree_leaves_with_path(point)
    for i, (path, _) in enumerate(paths):
        step = np.zeros_like(leaves)
        step[i] = 1e-5 * (abs(leaves[i]) or 1.0)
        slope = (numbers(leaves + step) - numbers(leaves - step)) / (2 * step[i])
        scale = np.asarray(values) / (abs(leaves[i]) or 1.0)
        message = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            jacobian[:, i] / scale, slope / scale, atol=1e-8, err_msg=message
        )


def test_shapes_may_be_batched_over_all_leaves():
    shapes = [MIXTRAL, WINDOWED, LLAMA_3_1_8B._replace(mlp_matrices=2, qkv_bias=True)]
    shapes = [jax.tree.map(float, shape) for shape in shapes]
    together = jax.tree.map(lambda *leaves: jnp.array(leaves), *shapes)
    batch, formats = jnp.array([1.0, 2.0, 3.0]), costmodel.INT8
    numbers = jax.jit(jax.vmap(numbers_of, in_axes=(0, 0, None, None, None)))
    found = numbers(together, batch, 5.0, 700.0, formats)
    for i, shape in enumerate(shapes):
        alone = numbers_of(shape, float(batch[i]), 5.0, 700.0, formats)
        np.testing.assert_allclose(found[i], alone, rtol=1e-5)


def test_dtype_follows_the_arguments(x64):
    single = jax.tree.map(np.float32, WINDOWED)
    assert costmodel.pass_flops(single, *map(np.float32, (1, 2, 3))).dtype == np.float32
    assert costmodel.pass_flops(single, np.float64(1), *map(np.float32, (2, 3))).dtype == np.float64


@jax.jit
def _numbers_and_slopes(leaves):
    structure = jax.tree.structure((ODD, 0.0, 0.0, 0.0, costmodel.BFLOAT16))

    def numbers(leaves):
        return numbers_of(*jax.tree.unflatten(structure, list(leaves)))

    return numbers(leaves), jax.jacrev(numbers)(leaves)


@given(
    shape=st.fixed_dictionaries(
        {
            "vocab_size": st.floats(16, 3e5),
            "d_model": st.floats(16, 2e4),
            "n_layers": st.floats(1, 200),
            "n_heads": st.floats(1, 256),
            "n_kv_heads": st.floats(1, 128),
            "head_dim": st.floats(8, 512),
            "d_ff": st.floats(16, 1e5),
            "tied_embeddings": st.sampled_from([0.0, 1.0]),
            "n_shared_experts": st.sampled_from([0.0, 1.0]),
            "cross_attention": st.sampled_from([0.0, 1.0]),
            "window": st.floats(1, 1e5),
        }
    ),
    local=st.sampled_from([0.0, 0.5, 1.0]),
    experts=st.sampled_from([(0.0, 0.0), (1.0, 1.0), (8.0, 2.0), (8.0, 8.0), (512.0, 10.0)]),
    batch=st.floats(0.5, 4096),
    rows=st.floats(1, 1e5),
    context=st.one_of(st.just(0.0), st.floats(1e-3, 1e6)),
)
@example(shape={}, local=1.0, experts=(8.0, 8.0), batch=4096.0, rows=1e5, context=0.0)
def test_values_and_gradients_are_finite_in_float32(shape, local, experts, batch, rows, context):
    """Also where every token chooses every expert, and 0^tokens is differentiated."""
    shape = ODD._replace(**shape, n_experts=experts[0], experts_per_token=experts[1])
    shape = shape._replace(n_local_layers=local * shape.n_layers)
    point = (shape, batch, rows, context, costmodel.BFLOAT16)
    values, slopes = _numbers_and_slopes(np.array(jax.tree.leaves(point), np.float32))
    assert np.isfinite(values).all()
    assert np.isfinite(slopes).all()
