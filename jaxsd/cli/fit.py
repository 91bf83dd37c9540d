"""`jaxsd fit`: laws and times from your own measurements, for the other commands to read."""

import json
import math
import pathlib
from typing import Annotated, Any, Literal

import rich.box
import rich.console
import rich.table
import tyro

from . import rows as rows_lib

Kind = Literal["acceptance", "loss", "times"]
Table = list[dict[str, str]]


def fit(
    kind: tyro.conf.Positional[Kind],
    file: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE.csv")]],
    form: Literal["affine", "linear", "log", "power", "size", "shape", "kaplan", "product"]
    | None = None,
    per_target: bool = False,
    exponents: Literal["equal", "shape_free", "free"] = "free",
    chip: str | None = None,
    free: str | None = None,
    times: str | None = None,
    groups: str | None = None,
) -> dict[str, Any]:
    """Fits a law, or the times of your software, to a table of measurements.

    The first line of the file names its columns; lines that begin with # are skipped.

    acceptance needs draft_perplexity, alpha and, for the affine form, target_perplexity.

    loss needs parameters_total or parameters_non_embedding, training_tokens, loss and, for the form
    shape, n_layers and d_model.

    times needs seconds (of one pass) or tokens_per_second, and a model of the catalogue or else
    vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff and tied_embeddings (0 or 1).
    It may have batch (else 1), rows (tokens per sequence and pass, else 1), context (else 0),
    tensor_parallel (else 1) and weight_format (bf16, int8 or int4; else bf16).

    All may have name, model, family, draft, target, group and note. What --json writes is what
    `jaxsd estimate` and `jaxsd design` read with --laws and --times.

    Args:
      kind: acceptance, loss or times.
      file: the table.
      form: of acceptance affine (default), linear, log or power; of loss size (default), shape
        or kaplan.
      per_target: an intercept for every target, by the column target, and one slope for all.
      exponents: of a loss law: all free, those of size and tokens equal (shape_free), or all equal.
      chip: of times, a chip of the catalogue, such as a100-80gb.
      free: of times, what is fitted, separated by commas: memory_efficiency, compute_efficiency,
        fixed_seconds, layer_seconds, collective_seconds, hop_seconds, overlap; by default what such
        rows usually determine.
      times: of times, a file written before: the values of what is not free.
      groups: a column; the held-out error is of rows predicted without the others of their group.

    Returns:
      The fit; JSON values.

    Raises:
      ValueError: the table or an option is wrong, or the rows do not determine the parameters.
    """
    table = rows_lib.read_table(pathlib.Path(file), kind)
    labels = None if groups is None else rows_lib.texts(table, groups)
    if kind != "times" and any(option is not None for option in (chip, free, times)):
        raise ValueError(f"--chip, --free and --times are for times, not for {kind}")
    if kind != "acceptance" and per_target:
        raise ValueError(f"--per-target is for acceptance, not for {kind}")
    if kind == "acceptance":
        result = _fit_acceptance(table, form, per_target, labels)
    elif kind == "loss":
        result = _fit_loss(table, form, exponents, labels)
    else:
        result = _fit_times(table, chip, free, times, labels)
    out = as_json(kind, result)
    _show(out, len(table))
    return out


def as_json(kind: str, result: Any) -> dict[str, Any]:
    """A fit as JSON values, from which `read_law` and `read_stack` take its result."""
    if isinstance(result.result, dict):
        law = {"laws": {name: encode(value) for name, value in result.result.items()}}
    else:
        law = {"law": encode(result.result)}
    return {
        "kind": kind,
        **law,
        "parameters": [
            {
                "name": name,
                "estimate": float(result.estimates[i]),
                "standard_error": float(result.standard_errors[i]),
                "low": float(result.intervals[i, 0]),
                "high": float(result.intervals[i, 1]),
            }
            for i, name in enumerate(result.names)
        ],
        "covariance": result.covariance.tolist(),
        "at_bound": list(result.at_bound),
        "degrees_of_freedom": result.degrees_of_freedom,
        "residual_error": result.residual_error,
        "mean_squared_error": result.mean_squared_error,
        "r_squared": result.r_squared,
        "mean_relative_error": result.mean_relative_error,
        "max_relative_error": result.max_relative_error,
        "held_out_error": result.held_out_error,
        "held_out_max_error": result.held_out_max_error,
        "num_held_out": result.num_held_out,
        "ranges": {name: list(ends) for name, ends in result.ranges.items()},
    }


def encode(value: Any) -> Any:
    """A law or stack as JSON values: its type by name, and its fields."""
    if hasattr(value, "_asdict"):
        fields = {name: encode(field) for name, field in value._asdict().items()}
        return {"type": type(value).__name__, "values": fields}
    number = float(value)
    return number if math.isfinite(number) else None


def decode(value: Any, where: str) -> Any:
    """The law or stack again; what is null, and what is absent, has its default value.

    Raises:
      ValueError: it is no law of this package.
    """
    from jaxsd import costmodel

    if not isinstance(value, dict):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        raise ValueError(f"{where} holds {value!r}, which is not a number")
    # By name, from a list: a file chooses among these and can call nothing else.
    known = {
        cls.__name__: cls
        for cls in (
            costmodel.AcceptanceLaw,
            costmodel.KaplanLossLaw,
            costmodel.LogAcceptanceLaw,
            costmodel.LossLaw,
            costmodel.LossRange,
            costmodel.MeasuredAcceptance,
            costmodel.PerplexityRange,
            costmodel.PowerAcceptanceLaw,
            costmodel.ProductLossLaw,
            costmodel.ShapeLossLaw,
            costmodel.Stack,
        )
    }
    name, values = value.get("type"), value.get("values")
    if name not in known or not isinstance(values, dict):
        raise ValueError(f"{where} holds a {name!r}, which is none of {', '.join(known)}")
    cls = known[name]
    unknown = [field for field in values if field not in cls._fields]
    if unknown:
        raise ValueError(f"{where}: {name} has no {unknown[0]!r}")
    try:
        return cls(**{k: decode(v, where) for k, v in values.items() if v is not None})
    except TypeError:
        raise ValueError(f"{where}: {name} lacks a field of {', '.join(cls._fields)}") from None


def read_law(path: pathlib.Path) -> tuple[str, Any]:
    """The kind and the law, or stack, of a file that `jaxsd fit` wrote.

    Of a file with a law for each of several targets, `path#target` names one.

    Raises:
      ValueError: it is not such a file.
    """
    name, _, target = str(path).partition("#")
    try:
        content = json.loads(pathlib.Path(name).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("kind") not in rows_lib.COLUMNS:
        raise ValueError(f"{name} was not written by `jaxsd fit ... --json`")
    laws = content.get("laws")
    if not isinstance(laws, dict):
        if target:
            raise ValueError(f"{name} holds one law for all targets; remove #{target}")
        return content["kind"], decode(content.get("law"), name)
    if target not in laws:
        raise ValueError(f"{name} holds laws for {', '.join(laws)}: name one, as {name}#TARGET")
    return content["kind"], decode(laws[target], name)


def read_stack(path: pathlib.Path) -> Any:
    """The stack of a file that `jaxsd fit times` wrote.

    Raises:
      ValueError: it is not such a file.
    """
    kind, stack = read_law(path)
    if kind != "times":
        raise ValueError(f"{path} is a fit of {kind}, not of times")
    return stack


def replace_law(laws: Any, path: pathlib.Path) -> Any:
    """The laws with one of them from a file that `jaxsd fit` wrote.

    Raises:
      ValueError: it is not such a file.
    """
    kind, law = read_law(path)
    if kind == "times":
        raise ValueError(f"{path} is a fit of times, not of a law")
    return laws._replace(**{kind: law})


def _fit_acceptance(table: Table, form: Any, per_target: bool, labels: list[str] | None) -> Any:
    """The fit of an acceptance law."""
    from jaxsd import costmodel

    if form in ("size", "shape", "kaplan", "product"):
        raise ValueError(f"--form {form} is of a loss law, not of acceptance")
    draft, alpha = rows_lib.column(table, "draft_perplexity"), rows_lib.column(table, "alpha")
    if "target_perplexity" in table[0]:
        target: Any = rows_lib.column(table, "target_perplexity")
    elif per_target or form in ("linear", "log", "power"):
        target = 1.0  # plays no part
    else:
        raise ValueError("the affine form needs a column target_perplexity; or give --form linear")
    names = rows_lib.texts(table, "target") if per_target else None
    return costmodel.fit_acceptance(draft, target, alpha, form, names, labels)


def _fit_loss(table: Table, form: Any, exponents: Any, labels: list[str] | None) -> Any:
    """The fit of a loss law."""
    from jaxsd import costmodel

    if form in ("affine", "linear", "log", "power"):
        raise ValueError(f"--form {form} is of an acceptance law, not of loss")
    total = "parameters_total" in table[0]
    if total and "parameters_non_embedding" in table[0]:
        raise ValueError("give parameters_total or parameters_non_embedding, not both")
    layers, width = (
        rows_lib.column(table, name) if name in table[0] else None
        for name in ("n_layers", "d_model")
    )
    return costmodel.fit_loss(
        rows_lib.column(table, "parameters_total" if total else "parameters_non_embedding"),
        rows_lib.column(table, "training_tokens"),
        rows_lib.column(table, "loss"),
        layers,
        width,
        form or "size",
        exponents,
        float(total),
        labels,
    )


def _fit_times(
    table: Table,
    chip: str | None,
    free: str | None,
    times: str | None,
    labels: list[str] | None,
) -> Any:
    """The fit of a stack."""
    from jaxsd import costmodel

    if chip is None:
        raise ValueError("times need --chip, such as a100-80gb")
    formats = {"bf16": costmodel.BFLOAT16, "int8": costmodel.INT8, "int4": costmodel.INT4}
    defaults = {"batch": 1.0, "rows": 1.0, "context": 0.0, "tensor_parallel": 1.0}
    columns = {
        name: rows_lib.column(table, name) if name in table[0] else [default] * len(table)
        for name, default in defaults.items()
    }
    if ("seconds" in table[0]) == ("tokens_per_second" in table[0]):
        raise ValueError("give seconds or tokens_per_second, not both")
    if "seconds" in table[0]:
        seconds = rows_lib.column(table, "seconds")
    else:
        rates = rows_lib.column(table, "tokens_per_second", positive=True)
        tokens = [b * r for b, r in zip(columns["batch"], columns["rows"], strict=True)]
        seconds = [n / rate for n, rate in zip(tokens, rates, strict=True)]
    passes = []
    for i, row in enumerate(table):
        weights = row.get("weight_format") or "bf16"
        if weights not in formats:
            raise ValueError(f"weight_format={weights!r} must be one of {', '.join(formats)}")
        shape = _shape(table, i)
        numbers = {name: column[i] for name, column in columns.items()}
        passes.append(costmodel.TimedPass(shape, seconds[i], formats=formats[weights], **numbers))
    return costmodel.fit_pass_times(
        passes,
        costmodel.named_chip(chip),
        None if free is None else [name.strip() for name in free.split(",")],
        None if times is None else read_stack(pathlib.Path(times)),
        labels,
    )


def _shape(table: Table, row: int) -> Any:
    """The shape of a row: a model of the catalogue, or its columns."""
    from jaxsd import costmodel

    name = table[row].get("model")
    if name and "d_model" not in table[0]:
        return costmodel.named_shape(name.lower())
    missing = [column for column in rows_lib.SHAPE_COLUMNS if column not in table[0]]
    if missing:
        raise ValueError(
            f"a shape needs the columns {', '.join(rows_lib.SHAPE_COLUMNS)}, or only a model"
        )
    return costmodel.Shape(
        *(int(rows_lib.column(table, column)[row]) for column in rows_lib.SHAPE_COLUMNS)
    )


def _show(out: dict[str, Any], num_rows: int) -> None:
    """Prints the parameters with their errors and how well they predict."""
    console = rich.console.Console(highlight=False)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=f"{num_rows} rows")
    table.add_column("", overflow="fold")
    for name in ("estimate", "standard error", "95 % from", "to"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in out["parameters"]:
        numbers = (one[name] for name in ("estimate", "standard_error", "low", "high"))
        table.add_row(one["name"], *map(_number, numbers))
    console.print(table)
    console.print(
        f"R2 {out['r_squared']:.5f}; relative error {_percent(out['mean_relative_error'])} on "
        f"average, {_percent(out['max_relative_error'])} at most."
    )
    if out["num_held_out"]:
        console.print(
            f"Held out: {_percent(out['held_out_error'])} on average, "
            f"{_percent(out['held_out_max_error'])} at most, of {out['num_held_out']} rows "
            "predicted by fits without them."
        )
    for name in out["at_bound"]:
        console.print(f"{name} lies on a bound: by these rows it would be beyond.")
    spans = [
        f"{name} {_number(low)} to {_number(high)}" for name, (low, high) in out["ranges"].items()
    ]
    console.print(f"Beyond these it is extrapolation: {'; '.join(spans)}.")


def _number(value: float) -> str:
    """Five digits, or a word where there are none."""
    return f"{value:.5g}" if math.isfinite(value) else "unknown"


def _percent(value: float) -> str:
    """A share with two decimals."""
    return f"{value:.2%}"
