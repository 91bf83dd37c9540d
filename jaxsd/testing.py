"""Is it lossless? Toy models whose laws are known, and a checker for verifiers and whole decoders.

`check_verifier` and `check_function` judge the rule that accepts or replaces draft tokens; where
they can they replace every random draw by all of its outcomes, so that the law is exact and a bug
of any size shows. `check_decoder` judges a whole decoder by a chi-square test of its text. None of
them uses `jaxsd.probabilities` or a cache: what they compare with is computed in numpy, from
scratch.
"""

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import sampling as sampling_lib
from . import trees as tree_lib
from .types import Decoder, Draft, LanguageModel, Params, Sampling, Verifier

_PLAIN = Sampling(temperature=1.0)

SIBLINGS = ("independent", "distinct", "chosen", "mixed")
"""How the children of one node of a draft tree are drawn; see `check_verifier`."""


class MarkovModel(NamedTuple):
    """A language model whose next token depends on the last `order` tokens, read from its cache.

    Small enough that every continuation can be enumerated, and honest about caches: it remembers
    the tokens it was fed by position, so a stale, missing or misplaced entry changes its output.
    Places before the first token count as token 0.

    vocab_size: V.
    order: how many tokens back the law reaches.
    """

    vocab_size: int
    order: int = 2

    def init(self, key: Array, scale: float = 1.0, dtype: object = jnp.float32) -> Array:
        """Random logits `[V, ..., V, V]`, by the `order` last tokens, oldest first."""
        shape = (self.vocab_size,) * (self.order + 1)
        return scale * jax.random.normal(key, shape, dtype)  # pyright: ignore[reportArgumentType]

    def init_cache(self, batch_size: int, max_len: int) -> Array:
        """Tokens by position, `[B, L]`."""
        return jnp.zeros((batch_size, max_len), jnp.int32)

    def apply(
        self, params: Array, tokens: Array, positions: Array, cache: Array
    ) -> tuple[Array, Array]:
        """Logits `[B, T, V]` and the cache with `tokens` in it."""
        rows = jnp.arange(tokens.shape[0])[:, None]
        cache = cache.at[rows, positions].set(tokens, mode="drop")
        history = []
        for back in reversed(range(self.order)):
            place = positions - back
            seen = jnp.take_along_axis(cache, jnp.maximum(place, 0), axis=1)
            history.append(jnp.where(place >= 0, seen, 0))
        return params[tuple(history)], cache

    def apply_tree(
        self,
        params: Array,
        tokens: Array,
        positions: Array,
        cache: Array,
        starts: Array,
        seen: Array,
    ) -> tuple[Array, Array]:
        """Logits `[B, T, V]` of nodes of a tree, each after its own path."""
        rows = jnp.arange(tokens.shape[0])[:, None]
        width, length = seen.shape[2], tokens.shape[1]
        slots = starts[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
        cache = cache.at[rows, slots[:, width - length :]].set(tokens, mode="drop")
        block = jnp.take_along_axis(cache, slots, axis=1, mode="clip")
        depth = jnp.cumsum(seen, axis=2, dtype=jnp.int32) - 1  # of what a node sees
        history = []
        for back in reversed(range(self.order)):
            place = positions - back
            in_text = jnp.take_along_axis(cache, jnp.maximum(place, 0), axis=1)
            is_it = seen & (depth == (place - starts[:, None])[:, :, None])
            in_tree = jnp.sum(jnp.where(is_it, block[:, None, :], 0), axis=2, dtype=jnp.int32)
            token = jnp.where(place >= starts[:, None], in_tree, in_text)
            history.append(jnp.where(place >= 0, token, 0))
        return params[tuple(history)], cache

    def keep(self, cache: Array, starts: Array, sources: Array) -> Array:
        """Moves the tokens of the accepted path to the front."""
        rows = jnp.arange(cache.shape[0])[:, None]
        slots = starts[:, None] + jnp.arange(sources.shape[1], dtype=jnp.int32)[None, :]
        return cache.at[rows, slots].set(cache[rows, sources], mode="drop")


class Report(NamedTuple):
    """What a check found; true in a condition if nothing.

    lossless: the verdict.
    method: "exact", every outcome enumerated, or "chi-square", from samples.
    difference: largest |emitted - wanted| probability of a text, over all cases; of the cell
      frequencies if sampled, where it is not zero for a lossless sampler either.
    p_value: smallest over the cases, None if exact.
    threshold: what `difference` (exact) or `p_value` (chi-square) was held against.
    false_alarm: chance that a lossless sampler fails this check; 0 if exact.
    num_cases: laws compared.
    findings: what is wrong, worst first; empty if lossless.
    note: why the check is not exact, if it is not.
    """

    lossless: bool
    method: str
    difference: float
    p_value: float | None
    threshold: float
    false_alarm: float
    num_cases: int
    findings: tuple[str, ...]
    note: str = ""

    def __bool__(self) -> bool:
        return self.lossless

    def __str__(self) -> str:
        measure = f"largest difference {self.difference:.2g}"
        if self.p_value is not None:
            measure = f"smallest p-value {self.p_value:.2g}, {measure}"
        verdict = "lossless" if self.lossless else "NOT lossless"
        lines = [f"{verdict} ({self.method}, {self.num_cases} cases, {measure})"]
        lines += [f"not exact: {self.note}"] if self.note else []
        return "\n".join(lines + [f"- {finding}" for finding in self.findings])

    def raise_if_failed(self) -> "Report":
        """The report itself if lossless, else AssertionError with the findings as its message."""
        if not self.lossless:
            raise AssertionError(str(self))
        return self


def check_verifier(
    verifier: Verifier,
    *,
    vocab_size: int = 3,
    num_tokens: Sequence[int] = (0, 1, 2, 3),
    trees: Sequence[Sequence[int]] = (),
    siblings: Sequence[str] = SIBLINGS,
    dtype: str = "float32",
    seed: int = 0,
    num_repeats: int = 2,
    false_alarm: float = 1e-6,
) -> Report:
    """Whether a verifier emits exactly the target's law, whatever the draft.

    For every draft length K and many pairs of history-dependent kernels (random, with zeros, equal,
    with disjoint supports, nearly deterministic, chosen drafts, nothing proposed), it enumerates
    all V^K drafts x ~ q and, by `exact_law`'s replay, all outcomes of the verifier's draws. The law
    of the first K + 1 tokens, outputs that are shorter continued by the target, must be

        P(x_1 .. x_{K+1}) = prod_i p_i(x_i | x_1 .. x_{i-1})

    within 1e-6 (float32 kernels) or 1e-12 (float64). The layout that `Verdict` promises is checked
    too, and that no key is used twice. A verifier whose draws cannot be replayed (see `exact_law`)
    is tested by chi-square on samples instead; the report says which.

    A verifier of trees is checked on the `trees` given as well, with siblings drawn in every way of
    `siblings`: "independent", from one distribution; "distinct", without replacement, nothing
    proposed once it is exhausted; "chosen", the most probable ones, one-hot; "mixed", the first
    drawn from what the others, chosen, leave.

    Args:
      verifier: `(key, target_probs [K + 1, V], Draft) -> Verdict`.
      vocab_size: V, at least 2.
      num_tokens: the draft lengths K of chains to try; may be empty if there are trees.
      trees: parents of the draft trees to try; empty for a verifier of chains.
      siblings: how the children of one node were drawn.
      dtype: of the kernels, "float32" or "float64".
      seed: of the kernels.
      num_repeats: kernels of each kind.
      false_alarm: chance that chi-square condemns a lossless verifier, over all its cases together.

    Returns:
      A `Report`.

    Raises:
      ValueError: if an argument is out of range.

    References:
      Leviathan et al., 2022, https://arxiv.org/abs/2211.17192, appendix A.1, for what is claimed.

    >>> import jaxsd
    >>> report = check_verifier(jaxsd.rejection_sampling, num_tokens=[1])
    >>> report.lossless, report.method
    (True, 'exact')
    >>> def gullible(key, target_probs, draft):  # accepts everything
    ...     bonus = jaxsd.categorical(key, target_probs[-1])
    ...     return jaxsd.Verdict(jnp.append(draft.tokens, bonus), jnp.int32(draft.tokens.size))
    >>> bool(check_verifier(gullible, num_tokens=[1]))
    False
    """
    topologies = [tree_lib.check(parents) for parents in trees]
    lengths = (*num_tokens, *map(len, topologies))
    _check_arguments(vocab_size, lengths, dtype, num_repeats, false_alarm)

    unknown = [kind for kind in siblings if kind not in SIBLINGS]
    if unknown:
        raise ValueError(f"siblings={tuple(siblings)!r} must be out of {SIBLINGS}")
    is_keyed_by_place = getattr(verifier, "shares_noise", False)

    def emit(
        key: Array, tokens: Array, probs: Array, target: Array, parents: Array
    ) -> tuple[Any, Any, Any]:
        if is_keyed_by_place:
            key = jax.random.split(key, tokens.shape[0] + 1)
        draft = Draft(tokens, probs, parents if topologies else None)
        verdict = verifier(key, target, draft)
        path = jnp.arange(tokens.shape[0]) if verdict.path is None else verdict.path
        return verdict.tokens, verdict.num_accepted, path

    rng = np.random.default_rng(seed)
    cases = []
    for _ in range(num_repeats):
        for length in num_tokens:
            cases += _verifier_cases(rng, vocab_size, _chain(length), "independent", dtype)
        for parents in topologies:
            has_siblings = len(set(parents)) < len(parents)
            for kind in siblings if has_siblings else siblings[:1]:
                cases += _verifier_cases(rng, vocab_size, parents, kind, dtype)
    return _check(emit, cases, dtype, seed, false_alarm, strict_layout=True)


def check_function(
    fn: Callable[[Array, Array, Array, Array], tuple[Any, Any]],
    sampling: Sampling = _PLAIN,
    *,
    vocab_size: int = 4,
    num_tokens: Sequence[int] = (1, 2),
    chosen_drafts: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    num_repeats: int = 4,
    false_alarm: float = 1e-6,
) -> Report:
    """Whether a bare draft-and-verify function is lossless: for samplers that are not jaxsd's.

    As `check_verifier`, but the function gets the target's *logits* and applies temperature, top-k
    and top-p itself. What it should emit is computed here, in numpy: temperature, then top-k, then
    top-p; all mass on the argmax at temperature 0. So a filter applied in another order than in
    plain sampling, or forgotten, or a greedy row divided by a tiny temperature, shows as another
    law.

    The function may be jitted, may loop in Python over concrete draws, and may use numpy; what
    cannot be replayed exactly is tested by chi-square on samples.

    Args:
      fn: `(key, draft_tokens [K], draft_probs [K, V], target_logits [K + 1, V])` to the tokens it
        emits and how many of them are accepted draft tokens; only the first `num_accepted + 1`
        tokens are looked at.
      sampling: scalars; the setting that `fn` claims to implement.
      vocab_size: V, at least 2.
      num_tokens: the draft lengths K to try.
      chosen_drafts: also tries drafts that were not drawn but chosen, `draft_probs` one-hot.
      dtype: of probabilities and logits, "float32" or "float64".
      seed: of the kernels.
      num_repeats: kernels of each kind.
      false_alarm: chance that chi-square condemns a lossless function, over all its cases together.

    Returns:
      A `Report`.

    Raises:
      ValueError: if an argument is out of range.

    >>> import jaxsd
    >>> def fn(key, tokens, probs, logits):
    ...     target = jaxsd.probabilities(logits, jaxsd.Sampling(temperature=0.5))
    ...     return jaxsd.rejection_sampling(key, target, jaxsd.Draft(tokens, probs))
    >>> bool(check_function(fn, jaxsd.Sampling(temperature=0.5), num_tokens=[1]))
    True
    >>> bool(check_function(fn, jaxsd.Sampling(temperature=0.5, top_k=2), num_tokens=[1]))
    False
    """
    _check_arguments(vocab_size, num_tokens, dtype, num_repeats, false_alarm)
    if any(np.ndim(field) for field in sampling):
        raise ValueError(f"sampling={sampling} must have scalar fields")
    rng = np.random.default_rng(seed)
    cases = []
    for length in num_tokens:
        for _ in range(num_repeats):
            cases += _function_cases(rng, vocab_size, length, dtype, sampling, chosen_drafts)

    def emit(
        key: Array, tokens: Array, probs: Array, target: Array, parents: Array
    ) -> tuple[Any, Any, Any]:
        del parents
        emitted, num_accepted, *_ = fn(key, tokens, probs, target)  # or a Verdict
        emitted = jnp.asarray(emitted).astype(jnp.int32)
        width = tokens.shape[0] + 1
        if emitted.ndim == 1:
            emitted = jnp.concatenate([emitted, jnp.zeros((width,), jnp.int32)])[:width]
        return emitted, num_accepted, jnp.arange(tokens.shape[0])

    return _check(emit, cases, dtype, seed, false_alarm, strict_layout=False)


def check_decoder(
    decoder: Decoder,
    target: LanguageModel,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling] = _PLAIN,
    num_new_tokens: int = 4,
    eos_id: int | Sequence[int] | None = None,
    num_samples: int = 4096,
    key: Array | None = None,
    false_alarm: float = 1e-6,
) -> Report:
    """Whether a whole decoder's text has the target's law, drafter, caches and loop included.

    One call of `decoder.generate` on a batch that holds every prompt with every sampling setting,
    `num_samples` rows of each, mixed. The histogram of each group is compared with the exact law of
    the target, found by running it without cache over all V^n continuations. Texts that have
    probability zero may not occur at all; the others go into a chi-square test, rare ones pooled.

    This finds what no check of a verifier can: draft probabilities that are not the law the tokens
    were drawn from, holes in caches, rows that disturb each other, ends handled wrongly.

    Args:
      decoder: to be checked.
      target: its target model, with a small vocabulary.
      params: by role, as for `generate`.
      prompts: a few token sequences; their lengths may differ.
      sampling: one setting or several, with scalar fields.
      num_new_tokens: n, tokens per row; V^n continuations are enumerated.
      eos_id: the decoder's.
      num_samples: rows per group; a total variation of d shows at about 10 V^n / d^2 of them.
      key: for the batch.
      false_alarm: chance that a lossless decoder fails, over all groups together (Bonferroni; each
        chi-square cell expects at least 20, where the test's own approximation error is small).

    Returns:
      A `Report`.

    Raises:
      ValueError: if an argument is out of range.

    >>> import jaxsd
    >>> model = MarkovModel(vocab_size=3, order=1)
    >>> params = {"target": model.init(jax.random.key(0)), "draft": model.init(jax.random.key(1))}
    >>> decoder = jaxsd.speculative(model, jaxsd.model_drafter(model, num_tokens=2), max_len=8)
    >>> bool(check_decoder(decoder, model, params, [[1], [0, 2]], num_samples=500))
    True
    """
    settings = [sampling] if isinstance(sampling, Sampling) else list(sampling)
    ends = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    width = max(len(prompt) for prompt in prompts)
    if num_new_tokens < 1 or width + num_new_tokens > decoder.max_len:
        raise ValueError(
            f"num_new_tokens={num_new_tokens} must be at least 1 and leave room for the prompts "
            f"({width}) in the decoder's buffer ({decoder.max_len})"
        )
    groups = list(itertools.product(prompts, settings))
    # Row r belongs to group r mod G: neighbours differ in prompt, length and setting.
    padded = np.array([[*prompt, *(0,) * (width - len(prompt))] for prompt, _ in groups], np.int32)
    fields = (np.array(field) for field in zip(*(setting for _, setting in groups), strict=True))
    rows = functools.partial(np.tile, reps=num_samples)
    lengths = rows(np.array([len(prompt) for prompt, _ in groups], np.int32))
    out = decoder.generate(
        params,
        np.tile(padded, (num_samples, 1)),
        lengths,
        jax.random.key(0) if key is None else key,
        sampling=Sampling(*(rows(field) for field in fields)),
        max_new_tokens=num_new_tokens,
    )
    tokens, ended = np.asarray(out.tokens), np.asarray(out.lengths)
    texts = [
        tuple(row[start:end].tolist())
        for row, start, end in zip(tokens, lengths, ended, strict=True)
    ]
    results = []
    for index, (prompt, setting) in enumerate(groups):
        law = _target_law(target, params["target"], prompt, setting, num_new_tokens, ends)
        counts: dict[tuple[int, ...], int] = {}
        for text in texts[index :: len(groups)]:
            counts[text] = counts.get(text, 0) + 1
        name = f"prompt {list(prompt)}, {setting}"
        results.append(_compare_counts(name, law, counts, false_alarm / len(groups)))
    return _sampled_report(results, false_alarm, _DECODER_CAUSES)


def exact_law(
    sample: Callable[[Array], Any], *, key: Array | None = None, max_paths: int = 100_000
) -> dict[Hashable, float]:
    """The exact law of a function that draws with `jax.random`, by enumerating all its draws.

    The function's own code runs, once for every way its draws can come out. While it runs, the
    samplers in `jax.random` are replaced: each draw returns one of its outcomes, and the product of
    the outcomes' probabilities is the weight of the run. `bernoulli`, `categorical` and `choice`
    become such draws. `uniform` returns a stand-in that may be shifted, scaled by arrays, indexed
    and compared; every comparison is a draw, conditioned on the earlier comparisons of the same
    number. `split` and `fold_in` stay as they are. Jitted functions run as plain Python meanwhile.

    Not for several threads at once: `jax.random` is changed for all of them.

    Args:
      sample: from a key to a pytree of discrete arrays; must look samplers up in `jax.random` at
      the
        call (`jax.random.uniform(...)`).
      key: given to `sample`.
      max_paths: how many runs at most.

    Returns:
      Probability by outcome: the pytree with arrays as nested tuples of Python numbers.

    Raises:
      ValueError: if a draw cannot be replayed (another sampler, a uniform that is used as a number,
        draws under `vmap`), a key is used twice, a draw ignores `key`, or there are too many runs.

    >>> def sample(key):
    ...     first, second = jax.random.split(key)
    ...     low = jax.random.uniform(first) < 0.25
    ...     return jax.random.bernoulli(second, jnp.where(low, 1.0, 0.5))
    >>> exact_law(sample)
    {False: 0.375, True: 0.625}
    """
    key = jax.random.key(0) if key is None else key
    runs = []
    # A key that no draw of the first run comes near: fold_in(key, i) is split(key, n)[i].
    for one in (key, jax.random.fold_in(key, 2**31 - 1)):
        law: dict[Hashable, float] = {}
        used: set[bytes] = set()
        for outcome, weight, replay in _walk(sample, one, max_paths):
            keys = [np.asarray(data).tobytes() for data in replay.keys]
            if len(set(keys)) < len(keys):
                raise ValueError(f"a key is used twice, among draws by {replay.samplers}")
            used |= set(keys)
            law[_freeze(outcome)] = law.get(_freeze(outcome), 0.0) + weight
        runs.append((law, used))
    if runs[0][1] & runs[1][1]:
        raise ValueError("a draw does not depend on the key given")
    if runs[0][0] != runs[1][0]:
        raise ValueError("the outcome depends on the key beyond the draws that can be replayed")
    return dict(sorted(runs[0][0].items(), key=lambda item: repr(item[0])))


# ---- Replay: a random function's draws as choices that somebody enumerates


class _CannotReplay(ValueError):
    """The function draws in a way that has no exact replay; test it by samples."""


# What draws nothing. Every sampler but the four that `_Replay` has ends the replay when reached.
_KEY_FUNCTIONS = {"key", "PRNGKey", "split", "fold_in", "clone", "wrap_key_data", "key_data"}
_KEY_FUNCTIONS |= {"key_dtype", "key_impl"}

_Choose = Callable[[Array], Array]  # weights [m, n] to indices [m]


def _current_trace() -> Any:
    """Something equal within one trace and different between two; older JAX has it elsewhere."""
    home = jax.extend.core if hasattr(jax.extend.core, "get_opaque_trace_state") else jax.core
    return home.get_opaque_trace_state(convention="nnx")


class _Replay:
    """Stands in for jax.random's samplers during one run of a function."""

    def __init__(self, choose: _Choose):
        self.choose = choose
        self.trace = _current_trace()
        self.samplers: list[str] = []
        self.keys: list[Array] = []  # their key data, draw by draw
        # What is known of every uniform so far: it lies in [low, high).
        self.low: list[Array] = []
        self.high: list[Array] = []

    def _use(self, key: Array, sampler: str) -> None:
        # A draw that is traced apart (under vmap, in the body of a compiled loop) stands for many
        # draws, and its trace could be remembered: it must not come to its end.
        if _current_trace() != self.trace:
            raise _CannotReplay(f"{sampler} under vmap or inside a compiled loop or branch")
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        self.keys.append(jax.random.key_data(key) if is_typed else key)
        self.samplers.append(sampler)

    def bernoulli(self, key: Array, p: Any = 0.5, shape: Any = None, **options: Any) -> Array:
        del options
        self._use(key, "bernoulli")
        p = _as_float(p)
        p = jnp.broadcast_to(p, p.shape if shape is None else shape)
        index = self.choose(_coin(p.reshape(-1)))
        return (index == 1).reshape(p.shape)

    def categorical(
        self,
        key: Array,
        logits: Any,
        axis: int = -1,
        shape: Any = None,
        replace: bool = True,
        **options: Any,
    ) -> Array:
        del options
        self._use(key, "categorical")
        if shape is not None or not replace:
            raise _CannotReplay("categorical with a shape or without replacement")
        logits = jnp.moveaxis(_as_float(logits), axis, -1)
        index = self.choose(_softmax_weights(logits.reshape(-1, logits.shape[-1])))
        return index.reshape(logits.shape[:-1]).astype(jnp.asarray(0).dtype)

    def token(self, key: Array, probs: Any) -> Array:
        """For `jaxsd.categorical`, whose two-level inversion has a test of its own."""
        self._use(key, "jaxsd.categorical")
        probs = _as_float(probs)
        rows = probs.reshape(-1, probs.shape[-1])
        drawn = self.choose(rows / jnp.sum(rows, axis=1, keepdims=True))
        return drawn.reshape(probs.shape[:-1])

    def choice(
        self,
        key: Array,
        a: Any,
        shape: Any = (),
        replace: bool = True,
        p: Any = None,
        axis: int = 0,
        **options: Any,
    ) -> Array:
        del options
        self._use(key, "choice")
        values = jnp.arange(a) if np.ndim(a) == 0 else jnp.asarray(a)
        count = math.prod(shape)
        if values.ndim != 1 or axis != 0 or (not replace and count > 1):
            raise _CannotReplay("choice of subarrays or without replacement")
        weights = jnp.ones(values.shape) if p is None else _as_float(p)
        weights = weights / jnp.sum(weights)
        index = self.choose(jnp.broadcast_to(weights[None, :], (count, values.size)))
        return values[index].reshape(shape)

    def uniform(
        self, key: Array, shape: Any = (), dtype: Any = None, minval: Any = 0.0, maxval: Any = 1.0
    ) -> "_Uniform":
        self._use(key, "uniform")
        dtype = jnp.ones(()).dtype if dtype is None else jnp.dtype(dtype)
        low, high = (jnp.asarray(x, dtype) for x in (minval, maxval))
        first, count = len(self.low), math.prod(shape)
        self.low += [jnp.zeros((), dtype)] * count
        self.high += [jnp.ones((), dtype)] * count
        ids = np.arange(first, first + count).reshape(shape)
        return _Uniform(
            self, ids, jnp.broadcast_to(high - low, shape), jnp.broadcast_to(low, shape)
        )

    def is_below(self, uniform: "_Uniform", other: Any) -> Array:
        """Decides scale * u + offset < other; every element is a draw among what is still open."""
        other = jnp.asarray(other).astype(uniform.scale.dtype)
        shape = np.broadcast_shapes(uniform.ids.shape, other.shape)
        ids = np.broadcast_to(uniform.ids, shape).reshape(-1)
        scale, offset, other = (
            jnp.broadcast_to(x, shape).reshape(-1) for x in (uniform.scale, uniform.offset, other)
        )
        bound = (other - offset) / jnp.where(scale == 0, jnp.ones_like(scale), scale)
        # A uniform that occurs once may be decided together with others; one at a time if it
        # recurs.
        whole = len(set(ids.tolist())) == ids.size
        parts = [np.arange(ids.size)] if whole else [np.array([i]) for i in range(ids.size)]
        decided = [jnp.zeros((0,), bool)]
        for part in parts:
            if not part.size:
                continue
            low = jnp.stack([self.low[i] for i in ids[part]])
            high = jnp.stack([self.high[i] for i in ids[part]])
            at = jnp.clip(bound[part], low, high)
            open_ = high > low
            p = jnp.where(
                open_, (at - low) / jnp.where(open_, high - low, 1), (low < at).astype(at.dtype)
            )
            below = self.choose(_coin(p)) == 1
            low, high = jnp.where(below, low, at), jnp.where(below, at, high)
            for place, i in enumerate(ids[part]):
                self.low[i], self.high[i] = low[place], high[place]
            decided.append(below)
        below = jnp.concatenate(decided)
        below = jnp.where(scale > 0, below, jnp.where(scale < 0, ~below, offset < other))
        return (below & ~jnp.isnan(other)).reshape(shape)


class _Uniform:
    """A uniform number not yet drawn: scale * u + offset, elementwise; it can be compared."""

    __array_ufunc__ = None  # numpy leaves comparisons and arithmetic with it to this class
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, replay: _Replay, ids: np.ndarray, scale: Array, offset: Array):
        self.replay, self.ids, self.scale, self.offset = replay, ids, scale, offset
        self.shape, self.ndim, self.dtype = ids.shape, ids.ndim, scale.dtype

    def _affine(self, factor: Any, shift: Any) -> "_Uniform":
        factor, shift = (jnp.asarray(x).astype(self.dtype) for x in (factor, shift))
        shape = np.broadcast_shapes(self.ids.shape, factor.shape, shift.shape)
        factor, shift, scale, offset = (
            jnp.broadcast_to(x, shape) for x in (factor, shift, self.scale, self.offset)
        )
        ids = np.broadcast_to(self.ids, shape)
        return _Uniform(self.replay, ids, scale * factor, offset * factor + shift)

    def __mul__(self, other: Any) -> "_Uniform":
        return self._affine(other, 0.0)

    def __add__(self, other: Any) -> "_Uniform":
        return self._affine(1.0, other)

    def __sub__(self, other: Any) -> "_Uniform":
        return self._affine(1.0, -jnp.asarray(other))

    def __rsub__(self, other: Any) -> "_Uniform":
        return self._affine(-1.0, other)

    def __truediv__(self, other: Any) -> "_Uniform":
        return self._affine(1.0 / jnp.asarray(other), 0.0)

    __rmul__, __radd__ = __mul__, __add__

    # That a uniform equals a bound exactly has probability zero, so "<" and "<=" are one.
    def __lt__(self, other: Any) -> Array:
        return self.replay.is_below(self, other)

    def __gt__(self, other: Any) -> Array:
        return ~self.replay.is_below(self, other) & ~jnp.isnan(jnp.asarray(other))

    __le__, __ge__ = __lt__, __gt__

    def __getitem__(self, index: Any) -> "_Uniform":
        return _Uniform(self.replay, self.ids[index], self.scale[index], self.offset[index])

    def __len__(self) -> int:
        return len(self.ids)

    def reshape(self, *shape: Any) -> "_Uniform":
        scale, offset = self.scale.reshape(*shape), self.offset.reshape(*shape)
        return _Uniform(self.replay, self.ids.reshape(*shape), scale, offset)


def _as_float(value: Any) -> Array:
    array = jnp.asarray(value)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.ones(()).dtype)


def _coin(p: Array) -> Array:
    """Weights `[m, 2]` of false and true; as the sampler's `u < p` has it, NaN is false."""
    p = jnp.where(p > 0, jnp.minimum(p, 1), 0)
    return jnp.stack([1 - p, p], axis=-1)


def _softmax_weights(logits: Array) -> Array:
    """Weights `[m, n]` of `categorical`, also where its argmax is decided by an inf or a NaN."""
    decided = ~jnp.isfinite(jnp.max(logits, axis=-1, keepdims=True))
    only = jnp.arange(logits.shape[-1])[None, :] == jnp.argmax(logits, axis=-1, keepdims=True)
    soft = jax.nn.softmax(jnp.where(decided, 0, logits), axis=-1)
    return jnp.where(decided, only.astype(soft.dtype), soft)


@contextlib.contextmanager
def _patched(replay: _Replay) -> Iterator[None]:
    """`jax.random` draws from `replay` and jitted functions run as Python; undone in any case."""

    def opaque(name: str) -> Callable[..., Any]:
        def sampler(*args: Any, **options: Any) -> Any:
            raise _CannotReplay(f"jax.random.{name} has no exact replay")

        return sampler

    samplers: dict[str, Any] = {
        name: getattr(replay, name) for name in ("bernoulli", "categorical", "choice", "uniform")
    }
    for name in set(dir(jax.random)) - set(samplers) - _KEY_FUNCTIONS:
        if not name.startswith("_") and callable(getattr(jax.random, name)):
            samplers[name] = opaque(name)
    replaced = [(jax.random, name, sampler) for name, sampler in samplers.items()]
    package = sys.modules["jaxsd"]
    replaced += [(module, "categorical", replay.token) for module in (package, sampling_lib)]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, sampler in replaced:
            setattr(module, name, sampler)
        with jax.disable_jit():
            yield
    finally:
        for module, name, sampler in originals:
            setattr(module, name, sampler)


def _walk(
    sample: Callable[[Array], Any], key: Array, max_paths: int
) -> Iterator[tuple[Any, float, _Replay]]:
    """Every run of `sample` with its probability, depth first."""
    pending: list[list[int]] = [[]]
    for _ in range(max_paths):
        if not pending:
            return
        path = _Path(pending.pop())
        replay = _Replay(path.choose)
        with _patched(replay):
            outcome = sample(key)
        pending += path.others
        yield outcome, path.weight, replay
    if pending:
        raise _CannotReplay(f"more than {max_paths} ways to draw")


class _Path:
    """Draws that follow `decided` and then take the first possible outcome, noting the others."""

    def __init__(self, decided: list[int]):
        self.decided, self.chosen, self.weight = decided, [], 1.0
        self.others: list[list[int]] = []

    def choose(self, weights: Array) -> Array:
        start = len(self.chosen)
        for row in np.asarray(weights, np.float64):
            at = len(self.chosen)
            if at < len(self.decided):
                outcome = self.decided[at]
            else:
                outcome, *rest = np.flatnonzero(row > 0).tolist()
                self.others += [[*self.chosen, other] for other in rest]
            self.chosen.append(outcome)
            self.weight *= float(row[outcome])
        return jnp.asarray(self.chosen[start:], jnp.int32)


class _Runs(NamedTuple):
    """Runs of a function over N stacked arguments and all outcomes of its draws.

    outputs: what it returned, arrays `[M, ...]`.
    weights: `[M]`, the chance of the run given its argument; above 0.
    owners: `[M]`, index of the argument.
    notes: what was found wrong with its keys.
    """

    outputs: tuple[np.ndarray, ...]
    weights: np.ndarray
    owners: np.ndarray
    notes: list[str]


def _lanes(fn: Callable[..., Any], args: tuple[np.ndarray, ...], max_lanes: int = 1 << 19) -> _Runs:
    """All runs at once, compiled; needs draws that are the same in number and kind in every run."""
    arities: list[int] = []

    def first(weights: Array) -> Array:
        arities.extend([weights.shape[1]] * weights.shape[0])
        return jnp.zeros(weights.shape[:1], jnp.int32)

    key, other_key = jax.random.key(0), jax.random.key(1)

    def discover(*args: Any) -> Any:
        with _patched(_Replay(first)):
            return fn(*args)

    jax.eval_shape(discover, key, *(x[0] for x in args))
    num_paths, size = math.prod(arities), len(args[0])
    if num_paths * size > max_lanes:
        raise _CannotReplay(f"{num_paths} ways to draw for each of {size} inputs")
    paths = np.array(list(itertools.product(*map(range, arities))), np.int32)
    paths = paths.reshape(num_paths, len(arities))
    samplers: list[str] = []

    def lane(key: Array, path: Array, *args: Array) -> tuple[Any, Array, list[Array]]:
        at, weight = 0, jnp.ones(())

        def choose(weights: Array) -> Array:
            nonlocal at, weight
            num, arity = weights.shape
            if arities[at : at + num] != [arity] * num:
                raise _CannotReplay("draws that depend on earlier draws in number or kind")
            index = path[at : at + num]
            at += num
            chosen = jnp.take_along_axis(weights, index[:, None], axis=1)
            weight = weight * jnp.prod(chosen).astype(weight.dtype)
            return index

        replay = _Replay(choose)
        with _patched(replay):
            outputs = fn(key, *args)
        if at != len(arities):
            raise _CannotReplay("fewer draws than in another run")
        samplers[:] = replay.samplers
        return jax.tree.map(jnp.asarray, outputs), weight, replay.keys

    axes = (None, 0, *(0 for _ in args))
    lanes = jax.jit(jax.vmap(lane, in_axes=axes))  # not the decoder: its loop is the only other
    stacked = [np.tile(x, (num_paths,) + (1,) * (x.ndim - 1)) for x in args]
    results = []
    for one in (key, other_key):
        outputs, weight, keys = lanes(one, np.repeat(paths, size, axis=0), *stacked)
        possible = np.asarray(weight) > 0
        arrays = [np.asarray(x)[possible] for x in (*outputs, weight)]
        results.append((arrays, [np.asarray(data)[possible] for data in keys], possible))
    (arrays, keys, possible), (other_arrays, other_keys, _) = results
    _check_same(arrays, other_arrays)
    notes = []
    for i, j in itertools.combinations(range(len(keys)), 2):
        if np.any(np.all(keys[i] == keys[j], axis=-1)):
            notes.append(_REUSED.format(samplers[i], samplers[j]))
    if any(np.any(np.all(a == b, axis=-1)) for a, b in zip(keys, other_keys, strict=True)):
        notes.append(_CONSTANT)
    owners = np.tile(np.arange(size), num_paths)[possible]
    *outputs, weights = arrays
    return _Runs(tuple(outputs), weights.astype(np.float64), owners, notes)


def _one_by_one(fn: Callable[..., Any], args: tuple[np.ndarray, ...]) -> _Runs:
    """All runs one after another, for code that branches in Python on what it drew; slow."""
    outputs: list[tuple[np.ndarray, ...]] = []
    weights: list[float] = []
    owners: list[int] = []
    notes: list[str] = []
    for index in range(len(args[0])):
        inputs = [jnp.asarray(x[index]) for x in args]
        # The second key only shows whether anything but the draws depends on it: a few inputs do.
        runs = []
        for key in (jax.random.key(0), jax.random.key(1))[: 2 if index % 16 == 0 else 1]:
            runs.append(list(_walk(lambda key: fn(key, *inputs), key, 5_000)))  # noqa: B023
        for output, weight, replay in runs[0]:
            outputs.append(tuple(np.asarray(x) for x in output))
            weights.append(weight)
            owners.append(index)
            keys = [np.asarray(data).tobytes() for data in replay.keys]
            for i, j in itertools.combinations(range(len(keys)), 2):
                if keys[i] == keys[j]:
                    notes.append(_REUSED.format(replay.samplers[i], replay.samplers[j]))
        if len(runs) == 2:
            drawn = [[out for out, _, _ in run] for run in runs]
            _check_same(*(jax.tree.leaves(jax.tree.map(np.asarray, out)) for out in drawn))
            used = [{np.asarray(k).tobytes() for *_, r in run for k in r.keys} for run in runs]
            if used[0] & used[1]:
                notes.append(_CONSTANT)
    stacked = tuple(np.stack(parts) for parts in zip(*outputs, strict=True))
    return _Runs(stacked, np.array(weights), np.array(owners), list(dict.fromkeys(notes)))


_REUSED = "a key is used twice, by {} and by {}: the two draws are not independent"
_CONSTANT = "a draw does not depend on the key given: it repeats in every call"


def _check_same(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> None:
    """Two keys, all draws replayed, must give the same outputs."""
    same = len(first) == len(second)
    if not same or not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True)):
        raise _CannotReplay("the output depends on the key beyond the draws that were seen")


def _freeze(tree: Any) -> Hashable:
    """An outcome as something a dict can hold."""

    def tuples(value: Any) -> Hashable:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    if isinstance(tree, Mapping):
        return tuple((name, _freeze(value)) for name, value in sorted(tree.items()))
    if isinstance(tree, tuple | list):
        return tuple(map(_freeze, tree))
    return tuples(np.asarray(tree).tolist())


# ---- Cases: kernels of target and draft, and the law that must come out


class _Case(NamedTuple):
    """One pair of history-dependent kernels; level i is an array `[V] * i + [V]`.

    name: the kind.
    target: levels 0..D, float64, rows summing to 1; the law to be emitted; D is the tree's depth.
    given: levels 0..D, what the function gets for them: probabilities or logits.
    draft: levels 0..D-1, rows summing to 1, or to 0 where nothing is proposed.
    parents: of every node; a chain's if there is no tree.
    siblings: how children are drawn from their parent's draft kernel.
    """

    name: str
    target: list[np.ndarray]
    given: list[np.ndarray]
    draft: list[np.ndarray]
    parents: tuple[int, ...]
    siblings: str = "independent"

    @property
    def length(self) -> int:
        return len(self.parents)

    @property
    def vocab_size(self) -> int:
        return self.target[0].shape[-1]

    def paths(self) -> list[list[int]]:
        """Of every node the nodes from the root down to it."""
        found: list[list[int]] = []
        for node, parent in enumerate(self.parents):
            found.append([*(found[parent] if parent >= 0 else []), node])
        return found

    def node_probs(self, node: int, tokens: np.ndarray) -> np.ndarray:
        """What node's token is drawn from, `[N, V]`, given the tokens `[N, >= node]` before it."""
        path = self.paths()[node][:-1]
        row = self.draft[len(path)][tuple(tokens[:, path].T)]
        row = np.broadcast_to(row, (len(tokens), self.vocab_size))
        family = [i for i, parent in enumerate(self.parents) if parent == self.parents[node]]
        place = family.index(node)
        eye = np.eye(self.vocab_size, dtype=row.dtype)
        if self.siblings == "distinct":
            left = row * (1 - eye[tokens[:, family[:place]]].sum(1, dtype=row.dtype))
            total = left.sum(-1, keepdims=True)
            return np.where(total > 0, left / np.where(total > 0, total, 1), 0).astype(row.dtype)
        if self.siblings in ("chosen", "mixed"):
            # Nothing is proposed by a child that a kernel of this support has no token for.
            order = np.argsort(-row, axis=-1, kind="stable")
            num_chosen = len(family) - (self.siblings == "mixed")
            at = place - (self.siblings == "mixed")
            if at < 0:
                left = row * (1 - eye[order[:, :num_chosen]].sum(1, dtype=row.dtype))
                total = left.sum(-1, keepdims=True)
                left = np.where(total > 0, left / np.where(total > 0, total, 1), 0)
                return left.astype(row.dtype)
            if at >= self.vocab_size:
                return np.zeros_like(row)
            has = np.take_along_axis(row, order[:, at : at + 1], axis=-1) > 0
            return eye[order[:, at]] * has
        return row

    def drafts(self) -> tuple[np.ndarray, np.ndarray]:
        """All drafts of positive probability `[N, K]`, and their probabilities `[N]`."""
        tokens = np.zeros((1, 0), np.int32)
        weight = np.ones(1)
        for node in range(self.length):
            probs = self.node_probs(node, tokens).astype(np.float64)
            # Where nothing is proposed the token is a filler.
            probs = probs + np.eye(self.vocab_size)[0] * (probs.sum(-1, keepdims=True) == 0)
            rows, drawn = np.nonzero(probs)
            weight = weight[rows] * probs[rows, drawn]
            tokens = np.concatenate([tokens[rows], drawn[:, None].astype(np.int32)], axis=1)
        return tokens, weight

    def inputs(self, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
        """For drafts `[N, K]` what the function gets: tokens, draft_probs, target, parents."""
        count = len(tokens)
        probs = [self.node_probs(node, tokens[:, :node]) for node in range(self.length)]
        shape = (count, 0, self.vocab_size)
        stacked = np.stack(probs, axis=1) if probs else np.zeros(shape, self.given[0].dtype)
        rows = [self.given[len(path)][tuple(tokens[:, path].T)] for path in [[], *self.paths()]]
        rows = [np.broadcast_to(row, (count, self.vocab_size)) for row in rows]
        parents = np.broadcast_to(np.array(self.parents, np.int32), (count, self.length))
        return tokens, stacked, np.stack(rows, axis=1), parents

    def law(self) -> np.ndarray:
        """The target's joint law of D + 1 tokens, `[V] * (D + 1)`."""
        law = self.target[0]
        for level in self.target[1:]:
            law = law[..., None] * level
        return law

    def completed(
        self, tokens: np.ndarray, num_accepted: np.ndarray, weight: np.ndarray
    ) -> np.ndarray:
        """The law of D + 1 tokens that emitted outputs `[M, K + 1]` have with the target's tail."""
        law = np.zeros(())
        for place, level in enumerate(self.target):
            law = law[..., None] * level
            ends = num_accepted == place
            np.add.at(law, tuple(tokens[ends, : place + 1].T), weight[ends])
        return law


def _chain(length: int) -> tuple[int, ...]:
    return tuple(range(-1, length - 1))


def _verifier_cases(
    rng: np.random.Generator, vocab_size: int, parents: tuple[int, ...], siblings: str, dtype: str
) -> list[_Case]:
    length = max(tree_lib.depths(parents), default=0)

    def levels(count: int, row: Callable[[], np.ndarray]) -> list[np.ndarray]:
        made = []
        for i in range(count):
            rows = [row() for _ in range(vocab_size**i)]
            made.append(np.array(rows, dtype).reshape((vocab_size,) * (i + 1)))
        return made

    def dense() -> np.ndarray:
        return rng.dirichlet(np.ones(vocab_size))

    def sparse() -> np.ndarray:
        row = dense() * (rng.random(vocab_size) < 0.6)
        row[rng.integers(vocab_size)] += 0.1
        return row / row.sum()

    def sharp() -> np.ndarray:
        return 0.999 * certain() + 0.001 / vocab_size

    def certain() -> np.ndarray:
        return np.eye(vocab_size)[rng.integers(vocab_size)]

    def nothing() -> np.ndarray:
        return np.zeros(vocab_size)

    kinds = [
        ("random", dense, dense),
        ("supports with zeros", sparse, sparse),
        ("nearly deterministic", sharp, sharp),
        ("deterministic target", certain, dense),
        ("chosen (one-hot) draft", dense, certain),
        ("chosen (one-hot) draft, deterministic target", certain, certain),
        ("nothing proposed", dense, nothing),
    ]
    pairs = [(name, levels(length + 1, p), levels(length, q)) for name, p, q in kinds]
    target = levels(length + 1, dense)
    pairs.append(("equal laws", target, target[:length]))
    lower = np.arange(vocab_size) < vocab_size // 2
    pairs.append(("disjoint supports", *_restricted(target, lower, levels(length, dense))))
    partly = levels(length, certain)
    partly = [level * (i < (length + 1) // 2) for i, level in enumerate(partly)]
    pairs.append(("fewer tokens proposed than K", target, partly))
    if parents != _chain(len(parents)):
        pairs = [(f"{name}, siblings {siblings}, tree {parents}", *pair) for name, *pair in pairs]
    return [
        # A float32 row sums to 1 within rounding only; the law is that of the row as it is given.
        _Case(name, [x.astype(np.float64) for x in target], target, draft, parents, siblings)
        for name, target, draft in pairs
    ]


def _restricted(
    target: list[np.ndarray], support: np.ndarray, draft: list[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The target on `support`, the draft off it."""

    def on(levels: list[np.ndarray], mask: np.ndarray) -> list[np.ndarray]:
        kept = [np.where(mask, level, np.zeros_like(level)) for level in levels]
        return [level / level.sum(-1, keepdims=True) for level in kept]

    return on(target, support), on(draft, ~support)


def _function_cases(
    rng: np.random.Generator,
    vocab_size: int,
    length: int,
    dtype: str,
    sampling: Sampling,
    chosen_drafts: bool,
) -> list[_Case]:
    def logits(count: int) -> list[np.ndarray]:
        made = []
        for i in range(count):
            rows = []
            while len(rows) < vocab_size**i:
                row = (2 * rng.standard_normal(vocab_size)).astype(dtype)
                if _top_p_margin(row, sampling) > 1e-4:  # else rounding decides what top-p keeps
                    rows.append(row)
            made.append(np.array(rows).reshape((vocab_size,) * (i + 1)))
        return made

    def law(levels: list[np.ndarray]) -> list[np.ndarray]:
        return [_reference_probabilities(level, sampling) for level in levels]

    target, draft = logits(length + 1), logits(length)
    probs = [level.astype(dtype) for level in law(draft)]
    equal = [level.astype(dtype) for level in law(target[:length])]
    cases = [
        _Case("random", law(target), target, probs, _chain(length)),
        _Case("equal laws", law(target), target, equal, _chain(length)),
    ]
    if chosen_drafts:
        greedy = [np.eye(vocab_size, dtype=dtype)[level.argmax(-1)] for level in draft]
        cases.append(_Case("chosen (one-hot) draft", law(target), target, greedy, _chain(length)))
    return cases


def _reference_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Temperature, then top-k, then top-p, one row at a time in float64; `logits` `[..., V]`."""
    rows = np.asarray(logits, np.float64).reshape(-1, logits.shape[-1])
    return np.stack([_reference_row(row, sampling)[0] for row in rows]).reshape(logits.shape)


def _top_p_margin(logits: np.ndarray, sampling: Sampling) -> float:
    """How far the mass above any kept or dropped token is from top-p: below it rounding decides."""
    return _reference_row(np.asarray(logits, np.float64), sampling)[1]


def _reference_row(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, float]:
    # The traced fields are float32: the law wanted is that of the rounded setting.
    temperature = float(np.float32(sampling.temperature))  # pyright: ignore[reportArgumentType]
    top_p = float(np.float32(sampling.top_p))  # pyright: ignore[reportArgumentType]
    top_k = int(sampling.top_k)  # pyright: ignore[reportArgumentType]
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)], 1.0
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits - logits.max()) / temperature)
    kept = order[:top_k] if top_k > 0 else order
    margin = 1.0
    if top_p < 1:
        above = np.concatenate([[0.0], np.cumsum(weights[kept])[:-1]]) / weights[kept].sum()
        margin = float(np.abs(above - top_p).min())
        kept = kept[(above < top_p) | (np.arange(len(kept)) == 0)]
    probs = np.zeros_like(logits)
    probs[kept] = weights[kept] / weights[kept].sum()
    return probs, margin


def _target_law(
    target: LanguageModel,
    params: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    num_new_tokens: int,
    ends: Sequence[int],
) -> dict[tuple[int, ...], float]:
    """The exact law of continuations: the model without its cache, over all of them, in numpy."""
    law: dict[tuple[int, ...], float] = {}
    open_texts: dict[tuple[int, ...], float] = {(): 1.0}
    apply = jax.jit(target.apply)
    for place in range(num_new_tokens):
        texts = np.array([[*prompt, *text] for text in open_texts], np.int32)
        positions = np.broadcast_to(np.arange(texts.shape[1], dtype=np.int32), texts.shape)
        cache = target.init_cache(*texts.shape)
        logits, _ = apply(params, jnp.asarray(texts), jnp.asarray(positions), cache)
        probs = _reference_probabilities(np.asarray(logits[:, -1]), sampling)
        extended: dict[tuple[int, ...], float] = {}
        for (text, mass), row in zip(open_texts.items(), probs, strict=True):
            for token in np.flatnonzero(row).tolist():
                is_end = token in ends or place == num_new_tokens - 1
                (law if is_end else extended)[(*text, token)] = mass * float(row[token])
        open_texts = extended
        if not open_texts:
            break
    return law


# ---- Judging


class _Judged(NamedTuple):
    """One case's result: its largest difference, its p-value (1 if exact), what is wrong."""

    difference: float
    p_value: float
    findings: list[str]


def _check(
    emit: Callable[..., tuple[Any, Any, Any]],
    cases: list[_Case],
    dtype: str,
    seed: int,
    false_alarm: float,
    *,
    strict_layout: bool,
) -> Report:
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        try:
            return _check_exactly(emit, cases, dtype, strict_layout)
        except _CannotReplay as error:
            report = _check_by_samples(emit, cases, seed, false_alarm, strict_layout)
            return report._replace(note=str(error))


def _check_exactly(
    emit: Callable[..., tuple[Any, Any, Any]], cases: list[_Case], dtype: str, strict_layout: bool
) -> Report:
    tolerance = 1e-12 if dtype == "float64" else 1e-6
    results: list[_Judged] = []
    findings: list[str] = []
    for length in sorted({case.length for case in cases}):
        outputs, notes = _enumerate(emit, [case for case in cases if case.length == length])
        findings += [note for note in notes if note not in findings]
        for case, (tokens, num_accepted, path), weight, draft in outputs:
            where = f"K={case.length}, V={case.vocab_size}, {case.name}"
            broken = _layout(tokens, num_accepted, path, draft, case, strict_layout)
            if broken:
                results.append(_Judged(1.0, 1.0, [f"{where}: {broken}"]))
                continue
            emitted = case.completed(tokens, num_accepted, weight)
            results.append(_compare_laws(where, case.law(), emitted, tolerance))
    results.sort(key=lambda result: -result.difference)
    failed = [finding for result in results for finding in result.findings]
    findings += failed[:3]
    if len(failed) > 3:
        findings.append(f"and {len(failed) - 3} of {len(results)} cases more")
    if failed:
        findings.append(_VERIFIER_CAUSES)
    return Report(
        lossless=not findings,
        method="exact",
        difference=results[0].difference if results else 0.0,
        p_value=None,
        threshold=tolerance,
        false_alarm=0.0,
        num_cases=len(results),
        findings=tuple(findings),
    )


_Outputs = list[tuple[_Case, tuple[np.ndarray, ...], np.ndarray, np.ndarray]]


def _enumerate(
    emit: Callable[..., tuple[Any, Any, Any]], cases: list[_Case]
) -> tuple[_Outputs, list[str]]:
    """For every case all outputs: (tokens `[M, K + 1]`, num_accepted, path), weight, draft."""
    try:
        return _enumerate_with(_lanes, emit, cases)
    except _EngineFailed:  # it wants concrete values, or no two runs draw alike: fewer, one by one
        one_of_a_kind = list({case.name: case for case in cases}.values())
        try:
            return _enumerate_with(_one_by_one, emit, one_of_a_kind)
        except _EngineFailed as error:
            raise _CannotReplay(str(error)) from error


class _EngineFailed(Exception):
    """The function could not be run so; if it is just broken, running it on samples raises too."""


def _enumerate_with(
    engine: Callable[..., _Runs], emit: Callable[..., tuple[Any, Any, Any]], cases: list[_Case]
) -> tuple[_Outputs, list[str]]:
    drafts = [case.drafts() for case in cases]
    inputs = [case.inputs(tokens) for case, (tokens, _) in zip(cases, drafts, strict=True)]
    stacked = tuple(np.concatenate(parts) for parts in zip(*inputs, strict=True))
    try:
        runs = engine(emit, stacked)
    except Exception as error:  # a stranger's function: anything may come out of it
        raise _EngineFailed(f"{type(error).__name__}: {str(error)[:200]}") from error
    weights = runs.weights * np.concatenate([chance for _, chance in drafts])[runs.owners]
    source = np.repeat(np.arange(len(cases)), [len(tokens) for tokens, _ in drafts])[runs.owners]
    outputs = []
    for index, case in enumerate(cases):
        rows = source == index
        emitted = tuple(x[rows] for x in runs.outputs)
        outputs.append((case, emitted, weights[rows], stacked[0][runs.owners[rows]]))
    return outputs, runs.notes


def _layout(
    tokens: np.ndarray,
    num_accepted: np.ndarray,
    path: np.ndarray,
    draft: np.ndarray,
    case: _Case,
    strict: bool,
) -> str:
    """What is wrong with the form of outputs `[M, K + 1]`, or nothing."""
    length = case.length
    if tokens.ndim != 2 or (strict and tokens.shape[1] != length + 1):
        return f"tokens has shape {tokens.shape[1:]}; wanted ({length + 1},)"
    if num_accepted.ndim != 1:
        return f"num_accepted has shape {num_accepted.shape[1:]}; wanted ()"
    depth = len(case.target) - 1
    wrong = (num_accepted < 0) | (num_accepted > depth)
    if np.any(wrong):
        return f"num_accepted is {num_accepted[wrong][0]}; wanted 0..{depth}"
    if path.shape != draft.shape:
        return f"path has shape {path.shape[1:]}; wanted ({length},)"
    tokens = tokens[:, : length + 1]
    place = np.arange(length + 1)
    emitted = place <= num_accepted[:, None]
    outside = emitted & ((tokens < 0) | (tokens >= case.vocab_size))
    if np.any(outside):
        return f"token {tokens[outside][0]} emitted; wanted 0..{case.vocab_size - 1}"
    accepted = place[:-1] < num_accepted[:, None]
    node = np.clip(path, 0, max(length - 1, 0))
    parents = np.broadcast_to(np.array(case.parents, int), path.shape)
    above = np.concatenate([np.full((len(path), 1), -1), node], axis=1)[:, :-1]
    if length:
        linked = np.take_along_axis(parents, node, axis=1) == above
        if np.any(accepted & ((node != path) | ~linked)):
            return "path does not lead down the tree from its root"
        draft = np.take_along_axis(draft, node, axis=1)
    if np.any(accepted & (tokens[:, :-1] != draft)):
        return "the first num_accepted tokens are not the draft's"
    if strict and np.any(~emitted & (tokens != 0)):
        return "tokens after the recovered or bonus token are not zero"
    return ""


def _compare_laws(where: str, wanted: np.ndarray, emitted: np.ndarray, tolerance: float) -> _Judged:
    gap = np.abs(emitted - wanted)
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(gap), gap.shape))
    largest = float(gap[worst])
    if largest <= tolerance:
        return _Judged(largest, 1.0, [])
    # The first place whose marginal is off tells more than the joint law does.
    first = next(
        place
        for place in range(gap.ndim)
        if place == gap.ndim - 1
        or np.abs((emitted - wanted).sum(tuple(range(place + 1, gap.ndim)))).max() > tolerance
    )
    forbidden = float(emitted[wanted == 0].sum())
    message = (
        f"{where}: the emitted law differs from the target's by total variation "
        f"{gap.sum() / 2:.3g}, first at token {first}; text {list(worst)} has probability "
        f"{emitted[worst]:.6g} instead of {wanted[worst]:.6g}"
    )
    if forbidden > tolerance:
        message += f"; texts the target never emits have probability {forbidden:.3g}"
    return _Judged(largest, 1.0, [message])


def _check_by_samples(
    emit: Callable[..., tuple[Any, Any, Any]],
    cases: list[_Case],
    seed: int,
    false_alarm: float,
    strict_layout: bool,
) -> Report:
    """Chi-square on the longest draft length only, one case of each kind."""
    length = max(case.length for case in cases)
    chosen = list({case.name: case for case in cases if case.length == length}.values())
    rng = np.random.default_rng(seed)
    results = []
    for index, case in enumerate(chosen):
        where = f"K={case.length}, V={case.vocab_size}, {case.name}"
        drafts, chance = case.drafts()
        one = functools.partial(_emit_many, emit, case, drafts, chance, rng)
        tokens, num_accepted, path, draft = one(jax.random.key(seed + index))
        broken = _layout(tokens, num_accepted, path, draft, case, strict_layout)
        if broken:
            results.append(_Judged(1.0, 0.0, [f"{where}: {broken}"]))
            continue
        counts: dict[tuple[int, ...], int] = {}
        for row, accepted in zip(tokens, num_accepted, strict=True):
            text = tuple(row[: accepted + 1].tolist())
            while len(text) < len(case.target):
                level = case.target[len(text)][text]
                text = (*text, int(rng.choice(case.vocab_size, p=level / level.sum())))
            counts[text] = counts.get(text, 0) + 1
        law = {tuple(map(int, at)): float(p) for at, p in np.ndenumerate(case.law())}
        results.append(_compare_counts(where, law, counts, false_alarm / len(chosen)))
    return _sampled_report(results, false_alarm, _VERIFIER_CAUSES)


def _emit_many(
    emit: Callable[..., tuple[Any, Any, Any]],
    case: _Case,
    drafts: np.ndarray,
    chance: np.ndarray,
    rng: np.random.Generator,
    key: Array,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Outputs for random drafts: 20 000 if `emit` can be vectorised, else 2 000 one by one."""

    def inputs(count: int) -> tuple[Any, ...]:
        picked = rng.choice(len(drafts), size=count, p=chance / chance.sum())
        return jax.random.split(key, count), *map(jnp.asarray, case.inputs(drafts[picked]))

    given = inputs(20_000)
    try:
        emitted, num_accepted, path = jax.jit(jax.vmap(emit))(*given)
    except Exception:
        given = inputs(2_000)
        outputs = [emit(*one) for one in zip(*given, strict=True)]
        emitted = np.stack([np.asarray(row) for row, *_ in outputs])
        num_accepted = np.array([int(np.asarray(count)) for _, count, _ in outputs])
        path = np.stack([np.asarray(row) for *_, row in outputs])
    return np.asarray(emitted), np.asarray(num_accepted), np.asarray(path), np.asarray(given[1])


def _compare_counts(
    where: str,
    law: Mapping[tuple[int, ...], float],
    counts: Mapping[tuple[int, ...], int],
    alpha: float,
) -> _Judged:
    """Pearson's chi-square of texts against their law, at level `alpha`."""
    total = sum(counts.values())
    gaps = {text: counts.get(text, 0) / total - law.get(text, 0.0) for text in {*law, *counts}}
    worst = max(gaps, key=lambda text: (abs(gaps[text]), text))
    described = (
        f"text {list(worst)} has frequency {counts.get(worst, 0) / total:.4g} instead of "
        f"{law.get(worst, 0.0):.4g} ({total} samples)"
    )
    impossible = [text for text in counts if law.get(text, 0.0) == 0.0]
    if impossible:
        share = sum(counts[text] for text in impossible) / total
        message = (
            f"{where}: {share:.2%} of the texts, such as {list(impossible[0])}, have probability "
            f"zero under the target; {described}"
        )
        return _Judged(abs(gaps[worst]), 0.0, [message])
    cells, pooled = (
        [],
        [0.0, 0.0],
    )  # expected and observed; texts that expect less than 20 are pooled
    for text, p in sorted(law.items(), key=lambda item: item[1]):
        if p * total < 20 or 0 < pooled[0] < 20:
            pooled = [pooled[0] + p * total, pooled[1] + counts.get(text, 0)]
        else:
            cells.append((p * total, counts.get(text, 0)))
    if pooled[0] > 0:
        cells.append(tuple(pooled))
    statistic = sum((observed - expected) ** 2 / expected for expected, observed in cells)
    p_value = _chi_square_tail(statistic, len(cells) - 1)
    failed = p_value < alpha
    message = (
        f"{where}: the texts' frequencies differ from the target's law, p-value {p_value:.2g} "
        f"(chi-square {statistic:.0f} with {len(cells) - 1} degrees of freedom); {described}"
    )
    return _Judged(abs(gaps[worst]), p_value, [message] if failed else [])


def _chi_square_tail(statistic: float, degrees: int) -> float:
    """P(chi-square >= statistic) in closed form, exact far into the tail."""
    if degrees == 0 or statistic <= 0:
        return 1.0
    half = statistic / 2
    # Sums of half^i e^-half / i! over whole i (even degrees) or half-odd i (odd ones).
    start, total = (0.0, 0.0) if degrees % 2 == 0 else (0.5, math.erfc(math.sqrt(half)))
    for i in np.arange(start, degrees / 2):
        total += math.exp(i * math.log(half) - half - math.lgamma(i + 1))
    return min(total, 1.0)


def _sampled_report(results: list[_Judged], false_alarm: float, causes: str) -> Report:
    ordered = sorted(results, key=lambda result: result.p_value)
    findings = [finding for result in ordered for finding in result.findings]
    shown = findings[:3]
    if len(findings) > 3:
        shown.append(f"and {len(findings) - 3} of {len(results)} cases more")
    if findings:
        shown.append(causes)
    return Report(
        lossless=not findings,
        method="chi-square",
        difference=max(result.difference for result in results),
        p_value=ordered[0].p_value,
        threshold=false_alarm / len(results),
        false_alarm=false_alarm,
        num_cases=len(results),
        findings=tuple(shown),
    )


_VERIFIER_CAUSES = (
    "typical causes: draft_probs that are not the law the draft tokens were drawn from (an argmax "
    "draft needs one-hot rows); a residual not clipped at zero, not normalised, or of the wrong "
    "place; acceptance with q/p instead of p/q; the bonus token drawn from the draft; temperature, "
    "top-k and top-p in another order than in plain sampling; division by a temperature of 0 "
    "instead of argmax"
)

_DECODER_CAUSES = (
    "typical causes: draft probabilities that are not the law the draft tokens were drawn from; a "
    "verifier that is not lossless (try check_verifier); a target cache with a wrong or missing "
    "entry; all rows advancing by the smallest accepted count; sampling settings that differ "
    "between drafting and verifying, or leak between rows; text after an end of sequence"
)


def _check_arguments(
    vocab_size: int, num_tokens: Sequence[int], dtype: str, num_repeats: int, false_alarm: float
) -> None:
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size} must be at least 2")
    if not num_tokens or min(num_tokens) < 0:
        raise ValueError(f"num_tokens={num_tokens!r} must hold integers of at least 0")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype={dtype!r} must be 'float32' or 'float64'")
    if num_repeats < 1:
        raise ValueError(f"num_repeats={num_repeats} must be at least 1")
    if not 0 < false_alarm < 1:
        raise ValueError(f"false_alarm={false_alarm} must be between 0 and 1")
