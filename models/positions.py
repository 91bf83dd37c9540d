"""Where a token is: which others it may see, and how its queries and keys are rotated.

A layer's *window* is how many tokens it sees back, itself included; 0 is all of them. The cache is
whole whatever the windows, so masks are all that differ between layers.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from .configs import Config, RopeScaling


class Masks(NamedTuple):
    """What queries may see.

    cache: `[B, T or 1, S]` bool, which slots; None without a cache.
    block: `[B or 1, T, T]` bool, which of the block's own tokens.
    reach: `[]` int32, no slot from here on is seen by any; None without a cache.
    """

    cache: Array | None
    block: Array
    reach: Array | None


def windows(config: Config) -> set[int]:
    """The different windows among the layers."""
    return {config.window(index) for index in range(config.n_layers)}


def text_masks(sizes: Iterable[int], length: int) -> dict[int, Masks]:
    """Masks of whole texts without a cache, by window."""
    return {size: Masks(cache=None, block=_causal(length, size), reach=None) for size in sizes}


def block_masks(
    sizes: Iterable[int], positions: Array, starts: Array, num_slots: int
) -> dict[int, Masks]:
    """Masks of consecutive tokens, those before `starts` being in the cache, by window."""
    # Slots at or above the block's start may hold anything.
    filled = jnp.arange(num_slots)[None, :] < starts[:, None]
    masks, reach = {}, jnp.max(starts)
    for size in sizes:
        visible = filled[:, None, :]
        if size:
            visible = visible & _slots_within(size, positions, num_slots)
        masks[size] = Masks(visible, _causal(positions.shape[1], size), reach)
    return masks


def tree_masks(
    sizes: Iterable[int], positions: Array, num_slots: int, starts: Array, seen: Array
) -> dict[int, Masks]:
    """Masks of the last nodes of a tree, by window; arguments as of `apply_tree`.

    A window counts positions. Slots below the tree are positions; in the tree they are not, but a
    path's nodes lie in the order of their depths, one of each, so that the distance to a node is
    the number of nodes of the path after it.
    """
    masks = {}
    for size in sizes:
        slot = jnp.arange(num_slots, dtype=jnp.int32)[None, :] - starts[:, None]
        visible, nodes = (slot < 0)[:, None, :], seen
        if size:
            visible = visible & _slots_within(size, positions, num_slots)
            distance = jnp.sum(seen, axis=2, keepdims=True) - jnp.cumsum(seen, axis=2)
            nodes = seen & (distance < size)
        before = seen.shape[2] - seen.shape[1]
        if before:
            in_tree = (slot >= 0) & (slot < before)
            index = jnp.clip(slot, 0, before - 1)[:, None, :]
            index = jnp.broadcast_to(index, (*seen.shape[:2], index.shape[2]))
            on_path = jnp.take_along_axis(nodes[:, :, :before], index, axis=2)
            visible |= in_tree[:, None, :] & on_path
        masks[size] = Masks(visible, nodes[:, :, before:], jnp.max(starts) + before)
    return masks


def _causal(length: int, window: int) -> Array:
    rows = jnp.arange(length)
    seen = rows[:, None] >= rows[None, :]
    if window:
        seen &= rows[:, None] - rows[None, :] < window
    return seen[None]


def _slots_within(window: int, positions: Array, num_slots: int) -> Array:
    """`[B, T, S]` bool: slots less than a window before a position, where slots are positions."""
    slots = jnp.arange(num_slots, dtype=jnp.int32)
    return positions[:, :, None] - slots[None, None, :] < window


def rotation(config: Config, positions: Array, window: int) -> Array | None:
    """cos and sin `[2, B, T, 1, 1, R / 2]` of the layers with a window, R entries being rotated.

    float32: bfloat16 would merge neighbouring places. None where positions are learned.
    """
    if config.learned_positions is not None:
        return None
    theta, scaling = config.rope_theta, config.rope_scaling
    if window and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    half = (config.rotary_dim or config.head_dim) // 2
    frequencies = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])[:, :, :, None, None, :]


def _scaled(frequencies: Array, scaling: RopeScaling) -> Array:
    slowed = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slowed
    # How often a wave turns within the length of the first training, from low (0) to high (1).
    turns = scaling.original_max_len * frequencies / (2.0 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * slowed


def rotate(x: Array, rotation: Array) -> Array:
    """Rotates pairs (i, i + R / 2) of the first R entries of `[B, T, H, G, D]`."""
    cos, sin = rotation[0], rotation[1]
    half = rotation.shape[-1]
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    together = jnp.concatenate(rotated, axis=-1).astype(x.dtype)
    if x.shape[-1] == 2 * half:
        return together
    return jnp.concatenate([together, x[..., 2 * half :]], axis=-1)
