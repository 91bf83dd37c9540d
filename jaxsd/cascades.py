"""Speculation inside the draft: something cheaper drafts for the draft model."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import constraints as constraints_lib
from . import sampling as sampling_lib
from . import verifiers
from .drafters import read_prompts
from .draws import law_shape
from .types import Draft, Drafter, LanguageModel, Params, Proposal, Sampling, Verifier


class CascadeState(NamedTuple):
    """What a cascade carries from round to round.

    cache: the draft model's.
    num_read: `[B]` int32, tokens of the text that the cache holds, up to the first that the target
      did not take.
    num_passes: `[B]` int32, passes of the draft model in which the row still lacked tokens, since
      the prompt was read; model_drafter makes K in every round.
    """

    cache: Any
    num_read: Array
    num_passes: Array


def cascade_drafter(
    model: LanguageModel,
    inner_drafter: Drafter,
    num_tokens: int,
    *,
    verifier: Verifier = verifiers.block_verification,
    name: str = "draft",
) -> Drafter:
    """A small language model drafts, itself sped up by a drafter of its own.

    In every round the inner drafter proposes k tokens, one pass of the draft model over k + 1
    tokens decides how many stand and adds one, and so on until every row has K. Inner verification
    is lossless and stops at the fixed K, so the K tokens have exactly the law that `model_drafter`
    draws them with, and the reported `probs` are the very rows they were verified against: what the
    target accepts does not change, only what the draft costs. With a accepted tokens a pass on
    average, K / (1 + a) passes instead of K; never more than K, and ceil(K / (k + 1)) at best,
    apart from one token less in the first pass of a round that follows a full acceptance. The
    passes of a batch are those of its slowest row. `CascadeState.num_passes` counts them.

    It pays where a pass over k + 1 tokens costs about as much as one over a single token: not for
    a tiny draft on a CPU.

    Args:
      model: the draft model; it shares the target's vocabulary.
      inner_drafter: proposes chains and keeps no cache: `prompt_lookup`, `ngram_drafter`.
      num_tokens: K, at least 1.
      verifier: decides between the inner drafter and the draft model; lossless.
      name: the entry of `params` with the draft model's weights.

    Raises:
      ValueError: if `num_tokens` is not an integer of at least 1, or inner drafter or verifier are
        not of the kind described.

    References:
      Spector and Re, 2023, https://arxiv.org/abs/2308.04623 (staged speculation); Chen et al.,
      2023, https://arxiv.org/abs/2312.11462 (vertical cascades).

    >>> import jaxsd
    >>> from jaxsd import testing
    >>> model = testing.MarkovModel(vocab_size=4)
    >>> drafter = cascade_drafter(model, jaxsd.prompt_lookup(num_tokens=2), num_tokens=3)
    >>> decoder = jaxsd.speculative(model, drafter, max_len=12)
    >>> params = {"target": model.init(jax.random.key(0)), "draft": model.init(jax.random.key(1))}
    >>> int(decoder.generate(params, [[1, 2]], None, jax.random.key(2)).lengths[0])
    12
    """
    _check(inner_drafter, num_tokens, verifier)
    width = inner_drafter.num_tokens  # k

    def init(params: Params, batch_size: int, max_len: int) -> CascadeState:
        if jax.tree.leaves(inner_drafter.init(params, batch_size, max_len + num_tokens)):
            raise ValueError("inner_drafter must keep no state from round to round")
        zeros = jnp.zeros((batch_size,), jnp.int32)
        return CascadeState(
            model.init_cache(batch_size, max_len + num_tokens + width), zeros, zeros
        )

    def prefill(
        params: Params, state: CascadeState, prompts: Array, lengths: Array
    ) -> CascadeState:
        cache = read_prompts(model, params[name], state.cache, prompts, lengths)
        return state._replace(cache=cache, num_read=lengths)

    def propose(
        params: Params,
        state: CascadeState,
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
    ) -> Proposal:
        if keys.ndim == 2:
            raise ValueError("a cascade shares no noise with the verifier, as gumbel_coupling asks")
        guide = getattr(sampling, "guide", None)
        batch_size = tokens.shape[0]
        own_state = inner_drafter.init(params, batch_size, tokens.shape[1] + num_tokens)
        ends = lengths + num_tokens
        rows = jnp.arange(batch_size, dtype=jnp.int32)[:, None]
        place = jnp.arange(width + 1, dtype=jnp.int32)[None, :]

        def is_unfinished(carry: _Carry) -> Array:
            return jnp.any(carry.lengths < ends)

        def advance(carry: _Carry) -> _Carry:
            now = carry.lengths
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, carry.num_steps)
            inner_keys, verify_keys = jnp.unstack(jax.vmap(jax.random.split)(step_keys), axis=1)
            settings = sampling
            if guide is not None:
                settings = sampling._replace(guide=guide._replace(rules=carry.rules))
            proposal = inner_drafter.propose(
                params, own_state, carry.tokens, now, inner_keys, settings
            )

            # The last token but one is read again where the cache does not hold it.
            missed = jnp.clip(now - 1 - carry.num_read, 0, jnp.minimum(now - 1, 1))[:, None]
            behind = jnp.maximum(now[:, None] - 2 + jnp.arange(2, dtype=jnp.int32)[None, :], 0)
            last_two = jnp.take_along_axis(carry.tokens, behind, axis=1)
            candidates = jnp.concatenate([last_two, proposal.tokens], axis=1)  # [B, k + 2]
            block = jnp.take_along_axis(candidates, 1 - missed + place, axis=1)
            positions = now[:, None] - 1 - missed + place
            logits, cache = model.apply(params[name], block, positions, carry.cache)
            # Row i is what follows i proposals; the last is there twice where one token was missed.
            after = jnp.minimum(missed + place, width)[:, :, None]
            logits = jnp.take_along_axis(logits, after, axis=1)
            if guide is not None:
                logits = constraints_lib.apply(
                    carry.rules, guide.grammar, logits, now, proposal.tokens, None, guide.eos_ids
                )
            probs = sampling_lib.probabilities(logits, sampling)  # [B, k + 1, V]
            inner_probs = _law(proposal, probs, place[:, :width] < width - missed)
            verdict = jax.vmap(verifier)(verify_keys, probs, Draft(proposal.tokens, inner_probs))

            is_open = now < ends
            count = jnp.minimum(jnp.where(is_open, verdict.num_accepted + 1, 0), ends - now)
            inside = place < count[:, None]
            index = jnp.where(inside, now[:, None] + place, carry.tokens.shape[1])
            written = carry.tokens.at[rows, index].set(verdict.tokens, mode="drop")
            # Where the row's i-th draft token is new, its law is row i - (now - lengths) of these.
            source = jnp.arange(num_tokens, dtype=jnp.int32)[None, :] - (now - lengths)[:, None]
            is_new = (source >= 0) & (source < count[:, None])
            found = jnp.take_along_axis(probs, jnp.clip(source, 0, width)[:, :, None], axis=1)
            rules = carry.rules
            if guide is not None:
                rules = constraints_lib.advance(rules, guide.grammar, verdict.tokens, count)
            return _Carry(
                tokens=written,
                lengths=now + count,
                laws=jnp.where(is_new[:, :, None], found, carry.laws),
                cache=cache,
                num_read=jnp.minimum(
                    now + jnp.where(is_open, verdict.num_accepted, 0), now + count
                ),
                num_passes=carry.num_passes + is_open.astype(jnp.int32),
                num_steps=carry.num_steps + 1,
                rules=rules,
            )

        room = jnp.zeros((batch_size, num_tokens), tokens.dtype)
        law = law_shape(model, params[name], state.cache, tokens, lengths)
        start = _Carry(
            tokens=jnp.concatenate([tokens, room], axis=1),
            lengths=lengths,
            laws=jnp.zeros((batch_size, num_tokens, law.shape[-1]), law.dtype),
            cache=state.cache,
            # Tokens of the last round that the target did not take are not the text's.
            num_read=jnp.minimum(state.num_read, lengths - 1),
            num_passes=state.num_passes,
            num_steps=jnp.zeros((), jnp.int32),
            rules=None if guide is None else guide.rules,
        )
        done = lax.while_loop(is_unfinished, advance, start)
        drafted = lengths[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
        return Proposal(
            tokens=jnp.take_along_axis(done.tokens, drafted, axis=1),
            probs=done.laws,
            proposed=None,
            state=CascadeState(done.cache, done.num_read, done.num_passes),
        )

    return Drafter(num_tokens, (name, *inner_drafter.models), init, prefill, propose)


class _Carry(NamedTuple):
    """One row's way from its committed text to K tokens more, batched.

    tokens: `[B, L + K]` int32, the text and what was drafted.
    lengths: `[B]` int32.
    laws: `[B, K, V]` float32, what each drafted token was drawn from.
    cache: the draft model's.
    num_read: `[B]` int32, tokens that it holds.
    num_passes: `[B]` int32.
    num_steps: `[]` int32.
    rules: of constraints, or None.
    """

    tokens: Array
    lengths: Array
    laws: Array
    cache: Any
    num_read: Array
    num_passes: Array
    num_steps: Array
    rules: Any


def _law(proposal: Proposal, probs: Array, is_read: Array) -> Array:
    """What the inner proposals were drawn from, `[B, k, V]`; zero where none is to be judged."""
    law = proposal.probs
    if law is None:
        law = jax.nn.one_hot(proposal.tokens, probs.shape[-1], dtype=probs.dtype)
    if law.shape[-1] != probs.shape[-1]:
        raise ValueError(
            f"the inner drafter's vocabulary has {law.shape[-1]} tokens, the draft model's "
            f"{probs.shape[-1]}: they must share one"
        )
    if proposal.proposed is not None:
        is_read = is_read & proposal.proposed
    return jnp.where(is_read[:, :, None], law, jnp.zeros_like(law))


def _check(inner_drafter: Drafter, num_tokens: int, verifier: Verifier) -> None:
    """Raises ValueError if the parts do not fit together."""
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens!r} must be an integer of at least 1")
    if inner_drafter.num_tokens < 1:
        raise ValueError("inner_drafter must propose at least one token")
    if inner_drafter.depth is not None or inner_drafter.shares_target_cache:
        raise ValueError("inner_drafter must propose chains and share no cache with the target")
    if getattr(verifier, "is_lossy", False) or getattr(verifier, "shares_noise", False):
        raise ValueError("verifier must be lossless and draw with its own key")
