"""What will a decoder need on devices that are not there?

Its programs are compiled ahead of time, for a mesh of described devices and from shapes alone: no
weight is made. The compiler then says what every chip must hold, and its text what the chips send
each other and whether the caches are written in place.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxsd

from . import compiled_text, sharding
from .compiled_text import Collectives
from .configs import Config
from .sharding import TENSOR, Rules
from .transformer import abstract_params, language_model


class Plan(NamedTuple):
    """What is decoded, and on which devices.

    target: shape of the target.
    draft: shape of the draft; None: plain decoding.
    num_tokens: K; 0 without a draft.
    batch_size: B, rows.
    max_len: L, tokens of a row, prompt included.
    prompt_len: P, tokens of a prompt, padding included.
    mesh: devices with named axes.
    dtype: of weights and caches.
    target_rules: how the target is divided.
    draft_rules: how the draft is divided.
    """

    target: Config
    draft: Config | None
    num_tokens: int
    batch_size: int
    max_len: int
    prompt_len: int
    mesh: Mesh
    dtype: Any = jnp.bfloat16
    target_rules: Rules = TENSOR
    draft_rules: Rules = TENSOR


class Lowering(NamedTuple):
    """A program that is not compiled yet.

    lower: traces it, and returns what `jax.jit(...).lower` returns.
    cache_shapes: of the caches' buffers, as one device holds them.
    has_loop: whether it is the decoding loop.
    """

    lower: Callable[[], Any]
    cache_shapes: tuple[tuple[int, ...], ...]
    has_loop: bool = False


class Memory(NamedTuple):
    """Bytes on one device.

    argument_bytes: weights, caches and the rest of what the program is given.
    output_bytes: what it returns.
    aliased_bytes: the part of the outputs that lies where arguments lay.
    temporary_bytes: what it needs meanwhile.
    program_bytes: its code.
    """

    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    program_bytes: int

    @property
    def total_bytes(self) -> int:
        """All that must be there at once."""
        kept = self.argument_bytes + self.output_bytes - self.aliased_bytes
        return kept + self.temporary_bytes + self.program_bytes


class Compiled(NamedTuple):
    """What a compiler made of a program, per device.

    refusal: the compiler's own words, if the program needs more memory than the device has; then
      the fields below are None or empty.
    compile_seconds: tracing included.
    memory: bytes on one device.
    flops: floating-point operations; a loop's body counts once. None where no count is given.
    bytes_accessed: read and written by all instructions, the same.
    optimal_seconds: the compiler's own estimate, for a program without loops: all instructions one
      after the other, collectives left out. None where it gives none.
    collectives: what devices send each other; of a loop, inside it.
    num_caches: buffers of caches among the arguments.
    num_aliased: those that are written in place.
    cache_copies: lines that copy a whole cache; of a loop, inside it.
    cache_moves: lines that bring one to another memory of the chip, or back.
    """

    refusal: str | None
    compile_seconds: float
    memory: Memory | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    optimal_seconds: float | None = None
    collectives: tuple[Collectives, ...] = ()
    num_caches: int = 0
    num_aliased: int = 0
    cache_copies: tuple[str, ...] = ()
    cache_moves: tuple[str, ...] = ()


def mesh_of(devices: Sequence[Any], sizes: Mapping[str, int]) -> Mesh:
    """The first of these devices as a mesh of these axes.

    >>> import jax
    >>> mesh_of(jax.devices(), {"data": 1, "model": 1}).axis_names
    ('data', 'model')

    Raises:
      ValueError: if there are fewer devices, or a size is not an integer of at least 1.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"mesh has {name}={size!r}; wanted an integer of at least 1")
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        raise ValueError(
            f"a mesh of {dict(sizes)} takes {wanted} devices; there are {len(devices)}"
        )
    grid = np.array(list(devices[:wanted]), dtype=object).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def lowerings(plan: Plan) -> dict[str, Lowering]:
    """The programs of a decoder, by name.

    "loop" is `decoder.run` itself, with the caches donated; "prefill" what `decoder.start` runs.
    "target pass, T" and "draft pass, T" are one forward pass over T tokens of every row: T = 1 and
    K + 1 of the target (plain decoding, verifying), 1 and 2 of the draft (a step, the first step of
    a round).

    Args:
      plan: what is decoded, and where.

    Raises:
      ValueError: a size is not an integer of at least 1, the prompt does not fit, or the mesh does
        not fit the rules.

    Example:
      >>> import jax
      >>> from jaxsd import models
      >>> from jaxsd.models import ahead
      >>> tiny, mesh = models.CONFIGS["tiny"], ahead.mesh_of(jax.devices(), {"data": 1, "model": 1})
      >>> plan = ahead.Plan(tiny, tiny, 2, batch_size=1, max_len=24, prompt_len=8, mesh=mesh)
      >>> programs = ahead.lowerings(plan)
      >>> list(programs)[:3]
      ['loop', 'prefill', 'target pass, 1']
      >>> compiled = ahead.compile_program(programs["draft pass, 1"])
      >>> compiled.num_aliased == compiled.num_caches == 4
      True
    """
    _check(plan)
    whole = NamedSharding(plan.mesh, PartitionSpec())

    def everywhere(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), tree
        )

    target = _Model(plan, plan.target, plan.target_rules)
    params, drafter, draft = {"target": target.params()}, jaxsd.no_drafter(), None
    if plan.draft is not None:
        draft = _Model(plan, plan.draft, plan.draft_rules)
        params["draft"] = draft.params()
        drafter = jaxsd.model_drafter(draft.on_mesh(), plan.num_tokens)
    decoder = jaxsd.speculative(target.on_mesh(), drafter, max_len=plan.max_len)

    def prefill(
        params: Any, prompts: Array, lengths: Array, key: Array, sampling: jaxsd.Sampling
    ) -> Any:
        return decoder.init(params, prompts, lengths, key, sampling=sampling)

    rows: Any = jax.ShapeDtypeStruct((plan.batch_size,), jnp.int32)
    numbers: Any = jax.ShapeDtypeStruct((plan.batch_size,), jnp.float32)
    prompts = jax.ShapeDtypeStruct((plan.batch_size, plan.prompt_len), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    request = everywhere((prompts, rows, key, jaxsd.Sampling(numbers, rows, numbers)))

    def state() -> Any:
        """The loop's, laid out as the models on the mesh lay out their caches."""
        found = jax.eval_shape(prefill, params, *request)
        caches = target.laid_out(found.target_cache)
        rest = everywhere(found._replace(target_cache=None))
        if draft is not None:
            cache = draft.laid_out(found.drafter_state.cache)
            drafter_state = rest.drafter_state._replace(cache=cache)
            rest = rest._replace(drafter_state=drafter_state)
        return rest._replace(target_cache=caches)

    models = [target] if draft is None else [target, draft]
    held = tuple(shape for model in models for shape in model.cache_shapes())
    rounds = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    programs = {
        "loop": Lowering(lambda: decoder.run.lower(params, state(), rounds), held, True),
        "prefill": Lowering(lambda: jax.jit(prefill).lower(params, *request), held),
    }
    for length in dict.fromkeys((1, plan.num_tokens + 1)):
        programs[f"target pass, {length}"] = target.one_pass(length, everywhere)
    if draft is not None:
        for length in (1, 2):
            programs[f"draft pass, {length}"] = draft.one_pass(length, everywhere)
    return programs


def compile_program(program: Lowering) -> Compiled:
    """Compiles a program and says what came of it.

    A program for which the devices lack memory is not an error: the result says so.

    Args:
      program: one of `lowerings`.
    """
    start = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = out_of_memory(str(error))
        if refusal is None:
            raise
        return Compiled(refusal, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    held = compiled.memory_analysis()
    aliased, caches = compiled_text.aliased_caches(text, program.cache_shapes)
    copies = compiled_text.cache_copies(text, program.cache_shapes, inside_loops=program.has_loop)
    costs = _costs(compiled)
    return Compiled(
        refusal=None,
        compile_seconds=seconds,
        memory=Memory(
            held.argument_size_in_bytes,
            held.output_size_in_bytes,
            held.alias_size_in_bytes,
            held.temp_size_in_bytes,
            held.generated_code_size_in_bytes,
        ),
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
        optimal_seconds=None
        if program.has_loop
        else optimal_seconds(costs.get("optimal_seconds"), text),
        collectives=compiled_text.collectives(text, inside_loops=program.has_loop),
        num_caches=caches,
        num_aliased=aliased,
        cache_copies=copies.copies,
        cache_moves=copies.moves,
    )


def out_of_memory(message: str) -> str | None:
    """What a compiler says of too little memory, in one line; None for any other error.

    >>> out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 3G of 2G.  Largest: x")
    'Ran out of memory in hbm. Used 3G of 2G.'
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    text = " ".join(message.split())
    found = re.search(r"Ran out of memory.*?\.(?= [A-Z]|$)(?: Used.*?\.(?= [A-Z]|$))?", text)
    return found[0] if found else text[:200]


def optimal_seconds(reported: float | None, text: str) -> float | None:
    """The compiler's estimate of a program without loops, freed of what it cannot price.

    The TPU's compiler counts every custom call as -1 second: here they are added back. They join
    the parts of a weight that was fetched ahead of its use, and take no time.

    Args:
      reported: "optimal_seconds" of `cost_analysis`.
      text: of the compiled program.

    Returns:
      Seconds; None if there are none, or what is left cannot be a time.
    """
    if reported is None:
        return None
    seconds = reported + compiled_text.num_custom_calls(text)
    return seconds if 0 < seconds < 1 else None


class _Model(NamedTuple):
    """One of the two, and where it lies."""

    plan: Plan
    config: Config
    rules: Rules

    def on_mesh(self) -> sharding.ModelOnMesh:
        model = language_model(self.config, self.plan.dtype)
        return sharding.on_mesh(model, self.plan.mesh, self.rules)

    def params(self) -> Any:
        where = sharding.shardings(self.config, self.plan.mesh, self.rules)
        return _laid_out(abstract_params(self.config, self.plan.dtype), where)

    def cache(self) -> Any:
        model = language_model(self.config, self.plan.dtype)
        num_slots = self.plan.max_len + self.plan.num_tokens
        return self.laid_out(
            jax.eval_shape(lambda: model.init_cache(self.plan.batch_size, num_slots))
        )

    def laid_out(self, cache: Any) -> Any:
        return _laid_out(cache, sharding.cache_shardings(cache, self.plan.mesh, self.rules))

    def cache_shapes(self) -> tuple[tuple[int, ...], ...]:
        leaves = jax.tree.leaves(self.cache())
        return tuple(dict.fromkeys(leaf.sharding.shard_shape(leaf.shape) for leaf in leaves))

    def one_pass(self, length: int, everywhere: Callable[[Any], Any]) -> Lowering:
        block = jax.ShapeDtypeStruct((self.plan.batch_size, length), jnp.int32)

        def lower() -> Any:
            arguments = (*everywhere((block, block)), self.cache())
            apply = jax.jit(self.on_mesh().apply, donate_argnums=3)
            return apply.lower(self.params(), *arguments)

        return Lowering(lower, self.cache_shapes())


def _laid_out(tree: Any, where: Any) -> Any:
    return jax.tree.map(
        lambda leaf, one: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), tree, where
    )


def _costs(compiled: Any) -> Mapping[str, float]:
    """The compiler's counts; not every backend has them."""
    try:
        costs = compiled.cost_analysis()
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return {}
    return costs or {}


def _check(plan: Plan) -> None:
    low = {"batch_size": 1, "max_len": 1, "prompt_len": 1}
    low["num_tokens"] = 0 if plan.draft is None else 1
    for name, least in low.items():
        value = getattr(plan, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    if plan.draft is None and plan.num_tokens:
        raise ValueError(f"num_tokens={plan.num_tokens} needs a draft")
    if plan.prompt_len > plan.max_len:
        raise ValueError(f"prompt_len={plan.prompt_len} must be at most max_len={plan.max_len}")
    if plan.draft is not None and plan.draft.vocab_size != plan.target.vocab_size:
        raise ValueError(
            f"draft has a vocabulary of {plan.draft.vocab_size} tokens, target of "
            f"{plan.target.vocab_size}; they must share one"
        )
