"""Which models, chips and stacks are known by name, and which published rows come with them?

The data are CSV files in the package's `data` folder, every row with its source; `SOURCES.md` there
says where each file comes from.
"""

import csv
import difflib
import functools
import importlib.resources
from collections.abc import Iterable
from typing import Any

from .hardware import Chip, Stack
from .shapes import Shape

_FLAGS = ("tied_embeddings", "qkv_bias", "output_bias", "mlp_bias", "cross_attention")


def named_shape(name: str) -> Shape:
    """Returns the shape of a published model.

    Its `parameters_total` is that of the published checkpoint, to the last parameter.

    Args:
      name: such as `llama-3.1-70b`; `model_names()` lists them.

    Returns:
      The shape, in whole numbers.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.

    Example:
      >>> from jaxsd import costmodel
      >>> costmodel.parameters_total(costmodel.named_shape("qwen2.5-0.5b"))
      494032768
    """
    return _shape(_find("model", name, _models()))


def model_names() -> tuple[str, ...]:
    """Returns the names that `named_shape` knows, family by family.

    Example:
      >>> from jaxsd import costmodel
      >>> "gemma-3-1b" in costmodel.model_names()
      True
    """
    return tuple(_models())


def training_tokens(name: str) -> float | None:
    """Returns how many tokens a published model was trained on, or None where that is not known.

    Args:
      name: one of `model_names()`.

    Returns:
      Tokens, as its makers state them.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.

    Example:
      >>> from jaxsd import costmodel
      >>> costmodel.training_tokens("llama-3.1-70b")
      15000000000000.0
    """
    text = _find("model", name, _models())["training_tokens"]
    return float(text) if text else None


def named_chip(name: str) -> Chip:
    """Returns the datasheet of a chip: dense peaks, one-way links, SI units.

    Args:
      name: such as `h100-sxm` or `tpu-v5p`; `chip_names()` lists them.

    Returns:
      The chip.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.

    Example:
      >>> from jaxsd import costmodel
      >>> costmodel.named_chip("tpu-v5e").bytes_per_second
      819000000000.0
    """
    rows = _find("chip", name, _long("chips", "chip"))
    return Chip(**{field: float(row["value"]) for field, row in rows.items()})


def chip_names() -> tuple[str, ...]:
    """Returns the names that `named_chip` knows.

    Example:
      >>> from jaxsd import costmodel
      >>> "h100-sxm" in costmodel.chip_names()
      True
    """
    return tuple(_long("chips", "chip"))


def named_stack(name: str) -> Stack:
    """Returns what a kind of software makes of a chip.

    Few of these numbers are measured, and they differ by fifty times from stack to stack; `sources`
    says which are assumed. Calibrate them by `fit_pass_times` before you rely on an answer.

    Args:
      name: such as `torch-compile` or `xla-tpu`; `stack_names()` lists them.

    Returns:
      Efficiencies and overheads.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.

    Example:
      >>> from jaxsd import costmodel
      >>> costmodel.named_stack("torch-compile").layer_seconds
      4.75e-05
    """
    rows = _find("stack", name, _long("stacks", "stack"))
    return Stack(**{field: float(row["value"]) for field, row in rows.items()})


def stack_names() -> tuple[str, ...]:
    """Returns the names that `named_stack` knows.

    Example:
      >>> from jaxsd import costmodel
      >>> costmodel.stack_names()
      ('ideal', 'torch-compile', 'torch-eager', 'xla-gpu', 'xla-tpu')
    """
    return tuple(_long("stacks", "stack"))


def sources(name: str) -> dict[str, str]:
    """Returns where each number of a model, chip or stack comes from.

    Args:
      name: a name of `model_names()`, `chip_names()` or `stack_names()`.

    Returns:
      Source by field, with a note in brackets where there is one; of a model, one source for all.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.

    Example:
      >>> from jaxsd import costmodel
      >>> costmodel.sources("torch-compile")["layer_seconds"]
      'fitted: 13 rows of gpt_fast_decode_a100.csv'
    """
    models = _models()
    if name in models:
        return {"shape": models[name]["source"]}
    long = _long("chips", "chip") | _long("stacks", "stack")
    rows = _find("model, chip or stack", name, long, (*models, *long))
    return {
        field: row["source"] + (f" ({row['note']})" if row["note"] else "")
        for field, row in rows.items()
    }


def published(name: str) -> list[dict[str, Any]]:
    """Returns published measurements, to fit laws to and to check predictions against.

    Args:
      name: `sdsl_alpha_pairs` (perplexities and acceptance of 130 pairs), `morph_losses` (losses by
        shape), `gpt_fast_decode_a100` (tokens per second) or `leviathan_t5xxl` (speed-ups).

    Returns:
      One dict per row: numbers where a cell is a number, None where it is empty, else strings.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.

    Example:
      >>> from jaxsd import costmodel
      >>> costmodel.published("gpt_fast_decode_a100")[0]["tokens_per_second"]
      104.9
    """
    known = ("sdsl_alpha_pairs", "morph_losses", "gpt_fast_decode_a100", "leviathan_t5xxl")
    _find("data set", name, dict.fromkeys(known))
    return [{key: _value(cell) for key, cell in row.items()} for row in _rows(name)]


def _find(kind: str, name: str, known: dict[str, Any], names: Iterable[str] = ()) -> Any:
    """The entry of a name, or a ValueError with the nearest name first and then all of them."""
    if name in known:
        return known[name]
    every = tuple(names) or tuple(known)
    near = difflib.get_close_matches(str(name), every, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{name!r} is not a known {kind}: {hint}Known are {', '.join(every)}")


def _shape(row: dict[str, str]) -> Shape:
    """A row of the table of shapes, empty cells at their defaults."""
    given = {field: int(row[field]) for field in Shape._fields if row[field]}
    return Shape(**{k: bool(v) if k in _FLAGS else v for k, v in given.items()})


def _value(cell: str) -> Any:
    """A cell as a number if it is one, and None if it is empty."""
    if not cell:
        return None
    try:
        number = float(cell)
    except ValueError:
        return cell
    return int(number) if number.is_integer() and "." not in cell and "e" not in cell else number


def _models() -> dict[str, dict[str, str]]:
    """Rows of the table of shapes by name."""
    return {row["name"]: row for row in _rows("shapes")}


def _long(file: str, key: str) -> dict[str, dict[str, dict[str, str]]]:
    """Rows of a table with one field per row, by name and field."""
    out: dict[str, dict[str, dict[str, str]]] = {}
    for row in _rows(file):
        out.setdefault(row[key], {})[row["field"]] = row
    return out


@functools.cache
def _rows(name: str) -> tuple[dict[str, str], ...]:
    """The rows of one file of the package's data."""
    folder = importlib.resources.files(__name__.rpartition(".")[0]) / "data"
    text = (folder / f"{name}.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))
