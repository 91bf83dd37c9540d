"""Lossy verifiers: the loss they report is the bias they have, at every place and of every text."""

import functools
import inspect
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsd
from jaxsd import cases as law_cases
from jaxsd import costmodel, lossy, replay, testing, verifiers

MAX_TV = 0.25
TOLERANCE = {"float32": 2e-6, "float64": 1e-12}
# Rules by name: how the verifier is made, and the chance to keep a drafted token, by definition.
RULES = {
    "over_acceptance": (
        functools.partial(lossy.over_acceptance, 0.15),
        lambda p, q: np.minimum(1, (p + 0.15) / q),
    ),
    "over_acceptance, target": (
        functools.partial(lossy.over_acceptance, 0.15, residual="target"),
        lambda p, q: np.minimum(1, (p + 0.15) / q),
    ),
    "lenience": (
        functools.partial(lossy.lenience, 0.5),
        lambda p, q: np.minimum(1, p / (0.5 * q)),
    ),
    "typical_acceptance": (
        functools.partial(lossy.typical_acceptance, 0.4, 0.9),
        lambda p, q: is_typical(p) * 1.0,
    ),
    "typical_acceptance, lossless": (
        functools.partial(lossy.typical_acceptance, 0.4, 0.9, atypical="lossless"),
        lambda p, q: np.where(is_typical(p), 1, np.minimum(1, p / q)),
    ),
}
LOSSLESS = {
    "over_acceptance(0)": lossy.over_acceptance(0.0),
    "lenience(1)": lossy.lenience(1.0),
    "over_acceptance, target, max_tv=0": lossy.over_acceptance(0.5, residual="target", max_tv=0.0),
    "lenience, max_tv=0": lossy.lenience(0.2, max_tv=0.0),
    "typical_acceptance, max_tv=0": lossy.typical_acceptance(0.4, 0.9, max_tv=0.0),
}


def is_typical(p):
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1, keepdims=True)
    return p > np.minimum(0.4, 0.9 * np.exp(-entropy))


def at_a_place(name, p, q):
    """Acceptance, law and loss of a rule for laws `[..., V]`, by their definitions."""
    drawn = np.where(q > 0, q, 1)
    b = np.where(q > 0, RULES[name][1](p, drawn), 0)
    rejected = 1 - (b * q).sum(-1, keepdims=True)
    missing = np.maximum(p - b * q, 0)
    total = missing.sum(-1, keepdims=True)
    residual = np.where(total > 0, missing / np.where(total > 0, total, 1), p)
    law = b * q + rejected * (p if name.endswith("target") else residual)
    return b, law, 0.5 * np.abs(law - p).sum(-1)


# ---- Every draft and every draw, and what was reported


def enumerated(verifier, length, *, spents=(0.0,), dtype="float32", seed=0):
    """All outputs on kernels of every kind, and what is wrong with the use of keys.

    Of every case and every sum spent before: (case, spent, tokens, num_accepted, loss, weight).
    """
    rng = np.random.default_rng(seed)
    kinds = law_cases.verifier_cases(rng, 3, law_cases.chain_parents(length), "independent", dtype)
    cases = list(itertools.product(kinds, np.asarray(spents, dtype)))
    stacked, chances = [], []
    for case, spent in cases:
        tokens, chance = case.drafts()
        drafted, probs, target, _ = case.inputs(tokens)
        stacked.append((drafted, probs, target, np.full(len(tokens), spent)))
        chances.append(chance)
    args = tuple(np.concatenate(parts) for parts in zip(*stacked, strict=True))

    def emit(key, tokens, probs, target, spent):
        verdict = verifier(key, target, jaxsd.Draft(tokens, probs), spent)
        return verdict.tokens, verdict.num_accepted, verdict.loss

    with enable_x64():  # the arguments' types decide
        runs = replay.lanes(emit, args)
    weights = runs.weights * np.concatenate(chances)[runs.owners]
    source = np.repeat(np.arange(len(cases)), [len(chance) for chance in chances])[runs.owners]
    found = []
    for index, (case, spent) in enumerate(cases):
        rows = source == index
        found.append((case, spent, *(x[rows] for x in runs.outputs), weights[rows]))
    return found, runs.notes


def biases_of_places(case, tokens, num_accepted, weight):
    """`[M]`: of every output the sum, over the places it filled, of the place's true bias.

    A place's law is that of its token given those before it and that the round came so far.
    """
    bias = np.zeros(len(tokens))
    for place, level in enumerate(case.target):
        for prefix in itertools.product(range(case.vocab_size), repeat=place):
            rows = (num_accepted >= place) & np.all(tokens[:, :place] == prefix, axis=1)
            if rows.any():
                mass = np.bincount(tokens[rows, place], weight[rows], case.vocab_size)
                bias[rows] += 0.5 * np.abs(mass / mass.sum() - level[prefix]).sum()
    return bias


def findings(verifier, length, *, max_tv=None, dtype="float32", **options):
    """What is wrong with a verifier's losses; and the largest expected loss, to see that it bit."""
    found, wrong = enumerated(verifier, length, dtype=dtype, **options)
    tolerance, largest = TOLERANCE[dtype], 0.0
    for case, spent, tokens, num_accepted, loss, weight in found:
        where = f"K={length}, {case.name}, spent {spent:.3g}"
        np.testing.assert_allclose(weight.sum(), 1, atol=tolerance)
        gap = np.abs(loss - biases_of_places(case, tokens, num_accepted, weight)).max()
        if gap > tolerance:
            wrong.append(f"{where}: a loss is {gap:.2g} off the bias of the places")
        joint = 0.5 * np.abs(case.completed(tokens, num_accepted, weight) - case.law()).sum()
        expected = (loss * weight).sum()
        if joint > expected + tolerance:
            wrong.append(f"{where}: total variation {joint:.3g} above expected loss {expected:.3g}")
        if max_tv is not None and ((loss > 0) & (spent + loss > np.asarray(max_tv, dtype))).any():
            wrong.append(f"{where}: sum of losses {(spent + loss).max():.3g} above {max_tv}")
        largest = max(largest, expected)
    return wrong, largest


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", RULES)
def test_the_loss_is_the_bias_of_the_places_and_bounds_that_of_the_text(name, dtype):
    """K = 2, ten kinds of kernels, every draft and draw; 2e-6 and 1e-12.

    Each output's loss equals the sum of |law - target's law| / 2 over the places it filled, laws
    found by counting; the bonus token's place has none.
    """
    wrong, largest = findings(RULES[name][0](), 2, dtype=dtype)
    assert not wrong
    assert largest > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", RULES)
def test_with_a_limit_no_path_spends_more_and_the_loss_is_still_exact(name, dtype):
    """From sums of 0, in between, a hair below the limit, at it, above it, and far above."""
    hair = np.nextafter(np.float32(MAX_TV), np.float32(0))
    options = {"spents": (0.0, 0.1, 0.2, hair, MAX_TV, 0.3, 5.0), "dtype": dtype, "seed": 1}
    wrong, largest = findings(RULES[name][0](max_tv=MAX_TV), 2, max_tv=MAX_TV, **options)
    assert not wrong
    assert 0.1 < largest <= MAX_TV


@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("max_tv", [None, 0.3])
def test_other_lengths_have_exact_losses(length, max_tv):
    verifier = lossy.over_acceptance(0.1, max_tv=max_tv)
    wrong, largest = findings(verifier, length, max_tv=max_tv, spents=(0.0, 0.15))
    assert not wrong
    assert (largest > 0) == (length > 0)


def test_a_place_too_dear_for_what_is_left_does_not_stop_a_cheaper_one():
    """Losses 0.3 and 0.1 with 0.15 to spend: the second place is biased, the first is not."""
    p = jnp.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    q = jnp.array([[0.8, 0.2], [0.6, 0.4]])
    verifier = jax.jit(lossy.over_acceptance(1.0, max_tv=0.15))
    losses = set()
    for seed in range(20):
        draft = jaxsd.Draft(jnp.array([1, 0]), q)  # the first is accepted by either rule
        verdict = verifier(jax.random.key(seed), p, draft, jnp.float32(0.0))
        assert verdict.num_accepted == 2  # the lossless rule rejects the second with chance 1 / 6
        losses.add(round(float(verdict.loss), 6))
    assert losses == {0.1}


@pytest.mark.parametrize("name", LOSSLESS)
def test_without_anything_to_lose_the_law_is_exactly_the_targets(name):
    """And every loss is 0, to the bit: a token that does not exist tells if not."""
    verifier = LOSSLESS[name]

    def judged(key, target_probs, draft):
        verdict = verifier(key, target_probs, draft, jnp.zeros((), target_probs.dtype))
        return verdict._replace(tokens=jnp.where(verdict.loss == 0, verdict.tokens, -1), loss=None)

    for dtype in ("float32", "float64"):
        report = testing.check_verifier(judged, num_tokens=(2,), dtype=dtype, num_repeats=1)
        assert report.raise_if_failed().method == "exact"


def test_without_anything_to_lose_the_tokens_are_those_of_rejection_sampling():
    """Key for key, but for typical acceptance, which rejects more."""
    laws = jax.nn.softmax(2 * jax.random.normal(jax.random.key(1), (8, 3, 4)))
    accepted = 0
    for seed, (p, after, q) in enumerate(laws):
        key, target = jax.random.key(seed), jnp.stack([p, after])
        draft = jaxsd.Draft(jnp.argmax(q)[None], q[None])
        wanted = jaxsd.rejection_sampling(key, target, draft)
        accepted += int(wanted.num_accepted)
        for name, verifier in LOSSLESS.items():
            if not name.startswith("typical"):
                verdict = verifier(key, target, draft, jnp.float32(0.0))
                assert verdict.tokens.tolist() == wanted.tokens.tolist()
    assert 0 < accepted < 8


# ---- Planted faults


def residual(p, kept):
    left = jnp.maximum(p - kept, 0)
    return jnp.where(jnp.sum(left) > 0, left / jnp.where(jnp.sum(left) > 0, jnp.sum(left), 1), p)


def anew(key, target_probs, draft, spent, *, max_tv=None, kept=None, law=None, **faults):
    """A lossy verifier written anew, one place after the other, with places for faults.

    faults: `bias(p, q, kept, loss)` in place of the loss that is reported; `charge(loss, excess)`
    in place of that which the budget is asked for, given the drafted token's own excess; `counted`,
    places of a round from the number accepted; `forgets`, what was spent before; `reuses`, a key.
    """
    accept_key, token_key = jax.random.split(key)
    num_tokens = draft.tokens.shape[0]
    coins = jax.random.split(accept_key, num_tokens)
    alive, num, lost, laws = jnp.ones((), bool), jnp.int32(0), [jnp.zeros_like(spent)], []
    for place in range(num_tokens):
        p, q, token = target_probs[place], draft.probs[place], draft.tokens[place]
        mass = jnp.minimum(q, p + 0.15) if kept is None else kept(p, q)
        left = residual(p, mass) if law is None else law(p, q)
        emitted = mass + (1 - jnp.sum(mass)) * left
        loss = 0.5 * jnp.sum(jnp.abs(emitted - p))
        reported = faults["bias"](p, q, mass, loss) if "bias" in faults else loss
        excess = jnp.maximum(mass - p, 0)[token]
        charge = faults["charge"](loss, excess) if "charge" in faults else loss
        before = jnp.zeros_like(spent) if faults.get("forgets") else spent
        allowed = jnp.bool_(True) if max_tv is None else before + lost[-1] + charge <= max_tv
        mass = jnp.where(allowed, mass, jnp.minimum(p, q))
        laws.append(jnp.where(allowed, left, residual(p, mass)))
        lost.append(lost[-1] + jnp.where(allowed, reported, 0))
        chance = jnp.where(q[token] > 0, mass[token] / jnp.where(q[token] > 0, q[token], 1), 0)
        alive &= jax.random.bernoulli(coins[place], chance)
        num += alive.astype(jnp.int32)
    laws = jnp.stack([*laws, target_probs[-1]])
    token = jaxsd.categorical(coins[0] if faults.get("reuses") else token_key, laws[num])
    counted = faults["counted"](num) if "counted" in faults else num + 1
    loss = jnp.stack(lost)[jnp.minimum(counted, num_tokens)]
    return verifiers.verdict(draft.tokens, num, token)._replace(loss=loss)


def over_drafted(p, q, kept, loss):
    """Theorem 4's loss, which holds with the optimal residual."""
    return jnp.sum(jnp.maximum(kept - p, 0))


FAULTS = {
    "typical acceptance with the lossless rule's residual": (
        "off the bias",
        {
            "kept": lambda p, q: jnp.where(p > 0.3, q, 0),
            "law": lambda p, q: residual(p, q),
            "bias": over_drafted,
        },
    ),
    "lenience with a residual of its own": (
        "above expected loss",
        {
            "kept": lambda p, q: jnp.minimum(q, 2 * p),
            "law": lambda p, q: residual(p, 0.5 * q),
            "bias": over_drafted,
        },
    ),
    "recovered tokens from the target, with the optimal residual's loss": (
        "above expected loss",
        {"law": lambda p, q: p, "bias": over_drafted},
    ),
    "epsilon as the loss": (
        "off the bias",
        {"bias": lambda p, q, kept, loss: jnp.full_like(loss, 0.15)},
    ),
    "the drafted tokens' total variation as the loss": (
        "off the bias",
        {"bias": lambda p, q, kept, loss: 0.5 * jnp.sum(jnp.abs(p - q))},
    ),
    "the recovered token's place left out": ("above expected", {"counted": lambda num: num}),
    "places counted that were not filled": ("off the bias", {"counted": lambda num: num + 2}),
    "the budget forgets earlier rounds": (
        "sum of losses 0.[0-9]* above 0.25",
        {"max_tv": MAX_TV, "forgets": True},
    ),
    "the budget forgets this place": (
        "sum of losses 0.[0-9]* above 0.25",
        {"max_tv": MAX_TV, "charge": lambda loss, excess: jnp.zeros_like(loss)},
    ),
    "the budget looks at the drafted token": (
        "off the bias",
        {"max_tv": MAX_TV, "charge": lambda loss, excess: jnp.where(excess > 0, loss, 0)},
    ),
    "a key used twice": ("a key is used twice", {"reuses": True}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_false_loss_is_found(name):
    message, faults = FAULTS[name]
    verifier = functools.partial(anew, **faults)
    wrong, _ = findings(verifier, 2, max_tv=faults.get("max_tv"), spents=(0.0, 0.2))
    assert re.search(message, "\n".join(wrong))


@pytest.mark.parametrize("max_tv", [None, MAX_TV])
def test_written_anew_without_a_fault_nothing_is_found(max_tv):
    verifier = functools.partial(anew, max_tv=max_tv)
    wrong, largest = findings(verifier, 2, max_tv=max_tv, spents=(0.0, 0.2))
    assert not wrong
    assert largest > 0.1


# ---- One place, against the theory


@pytest.mark.parametrize("name", RULES)
def test_a_place_is_as_the_theory_says(name):
    """Law, rejections and loss of every kind of kernels equal `jaxsd.costmodel`'s, to 1e-12.

    The acceptance is the definition's; where it is nowhere below the lossless rule's, rejection and
    loss add up to the total variation, and never to less.
    """
    found, _ = enumerated(RULES[name][0](), 1, dtype="float64")
    checked = 0
    for case, _, tokens, num_accepted, loss, weight in found:
        p, q = case.target[0], case.draft[0]
        if not q.any():
            assert (loss == 0).all()
            continue
        b, law, lost = at_a_place(name, p, q)
        with enable_x64():
            best = costmodel.optimal_residual(b, q, p)
            out = costmodel.emitted_law(b, q, p if name.endswith("target") else best)
            least = float(costmodel.residual_loss(b, q, p))
            rejection = float(costmodel.rejection_probability(b, q))
            gap = float(costmodel.total_variation(q, p))
        first = np.bincount(tokens[:, 0], weight, 3)
        np.testing.assert_allclose(first, out, atol=1e-12)
        np.testing.assert_allclose(first, law, atol=1e-12)
        np.testing.assert_allclose(weight[num_accepted == 0].sum(), rejection, atol=1e-12)
        np.testing.assert_allclose(loss, lost, atol=1e-12)
        if name.endswith("target"):
            assert lost >= least - 1e-12
        else:
            np.testing.assert_allclose(loss, least, atol=1e-12)
        assert rejection + least >= gap - 1e-12
        if name != "typical_acceptance":
            np.testing.assert_allclose(rejection + least, gap, atol=1e-12)
        checked += 1
    assert checked == 9


def random_law(size):
    weights = st.lists(st.floats(0.0, 1.0), min_size=size, max_size=size).filter(any)
    return weights.map(lambda x: np.float32(np.array(x) / np.sum(x)))


def loss_of(verifier, p, q):
    draft = jaxsd.Draft(jnp.zeros((1,), jnp.int32), jnp.asarray(q)[None])
    verdict = verifier(jax.random.key(0), jnp.stack([p, p]), draft, jnp.float32(0.0))
    return float(verdict.loss)


@settings(max_examples=25)
@given(random_law(4), random_law(4), st.floats(0, 1), st.floats(0, 1))
def test_more_forgiving_loses_more_and_the_optimal_residual_loses_least(p, q, one, other):
    """Random laws, zeros among them; closed forms to 1e-6."""
    low, high = sorted((one, other))
    optimal = [loss_of(lossy.over_acceptance(x), p, q) for x in (low, high)]
    target = loss_of(lossy.over_acceptance(low, residual="target"), p, q)
    gap = 0.5 * np.abs(p - q).sum()
    assert optimal[0] <= optimal[1] <= gap + 1e-6
    assert optimal[0] <= target + 1e-6
    np.testing.assert_allclose(optimal[0], np.minimum(np.maximum(q - p, 0), low).sum(), atol=1e-6)
    front = costmodel.bias_speed_front(q / q.sum(), p / p.sum(), [low])
    np.testing.assert_allclose(optimal[0], front.loss_optimal[0], atol=2e-6)
    np.testing.assert_allclose(target, front.loss_target_resampling[0], atol=2e-6)
    if low > 0:
        lenient = [loss_of(lossy.lenience(x), p, q) for x in (low, high)]
        assert gap + 1e-6 >= lenient[0] >= lenient[1]


def test_the_published_pair_on_the_line():
    """p = (.2, .3, .5), q = (.5, .3, .2): TV .3, of which epsilon 0.1 turns a third into loss."""
    p, q = np.float32([0.2, 0.3, 0.5]), np.float32([0.5, 0.3, 0.2])
    assert loss_of(lossy.over_acceptance(0.1), p, q) == pytest.approx(0.1, abs=1e-6)
    assert loss_of(lossy.over_acceptance(0.0, residual="target"), p, q) == pytest.approx(
        0.15, abs=1e-6
    )
    assert loss_of(lossy.lenience(0.8), p, q) == pytest.approx(0.05, abs=1e-6)
    assert loss_of(lossy.typical_acceptance(0.1, 1.0), p, q) == pytest.approx(0.3, abs=1e-6)
    assert loss_of(lossy.typical_acceptance(0.25, 1.0), p, q) == 0.0
    # exp(-H) = 0.357, which times 0.5 is below 0.2: all are typical.
    assert loss_of(lossy.typical_acceptance(0.9, 0.5), p, q) == pytest.approx(0.3, abs=1e-6)


def test_leniently_no_token_is_emitted_more_than_its_multiple():
    found, _ = enumerated(lossy.lenience(0.5), 1)
    for case, _, tokens, _, _, weight in found:
        first = np.bincount(tokens[:, 0], weight, 3)
        assert (first <= case.target[0] / 0.5 + 1e-6).all()
        assert first[case.target[0] == 0].sum() == 0


def test_typically_the_lossless_chance_for_others_accepts_more_at_the_same_loss():
    options = {"dtype": "float64", "seed": 3}
    strict, _ = enumerated(lossy.typical_acceptance(0.4, 0.9), 1, **options)
    free, _ = enumerated(lossy.typical_acceptance(0.4, 0.9, atypical="lossless"), 1, **options)
    gained = []
    for one, other in zip(strict, free, strict=True):
        np.testing.assert_allclose(one[4].max(), other[4].max(), atol=1e-15)
        accepted = [(found[3] * found[5]).sum() for found in (one, other)]
        gained.append(accepted[1] - accepted[0])
    assert min(gained) >= -1e-12
    assert max(gained) > 0.05


# ---- Whole decoders


MODEL = testing.MarkovModel(vocab_size=3, order=1)
NUM_ROWS, NUM_GREEDY, PROMPT = 20_000, 100, 1
DECODERS = {
    "over_acceptance": (lossy.over_acceptance(0.15), None, (2,)),
    "typical_acceptance": (lossy.typical_acceptance(0.4, 0.9, max_tv=0.6), 0.6, ()),
}


@functools.cache
def toy():
    target, draft = (np.asarray(MODEL.init(jax.random.key(seed))) for seed in (0, 1))
    return {"target": target, "draft": draft}


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum(-1, keepdims=True)


def one_hot(logits):
    return np.eye(logits.shape[-1])[np.argmax(logits, -1)]


def sequences(name, max_tv, laws, ends, num_new_tokens, num_tokens=2):
    """By recursion: the lossy law of a text, its expected sum of losses, and the largest sum."""
    p_of, q_of = laws
    law, expected, largest = {}, 0.0, 0.0

    def place(text, index, spent, mass):
        """The round goes on at its place `index`, after `text`."""
        last = text[-1] if text else PROMPT
        p, q = p_of[last], q_of[last]
        if index == num_tokens:
            for token in range(3):
                end_round((*text, token), spent, mass * p[token])
            return
        b, out, loss = at_a_place(name, p, q)
        if max_tv is not None and spent + loss > max_tv:
            b, out, loss = np.minimum(1, p / q), p, 0.0
        for token in range(3):
            kept = b[token] * q[token]
            place((*text, token), index + 1, spent + loss, mass * kept)
            end_round((*text, token), spent + loss, mass * (out[token] - kept))

    def end_round(text, spent, mass):
        nonlocal expected, largest
        if mass <= 1e-15:
            return
        visible = cut(text, ends, num_new_tokens)
        if len(visible) < len(text) or visible[-1] in ends or len(text) == num_new_tokens:
            law[visible] = law.get(visible, 0.0) + mass
            expected, largest = expected + mass * spent, max(largest, spent)
        else:
            place(text, 0, spent, mass)

    place((), 0, 0.0, 1.0)
    return law, expected, largest


def cut(text, ends, num_new_tokens):
    """Up to its end."""
    for index, token in enumerate(text[:num_new_tokens]):
        if token in ends:
            return text[: index + 1]
    return text[:num_new_tokens]


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_the_lossy_law_and_reports_its_loss(name):
    """20 000 texts of three tokens, greedy rows beside them, ends of sequence in one decoder.

    The law of the texts is that of a recursion over places and rounds (chi-square, false alarm
    3e-7), and the mean loss its expectation (Hoeffding, 3e-7); of the law itself, exactly: it is
    off the target's by at most the expected loss. Then six rounds, one by one: every row's sum is
    recounted from its tokens, to 1e-5, and none is above the limit. Greedy rows lose as counted.
    """
    verifier, max_tv, ends = DECODERS[name]
    params = toy()
    drafter = jaxsd.model_drafter(MODEL, num_tokens=2)
    decoder = jaxsd.speculative(MODEL, drafter, verifier, max_len=40, eos_id=ends or None)
    temperature = np.where(np.arange(NUM_ROWS) < NUM_ROWS - NUM_GREEDY, 1.0, 0.0)
    request = (params, np.full((NUM_ROWS, 1), PROMPT), None, jax.random.key(5))
    options = {"sampling": jaxsd.Sampling(temperature=temperature)}
    out = jax.tree.map(np.asarray, decoder.generate(*request, **options, max_new_tokens=3))
    sampled = slice(NUM_ROWS - NUM_GREEDY)

    probs = {True: (softmax(params["target"]), softmax(params["draft"]))}
    probs[False] = one_hot(params["target"]), one_hot(params["draft"])
    law, expected, largest = sequences(name, max_tv, probs[True], ends, 3)
    exact, _, _ = sequences(name, 0.0, probs[True], ends, 3)
    distance = 0.5 * sum(
        abs(law.get(text, 0) - exact.get(text, 0)) for text in law.keys() | exact.keys()
    )
    assert 0.02 < distance <= expected + 1e-12
    counts = {}
    for row, length in zip(out.tokens[sampled], out.lengths[sampled], strict=True):
        text = tuple(row[1:length].tolist())
        counts[text] = counts.get(text, 0) + 1
    assert testing._compare_counts(name, law, counts, 3e-7).findings == []
    assert testing._compare_counts(name, exact, counts, 3e-7).findings != []
    assert out.stats.loss.dtype == np.float32
    noise = largest * math.sqrt(math.log(2 / 3e-7) / (2 * (NUM_ROWS - NUM_GREEDY)))
    assert abs(out.stats.loss[sampled].mean() - expected) < noise
    assert out.stats.loss[sampled].max() <= largest + 1e-6
    if max_tv is not None:
        assert expected - 1e-12 <= largest <= max_tv

    state = decoder.start(*request, **options, max_new_tokens=36)
    rows = [*range(150), *range(NUM_ROWS - 20, NUM_ROWS)]
    recounted, num_checked = np.zeros(NUM_ROWS), 0
    for _ in range(6):
        before = jax.tree.map(np.array, (state.lengths, state.stats, state.done))
        state = decoder.run(params, state, np.int32(1))
        after = jax.tree.map(np.array, (state.lengths, state.stats, state.done))
        assert (after[1].loss >= before[1].loss).all()
        assert max_tv is None or after[1].loss.max() <= max_tv
        buffer = np.asarray(state.tokens)
        for row in rows:
            if after[2][row]:  # what its end hides cannot be recounted; a done row loses nothing
                assert not before[2][row] or after[1].loss[row] == before[1].loss[row]
                continue
            accepted = after[1].num_accepted[row] - before[1].num_accepted[row]
            for place in range(min(accepted + 1, 2)):
                last = buffer[row, before[0][row] + place - 1]
                p, q = (laws[last] for laws in probs[temperature[row] > 0])
                loss = at_a_place(name, p, q)[2]
                if max_tv is None or recounted[row] + loss <= max_tv:
                    recounted[row] += loss
            np.testing.assert_allclose(after[1].loss[row], recounted[row], atol=1e-5)
            num_checked += 1
    assert num_checked > 200


def test_a_decoder_in_64_bits_keeps_its_sum_in_32(x64):
    """The row's sum has one type in the compiled loop, whatever the models compute in."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), toy())
    drafter = jaxsd.model_drafter(MODEL, num_tokens=2)
    decoder = jaxsd.speculative(MODEL, drafter, lossy.lenience(0.5, max_tv=0.2), max_len=12)
    plain = jaxsd.Sampling(temperature=1.0)
    with jax.numpy_dtype_promotion("standard"):
        out = decoder.generate(params, [[1], [2]], None, jax.random.key(0), sampling=plain)
    assert out.stats.loss.dtype == jnp.float32
    assert (out.stats.loss > 0).all()
    assert (out.stats.loss <= 0.2).all()


def test_greedy_rows_stay_the_targets_where_promised():
    """One-hot laws: lenience and typical acceptance lose nothing, over-acceptance epsilon."""
    p = jnp.eye(4)[jnp.array([1, 2])]
    for q, token in ((jnp.eye(4)[0], 0), (jnp.full((4,), 0.25), 0), (jnp.full((4,), 0.25), 1)):
        draft = jaxsd.Draft(jnp.array([token]), q[None])
        for verifier in (lossy.lenience(0.01), lossy.typical_acceptance(0.3, 0.09)):
            for seed in range(5):
                verdict = verifier(jax.random.key(seed), p, draft, jnp.float32(0.0))
                assert verdict.tokens.tolist() == ([1, 2] if token else [1, 0])
                assert verdict.loss == 0
    wrong = loss_of(lossy.over_acceptance(0.1), p[0], np.eye(4)[0])
    assert wrong == pytest.approx(0.1)


# ---- Edges


def test_nothing_lossy_comes_by_default():
    default = inspect.signature(jaxsd.speculative).parameters["verifier"].default
    marked = [x for x in jaxsd.__all__ if getattr(getattr(jaxsd, x), "is_lossy", None) is True]
    assert marked == []
    assert not getattr(default, "is_lossy", False)
    made = [make() for make, _ in RULES.values()]
    assert [verifier.is_lossy for verifier in made] == [True] * len(made)
    with pytest.raises(AttributeError):
        made[0].max_tv = 0.5


@pytest.mark.parametrize("max_tv", [None, 0.1])
@pytest.mark.parametrize("name", RULES)
def test_shapes_and_types_are_as_promised(name, max_tv):
    """The loss has the type of the row's sum: the decoder's is float32."""
    verifier = RULES[name][0](max_tv=max_tv)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with enable_x64():
        for num_tokens, dtype in itertools.product((0, 3), ("float32", "float64")):
            probs, target = (jnp.zeros((n, 7), dtype) for n in (num_tokens, num_tokens + 1))
            draft = jaxsd.Draft(jnp.zeros((num_tokens,), jnp.int32), probs)
            for spent in (jnp.float32(0), jnp.float64(0)):
                verdict = jax.eval_shape(verifier, key, target, draft, spent)
                tokens, num_accepted, path, loss = verdict
                assert (tokens.shape, tokens.dtype) == ((num_tokens + 1,), jnp.int32)
                assert (num_accepted.shape, num_accepted.dtype) == ((), jnp.int32)
                assert (loss.shape, loss.dtype) == ((), spent.dtype)
                assert path is None


@pytest.mark.parametrize("name", RULES)
def test_where_nothing_is_proposed_nothing_is_accepted_or_lost(name):
    """All-zero draft rows, even with a filler token that the target is certain of."""
    target = jnp.eye(4)[jnp.array([0, 1])]
    draft = jaxsd.Draft(jnp.zeros((1,), jnp.int32), jnp.zeros((1, 4)))
    verdict = RULES[name][0]()(jax.random.key(0), target, draft, jnp.float32(0.0))
    assert verdict.tokens.tolist() == [0, 0]
    assert (verdict.num_accepted, verdict.loss) == (0, 0)


def test_a_tree_is_refused_when_traced():
    draft = jaxsd.Draft(jnp.zeros((2,), jnp.int32), jnp.zeros((2, 3)), jnp.array([-1, -1]))
    with pytest.raises(ValueError, match=r"draft.parents of shape \(2,\) must be None"):
        jax.eval_shape(
            lossy.lenience(0.5), jax.random.key(0), jnp.zeros((3, 3)), draft, jnp.float32(0.0)
        )
    drafter = jaxsd.tree_drafter(MODEL, (-1, -1))
    decoder = jaxsd.speculative(MODEL, drafter, lossy.lenience(0.5), max_len=8)
    with pytest.raises(ValueError, match="for trees take a lossless one"):
        decoder.generate(toy(), [[1]], None, jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lossy.over_acceptance(-0.1), "epsilon=-0.1 must be a number at least 0 and at"),
        (lambda: lossy.over_acceptance(1.5), "epsilon=1.5 must be a number at least 0 and at most"),
        (lambda: lossy.over_acceptance(math.nan), "epsilon=nan must be"),
        (lambda: lossy.over_acceptance("0.1"), "epsilon='0.1' must be a number"),
        (lambda: lossy.over_acceptance(True), "epsilon=True must be a number"),
        (lambda: lossy.over_acceptance(0.1, max_tv=-1), "max_tv=-1 must be"),
        (lambda: lossy.over_acceptance(0.1, max_tv=5), "max_tv=5 must be a number at least 0 and"),
        (lambda: lossy.over_acceptance(0.1, residual="best"), "residual='best' must be one of"),
        (lambda: lossy.lenience(0.0), "factor=0.0 must be a number above 0 and at most 1"),
        (lambda: lossy.lenience(2), "factor=2 must be a number above 0"),
        (lambda: lossy.typical_acceptance(-1, 1), "threshold=-1 must be"),
        (lambda: lossy.typical_acceptance(0.1, -1), "delta=-1 must be a number at least 0 and fin"),
        (lambda: lossy.typical_acceptance(0.1, math.inf), "delta=inf must be"),
        (lambda: lossy.typical_acceptance(0.1, 1, atypical="keep"), "atypical='keep' must be one"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_limit_is_not_rounded_up():
    """0.1 in float32 is above 0.1, so a place that costs this much is too dear."""
    tenth = np.float32(0.1)
    assert float(tenth) > 0.1
    p, q = np.float32([0, 1]), np.float32([tenth, 1 - tenth])
    assert loss_of(lossy.over_acceptance(1.0), p, q) == float(tenth)
    assert loss_of(lossy.over_acceptance(1.0, max_tv=0.1), p, q) == 0.0
    assert loss_of(lossy.over_acceptance(1.0, max_tv=float(tenth)), p, q) == float(tenth)


def test_extreme_settings_stay_finite():
    """Laws with zeros, tiny and huge settings: losses are numbers in [0, 1]."""
    p, q = np.float32([0.0, 0.3, 0.7, 0.0]), np.float32([0.5, 0.0, 0.5, 0.0])
    for verifier in (
        lossy.lenience(1e-40),
        lossy.lenience(5e-324),
        lossy.over_acceptance(1.0),
        lossy.over_acceptance(1e-40),
        lossy.typical_acceptance(0.0, 0.0),
        lossy.typical_acceptance(1.0, 1e300),
        lossy.over_acceptance(np.float32(0.3), max_tv=np.float32(0.5)),
    ):
        assert 0 <= loss_of(verifier, p, q) <= 0.5 + 1e-6
    assert loss_of(lossy.lenience(5e-324), p, q) == 0.0
