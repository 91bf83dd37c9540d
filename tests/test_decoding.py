"""The loop: the text of every row, its counts, its limits, and what the compiler makes of it."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jaxsd
from jaxsd import drafters, models, testing

VOCAB, ORDER, EOS, MAX_LEN = 12, 2, 11, 24
MODEL = testing.MarkovModel(VOCAB, ORDER)


@functools.cache
def decoder(name, max_len=MAX_LEN, eos_id=EOS):
    drafters = {
        "none": jaxsd.no_drafter,
        "model-1": lambda: jaxsd.model_drafter(MODEL, 1),
        "model-5": lambda: jaxsd.model_drafter(MODEL, 5),
        "lookup-4": lambda: jaxsd.prompt_lookup(4),
    }
    return jaxsd.speculative(MODEL, drafters[name](), max_len=max_len, eos_id=eos_id)


def table(seed):
    return np.asarray(MODEL.init(jax.random.key(seed)))


def counting(step=1):
    """Weights of a model that counts: every token is the last one plus `step`, round and round."""
    weights = np.zeros((VOCAB,) * (ORDER + 1), np.float32)
    for last in range(VOCAB):
        weights[:, last, (last + step) % VOCAB] = 5.0
    return weights


TARGET = table(0)
WEIGHTS = {
    "itself": TARGET,
    "another": table(1),
    "nearly the same": TARGET + 0.7 * table(2),
    "always wrong": -TARGET,
}
PROMPTS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 0, 0, 0, 0], [8, 9, 8, 9, 0]], np.int32)
LENGTHS = np.array([5, 3, 1, 4], np.int32)
KEY = jax.random.key(42)


def generate(name, params, prompts=PROMPTS, lengths=LENGTHS, key=KEY, **options):
    """The result as numpy, one fixed batch shape per decoder so that it compiles once."""
    out = decoder(name).generate(params, prompts, lengths, key, **options)
    return jax.tree.map(np.asarray, out)


def text(out, row):
    return out.tokens[row, : out.lengths[row]].tolist()


def proposer(name, weights):
    """What a drafter proposes for a greedy row, slowly."""
    if name == "none":
        return lambda history: []
    if name == "lookup-4":
        return lambda history: reference.prompt_lookup(history, 4, 3, 1)
    num_tokens = int(name[-1])

    def propose(history):
        drafted = []
        for _ in range(num_tokens):
            logits = reference.markov_logits(weights, [*history, *drafted], ORDER)
            drafted.append(int(np.argmax(logits)))
        return drafted

    return propose


CASES = [("none", "itself"), ("lookup-4", "itself")]
CASES += [(name, draft) for name in ("model-1", "model-5") for draft in WEIGHTS]


@pytest.mark.parametrize(("name", "draft"), CASES)
@pytest.mark.parametrize("seed", [0, 7])
def test_greedy_text_and_counts_equal_a_slow_recount(name, draft, seed):
    """A ragged batch with a limit per row; text, rounds, drafted, accepted, by position."""
    target = table(seed)
    weights = target if draft == "itself" else WEIGHTS[draft]
    limits = np.array([19, 7, 100, 0], np.int32)
    out = generate(name, {"target": target, "draft": weights}, max_new_tokens=limits)
    for row, limit in enumerate(limits):
        prompt = PROMPTS[row, : LENGTHS[row]].tolist()
        want, counts = reference.greedy_rounds(
            lambda history: reference.markov_logits(target, history, ORDER),
            proposer(name, weights),
            prompt,
            num_tokens=decoder(name).num_tokens,
            max_new_tokens=int(limit),
            max_len=MAX_LEN,
            eos_ids=(EOS,),
        )
        plain = reference.greedy(
            lambda history: reference.markov_logits(target, history, ORDER),
            prompt,
            max_new_tokens=int(limit),
            max_len=MAX_LEN,
            eos_ids=(EOS,),
        )
        assert want == plain
        assert text(out, row) == want
        got = {field: getattr(out.stats, field)[row].tolist() for field in counts}
        assert got == counts
        assert np.all(out.tokens[row, len(want) :] == 0)


@pytest.mark.parametrize("name", ["none", "model-1", "model-5", "lookup-4"])
@pytest.mark.parametrize("draft_step", [1, 2])
def test_ends_and_limits_cut_exactly_wherever_they_fall_in_a_block(name, draft_step):
    """A counting target meets the end id after 1..11 tokens, under limits of 0..13 tokens: every
    place of every block; with a draft that is always right, and one that is always wrong."""
    starts, limits = np.meshgrid(np.arange(EOS), np.arange(14), indexing="ij")
    starts, limits = starts.reshape(-1), limits.reshape(-1)
    params = {"target": counting(), "draft": counting(draft_step)}
    prompts = starts[:, None].astype(np.int32)
    out = generate(name, params, prompts, None, max_new_tokens=limits)
    for row, (start, limit) in enumerate(zip(starts, limits, strict=True)):
        want = list(range(start, min(start + limit, EOS) + 1))
        assert text(out, row) == want
        assert np.all(out.tokens[row, len(want) :] == 0)


def test_several_end_ids_and_a_pad_id_that_is_also_a_token():
    ends = jaxsd.speculative(
        MODEL, jaxsd.model_drafter(MODEL, 3), max_len=16, eos_id=[7, 4], pad_id=9
    )
    params = {"target": counting(), "draft": counting()}
    out = ends.generate(params, [[1, 9], [9, 5], [8, 9]], [1, 2, 2], KEY)
    assert out.tokens.tolist() == [
        [1, 2, 3, 4, *[9] * 12],
        [9, 5, 6, 7, *[9] * 12],
        [8, 9, 10, 11, 0, 1, 2, 3, 4, *[9] * 7],
    ]
    assert out.lengths.tolist() == [4, 4, 9]


def test_an_end_id_in_the_prompt_ends_nothing():
    prompts = PROMPTS.copy()
    prompts[:, 0] = EOS
    params = {"target": counting(), "draft": counting()}
    out = generate("model-5", params, prompts, max_new_tokens=2)
    assert (out.lengths - LENGTHS).tolist() == [2, 2, 2, 2]
    assert text(out, 2) == [EOS, 0, 1]


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16])
def test_any_draft_length_fills_a_small_buffer_exactly(num_tokens):
    """Blocks longer than the buffer; prompts of one token and prompts that fill it."""
    small = jaxsd.speculative(MODEL, jaxsd.model_drafter(MODEL, num_tokens), max_len=4)
    params = {"target": counting(), "draft": counting()}
    out = small.generate(params, [[1, 0, 0, 0], [5, 6, 7, 8]], [1, 4], KEY)
    assert out.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert out.stats.num_rounds.tolist()[1] == 0


def test_a_buffer_of_one_token_holds_the_prompt_and_nothing_else():
    one = jaxsd.speculative(MODEL, jaxsd.model_drafter(MODEL, 2), max_len=1)
    out = one.generate({"target": TARGET, "draft": TARGET}, [[3]], None, KEY)
    assert (out.tokens.tolist(), out.lengths.tolist()) == ([[3]], [1])


@pytest.mark.parametrize("limit", [2**31 - 1, 2**40, np.int64(2**62), None])
def test_huge_limits_mean_as_much_as_fits(limit):
    params = {"target": counting(2), "draft": counting(2)}  # even numbers: the end id never comes
    prompts = np.zeros((4, 5), np.int32)
    out = generate("model-5", params, prompts, max_new_tokens=limit)
    assert out.lengths.tolist() == [MAX_LEN] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_target_as_its_own_draft_accepts_everything(temperature):
    out = generate(
        "model-5",
        {"target": TARGET, "draft": TARGET},
        sampling=jaxsd.Sampling(temperature, 5, 0.9),
    )
    np.testing.assert_array_equal(out.stats.num_accepted, out.stats.num_drafted)
    np.testing.assert_array_equal(out.stats.num_drafted, 5 * out.stats.num_rounds)
    assert int(out.stats.num_rounds.sum()) > 0


def test_acceptance_falls_with_position_and_sums_to_the_accepted():
    out = generate(
        "model-5",
        {"target": TARGET, "draft": WEIGHTS["nearly the same"]},
        sampling=jaxsd.Sampling(1.0),
    )
    by_position = out.stats.accepted_by_position
    assert np.all(np.diff(by_position, axis=1) <= 0)
    np.testing.assert_array_equal(by_position.sum(axis=1), out.stats.num_accepted)
    assert np.all(out.stats.num_accepted <= out.stats.num_drafted)


def test_prompt_lookup_counts_as_drafted_only_what_it_proposed():
    """A counting text never repeats within twelve tokens: nothing is proposed, nothing counts."""
    params = {"target": counting()}
    out = generate(
        "lookup-4",
        params,
        max_new_tokens=4,
        prompts=np.array([[1, 0, 0, 0, 0]] * 4),
        lengths=np.ones(4, np.int32),
    )
    assert out.stats.num_drafted.tolist() == [0] * 4
    assert out.stats.num_rounds.tolist() == [4] * 4


# ---- Rows apart from each other

SETTINGS = jaxsd.Sampling(
    np.array([0.0, 1.0, 0.8, 1.5], np.float32), np.array([0, 0, 3, 0]), np.array([1, 1, 1, 0.7])
)
PARAMS = {"target": TARGET, "draft": WEIGHTS["nearly the same"]}


def assert_rows_equal(out, rows, other, other_rows):
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[rows], np.asarray(b)[other_rows])


@pytest.mark.parametrize("name", ["model-5", "lookup-4"])
def test_permuting_rows_permutes_results(name):
    keys = jax.random.split(KEY, 4)
    order = np.array([2, 0, 3, 1])
    out = generate(name, PARAMS, key=keys, sampling=SETTINGS)
    shuffled = generate(
        name,
        PARAMS,
        PROMPTS[order],
        LENGTHS[order],
        keys[order],
        sampling=jaxsd.Sampling(*(np.asarray(field)[order] for field in SETTINGS)),
    )
    assert_rows_equal(out, order, shuffled, np.arange(4))


@pytest.mark.parametrize("name", ["model-5", "lookup-4"])
def test_a_row_depends_neither_on_neighbours_nor_on_padding(name):
    """Row 2 stays; all others change in prompt, length, limit and setting; padding is garbage."""
    out = generate(name, PARAMS, sampling=SETTINGS)
    prompts = (PROMPTS + 5) % VOCAB
    prompts[2] = [5, 5, 5, 5, 5]
    lengths = np.array([1, 5, 1, 2], np.int32)
    loud = jaxsd.Sampling(
        np.float32([1.3, 0.0, 0.8, 0.2]), np.array([1, 0, 3, 2]), [0.5, 1, 1, 0.9]
    )
    loud = jaxsd.Sampling(*(np.asarray(field) for field in loud))
    limits = np.array([1, 0, 100, 9])
    other = generate(name, PARAMS, prompts, lengths, sampling=loud, max_new_tokens=limits)
    assert_rows_equal(out, 2, other, 2)


def test_one_key_gives_row_i_the_same_text_in_any_batch():
    out = generate("model-5", PARAMS, sampling=jaxsd.Sampling(1.0))
    two = generate("model-5", PARAMS, PROMPTS[:2], LENGTHS[:2], sampling=jaxsd.Sampling(1.0))
    assert_rows_equal(out, np.arange(2), two, np.arange(2))


def test_rows_with_one_prompt_and_one_key_differ():
    prompts = np.tile(PROMPTS[:1], (4, 1))
    endless = np.where(np.arange(VOCAB) == EOS, -30, 0).astype(np.float32) + TARGET
    params = {"target": endless, "draft": endless}
    out = generate("model-5", params, prompts, None, sampling=jaxsd.Sampling(1.5))
    assert out.lengths.tolist() == [MAX_LEN] * 4
    assert len({tuple(row) for row in out.tokens.tolist()}) == 4


# ---- A transformer

TINY = models.CONFIGS["tiny"]


def test_a_transformer_decodes_greedily_as_without_a_cache():
    """float32: the cached block pass and the whole pass round differently, by less than 1e-4 in a
    logit; so the texts must agree as long as the two largest logits are further apart than that."""
    model, params = models.language_model(TINY), models.init_params(TINY, jax.random.key(0))
    draft = models.init_params(TINY, jax.random.key(1))
    forward = jax.jit(functools.partial(models.forward, TINY, params))

    def next_logits(history):
        padded = np.zeros((1, 20), np.int32)
        padded[0, : len(history)] = history
        return np.asarray(forward(padded))[0, len(history) - 1]

    fast = jaxsd.speculative(model, jaxsd.model_drafter(model, 3), max_len=20)
    prompts, lengths = np.array([[7, 8, 9, 10], [100, 5, 0, 0]]), np.array([4, 2])
    for weights in (params, draft):
        out = fast.generate({"target": params, "draft": weights}, prompts, lengths, KEY)
        for row in range(2):
            prompt = prompts[row, : lengths[row]].tolist()
            want = reference.greedy(next_logits, prompt, max_new_tokens=99, max_len=20)
            margin = reference.smallest_margin(next_logits, want, len(prompt))
            assert margin > 1e-4, "the weights were chosen so that no place is a near-tie"
            assert np.asarray(out.tokens)[row].tolist() == want


@pytest.mark.parametrize("width", [6, 11, 12])
def test_prompts_read_in_pieces_leave_the_caches_that_one_reading_leaves(width, monkeypatch):
    """Pieces of 5: the last one begins again among tokens that were read before, or does not."""
    model, params = models.language_model(TINY), models.init_params(TINY, jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(2), (2, width), 0, TINY.vocab_size)
    lengths, caches = jnp.array([width, 3]), []
    for piece in (512, 5):
        monkeypatch.setattr(drafters, "_PROMPT_PIECE", piece)
        read = jax.jit(functools.partial(drafters.read_prompts, model, params))
        caches.append(read(model.init_cache(2, 16), prompts=prompts, lengths=lengths))
    for whole, pieces in zip(*map(jax.tree.leaves, caches), strict=True):
        assert np.any(whole[:, :, width - 1])
        assert not np.any(pieces[:, :, width:])
        np.testing.assert_allclose(pieces, whole, rtol=2e-5, atol=2e-5)


# ---- One program, whatever is asked of it


class Counted:
    """A model that counts how often it is traced, by block length."""

    def __init__(self):
        self.traces = collections.Counter()

    def init_cache(self, batch_size, max_len):
        return MODEL.init_cache(batch_size, max_len)

    def apply(self, params, tokens, positions, cache):
        self.traces[tokens.shape[1]] += 1
        return MODEL.apply(params, tokens, positions, cache)


def test_no_second_call_traces_anything_again():
    model = Counted()
    once = jaxsd.speculative(model, jaxsd.model_drafter(model, 3), max_len=16, eos_id=EOS)
    call = functools.partial(once.generate, PARAMS)
    call(PROMPTS, LENGTHS, KEY)
    first = dict(model.traces)
    settings = jaxsd.Sampling(np.float32([0, 1, 2, 0]), [1, 0, 3, 4], jnp.array([1, 0.5, 0.9, 1.0]))
    call(PROMPTS + 1, LENGTHS - np.array([1, 0, 0, 2]), jax.random.key(9))
    call(PROMPTS.tolist(), None, KEY, max_new_tokens=3)
    call(jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), KEY, max_new_tokens=[1, 2, 3, 0])
    call(PROMPTS, LENGTHS.astype(np.int64), KEY, sampling=jaxsd.Sampling(0.7, 5, 0.9))
    call(PROMPTS, LENGTHS, KEY, sampling=settings._replace(top_k=np.array(settings.top_k)))
    call(PROMPTS, LENGTHS, KEY, sampling=jaxsd.Sampling(jnp.float32(0.7), jnp.int32(5), 1))
    assert dict(model.traces) == first


def test_keys_per_row_trace_only_the_prefill_again():
    model = Counted()
    once = jaxsd.speculative(model, jaxsd.no_drafter(), max_len=16)
    once.generate(PARAMS, PROMPTS, LENGTHS, KEY)
    before = model.traces[1]
    once.generate(PARAMS, PROMPTS, LENGTHS, jax.random.split(KEY, 4))
    assert model.traces[1] == before


def primitives(jaxpr):
    """Names of all primitives, loops and branches entered."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


@pytest.mark.parametrize("name", ["none", "model-5", "lookup-4"])
def test_the_loop_never_leaves_the_device(name):
    state = decoder(name).init(PARAMS, PROMPTS, LENGTHS, KEY)
    found = set(
        primitives(jax.make_jaxpr(decoder(name).run)(PARAMS, state, jaxsd.UNTIL_DONE).jaxpr)
    )
    assert "while" in found
    assert "scatter" in found  # the walk reaches the body's one writer of tokens
    wrong = {
        one for one in found if "callback" in one or one in {"infeed", "outfeed", "device_put"}
    }
    assert not wrong


@pytest.mark.parametrize("name", ["model-5", "lookup-4"])
def test_the_loop_reuses_every_buffer_it_is_given(name):
    """Donation: every cache leaf of the state is an output in the same memory."""
    state = decoder(name).init(PARAMS, PROMPTS, LENGTHS, KEY)
    compiled = decoder(name).run.lower(PARAMS, state, jaxsd.UNTIL_DONE).compile()
    header = compiled.as_text().splitlines()[0]
    assert "input_output_alias" in header
    aliased = header.split("input_output_alias={")[1].split(" }")[0].count("may-alias")
    aliased += header.split("input_output_alias={")[1].split(" }")[0].count("must-alias")
    # Settings and keys, which no round changes, need not be outputs of their own.
    caches = jax.tree.leaves((state.target_cache, state.drafter_state, state.tokens))
    assert aliased >= len(caches)
    sizes = compiled.memory_analysis()
    if sizes is not None:
        assert sizes.alias_size_in_bytes >= sum(leaf.nbytes for leaf in caches)


def test_a_loop_by_hand_equals_generate():
    by_hand = decoder("model-5")
    out = generate("model-5", PARAMS, sampling=SETTINGS)
    state = by_hand.init(PARAMS, PROMPTS, LENGTHS, KEY, sampling=SETTINGS)
    step = jax.jit(by_hand.step)
    committed = np.zeros(4, np.int64)
    while not np.all(state.done):
        before = state.done
        state, info = step(PARAMS, state)
        committed += np.asarray(info.num_tokens)
        assert not np.any(np.asarray(info.num_tokens)[before])
    got = jaxsd.Generation(state.tokens, state.lengths, state.stats)
    assert_rows_equal(out, np.arange(4), got, np.arange(4))
    np.testing.assert_array_equal(committed, out.lengths - LENGTHS)


@pytest.mark.parametrize("name", ["none", "model-5", "lookup-4"])
def test_a_state_made_op_by_op_is_run_and_takes_nothing_of_the_callers(name):
    params = {"target": TARGET, "draft": WEIGHTS["another"]}
    given = jax.tree.map(jnp.asarray, (params, PROMPTS, LENGTHS, jax.random.split(KEY, 4)))
    settings = jaxsd.Sampling(jnp.full((4,), 0.5), jnp.zeros((4,), jnp.int32), jnp.ones((4,)))
    expected = decoder(name).generate(*given, sampling=settings)
    for _ in range(2):  # a buffer that the first run had consumed would fail in the second
        state = decoder(name).init(*given, sampling=settings)
        state = decoder(name).run(given[0], state, jaxsd.UNTIL_DONE)
        np.testing.assert_array_equal(state.tokens, expected.tokens)


def test_stream_hands_out_exactly_what_generate_returns():
    out = generate("model-5", PARAMS, sampling=SETTINGS)
    texts = [PROMPTS[row, : LENGTHS[row]].tolist() for row in range(4)]
    infos = list(decoder("model-5").stream(PARAMS, PROMPTS, LENGTHS, KEY, sampling=SETTINGS))
    for info in infos:
        for row, count in enumerate(info.num_tokens):
            texts[row] += info.tokens[row, :count].tolist()
            assert np.all(info.tokens[row, count:] == 0)
    assert texts == [text(out, row) for row in range(4)]
    assert np.all(infos[-1].done)
    assert sum(info.num_accepted for info in infos).tolist() == out.stats.num_accepted.tolist()


def test_stream_of_rows_that_are_done_is_empty():
    assert not list(decoder("model-5").stream(PARAMS, PROMPTS, LENGTHS, KEY, max_new_tokens=0))


# ---- Wrong input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {"target": TARGET}}, r"params lacks \['draft'\]"),
        ({"params": TARGET}, "params lacks"),
        ({"prompts": [1, 2]}, r"prompts has shape \(2,\)"),
        ({"prompts": np.zeros((4, 0), np.int32)}, r"prompts has shape \(4, 0\)"),
        ({"prompts": [[1, 2], [3]]}, "prompts must be a rectangular array"),
        ({"prompts": np.zeros((4, 5))}, "prompts has dtype float64"),
        ({"prompts": np.zeros((4, 99), np.int32)}, "max_len=24 must hold the prompts"),
        ({"prompts": PROMPTS - 1}, "prompts has token id -1"),
        ({"lengths": [0, 1, 1, 1]}, r"prompt_lengths=0 \(row 0\) must be in 1..5"),
        ({"lengths": [1, 1, 6, 1]}, r"prompt_lengths=6 \(row 2\) must be"),
        ({"lengths": [1, 1]}, r"prompt_lengths has shape \(2,\)"),
        ({"lengths": [1.0] * 4}, "prompt_lengths has dtype"),
        ({"key": 0}, "key=0 must be"),
        ({"key": np.zeros(2, np.uint32)}, "key=.* must be"),
        ({"key": jax.random.split(KEY, 3)}, r"key has shape \(3,\)"),
        ({"max_new_tokens": -1}, r"max_new_tokens=-1 \(row 0\) must be"),
        ({"max_new_tokens": [1, 2]}, r"max_new_tokens has shape \(2,\)"),
        ({"max_new_tokens": 1.5}, "max_new_tokens has dtype"),
        ({"sampling": jaxsd.Sampling(-1.0)}, "sampling.temperature=-1.0 must be"),
        ({"sampling": jaxsd.Sampling(top_p=[0.5, 1, 0, 1])}, "sampling.top_p=0.0 must be"),
        ({"sampling": jaxsd.Sampling(top_k=[1, 2])}, r"sampling.top_k has shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("function", ["generate", "stream", "init"])
def test_wrong_requests_are_named_at_the_call(function, change, message):
    """Also by `stream`, whose caller may never reach the first `next`."""
    request = {"params": PARAMS, "prompts": PROMPTS, "lengths": LENGTHS, "key": KEY} | change
    positional = [request.pop(name) for name in ("params", "prompts", "lengths", "key")]
    with pytest.raises(ValueError, match=message):
        getattr(decoder("model-5"), function)(*positional, **request)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 0}, "max_len=0 must be"),
        ({"max_len": 1.5}, "max_len=1.5 must be"),
        ({"max_len": True}, "max_len=True must be"),
        ({"max_len": 8, "pad_id": -1}, "pad_id=-1 must be"),
        ({"max_len": 8, "eos_id": -2}, "eos_id=-2 must be"),
        ({"max_len": 8, "eos_id": [1, 2.0]}, "eos_id=2.0 must be"),
    ],
)
def test_wrong_decoders_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        jaxsd.speculative(MODEL, jaxsd.no_drafter(), **options)


def test_models_of_two_vocabularies_are_refused():
    other = testing.MarkovModel(VOCAB + 1, ORDER)
    mixed = jaxsd.speculative(MODEL, jaxsd.model_drafter(other, 2), max_len=8)
    params = {"target": TARGET, "draft": other.init(KEY)}
    with pytest.raises(ValueError, match="draft's vocabulary has 13 tokens, the target's 12"):
        mixed.generate(params, [[1]], None, KEY)


def test_a_model_that_returns_logits_of_another_shape_is_refused():
    class Flat:
        init_cache = MODEL.init_cache

        def apply(self, params, tokens, positions, cache):
            logits, cache = MODEL.apply(params, tokens, positions, cache)
            return logits[:, 0], cache

    flat = jaxsd.speculative(Flat(), jaxsd.no_drafter(), max_len=8)
    with pytest.raises(ValueError, match=r"target.apply returned logits of shape"):
        flat.generate(PARAMS, [[1]], None, KEY)
