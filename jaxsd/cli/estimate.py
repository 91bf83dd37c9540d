"""`jaxsd estimate`: how fast is this draft with this target on these chips?"""

from typing import Any

import rich.box
import rich.console
import rich.table

from . import question, shape_report
from .quantity import OptionalQuantity


def estimate(
    target: str,
    draft: str,
    chip: str,
    gamma: float,
    target_tokens: OptionalQuantity = None,
    draft_tokens: OptionalQuantity = None,
    alpha: float | None = None,
    acceptance_by_position: str | None = None,
    chips: int = 1,
    draft_chips: int | None = None,
    apart: bool = False,
    batch: int = 1,
    context: int = 1024,
    target_weights: question.Weights = "bf16",
    draft_weights: question.Weights = "bf16",
    loss_law: question.LossLawName = "besiroglu",
    laws: str | None = None,
    stack: str | None = None,
    times: str | None = None,
) -> dict[str, Any]:
    """Predicts the speed of a draft and a target that exist, without a search.

    Acceptance follows from scaling laws, or is what you measured: --alpha (from a logged rate by
    costmodel.acceptance_rate_to_alpha) or --acceptance-by-position.

    Args:
      target: a model of the catalogue, such as llama-3.1-70b; a wrong name lists them.
      draft: another.
      chip: a chip of the catalogue, such as h100-sxm.
      gamma: draft tokens per round; 0 is plain decoding.
      target_tokens: tokens the target was trained on; known of most models of the catalogue.
      draft_tokens: tokens the draft was trained on; the same.
      alpha: measured probability that a drafted token is accepted.
      acceptance_by_position: measured shares of rounds in which at least 1, 2, ... tokens were
        accepted, separated by commas.
      chips: chips of the target, which share every layer.
      draft_chips: chips of the draft; by default as many, or 1 apart.
      apart: the draft has chips of its own.
      batch: sequences decoded together.
      context: tokens of each in the cache.
      target_weights: format of the target's weights.
      draft_weights: format of the draft's weights.
      loss_law: the law of perplexity.
      laws: files of laws that `jaxsd fit` wrote, separated by commas.
      stack: efficiencies and overheads, by name; by default xla-tpu on TPUs, else torch-compile.
      times: a file of times that `jaxsd fit times` wrote, in place of a stack.

    Returns:
      The estimate; JSON values.
    """
    from jaxsd import costmodel

    big = question.target(target, target_tokens, target_weights)
    small_shape = costmodel.named_shape(draft)
    measured = alpha is not None or acceptance_by_position is not None
    if draft_tokens is None:
        draft_tokens = costmodel.training_tokens(draft)
    if draft_tokens is None:
        if not measured:
            raise ValueError(
                f"how many tokens {draft} was trained on is not in the catalogue: give "
                "--draft-tokens, or a measured --alpha"
            )
        draft_tokens = 1e12  # acceptance is measured; nothing depends on it but its training cost
    model_laws = question.laws(loss_law, laws)
    if alpha is not None and acceptance_by_position is not None:
        raise ValueError("--alpha and --acceptance-by-position exclude each other")
    if alpha is not None:
        model_laws = model_laws._replace(acceptance=costmodel.MeasuredAcceptance(alpha))
    if acceptance_by_position is not None:
        model_laws = model_laws._replace(acceptance=_by_position(acceptance_by_position))
    devices = shape_report.devices(chip, question.stack(stack, chip, times))
    if draft_chips is None:
        draft_chips = 1 if apart else chips
    for name, model, degree in ((target, big.shape, chips), (draft, small_shape, draft_chips)):
        degrees = costmodel.parallel_degrees(model, max(degree, 1))
        if degree not in degrees:
            raise ValueError(
                f"{name} cannot be cut into {degree} parts; up to there, "
                f"{', '.join(map(str, degrees))}"
            )
    hardware = costmodel.Hardware(
        devices._replace(tensor_parallel=chips),
        devices._replace(tensor_parallel=draft_chips),
        float(apart),
    )
    design = costmodel.Design(small_shape, draft_tokens, gamma, question.formats(draft_weights))
    workload = costmodel.Workload(batch, context)
    predicted = costmodel.throughput(design, big, hardware, workload, model_laws)
    outside = [] if measured else question.extrapolations(predicted, model_laws)
    interval = None
    if isinstance(model_laws.acceptance, costmodel.AcceptanceLaw) and gamma:
        interval = costmodel.speedup_interval(design, big, hardware, workload, model_laws)
    console = rich.console.Console(highlight=False)
    console.print(_table(target, draft, predicted, interval))
    console.print(shape_report.breakdown(predicted, gamma))
    excess = float(predicted.memory.excess_ratio)
    if excess > 1:
        memory = predicted.memory
        console.print(
            f"[bold red]This does not fit[/bold red]: the fullest chip needs {excess:.2f} times "
            f"the {float(memory.capacity_bytes) / 1e9:.3g} GB that weights and caches may take."
        )
    if outside:
        console.print(f"[bold]Extrapolated[/bold]: {'; '.join(outside)}.")
    return {
        "target": target,
        "draft": draft,
        "chip": chip,
        "gamma": gamma,
        "batch": batch,
        "context": context,
        "fits": excess <= 1,
        "interval": interval._asdict() if interval else None,
        "estimate": shape_report.estimate_json(predicted),
        "extrapolated": outside,
    }


def _by_position(text: str) -> Any:
    from jaxsd import costmodel

    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"acceptance_by_position={text!r} must be numbers separated by commas"
        ) from None
    return costmodel.PositionAcceptance(shares)


def _table(target: str, draft: str, predicted: Any, interval: Any) -> rich.table.Table:
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, title=f"{target} with {draft}", show_header=False, show_edge=False
    )
    table.title_justify = "left"
    table.add_column("")
    table.add_column("")
    speedup = f"{float(predicted.speedup):.2f}x"
    if interval:
        speedup += f"  (95 % for a pair: {interval.pair_low:.2f} to {interval.pair_high:.2f})"
    from jaxsd import costmodel

    memory = predicted.memory
    for label, text in (
        ("[bold]predicted speed-up[/bold]", speedup),
        (
            "tokens per second",
            f"{float(predicted.tokens_per_second):.4g}, plain "
            f"{float(predicted.plain_tokens_per_second):.4g}",
        ),
        (
            "tokens a round, alpha",
            f"{float(predicted.tokens_per_round):.2f}, {float(predicted.alpha):.3f}",
        ),
        (
            "perplexity of draft and target",
            f"{float(predicted.draft_perplexity):.2f}, {float(predicted.target_perplexity):.2f}",
        ),
        (
            "latency",
            f"first token {1e3 * float(predicted.time_to_first_token_seconds):.3g} ms, then "
            f"{1e3 * float(predicted.seconds_per_token):.3g} ms a token",
        ),
        (
            "memory of the fullest chip",
            f"{100 * float(memory.excess_ratio):.0f} % of "
            f"{float(memory.capacity_bytes) / 1e9:.3g} GB usable",
        ),
        ("training the draft", f"{float(predicted.training_flops):.3g} FLOPs"),
        ("binds", costmodel.TERMS[int(predicted.binding)]),
    ):
        table.add_row(label, text)
    return table
