"""The small trained pair that ships with the package: everything runs without a download."""

import pathlib
from typing import Any, Literal

import jax.numpy as jnp

from .checkpoint import Pretrained, load_model

DATA = pathlib.Path(__file__).parent / "data"


def load_embedded(role: Literal["target", "draft"], dtype: Any = jnp.float32) -> Pretrained:
    """The embedded target or draft: a transformer trained on Python sources, and its tokenizer.

    Both have the same tokenizer. How they were trained, and how well, is in
    `models/data/MODEL_CARD.md`.

    Args:
      role: "target" (18M parameters) or "draft" (0.4M).
      dtype: type of the parameters; they are stored in bfloat16.

    Raises:
      ValueError: another role, or an installation whose files are missing or damaged.

    >>> draft = load_embedded("draft")
    >>> draft.tokenizer.decode(draft.tokenizer.encode("def main():"))
    'def main():'
    """
    if role not in ("target", "draft"):
        raise ValueError(f"role={role!r} must be 'target' or 'draft'")
    return load_model(DATA / role, dtype)
