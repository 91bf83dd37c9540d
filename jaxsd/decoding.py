"""The loop: draft, verify, commit, until every row is done; one program, static shapes."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.typing import ArrayLike

from . import constraints as constraints_lib
from . import lengths as lengths_lib
from . import sampling as sampling_lib
from . import verifiers
from .constraints import NONE as NO_CONSTRAINTS
from .constraints import Constraints, Grammar
from .drafters import block_positions, read_prompts
from .lengths import LengthPolicy
from .types import (
    Decoder,
    DecodeState,
    Draft,
    Drafter,
    Generation,
    LanguageModel,
    LossyVerifier,
    Params,
    Proposal,
    Sampling,
    SharedState,
    Statistics,
    StepInfo,
    TreeLanguageModel,
    Verdict,
    Verifier,
)
from .verifiers import ancestors

GREEDY = Sampling()
"""The default: the target's argmax at every place."""

UNTIL_DONE = np.int32(np.iinfo(np.int32).max)
"""As many rounds as it takes: what `generate` passes to `run`."""


def speculative(
    target: LanguageModel,
    drafter: Drafter,
    verifier: Verifier | LossyVerifier = verifiers.block_verification,
    *,
    max_len: int,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
    grammar: Grammar | None = None,
    log_probs: bool = False,
    draft_lengths: Sequence[int] | None = None,
) -> Decoder:
    """Speculative decoding of `target` with tokens proposed by `drafter`.

    With a lossless verifier every row's text has exactly the law that plain sampling from the
    target has; greedy rows get the target's argmax at every place. In float32 greedy output equals
    that of `no_drafter()` token for token, except where the target's two largest logits are within
    rounding of each other (a pass over K + 1 tokens rounds differently from one over a single
    token).

    Arguments of this function are static; arguments of the returned functions are traced. Only
    shapes compile anew: batch size, padded prompt length (prefill alone), `max_len`, K. Pad prompts
    to a few lengths of your choice.

    Args:
      target: the model whose law the output has.
      drafter: who proposes; `no_drafter()` is plain decoding.
      verifier: who decides; by default the rule that accepts most of a chain. A tree needs one for
        trees; a `LossyVerifier` gives up exactness for speed, by a stated amount.
      max_len: length L of the token buffer, prompt included.
      eos_id: token id, or ids, that end a row; the row keeps the id and nothing after it.
      pad_id: fills the buffer beyond a row's length.
      grammar: which tokens may follow, by a function on the device.
      log_probs: also return the target's log-probability of every generated token; no extra pass.
      draft_lengths: lets a policy choose how many tokens every round drafts, from 0 to K. The
        target's pass is compiled for each of these lengths, which rise to K; a round that drafts
        fewer tokens takes the next. None: every round drafts K. For chains.

    Returns:
      A `Decoder`. Its `generate(params, prompts, prompt_lengths, key, *, sampling, max_new_tokens)`
      takes `params` as a dict by role (`{"target": ..., "draft": ...}`); prompts `[B, P]` padded on
      the right; lengths `[B]` or None if no row is padded; one key, or `[B]` keys, one per row, so
      that a row's text depends on its own key, prompt and settings alone; sampling fields and
      `max_new_tokens` scalar or `[B]`; `constraints` (penalties, biases, forbidden tokens, a
      least length, stop sequences: see `jaxsd.Constraints`); and `policy` (see `jaxsd.lengths`; by
      default K tokens a round). It stops a row at `eos_id`, at a stop sequence, after
      `max_new_tokens`, or when the buffer is full.

    Raises:
      ValueError: here or in the returned functions, before anything is traced, naming the argument,
        what came and what was wanted.

    References:
      Leviathan et al., 2022, https://arxiv.org/abs/2211.17192.

    >>> import jax, jaxsd
    >>> from jaxsd import testing
    >>> model = testing.MarkovModel(vocab_size=4)
    >>> params = {"target": model.init(jax.random.key(0)), "draft": model.init(jax.random.key(1))}
    >>> decoder = jaxsd.speculative(model, jaxsd.model_drafter(model, num_tokens=3), max_len=12)
    >>> out = decoder.generate(params, [[1, 2]], None, jax.random.key(2), max_new_tokens=6)
    >>> out.tokens.shape, int(out.lengths[0])
    ((1, 12), 8)
    """
    _check_integer("max_len", max_len, 1)
    _check_integer("pad_id", pad_id, 0)
    eos_ids = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    for one in eos_ids:
        _check_integer("eos_id", one, 0)
    num_tokens = drafter.num_tokens
    if drafter.depth is not None and not hasattr(target, "apply_tree"):
        raise ValueError(
            f"target={target!r} must have apply_tree and keep (jaxsd.TreeLanguageModel): "
            "this drafter proposes trees"
        )
    lengths_to_verify = (num_tokens,)
    if draft_lengths is not None:
        lengths_to_verify = lengths_lib.checked_lengths(draft_lengths, drafter)
    is_keyed_by_place = getattr(verifier, "shares_noise", False)
    is_lossy = getattr(verifier, "is_lossy", False)

    def init(
        params: Params,
        prompts: ArrayLike,
        prompt_lengths: ArrayLike | None,
        key: Array,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: ArrayLike | None = None,
        constraints: Constraints = NO_CONSTRAINTS,
        policy: LengthPolicy | None = None,
    ) -> DecodeState:
        _check_params(params, drafter)
        request = _checked_request(
            prompts, prompt_lengths, key, sampling, max_new_tokens, max_len, constraints
        )
        chosen = checked_policy(policy, len(request[0]))
        state = prefill(params, *request, chosen)
        # `run` takes over the memory of a state: no buffer of it is there twice or the caller's.
        seen = {id(leaf) for leaf in jax.tree.leaves((params, request, chosen))}

        def own(leaf: Array) -> Array:
            if id(leaf) in seen:
                return jnp.copy(leaf)
            seen.add(id(leaf))
            return leaf

        return jax.tree.map(own, state)

    def checked_policy(policy: LengthPolicy | None, batch_size: int) -> LengthPolicy | None:
        if draft_lengths is None:
            if policy is not None:
                raise ValueError(
                    "policy needs a decoder that can choose: speculative(..., draft_lengths=...)"
                )
            return None
        policy = lengths_lib.fixed_length(num_tokens) if policy is None else policy
        return lengths_lib.checked(policy, batch_size, num_tokens)

    def prefill(
        params: Params,
        prompts: Array,
        lengths: Array,
        key: Array,
        sampling: Sampling,
        new: Array,
        constraints: Constraints,
        policy: LengthPolicy | None,
    ) -> DecodeState:
        """Allocates every buffer at its final size and reads the prompts, in one pass per model."""
        batch_size, width = prompts.shape
        inside = jnp.arange(width, dtype=jnp.int32)[None, :] < lengths[:, None]
        tokens = jnp.full((batch_size, max_len), pad_id, jnp.int32)
        tokens = tokens.at[:, :width].set(jnp.where(inside, prompts, pad_id))
        # A block may begin at the last place of the buffer: K more slots keep every write in range.
        cache = target.init_cache(batch_size, max_len + num_tokens)
        cache = read_prompts(target, params["target"], cache, tokens[:, :width], lengths)
        block = (prompts, block_positions(prompts, lengths), cache)
        vocab_size = jax.eval_shape(target.apply, params["target"], *block)[0].shape[-1]
        state = drafter.init(params, batch_size, max_len)
        # Lengths are at least 1, so neither sum can wrap, however large the limit.
        limits = lengths + jnp.minimum(new, max_len - lengths)
        zeros = jnp.zeros((batch_size,), jnp.int32)
        return DecodeState(
            tokens=tokens,
            lengths=lengths,
            limits=limits,
            done=lengths >= limits,
            keys=_row_keys(key, batch_size),
            sampling=sampling,
            target_cache=cache,
            drafter_state=drafter.prefill(params, state, tokens[:, :width], lengths),
            stats=Statistics(
                num_rounds=zeros,
                num_drafted=zeros,
                num_accepted=zeros,
                accepted_by_position=jnp.zeros((batch_size, num_tokens), jnp.int32),
                accepted_by_node=jnp.zeros((batch_size, num_tokens), jnp.int32),
                loss=jnp.zeros((batch_size,), jnp.float32),
                drafted_by_position=jnp.zeros((batch_size, num_tokens), jnp.int32),
            ),
            rules=constraints_lib.begin(constraints, grammar, prompts, lengths, vocab_size),
            log_probs=jnp.zeros((batch_size, max_len), jnp.float32) if log_probs else None,
            policy=policy,
        )

    def step(params: Params, state: DecodeState) -> tuple[DecodeState, StepInfo]:
        active = ~state.done
        draft_keys, verify_keys = round_keys(state)
        count = None
        if state.policy is not None:
            # Before any token is drawn, from the past alone.
            count = lengths_lib.choose(state.policy, jnp.sum(active, dtype=jnp.int32))
        with jax.named_scope("draft"):
            proposal, proposed = propose(params, state, draft_keys, count)
            drafter_state, cache = proposal.state, state.target_cache
            if drafter.shares_target_cache:
                drafter_state, cache = proposal.state
        with jax.named_scope("verify"):
            verdict, scores, cache = verify(
                params, state, proposal, proposed, verify_keys, cache, count
            )

        hit = None
        if drafter.depth is not None:
            path = _path(verdict, proposal)[:, : drafter.depth]
            with jax.named_scope("keep"):
                cache = _tree_model(target).keep(
                    cache, state.lengths, state.lengths[:, None] + path
                )
                if drafter.keep is not None:
                    drafter_state = drafter.keep(drafter_state, state.lengths, path)
            depth = jnp.arange(drafter.depth, dtype=jnp.int32)
            is_accepted = (depth[None, :] < verdict.num_accepted[:, None]) & ~state.done[:, None]
            hit = path[:, :, None] == jnp.arange(num_tokens, dtype=jnp.int32)[None, None, :]
            hit = jnp.any(hit & is_accepted[:, :, None], axis=1)

        with jax.named_scope("commit"):
            tokens, committed, num_committed, done = commit(state, verdict)
            rules = state.rules
            if rules is not None:
                rules = constraints_lib.advance(rules, grammar, verdict.tokens, num_committed)
            if scores is not None:
                scores = write(cast(Array, state.log_probs), scores, state.lengths, num_committed)
            policy = state.policy
            if policy is not None:
                policy = lengths_lib.update(policy, verdict.num_accepted, proposed, active)
        counted = jnp.where(active, verdict.num_accepted, 0)
        info = StepInfo(
            tokens=committed,
            num_tokens=num_committed,
            num_drafted=jnp.where(active, jnp.sum(proposed, axis=1, dtype=jnp.int32), 0),
            num_accepted=counted,
            done=done,
        )
        reached = counted[:, None] > jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
        reached = reached.astype(jnp.int32)
        hit = reached if hit is None else hit.astype(jnp.int32)
        loss = cast(Array, state.stats.loss)
        stats = Statistics(
            num_rounds=state.stats.num_rounds + active.astype(jnp.int32),
            num_drafted=state.stats.num_drafted + info.num_drafted,
            num_accepted=state.stats.num_accepted + counted,
            accepted_by_position=state.stats.accepted_by_position + reached,
            accepted_by_node=cast(Array, state.stats.accepted_by_node) + hit,
            loss=loss if verdict.loss is None else jnp.where(active, loss + verdict.loss, loss),
            drafted_by_position=cast(Array, state.stats.drafted_by_position)
            + (proposed & active[:, None]).astype(jnp.int32),
        )
        state = state._replace(
            tokens=tokens,
            lengths=state.lengths + num_committed,
            done=done,
            target_cache=cache,
            drafter_state=drafter_state,
            stats=stats,
            rules=rules,
            log_probs=scores,
            policy=policy,
        )
        return state, info

    def propose(
        params: Params, state: DecodeState, keys: Array, count: Array | None
    ) -> tuple[Proposal, Array]:
        """What the drafter proposes, and where, `[B, K]`: nowhere beyond `count`."""
        drafter_state = state.drafter_state
        if drafter.shares_target_cache:
            drafter_state = SharedState(drafter_state, state.target_cache)
        sampling: Any = state.sampling
        if state.rules is not None:
            guide = constraints_lib.Guide(state.rules, grammar, eos_ids)
            temperature, top_k, top_p = state.sampling
            sampling = constraints_lib.GuidedSampling(temperature, top_k, top_p, guide)
        request = (params, drafter_state, state.tokens, state.lengths, keys, sampling)
        if count is None or drafter.propose_some is None:
            proposal = drafter.propose(*request)
        else:
            proposal = drafter.propose_some(*request, count)
        proposed = proposal.proposed
        if proposed is None:
            proposed = jnp.ones(proposal.tokens.shape, bool)
        if count is not None:
            proposed &= jnp.arange(num_tokens, dtype=jnp.int32)[None, :] < count
        return proposal, proposed

    def verify(
        params: Params,
        state: DecodeState,
        proposal: Proposal,
        proposed: Array,
        keys: Array,
        cache: Any,
        count: Array | None,
    ) -> tuple[Verdict, Array | None, Any]:
        """The verdict, the tokens' log-probabilities `[B, K + 1]` if asked for, and the cache."""
        last = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)

        def widened(verdict: Verdict, scores: Array | None) -> tuple[Verdict, Array | None]:
            """A verdict of a chain and its scores, in the shapes of one of K tokens."""

            def widen(values: Array) -> Array:
                return jnp.pad(values, ((0, 0), (0, num_tokens + 1 - values.shape[1])))

            tokens, num_accepted = widen(verdict.tokens), verdict.num_accepted
            loss = verdict.loss if is_lossy else None
            scores = None if scores is None else widen(scores)
            return Verdict(tokens, num_accepted, None, loss), scores

        def verify_first(length: int, cache: Any) -> tuple[Verdict, Array | None, Any]:
            """Of the first `length` tokens, beyond which nothing is proposed."""
            tokens = proposal.tokens[:, :length]
            block = jnp.concatenate([last, tokens], axis=1)  # [B, length + 1]
            logits, cache = score(params, state.lengths - 1, block, proposal.parents, cache)
            _check_logits(logits, block.shape)
            constrained = logits
            if state.rules is not None:
                constrained = constraints_lib.apply(
                    state.rules, grammar, logits, state.lengths, tokens, proposal.parents, eos_ids
                )
            target_probs = sampling_lib.probabilities(constrained, state.sampling)
            draft = _draft(proposal, proposed, target_probs)
            rule: Any = verifier  # a verifier or a lossy one
            spent = (state.stats.loss,) if is_lossy else ()
            round_keys = keys[:, : length + 1] if is_keyed_by_place else keys
            verdict: Verdict = jax.vmap(rule)(round_keys, target_probs, draft, *spent)
            scores = None if state.log_probs is None else _log_probs(logits, verdict)
            if count is not None:
                verdict, scores = widened(verdict, scores)
            return verdict, scores, cache

        if count is None:
            return verify_first(num_tokens, cache)
        # One loop for each length, of one turn or of none: of a conditional XLA copies the caches.
        chosen = lengths_lib.shortest_holding(lengths_to_verify, count)
        zeros = jnp.zeros_like(state.lengths)
        verdict = Verdict(zeros[:, None], zeros, loss=jnp.zeros_like(cast(Array, state.stats.loss)))
        scores = None if state.log_probs is None else state.log_probs[:, :1] * 0
        carry = (*widened(verdict, scores), cache)
        for index, length in enumerate(lengths_to_verify):
            turns = jnp.where(chosen == index, 1, 0)
            carry = lax.fori_loop(
                0, turns, lambda _, carry, length=length: verify_first(length, carry[2]), carry
            )
        return carry

    def round_keys(state: DecodeState) -> tuple[Array, Array]:
        """Keys `[B]` of the drafter and of the verifier, fresh in every round, or `[B, K + 1]`."""
        if is_keyed_by_place:
            place = state.lengths[:, None] + jnp.arange(num_tokens + 1, dtype=jnp.int32)[None, :]
            keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(state.keys, place)
            return keys, keys
        # A row's length grows every round, so folding it in makes a fresh key of the same row key.
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)
        draft_keys, verify_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
        return draft_keys, verify_keys

    def score(
        params: Params, starts: Array, block: Array, parents: Array | None, cache: Any
    ) -> tuple[Array, Any]:
        """The target's logits `[B, T, V]` after the last token and after every draft token."""
        if parents is None:
            offsets = jnp.arange(block.shape[1], dtype=jnp.int32)
            positions = starts[:, None] + offsets[None, :]
            return target.apply(params["target"], block, positions, cache)
        root = jnp.arange(num_tokens + 1)[None, :] == 0
        paths = jax.vmap(ancestors)(parents)
        seen = jnp.concatenate([jnp.broadcast_to(root, (len(paths), *root.shape)), paths], axis=1)
        positions = starts[:, None] + jnp.sum(seen, axis=2, dtype=jnp.int32) - 1
        return _tree_model(target).apply_tree(
            params["target"], block, positions, cache, starts, seen
        )

    def commit(state: DecodeState, verdict: Verdict) -> tuple[Array, Array, Array, Array]:
        """The only writer of the token buffer: ends rows exactly at an end id or at their limit.

        Returns the buffer, the committed tokens `[B, K + 1]`, their number and the new `done`.
        """
        place = jnp.arange(num_tokens + 1, dtype=jnp.int32)[None, :]
        is_end = jnp.zeros(verdict.tokens.shape, bool)
        for one in eos_ids:
            is_end |= verdict.tokens == one
        if state.rules is not None:
            is_end |= constraints_lib.stops(
                state.rules, state.tokens, state.lengths, verdict.tokens
            )
        is_end &= place <= verdict.num_accepted[:, None]
        room = state.limits - state.lengths
        num_committed = jnp.minimum(verdict.num_accepted + 1, room)
        until_end = jnp.min(jnp.where(is_end, place + 1, num_tokens + 2), axis=1)
        num_committed = jnp.where(state.done, 0, jnp.minimum(num_committed, until_end))
        ended = (until_end <= num_committed) | (state.lengths + num_committed >= state.limits)
        tokens = write(state.tokens, verdict.tokens, state.lengths, num_committed)
        committed = jnp.where(place < num_committed[:, None], verdict.tokens, pad_id)
        return tokens, committed, num_committed, state.done | ended

    def write(buffer: Array, values: Array, lengths: Array, count: Array) -> Array:
        """The first `count` `[B]` of `values` `[B, K + 1]` put behind every row's text."""
        place = jnp.arange(num_tokens + 1, dtype=jnp.int32)[None, :]
        # Places that are not written point past the buffer, where a write is dropped.
        index = jnp.where(place < count[:, None], lengths[:, None] + place, max_len)
        row = jnp.arange(buffer.shape[0], dtype=jnp.int32)[:, None]
        return buffer.at[row, index].set(values, mode="drop")

    def run(params: Params, state: DecodeState, max_rounds: Array) -> DecodeState:
        def is_unfinished(carry: tuple[DecodeState, Array]) -> Array:
            state, num_rounds = carry
            return (num_rounds < max_rounds) & ~jnp.all(state.done)

        def advance(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
            state, num_rounds = carry
            return step(params, state)[0], num_rounds + 1

        return lax.while_loop(is_unfinished, advance, (state, jnp.zeros((), jnp.int32)))[0]

    # Prefill and loop are two programs, so that a new padded prompt length compiles no new loop,
    # and the caches that prefill made are donated to the loop instead of copied into it.
    compiled_prefill = jax.jit(prefill)
    compiled_run = jax.jit(run, donate_argnums=1)

    def start(
        params: Params,
        prompts: ArrayLike,
        prompt_lengths: ArrayLike | None,
        key: Array,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: ArrayLike | None = None,
        constraints: Constraints = NO_CONSTRAINTS,
        policy: LengthPolicy | None = None,
    ) -> DecodeState:
        _check_params(params, drafter)
        request = _checked_request(
            prompts, prompt_lengths, key, sampling, max_new_tokens, max_len, constraints
        )
        chosen = checked_policy(policy, len(request[0]))
        return compiled_prefill(params, *request, chosen)

    def generate(
        params: Params,
        prompts: ArrayLike,
        prompt_lengths: ArrayLike | None,
        key: Array,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: ArrayLike | None = None,
        constraints: Constraints = NO_CONSTRAINTS,
        policy: LengthPolicy | None = None,
    ) -> Generation:
        state = start(
            params,
            prompts,
            prompt_lengths,
            key,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            constraints=constraints,
            policy=policy,
        )
        state = compiled_run(params, state, UNTIL_DONE)
        return Generation(state.tokens, state.lengths, state.stats, state.log_probs)

    def stream(
        params: Params,
        prompts: ArrayLike,
        prompt_lengths: ArrayLike | None,
        key: Array,
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: ArrayLike | None = None,
        constraints: Constraints = NO_CONSTRAINTS,
        policy: LengthPolicy | None = None,
    ) -> Iterator[StepInfo]:
        # Checked and prefilled at the call, not at the first `next`: errors belong to the caller.
        state = start(
            params,
            prompts,
            prompt_lengths,
            key,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            constraints=constraints,
            policy=policy,
        )
        return rounds(params, state)

    def rounds(params: Params, state: DecodeState) -> Iterator[StepInfo]:
        """The compiled loop, one round at a time, and what each round changed."""
        one = np.int32(1)
        place = np.arange(num_tokens + 1)[None, :]
        before = jax.tree.map(_to_host, (state.lengths, state.stats, state.done))
        while not np.all(before[2]):
            state = compiled_run(params, state, one)
            after = jax.tree.map(_to_host, (state.lengths, state.stats, state.done))
            index = before[0][:, None] + place
            buffer = _to_host(state.tokens)
            tokens: Any = np.take_along_axis(buffer, np.minimum(index, max_len - 1), axis=1)
            tokens = np.where(index < after[0][:, None], tokens, np.int32(pad_id))
            yield StepInfo(
                tokens=tokens,
                num_tokens=after[0] - before[0],
                num_drafted=after[1].num_drafted - before[1].num_drafted,
                num_accepted=after[1].num_accepted - before[1].num_accepted,
                done=after[2],
            )
            before = after

    return Decoder(
        generate=generate,
        stream=stream,
        start=start,
        run=compiled_run,
        init=init,
        step=step,
        num_tokens=num_tokens,
        max_len=max_len,
    )


def _to_host(array: Array) -> np.ndarray:
    """All of an array, though parts be with other processes, all of which call this together."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    # A copy: the state is donated, and on a CPU an array that was fetched is the buffer itself.
    return np.array(array)


def _draft(proposal: Proposal, proposed: Array, target_probs: Array) -> Draft:
    """The tokens that are judged, with their distributions filled in, `[B, T - 1, V]`."""
    size, vocab_size = target_probs.shape[1] - 1, target_probs.shape[2]
    tokens, proposed = proposal.tokens[:, :size], proposed[:, :size]
    if proposal.probs is None:
        probs = jax.nn.one_hot(tokens, vocab_size, dtype=target_probs.dtype)
    else:
        probs = proposal.probs[:, :size]
    if probs.shape[-1] != vocab_size:
        raise ValueError(
            f"the draft's vocabulary has {probs.shape[-1]} tokens, the target's {vocab_size}: "
            "draft and target must share one"
        )
    probs = jnp.where(proposed[..., None], probs, jnp.zeros_like(probs))
    return Draft(tokens=tokens, probs=probs, parents=proposal.parents)


def _log_probs(logits: Array, verdict: Verdict) -> Array:
    """The target's log-probabilities `[B, K + 1]` of a verdict's tokens, before any setting."""
    batch_size, width = verdict.tokens.shape
    rows = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], (batch_size, width))
    if verdict.path is not None:  # the token after a node is scored in the node's row
        rows = jnp.concatenate([rows[:, :1], verdict.path + 1], axis=1)
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    index = rows * logits.shape[2] + verdict.tokens
    return jnp.take_along_axis(scores.reshape(batch_size, -1), index, axis=1)


def _path(verdict: Verdict, proposal: Proposal) -> Array:
    """The accepted nodes `[B, K]` of a tree."""
    if verdict.path is None or proposal.parents is None:
        missing = "the verifier's verdict has no path" if verdict.path is None else "no parents"
        raise ValueError(
            f"{missing}: a drafter of trees needs a verifier of trees, such as "
            "jaxsd.recursive_rejection, and proposes with parents"
        )
    return verdict.path


def _tree_model(model: LanguageModel) -> TreeLanguageModel:
    """Checked for in `speculative`."""
    return cast(TreeLanguageModel, model)


def _row_keys(key: Array, batch_size: int) -> Array:
    """`[B]` keys: given, or the row's number folded into one, which does not depend on B."""
    if key.ndim:
        return key
    rows = jnp.arange(batch_size, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def _checked_request(
    prompts: ArrayLike,
    prompt_lengths: ArrayLike | None,
    key: Array,
    sampling: Sampling,
    max_new_tokens: ArrayLike | None,
    max_len: int,
    constraints: Constraints,
) -> tuple[Array, Array, Array, Sampling, Array, Constraints]:
    """The request as arrays of fixed types, so that no second call is traced anew.

    Concrete values are checked; traced ones (a caller that jits `init`) only in their shapes.
    """
    tokens = _as_integers("prompts", prompts)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(
            f"prompts has shape {tokens.shape}; wanted [batch, length] with at least one of each "
            "(a prompt has at least one token, such as a beginning or end of text)"
        )
    batch_size, width = tokens.shape
    if width > max_len:
        raise ValueError(f"max_len={max_len} must hold the prompts, padded to {width}")
    if prompt_lengths is None:
        prompt_lengths = np.full((batch_size,), width, np.int32)
    lengths = _rows("prompt_lengths", prompt_lengths, batch_size)
    _check_range("prompt_lengths", lengths, 1, width)
    if _is_concrete(tokens) and np.any(np.asarray(tokens) < 0):
        raise ValueError(f"prompts has token id {np.min(np.asarray(tokens))}; wanted at least 0")
    new = _rows("max_new_tokens", max_len if max_new_tokens is None else max_new_tokens, batch_size)
    _check_range("max_new_tokens", new, 0, None)

    sampling_lib.check_sampling(sampling)
    dtypes = (jnp.float32, jnp.int32, jnp.float32)
    fields = []
    for name, value, dtype in zip(sampling._fields, sampling, dtypes, strict=True):
        fields.append(_broadcast(f"sampling.{name}", value, batch_size).astype(dtype))

    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ValueError(f"key={key!r} must be made by jax.random.key (one, or one per row)")
    if key.shape not in ((), (batch_size,)):
        raise ValueError(f"key has shape {key.shape}; wanted () or one per row, ({batch_size},)")
    rules = constraints_lib.checked(constraints, batch_size)
    return tokens, lengths, key, Sampling(*fields), new, rules


def _is_concrete(value: object) -> bool:
    return not isinstance(value, Tracer)


def _as_integers(name: str, value: ArrayLike) -> Any:
    try:
        array = value if isinstance(value, jax.Array) else np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ValueError(
            f"{name} must be a rectangular array of integers, padded: {error}"
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {array.dtype}; wanted integers")
    return array.astype(np.int32)


def _broadcast(name: str, value: ArrayLike, batch_size: int) -> Any:
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if array.shape not in ((), (batch_size,)):
        raise ValueError(f"{name} has shape {array.shape}; wanted a scalar or ({batch_size},)")
    if isinstance(array, jax.Array):
        return jnp.broadcast_to(array, (batch_size,))
    return np.broadcast_to(array, (batch_size,))


def _rows(name: str, value: ArrayLike, batch_size: int) -> Any:
    # Clipped before the cast: a limit beyond int32 means "no limit", not a negative number.
    if not isinstance(value, jax.Array):
        value = np.clip(np.asarray(value), -1, np.iinfo(np.int32).max)
    return _as_integers(name, _broadcast(name, value, batch_size))


def _check_range(name: str, value: Any, low: int, high: int | None) -> None:
    if not _is_concrete(value):
        return
    host = np.asarray(value)
    wrong = (host < low) | (host > high if high is not None else False)
    if np.any(wrong):
        wanted = f"at least {low}" if high is None else f"in {low}..{high}"
        row = int(np.argmax(wrong))
        raise ValueError(f"{name}={host[row]} (row {row}) must be {wanted}")


def _check_integer(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} must be an integer of at least {low}")


def _check_params(params: Params, drafter: Drafter) -> None:
    wanted = ("target", *drafter.models)
    try:
        missing = [name for name in wanted if name not in params]
    except TypeError:
        missing = list(wanted)
    if missing:
        raise ValueError(
            f"params lacks {missing}; wanted a dict with the weights of {list(wanted)}"
        )


def _check_logits(logits: Array, block_shape: tuple[int, ...]) -> None:
    """The one check of what a caller's model returns."""
    if logits.ndim != 3 or logits.shape[:2] != block_shape:
        raise ValueError(
            f"target.apply returned logits of shape {logits.shape} for tokens of shape "
            f"{block_shape}; wanted [B, T, V]"
        )
