"""The `jaxsd` command: which function is meant, and how do results and errors leave the program?"""

import contextlib
import functools
import importlib
import inspect
import io
import json
import math
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

import jaxsd

DESCRIPTION = """\
Speculative decoding in JAX, and a model of its throughput.

A small draft model proposes tokens, a large target model verifies several in one pass: the same
text, sooner. `jaxsd demo` shows what that gains on this machine; `jaxsd COMMAND --help` explains a
command. Wrong input ends with exit status 2; JAXSD_TRACEBACK=1 shows where it was found."""

# A command is the function of its name in the module of its name. Only the one that is called is
# imported: training needs libraries that take a while to load.
COMMANDS = {
    "demo": "Decode real text with and without speculation; compare with the prediction.",
    "generate": "Continue a text, streamed as it comes.",
    "bench": "Time drafters and verifiers against plain decoding and against each other.",
    "quantise": "What fewer bits cost a model, and what its quantised copy drafts for it.",
    "train": "Train a transformer on a folder of text.",
    "design": "Find the draft that makes a target fastest, before training it.",
    "estimate": "Predict the speed of a draft and a target that exist.",
    "compile": "Compile the loop for a TPU or GPU that is not there: memory, collectives, copies.",
    "circle": "Predict drafts before they are trained, train them, measure, and compare.",
    "fit": "Fit the laws, or the times of passes, to your own measurements.",
    "reproduce": "Compute the tables and figures of three papers again and compare.",
    "info": "Show devices, versions and the models in the package.",
}

# What wrong input raises. Anything else is a bug of this program and keeps its traceback.
WRONG_INPUT = (ValueError, OSError, FloatingPointError, OverflowError)
# Set this to see where an error came from.
TRACEBACK_VARIABLE = "JAXSD_TRACEBACK"

EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE

Command = Callable[..., dict[str, Any]]
JsonFile = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="FILE",
        help="Write the result as JSON to this file; '-' is stdout, with nothing else on it.",
    ),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit status: 0, 2 for wrong input, 130 after Ctrl-C."""
    _replace_what_cannot_be_printed()
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except WRONG_INPUT as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"jaxsd: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_WRONG_INPUT


def _run(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"jaxsd {jaxsd.__version__}")
        return 0
    commands = {name: _load(name, argv[:1] == [name]) for name in COMMANDS}
    json_file, call = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="jaxsd",
        description=DESCRIPTION,
        args=argv or ["--help"],
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if json_file not in (None, "-"):
        _check_writable(json_file)  # before a minute of work, not after
    # Whatever a command or a library prints meanwhile must not get between JSON and its reader.
    with contextlib.redirect_stdout(sys.stderr) if json_file == "-" else contextlib.nullcontext():
        result = call()
    if json_file is not None:
        text = json.dumps(_plain(result), indent=2, allow_nan=False) + "\n"
        if json_file == "-":
            sys.stdout.write(text)
        else:
            pathlib.Path(json_file).write_text(text, encoding="utf-8")
    sys.stdout.flush()  # here, where a broken pipe is still caught
    return 0


def _load(name: str, is_chosen: bool) -> Callable[..., Any]:
    """The command with a `--json` option, or a stand-in for its line in `jaxsd --help`."""

    def stand_in() -> None: ...

    stand_in.__doc__ = COMMANDS[name]
    if not is_chosen:
        return stand_in
    return _with_json(getattr(importlib.import_module(f"jaxsd.cli.{name}"), name))


def _with_json(command: Command) -> Callable[..., tuple[str | None, Callable[[], dict[str, Any]]]]:
    """Adds the `json` option. Binds the arguments and does not call: tyro would eat the errors."""

    def bind(**arguments: Any) -> tuple[str | None, Callable[[], dict[str, Any]]]:
        return arguments.pop("json"), functools.partial(command, **arguments)

    signature = inspect.signature(command)
    option = inspect.Parameter(
        "json", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=JsonFile
    )
    parameters = [*signature.parameters.values(), option]
    setattr(bind, "__signature__", signature.replace(parameters=parameters))  # noqa: B010
    bind.__annotations__ = {
        **typing.get_type_hints(command, include_extras=True),
        "json": JsonFile,
    }
    bind.__doc__ = command.__doc__
    bind.__name__ = getattr(command, "__name__", "command")
    return bind


def _plain(value: Any) -> Any:
    """The same as JSON can hold it: arrays as lists, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy and JAX
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _check_writable(json_file: str) -> None:
    path = pathlib.Path(json_file)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"json={json_file!r} must be a file in an existing folder, or '-'")


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{os.fspath(error.filename)!r}: "
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _replace_what_cannot_be_printed() -> None:
    """A terminal that is not UTF-8 shows '?', instead of ending the program in mid-text."""
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
        if encoding != "utf8" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _discard_stdout() -> None:
    """Python flushes stdout once more at exit; without a reader that would print a traceback."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
