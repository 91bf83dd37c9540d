"""Tables of measurements: which columns may they have, and what do they hold?"""

import csv
import math
import pathlib

Table = list[dict[str, str]]

# What every file may hold beside its numbers; --groups may name any of them.
LABELS = ("name", "model", "family", "draft", "target", "group", "note")
SHAPE_COLUMNS = (
    "vocab_size",
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "d_ff",
    "tied_embeddings",
)
# Of each kind: columns that are needed (one of those within a tuple), and those that may be there.
COLUMNS: dict[str, tuple[tuple[str | tuple[str, ...], ...], tuple[str, ...]]] = {
    "acceptance": (("draft_perplexity", "alpha"), ("target_perplexity",)),
    "loss": (
        (("parameters_total", "parameters_non_embedding"), "training_tokens", "loss"),
        ("n_layers", "d_model"),
    ),
    "times": (
        (("seconds", "tokens_per_second"), ("model", "d_model")),
        ("batch", "rows", "context", "tensor_parallel", "weight_format", *SHAPE_COLUMNS),
    ),
}


def read_table(path: pathlib.Path, kind: str) -> Table:
    """The rows of a file of measurements.

    Raises:
      ValueError: a column is missing or unknown, or a row has another number of cells.
    """
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    reader = csv.reader(lines)
    header = [cell.strip() for cell in next(reader, [])]
    needed, optional = COLUMNS[kind]
    for one in needed:
        choices = (one,) if isinstance(one, str) else one
        if not any(name in header for name in choices):
            raise ValueError(
                f"{path} has no column {' or '.join(choices)}; its columns are "
                f"{', '.join(header) or 'none'}"
            )
    known = [name for one in needed for name in ((one,) if isinstance(one, str) else one)]
    known += [*optional, *LABELS]
    for name in header:
        if name not in known:
            choices = ", ".join(dict.fromkeys(known))
            raise ValueError(f"{path} has a column {name!r}, which is none of {choices}")
    if len(set(header)) < len(header):
        raise ValueError(f"{path} has two columns of one name")
    rows = []
    for number, cells in enumerate(reader, 1):
        if len(cells) != len(header):
            raise ValueError(f"row {number} of {path} has {len(cells)} cells, not {len(header)}")
        rows.append(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def column(table: Table, name: str, positive: bool = False) -> list[float]:
    """The numbers of a column.

    Raises:
      ValueError: a cell is not one.
    """
    out = []
    for number, row in enumerate(table, 1):
        try:
            value = float(row[name])
        except ValueError:
            raise ValueError(f"{name} of row {number} is {row[name]!r}, not a number") from None
        if not math.isfinite(value) or (positive and value <= 0):
            wanted = "positive and finite" if positive else "finite"
            raise ValueError(f"{name}={value:g} of row {number} must be {wanted}")
        out.append(value)
    return out


def texts(table: Table, name: str) -> list[str]:
    """The words of a column.

    Raises:
      ValueError: there is no such column.
    """
    if name not in table[0]:
        raise ValueError(f"there is no column {name!r} among {', '.join(table[0])}")
    return [row[name] for row in table]
