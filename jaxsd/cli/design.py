"""`jaxsd design`: how large should the draft of a target be?"""

from typing import Annotated, Any

import rich.box
import rich.console
import rich.table
import tyro

SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def parse_quantity(text: str) -> float:
    """A number with an optional suffix k, M, B or T.

    >>> parse_quantity("70.6B"), parse_quantity("15e12")
    (70600000000.0, 15000000000000.0)

    Raises:
      ValueError: it is something else.
    """
    scale = SUFFIXES.get(text[-1:])
    try:
        return float(text) if scale is None else float(text[:-1]) * scale
    except ValueError:
        raise ValueError(f"{text!r} is not a number such as 70553706496, 15e12 or 70B") from None


def format_quantity(value: float) -> str:
    """Four digits and a suffix.

    >>> format_quantity(312760391.8)
    '312.8M'
    """
    for suffix, scale in reversed(SUFFIXES.items()):
        if value >= scale:
            return f"{value / scale:.4g}{suffix}"
    return f"{value:.4g}"


Quantity = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda words: parse_quantity(words[0]),
        is_instance=lambda value: isinstance(value, float | int),
        str_from_instance=lambda value: [f"{value:g}"],
    ),
]


def design(
    target_params: Quantity,
    target_tokens: Quantity,
    draft_tokens: Quantity,
    gamma: float | None = None,
) -> dict[str, Any]:
    """Finds the draft size that makes a target fastest, before anything is trained.

    Two scaling laws predict how often the target accepts the draft's tokens; the size, and the
    number of draft tokens per round, then follow by gradient. Numbers may end in k, M, B or T.

    Args:
      target_params: parameters of the target.
      target_tokens: tokens the target was trained on.
      draft_tokens: tokens the draft will be trained on.
      gamma: draft tokens per round; by default the best number, which need not be whole.

    Returns:
      The design; JSON values.
    """
    result = solve(target_params, target_tokens, draft_tokens, gamma)
    console = rich.console.Console(highlight=False)
    console.print(_table(result))
    console.print(describe(result))
    return result


def solve(
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


def _table(result: dict[str, Any]) -> rich.table.Table:
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
