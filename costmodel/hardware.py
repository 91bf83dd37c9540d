"""How long does a forward pass of a given shape take on given chips?

The time is a sum of what cannot overlap, a fixed part, a part per layer and the exchanges between
chips, and of what can, arithmetic and memory traffic, of which the longer counts.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ._inputs import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, as_floats, is_traced, require
from .shapes import BFLOAT16, Formats, Number, Shape, kv_cache_bytes, pass_bytes, pass_flops


class Chip(NamedTuple):
    """What a datasheet says of one chip: dense peaks, one-way links, SI units (GB is 1e9)."""

    flops_per_second: Number  # 16-bit matrix products, without sparsity
    int8_flops_per_second: Number  # 0: the chip has no such units
    fp8_flops_per_second: Number  # 0: the chip has no such units
    bytes_per_second: Number  # of its main memory
    memory_bytes: Number  # its capacity
    link_bytes_per_second: Number  # one way, to the other chips of a tensor-parallel group


class Stack(NamedTuple):
    """What software makes of a chip; every number is to be calibrated (`fit_pass_times`)."""

    memory_efficiency: Number  # reached share of the peak bytes per second
    compute_efficiency: Number  # reached share of the peak FLOPs per second
    fixed_seconds: Number  # per pass
    layer_seconds: Number  # per layer: launches and waits that no width hides
    collective_seconds: Number  # per layer, once there is more than one chip
    hop_seconds: Number  # per step of a ring from chip to chip
    overlap: Number  # exponent of the smooth maximum: 1 none, 8 within 9 %, infinity perfect
    host_seconds: Number  # per turn of the decoding loop, plain or not, beside the passes


class PassTime(NamedTuple):
    """The time of one forward pass, in parts that add up to it."""

    seconds: Array
    fixed_seconds: Array
    layers_seconds: Array
    collectives_seconds: Array
    roofline_seconds: Array  # the smooth maximum of the next two, and at least the larger
    compute_seconds: Array
    memory_seconds: Array


def smooth_maximum(first: ArrayLike, second: ArrayLike, sharpness: ArrayLike) -> Array:
    """Returns a maximum that is smooth, and the sum for a sharpness of 1.

    Above the larger number by a factor of at most `2^(1 / sharpness)`, reached where both are
    equal. As a time it says how well two kinds of work overlap: 1 not at all.

        (first^q + second^q)^(1 / q)

    Computed in logarithms: the powers themselves leave the range of float32, for a millisecond at
    q = 16 already.

    Args:
      first: positive.
      second: positive; broadcasts.
      sharpness: q, at least 1.

    Returns:
      The smooth maximum.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> [round(float(costmodel.smooth_maximum(3.0, 4.0, q)), 3) for q in (1, 2, 16)]
      [7.0, 5.0, 4.002]
    """
    require("first", first, POSITIVE)
    require("second", second, POSITIVE)
    require("sharpness", sharpness, AT_LEAST_ONE)
    first_, second_, q = as_floats(first, second, sharpness)
    q = jnp.minimum(q, 1e6)  # infinity, a true maximum, but for a factor of 2^1e-6
    return jnp.exp(jnp.logaddexp(q * jnp.log(first_), q * jnp.log(second_)) / q)


def all_reduce_seconds(
    message_bytes: ArrayLike, tensor_parallel: ArrayLike, chip: Chip, hop_seconds: ArrayLike
) -> Array:
    """Returns the time in which a ring of chips sums one message; 0 on a single chip.

        2 (p - 1) hop_seconds + 2 (p - 1) / p * message_bytes / link_bytes_per_second

    Args:
      message_bytes: size of the message that every chip holds, at least 0.
      tensor_parallel: p, number of chips, at least 1.
      chip: for its one-way link.
      hop_seconds: latency of one step from chip to chip, at least 0.

    Returns:
      Seconds.

    Raises:
      ValueError: an argument is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> a100 = costmodel.named_chip("a100-80gb")
      >>> f"{float(costmodel.all_reduce_seconds(1e6, 8, a100, 1e-6)):.3g}"
      '1.98e-05'

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009.
    """
    require("message_bytes", message_bytes, NON_NEGATIVE)
    require("tensor_parallel", tensor_parallel, AT_LEAST_ONE)
    require("hop_seconds", hop_seconds, NON_NEGATIVE)
    require("Chip.link_bytes_per_second", chip.link_bytes_per_second, POSITIVE)
    size, p, hop, link = as_floats(
        message_bytes, tensor_parallel, hop_seconds, chip.link_bytes_per_second
    )
    return 2 * (p - 1) * hop + 2 * (p - 1) / p * size / link


def pass_time(
    shape: Shape,
    chip: Chip,
    batch: ArrayLike,
    rows: ArrayLike,
    context: ArrayLike,
    tensor_parallel: ArrayLike = 1,
    formats: Formats = BFLOAT16,
    *,
    stack: Stack,
) -> PassTime:
    """Returns the time of one forward pass, and what it is made of.

        fixed_seconds + n_layers layer_seconds
        + n_layers (2 all_reduce_seconds + collective_seconds)           on more than one chip
        + smooth_maximum(flops / (p F e_compute), bytes / (p W e_memory), overlap)

    The two all-reduces of a layer carry `batch * rows * d_model` activations each. At a decoding
    step that is a few kilobytes, so it is their latency, and with it the number of layers, that
    counts. On more chips than a shape has key and value heads the cache is held, and read, in
    copies.

    Args:
      shape: the transformer.
      chip: its peaks.
      batch: sequences, positive.
      rows: tokens of each sequence in the pass, positive: 1 in decoding, gamma + 1 in verifying,
        the length of the prompt in prefilling.
      context: tokens of each sequence in the cache before it, at least 0.
      tensor_parallel: p, chips that share every layer, at least 1; `parallel_degrees` lists those
        into which a shape can be cut.
      formats: bytes per number.
      stack: efficiencies and overheads of the software.

    Returns:
      The parts, each in seconds.

    Raises:
      ValueError: an argument is outside its range or NaN, or `formats` asks for 8-bit arithmetic
        of a chip without.

    Example:
      >>> from jaxsd import costmodel
      >>> time = costmodel.pass_time(
      ...     costmodel.named_shape("llama-2-7b"),
      ...     costmodel.named_chip("a100-80gb"),
      ...     batch=1,
      ...     rows=1,
      ...     context=100,
      ...     stack=costmodel.named_stack("torch-compile"),
      ... )
      >>> f"{1e3 * time.seconds:.2f} ms, {1e3 * time.layers_seconds:.2f} of them layers"
      '9.57 ms, 1.52 of them layers'

    Source: Pope et al., arXiv 2211.05102, section 2; the part per layer: Yan et al., arXiv
    2402.01528, section 4.
    """
    check_chip(chip, formats)
    check_stack(stack)
    require("tensor_parallel", tensor_parallel, AT_LEAST_ONE)
    flops = pass_flops(shape, batch, rows, context)
    moved = pass_bytes(shape, batch, rows, context, formats)
    copied = kv_cache_bytes(shape, context, formats) * (kv_copies(shape, tensor_parallel) - 1)
    message = _message_bytes(shape, batch, rows, formats)
    exchange = all_reduce_seconds(message, tensor_parallel, chip, stack.hop_seconds)
    arithmetic = _seconds_per_flop(chip, formats)
    layers, p, flops, moved, exchange, arithmetic, bandwidth, batch_, copied = as_floats(
        shape.n_layers,
        tensor_parallel,
        flops,
        moved,
        exchange,
        arithmetic,
        chip.bytes_per_second,
        batch,
        copied,
    )
    memory_efficiency, compute_efficiency, fixed, per_layer, collective, overlap = as_floats(
        stack.memory_efficiency,
        stack.compute_efficiency,
        stack.fixed_seconds,
        stack.layer_seconds,
        stack.collective_seconds,
        stack.overlap,
    )
    compute = flops * arithmetic / (p * compute_efficiency)
    memory = (moved + batch_ * copied) / (p * bandwidth * memory_efficiency)
    roofline = smooth_maximum(compute, memory, overlap)
    in_layers = layers * per_layer
    collectives = layers * (2 * exchange + jnp.where(p > 1, collective, 0))
    fixed, in_layers, collectives, roofline = as_floats(fixed, in_layers, collectives, roofline)
    return PassTime(
        seconds=fixed + in_layers + collectives + roofline,
        fixed_seconds=fixed,
        layers_seconds=in_layers,
        collectives_seconds=collectives,
        roofline_seconds=roofline,
        compute_seconds=compute,
        memory_seconds=memory,
    )


def pass_seconds(
    shape: Shape,
    chip: Chip,
    batch: ArrayLike,
    rows: ArrayLike,
    context: ArrayLike,
    tensor_parallel: ArrayLike = 1,
    formats: Formats = BFLOAT16,
    *,
    stack: Stack,
) -> Array:
    """Returns the time of one forward pass, `pass_time(...).seconds`.

    Args:
      shape: the transformer.
      chip: its peaks.
      batch: sequences, positive.
      rows: tokens of each sequence in the pass, positive.
      context: tokens of each sequence in the cache before it, at least 0.
      tensor_parallel: chips that share every layer, at least 1.
      formats: bytes per number.
      stack: efficiencies and overheads of the software.

    Returns:
      Seconds.

    Raises:
      ValueError: as `pass_time`.

    Example:
      >>> from jaxsd import costmodel
      >>> llama, h100 = costmodel.named_shape("llama-3.1-8b"), costmodel.named_chip("h100-sxm")
      >>> ideal = costmodel.named_stack("ideal")
      >>> rows = (1, 8, 512)  # free until the arithmetic takes longer than reading the weights
      >>> [f"{costmodel.pass_seconds(llama, h100, 1, r, 1024, stack=ideal):.4f}" for r in rows]
      ['0.0045', '0.0045', '0.0081']
    """
    return pass_time(
        shape, chip, batch, rows, context, tensor_parallel, formats, stack=stack
    ).seconds


def critical_rows(chip: Chip, stack: Stack, formats: Formats = BFLOAT16) -> Array:
    """Returns the number of tokens per pass at which arithmetic takes as long as reading weights.

    Up to there, verifying more tokens costs next to nothing; from there on every token costs.

        F e_compute weight_bytes / (2 W e_memory)

    Args:
      chip: its peaks F and W.
      stack: its efficiencies.
      formats: bytes per weight.

    Returns:
      Tokens, sequences times tokens of each.

    Raises:
      ValueError: a number of the chip or the stack is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> ideal = costmodel.named_stack("ideal")
      >>> round(float(costmodel.critical_rows(costmodel.named_chip("h100-sxm"), ideal)))
      295

    Source: Austin et al., How to Scale Your Model, 2025, chapter 7.
    """
    check_chip(chip, formats)
    check_stack(stack)
    per_flop, bandwidth, compute, memory, weight = as_floats(
        _seconds_per_flop(chip, formats),
        chip.bytes_per_second,
        stack.compute_efficiency,
        stack.memory_efficiency,
        formats.weight_bytes,
    )
    return compute * weight / (2 * per_flop * bandwidth * memory)


def parallel_degrees(shape: Shape, max_degree: int = 8) -> tuple[int, ...]:
    """Returns the numbers of chips, powers of two, into which a shape's layers can be cut evenly.

    Query heads and the MLP's width must divide; key and value heads must divide or, as engines do,
    be copied, so a degree above them must be their multiple.

    Args:
      shape: the transformer, in whole numbers.
      max_degree: the largest number of chips considered.

    Returns:
      The degrees, rising, from 1 on.

    Raises:
      ValueError: `max_degree` is below 1.

    Example:
      >>> from jaxsd import costmodel
      >>> costmodel.parallel_degrees(costmodel.named_shape("qwen2.5-0.5b"))
      (1, 2)
    """
    require("max_degree", max_degree, AT_LEAST_ONE)
    degrees, degree = [], 1
    while degree <= max_degree:
        whole = shape.n_heads % degree == 0 and shape.d_ff % degree == 0
        if whole and kv_fits(shape.n_kv_heads, degree):
            degrees.append(degree)
        degree *= 2
    return tuple(degrees)


def kv_fits(n_kv_heads: int, degree: int) -> bool:
    """Whether so many chips can each hold whole key and value heads, copied if need be."""
    return n_kv_heads % degree == 0 or degree % n_kv_heads == 0


def kv_copies(shape: Shape, tensor_parallel: ArrayLike) -> Array:
    """How often a tensor-parallel group holds every key and value: once while there are heads."""
    p, heads = as_floats(tensor_parallel, shape.n_kv_heads)
    return jnp.maximum(p / heads, 1)


def check_chip(chip: Chip, formats: Formats = BFLOAT16) -> None:
    """Raises ValueError unless peaks are positive and the chip has the arithmetic that is asked."""
    for name in ("flops_per_second", "bytes_per_second", "memory_bytes"):
        require(f"Chip.{name}", getattr(chip, name), POSITIVE)
    for kind in ("int8", "fp8"):
        share, peak = (
            getattr(formats, f"{kind}_arithmetic"),
            getattr(chip, f"{kind}_flops_per_second"),
        )
        require(f"Formats.{kind}_arithmetic", share, NON_NEGATIVE)
        require(f"Chip.{kind}_flops_per_second", peak, NON_NEGATIVE)
        if not is_traced(share, peak) and np.any(np.asarray(share) > 0):
            require(f"Chip.{kind}_flops_per_second", peak, POSITIVE)
    for name in ("weight_bytes", "kv_bytes", "activation_bytes"):
        require(f"Formats.{name}", getattr(formats, name), POSITIVE)
    require("Formats.activations_per_layer", formats.activations_per_layer, NON_NEGATIVE)


def check_stack(stack: Stack) -> None:
    """Raises ValueError unless efficiencies are positive and overheads are not negative."""
    for name in ("memory_efficiency", "compute_efficiency"):
        require(f"Stack.{name}", getattr(stack, name), POSITIVE)
    for name in ("fixed_seconds", "layer_seconds", "collective_seconds", "host_seconds"):
        require(f"Stack.{name}", getattr(stack, name), NON_NEGATIVE)


def _seconds_per_flop(chip: Chip, formats: Formats) -> Array:
    """Time of one operation at the peaks of the formats that share the arithmetic."""
    wide, int8, fp8, int8_share, fp8_share = as_floats(
        chip.flops_per_second,
        chip.int8_flops_per_second,
        chip.fp8_flops_per_second,
        formats.int8_arithmetic,
        formats.fp8_arithmetic,
    )
    # A chip without such units does that share at its 16-bit rate, and no 0 is divided by.
    int8, fp8 = jnp.where(int8 > 0, int8, wide), jnp.where(fp8 > 0, fp8, wide)
    return (1 - int8_share - fp8_share) / wide + int8_share / int8 + fp8_share / fp8


def _message_bytes(shape: Shape, batch: ArrayLike, rows: ArrayLike, formats: Formats) -> Array:
    """Bytes of activations of one pass between two layers."""
    batch_, rows_, width, size = as_floats(batch, rows, shape.d_model, formats.activation_bytes)
    return batch_ * rows_ * width * size
