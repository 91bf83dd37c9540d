"""A part of the target as its own draft: the same weights, the same cache, one prefill."""

from typing import Any

from jax import Array

from .draws import drawer, empty_chain, extend_chain
from .types import Drafter, LanguageModel, Params, Proposal, Sampling, SharedState


def early_exit_drafter(
    exit_model: LanguageModel, num_tokens: int, *, shares_noise: bool = False
) -> Drafter:
    """Drafts with a part of the target, in the target's own cache; the output keeps its law.

    The cache already holds what the part needs of all committed tokens but the last: each round
    begins with that one token, and nothing is prefilled or kept apart. What drafting writes beyond
    the committed text, the target's own pass over the same tokens writes anew.

    Args:
      exit_model: the part: a language model whose `apply` takes the target's weights and the
        target's cache and returns that cache, the block written wherever the part itself reads
        (other layers may be left as they are). `jaxsd.models.exit_early` makes one of the first
        layers of a transformer.
      num_tokens: K, at least 1.
      shares_noise: draws with the random numbers that `gumbel_coupling` draws the target's tokens
        with; for that verifier alone.

    Raises:
      ValueError: if `num_tokens` is not an integer of at least 1.

    References:
      Elhoushi et al., 2024, LayerSkip, https://arxiv.org/abs/2404.16710, section 4.3; the part is
      of use as far as the target was trained to be read there.

    >>> import jax, jaxsd
    >>> from jaxsd import testing
    >>> model = testing.MarkovModel(vocab_size=3)
    >>> drafter = early_exit_drafter(model, num_tokens=2)  # all of the target: always right
    >>> decoder = jaxsd.speculative(model, drafter, max_len=11)
    >>> params = {"target": model.init(jax.random.key(0))}
    >>> out = decoder.generate(params, [[1, 2]], None, jax.random.key(1))
    >>> int(out.stats.num_rounds[0]), int(out.stats.num_accepted[0])
    (3, 6)
    """
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens!r} must be an integer of at least 1")

    def init(params: Params, batch_size: int, max_len: int) -> tuple[()]:
        del params, batch_size, max_len
        return ()

    def prefill(params: Params, state: tuple[()], prompts: Array, lengths: Array) -> tuple[()]:
        del params, prompts, lengths
        return state

    def propose(
        params: Params,
        state: SharedState,
        tokens: Array,
        lengths: Array,
        keys: Array,
        sampling: Sampling,
        count: Array | int = num_tokens,
    ) -> Proposal:
        rules, draw = drawer(keys, sampling, lengths, shares_noise=shares_noise)
        weights = params["target"]

        def score(cache: Any, token: Array, index: Array | int) -> tuple[Array, Any]:
            positions = (lengths - 1 + index)[:, None]
            logits, cache = exit_model.apply(weights, token[:, None], positions, cache)
            return logits[:, 0], cache

        chain = empty_chain(
            exit_model, weights, state.target_cache, tokens, lengths, num_tokens, rules
        )
        chain = extend_chain(chain, score, draw, 0, count)
        return Proposal(
            tokens=chain.tokens,
            probs=chain.probs,
            proposed=None,
            state=SharedState(state.own, chain.cache),
        )

    return Drafter(
        num_tokens,
        (),
        init,
        prefill,
        propose,
        shares_target_cache=True,
        propose_some=propose,
    )
