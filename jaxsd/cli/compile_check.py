"""Do the TPU's compiler and the cost model say the same of a pass?

Every pass is compiled for one chip, where there are no collectives, which the compiler does not
price.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from . import topology as topology_lib


def compare(
    topologies: Sequence[str],
    configs: Mapping[str, Any],
    batches: Sequence[int],
    rows: Sequence[int],
    context: int,
    stack: str,
) -> dict[str, Any]:
    """Seconds, FLOPs and bytes of single passes, by compiler and by cost model.

    Args:
      topologies: TPUs; one chip of each is used.
      configs: shapes by name.
      batches: numbers of rows.
      rows: tokens of each row in a pass.
      context: tokens of each row in the cache.
      stack: efficiencies and overheads of the cost model, by name.

    Returns:
      A row for every combination, and the errors; JSON values.

    Raises:
      ValueError: a topology is not a TPU's, or a name is unknown.
    """
    from jaxsd import costmodel

    chosen = costmodel.named_stack(stack)
    found = []
    for name in topologies:
        place = topology_lib.find(name)
        if place.chip is None:
            raise ValueError(f"topology={name!r} must be a TPU: no other compiler names a time")
        chip = costmodel.named_chip(place.chip)
        for model, config in configs.items():
            for batch in batches:
                for length in rows:
                    compiled = _compile_pass(place, config, batch, length, context)
                    shape = shape_of(config)
                    predicted = (
                        float(costmodel.pass_flops(shape, batch, length, context)),
                        float(costmodel.pass_bytes(shape, batch, length, context)),
                        float(
                            costmodel.pass_seconds(
                                shape, chip, batch, length, context, stack=chosen
                            )
                        ),
                    )
                    found.append(
                        {
                            "topology": name,
                            "model": model,
                            "batch": batch,
                            "rows": length,
                            **_beside(compiled, predicted),
                        }
                    )
    return {"context": context, "stack": stack, "rows": found, "errors": errors(found)}


def errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How far the cost model's seconds are from the compiler's; None without any.

    An error is |cost model / compiler - 1|. The scaled ones are those left when one factor, the
    median ratio, is divided out: what a single efficiency would mend.

    >>> rows = [
    ...     {"topology": "a", "model": "m", "batch": 1, "rows": 1, "seconds_ratio": ratio}
    ...     for ratio in (0.5, 0.5, 0.6)
    ... ]
    >>> found = errors(rows)
    >>> found["median_ratio"], found["worst_error"], round(found["worst_error_scaled"], 2)
    (0.5, 0.5, 0.2)
    """
    timed = [row for row in rows if row["seconds_ratio"] is not None]
    if not timed:
        return None
    ratios = [row["seconds_ratio"] for row in timed]
    middle = statistics.median(ratios)
    off = [abs(ratio - 1) for ratio in ratios]
    scaled = [abs(ratio / middle - 1) for ratio in ratios]
    worst = timed[off.index(max(off))]
    return {
        "num_passes": len(timed),
        "median_ratio": middle,
        "median_error": statistics.median(off),
        "worst_error": max(off),
        "worst": f"{worst['model']} on {worst['topology']}, batch {worst['batch']}, "
        f"{worst['rows']} rows",
        "median_error_scaled": statistics.median(scaled),
        "worst_error_scaled": max(scaled),
    }


def shape_of(config: Any) -> Any:
    """The cost model's shape of a transformer of `jaxsd.models`.

    >>> from jaxsd import costmodel, models
    >>> costmodel.parameters_total(shape_of(models.CONFIGS["llama-3.1-8b"]))
    8030261248
    """
    from jaxsd import costmodel

    windows = [config.window(layer) for layer in range(config.n_layers)]
    local = [window for window in windows if window]
    vectors = 2 if config.norm == "layer" else 1
    return costmodel.Shape(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        d_ff=config.d_ff,
        tied_embeddings=config.tie_embeddings,
        mlp_matrices=3 if config.gated_mlp else 2,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        mlp_bias=config.mlp_bias,
        norm_vectors_per_layer=vectors * (4 if config.post_norms else 2),
        final_norm_vectors=vectors,
        head_norm_vectors=2 if config.qk_norm else 0,
        position_rows=config.learned_positions or 0,
        n_local_layers=len(local),
        window=max(local, default=0),
    )


def _compile_pass(
    place: topology_lib.Topology, config: Any, batch: int, length: int, context: int
) -> Any:
    """One pass over `length` tokens of every row, in bfloat16 on one chip."""
    from jaxsd.models import ahead

    mesh = ahead.mesh_of(place.devices, {"data": 1, "model": 1})
    # Plain decoding has a pass over one token; that over more is the verifying one.
    draft = None if length == 1 else config
    plan = ahead.Plan(config, draft, length - 1, batch, context, 1, mesh)
    return ahead.compile_program(ahead.lowerings(plan)[f"target pass, {length}"])


def _beside(compiled: Any, predicted: tuple[float, float, float]) -> dict[str, Any]:
    """The compiler's figures, the cost model's, and the second over the first."""
    sides = zip(
        ("flops", "bytes", "seconds"),
        (compiled.flops, compiled.bytes_accessed, compiled.optimal_seconds),
        predicted,
        strict=True,
    )
    out: dict[str, Any] = {"refusal": compiled.refusal}
    for name, compiler, model in sides:
        out[f"compiler_{name}"] = compiler
        out[f"costmodel_{name}"] = model
        out[f"{name}_ratio"] = model / compiler if compiler else None
    return out
