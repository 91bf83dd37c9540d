"""`jaxsd design`: which draft makes a target fastest?"""

from typing import Any, Literal

import rich.box
import rich.console
import rich.progress
import rich.table

from . import question, shape_report
from .quantity import OptionalQuantity, format_quantity

Objective = Literal["throughput", "throughput_per_chip", "speedup", "latency", "cost", "total_cost"]


def design(
    target_params: OptionalQuantity = None,
    target_tokens: OptionalQuantity = None,
    draft_tokens: OptionalQuantity = None,
    gamma: float | None = None,
    target: str | None = None,
    chip: str | None = None,
    chips: int = 1,
    apart: bool = False,
    batch: int = 1,
    context: int = 1024,
    free: str = "d_model,n_layers,gamma",
    objective: Objective = "throughput",
    train_flops: OptionalQuantity = None,
    max_first_token_seconds: float | None = None,
    max_token_seconds: float | None = None,
    served_tokens: OptionalQuantity = None,
    target_weights: question.Weights = "bf16",
    draft_weights: str = "bf16",
    loss_law: question.LossLawName = "shape-aware",
    laws: str | None = None,
    stack: str | None = None,
    times: str | None = None,
    plot: str | None = None,
) -> dict[str, Any]:
    """Finds the draft that makes a target fastest, before anything is trained.

    With --target and --chip: the draft's shape, for real hardware. Scaling laws predict how often
    the target accepts the draft's tokens, shapes and datasheets how long a pass takes; width,
    depth, draft tokens per round and what else is free then follow by gradient, rounded to a
    shape that can be built. With --target-params, --target-tokens and --draft-tokens: the
    draft's size alone, by the scaling laws of arXiv 2603.11053. Numbers may end in k, M, B or T.

    Args:
      target_params: parameters of the target, where the draft's size alone is asked for.
      target_tokens: tokens the target was trained on; known of most targets of the catalogue.
      draft_tokens: tokens the draft will be trained on.
      gamma: draft tokens per round; by default the best number.
      target: a target of the catalogue, such as llama-3.1-70b; a wrong name lists them.
      chip: a chip of the catalogue, such as tpu-v5p or h100-sxm.
      chips: how many there are; every way to use them is searched.
      apart: also search placements with the draft on chips of its own.
      batch: sequences decoded together.
      context: tokens of each in the cache.
      free: what to search, out of d_model,n_layers,ff_ratio,n_kv_heads,tokens,gamma,batch.
      objective: what to make best. cost counts chip hours per token served; total_cost adds the
        draft's training and needs --served-tokens.
      train_flops: budget of the draft's training; limits its tokens where those are free.
      max_first_token_seconds: longest time to read a prompt of `context` tokens.
      max_token_seconds: longest time per token of one sequence.
      served_tokens: tokens expected to be served with this draft.
      target_weights: format of the target's weights.
      draft_weights: formats of the draft's weights to try, out of bf16,int8,int4.
      loss_law: the law of perplexity; only shape-aware tells width from depth.
      laws: files of laws that `jaxsd fit` wrote, separated by commas; they replace those above.
      stack: efficiencies and overheads, by name; by default xla-tpu on TPUs, else torch-compile.
      times: a file of times that `jaxsd fit times` wrote, in place of a stack.
      plot: draw the design, its flat region, its time and its front to this file.

    Returns:
      The design; JSON values.
    """
    console = rich.console.Console(highlight=False)
    if (target is None) == (target_params is None):
        raise ValueError(
            "give either --target and --chip, for a shape, or --target-params, --target-tokens "
            "and --draft-tokens, for a size"
        )
    if target is None:
        if target_params is None or target_tokens is None or draft_tokens is None:
            missing = "target" if target_tokens is None else "draft"
            raise ValueError(f"--target-params needs --{missing}-tokens beside it")
        if plot is not None or chip is not None:
            raise ValueError("--plot and --chip belong to --target, not to --target-params")
        result = solve_size(target_params, target_tokens, draft_tokens, gamma)
        console.print(_size_table(result))
        console.print(describe(result))
        return result
    if chip is None:
        raise ValueError("--target needs --chip beside it, such as h100-sxm")
    question.check_plot(plot)
    names = tuple(name.strip() for name in free.split(",") if name.strip())
    if gamma is not None:
        names = tuple(name for name in names if name != "gamma")
    if draft_tokens is None and "tokens" not in names:
        if train_flops is None:
            raise ValueError("give --draft-tokens, or --train-flops, or free tokens")
        names = (*names, "tokens")
    asked = shape_report.Asked(
        target=target,
        chip=chip,
        target_model=question.target(target, target_tokens, target_weights),
        devices=shape_report.devices(chip, question.stack(stack, chip, times)),
        chips=chips,
        apart=apart,
        batch=batch,
        context=context,
        free=names,
        objective=objective,
        draft_tokens=draft_tokens,
        gamma=gamma,
        train_flops=train_flops,
        max_first_token_seconds=max_first_token_seconds,
        max_token_seconds=max_token_seconds,
        served_tokens=served_tokens,
        draft_formats=question.several_formats(draft_weights),
        laws=question.laws(loss_law, laws),
    )
    return shape_report.run(asked, console, plot)


def solve_size(
    target_params: float, target_tokens: float, draft_tokens: float, gamma: float | None = None
) -> dict[str, Any]:
    """The design as a dict, and beside it the best whole number of draft tokens at that size."""
    from jaxsd import costmodel

    best = costmodel.optimal_draft_size(target_params, target_tokens, draft_tokens, gamma=gamma)
    if best.parameters > 0:
        cost_ratio = best.parameters / target_params
        whole = int(costmodel.optimal_integer_gamma(best.alpha, cost_ratio))
        whole_speedup = float(costmodel.speedup(best.alpha, whole, cost_ratio))
    else:
        whole, whole_speedup = 0, 1.0
    return {
        "target_parameters": target_params,
        "target_tokens": target_tokens,
        "draft_tokens": draft_tokens,
        "draft_parameters": best.parameters,
        "gamma": best.gamma,
        "alpha": best.alpha,
        "speedup": best.speedup,
        "throughput": best.throughput,
        "draft_perplexity": best.draft_perplexity,
        "target_perplexity": best.target_perplexity,
        "extrapolated": best.extrapolated,
        "whole": {"gamma": whole, "speedup": whole_speedup},
    }


def describe(result: dict[str, Any]) -> str:
    """The design in a sentence or two."""
    target = format_quantity(result["target_parameters"])
    if not result["draft_parameters"]:
        return f"No draft makes a target of {target} parameters faster: decode it plainly."
    whole = result["whole"]
    ratio = result["target_parameters"] / result["draft_parameters"]
    text = (
        f"For a target of {target} parameters train a draft of "
        f"{format_quantity(result['draft_parameters'])}, {ratio:.0f} times smaller, on "
        f"{format_quantity(result['draft_tokens'])} tokens, and draft {whole['gamma']} tokens a "
        f"round: predicted to be {whole['speedup']:.2f} times as fast as without."
    )
    if result["extrapolated"]:
        text += " This lies at the edge of what the laws were fitted on."
    return text


def _size_table(result: dict[str, Any]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title="Predicted best draft")
    table.add_column("")
    table.add_column("value", justify="right")
    for label, text in (
        ("draft parameters", f"{result['draft_parameters']:,.0f}"),
        ("draft tokens per round, gamma", f"{result['gamma']:.2f}"),
        ("acceptance probability, alpha", f"{result['alpha']:.4f}"),
        ("speed-up", f"{result['speedup']:.3f}x"),
        ("throughput, tokens per two parameters read", f"{result['throughput']:.4g}"),
        ("perplexity of the draft", f"{result['draft_perplexity']:.3f}"),
        ("perplexity of the target", f"{result['target_perplexity']:.3f}"),
        (
            "with whole draft tokens",
            f"{result['whole']['gamma']}: {result['whole']['speedup']:.3f}x",
        ),
    ):
        table.add_row(label, text)
    return table
