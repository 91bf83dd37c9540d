"""The checker itself: it passes what is right, and condemns every planted fault."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxsd
from jaxsd import replay, testing, verifiers

# ---- Planted faults in verifiers, each a few lines away from the right one


def rejection(key, target_probs, draft, *, accept=None, residual=None, bonus=None, same_key=False):
    """Rejection sampling with one part replaced."""
    accept_key, token_key = jax.random.split(key)
    if same_key:
        token_key = accept_key
    num_tokens = draft.tokens.shape[0]
    drawn = draft.tokens[:, None]
    p = jnp.take_along_axis(target_probs[:num_tokens], drawn, axis=1)[:, 0]
    q = jnp.take_along_axis(draft.probs, drawn, axis=1)[:, 0]
    safe = jnp.where(q > 0, q, 1.0)
    ratio = accept(p, safe) if accept else p / safe
    u = jax.random.uniform(accept_key, (num_tokens,))
    num = jnp.sum(jnp.cumprod(((u < ratio) & (q > 0)).astype(jnp.int32)))
    after = target_probs[-1] if bonus is None else bonus(target_probs, draft)
    rows = [(residual or clipped)(target_probs, draft.probs, i) for i in range(num_tokens)]
    law = jnp.stack([*rows, after])[num]
    return verifiers.verdict(draft.tokens, num, jaxsd.categorical(token_key, law))


def clipped(p, q, i):
    left = jnp.maximum(p[i] - q[i], 0.0)
    total = jnp.sum(left)
    return jnp.where(total > 0, left / jnp.where(total > 0, total, 1.0), p[i])


def everything(p, q):
    return jnp.ones_like(p)


def inverted(p, q):
    return q / jnp.where(p > 0, p, 1e-9)


def unclipped(p, q, i):
    left = jnp.abs(p[i] - q[i]) + 1e-9
    return left / jnp.sum(left)


def target_itself(p, q, i):
    return p[i]


def wrong_place(p, q, i):
    return clipped(p, q, 0)


def last_draft_row(target_probs, draft):
    return (draft.probs[-1] + 1e-9) / jnp.sum(draft.probs[-1] + 1e-9)


def constant_key(key, target_probs, draft):
    return jaxsd.rejection_sampling(jax.random.key(7), target_probs, draft)


def forgets_layout(key, target_probs, draft):
    verdict = jaxsd.rejection_sampling(key, target_probs, draft)
    return verdict._replace(num_accepted=jnp.zeros_like(verdict.num_accepted))


def leaves_rubbish(key, target_probs, draft):
    verdict = jaxsd.rejection_sampling(key, target_probs, draft)
    place = jnp.arange(verdict.tokens.size)
    return verdict._replace(tokens=jnp.where(place > verdict.num_accepted, 1, verdict.tokens))


def with_fault(**fault):
    return functools.partial(rejection, **fault)


FAULTS = {
    "accepts everything": (with_fault(accept=everything), "emitted law differs"),
    "ratio inverted": (with_fault(accept=inverted), "emitted law differs"),
    "residual not clipped": (with_fault(residual=unclipped), "emitted law differs"),
    "recovered token from the target": (with_fault(residual=target_itself), "emitted law differs"),
    "residual of the wrong place": (with_fault(residual=wrong_place), "emitted law differs"),
    "bonus token from the draft": (with_fault(bonus=last_draft_row), "emitted law differs"),
    "one key for two draws": (with_fault(same_key=True), "a key is used twice"),
    "key not used": (constant_key, "does not depend on the key"),
    "accepted count wrong": (forgets_layout, "are not zero"),
    "rubbish after the token": (leaves_rubbish, "are not zero"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_verifier_is_condemned_exactly(name):
    verifier, message = FAULTS[name]
    report = testing.check_verifier(verifier, num_tokens=[2], num_repeats=1)
    assert not report
    assert report.method == "exact"
    with pytest.raises(AssertionError, match=message):
        report.raise_if_failed()


def test_the_same_verifier_without_a_fault_passes_exactly():
    """By comparing uniforms: their replay is exact too."""
    report = testing.check_verifier(with_fault(), num_tokens=[1, 2], num_repeats=1)
    assert report.raise_if_failed().method == "exact"


# ---- Functions from logits, in the style of other libraries


def function(setting, law=jaxsd.probabilities):
    def fn(key, tokens, probs, logits):
        return jaxsd.rejection_sampling(key, law(logits, setting), jaxsd.Draft(tokens, probs))

    return fn


def top_p_first(logits, setting):
    kept = jaxsd.probabilities(logits, setting._replace(temperature=1.0)) > 0
    return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf) / setting.temperature, axis=-1)


def minus_one_for_greedy(logits, setting):
    """A row that asks for greedy decoding, divided by the number that stands for greedy."""
    return jax.nn.softmax(logits / (-1 + 1e-9), axis=-1)


def epsilon_for_greedy(logits, setting):
    return jax.nn.softmax(logits / 0.5, axis=-1)


def filters_forgotten(logits, setting):
    return jax.nn.softmax(logits / setting.temperature, axis=-1)


@pytest.mark.parametrize(
    ("law", "setting"),
    [
        (top_p_first, jaxsd.Sampling(2.0, 0, 0.7)),
        (minus_one_for_greedy, jaxsd.Sampling(0.0)),
        (epsilon_for_greedy, jaxsd.Sampling(0.0)),
        (filters_forgotten, jaxsd.Sampling(0.8, 2, 1.0)),
    ],
)
def test_settings_misapplied_in_verification_are_condemned(law, setting):
    report = testing.check_function(function(setting, law), setting, num_tokens=[1])
    assert not report
    assert report.method == "exact"


def test_an_argmax_draft_verified_as_if_sampled_is_condemned():
    """The function drafts by itself: argmax of q, accepted by p / q with q's probability."""
    setting = jaxsd.Sampling(1.0)

    def fn(key, tokens, probs, logits):
        soft = 0.7 * probs + 0.1  # a chosen token, said to be drawn from a spread law
        return function(setting)(key, tokens, soft / jnp.sum(soft, -1, keepdims=True), logits)

    report = testing.check_function(fn, setting, num_tokens=[1])
    assert not report
    assert any("chosen" in finding for finding in report.findings)


def python_loop(key, tokens, probs, logits, *, greedy_residual=False):
    """One place after the other in Python, branching on concrete draws, residuals in numpy."""
    target = np.asarray(jax.nn.softmax(logits, axis=-1))
    for place, token in enumerate(np.asarray(tokens).tolist()):
        key, accept_key, token_key = jax.random.split(key, 3)
        u = jax.random.uniform(accept_key)
        if not bool(u * float(probs[place, token]) < target[place, token]):
            left = np.maximum(target[place] - np.asarray(probs[place]), 0)
            if greedy_residual:
                left = np.eye(left.size)[left.argmax()]
            recovered = jax.random.choice(token_key, left.size, p=left / left.sum())
            return [*tokens.tolist()[:place], int(recovered)], place
    bonus = jax.random.categorical(key, jnp.log(target[-1]))
    return [*tokens.tolist(), int(bonus)], len(tokens)


@pytest.mark.parametrize("fault", [False, True])
def test_python_code_that_branches_on_its_draws_is_enumerated(fault):
    fn = functools.partial(python_loop, greedy_residual=fault)
    report = testing.check_function(fn, vocab_size=3, num_tokens=[1], chosen_drafts=False)
    assert report.method == "exact"
    assert bool(report) != fault


@pytest.mark.parametrize("fault", [False, True])
def test_what_cannot_be_replayed_is_tested_by_chi_square(fault):
    """The token by the Gumbel trick; faulty with noise that is scaled. False alarm 1e-6."""

    @jax.jit
    def fn(key, tokens, probs, logits):
        accept_key, token_key = jax.random.split(key)
        p = jax.nn.softmax(logits, axis=-1)
        place = tokens[0]
        accepted = jax.random.uniform(accept_key) * probs[0, place] < p[0, place]
        law = jnp.where(accepted, p[1], clipped(p, probs, 0))
        noise = jax.random.gumbel(token_key, law.shape) * (0.8 if fault else 1.0)
        token = jnp.argmax(jnp.log(law) + noise)
        emitted = jnp.where(accepted, jnp.stack([place, token]), jnp.stack([token, 0]))
        return emitted, accepted.astype(jnp.int32)

    report = testing.check_function(fn, vocab_size=3, num_tokens=[1])
    assert report.method == "chi-square"
    assert "gumbel has no exact replay" in report.note
    assert bool(report) != fault
    assert report.false_alarm == 1e-6


# ---- Whole decoders

MODEL = testing.MarkovModel(vocab_size=3, order=2)
PARAMS = {"target": MODEL.init(jax.random.key(0)), "draft": MODEL.init(jax.random.key(1))}
PROMPTS = [[1], [2, 0, 1]]
DRAFTER = jaxsd.model_drafter(MODEL, num_tokens=2)


def check(drafter=DRAFTER, verifier=jaxsd.rejection_sampling, target=MODEL, **options):
    decoder = jaxsd.speculative(target, drafter, verifier, max_len=8, eos_id=2)
    options = {"num_new_tokens": 4, "num_samples": 2000, "eos_id": 2} | options
    return testing.check_decoder(decoder, MODEL, PARAMS, PROMPTS, **options)


MIXED = [
    jaxsd.Sampling(0.0),
    jaxsd.Sampling(1.0),
    jaxsd.Sampling(0.7, 2, 1.0),
    jaxsd.Sampling(1.5, 0, 0.8),
]


@pytest.mark.parametrize("drafter", [jaxsd.no_drafter(), DRAFTER, jaxsd.prompt_lookup(3)])
def test_decoders_have_the_targets_law_in_mixed_batches_with_ends(drafter):
    """Greedy, sampled and filtered rows of two prompts together. False alarm 1e-6."""
    report = check(drafter, sampling=MIXED)
    assert report, report
    assert report.num_cases == 8


def claims_sharper_law(*args):
    proposal = DRAFTER.propose(*args)
    sharper = proposal.probs**2
    return proposal._replace(probs=sharper / jnp.sum(sharper, axis=-1, keepdims=True))


def argmax_as_if_drawn(*args):
    proposal = DRAFTER.propose(*args)
    return proposal._replace(tokens=jnp.argmax(proposal.probs, axis=-1).astype(jnp.int32))


class Forgetful(testing.MarkovModel):
    """A target that loses the first token of every block it reads."""

    def apply(self, params, tokens, positions, cache):
        logits, fresh = testing.MarkovModel.apply(self, params, tokens, positions, cache)
        rows = jnp.arange(tokens.shape[0])
        return logits, fresh.at[rows, positions[:, 0]].set(0)


def lockstep(verifier):
    """All rows advance by the smallest count, every one with a token from its own residual."""
    shared = jax.custom_batching.custom_vmap(verifier)

    @shared.def_vmap
    def rule(size, in_batched, keys, target_probs, draft):
        verdict = jax.vmap(verifier)(keys, target_probs, draft)
        least = jnp.min(verdict.num_accepted)
        num = jnp.broadcast_to(least, (size,))
        last = jnp.minimum(least, draft.tokens.shape[1] - 1)
        gap = jnp.maximum(target_probs[:, last] - draft.probs[:, last], 1e-9)
        token = jax.vmap(jaxsd.categorical)(keys, gap / jnp.sum(gap, axis=-1, keepdims=True))
        return jax.vmap(verifiers.verdict)(draft.tokens, num, token), jaxsd.Verdict(True, True)

    return lambda key, target_probs, draft: shared(key, target_probs, draft)


@pytest.mark.parametrize(
    "parts",
    [
        {"drafter": DRAFTER._replace(propose=claims_sharper_law)},
        {"drafter": DRAFTER._replace(propose=argmax_as_if_drawn)},
        {"target": Forgetful(3, 2)},
        {"verifier": lockstep(jaxsd.rejection_sampling)},
        {"eos_id": None},
    ],
    ids=["wrong probs", "argmax as if drawn", "cache hole", "lockstep", "ends not meant"],
)
def test_a_faulty_decoder_is_condemned(parts):
    report = check(**parts)
    assert not report
    assert report.method == "chi-square"
    with pytest.raises(AssertionError, match="typical causes"):
        report.raise_if_failed()


# ---- Its parts


def test_exact_law_follows_repeated_comparisons_of_one_uniform():
    def sample(key):
        u = jax.random.uniform(key)
        return jnp.sum(jnp.cumsum(jnp.array([0.1, 0.2, 0.7])) < u)

    law = testing.exact_law(sample)
    np.testing.assert_allclose([law[0], law[1], law[2]], [0.1, 0.2, 0.7], atol=1e-6)


@pytest.mark.parametrize(
    ("sample", "p"),
    [
        (lambda key: 1.0 - jax.random.uniform(key) < 0.3, 0.3),
        (lambda key: jax.random.uniform(key, minval=-1.0, maxval=3.0) >= jnp.float32(0.0), 0.75),
        (lambda key: np.float32(0.3) > 2.0 * jax.random.uniform(key, (2,))[1], 0.15),
        (lambda key: jax.random.choice(key, jnp.array([4, 5]), p=jnp.array([1.0, 3.0])) == 5, 0.75),
        (lambda key: jax.random.bernoulli(key, jnp.float32(jnp.nan)), 0.0),
        (lambda key: jax.random.categorical(key, jnp.array([-jnp.inf] * 3)) == 0, 1.0),
    ],
)
def test_exact_law_of_small_draws(sample, p):
    law = testing.exact_law(lambda key: jnp.reshape(sample(key), ()))
    assert law.get(True, 0.0) == pytest.approx(p, abs=1e-6)


def draw_in_loop(carry):
    count, key, total, p = carry
    key, draw_key = jax.random.split(key)
    return count + 1, key, total + jax.random.bernoulli(draw_key, p).astype(jnp.int32), p


def three_draws(key, p):
    """The sum of three draws in a loop that a `jit` around it would keep as a loop."""
    start = (jnp.int32(0), key, jnp.int32(0), p)
    return jax.lax.while_loop(lambda carry: carry[0] < 3, draw_in_loop, start)[2]


def test_draws_in_a_compiled_loop_are_never_taken_for_one_draw():
    """The body's trace used to be remembered with the first outcome baked in, and reused."""
    p = jnp.float32(0.25)
    before = int(three_draws(jax.random.key(3), p))
    law = testing.exact_law(lambda key: three_draws(key, p))
    want = scipy.stats.binom.pmf(range(4), 3, 0.25)
    np.testing.assert_allclose([law[k] for k in range(4)], want, atol=1e-6)
    with pytest.raises(ValueError, match="inside a compiled loop"):
        replay.lanes(lambda key, p: (three_draws(key, p),), (np.float32([0.25, 0.5]),))
    with pytest.raises(ValueError, match="under vmap"):
        testing.exact_law(lambda key: jax.vmap(jax.random.bernoulli)(jax.random.split(key)))
    assert int(three_draws(jax.random.key(3), p)) == before


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda key: jax.random.bernoulli(key) & jax.random.bernoulli(key), "used twice"),
        (lambda key: jax.random.bernoulli(jax.random.key(5)), "does not depend on the key"),
        (lambda key: jax.random.normal(key) > 0, "normal has no exact replay"),
        (lambda key: jax.random.key_data(key)[1] % 2, "depends on the key beyond"),
    ],
)
def test_exact_law_refuses_what_it_cannot_enumerate(sample, message):
    with pytest.raises(ValueError, match=message):
        testing.exact_law(sample)


def test_samplers_are_put_back_after_an_error():
    before = dict(vars(jax.random))
    with pytest.raises(ZeroDivisionError):
        testing.exact_law(lambda key: 1 / 0)
    assert dict(vars(jax.random)) == before


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 81, 400])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5, 4.0])
def test_chi_square_tail_equals_scipy(degrees, factor):
    got = testing._chi_square_tail(factor * degrees, degrees)
    assert got == pytest.approx(scipy.stats.chi2.sf(factor * degrees, degrees), rel=1e-9)


def test_p_values_of_a_lossless_sampler_are_uniform():
    """Kolmogorov-Smirnov over 300 histograms with rare cells pooled; false alarm 1e-6."""
    rng = np.random.default_rng(0)
    law = rng.dirichlet(np.full(40, 0.5))
    named = {(i,): p for i, p in enumerate(law)}
    p_values = []
    for _ in range(300):
        counts = {(i,): int(n) for i, n in enumerate(rng.multinomial(2000, law)) if n}
        p_values.append(testing._compare_counts("", named, counts, 1e-6).p_value)
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1}, "vocab_size=1 must be"),
        ({"num_tokens": []}, "num_tokens="),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' must be"),
        ({"num_repeats": 0}, "num_repeats=0 must be"),
        ({"false_alarm": 0.0}, "false_alarm=0.0 must be"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        testing.check_verifier(jaxsd.rejection_sampling, **options)


def test_check_decoder_wants_room_for_the_text():
    with pytest.raises(ValueError, match="num_new_tokens=6 must be"):
        check(num_new_tokens=6)
