"""Drafting with the target's own first layers: one cache, one prefill, the target's law."""

import collections
import dataclasses
import functools

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_compile

import jaxsd
from jaxsd import early_exit, models, testing
from jaxsd.models import early_exit as layers

CONFIG = dataclasses.replace(
    models.CONFIGS["tiny"], vocab_size=4, d_model=16, d_ff=32, n_heads=2, n_kv_heads=1, head_dim=8
)
TARGET = models.language_model(CONFIG)  # two layers
EOS, MAX_LEN, K = 3, 14, 3
# Larger weights than at the start of training: laws that differ, from each other and in themselves.
PARAMS = {
    "target": jax.tree.map(
        lambda leaf: 3.0 * leaf if leaf.ndim > 1 else leaf,
        models.init_params(CONFIG, jax.random.key(0)),
    )
}
PROMPTS = np.array([[2, 0, 1, 3, 2], [1, 0, 0, 0, 0], [0, 1, 2, 0, 0]], np.int32)
LENGTHS = np.array([5, 1, 3], np.int32)
KEY = jax.random.key(1)
TRACES = collections.Counter()


class Counted:
    """An exit, counting how often it is traced, by block length."""

    def __init__(self, model):
        self.model = model
        self.init_cache = model.init_cache

    def apply(self, params, tokens, positions, cache):
        TRACES[tokens.shape[1]] += 1
        return self.model.apply(params, tokens, positions, cache)


@functools.cache
def decoder(num_layers):
    drafter = jaxsd.no_drafter()
    if num_layers:
        part = Counted(layers.exit_early(TARGET, num_layers))
        drafter = early_exit.early_exit_drafter(part, K)
    return jaxsd.speculative(TARGET, drafter, max_len=MAX_LEN, eos_id=EOS)


def prefilled(length=5):
    """The target's cache after the first prompt."""
    tokens, positions = PROMPTS[:1, :length], jnp.arange(length)[None]
    return TARGET.apply(PARAMS["target"], tokens, positions, TARGET.init_cache(1, 12))[1]


# ---- The part


@pytest.mark.parametrize("num_layers", [1, 2])
def test_exit_is_the_transformer_of_so_many_layers(num_layers):
    """Against the forward without a cache; block by block, in the whole transformer's cache."""
    part = layers.exit_early(TARGET, num_layers)
    cache, found = part.init_cache(1, 8), []
    assert len(cache) == num_layers
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        positions = jnp.arange(start, stop)[None]
        logits, cache = part.apply(PARAMS["target"], PROMPTS[:1, start:stop], positions, cache)
        found.append(logits)
    config = dataclasses.replace(CONFIG, n_layers=num_layers)
    own = {str(index): PARAMS["target"]["layers"][str(index)] for index in range(num_layers)}
    want = models.forward(config, {**PARAMS["target"], "layers": own}, PROMPTS[:1])
    np.testing.assert_allclose(np.concatenate(found, axis=1), want, rtol=2e-5, atol=2e-5)


def test_the_targets_cache_is_what_the_exit_would_have_made():
    """Its layers hold the same keys and values; those beyond are handed through untouched."""
    part = layers.exit_early(TARGET, 1)
    _, own = part.apply(PARAMS["target"], PROMPTS[:1], jnp.arange(5)[None], part.init_cache(1, 12))
    cache = prefilled()
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(cache[:1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    token, positions = jnp.array([[2]]), jnp.array([[5]])
    shared, written = part.apply(PARAMS["target"], token, positions, cache)
    alone, _ = part.apply(PARAMS["target"], token, positions, own)
    np.testing.assert_allclose(shared, alone, rtol=1e-5, atol=1e-5)
    assert written[1] is cache[1]


# ---- The law


TOY = testing.MarkovModel(3, 2)
TOY_PARAMS = {"target": TOY.init(jax.random.key(0))}


class HalfBlind:
    """Part of a Markov model: its weights and its cache, averaged over the token but one."""

    init_cache = TOY.init_cache

    def apply(self, params, tokens, positions, cache):
        averaged = jnp.broadcast_to(params.mean(0, keepdims=True), params.shape)
        return TOY.apply(averaged, tokens, positions, cache)


def toy_row(weights, text):
    return reference.probabilities(reference.markov_logits(weights, text, 2), 0.8, 0, 0.9)[0]


def test_tokens_have_the_exits_law_and_a_round_the_targets():
    """All draws enumerated; V = 3, K = 2 drafted, and a whole round of K = 1."""
    text, setting = [0, 2, 1], jaxsd.Sampling(0.8, 0, 0.9)
    cache = TOY.init_cache(1, 8).at[0, :2].set(jnp.array([0, 2]))  # all but the last
    drafter = early_exit.early_exit_drafter(HalfBlind(), 2)
    outcomes = enumeration.exact_proposals(drafter, TOY_PARAMS, text, setting, target_cache=cache)
    enumeration.assert_laws_are_reported(outcomes)
    averaged = np.broadcast_to(TOY_PARAMS["target"].mean(0, keepdims=True), (3, 3, 3))
    for tokens, _, probs, _ in outcomes:
        for place, row in enumerate(probs):
            want = toy_row(averaged, [*text, *tokens[:place].tolist()])
            np.testing.assert_allclose(row, want, atol=1e-6)

    small = jaxsd.speculative(TOY, early_exit.early_exit_drafter(HalfBlind(), 1), max_len=8)
    state = small.start(TOY_PARAMS, [text], None, KEY, sampling=setting)
    law = enumeration.exact_round(small, TOY_PARAMS, state)
    wanted = functools.partial(toy_row, TOY_PARAMS["target"])
    assert enumeration.distance(law, lambda more: wanted([*text, *more]), 2) <= 1e-6


def test_decoder_keeps_the_targets_law_in_mixed_batches():
    """A transformer's first layer; greedy, sampled and filtered rows, ends; false alarm 1e-6."""
    settings = [jaxsd.Sampling(0.0), jaxsd.Sampling(1.0), jaxsd.Sampling(0.7, 3, 0.8)]
    report = testing.check_decoder(
        decoder(1),
        TARGET,
        PARAMS,
        [[2, 0, 1]],
        sampling=settings,
        eos_id=EOS,
        num_new_tokens=3,
        num_samples=1500,
    )
    assert report, report


def test_greedy_text_equals_that_of_plain_decoding():
    """Ragged prompts and a limit per row; the two agree where no two logits are within 1e-4."""
    limits = np.array([9, 13, 4])
    plain = decoder(0).generate(PARAMS, PROMPTS, LENGTHS, KEY, max_new_tokens=limits)
    out = decoder(1).generate(PARAMS, PROMPTS, LENGTHS, KEY, max_new_tokens=limits)
    forward = jax.jit(functools.partial(models.forward, CONFIG, PARAMS["target"]))

    def next_logits(history):
        padded = np.zeros((1, MAX_LEN), np.int32)
        padded[0, : len(history)] = history
        return np.asarray(forward(padded))[0, len(history) - 1]

    for row in range(3):
        text = np.asarray(plain.tokens)[row, : plain.lengths[row]].tolist()
        margin = reference.smallest_margin(next_logits, text, LENGTHS[row])
        assert margin > 1e-4, "the weights were chosen so that no place is a near-tie"
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert 0 < int(out.stats.num_accepted.sum()) < int(out.stats.num_drafted.sum())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_layers_are_the_target_and_accept_everything(temperature):
    """A stale or missing entry of the shared cache would show here. Rounding between a pass over
    one token and one over K + 1 may reject a sampled token in about a million."""
    out = decoder(2).generate(
        PARAMS, PROMPTS, LENGTHS, KEY, sampling=jaxsd.Sampling(temperature, 3, 0.95)
    )
    assert int(out.stats.num_drafted.sum()) > 0
    np.testing.assert_array_equal(out.stats.num_accepted, out.stats.num_drafted)


def test_a_draft_that_spoils_the_committed_cache_is_condemned():
    """Planted: the exit writes one place too early, over a token that the target has read."""

    class TooEarly(HalfBlind):
        def apply(self, params, tokens, positions, cache):
            return super().apply(params, tokens, jnp.maximum(positions - 1, 0), cache)

    small = jaxsd.speculative(TOY, early_exit.early_exit_drafter(TooEarly(), 1), max_len=8)
    text = [0, 2, 1]
    state = small.start(TOY_PARAMS, [text], None, KEY, sampling=jaxsd.Sampling(0.8))
    law = enumeration.exact_round(small, TOY_PARAMS, state)

    def conditional(more):
        logits = reference.markov_logits(TOY_PARAMS["target"], [*text, *more], 2)
        return reference.probabilities(logits, 0.8, 0, 1.0)[0]

    assert enumeration.distance(law, conditional, 2) > 1e-2


# ---- One cache, one prefill


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_there_is_no_second_cache_and_no_second_prefill():
    """The state is that of plain decoding but for room for K more; a model_drafter of these layers
    has a cache of its own."""
    before = dict(TRACES)
    plain = decoder(0).start(PARAMS, PROMPTS, LENGTHS, KEY)
    state = decoder(1).start(PARAMS, PROMPTS, LENGTHS, KEY)
    assert dict(TRACES) == before
    assert jax.tree.leaves(state.drafter_state) == []
    for one, room in ((plain, MAX_LEN), (state, MAX_LEN + K)):
        assert num_bytes(one.target_cache) == num_bytes(TARGET.init_cache(len(PROMPTS), room))
    second = jaxsd.model_drafter(layers.exit_early(TARGET, 1), K, name="target")
    apart = jaxsd.speculative(TARGET, second, max_len=MAX_LEN)
    apart = jax.eval_shape(apart.init, PARAMS, PROMPTS, LENGTHS, KEY)
    assert num_bytes(apart.drafter_state.cache) == num_bytes(state.target_cache) // 2


def test_compiled_loop_holds_one_cache_and_copies_none(monkeypatch):
    """By the compiler's own account, in a long buffer: what the loop needs besides its arguments,
    which it writes in place, is less than the keys and values of a single layer."""
    monkeypatch.setattr(test_compile, "MAX_LEN", 4096)
    model = models.language_model(test_compile.TARGET)
    drafter = early_exit.early_exit_drafter(layers.exit_early(model, 1), 2)
    loop, params, state = test_compile.abstract_loop(drafter, 1)
    compiled = loop.run.lower(params, state, jaxsd.UNTIL_DONE).compile()
    text = compiled.as_text()
    assert text.count(" while(") >= 2
    assert test_compile.cache_copies(text, state) == []
    sizes = compiled.memory_analysis()
    if sizes is not None:
        print(sizes.temp_size_in_bytes, num_bytes(state.target_cache[0]))
        assert sizes.alias_size_in_bytes >= num_bytes(state.target_cache)
        assert sizes.temp_size_in_bytes < num_bytes(state.target_cache[0])


def test_no_second_call_traces_anything_again():
    call = functools.partial(decoder(1).generate, PARAMS)
    call(PROMPTS, LENGTHS, KEY)
    first = dict(TRACES)
    assert set(first) == {1}
    call(PROMPTS[::-1], None, KEY, sampling=jaxsd.Sampling(0.7, 2, 0.9))
    call(PROMPTS, LENGTHS, jax.random.key(9), max_new_tokens=[1, 2, 3])
    assert dict(TRACES) == first


# ---- Wrong arguments


@pytest.mark.parametrize("num_layers", [0, 3, True, 1.0])
def test_layers_that_are_not_there_are_named(num_layers):
    with pytest.raises(ValueError, match=f"num_layers={num_layers} must be an integer in 1..2"):
        layers.exit_early(TARGET, num_layers)


@pytest.mark.parametrize("num_tokens", [0, True, 2.0])
def test_wrong_numbers_of_tokens_are_named(num_tokens):
    with pytest.raises(ValueError, match=f"num_tokens={num_tokens} must be"):
        early_exit.early_exit_drafter(HalfBlind(), num_tokens)


def test_noise_that_is_not_shared_by_both_sides_is_refused():
    drafter = early_exit.early_exit_drafter(HalfBlind(), 2)
    wrong = jaxsd.speculative(TOY, drafter, jaxsd.gumbel_coupling, max_len=8)
    with pytest.raises(ValueError, match="shares_noise=False of the drafter must fit"):
        wrong.generate(TOY_PARAMS, [[1]], None, KEY)
