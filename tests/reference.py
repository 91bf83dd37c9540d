"""What the decoder should do, said slowly: plain Python and numpy, no cache, one row at a time."""

import numpy as np


def markov_logits(params, history, order):
    """Logits of `testing.MarkovModel` after `history`, straight from its table."""
    padded = [0] * order + [int(token) for token in history]
    return np.asarray(params)[tuple(padded[-order:])]


def greedy(next_logits, prompt, *, max_new_tokens, max_len, eos_ids=()):
    """One row: the argmax, again and again, from the whole text each time."""
    text = list(prompt)
    while len(text) < min(len(prompt) + max_new_tokens, max_len):
        text.append(int(np.argmax(next_logits(text))))
        if text[-1] in eos_ids:
            break
    return text


def smallest_margin(next_logits, text, prompt_length):
    """Smallest gap between the two largest logits over the places that were generated."""
    gaps = []
    for place in range(prompt_length, len(text)):
        second, first = np.sort(next_logits(text[:place]))[-2:]
        gaps.append(float(first - second))
    return min(gaps, default=np.inf)


def greedy_rounds(next_logits, propose, prompt, *, num_tokens, max_new_tokens, max_len, eos_ids=()):
    """One row decoded by greedy speculation: the text, and a recount of its statistics.

    `propose(text)` gives the tokens proposed after a text, at most `num_tokens`.
    """
    text = list(prompt)
    limit = min(len(prompt) + max_new_tokens, max_len)
    stats = {"num_rounds": 0, "num_drafted": 0, "num_accepted": 0}
    by_position = [0] * num_tokens
    ended = False
    while len(text) < limit and not ended:
        proposed = list(propose(text))
        accepted = []
        for token in proposed:
            if int(np.argmax(next_logits(text + accepted))) != token:
                break
            accepted.append(token)
        stats["num_rounds"] += 1
        stats["num_drafted"] += len(proposed)
        stats["num_accepted"] += len(accepted)
        for place in range(len(accepted)):
            by_position[place] += 1
        for token in [*accepted, int(np.argmax(next_logits(text + accepted)))]:
            if ended or len(text) == limit:
                break
            text.append(token)
            ended = token in eos_ids
    return text, stats | {"accepted_by_position": by_position}


def prompt_lookup(text, num_tokens, max_ngram, min_ngram):
    """What followed the latest earlier occurrence of the longest ending, again and again."""
    text = list(text)
    for size in range(max_ngram, min_ngram - 1, -1):
        ending = text[-size:]
        if len(ending) < size:
            continue
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == ending:
                tail = text[start + size :]
                return [tail[i % len(tail)] for i in range(num_tokens)]
    return []


def probabilities(logits, temperature, top_k, top_p):
    """One row: temperature, then top-k, then top-p, ties by the lower id; and top-p's margin."""
    logits = np.asarray(logits, np.float64)
    size = len(logits)
    if temperature == 0:
        return np.eye(size)[int(np.argmax(logits))], np.inf
    weights = np.exp((logits - logits.max()) / float(np.float32(temperature)))
    ranked = sorted(range(size), key=lambda token: (-logits[token], token))
    if top_k > 0:
        ranked = ranked[:top_k]
    margin = np.inf
    if top_p < 1:
        top_p = float(np.float32(top_p))
        mass = sum(weights[token] for token in ranked)
        kept, above = [], 0.0
        for token in ranked:
            margin = min(margin, abs(above / mass - top_p))
            if kept and above / mass >= top_p:
                break
            kept.append(token)
            above += weights[token]
        ranked = kept
    probs = np.zeros(size)
    probs[ranked] = weights[ranked] / weights[ranked].sum()
    return probs, margin
