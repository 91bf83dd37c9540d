"""The transformer against numpy and the equations, and its cache against having none."""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsd import costmodel, models
from jaxsd.models import transformer

UNTIED = models.Config(
    vocab_size=37,
    d_model=24,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    d_ff=40,
    tie_embeddings=False,
)
TIED = dataclasses.replace(UNTIED, tie_embeddings=True, n_kv_heads=3, n_layers=1)
CONFIGS = {"untied": UNTIED, "tied": TIED}
# Float32, sums of at most 40 terms of order one, in another order.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def setup(config, length=9, batch_size=2):
    params = models.init_params(config, jax.random.key(0))
    # Scales other than one, so that a forgotten norm is seen.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [
        leaf * (1.0 + 0.3 * jax.random.normal(key, leaf.shape)) if leaf.ndim == 1 else leaf
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    params = jax.tree.unflatten(tree, leaves)
    tokens = jax.random.randint(jax.random.key(1), (batch_size, length), 0, config.vocab_size)
    return params, tokens


def numpy_logits(config, params, tokens):
    """One row at a time, one head at a time, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    def rotate(x):  # [T, D]: pairs (i, i + D / 2) turned by position * theta ** (-2 i / D)
        half = config.head_dim // 2
        out = np.empty_like(x)
        for position, row in enumerate(x):
            for i in range(half):
                angle = position * config.rope_theta ** (-2 * i / config.head_dim)
                z = (row[i] + 1j * row[i + half]) * np.exp(1j * angle)
                out[position, i], out[position, i + half] = z.real, z.imag
        return out

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    def row_logits(row):
        x = params["embedding"][row]
        for index in range(config.n_layers):
            layer = params["layers"][str(index)]
            h = norm(x, layer["attention_norm"]["scale"])
            heads = []
            for head in range(config.n_heads):
                group = config.n_heads // config.n_kv_heads
                weights = layer["attention"]["qkv"][head // group]
                q = rotate(h @ weights[head % group].T)
                k, v = rotate(h @ weights[group].T), h @ weights[group + 1].T
                scores = q @ k.T / np.sqrt(config.head_dim)
                mixed = [softmax(scores[t, : t + 1]) @ v[: t + 1] for t in range(len(row))]
                heads.append(np.stack(mixed))
            x = x + np.concatenate(heads, axis=-1) @ layer["attention"]["out"].T
            h = norm(x, layer["mlp_norm"]["scale"])
            gate, up = (h @ part.T for part in layer["mlp"]["gate_up"])
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"].T
        head = params["embedding"] if config.tie_embeddings else params["head"]
        return norm(x, params["final_norm"]["scale"]) @ head.T

    return np.stack([row_logits(np.asarray(row)) for row in tokens])


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_the_equations(name):
    config = CONFIGS[name]
    params, tokens = setup(config)
    logits = models.forward(config, params, tokens)
    np.testing.assert_allclose(logits, numpy_logits(config, params, tokens), **TOLERANCE)


@hypothesis.settings(max_examples=8)
@hypothesis.given(cuts=st.sets(st.integers(1, 8)), junk=st.integers(0, 2**31 - 1))
def test_blocks_through_a_dirty_cache_equal_the_whole_sequence(cuts, junk):
    """Slots at or above a block's start hold noise: whatever was there must not be seen."""
    params, tokens = setup(UNTIED)
    model = models.language_model(UNTIED)
    cache = jax.tree.map(
        lambda leaf: 50.0 * jax.random.normal(jax.random.key(junk), leaf.shape),
        model.init_cache(2, 12),
    )
    bounds = [0, *sorted(cuts), 9]
    found = []
    for start, stop in itertools.pairwise(bounds):
        positions = jnp.broadcast_to(jnp.arange(start, stop)[None, :], (2, stop - start))
        logits, cache = model.apply(params, tokens[:, start:stop], positions, cache)
        found.append(logits)
    whole = models.forward(UNTIED, params, tokens)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, **TOLERANCE)


def test_rows_at_different_places_are_written_at_different_places():
    params, tokens = setup(UNTIED)
    model = models.language_model(UNTIED)
    positions = jnp.broadcast_to(jnp.arange(9)[None, :], (2, 9))
    _, cache = model.apply(params, tokens, positions, model.init_cache(2, 12))
    # Row 0 goes on at 9, row 1 takes back three tokens and goes on at 6.
    starts = jnp.array([9, 6])
    block = jnp.array([[3, 4], [5, 6]])
    logits, _ = model.apply(params, block, starts[:, None] + jnp.arange(2)[None, :], cache)
    for row, start in enumerate([9, 6]):
        alone = jnp.concatenate([tokens[row, :start], block[row]])[None, :]
        expected = models.forward(UNTIED, params, alone)[0, start:]
        np.testing.assert_allclose(logits[row], expected, **TOLERANCE)


@pytest.mark.parametrize("length", [3, 20])
def test_reading_as_much_of_a_cache_as_is_filled_equals_reading_all_of_it(length, monkeypatch):
    """At the borders of the lengths there are; above what is filled the cache holds junk."""
    params, tokens = setup(TIED, length)
    model = models.language_model(TIED)
    cache = model.init_cache(2, 1100)
    cache = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(3), leaf.shape), cache)

    def logits(starts):
        positions = starts[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        return model.apply(params, tokens, positions, cache)[0]

    filled = [np.array([most, most // 2], np.int32) for most in (0, 255, 256, 257, 1000)]
    assert len(transformer._attended_lengths(1152, length)) == 2 + (length > 16)
    in_parts = jax.jit(logits)
    parts = [in_parts(starts) for starts in filled]
    monkeypatch.setattr(transformer, "_attended_lengths", lambda slots, _: [slots])
    whole = jax.jit(lambda starts: logits(starts))
    for part, starts in zip(parts, filled, strict=True):
        np.testing.assert_allclose(part, whole(starts), **TOLERANCE)


def test_caches_come_in_whole_tiles():
    model = models.language_model(TIED)
    for asked, slots in ((1, 16), (16, 16), (17, 32), (255, 256), (257, 384), (1024, 1024)):
        assert model.init_cache(1, asked)[0].keys.shape[2] == slots


def test_many_rows_are_written_by_a_loop_with_the_same_result():
    model = models.language_model(TIED)
    params, _ = setup(TIED)
    rows = transformer._MAX_UNROLLED_ROWS + 1
    tokens = jax.random.randint(jax.random.key(2), (rows, 3), 0, TIED.vocab_size)
    starts = jnp.arange(rows) % 5
    positions = starts[:, None] + jnp.arange(3)[None, :]
    _, cache = model.apply(params, tokens, positions, model.init_cache(rows, 10))
    for row in (0, 1, rows - 1):
        one = slice(row, row + 1)
        _, alone = model.apply(params, tokens[one], positions[one], model.init_cache(1, 10))
        for many, single in zip(jax.tree.leaves(cache), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(many[one], single, **TOLERANCE)


def test_a_token_does_not_see_later_ones():
    params, tokens = setup(UNTIED)
    logits = models.forward(UNTIED, params, tokens)
    changed = models.forward(UNTIED, params, tokens.at[:, 5:].add(1) % UNTIED.vocab_size)
    np.testing.assert_array_equal(logits[:, :5], changed[:, :5])
    assert jnp.abs(logits[:, 5:] - changed[:, 5:]).max() > 1e-3


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 64, 96])
@pytest.mark.parametrize("out", [64, 1024, 1025])  # small; large and even; large and odd
def test_thin_products_equal_the_plain_one(num_rows, out):
    rows = jax.random.normal(jax.random.key(0), (num_rows, 512))
    weight = jax.random.normal(jax.random.key(1), (out, 512))
    thin = jax.jit(transformer._thin_product_on_cpu)(rows, weight)
    np.testing.assert_allclose(thin, np.asarray(rows) @ np.asarray(weight).T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", models.CONFIGS)
def test_parameter_count_equals_that_of_the_cost_model(name):
    config = models.CONFIGS[name]
    assert models.num_parameters(config) == costmodel.parameters_total(shape(config))


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.data())
def test_parameter_count_of_any_shape_equals_that_of_the_cost_model(data):
    small = st.integers(1, 5)
    n_kv_heads = data.draw(small)
    config = models.Config(
        vocab_size=data.draw(small),
        d_model=data.draw(small),
        n_layers=data.draw(small),
        n_heads=n_kv_heads * data.draw(small),
        n_kv_heads=n_kv_heads,
        head_dim=2 * data.draw(small),
        d_ff=data.draw(small),
        tie_embeddings=data.draw(st.booleans()),
    )
    assert models.num_parameters(config) == costmodel.parameters_total(shape(config))


def shape(config):
    same = [name for name in costmodel.Shape._fields if hasattr(config, name)]
    fields = {name: getattr(config, name) for name in same}
    return costmodel.Shape(**fields, tied_embeddings=config.tie_embeddings)


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    params, tokens = setup(UNTIED)
    exact = models.forward(UNTIED, params, tokens)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits = models.forward(UNTIED, half, tokens)
    assert logits.dtype == jnp.float32
    difference = jnp.abs(logits - exact).max()
    assert 1e-4 < difference < 0.2  # rounding to 8 bits shows, and no more than that


def test_the_same_key_gives_the_same_weights():
    first, again, other = (models.init_params(TIED, jax.random.key(s)) for s in (3, 3, 4))
    for a, b, c in zip(*map(jax.tree.leaves, (first, again, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.ndim == 1 or not np.array_equal(a, c)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_model", 0, "d_model=0"),
        ("n_layers", 1.5, "n_layers=1.5"),
        ("n_kv_heads", 4, "n_kv_heads=4 must divide n_heads=6"),
        ("head_dim", 7, "head_dim=7 must be even"),
        ("rope_theta", -1.0, "rope_theta=-1.0"),
        ("tie_embeddings", "yes", "tie_embeddings='yes'"),
    ],
)
def test_a_wrong_shape_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(UNTIED, **{field: value})


def test_a_config_survives_json_and_refuses_what_it_does_not_know():
    assert models.Config.from_dict(UNTIED.to_dict()) == UNTIED
    wrong = {name: value for name, value in UNTIED.to_dict().items() if name != "d_ff"}
    with pytest.raises(ValueError, match=r"unknown fields \['width'\].*lacks fields \['d_ff'\]"):
        models.Config.from_dict(wrong | {"width": 3})
