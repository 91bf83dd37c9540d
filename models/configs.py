"""Which shapes have names: a frozen `Config` and a table of them."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a decoder-only transformer (RMSNorm, RoPE, GQA, SwiGLU).

    Attributes:
      vocab_size: number of token ids, V.
      d_model: width of the residual stream.
      n_layers: number of blocks.
      n_heads: query heads.
      n_kv_heads: key and value heads; divides `n_heads`.
      head_dim: size of a head, D; even, for the rotation.
      d_ff: hidden width of the gated MLP.
      rope_theta: base of the rotary frequencies.
      norm_eps: added to the mean square in RMSNorm.
      tie_embeddings: whether the output head is the embedding table.

    Raises:
      ValueError: if a field has the wrong type or value; every problem is named.

    >>> Config(vocab_size=64, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16)
    ... # doctest: +ELLIPSIS
    Config(vocab_size=64, d_model=8, ...)
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        problems = []
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.append(f"{name}={value!r} must be an integer of at least 1")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                problems.append(f"{name}={value!r} must be a number above 0")
        if not isinstance(self.tie_embeddings, bool):
            problems.append(f"tie_embeddings={self.tie_embeddings!r} must be true or false")
        if not problems:
            if self.n_heads % self.n_kv_heads:
                problems.append(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
            if self.head_dim % 2:
                problems.append(f"head_dim={self.head_dim} must be even")
        if problems:
            raise ValueError("; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Config":
        """A config from plain values; unknown and missing names are errors.

        Raises:
          ValueError: naming every unknown, missing or invalid field.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - set(known))
        missing = [
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and name not in fields
        ]
        if unknown or missing:
            raise ValueError(f"config has unknown fields {unknown} and lacks fields {missing}")
        return cls(**fields)


_COUNTS = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")


CONFIGS: dict[str, Config] = {
    # Seconds to train: tests, and a first look.
    "tiny": Config(
        vocab_size=512, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=176
    ),
    # The pair that ships with the package. The draft costs a fortieth of the target.
    "embedded-draft": Config(
        vocab_size=2048, d_model=96, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=32, d_ff=320
    ),
    "embedded-target": Config(
        vocab_size=2048, d_model=512, n_layers=6, n_heads=8, n_kv_heads=2, head_dim=64, d_ff=1408
    ),
    # Sizes for benchmarks.
    "30m": Config(
        vocab_size=8192, d_model=512, n_layers=8, n_heads=8, n_kv_heads=8, head_dim=64, d_ff=1408
    ),
    "120m": Config(
        vocab_size=8192, d_model=768, n_layers=16, n_heads=12, n_kv_heads=12, head_dim=64, d_ff=2048
    ),
}
"""Named shapes. `dataclasses.replace(CONFIGS["tiny"], vocab_size=...)` makes a variant."""
