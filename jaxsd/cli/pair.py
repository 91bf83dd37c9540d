"""Which models does a command decode with: those of the package, or folders of the user's?"""

import json
import pathlib
from typing import Any, NamedTuple

import jaxsd.models
from jaxsd.models import checkpoint

DATA = pathlib.Path(jaxsd.models.__file__).parent / "data"
EMBEDDED_TARGET = DATA / "target"
EMBEDDED_DRAFT = DATA / "draft"
PROMPTS = DATA / "prompts.json"


class Prompt(NamedTuple):
    """A passage of text that no model of the pair was trained on."""

    file: str
    text: str


def load_target(target: str | None) -> checkpoint.Pretrained:
    """The target from its folder, or the embedded one.

    Raises:
      ValueError: it cannot be read; names the folder and every problem.
    """
    return checkpoint.load_model(_folder("target", target, EMBEDDED_TARGET))


def load_pair(
    target: str | None, draft: str | None
) -> tuple[checkpoint.Pretrained, checkpoint.Pretrained]:
    """Target and draft from their folders, or the embedded pair.

    Raises:
      ValueError: a model cannot be read, a target comes without a draft, or the two do not share a
        tokenizer.
    """
    if target is not None and draft is None:
        raise ValueError(f"target={target!r} needs a draft of the same tokenizer: pass --draft too")
    models = load_target(target), checkpoint.load_model(_folder("draft", draft, EMBEDDED_DRAFT))
    checkpoint.check_pair(*models)
    return models


def load_prompts(path: str | None) -> list[Prompt]:
    """Prompts from a file as `python -m jaxsd.cli.prompts` writes it, or those of the package.

    Raises:
      ValueError: the file is missing or is not of that form.
    """
    where = PROMPTS if path is None else pathlib.Path(path)
    try:
        content: Any = json.loads(where.read_text(encoding="utf-8"))
        prompts = [Prompt(str(item["file"]), str(item["text"])) for item in content["prompts"]]
    except OSError as error:
        raise ValueError(f"cannot read prompts {str(where)!r}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"prompts {str(where)!r} must be JSON with a list 'prompts' of objects with 'file' and "
            f"'text' ({type(error).__name__}: {error})"
        ) from error
    if not prompts or not all(prompt.text for prompt in prompts):
        raise ValueError(f"prompts {str(where)!r} must hold at least one prompt, and none empty")
    return prompts


def _folder(role: str, given: str | None, embedded: pathlib.Path) -> pathlib.Path:
    if given is not None:
        return pathlib.Path(given)
    if not embedded.is_dir():
        raise ValueError(f"this installation has no embedded {role}: pass --{role} DIR")
    return embedded
