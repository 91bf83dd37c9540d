"""Who decides: from a draft and the target's distributions to the tokens that stand.

For a chain `rejection_sampling` and `block_verification`; for trees, of which a chain is one,
`recursive_rejection`, `traversal_verification`, `k_sequential`, `target_matching` and
`gumbel_coupling`. All are lossless: the emitted tokens have exactly the target's law.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import sampling
from .types import Draft, Verdict, shares_noise


def rejection_sampling(key: Array, target_probs: Array, draft: Draft) -> Verdict:
    """Accepts a draft token with probability min(1, p / q); the output is exactly the target's law.

    With p the target's and q the draft's distribution at a place, the token x drawn from q is kept
    with probability min(1, p(x) / q(x)). At the first rejection the token is recovered from
    max(0, p - q) / sum(max(0, p - q)) and the rest of the draft is dropped. If all K are kept, one
    bonus token is drawn from the target after them. On average a place is kept with probability
    sum(min(p, q)), the most any rule can do that looks at one drawn token at a time.

    Args:
      key: consumed.
      target_probs: `[K + 1, V]`; row i is the target's distribution after i draft tokens.
      draft: tokens `[K]` and the distributions `[K, V]` they were drawn from.

    Returns:
      tokens `[K + 1]`, accepted, then recovered or bonus, then zeros; and how many were accepted.

    References:
      Leviathan et al., 2022, https://arxiv.org/abs/2211.17192, algorithm 1;
      Chen et al., 2023, https://arxiv.org/abs/2302.01318, algorithm 2.

    >>> import jax, jax.numpy as jnp
    >>> target = jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> draft = Draft(tokens=jnp.array([1]), probs=jnp.array([[0.2, 0.8, 0.0]]))
    >>> verdict = rejection_sampling(jax.random.key(0), target, draft)
    >>> verdict.tokens.tolist(), int(verdict.num_accepted)
    ([1, 2], 1)
    """
    accept_key, token_key = jax.random.split(key)
    num_tokens = draft.tokens.shape[0]
    ratio = _ratio(_at(target_probs[:num_tokens], draft.tokens), _at(draft.probs, draft.tokens))
    accepted = jax.random.bernoulli(accept_key, jnp.minimum(ratio, 1.0))
    num_accepted = jnp.sum(jnp.cumprod(accepted.astype(jnp.int32)))

    # A row of zeros after the last draft makes the bonus token the residual of nothing.
    nothing = jnp.zeros((1, target_probs.shape[-1]), draft.probs.dtype)
    draft_probs = jnp.concatenate([draft.probs, nothing])
    residual = _residual(target_probs[num_accepted], draft_probs[num_accepted])
    token = sampling.categorical(token_key, residual)
    return verdict(draft.tokens, num_accepted, token)


def block_verification(key: Array, target_probs: Array, draft: Draft) -> Verdict:
    """Accepts as much of a chain as any lossless rule can; the output is exactly the target's law.

    A token's fate depends on those drafted after it. With p_i the target's and q_i the draft's
    distribution after i of the drafted tokens X_1 .. X_K,

        w_0 = 1,  w_i = min(1, w_{i-1} p_{i-1}(X_i) / q_{i-1}(X_i))
        S_i = sum(max(0, w_i p_i - q_i)),  h_i = S_i / (S_i + 1 - w_i),  h_K = w_K

    X_1 .. X_i is kept for the largest i whose own coin of chance h_i falls well. The next token is
    drawn from max(0, w_i p_i - q_i), normalised, or from p_K after all K. P(at least i kept) is
    the mean of w_i; for `rejection_sampling` it is that of the product of min(1, p / q), which is
    never more. At temperature 0, and for K = 1, the two rules are one.

    Args:
      key: consumed.
      target_probs: `[K + 1, V]`; row i is the target's distribution after i draft tokens.
      draft: a chain: tokens `[K]` and the distributions `[K, V]` they were drawn from.

    Returns:
      tokens `[K + 1]`, accepted, then one drawn, then zeros; and how many were accepted.

    References:
      Sun et al., 2024, https://arxiv.org/abs/2403.10444, algorithm 2.

    >>> import jax, jax.numpy as jnp
    >>> target = jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> draft = Draft(tokens=jnp.array([1]), probs=jnp.array([[0.2, 0.8, 0.0]]))
    >>> verdict = block_verification(jax.random.key(0), target, draft)
    >>> verdict.tokens.tolist(), int(verdict.num_accepted)
    ([1, 2], 1)
    """
    accept_key, token_key = jax.random.split(key)
    ratio = _ratio(_at(target_probs[:-1], draft.tokens), _at(draft.probs, draft.tokens))
    weight = jnp.ones((), target_probs.dtype)
    weights = [weight]
    for one in ratio:
        weight = jnp.minimum(weight * one, 1.0)
        weights.append(weight)
    weights = jnp.stack(weights)
    # A row of zeros after the last draft makes h_K = w_K and the bonus token a residual of nothing.
    nothing = jnp.zeros((1, target_probs.shape[-1]), draft.probs.dtype)
    draft_probs = jnp.concatenate([draft.probs, nothing])
    residual = jnp.maximum(weights[:, None] * target_probs - draft_probs, 0.0)
    total = jnp.sum(residual, axis=-1)
    accepted = jax.random.bernoulli(accept_key, _block_chance(total, weights)[1:])
    place = jnp.arange(1, len(weights), dtype=jnp.int32)
    num_accepted = jnp.max(jnp.where(accepted, place, 0), initial=0)
    law = jnp.where(total[num_accepted] > 0, residual[num_accepted], target_probs[num_accepted])
    token = sampling.categorical(token_key, law / jnp.sum(law))
    return verdict(draft.tokens, num_accepted, token)


def recursive_rejection(key: Array, target_probs: Array, draft: Draft) -> Verdict:
    """Tries siblings in turn, each against what the earlier ones left; exactly the target's law.

    At a node let R be the target's distribution. A child x drawn from q is accepted with
    probability min(1, R(x) / q(x)); after a rejection R becomes max(0, R - q), normalised, and the
    next sibling is tried. When all are rejected, or there are none, a token is drawn from R.

    What this is depends on how siblings were drawn, which `draft.probs` says: independently, it is
    SpecInfer's rule, and on several chains from one root the batch algorithm of 2411.00841; without
    replacement, RSD's and Sequoia's, which accepts every token that was drafted if all were;
    chosen, one-hot, a match with a token of the target. On a chain it is `rejection_sampling`.

    Args:
      key: consumed.
      target_probs: `[K + 1, V]`; row 0 after the committed text, row i + 1 after node i.
      draft: a chain or a tree.

    Returns:
      tokens `[K + 1]`, accepted, then one drawn, then zeros; how many were accepted; their places.

    References:
      Miao et al., 2023, https://arxiv.org/abs/2305.09781; Yin et al., 2024,
      https://arxiv.org/abs/2411.00841, algorithm 4; Jeon et al., 2024,
      https://arxiv.org/abs/2402.14160; Chen et al., 2024, https://arxiv.org/abs/2402.12374.

    >>> import jax, jax.numpy as jnp
    >>> target = jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> draft = Draft(jnp.array([1, 2]), jnp.eye(3)[jnp.array([1, 2])], jnp.array([-1, -1]))
    >>> verdict = recursive_rejection(jax.random.key(0), target, draft)
    >>> verdict.tokens.tolist(), int(verdict.num_accepted), int(verdict.path[0])
    ([2, 1, 0], 1, 1)
    """
    num_tokens = draft.tokens.shape[0]
    if num_tokens == 0:
        return rejection_sampling(key, target_probs, draft)
    keys = jax.random.split(key, num_tokens + 1)

    def attempt(carry: tuple[Array, Array], node: tuple) -> tuple[tuple[Array, Array], Array]:
        current, residual = carry
        index, parent, token, probs, after, node_key = node
        is_child = parent == current
        chance = jnp.minimum(_ratio(residual[token], probs[token]), 1.0)
        accepted = jax.random.bernoulli(node_key, jnp.where(is_child, chance, 0.0))
        left = jnp.where(is_child, _residual(residual, probs), residual)
        carry = jnp.where(accepted, index, current), jnp.where(accepted, after, left)
        return carry, accepted

    index = jnp.arange(num_tokens, dtype=jnp.int32)
    nodes = (index, _parents(draft), draft.tokens, draft.probs, target_probs[1:], keys[:-1])
    start = (jnp.int32(-1), target_probs[0])
    (_, residual), accepted = lax.scan(attempt, start, nodes)
    return _tree_verdict(draft, accepted, sampling.categorical(keys[-1], residual))


def traversal_verification(key: Array, target_probs: Array, draft: Draft) -> Verdict:
    """Block verification on trees, from the leaves up; the output is exactly the target's law.

    Nodes are visited children first, siblings in their order. With the weight w, the target's
    distribution B and the distribution q a child x was drawn from, a child's weight is

        w_child = min(1, w B(x) / q(x)),  1 at the root

    A node is accepted with probability w, and with it all above it; the next token is drawn from
    its B. After a rejection its parent is left with

        S = sum(max(0, w B - q)),  B <- max(0, w B - q) / S,  w <- S / (S + 1 - w)

    and later siblings are weighed against that. On a chain it is `block_verification`. It mostly
    accepts more than `recursive_rejection` of the same tree, and costs a sequential step per node.

    Args:
      key: consumed.
      target_probs: `[K + 1, V]`; row 0 after the committed text, row i + 1 after node i.
      draft: a chain or a tree; siblings drawn independently, without replacement, or chosen.

    Returns:
      tokens `[K + 1]`, accepted, then one drawn, then zeros; how many were accepted; their places.

    References:
      Weng et al., 2025, https://arxiv.org/abs/2505.12398.

    >>> import jax, jax.numpy as jnp
    >>> target = jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> draft = Draft(jnp.array([1, 2]), jnp.eye(3)[jnp.array([1, 2])], jnp.array([-1, -1]))
    >>> verdict = traversal_verification(jax.random.key(0), target, draft)
    >>> verdict.tokens.tolist(), int(verdict.num_accepted), int(verdict.path[0])
    ([2, 1, 0], 1, 1)
    """
    num_tokens = draft.tokens.shape[0]
    if num_tokens == 0:
        return rejection_sampling(key, target_probs, draft)
    keys = jax.random.split(key, num_tokens + 1)
    # Index 0 is the root, i + 1 node i. The root's own token and law are never looked at.
    parents = jnp.concatenate([jnp.zeros((1,), jnp.int32), _parents(draft) + 1])
    tokens = jnp.concatenate([jnp.zeros((1,), draft.tokens.dtype), draft.tokens])
    nothing = jnp.zeros((1, target_probs.shape[-1]), draft.probs.dtype)
    draft_probs = jnp.concatenate([nothing, draft.probs])
    above = jnp.concatenate([jnp.zeros((1, num_tokens + 1), bool), ancestors(_parents(draft))])
    above = above.at[0, 0].set(True)
    enter_at, exit_at = _depth_first(parents, above)
    entered_order, exited_order = (jnp.argsort(at).astype(jnp.int32) for at in (enter_at, exit_at))
    ones = jnp.ones((num_tokens + 1,), target_probs.dtype)

    def visit(carry: tuple, step: tuple) -> tuple[tuple, None]:
        weights, laws, num_entered, chosen = carry
        node, step_key = step

        # Weighs this leaf and what lies above it and was not met yet, from the top down.
        def weigh(at: Array, weights: Array) -> Array:
            index = entered_order[at]
            parent, token = parents[index], tokens[index]
            ratio = _ratio(laws[parent, token], draft_probs[index, token])
            return weights.at[index].set(jnp.minimum(weights[parent] * ratio, 1.0))

        last = jnp.maximum(enter_at[node] + 1, num_entered)
        weights = lax.fori_loop(num_entered, last, weigh, weights)
        accepted = jax.random.bernoulli(step_key, weights[node]) & (chosen == 0)
        parent = parents[node]
        residual = jnp.maximum(weights[parent] * laws[parent] - draft_probs[node], 0.0)
        total = jnp.sum(residual)
        law = residual / jnp.where(total > 0, total, jnp.ones_like(total))
        laws = laws.at[parent].set(jnp.where(total > 0, law, laws[parent]))
        weights = weights.at[parent].set(_block_chance(total, weights[parent]))
        return (weights, laws, last, jnp.where(accepted, node, chosen)), None

    # The root comes last and is accepted if nothing else was.
    start = (ones, target_probs, jnp.int32(1), jnp.int32(0))
    (_, laws, _, chosen), _ = lax.scan(visit, start, (exited_order[:-1], keys[:-1]))
    # Once a node is accepted its own law stays: only what comes later in its subtree's order, its
    # ancestors, is changed.
    token = sampling.categorical(keys[-1], laws[chosen])
    return _tree_verdict(draft, above[chosen, 1:], token)


def k_sequential(key: Array, target_probs: Array, draft: Draft) -> Verdict:
    """SpecTr's rule for independent siblings; the output is exactly the target's law.

    Each of the k children x of a node, all drawn from one q, is accepted with probability
    min(1, p(x) / (g q(x))), with one threshold g in [1, k] for all of them: the least for which

        1 - (1 - b)^k <= g b,  b = sum(min(q, p / g))

    When all are rejected the token is drawn from p - min(q, p / g) (1 - (1 - b)^k) / b. A node is
    accepted with chance 1 - (1 - b)^k, at least 1 - 1/e of what optimal transport reaches.

    Args:
      key: consumed.
      target_probs: `[K + 1, V]`; row 0 after the committed text, row i + 1 after node i.
      draft: a chain or a tree whose siblings were drawn independently from one distribution; for
        others the law is wrong.

    Returns:
      tokens `[K + 1]`, accepted, then one drawn, then zeros; how many were accepted; their places.

    References:
      Sun et al., 2023, https://arxiv.org/abs/2310.15141, algorithm 2.
    """
    num_tokens = draft.tokens.shape[0]
    if num_tokens == 0:
        return rejection_sampling(key, target_probs, draft)
    keys = jax.random.split(key, num_tokens + 1)
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    parents = _parents(draft)
    is_proposed = jnp.any(draft.probs > 0, axis=-1)
    # Of every node and the root: how many children it has, and the law they were drawn from.
    nodes_and_root = jnp.arange(-1, num_tokens, dtype=jnp.int32)
    is_child = (parents[None, :] == nodes_and_root[:, None]) & is_proposed[None, :]
    count = jnp.sum(is_child, axis=1)
    padded = jnp.concatenate([draft.probs, jnp.zeros_like(target_probs[:1])])
    first = jnp.min(jnp.where(is_child, index[None, :], num_tokens), axis=1)
    threshold, left = jax.vmap(_sequential_threshold)(target_probs, padded[first], count)

    def attempt(current: Array, node: tuple) -> tuple[Array, Array]:
        index, parent, token, probs, node_key = node
        scaled = threshold[current + 1] * probs[token]
        chance = jnp.minimum(_ratio(target_probs[current + 1, token], scaled), 1.0)
        is_tried = parent == current
        accepted = jax.random.bernoulli(node_key, jnp.where(is_tried, chance, 0.0))
        return jnp.where(accepted, index, current), accepted

    nodes = (index, parents, draft.tokens, draft.probs, keys[:-1])
    current, accepted = lax.scan(attempt, jnp.int32(-1), nodes)
    return _tree_verdict(draft, accepted, sampling.categorical(keys[-1], left[current + 1]))


def target_matching(key: Array, target_probs: Array, draft: Draft) -> Verdict:
    """Draws from the target and follows its draws down the draft; exactly the target's law.

    A token is drawn at every node, from the target alone. From the root on, while a child has the
    token drawn at its parent, that child is accepted; the first draw that no child has is emitted
    after them. A node goes on with the target's probability of its children: all that can be had
    when they are chosen, one-hot; less than `recursive_rejection` when they are drawn. It needs no
    draft probabilities, and is lossless even if those given are wrong.

    Args:
      key: consumed.
      target_probs: `[K + 1, V]`; row 0 after the committed text, row i + 1 after node i.
      draft: a chain or a tree.

    Returns:
      tokens `[K + 1]`, accepted, then one drawn, then zeros; how many were accepted; their places.

    >>> import jax, jax.numpy as jnp
    >>> target = jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> draft = Draft(jnp.array([1, 2]), jnp.eye(3)[jnp.array([1, 2])], jnp.array([-1, -1]))
    >>> target_matching(jax.random.key(0), target, draft).tokens.tolist()
    [2, 1, 0]
    """
    return _follow(draft, sampling.categorical(key, target_probs))


@shares_noise
def gumbel_coupling(key: Array, target_probs: Array, draft: Draft) -> Verdict:
    """Draft and target draw with the same random numbers; the text depends on the seed alone.

    At every place of the text one vector of Gumbel noise, that of the row's key and the place, is
    added to the target's log-probabilities, and the largest wins. A drafter that draws with the
    same noise (`model_drafter(..., shares_noise=True)`) often draws the same token:

        P(same) = sum_x 1 / sum_y max(q(y) / q(x), p(y) / p(x)) >= (1 - TV) / (1 + TV)

    The emitted text has exactly the target's law, and is the same text whatever the drafter, K and
    batch, that of plain decoding with this verifier included (up to rounding of the target's
    logits). It accepts less than `rejection_sampling`.

    Args:
      key: `[K + 1]`, the key of every place from the first drafted one on; consumed.
      target_probs: `[K + 1, V]`; row 0 after the committed text, row i + 1 after node i.
      draft: a chain or a tree. Its probabilities are not used.

    Returns:
      tokens `[K + 1]`, accepted, then one drawn, then zeros; how many were accepted; their places.

    References:
      Daliri et al., 2024, https://arxiv.org/abs/2408.07978.
    """
    depth = jnp.sum(ancestors(_parents(draft))[:, 1:], axis=1, dtype=jnp.int32)
    keys = key[jnp.concatenate([jnp.zeros((1,), depth.dtype), depth])]
    return _follow(draft, lax.map(lambda row: shared_categorical(*row), (keys, target_probs)))


def shared_categorical(key: Array, probs: Array) -> Array:
    """A token of one row `[V]` by Gumbel noise, alike for whoever draws with the same key."""
    return jax.random.categorical(key, jnp.log(probs)).astype(jnp.int32)


def optimal_acceptance(target_probs: Array, draft_probs: Array, num_drafts: int) -> Array:
    """The most that any lossless rule accepts at one place of independent drafts: a bound.

    By the transport problem's dual, over sets H of tokens,

        1 + min_H [ p(H) - q(H)^k ]

    whose best set holds the tokens of smallest p / q: one sort.

    Args:
      target_probs: `[..., V]`, p.
      draft_probs: `[..., V]`, q, from which all drafts are drawn independently.
      num_drafts: k, at least 1; for 1 it is sum(min(p, q)).

    Returns:
      `[...]` in [0, 1].

    References:
      Sun et al., 2023, https://arxiv.org/abs/2310.15141; Khisti et al., 2024,
      https://arxiv.org/abs/2410.18234; the closed form by max-flow and min-cut.

    >>> p, q = jnp.array([0.2, 0.3, 0.5]), jnp.array([0.5, 0.3, 0.2])
    >>> [round(float(optimal_acceptance(p, q, k)), 3) for k in (1, 2)]
    [0.7, 0.86]
    """
    ratio = jnp.where(draft_probs > 0, _ratio(target_probs, draft_probs), jnp.inf)
    order = jnp.argsort(ratio, axis=-1)
    inside_target = jnp.cumsum(jnp.take_along_axis(target_probs, order, axis=-1), axis=-1)
    inside_draft = jnp.cumsum(jnp.take_along_axis(draft_probs, order, axis=-1), axis=-1)
    gap = jnp.min(inside_target - inside_draft**num_drafts, axis=-1)
    return jnp.clip(1.0 + jnp.minimum(gap, 0.0), 0.0, 1.0)


def ancestors(parents: Array) -> Array:
    """Which nodes lie on every node's path, itself and the root included: `[K, K + 1]` bool.

    Column 0 is the root, column i + 1 node i.

    >>> ancestors(jnp.array([-1, -1, 0])).astype(int).tolist()
    [[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    """
    num_tokens = parents.shape[0]
    above = jnp.eye(num_tokens + 1, dtype=bool)
    above = above.at[jnp.arange(1, num_tokens + 1), parents + 1].set(True)
    reached = 1
    while reached < num_tokens:  # paths twice as long with every product
        above = (above.astype(jnp.float32) @ above.astype(jnp.float32)) > 0
        reached *= 2
    return above[1:]


def verdict(draft_tokens: Array, num_accepted: Array, token: Array) -> Verdict:
    """Lays out a decision: the first `num_accepted` draft tokens, then `token`, then zeros."""
    place = jnp.arange(draft_tokens.shape[0] + 1, dtype=jnp.int32)
    num_accepted = num_accepted.astype(jnp.int32)
    padded = jnp.concatenate([draft_tokens, jnp.zeros((1,), draft_tokens.dtype)])
    after = jnp.where(place == num_accepted, token, jnp.zeros_like(token))
    return Verdict(
        tokens=jnp.where(place < num_accepted, padded, after).astype(jnp.int32),
        num_accepted=num_accepted,
    )


def _parents(draft: Draft) -> Array:
    """`[K]` parents, those of a chain if none are given."""
    if draft.parents is None:
        return jnp.arange(-1, draft.tokens.shape[0] - 1, dtype=jnp.int32)
    return draft.parents


def _tree_verdict(draft: Draft, accepted: Array, token: Array) -> Verdict:
    """Lays out a decision for the accepted nodes `[K]` bool of one path."""
    num_tokens = draft.tokens.shape[0]
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    # A path's nodes rise, so sorting them to the front puts them in order.
    path = jnp.sort(jnp.where(accepted, index, num_tokens))
    path = jnp.minimum(path, max(num_tokens - 1, 0))
    decided = verdict(draft.tokens[path], jnp.sum(accepted, dtype=jnp.int32), token)
    return decided if draft.parents is None else decided._replace(path=path)


def _follow(draft: Draft, drawn: Array) -> Verdict:
    """Goes down from the root while a child has the token `drawn[parent + 1]`."""
    num_tokens = draft.tokens.shape[0]
    parents = _parents(draft)
    # Nothing that was not proposed is followed; of equal siblings the first.
    matches = (draft.tokens == drawn[parents + 1]) & jnp.any(draft.probs > 0, axis=-1)
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    is_same = (parents[None, :] == parents[:, None]) & matches[None, :] & matches[:, None]
    matches &= ~jnp.any(is_same & (index[None, :] < index[:, None]), axis=1)
    reached = jnp.concatenate([jnp.ones((1,), bool), matches])
    accepted = jnp.all(reached[None, :] | ~ancestors(parents), axis=1)
    last = jnp.max(jnp.where(accepted, index + 1, 0), initial=0)
    return _tree_verdict(draft, accepted, drawn[last])


def _depth_first(parents: Array, above: Array) -> tuple[Array, Array]:
    """When a walk over the tree enters and leaves every node, root included: ranks `[K + 1]`."""
    index = jnp.arange(len(parents), dtype=jnp.int32)
    size = jnp.sum(above, axis=0, dtype=jnp.int32)  # of every node's subtree
    is_elder = (parents[None, :] == parents[:, None]) & (index[None, :] < index[:, None])
    is_elder &= index[None, :] > 0  # the root, whose parent is itself, is nobody's sibling
    before = jnp.sum(jnp.where(is_elder, size[None, :], 0), axis=1, dtype=jnp.int32)
    depth = jnp.sum(above, axis=1, dtype=jnp.int32) - 1
    enter = jnp.sum(jnp.where(above, before[None, :], 0), axis=1, dtype=jnp.int32) + depth
    return enter, enter + size - 1 - depth


def _sequential_threshold(
    target_probs: Array, draft_probs: Array, count: Array
) -> tuple[Array, Array]:
    """K-SEQ at one node: the threshold, and the law when all children are rejected.

    The threshold is found from above, to the last bit, so that the residual is never negative.
    """
    count = count.astype(target_probs.dtype)

    def accepted(threshold: Array) -> tuple[Array, Array, Array]:
        taken = jnp.minimum(draft_probs, target_probs / threshold)
        mass = jnp.clip(jnp.sum(taken), 0.0, 1.0)
        return taken, mass, 1.0 - (1.0 - mass) ** count

    def halve(step: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        del step
        low, high = bounds
        middle = 0.5 * (low + high)
        _, mass, total = accepted(middle)
        enough = total <= middle * mass
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    one = jnp.ones_like(count)
    steps = jnp.finfo(target_probs.dtype).nmant + 2
    _, threshold = lax.fori_loop(0, steps, halve, (one, jnp.maximum(count, one)))
    threshold = jnp.where(count <= 1, one, threshold)
    taken, mass, total = accepted(threshold)
    share = _ratio(total, mass)
    residual = jnp.maximum(target_probs - share * taken, 0.0)
    left = jnp.sum(residual)
    residual = jnp.where(left > 0, residual / jnp.where(left > 0, left, 1.0), target_probs)
    return threshold, residual


def _block_chance(total: Array, weight: Array) -> Array:
    """S / (S + 1 - w), the chance of block verification; 1 where nothing is left on either side."""
    out_of = total + (1.0 - weight)
    return jnp.where(out_of > 0, total / jnp.where(out_of > 0, out_of, 1.0), 1.0)


def _at(probs: Array, tokens: Array) -> Array:
    """`probs[i, tokens[i]]`."""
    return jnp.take_along_axis(probs, tokens[:, None], axis=-1)[:, 0]


def _ratio(target: Array, draft: Array) -> Array:
    """p / q; 0 where q is 0: nothing was drawn, so nothing can be kept."""
    is_drawn = draft > 0
    return jnp.where(is_drawn, target / jnp.where(is_drawn, draft, jnp.ones_like(draft)), 0.0)


def _residual(target_probs: Array, draft_probs: Array) -> Array:
    """max(0, p - q) normalised `[V]`; p itself where p = q, and nothing is ever rejected."""
    residual = jnp.maximum(target_probs - draft_probs, 0.0)
    total = jnp.sum(residual)
    normalised = residual / jnp.where(total > 0, total, jnp.ones_like(total))
    return jnp.where(total > 0, normalised, target_probs)
