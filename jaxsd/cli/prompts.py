"""Which passages does the demo continue? Run once per tokenizer; the result ships with the package.

    python -m jaxsd.cli.prompts --tokenizer models/data/target --out models/data/prompts.json

They are drawn by a seed from files that training held out, one from each file, and nobody chose
among them. They are stored as text, because another version of Python has other files.
"""

import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsd.models import corpus

# Folders of prose and of tables, the latter near copies of files that were trained on.
NOT_CODE = ("pydoc_data", "encodings")


def draw_prompts(
    documents: Sequence[corpus.Document],
    tokenizer: corpus.Tokenizer,
    *,
    num_prompts: int,
    length: int,
    seed: int,
) -> list[dict[str, str]]:
    """Passages of `length` tokens that begin a line, each from another held-out document.

    Raises:
      ValueError: fewer documents than prompts have such a passage.
    """
    _, held_out = corpus.split_documents(documents)
    order = np.random.default_rng(seed).permutation(len(held_out))
    prompts: list[dict[str, str]] = []
    for index in order.tolist():
        if len(prompts) == num_prompts:
            break
        document = held_out[index]
        tokens = np.array([tokenizer.eos_id, *tokenizer.encode(document.text)], np.int32)
        if len(tokens) <= 2 * length:
            continue
        try:
            passage = corpus.held_out_prompts(tokenizer, tokens, 1, length, seed=seed)[0]
        except ValueError:  # no line of it begins early enough
            continue
        text = tokenizer.decode(passage)
        if "\ufffd" not in text:  # cut inside a character
            prompts.append({"file": document.path, "text": text})
    if len(prompts) < num_prompts:
        raise ValueError(f"only {len(prompts)} held-out files have a passage of {length} tokens")
    return prompts


def main(
    tokenizer: str, out: str, num_prompts: int = 8, length: int = 64, seed: int = 0
) -> dict[str, Any]:
    """Draws the demo's prompts from the held-out side of Python's standard library.

    Args:
      tokenizer: folder of a model; passages are measured in its tokens.
      out: file to write.
      num_prompts: how many.
      length: tokens of each.
      seed: of the choice.
    """
    files = corpus.read_files(
        corpus.standard_library(), (".py",), exclude=(*corpus.STANDARD_LIBRARY_EXCLUDE, *NOT_CODE)
    )
    content = {
        "source": f"the standard library of Python {platform.python_version()}, held-out files",
        "license": "PSF-2.0",
        "seed": seed,
        "tokens": length,
        "prompts": draw_prompts(
            files.documents,
            corpus.load_tokenizer(tokenizer),
            num_prompts=num_prompts,
            length=length,
            seed=seed,
        ),
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    pathlib.Path(out).write_text(text, encoding="utf-8")
    return content


if __name__ == "__main__":
    import tyro

    print(f"{len(tyro.cli(main)['prompts'])} prompts written")
