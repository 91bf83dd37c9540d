"""Timing in turns, and how many rounds speculation takes for a text that is known."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsd
from jaxsd import models
from jaxsd.cli import measure, timing
from jaxsd.models import checkpoint, corpus

CONFIG = dataclasses.replace(
    models.CONFIGS["tiny"], vocab_size=257, d_model=16, n_layers=1, d_ff=16, head_dim=4
)


def test_every_timer_runs_in_every_turn_and_begins_one():
    calls = []
    timers = [lambda name=name: calls.append(name) or float(name) for name in range(3)]
    seconds = timing.in_turns(timers, repeats=3)
    assert seconds.tolist() == [[0.0, 1.0, 2.0]] * 3
    turns = [calls[start : start + 3] for start in (0, 3, 6)]
    assert all(sorted(turn) == [0, 1, 2] for turn in turns)
    assert sorted(turn[0] for turn in turns) == [0, 1, 2]


def test_a_slow_turn_changes_nothing():
    truth = np.array([1.0, 5.0, 0.2])
    paces = np.array([1.0, 3.0, 1.0, 2.0, 1.0])
    np.testing.assert_allclose(timing.typical(paces[:, None] * truth[None, :]), truth)


def test_without_slow_turns_it_is_the_median():
    seconds = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 4.0], [1.0, 2.0, 9.0]])
    np.testing.assert_allclose(timing.typical(seconds), [1.0, 2.0, 4.0])


def test_a_timed_pass_is_over_the_asked_tokens_after_the_asked_context():
    """A model that records what it was traced with, and takes part in nothing else."""
    seen = []

    class Probe:
        def init_cache(self, batch_size, max_len):
            return jnp.zeros((batch_size, max_len))

        def apply(self, params, tokens, positions, cache):
            seen.append((tokens.shape, cache.shape))
            logits = jax.nn.one_hot(positions + params, 64)  # the next block names its positions
            return logits, cache

    loop = timing.make_pass_loop(Probe())
    timer = timing.make_pass_timer(Probe(), loop, np.int32(0), 2, 3, 20, min_seconds=0.0)
    assert timer() > 0
    assert set(seen) == {((2, 3), (2, 23))}
    block, _ = loop(
        np.int32(0),
        jnp.zeros((2, 3), jnp.int32),
        jnp.full((2,), 20, jnp.int32),
        jnp.zeros((2, 23)),
        np.int32(1),
    )
    assert block.tolist() == [[20, 21, 22]] * 2


def test_speeds_are_those_of_a_device():
    assert 1e6 < timing.memory_speed(2**16, repeats=2) < 1e14
    assert 1e6 < timing.product_speed(32, repeats=2) < 1e17


def rounds_of(outcome, num_tokens):
    """Rounds for a text of which each place is kept from the draft or not."""
    place = rounds = 0
    while place < len(outcome):
        accepted = 0
        while accepted < num_tokens and place + accepted < len(outcome):
            if not outcome[place + accepted]:
                break
            accepted += 1
        place, rounds = place + accepted + 1, rounds + 1
    return rounds


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 7])
def test_expected_rounds_are_those_of_all_outcomes(num_tokens):
    kept = np.array([0.3, 0.9, 1.0, 0.0, 0.6])
    total = 0.0
    for outcome in itertools.product((False, True), repeat=len(kept)):
        chances = [p if is_kept else 1 - p for p, is_kept in zip(kept, outcome, strict=True)]
        total += float(np.prod(chances)) * rounds_of(outcome, num_tokens)
    assert measure.expected_rounds(kept, num_tokens) == pytest.approx(total, rel=1e-12)


def random_model(seed):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape).astype(np.float32)),
        models.abstract_params(CONFIG),
    )
    return checkpoint.Pretrained(CONFIG, params, corpus.ByteTokenizer(), {})


def test_greedy_rounds_are_predicted_exactly_from_the_text_alone():
    """Nothing is drawn: the text says at which places the draft would have said the same."""
    target = random_model(0)
    # A draft that agrees often: the target, with small errors.
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.15, leaf.shape).astype(np.float32)),
        target.params,
    )
    draft = target._replace(params=params)
    weights = {"target": target.params, "draft": draft.params}
    model, new = models.language_model(CONFIG), 24
    prompts = rng.integers(0, 257, (6, 4)).astype(np.int32)

    def decode(drafter):
        decoder = jaxsd.speculative(model, drafter, jaxsd.rejection_sampling, max_len=28)
        return decoder.generate(weights, prompts, None, jax.random.key(0), max_new_tokens=new)

    text = np.asarray(decode(jaxsd.no_drafter()).tokens)
    kept = measure.make_kept(target, draft)(text, 0.0)[:, 3 : 3 + new]
    assert 0.1 < kept.mean() < 0.9
    out = decode(jaxsd.model_drafter(model, 3))
    expected = [measure.expected_rounds(row, 3) for row in kept]
    assert expected == np.asarray(out.stats.num_rounds).tolist()


def test_reading_at_several_temperatures_equals_one_after_the_other():
    target, draft = random_model(0), random_model(1)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 6)).astype(np.int32)
    temperatures = (1.0, 0.5, 0.0)
    overlap, kept = measure.make_reading(target, draft)(tokens, temperatures)
    assert overlap.shape == kept.shape == (3, 2, 6)
    for place, temperature in enumerate(temperatures):
        one, _ = measure.make_overlap(target, draft)(tokens, temperature)
        np.testing.assert_allclose(overlap[place], one, rtol=1e-5, atol=1e-6)
        alone = measure.make_kept(target, draft)(tokens, temperature)
        np.testing.assert_allclose(kept[place], alone, rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_the_ratio_of_both_laws():
    target, draft = random_model(0), random_model(1)
    tokens = np.array([[7, 8, 9, 10]], np.int32)
    kept = measure.make_kept(target, draft)(tokens, 0.5)
    laws = [
        np.exp(2 * np.asarray(models.forward(CONFIG, model.params, tokens), np.float64))
        for model in (target, draft)
    ]
    laws = [law / law.sum(-1, keepdims=True) for law in laws]
    for place in range(3):
        p, q = (law[0, place, tokens[0, place + 1]] for law in laws)
        assert kept[0, place] == pytest.approx(min(1, q / p), rel=1e-3)
