"""A draft with another tokenizer: what the two vocabularies share, and the draft's law on that."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from .types import LanguageModel


class SharedVocabulary(NamedTuple):
    """Which tokens two vocabularies share, as plain arrays: V of the target, U of the draft.

    to_draft: `[V]` int32, the draft's id of every target token; where it has none, of what the
      draft reads in its place.
    is_shared: `[V]` bool, whether it has one.
    to_target: `[U]` int32, the target's id of every draft token, -1 where it has none.
    """

    to_draft: Any
    is_shared: Any
    to_target: Any


class TranslatedParams(NamedTuple):
    """What `shared_vocabulary_model` takes as its weights.

    model: the draft model's own.
    vocabulary: from `translate_vocabulary`.
    """

    model: Any
    vocabulary: Any


Token = bytes | str | None


def translate_vocabulary(
    draft_tokens: Sequence[Token],
    target_tokens: Sequence[Token],
    *,
    same: Iterable[tuple[int, int]] = (),
    unknown_id: int = 0,
) -> SharedVocabulary:
    """Pairs the tokens that two vocabularies share; on the host.

    Two tokens are the same if they stand for the same bytes (or the same string: give both sides in
    one form, without marks for spaces that only one tokenizer uses). If a side has several ids for
    one text, the first counts. A target token without a counterpart is read by the draft as the
    longest draft token that its text ends with, for what comes next depends on the end most; if
    there is none, as `unknown_id`.

    Args:
      draft_tokens: text of every draft token by id; None or empty for ids that stand for nothing,
        such as those that only pad the vocabulary.
      target_tokens: likewise of the target.
      same: further pairs (draft id, target id), such as the ends of text under two names.
      unknown_id: as above, an id of the draft.

    Returns:
      A `SharedVocabulary` of JAX arrays, to be passed in `params["draft"]`.

    Raises:
      ValueError: an id is out of range, text is neither bytes nor a string, or nothing is shared.

    >>> shared = translate_vocabulary([b"a", b"b", b"c"], [b"c", b"ab", b"a"])
    >>> shared.to_draft.tolist(), shared.is_shared.tolist(), shared.to_target.tolist()
    ([2, 1, 0], [True, False, True], [2, -1, 0])
    """
    if not 0 <= unknown_id < len(draft_tokens):
        raise ValueError(f"unknown_id={unknown_id!r} must be in 0..{len(draft_tokens) - 1}")
    draft_ids = _first_ids("draft_tokens", draft_tokens)
    target_ids = _first_ids("target_tokens", target_tokens)
    to_target = [-1] * len(draft_tokens)
    to_draft = [-1] * len(target_tokens)
    pairs = [(draft_ids[text], index) for text, index in target_ids.items() if text in draft_ids]
    for draft_id, target_id in [*_checked(same, draft_tokens, target_tokens), *pairs]:
        # Pairs that are given come first: what they name is not paired again.
        if to_target[draft_id] < 0 and to_draft[target_id] < 0:
            to_target[draft_id], to_draft[target_id] = target_id, draft_id
    is_shared = [index >= 0 for index in to_draft]
    if not any(is_shared):
        raise ValueError("draft_tokens and target_tokens share no token")
    for target_id, token in enumerate(target_tokens):
        if not is_shared[target_id]:
            text = token or ""
            endings = (text[start:] for start in range(len(text)))
            found = (draft_ids[ending] for ending in endings if ending in draft_ids)
            to_draft[target_id] = next(found, unknown_id)
    return SharedVocabulary(
        to_draft=jnp.array(to_draft, jnp.int32),
        is_shared=jnp.array(is_shared),
        to_target=jnp.array(to_target, jnp.int32),
    )


class SharedVocabularyModel(NamedTuple):
    """A language model read and written in another's vocabulary; see `shared_vocabulary_model`.

    model: with its own vocabulary.
    """

    model: LanguageModel

    def init_cache(self, batch_size: int, max_len: int) -> Any:
        """The model's own."""
        return self.model.init_cache(batch_size, max_len)

    def apply(
        self, params: TranslatedParams, tokens: Array, positions: Array, cache: Any
    ) -> tuple[Array, Any]:
        """Logits `[B, T, V]` in the target's vocabulary, and the model's cache.

        Args:
          params: the model's and the vocabulary.
          tokens: `[B, T]` int32, of the target's vocabulary.
          positions: `[B, T]` int32.
          cache: the model's.
        """
        vocabulary = params.vocabulary
        own = jnp.take(vocabulary.to_draft, tokens, mode="clip")
        logits, cache = self.model.apply(params.model, own, positions, cache)
        if logits.shape[-1] != vocabulary.to_target.shape[0]:
            raise ValueError(
                f"the draft's logits are over {logits.shape[-1]} tokens, its vocabulary has "
                f"{vocabulary.to_target.shape[0]}"
            )
        found = jnp.take(logits, vocabulary.to_draft, axis=-1, mode="clip")
        hidden = jnp.full_like(found, _UNSHARED)
        return jnp.where(vocabulary.is_shared[None, None, :], found, hidden), cache


def shared_vocabulary_model(model: LanguageModel) -> SharedVocabularyModel:
    """A draft model as a language model over the target's vocabulary, for `model_drafter`.

    With q the draft's law and S the tokens that both vocabularies have, the tokens drawn have the
    law

        q'(x) = q(x) / sum(q(y) for y in S), 0 outside S

    (after temperature, top-k and top-p: those act on q'), which is what is reported, so that the
    output keeps exactly the target's law. Tokens outside S are never drafted; the target alone
    emits them. How much is accepted falls with the target's mass outside S.

    Weights are given as `TranslatedParams(model=..., vocabulary=translate_vocabulary(...))`.

    Args:
      model: the draft, with its own vocabulary.

    References:
      Timor et al., 2025, https://arxiv.org/abs/2502.05202 (token-level intersection).

    >>> import jax, jaxsd
    >>> from jaxsd import testing
    >>> target, draft = testing.MarkovModel(vocab_size=3), testing.MarkovModel(vocab_size=2)
    >>> vocabulary = translate_vocabulary(["b", "c"], ["a", "b", "c"])
    >>> weights = TranslatedParams(draft.init(jax.random.key(0)), vocabulary)
    >>> drafter = jaxsd.model_drafter(shared_vocabulary_model(draft), num_tokens=2)
    >>> decoder = jaxsd.speculative(target, drafter, max_len=8)
    >>> params = {"target": target.init(jax.random.key(1)), "draft": weights}
    >>> int(decoder.generate(params, [[0, 1]], None, jax.random.key(2)).lengths[0])
    8
    """
    return SharedVocabularyModel(model)


# The logit of a token that the draft does not have. Finite, so that a row in which nothing else is
# allowed is a law too; and so low that beside any other token it has probability 0.
_UNSHARED = -1e30


def _first_ids(name: str, tokens: Sequence[Token]) -> dict[bytes | str, int]:
    """The first id of every text."""
    ids: dict[bytes | str, int] = {}
    for index, text in enumerate(tokens):
        if text is not None and not isinstance(text, bytes | str):
            raise ValueError(f"{name}[{index}]={text!r} must be bytes, a string or None")
        if text:
            ids.setdefault(text, index)
    return ids


def _checked(
    same: Iterable[tuple[int, int]], draft_tokens: Sequence[Token], target_tokens: Sequence[Token]
) -> list[tuple[int, int]]:
    """The pairs given, all in range."""
    pairs = [(int(draft_id), int(target_id)) for draft_id, target_id in same]
    for draft_id, target_id in pairs:
        if not (0 <= draft_id < len(draft_tokens) and 0 <= target_id < len(target_tokens)):
            raise ValueError(
                f"same has ({draft_id}, {target_id}); wanted ids in 0..{len(draft_tokens) - 1} "
                f"and 0..{len(target_tokens) - 1}"
            )
    return pairs
