"""How fast is a draft with a target, on given chips, for a given load?

One function joins everything in this package: laws give acceptance, shapes bytes and FLOPs, chips
the time of a pass, acceptance and times the tokens per second. It is pure, and every number that
enters is a leaf of a NamedTuple: `jax.jit`, `jax.grad` and `jax.vmap` work over all of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ._inputs import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, as_floats, require
from .hardware import Chip, PassTime, Stack, check_chip, check_stack, kv_copies, pass_time
from .laws import (
    SHAPE_AWARE_SDSL,
    AnyPositionLaw,
    Extrapolation,
    Laws,
    LossRange,
    acceptance,
    outside,
    outside_clip,
    perplexity,
)
from .rates import acceptance_length_to_alpha
from .shapes import (
    BFLOAT16,
    Formats,
    Number,
    Shape,
    kv_cache_bytes,
    parameters_non_embedding,
    parameters_total,
    training_flops,
)
from .speculation import expected_tokens, expected_tokens_by_position


class Target(NamedTuple):
    """The model whose text is wanted."""

    shape: Shape
    tokens: Number  # it was trained on
    formats: Formats = BFLOAT16


class Design(NamedTuple):
    """The draft, and how it is used."""

    shape: Shape
    tokens: Number  # to train it on
    gamma: Number  # draft tokens per round; 0: plain decoding
    formats: Formats = BFLOAT16


class Devices(NamedTuple):
    """Chips that serve one model."""

    chip: Chip
    stack: Stack
    tensor_parallel: Number = 1  # how many, all sharing every layer
    cost_per_chip_hour: Number = 1.0  # in any currency; 1 counts chip hours


class Hardware(NamedTuple):
    """Where target and draft run."""

    target: Devices
    # None: on the target's chips, cut into as many parts as the target.
    draft: Devices | None = None
    # 1: the draft has chips of its own. 0: it sits on (some of) the target's, and shares memory.
    draft_apart: Number = 0.0
    memory_share: Number = 0.9  # of a chip's memory that weights and caches may take
    training_efficiency: Number = 0.4  # reached share of the target chip's FLOPs in training


class Workload(NamedTuple):
    """What is asked of them."""

    batch: Number = 1  # sequences decoded together
    context: Number = 1024  # tokens of each in the cache, on average over its decoding
    prompt: Number | None = None  # tokens of a new request; None: the context
    max_context: Number | None = None  # tokens that each cache has room for; None: the context
    served_tokens: Number = 0.0  # expected over the draft's life; spreads its training cost


# Batch 1, 1024 tokens in the cache.
ONE_SEQUENCE = Workload()


class Round(NamedTuple):
    """The seconds of one round of speculation; those of its parts add up to the first."""

    seconds: Array
    draft_seconds: Array  # all draft steps
    verify_seconds: Array  # the target's pass over gamma + 1 tokens of each sequence
    host_seconds: Array
    transfer_seconds: Array  # the draft's probabilities, from chips of its own to the target's
    draft_step: PassTime  # one of the draft steps
    verify_pass: PassTime
    plain_pass: PassTime  # the target's pass over one token of each sequence, to compare


class Memory(NamedTuple):
    """Bytes on the fullest chip, and what it may hold."""

    target_bytes: Array  # weights and caches of the target, on the fullest of its chips
    draft_bytes: Array  # of the draft, on the fullest of the chips that hold it
    capacity_bytes: Array  # usable, of a target's chip
    draft_capacity_bytes: Array  # usable, of a draft's chip
    excess_ratio: Array  # needed / usable on the fullest chip; above 1 it does not fit


class Estimate(NamedTuple):
    """What `throughput` predicts."""

    tokens_per_second: Array  # of all sequences together
    speedup: Array  # over plain decoding of the same batch on the target's chips
    plain_tokens_per_second: Array
    tokens_per_round: Array  # of one sequence, the target's own token included
    seconds_per_token: Array  # of one sequence
    time_to_first_token_seconds: Array  # target and draft read a prompt
    alpha: Array  # predicted probability that a drafted token is accepted
    draft_perplexity: Array
    target_perplexity: Array
    round: Round
    binding: Array  # [] int32: which of `TERMS` takes the largest part of a round
    memory: Memory
    training_flops: Array  # of the draft
    num_chips: Array
    cost_per_million_tokens: Array  # in the currency of `cost_per_chip_hour`
    training_cost: Array  # of the draft, at the target's chips
    total_cost: Array  # training, and serving `served_tokens`
    extrapolation: Extrapolation


# What a round's time is made of, in the order of `Estimate.binding`.
TERMS = (
    "draft compute",
    "draft memory",
    "draft layers",
    "draft collectives",
    "draft fixed",
    "verify compute",
    "verify memory",
    "verify layers",
    "verify collectives",
    "verify fixed",
    "host",
    "transfer",
)

_SECONDS_PER_HOUR = 3600.0


def throughput(
    design: Design,
    target: Target,
    hardware: Hardware,
    workload: Workload = ONE_SEQUENCE,
    laws: Laws = SHAPE_AWARE_SDSL,
) -> Estimate:
    """Returns what speculative decoding with a draft is predicted to reach, and why.

    Pure and differentiable in every number of all five arguments; `gamma`, `n_layers` and the
    others need not be whole. At `gamma=0` it is plain decoding, with a speed-up of exactly 1.
    Fields broadcast; results have their common shape.

        tokens_per_second = batch * E(alpha, gamma) / round
        round = gamma t_draft(1) + extra + t_target(gamma + 1) + host + transfer
        speedup = tokens_per_second / (batch / (t_target(1) + host))

    `extra` is the second token of a round's first draft step: after a round in which all were
    accepted the draft has two tokens to read, and a loop of fixed shapes always reads two.

    Args:
      design: the draft, its training tokens and draft tokens per round.
      target: the target and its training tokens.
      hardware: chips of both.
      workload: batch, context and the like.
      laws: loss law, acceptance law, scale of perplexities.

    Returns:
      The estimate; an infeasible one (`memory.excess_ratio > 1`) is reported, not refused.

    Raises:
      ValueError: a number is outside its range or NaN.

    Example:
      >>> from jaxsd import costmodel
      >>> chips = costmodel.Devices(
      ...     costmodel.named_chip("h100-sxm"), costmodel.named_stack("torch-compile"), 4
      ... )
      >>> design = costmodel.Design(costmodel.named_shape("llama-3.2-1b"), tokens=9e12, gamma=5)
      >>> target = costmodel.Target(costmodel.named_shape("llama-3.1-70b"), tokens=15e12)
      >>> estimate = costmodel.throughput(design, target, costmodel.Hardware(chips))
      >>> print(f"{estimate.speedup:.2f} {costmodel.TERMS[int(estimate.binding)]}")
      2.03 verify memory

    Source: Leviathan et al., arXiv 2211.17192, theorem 3.8; SDSL, arXiv 2603.11053, eqs. 1 to 9;
    with the time of a pass from `pass_time`.
    """
    check(design, target, hardware, workload, laws)
    on_draft = draft_devices(hardware)
    batch, context, gamma = as_floats(workload.batch, workload.context, design.gamma)

    def time(model: Design | Target, devices: Devices, rows: ArrayLike) -> PassTime:
        return pass_time(
            model.shape,
            devices.chip,
            batch,
            rows,
            context,
            devices.tensor_parallel,
            model.formats,
            stack=devices.stack,
        )

    plain = time(target, hardware.target, 1.0)
    verify = time(target, hardware.target, gamma + 1)
    draft = time(design, on_draft, 1.0)
    first_draft = time(design, on_draft, 2.0)
    transfer = _transfer_seconds(target, hardware, on_draft, batch, gamma)
    draft_step, first_step, verify_seconds, plain_seconds, host, transfer, gamma = as_floats(
        draft.seconds,
        first_draft.seconds,
        verify.seconds,
        plain.seconds,
        hardware.target.stack.host_seconds,
        transfer,
        gamma,
    )
    drafting = gamma * draft_step + jnp.minimum(gamma, 1) * (first_step - draft_step)
    seconds = drafting + verify_seconds + host + transfer
    rounds = Round(
        seconds, drafting, verify_seconds, host, transfer, draft, verify, plain_pass=plain
    )

    predicted = _predict(design, target, laws)
    tokens, alpha = _tokens_per_round(laws, predicted, gamma)
    tokens, seconds, plain_seconds, batch = as_floats(tokens, seconds, plain_seconds + host, batch)
    rate, plain_rate = batch * tokens / seconds, batch / plain_seconds
    flops = training_flops(design.shape, design.tokens)
    costs = _costs(hardware, on_draft, workload, gamma, rate, flops)
    return Estimate(
        tokens_per_second=rate,
        speedup=tokens * plain_seconds / seconds,
        plain_tokens_per_second=plain_rate,
        tokens_per_round=tokens,
        seconds_per_token=seconds / tokens,
        time_to_first_token_seconds=_first_token(design, target, hardware, on_draft, workload),
        alpha=alpha,
        draft_perplexity=predicted.draft_perplexity,
        target_perplexity=predicted.target_perplexity,
        round=rounds,
        binding=_binding(rounds, gamma),
        memory=_memory(design, target, hardware, on_draft, workload),
        training_flops=flops,
        num_chips=costs.num_chips,
        cost_per_million_tokens=costs.per_million_tokens,
        training_cost=costs.training,
        total_cost=costs.total,
        extrapolation=_extrapolation(predicted, laws),
    )


def draft_devices(hardware: Hardware) -> Devices:
    """Chips of the draft: its own, or those of the target."""
    return hardware.target if hardware.draft is None else hardware.draft


class _Predicted(NamedTuple):
    """What the laws are asked, and the perplexities that they answer."""

    draft_parameters: Array  # as the loss law counts them
    draft_tokens: Number
    draft_aspect_ratio: Array
    draft_layers: Number
    draft_perplexity: Array
    target_parameters: Array
    target_tokens: Number
    target_perplexity: Array


def law_parameters(shape: Shape, embeddings_counted: ArrayLike) -> Array:
    """The number of parameters as a loss law counts them: with token tables, or without."""
    outside_tables, total, share = as_floats(
        parameters_non_embedding(shape), parameters_total(shape), embeddings_counted
    )
    return outside_tables + share * (total - outside_tables)


def _predict(design: Design, target: Target, laws: Laws) -> _Predicted:
    """Perplexities of both models. The factor of the shape is the draft's alone.

    A target exists: its perplexity is a question of its size and data, and the shapes of targets
    lie far outside those that such a factor was fitted on.
    """
    law, scale = laws.loss, laws.perplexity_scale
    width, layers = as_floats(design.shape.d_model, design.shape.n_layers)
    size = law_parameters(design.shape, law.embeddings_counted)
    target_size = law_parameters(target.shape, law.embeddings_counted)
    return _Predicted(
        draft_parameters=size,
        draft_tokens=design.tokens,
        draft_aspect_ratio=width / layers,
        draft_layers=layers,
        draft_perplexity=perplexity(law, size, design.tokens, width / layers, scale),
        target_parameters=target_size,
        target_tokens=target.tokens,
        target_perplexity=perplexity(law, target_size, target.tokens, scale=scale),
    )


def _tokens_per_round(laws: Laws, predicted: _Predicted, gamma: Array) -> tuple[Array, Array]:
    """Tokens per round and alpha; of acceptance by position, the alpha that yields as much."""
    law, asked = laws.acceptance, (predicted.draft_perplexity, predicted.target_perplexity)
    if not isinstance(law, AnyPositionLaw):
        alpha = acceptance(law, *asked)
        return expected_tokens(alpha, gamma), alpha
    law.check()
    shares = law.shares(*as_floats(*asked))
    tokens = expected_tokens_by_position(shares, gamma)
    tokens, gamma, first = as_floats(tokens, gamma, shares[..., 0])
    drafting = gamma > 0
    length = jnp.where(drafting, tokens, 1)
    alpha = acceptance_length_to_alpha(length, jnp.where(drafting, gamma, 1))
    return tokens, jnp.where(drafting, alpha, first)


def _transfer_seconds(
    target: Target, hardware: Hardware, draft: Devices, batch: Array, gamma: Array
) -> Array:
    """Time in which a draft on its own chips hands over what verification needs.

    That is the whole distribution behind every drafted token, in 32 bits: without it nothing
    lossless can be drawn.
    """
    apart, batch, gamma, vocab_size, link, other_link, hop = as_floats(
        hardware.draft_apart,
        batch,
        gamma,
        target.shape.vocab_size,
        hardware.target.chip.link_bytes_per_second,
        draft.chip.link_bytes_per_second,
        hardware.target.stack.hop_seconds,
    )
    size = batch * gamma * vocab_size * 4
    return apart * (size / jnp.minimum(link, other_link) + 2 * hop * jnp.minimum(gamma, 1))


def _binding(rounds: Round, gamma: Array) -> Array:
    """The index in `TERMS` of the largest part of a round."""

    def parts(time: PassTime, times: ArrayLike) -> list[Any]:
        # Of the roofline the larger of its two terms counts: the other is hidden behind it.
        by_compute = time.compute_seconds > time.memory_seconds
        compute = jnp.where(by_compute, time.roofline_seconds, 0)
        memory = jnp.where(by_compute, 0, time.roofline_seconds)
        fields = (compute, memory, time.layers_seconds, time.collectives_seconds)
        return [times * part for part in (*fields, time.fixed_seconds)]

    draft = parts(jax.tree.map(lambda x: as_floats(x, gamma)[0], rounds.draft_step), gamma)
    verify = parts(rounds.verify_pass, 1.0)
    every = as_floats(*draft, *verify, rounds.host_seconds, rounds.transfer_seconds)
    return jnp.argmax(jnp.stack(every), axis=0).astype(jnp.int32)


def _memory(
    design: Design, target: Target, hardware: Hardware, draft: Devices, workload: Workload
) -> Memory:
    """Bytes of both models on the chips that hold most."""
    limit = workload.context if workload.max_context is None else workload.max_context
    limit_, gamma = as_floats(limit, design.gamma)
    room = limit_ + gamma + 1  # a round writes beyond the last token that it keeps

    def on_one_chip(model: Design | Target, devices: Devices) -> Array:
        weights, weight_bytes, cache, batch, p, copies = as_floats(
            parameters_total(model.shape),
            model.formats.weight_bytes,
            kv_cache_bytes(model.shape, room, model.formats),
            workload.batch,
            devices.tensor_parallel,
            kv_copies(model.shape, devices.tensor_parallel),
        )
        return (weights * weight_bytes + batch * cache * copies) / p

    share, capacity, draft_capacity, apart, for_target, for_draft, gamma = as_floats(
        hardware.memory_share,
        hardware.target.chip.memory_bytes,
        draft.chip.memory_bytes,
        hardware.draft_apart,
        on_one_chip(target, hardware.target),
        on_one_chip(design, draft),
        gamma,
    )
    # Plain decoding needs no draft; of less than one token per round, so much of the draft.
    for_draft = jnp.minimum(gamma, 1) * for_draft
    capacity, draft_capacity = share * capacity, share * draft_capacity
    together = (for_target + (1 - apart) * for_draft) / capacity
    return Memory(
        target_bytes=for_target,
        draft_bytes=for_draft,
        capacity_bytes=capacity,
        draft_capacity_bytes=draft_capacity,
        excess_ratio=jnp.maximum(together, apart * for_draft / draft_capacity),
    )


def _first_token(
    design: Design, target: Target, hardware: Hardware, draft: Devices, workload: Workload
) -> Array:
    """Time in which both models read the prompt of one new request."""
    prompt = workload.context if workload.prompt is None else workload.prompt
    (length,) = as_floats(prompt)
    length = jnp.maximum(length, 1)

    def read(model: Design | Target, devices: Devices) -> Array:
        return pass_time(
            model.shape,
            devices.chip,
            1.0,
            length,
            0.0,
            devices.tensor_parallel,
            model.formats,
            stack=devices.stack,
        ).seconds

    by_target, by_draft, apart, gamma = as_floats(
        read(target, hardware.target), read(design, draft), hardware.draft_apart, design.gamma
    )
    by_draft = jnp.minimum(gamma, 1) * by_draft
    # On chips of its own the draft reads while the target does.
    together = jnp.maximum(by_target, by_draft)
    return apart * together + (1 - apart) * (by_target + by_draft)


class _Costs(NamedTuple):
    num_chips: Array
    per_million_tokens: Array
    training: Array
    total: Array


def _costs(
    hardware: Hardware,
    draft: Devices,
    workload: Workload,
    gamma: Array,
    rate: Array,
    flops: Array,
) -> _Costs:
    """What chips cost while they serve, and while the draft is trained."""
    devices = hardware.target
    p, price, draft_p, draft_price, apart, served, efficiency, peak, rate, flops, used = as_floats(
        devices.tensor_parallel,
        devices.cost_per_chip_hour,
        draft.tensor_parallel,
        draft.cost_per_chip_hour,
        hardware.draft_apart,
        workload.served_tokens,
        hardware.training_efficiency,
        devices.chip.flops_per_second,
        rate,
        flops,
        jnp.minimum(gamma, 1),  # a draft that is never asked is not trained, and has no chips
    )
    apart = apart * used
    per_second = (p * price + apart * draft_p * draft_price) / _SECONDS_PER_HOUR
    per_token = per_second / rate
    training = used * flops / (peak * efficiency) / _SECONDS_PER_HOUR * price
    return _Costs(
        num_chips=p + apart * draft_p,
        per_million_tokens=1e6 * per_token,
        training=training,
        total=training + served * per_token,
    )


def _extrapolation(predicted: _Predicted, laws: Laws) -> Extrapolation:
    """How far outside the laws' ranges the question lies."""
    models: LossRange = laws.loss.fitted
    texts = laws.acceptance.fitted
    x, y = as_floats(predicted.draft_perplexity, predicted.target_perplexity)
    sizes = models.min_parameters, models.max_parameters
    counts = models.min_tokens, models.max_tokens
    ratios = models.min_aspect_ratio, models.max_aspect_ratio
    return Extrapolation(
        draft_parameters=outside(predicted.draft_parameters, *sizes),
        draft_tokens=outside(predicted.draft_tokens, *counts),
        draft_aspect_ratio=outside(predicted.draft_aspect_ratio, *ratios),
        draft_layers=outside(predicted.draft_layers, models.min_layers, jnp.inf),
        target_parameters=outside(predicted.target_parameters, *sizes),
        target_tokens=outside(predicted.target_tokens, *counts),
        draft_perplexity=outside(x, texts.min_draft_perplexity, texts.max_draft_perplexity),
        target_perplexity=outside(y, texts.min_target_perplexity, texts.max_target_perplexity),
        alpha=outside_clip(laws.acceptance, x, y),
    )


def check(
    design: Design, target: Target, hardware: Hardware, workload: Workload, laws: Laws
) -> None:
    """Raises ValueError if a number is out of range, with the name that the user knows it by."""
    laws.loss.check()
    laws.acceptance.check()
    require("design.gamma", design.gamma, NON_NEGATIVE)
    require("design.tokens", design.tokens, POSITIVE)
    require("target.tokens", target.tokens, POSITIVE)
    for name, shape in (("design", design.shape), ("target", target.shape)):
        for field in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim"):
            require(f"{name}.shape.{field}", getattr(shape, field), POSITIVE)
        require(f"{name}.shape.d_ff", shape.d_ff, NON_NEGATIVE)
    for name, devices in (("target", hardware.target), ("draft", hardware.draft)):
        if devices is not None:
            at = f"hardware.{name}"
            require(f"{at}.tensor_parallel", devices.tensor_parallel, AT_LEAST_ONE)
            require(f"{at}.cost_per_chip_hour", devices.cost_per_chip_hour, NON_NEGATIVE)
            model = target if name == "target" or hardware.draft is None else design
            check_chip(devices.chip, model.formats)
            check_stack(devices.stack)
    require("hardware.memory_share", hardware.memory_share, POSITIVE)
    require("hardware.draft_apart", hardware.draft_apart, NON_NEGATIVE)
    require("hardware.training_efficiency", hardware.training_efficiency, POSITIVE)
    require("workload.batch", workload.batch, POSITIVE)
    for name in ("context", "prompt", "max_context", "served_tokens"):
        value = getattr(workload, name)
        if value is not None:
            require(f"workload.{name}", value, NON_NEGATIVE)
