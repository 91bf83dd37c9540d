"""Which shapes have names: a frozen `Config` and a table of them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies slowed down, for texts longer than those first trained on.

    Attributes:
      kind: "linear" divides every frequency by `factor`. "llama3" divides those whose wavelength is
        above `original_max_len / low_freq_factor`, keeps those below
        `original_max_len / high_freq_factor`, and blends in between.
      factor: by how much.
      low_freq_factor: of "llama3".
      high_freq_factor: of "llama3"; above `low_freq_factor`.
      original_max_len: of "llama3": length of the texts first trained on, in tokens.

    Raises:
      ValueError: if a field has the wrong type or value; every problem is named.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192

    def __post_init__(self) -> None:
        problems = _choice_problems("rope_scaling.kind", self.kind, ("linear", "llama3"))
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_len"):
            problems += _positive_problems(f"rope_scaling.{name}", getattr(self, name))
        if not problems and not self.high_freq_factor > self.low_freq_factor:
            problems.append(
                f"rope_scaling.high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )
        if problems:
            raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a decoder-only transformer. The defaults: RMSNorm, RoPE, GQA, SwiGLU, no biases.

    Attributes:
      vocab_size: number of token ids, V.
      d_model: width of the residual stream.
      n_layers: number of blocks.
      n_heads: query heads.
      n_kv_heads: key and value heads; divides `n_heads`.
      head_dim: size of a head, D; even, for the rotation.
      d_ff: hidden width of the gated MLP.
      rope_theta: base of the rotary frequencies.
      norm_eps: added to the mean square, or to the variance, of a norm.
      tie_embeddings: whether the output head is the embedding table.
      norm: "rms", or "layer" (mean taken off, scale and bias).
      norm_adds_one: RMSNorm multiplies by 1 + scale.
      post_norms: what attention and MLP yield is normed before it is added.
      parallel_blocks: attention and MLP read the same residual stream, and are added together.
      qk_norm: every query and key head is RMS-normed before it is rotated.
      qkv_bias: biases of queries, keys and values.
      output_bias: bias of the attention's output projection.
      mlp_bias: biases of the MLP.
      gated_mlp: down(act(gate) * up); else down(act(up)).
      activation: "silu", "gelu", "gelu_tanh" or "relu".
      rotary_dim: how many first entries of a head are rotated, even; None: all of them.
      rope_scaling: of the rotary frequencies.
      local_rope_theta: base of the frequencies in layers with a window, unscaled; None: the same as
        in the others.
      learned_positions: rows of a table of positions, added to the embedding; nothing is rotated.
      position_offset: the row of the table that is position 0.
      windows: how many tokens a layer sees back, itself included, 0 for all; layer i has entry
        i modulo their number. Empty: all layers see everything.
      attention_scale: factor of the dot products; None: 1 / sqrt(head_dim).
      attention_softcap: c; scores become c tanh(score / c).
      logit_softcap: the same for the logits.
      embedding_scale: factor of the embedding of a token.

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
    norm: str = "rms"
    norm_adds_one: bool = False
    post_norms: bool = False
    parallel_blocks: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: str = "silu"
    rotary_dim: int | None = None
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    learned_positions: int | None = None
    position_offset: int = 0
    windows: tuple[int, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.append(f"{name}={value!r} must be an integer of at least 1")
        for name in ("rope_theta", "norm_eps"):
            problems += _positive_problems(name, getattr(self, name))
        for name in _OPTIONAL_NUMBERS:
            if getattr(self, name) is not None:
                problems += _positive_problems(name, getattr(self, name))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                problems.append(f"{name}={getattr(self, name)!r} must be true or false")
        problems += _choice_problems("norm", self.norm, ("rms", "layer"))
        problems += _choice_problems(
            "activation", self.activation, ("silu", "gelu", "gelu_tanh", "relu")
        )
        for name in ("rotary_dim", "learned_positions", "position_offset"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                problems.append(f"{name}={value!r} must be an integer of at least 0")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            problems.append(f"rope_scaling={self.rope_scaling!r} must be a RopeScaling")
        if not isinstance(self.windows, tuple) or not all(map(_is_count, self.windows)):
            problems.append(f"windows={self.windows!r} must be a tuple of integers of at least 0")
        problems = problems or self._conflicts()
        if problems:
            raise ValueError("; ".join(problems))

    def _conflicts(self) -> list[str]:
        """Fields that are right one by one and wrong together."""
        problems = []
        if self.n_heads % self.n_kv_heads:
            problems.append(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim} must be even")
        rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if rotary_dim % 2 or not 0 < rotary_dim <= self.head_dim:
            problems.append(
                f"rotary_dim={rotary_dim} must be even, above 0 and at most "
                f"head_dim={self.head_dim}"
            )
        if self.learned_positions is not None and self.learned_positions <= self.position_offset:
            problems.append(
                f"learned_positions={self.learned_positions} must be above "
                f"position_offset={self.position_offset}"
            )
        if self.norm_adds_one and self.norm != "rms":
            problems.append(f"norm_adds_one needs norm='rms', not {self.norm!r}")
        return problems

    def window(self, layer: int) -> int:
        """How many tokens a layer sees back, itself included; 0 for all."""
        return self.windows[layer % len(self.windows)] if self.windows else 0

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain JSON values. Options at their default are left out."""
        fields = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _ALWAYS_WRITTEN or value != field.default:
                fields[field.name] = list(value) if isinstance(value, tuple) else value
        if self.rope_scaling is not None:
            fields["rope_scaling"] = dataclasses.asdict(self.rope_scaling)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Config":
        """A config from plain values; unknown and missing names are errors.

        Raises:
          ValueError: naming every unknown, missing or invalid field.
        """
        _check_names(cls, "config", fields)
        fields = dict(fields)
        if isinstance(fields.get("windows"), list):
            fields["windows"] = tuple(fields["windows"])
        if isinstance(scaling := fields.get("rope_scaling"), Mapping):
            _check_names(RopeScaling, "config.rope_scaling", scaling)
            fields["rope_scaling"] = RopeScaling(**scaling)
        return cls(**fields)


_COUNTS = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")
_SWITCHES = (
    *("tie_embeddings", "norm_adds_one", "post_norms", "parallel_blocks", "qk_norm"),
    *("qkv_bias", "output_bias", "mlp_bias", "gated_mlp"),
)
_OPTIONAL_NUMBERS = (
    *("local_rope_theta", "attention_scale", "attention_softcap"),
    *("logit_softcap", "embedding_scale"),
)
# The others came later: what was written before them reads, and is written, as it was.
_ALWAYS_WRITTEN = (*_COUNTS, "rope_theta", "norm_eps", "tie_embeddings")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive_problems(name: str, value: object) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return [f"{name}={value!r} must be a number above 0"]
    return []


def _choice_problems(name: str, value: Any, choices: Iterable[str]) -> list[str]:
    if value in choices:
        return []
    return [f"{name}={value!r} must be one of {', '.join(choices)}"]


def _check_names(cls: Any, what: str, fields: Mapping[str, Any]) -> None:
    """Raises ValueError if plain values name fields that are not there, or lack some."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - set(known))
    missing = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and name not in fields
    ]
    if unknown or missing:
        raise ValueError(f"{what} has unknown fields {unknown} and lacks fields {missing}")


_LLAMA3_SCALING = RopeScaling("llama3", 8.0)

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
    # Published shapes: a program can be compiled, and its memory known, without their weights.
    "llama-3.2-1b": Config(
        vocab_size=128256,
        d_model=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        d_ff=8192,
        rope_theta=500_000.0,
        rope_scaling=dataclasses.replace(_LLAMA3_SCALING, factor=32.0),
    ),
    "llama-3.1-8b": Config(
        vocab_size=128256,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=14336,
        rope_theta=500_000.0,
        tie_embeddings=False,
        rope_scaling=_LLAMA3_SCALING,
    ),
}
"""Named shapes. `dataclasses.replace(CONFIGS["tiny"], vocab_size=...)` makes a variant."""
