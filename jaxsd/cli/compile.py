"""`jaxsd compile`: what do the programs of a decoder need on devices that are not there?"""

import dataclasses
import json
import pathlib
import re
from typing import Any, Literal

from . import topology as topology_lib
from .quantity import OptionalQuantity

NO_DRAFT = "none"


def compile(
    topology: str,
    target: str = "embedded-target",
    draft: str = "embedded-draft",
    num_draft_tokens: int = 5,
    batch: int = 1,
    context: int = 1024,
    prompt: int | None = None,
    mesh: str | None = None,
    replicate_draft: bool = False,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    programs: str | None = None,
    memory: OptionalQuantity = None,
    compare_costmodel: bool = False,
    batches: str = "1,8",
    rows: str = "1,6",
    stack: str = "xla-tpu",
) -> dict[str, Any]:
    """Compiles the decoding loop for a TPU or GPU that is not there, from shapes alone.

    Says what every chip holds and whether it fits, what the chips send each other, whether the
    caches are written in place, and how often a whole cache is copied in the loop (never, it
    should be). For a TPU it needs libtpu, for a GPU the CUDA plugin of JAX; no device.

    Args:
      topology: a TPU and its grid of chips (v5e:2x2, v6e:2x4, v4:2x2x1, v5p:2x2x1), a GPU (h100,
        h100:4, or the path of a text file that describes one), or "here" for this machine's.
        With --compare-costmodel several TPUs, separated by commas.
      target: a named configuration, or a folder with a config.json; no weights are read.
      draft: another; "none" is plain decoding.
      num_draft_tokens: K, drafted a round.
      batch: rows decoded together.
      context: tokens of a row, prompt included: the caches have room for them.
      prompt: tokens of the prompts that prefill reads; by default an eighth of the context.
      mesh: sizes of its axes, such as data=1,model=4; by default all devices along "model".
      replicate_draft: the draft's weights and caches whole on every device (rows divided).
      dtype: of weights and caches.
      programs: which, separated by commas: loop, prefill, target pass, draft pass; by default all.
      memory: bytes that a device may hold, in place of its capacity.
      compare_costmodel: instead of the above, single passes on one chip: the compiler's seconds
        beside those of the cost model.
      batches: with --compare-costmodel: rows, separated by commas.
      rows: with --compare-costmodel: tokens of each row in a pass, separated by commas.
      stack: with --compare-costmodel: the cost model's efficiencies and overheads.

    Returns:
      The same; JSON values.
    """
    from . import compile_check, compile_report

    _check(num_draft_tokens, batch, context, memory)
    configs = {"target": read_config("target", target)}
    if draft != NO_DRAFT:
        configs["draft"] = read_config("draft", draft)
    if compare_costmodel:
        names = {"target": target, "draft": draft}
        result = compile_check.compare(
            [name.strip() for name in topology.split(",")],
            {names[role]: config for role, config in configs.items()},
            _integers("batches", batches),
            _integers("rows", rows),
            context,
            stack,
        )
        compile_report.show_comparison(result)
        return result
    sizes = None if mesh is None else _mesh_sizes(mesh)
    place = topology_lib.find(topology)
    return _compile_all(
        place if memory is None else place._replace(memory_bytes=memory),
        configs,
        {"target": target, "draft": draft},
        sizes or {"data": 1, "model": len(place.devices)},
        dtype,
        None if programs is None else [name.strip() for name in programs.split(",")],
        num_tokens=num_draft_tokens if draft != NO_DRAFT else 0,
        batch_size=batch,
        max_len=context,
        prompt_len=max(context // 8, 1) if prompt is None else prompt,
        replicate_draft=replicate_draft,
    )


def read_config(role: str, name: str) -> Any:
    """A named configuration, or that of a folder: ours or a published one.

    Raises:
      ValueError: there is neither, or the folder's config.json cannot be read.
    """
    from jaxsd import models
    from jaxsd.models import families

    if name in models.CONFIGS:
        return models.CONFIGS[name]
    file = pathlib.Path(name) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{role}={name!r} must be one of {', '.join(models.CONFIGS)}, or a folder with a "
            "config.json"
        )
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it must be a JSON object")
        if "model_type" not in content and isinstance(content.get("config"), dict):
            return models.Config.from_dict(content["config"])
        return families.read_config(content)
    except ValueError as error:
        raise ValueError(f"{role}={name!r}: {file.name}: {error}") from error


def _compile_all(
    place: topology_lib.Topology,
    configs: dict[str, Any],
    names: dict[str, str],
    mesh_sizes: dict[str, int],
    dtype: str,
    wanted: list[str] | None,
    *,
    replicate_draft: bool,
    **sizes: Any,
) -> dict[str, Any]:
    import jax.numpy as jnp

    from jaxsd import models
    from jaxsd.models import ahead, sharding

    from . import compile_report

    draft_rules = {"batch": "data"} if replicate_draft else sharding.TENSOR
    plan = ahead.Plan(
        configs["target"],
        configs.get("draft"),
        mesh=ahead.mesh_of(place.devices, mesh_sizes),
        dtype=jnp.dtype(dtype),
        draft_rules=draft_rules,
        **sizes,
    )
    programs = _chosen(ahead.lowerings(plan), wanted)
    result = {
        "topology": place.name,
        "chip": place.chip,
        "devices": len(place.devices),
        "mesh": mesh_sizes,
        "memory_bytes_per_device": place.memory_bytes,
        "models": {
            role: {
                "name": names[role],
                "parameters": models.num_parameters(config),
                "config": dataclasses.asdict(config),
            }
            for role, config in configs.items()
        },
        "num_draft_tokens": plan.num_tokens,
        "batch_size": plan.batch_size,
        "context": plan.max_len,
        "prompt": plan.prompt_len,
        "dtype": dtype,
        "draft_is_replicated": replicate_draft,
    }
    compile_report.show_plan(result)
    found = {}
    for name, program in programs.items():
        compiled = ahead.compile_program(program)
        found[name] = as_json(compiled, place.memory_bytes)
        compile_report.show_progress(name, found[name])
    fits = [program["fits"] for program in found.values()]
    result["fits"] = None if None in fits else all(fits)
    result["programs"] = found
    compile_report.show_programs(result)
    return result


def as_json(compiled: Any, memory_bytes: float | None) -> dict[str, Any]:
    """A compiled program as JSON values, with what its device's memory says to it."""
    fields = compiled._asdict()
    total = None
    if compiled.memory is not None:
        total = compiled.memory.total_bytes
        fields["memory"] = {**compiled.memory._asdict(), "total_bytes": total}
    fits = None if memory_bytes is None or total is None else total <= memory_bytes
    if compiled.refusal is not None:
        fits = False
    fields["collectives"] = [one._asdict() for one in compiled.collectives]
    return {"fits": fits, **fields}


def _chosen(programs: dict[str, Any], wanted: list[str] | None) -> dict[str, Any]:
    """Those of a name, or whose name begins with one and a comma."""
    if wanted is None:
        return programs
    kinds = dict.fromkeys(name.partition(",")[0] for name in programs)
    for name in wanted:
        if name not in kinds:
            raise ValueError(f"programs names {name!r}; wanted some of {', '.join(kinds)}")
    return {key: one for key, one in programs.items() if key.partition(",")[0] in wanted}


def _mesh_sizes(text: str) -> dict[str, int]:
    found = re.findall(r"(\w+)=(\d+)", text)
    sizes = {name: int(size) for name, size in found}
    rebuilt = ",".join(f"{name}={size}" for name, size in found)
    if rebuilt != text.replace(" ", "") or set(sizes) != {"data", "model"} or len(found) != 2:
        raise ValueError(f"mesh={text!r} must be of the form data=1,model=4")
    return sizes


def _integers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"{name}={text!r} must be integers of at least 1, separated by commas")
    return [int(part) for part in parts]


def _check(num_draft_tokens: int, batch: int, context: int, memory: float | None) -> None:
    for name, value in (
        ("num_draft_tokens", num_draft_tokens),
        ("batch", batch),
        ("context", context),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory={memory:g} must be a number of bytes above 0")
