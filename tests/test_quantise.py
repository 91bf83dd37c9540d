"""Quantised kernels and caches: how far a weight moves, what is read, and that texts stay exact."""

import dataclasses
import functools
import itertools
import json
import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_compile
from conftest import run_on_devices
from jax.sharding import PartitionSpec

import jaxsd
from jaxsd import models
from jaxsd.cli import main
from jaxsd.cli import quantise as command
from jaxsd.models import sharding
from jaxsd.models.quantise import (
    _BLOCK_SIZE,
    _product,
    _product_on_cpu,
    quantise_vectors,
)

CONFIG = models.Config(
    vocab_size=48, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64
)
WINDOWED = dataclasses.replace(CONFIG, windows=(4, 0), attention_softcap=20.0)
FORMS = [(8, None, False), (8, 16, True), (4, None, True), (4, 8, False)]


@functools.cache
def weights(config=CONFIG, seed=0):
    return models.init_params(config, jax.random.key(seed))


def unpacked(values):
    """The integers of a kernel, by NumPy."""
    values = np.asarray(values)
    if values.dtype == np.int8:
        return values.astype(np.int64)
    pair = np.stack([values & 15, values >> 4], axis=-1).astype(np.int64)
    return np.where(pair > 7, pair - 16, pair).reshape(*values.shape[:-1], -1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 4), (4, None), (4, 4)])
@hypothesis.settings(max_examples=8)
@hypothesis.given(seed=st.integers(0, 2**31 - 1), exponent=st.integers(-12, 6))
def test_no_weight_moves_by_more_than_half_a_step(dtype, bits, group, seed, exponent):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((2, 3, 8)) * 10.0**exponent
    weight[0, 0] = 0.0  # a channel of zeros
    weight[1, 2, 3] *= 100.0  # and one with an outlier
    weight = jnp.asarray(weight.astype(np.float32)).astype(dtype)
    kernel = models.quantise({"up": weight}, bits, group)["up"]
    assert kernel.scales.dtype == dtype
    assert kernel.values.dtype == (jnp.int8 if bits == 8 else jnp.uint8)
    integers = unpacked(kernel.values)
    scales = np.repeat(np.asarray(kernel.scales, np.float64), group or 8, axis=-1)
    moved = np.abs(np.asarray(weight, np.float64) - integers * scales)
    # float32 rounds the quotient that is rounded to an integer.
    assert np.all(moved <= scales / 2 * (1 + 1e-4))
    assert np.abs(integers).max() == (127 if bits == 8 else 7)
    assert np.all(integers[0, 0] == 0)
    back = np.asarray(models.dequantise({"up": kernel})["up"], np.float64)
    np.testing.assert_allclose(
        back, integers * scales, rtol=8e-3 if dtype == jnp.bfloat16 else 1e-6
    )


@pytest.mark.parametrize(
    ("bits", "group", "num_rows"), [(8, None, 1), (8, 64, 5), (4, None, 5), (4, 64, 1)]
)
def test_product_equals_that_of_the_weights_in_blocks_and_whole(bits, group, num_rows):
    """Channels that are no multiple of a block: a loop over blocks, then the rest."""
    size = 512
    channels = 3 * (_BLOCK_SIZE // size) + 5
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((channels, size)).astype(np.float32))
    rows = jnp.asarray(rng.standard_normal((num_rows, size)).astype(np.float32))
    kernel = models.quantise({"up": weight}, bits, group)["up"]
    scales = np.repeat(np.asarray(kernel.scales, np.float64), group or size, axis=-1)
    want = np.asarray(rows, np.float64) @ (unpacked(kernel.values) * scales).T
    for product in (_product, _product_on_cpu):
        np.testing.assert_allclose(jax.jit(product)(rows, kernel), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "group", "embeddings"), FORMS)
def test_the_transformer_reads_a_quantised_tree_as_the_weights_it_stands_for(
    bits, group, embeddings
):
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    params = weights(config)
    small = models.quantise(params, bits, group, embeddings=embeddings)
    back = models.dequantise(small)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    forward = jax.jit(lambda params: models.forward(config, params, tokens))
    found, want = forward(small), forward(back)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(found) - np.asarray(forward(params))).max() > 1e-3  # it is another
    kinds = {type(small["embedding"]), type(small["head"])}
    assert kinds == {models.QuantisedKernel if embeddings else type(params["head"])}
    shapes = jax.eval_shape(
        lambda params: models.quantise(params, bits, group, embeddings=embeddings), params
    )
    assert models.bytes_of(shapes) == models.bytes_of(small)


def test_bytes_are_those_of_integers_and_scales():
    kernels = {"mlp": {"up": jnp.zeros((6, 32), jnp.bfloat16)}, "bias": jnp.zeros((6,))}
    for bits, group, want in [
        (8, None, 6 * 32 + 6 * 2),
        (8, 8, 6 * 32 + 6 * 4 * 2),
        (4, None, 6 * 16 + 6 * 2),
        (4, 8, 6 * 16 + 6 * 4 * 2),
    ]:
        assert models.bytes_of(models.quantise(kernels, bits, group)) == want + 6 * 4


def test_a_quantised_tree_is_donated_and_restored_bit_for_bit(tmp_path):
    small = models.quantise(weights(), 4, 8, embeddings=True)
    models.save_checkpoint(tmp_path, 3, small)
    like = jax.eval_shape(lambda: small)
    restored, _ = models.restore_checkpoint(tmp_path, 3, like)
    assert jax.tree.structure(restored) == jax.tree.structure(small)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(small), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    jax.jit(lambda tree: tree, donate_argnums=0)(restored)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.quantise(weights(), 3), "bits=3 must be 8 or 4"),
        (lambda: models.quantise(weights(), True), "bits=True must be 8 or 4"),
        (lambda: models.quantise(weights(), 8, 0), "group_size=0 must be an integer of at least 1"),
        (
            lambda: models.quantise(weights(), 4, 12),
            r"layers\.0\.attention\.out of shape \(32, 32\) has inputs that group_size=12 does "
            r"not divide; .*layers\.1\.mlp\.gate_up",
        ),
        (
            lambda: models.quantise({"up": jnp.zeros((4, 3))}, 4),
            r"up of shape \(4, 3\) has groups of 3; 4 bits need an even number",
        ),
        (lambda: models.quantise({"scale": jnp.ones((3,))}), "params hold no kernel"),
        (
            lambda: models.quantise(models.quantise(weights())),
            r"layers\.0\.mlp\.down is quantised already",
        ),
        (
            lambda: models.language_model(CONFIG, jnp.int4),
            "cache_dtype=int4 must be a floating type or int8",
        ),
        (
            lambda: models.quantised_self(models.language_model(CONFIG), 0),
            "num_tokens=0 must be an integer",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- the cache ------------------------------------------------------------------------------------


def test_a_cached_vector_moves_by_at_most_half_a_step():
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    x[1, 2] = 0.0
    values, scales = quantise_vectors(jnp.asarray(x))
    assert (values.dtype, scales.shape) == (jnp.int8, (3, 5, 1))
    moved = np.abs(x - np.asarray(values, np.float32) * np.asarray(scales))
    assert np.all(moved <= np.asarray(scales) / 2 * (1 + 1e-4))


def test_an_int8_cache_takes_a_quarter_and_a_scale():
    small = models.language_model(CONFIG, jnp.int8).init_cache(2, 16)
    whole = models.language_model(CONFIG).init_cache(2, 16)
    ratio = models.bytes_of(small) / models.bytes_of(whole)
    assert ratio == (CONFIG.head_dim + 4) / (4 * CONFIG.head_dim)
    assert [leaf.dtype for leaf in whole[0] if leaf is not None] == [jnp.float32] * 2


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["all", "windows"])
def test_an_int8_cache_is_read_alike_however_the_text_is_cut(config):
    """What a block reads of itself is what later blocks read of it, junk above it or not."""
    model = models.language_model(config, jnp.int8)
    apply = jax.jit(model.apply)
    tokens = np.random.default_rng(1).integers(0, 48, (2, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    clean = model.init_cache(2, 12)
    junk = jax.tree.map(lambda leaf: jnp.full_like(leaf, 77), clean)
    want, _ = apply(weights(config), tokens, positions, clean)
    for bounds in ([0, 1, 4, 9], range(10)):
        cache, found = junk, []
        for start, stop in itertools.pairwise(bounds):
            part = slice(start, stop)
            logits, cache = apply(weights(config), tokens[:, part], positions[:, part], cache)
            found.append(logits)
        apart = np.abs(np.concatenate(found, axis=1) - np.asarray(want)).max(axis=-1)
        # Where a value lies between two steps, rounding of a sum may decide: not everywhere.
        assert np.quantile(apart, 0.75) < 1e-4
    float_logits, _ = models.language_model(config).apply(
        weights(config), tokens, positions, models.language_model(config).init_cache(2, 12)
    )
    apart = np.abs(np.asarray(float_logits) - np.asarray(want)).max(axis=-1)
    assert 1e-3 < np.median(apart) < 0.3


def test_greedy_texts_of_chains_and_trees_are_those_of_plain_decoding():
    """Target in float32 with an int8 cache and a window; its quantised copies draft for it."""
    target = models.language_model(WINDOWED, jnp.int8)
    draft = models.language_model(WINDOWED)
    drafters = {
        "plain": (jaxsd.no_drafter(), jaxsd.block_verification),
        "chain": (models.quantised_self(target, 3), jaxsd.block_verification),
        "tree": (
            jaxsd.tree_drafter(draft, jaxsd.trees.balanced((2, 2))),
            jaxsd.traversal_verification,
        ),
    }
    params = {
        "target": weights(WINDOWED),
        "draft": models.quantise(weights(WINDOWED), 4, 8),
    }
    texts, stats = {}, {}
    for name, (drafter, verifier) in drafters.items():
        decoder = jaxsd.speculative(target, drafter, verifier, max_len=20)
        out = decoder.generate(params, [[1, 2, 3], [4, 5, 6]], None, jax.random.key(0))
        texts[name], stats[name] = np.asarray(out.tokens).tolist(), out.stats
    assert texts["chain"] == texts["tree"] == texts["plain"]
    # Random weights have no clear favourites, and still most are the original's.
    assert np.asarray(jaxsd.stats.acceptance_rate(stats["chain"])).mean() > 0.3
    assert np.asarray(stats["tree"].num_rounds).sum() < np.asarray(stats["plain"].num_rounds).sum()


def test_compiled_loop_copies_no_cache_and_carries_no_widened_kernel():
    """A tree of drafts, int8 caches, 4-bit kernels: read small in every round of the loop."""
    model = models.language_model(test_compile.DRAFT, jnp.int8)
    drafter = jaxsd.tree_drafter(models.language_model(test_compile.DRAFT), (-1, 0, 0))
    decoder = jaxsd.speculative(model, drafter, jaxsd.traversal_verification, max_len=240)
    small = functools.partial(models.quantise, bits=4, group_size=16, embeddings=True)
    kernels = jax.eval_shape(small, models.abstract_params(test_compile.DRAFT))
    params = {"target": kernels, "draft": kernels}
    prompts = jnp.zeros((8, 16), jnp.int32)  # more rows than a thin product has
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda p, k: decoder.init(p, prompts, None, k), params, key)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.target_cache)} == {"int8", "float32"}
    text = decoder.run.lower(params, state, jaxsd.UNTIL_DONE).compile().as_text()
    assert test_compile.cache_copies(text, state) == []
    loops = [line for line in text.splitlines() if re.search(r"\bwhile\(", line)]
    assert loops
    widened = re.compile(r"f32\[(512,64|(2,4,16|128),64|64,64|(2,176|352),64|64,176)\]")
    assert widened.search("%while.1 = (s32[], f32[352,64]{1,0}) while(")
    assert [line for line in loops if widened.search(line)] == []


# -- many devices ---------------------------------------------------------------------------------


def test_a_quantised_kernel_lies_where_its_kernel_does():
    mesh = sharding.make_mesh(data=1, model=1)
    small = models.quantise(weights(), 4, 8, embeddings=True)
    placed = sharding.place(small, mesh, sharding.FULLY_SHARDED)
    block = placed["layers"]["1"]
    P = PartitionSpec
    for kernel, want in [
        (placed["embedding"], P("model", "data")),
        (block["attention"]["qkv"], P("model", None, None, "data")),
        (block["attention"]["out"], P("data", "model")),
        (block["mlp"]["gate_up"], P(None, "model", "data")),
        (block["mlp"]["down"], P("data", "model")),
    ]:
        assert kernel.values.sharding.spec == kernel.scales.sharding.spec == want


PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jaxsd import models
from jaxsd.models import sharding
sys.path.insert(0, {folder!r})
import test_quantise

model = models.language_model(test_quantise.CONFIG, jnp.int8)
params = models.quantise(test_quantise.weights(), 4, 8, embeddings=True)
mesh = sharding.make_mesh(data=2, model=2)
tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
found = []
for one, tree in (
    (model, params),
    (sharding.on_mesh(model, mesh), sharding.place(params, mesh, sharding.FULLY_SHARDED)),
):
    apply = jax.jit(one.apply)
    logits, cache = apply(tree, tokens, positions, one.init_cache(2, 8))
    more, cache = apply(tree, tokens[:, :1], positions[:, :1] + 6, cache)
    held = [sharding.bytes_per_device(leaf) for leaf in (tree, cache)]
    found.append((np.concatenate([logits, more], axis=1), held))
(alone, whole), (together, parts) = found
print(json.dumps({{
    "apart": float(np.abs(alone - together).max()),
    "weights": [max(whole[0].values()), sorted(set(parts[0].values()))],
    "cache": [max(whole[1].values()), sorted(set(parts[1].values()))],
}}))
"""


def test_four_devices_compute_the_same_and_hold_a_quarter_each():
    code = PROGRAM.format(folder=str(pathlib.Path(__file__).parent))
    found = run_on_devices(code, 4)
    assert found["apart"] < 1e-3
    whole, parts = found["cache"]
    assert parts == [whole // 4]
    whole, parts = found["weights"]
    # Norms are everywhere; the rest is divided by four.
    assert len(parts) == 1
    assert whole / 4 <= parts[0] < whole / 4 + 1000


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model that reads bytes."""
    tokenizer = models.corpus.ByteTokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, n_layers=1)
    folder = tmp_path_factory.mktemp("models") / "target"
    models.save_model(folder, config, weights(config), tokenizer)
    return folder


def test_command_reports_every_form(folder, monkeypatch, capsys):
    forms = command._forms([8])
    assert [form.name for form in forms][:3] == ["float32", "float32, int8 cache", "int8"]
    monkeypatch.setattr(command, "_forms", lambda sizes: [forms[0], forms[4]])
    arguments = ["--target", str(folder), "--num-windows", "3", "--sequence-length", "16"]
    arguments += ["--num-prompts", "1", "--max-new-tokens", "6", "--repeats", "1"]
    assert main.main(["quantise", *arguments, "--num-draft-tokens", "2", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["held_out_tokens"] == 48
    original, small = result["forms"]
    assert (original["name"], small["name"]) == ("float32", "int4 by 8")
    assert original["nats_more"] == 0
    assert 0 < abs(small["nats_more"]) < 0.5
    assert small["bytes"] < original["bytes"]
    assert set(original["pass_time_ratio"].values()) == {1}
    assert [draft["temperature"] for draft in small["as_draft"]] == [0, 1]
    assert original["as_draft"][0]["acceptance_rate"] == 1
    for form in result["forms"]:
        assert form["as_draft"][0]["outputs_equal"] is True
        assert form["as_draft"][1]["outputs_equal"] is None
        for draft in form["as_draft"]:
            assert 1 <= draft["mean_acceptance_length"] <= 3
            assert draft["speedup"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "repeats=0 must be at least 1"),
        (["--num-windows", "0"], "num_windows=0 must be at least 1"),
        (["--group-sizes", "32,x"], "group_sizes='32,x' must be whole numbers above 0"),
    ],
)
def test_wrong_options_end_in_one_line(arguments, message, capsys):
    assert main.main(["quantise", *arguments]) == 2
    assert message in capsys.readouterr().err
