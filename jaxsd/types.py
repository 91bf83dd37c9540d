"""What passes between the parts of a decoder: protocols and pytrees, and no algorithm.

Shape letters: B batch, T block, L token buffer, P prompt, K draft tokens per round, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from jax import Array
from jax.typing import ArrayLike

Params = Any
"""Weights of every model of a decoder, by role: `{"target": ..., "draft": ...}`."""


class LanguageModel(Protocol):
    """A causal language model as two pure functions; any object with these attributes is one.

    The cache has no cursor. Where a block stands is told by `positions`, so taking back tokens is
    nothing but a smaller length.
    """

    def init_cache(self, batch_size: int, max_len: int, /) -> Any:
        """A pytree with room for `max_len` positions of `batch_size` rows, contents arbitrary."""
        ...

    def apply(
        self, params: Any, tokens: Array, positions: Array, cache: Any, /
    ) -> tuple[Array, Any]:
        """Scores a block of tokens and remembers it.

        Args:
          params: weights of this model.
          tokens: `[B, T]` int32.
          positions: `[B, T]` int32, consecutive within a row: `positions[b, 0] + t` at t.
          cache: what `init_cache` or the previous `apply` returned.

        Returns:
          logits `[B, T, V]`, and a cache of the same structure, shapes and types that also holds
          this block. The query at position i sees positions 0..i and no other: slots at or above
          the block's start may hold anything, of this text or of another.
        """
        ...


class TreeLanguageModel(LanguageModel, Protocol):
    """A language model that can also score a tree of tokens: what draft trees ask for.

    The tree's tokens lie one after the other in the cache, from the slot `starts` on; a token's
    position in the text is its depth's, so siblings share one.
    """

    def apply_tree(
        self,
        params: Any,
        tokens: Array,
        positions: Array,
        cache: Any,
        starts: Array,
        seen: Array,
        /,
    ) -> tuple[Array, Any]:
        """Scores some nodes of a tree and remembers them.

        Args:
          params: weights of this model.
          tokens: `[B, T]` int32, nodes W - T to W - 1 of a tree whose earlier ones were scored.
          positions: `[B, T]` int32; a node's parent is one before it, the tree's first is at
            `starts`.
          cache: what an earlier call returned.
          starts: `[B]` int32; slots below hold the text before the tree and are seen by all.
          seen: `[B, T, W]` bool, whether a node sees slot `starts + w`: those on its path, and
            itself.

        Returns:
          logits `[B, T, V]`, and a cache that also holds these nodes, at slots `starts + W - T` on.
        """
        ...

    def keep(self, cache: Any, starts: Array, sources: Array, /) -> Any:
        """Moves the accepted path to the front: slot `sources[b, d]` to `starts[b] + d`.

        Args:
          cache: with a tree in it.
          starts: `[B]` int32.
          sources: `[B, D]` int32; `sources[b, d] >= starts[b] + d`.
        """
        ...


class Sampling(NamedTuple):
    """How logits become the distribution a token is drawn from.

    Each field is a number for all rows, or `[B]`, one per row. All are traced: changing them never
    recompiles, and greedy and sampled rows mix in one batch.

    temperature: divides the logits; 0 is greedy (all mass on the first largest logit).
    top_k: keeps the k most probable tokens; 0 is off.
    top_p: then keeps the smallest set of most probable tokens with at least this mass; 1 is off.
    """

    temperature: ArrayLike = 0.0
    top_k: ArrayLike = 0
    top_p: ArrayLike = 1.0


class Draft(NamedTuple):
    """Proposed tokens of one row: a chain, or a tree of alternatives.

    tokens: `[K]` int32.
    probs: `[K, V]` float32, the distribution each token was drawn from: one-hot if it was not drawn
      but chosen, all zero if nothing was proposed at this place (and so nothing can be accepted).
      In a tree it is the distribution given the tokens above and the siblings before: for siblings
      drawn without replacement, what was left of the draft's distribution.
    parents: `[K]` int32, the node that each token follows, -1 for the row's last committed token;
      a parent comes before its children. None is a chain, `-1, 0, 1, ...`.
    """

    tokens: Array
    probs: Array
    parents: Array | None = None


class Verdict(NamedTuple):
    """What a verifier made of a draft.

    tokens: `[K + 1]` int32, the accepted tokens, then the recovered or the bonus token, then zeros.
    num_accepted: `[]` int32 in 0..K.
    path: `[K]` int32, the accepted tokens' places in a tree, from the root on, then anything; None
      for a chain.
    loss: `[]` float32, sum over the emitted places of the total variation between what was drawn
      from there and the target's law; None for a lossless verifier, where it is 0.
    """

    tokens: Array
    num_accepted: Array
    path: Array | None = None
    loss: Array | None = None


class Verifier(Protocol):
    """Decides which draft tokens stand, for one row; lifted over the batch with `vmap`.

    A lossless verifier's tokens are distributed as the target's own, whatever the draft. One marked
    by `shares_noise` is given `[K + 1]` keys, which the drafter has too.
    """

    def __call__(self, key: Array, target_probs: Array, draft: Draft, /) -> Verdict:
        """`key` is consumed; `target_probs` is `[K + 1, V]`, row 0 after the committed text, row
        i + 1 after draft token i (and, in a tree, those above it)."""
        ...


class LossyVerifier(Protocol):
    """Decides which draft tokens stand, with a stated bias; marked by `is_lossy = True`.

    Its verdict has a `loss`. By the chain rule the law of a whole text is within the expected sum
    of losses of the target's, in total variation; where the rule keeps every row's sum below a
    bound, within that bound.
    """

    @property
    def is_lossy(self) -> bool: ...

    def __call__(self, key: Array, target_probs: Array, draft: Draft, spent: Array, /) -> Verdict:
        """As of `Verifier`; `spent` is `[]` float32, the row's sum of losses before this round."""
        ...


def shares_noise(verifier: Verifier) -> Verifier:
    """Marks a verifier that draws every place of the text with that place's own key.

    It then gets `[K + 1]` keys instead of one: those of the row and of the places to be filled, the
    same in every round, with every drafter and without one. The drafter is given them as well.
    """
    verifier.shares_noise = True  # pyright: ignore[reportAttributeAccessIssue]
    return verifier


class Proposal(NamedTuple):
    """What a drafter returns for the whole batch.

    tokens: `[B, K]` int32.
    probs: `[B, K, V]` as in `Draft`, or None if every token was chosen and not drawn.
    proposed: `[B, K]` bool, whether there is a proposal at each place, or None if everywhere.
    state: the drafter's state to carry to the next round.
    parents: `[B, K]` int32 as in `Draft`, or None for chains.
    """

    tokens: Array
    probs: Array | None
    proposed: Array | None
    state: Any
    parents: Array | None = None


class DrafterInit(Protocol):
    """Allocates the drafter's state: `max_len` committed tokens and `num_tokens` beyond."""

    def __call__(self, params: Params, batch_size: int, max_len: int, /) -> Any: ...


class DrafterPrefill(Protocol):
    """Reads the prompts `[B, P]` with `lengths` `[B]`; what lies beyond a length is padding."""

    def __call__(self, params: Params, state: Any, prompts: Array, lengths: Array, /) -> Any: ...


class DrafterPropose(Protocol):
    """Proposes the tokens that follow each row.

    Args: params; state; tokens `[B, L]`; lengths `[B]` at least 1; keys `[B]`, consumed; sampling
    with `[B]` fields. What lies in `tokens` beyond a row's length must not matter.
    """

    def __call__(
        self,
        params: Params,
        state: Any,
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
        /,
    ) -> Proposal: ...


class DrafterProposeSome(Protocol):
    """Proposes `count` `[]` int32 tokens after each row, 0 to K; what it returns beyond is ignored.

    With 0 no pass of a model is made, so that texts may have grown by several tokens since the
    drafter last read them. The count is chosen before: it depends on nothing of this round.
    """

    def __call__(
        self,
        params: Params,
        state: Any,
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
        count: Array,
        /,
    ) -> Proposal: ...


class DrafterKeep(Protocol):
    """Told which nodes of its tree were accepted, so that its cache can follow.

    Args: state; lengths `[B]`, before the round; path `[B, D]`, nodes from the root down, of which
    the accepted ones count.
    """

    def __call__(self, state: Any, lengths: Array, path: Array, /) -> Any: ...


class Drafter(NamedTuple):
    """Who proposes, as pure functions over an explicit state.

    num_tokens: K, tokens proposed per round; static.
    models: names under which `params` must hold this drafter's weights.
    depth: longest path of its trees; None if it proposes chains.
    keep: for trees, if the state has a cache.
    shares_target_cache: `propose` is given a `SharedState` and returns one: it drafts with the
      target's own layers and cache.
    propose_some: used in place of `propose`, in every round, where a policy chooses the length.
      Without it all K tokens are proposed and those beyond the length are ignored, unseen.
    """

    num_tokens: int
    models: tuple[str, ...]
    init: DrafterInit
    prefill: DrafterPrefill
    propose: DrafterPropose
    depth: int | None = None
    keep: DrafterKeep | None = None
    shares_target_cache: bool = False
    propose_some: DrafterProposeSome | None = None


class SharedState(NamedTuple):
    """What a drafter that shares the target's cache is given and returns.

    own: its own state, as `init` and `prefill` made it.
    target_cache: holds all committed tokens but the last; what is written beyond them, the target
      writes anew.
    """

    own: Any
    target_cache: Any


class Statistics(NamedTuple):
    """Totals over a generation, per row.

    num_rounds: `[B]` int32, target passes in which the row was still active.
    num_drafted: `[B]` int32, tokens proposed in those rounds.
    num_accepted: `[B]` int32, tokens the verifier accepted, also those that an end of sequence or a
      limit inside the block then hid.
    accepted_by_position: `[B, K]` int32, rounds in which at least i + 1 tokens were accepted.
    accepted_by_node: `[B, K]` int32, rounds in which node i of the draft tree was accepted; for
      chains the same.
    loss: `[B]` float32, sum of the verifier's losses: the total variation between the row's law and
      the target's is at most its mean over seeds. 0 for a lossless verifier.
    drafted_by_position: `[B, K]` int32, rounds in which something was proposed at place i.
    """

    num_rounds: Array
    num_drafted: Array
    num_accepted: Array
    accepted_by_position: Array
    accepted_by_node: Array | tuple[()] = ()
    loss: Array | tuple[()] = ()
    drafted_by_position: Array | tuple[()] = ()


class StepInfo(NamedTuple):
    """What one round did, per row; all zero for a row that was done before it.

    tokens: `[B, K + 1]` int32, the tokens committed, then `pad_id`.
    num_tokens: `[B]` int32, how many were committed.
    num_drafted: `[B]` int32.
    num_accepted: `[B]` int32, accepted by the verifier; the first of `tokens` are these.
    done: `[B]` bool, whether the row has ended.
    """

    tokens: Array
    num_tokens: Array
    num_drafted: Array
    num_accepted: Array
    done: Array


class DecodeState(NamedTuple):
    """Everything one round needs and returns.

    tokens: `[B, L]` int32, prompt and generated tokens, `pad_id` beyond `lengths`.
    lengths: `[B]` int32, tokens committed so far.
    limits: `[B]` int32, the length at which the row must stop.
    done: `[B]` bool.
    keys: `[B]` random keys, one per row, never consumed: a round folds the row's length into it.
    sampling: with `[B]` fields.
    target_cache: holds all committed tokens but the last.
    drafter_state: the drafter's.
    stats: totals so far.
    rules: `jaxsd.constraints.Rules`, or None.
    log_probs: `[B, L]` float32 as in `Generation`, or None.
    policy: `jaxsd.LengthPolicy` with what it has learned, or None.
    """

    tokens: Array
    lengths: Array
    limits: Array
    done: Array
    keys: Array
    sampling: Sampling
    target_cache: Any
    drafter_state: Any
    stats: Statistics
    rules: Any = None
    log_probs: Array | None = None
    policy: Any = None


class Generation(NamedTuple):
    """The finished batch.

    tokens: `[B, max_len]` int32, prompt, then generated tokens, then `pad_id`.
    lengths: `[B]` int32, prompt and generated tokens.
    stats: totals per row.
    log_probs: `[B, max_len]` float32, of every generated token under the target, given the text
      before it: of the model itself, before constraints, temperature and filters; 0 elsewhere. None
      if they were not asked for.
    """

    tokens: Array
    lengths: Array
    stats: Statistics
    log_probs: Array | None = None


class DecoderInit(Protocol):
    """`init(params, prompts, prompt_lengths, key, ...)`: a prefilled state."""

    def __call__(
        self,
        params: Params,
        prompts: ArrayLike,
        prompt_lengths: ArrayLike | None,
        key: Array,
        *,
        sampling: Sampling = ...,
        max_new_tokens: ArrayLike | None = ...,
        constraints: Any = ...,
        policy: Any = ...,
    ) -> DecodeState: ...


class DecoderStep(Protocol):
    """`step(params, state)`: one round of draft, verify and commit. Pure and not jitted."""

    def __call__(self, params: Params, state: DecodeState) -> tuple[DecodeState, StepInfo]: ...


class DecoderGenerate(Protocol):
    """`generate(...)`: the whole loop, compiled."""

    def __call__(
        self,
        params: Params,
        prompts: ArrayLike,
        prompt_lengths: ArrayLike | None,
        key: Array,
        *,
        sampling: Sampling = ...,
        max_new_tokens: ArrayLike | None = ...,
        constraints: Any = ...,
        policy: Any = ...,
    ) -> Generation: ...


class DecoderStream(Protocol):
    """`stream(...)`: the same rounds one by one, as NumPy arrays, for showing text as it comes."""

    def __call__(
        self,
        params: Params,
        prompts: ArrayLike,
        prompt_lengths: ArrayLike | None,
        key: Array,
        *,
        sampling: Sampling = ...,
        max_new_tokens: ArrayLike | None = ...,
        constraints: Any = ...,
        policy: Any = ...,
    ) -> Iterator[StepInfo]: ...


class DecoderRun(Protocol):
    """`run(params, state, max_rounds)`: the compiled loop from a state on.

    Stops when every row is done, or after `max_rounds` rounds (traced; `UNTIL_DONE` for all of
    them). The buffers of `state` are donated: use the returned state from then on.
    """

    def __call__(
        self, params: Params, state: DecodeState, max_rounds: ArrayLike
    ) -> DecodeState: ...

    def lower(self, params: Params, state: DecodeState, max_rounds: Any) -> Any:
        """As of any `jax.jit` function: the program before compilation, from arrays or shapes."""
        ...


class Decoder(NamedTuple):
    """What `speculative` returns.

    generate: prompts to finished batch: `start`, then `run`.
    stream: prompts to an iterator over rounds, by the same two compiled programs.
    start: prompts to a prefilled `DecodeState`, compiled.
    run: the compiled loop; a `jax.jit` function, so it can be lowered ahead of time.
    init: as `start`, not compiled.
    step: one round, not compiled, for loops of your own.
    num_tokens: K.
    max_len: length of the token buffer.
    """

    generate: DecoderGenerate
    stream: DecoderStream
    start: DecoderInit
    run: DecoderRun
    init: DecoderInit
    step: DecoderStep
    num_tokens: int
    max_len: int
