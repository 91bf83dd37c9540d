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
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from . import trees as tree_lib
from .cases import Case, chain_parents, function_cases, target_law, verifier_cases
from .replay import CannotReplay, Runs, freeze, lanes, one_by_one, walk
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
            cases += verifier_cases(rng, vocab_size, chain_parents(length), "independent", dtype)
        for parents in topologies:
            has_siblings = len(set(parents)) < len(parents)
            for kind in siblings if has_siblings else siblings[:1]:
                cases += verifier_cases(rng, vocab_size, parents, kind, dtype)
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
            cases += function_cases(rng, vocab_size, length, dtype, sampling, chosen_drafts)

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
        law = target_law(target, params["target"], prompt, setting, num_new_tokens, ends)
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
        for outcome, weight, replay in walk(sample, one, max_paths):
            keys = [np.asarray(data).tobytes() for data in replay.keys]
            if len(set(keys)) < len(keys):
                raise ValueError(f"a key is used twice, among draws by {replay.samplers}")
            used |= set(keys)
            law[freeze(outcome)] = law.get(freeze(outcome), 0.0) + weight
        runs.append((law, used))
    if runs[0][1] & runs[1][1]:
        raise ValueError("a draw does not depend on the key given")
    if runs[0][0] != runs[1][0]:
        raise ValueError("the outcome depends on the key beyond the draws that can be replayed")
    return dict(sorted(runs[0][0].items(), key=lambda item: repr(item[0])))


# ---- Judging


class _Judged(NamedTuple):
    """One case's result: its largest difference, its p-value (1 if exact), what is wrong."""

    difference: float
    p_value: float
    findings: list[str]


def _check(
    emit: Callable[..., tuple[Any, Any, Any]],
    cases: list[Case],
    dtype: str,
    seed: int,
    false_alarm: float,
    *,
    strict_layout: bool,
) -> Report:
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        try:
            return _check_exactly(emit, cases, dtype, strict_layout)
        except CannotReplay as error:
            report = _check_by_samples(emit, cases, seed, false_alarm, strict_layout)
            return report._replace(note=str(error))


def _check_exactly(
    emit: Callable[..., tuple[Any, Any, Any]], cases: list[Case], dtype: str, strict_layout: bool
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


_Outputs = list[tuple[Case, tuple[np.ndarray, ...], np.ndarray, np.ndarray]]


def _enumerate(
    emit: Callable[..., tuple[Any, Any, Any]], cases: list[Case]
) -> tuple[_Outputs, list[str]]:
    """For every case all outputs: (tokens `[M, K + 1]`, num_accepted, path), weight, draft."""
    try:
        return _enumerate_with(lanes, emit, cases)
    except _EngineFailed:  # it wants concrete values, or no two runs draw alike: fewer, one by one
        one_of_a_kind = list({case.name: case for case in cases}.values())
        try:
            return _enumerate_with(one_by_one, emit, one_of_a_kind)
        except _EngineFailed as error:
            raise CannotReplay(str(error)) from error


class _EngineFailed(Exception):
    """The function could not be run so; if it is just broken, running it on samples raises too."""


def _enumerate_with(
    engine: Callable[..., Runs], emit: Callable[..., tuple[Any, Any, Any]], cases: list[Case]
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
    case: Case,
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
    cases: list[Case],
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
    case: Case,
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
