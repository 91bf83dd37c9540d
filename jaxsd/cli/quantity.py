"""Large numbers as people write them: 70B, 15e12, 312.8M."""

from typing import Annotated, Any

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


_SPEC: Any = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="NUMBER",
    instance_from_str=lambda words: parse_quantity(words[0]),
    is_instance=lambda value: value is None or isinstance(value, float | int),
    str_from_instance=lambda value: ["none" if value is None else f"{value:g}"],
)
Quantity = Annotated[float, _SPEC]
# A union of the above with None would not name the option in its error.
OptionalQuantity = Annotated[float | None, _SPEC]
