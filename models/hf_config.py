"""What a published config.json says about the shape of a model, and how we say it there.

Each family has a function that takes the fields apart and one that writes them. A field that this
library does not know is refused: passed over, it could change what the model computes.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping
from typing import Any

from .configs import Config, RopeScaling

# Fields that say nothing about what a trained model computes.
_NEUTRAL = (
    *("_name_or_path", "_attn_implementation*", "architectures", "auto_map", "model_type"),
    *("torch_dtype", "dtype", "transformers_version", "use_cache", "cache_implementation"),
    *("*dropout*", "*_pdrop", "layerdrop", "init_std", "initializer_range", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "prefix"),
    *("decoder_start_token_id", "is_decoder", "is_encoder_decoder", "id2label", "label2id"),
    *("_num_labels", "num_labels", "problem_type", "return_dict*", "output_*", "summary_*"),
    *("task_specific_params", "gradient_checkpointing", "chunk_size_feed_forward", "n_ctx"),
    *("max_position_embeddings", "max_sequence_length", "reorder_and_upcast_attn"),
    *("tokenizer_class", "torchscript"),
)
# Fields that may be there as long as they say what they say in every model here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False, None),
    "tie_encoder_decoder": (False,),
}


class Fields:
    """Takes a config.json apart, noting what is wrong with it and what nobody took."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self.problems: list[str] = []
        self._taken: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """A field of any kind."""
        self._taken.add(name)
        return self.content.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        """A field that is an integer above 0; null is the default, a missing one a problem."""
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.problems.append(f"{name}={value!r} must be an integer of at least 1")
            return 1
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A field that is a number above 0."""
        value = self.optional_number(name, default)
        if value is None:
            self.problems.append(f"{name}=None must be a number above 0")
            return 1.0
        return value

    def optional_number(self, name: str, default: float | None = None) -> float | None:
        """A field that is a number above 0 or null, which is kept if it is written."""
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            self.problems.append(f"{name}={value!r} must be a number above 0")
            return 1.0
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        return self.choice(name, {True: True, False: False}, default)

    def choice(self, name: str, choices: Mapping[Any, Any], default: Any) -> Any:
        """What the field's value stands for."""
        value = self.get(name, default)
        known = [one for one in choices if type(one) is type(value) and one == value]
        if not known:
            self.problems.append(
                f"{name}={value!r} is not supported; supported: {_any_of(choices)}"
            )
            return next(iter(choices.values()))
        return choices[known[0]]

    def fixed(self, name: str, *allowed: Any) -> None:
        """A field that may be left out, or be one of these."""
        self.choice(name, dict.fromkeys(allowed), allowed[0])

    def finish(self, model_type: str) -> None:
        """Raises ValueError for all that was found, and for all that nobody took."""
        for name, value in self.content.items():
            if name in _FIXED:
                self.fixed(name, *_FIXED[name])
            elif name not in self._taken and value is not None and not _is_neutral(name):
                self.problems.append(
                    f"{name}={value!r} is unknown for model_type={model_type!r}; known: "
                    f"{', '.join(sorted(self._taken))} (ignore=[{name!r}] passes over it)"
                )
        if self.problems:
            raise ValueError("; ".join(self.problems))


def _is_neutral(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _NEUTRAL)


def _any_of(choices: Mapping[Any, Any]) -> str:
    return ", ".join(repr(one) for one in choices)


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
# The names to write.
_ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def _rope(fields: Fields, default_theta: float, theta_name: str = "rope_theta") -> dict[str, Any]:
    """Base and scaling, from `rope_theta` and `rope_scaling` or from `rope_parameters`."""
    parameters = fields.get("rope_parameters")
    if parameters is None:
        theta = fields.number(theta_name, default_theta)
        return {
            "rope_theta": theta,
            "rope_scaling": _scaling(fields, "rope_scaling", fields.get("rope_scaling")),
        }
    return _rope_parameters(fields, "rope_parameters", parameters, default_theta)


def _rope_parameters(
    fields: Fields, name: str, parameters: Any, default_theta: float
) -> dict[str, Any]:
    if not isinstance(parameters, dict):
        fields.problems.append(f"{name}={parameters!r} must be an object")
        return {}
    rest = dict(parameters)
    inner = Fields({"rope_theta": rest.pop("rope_theta", default_theta)})
    theta = inner.number("rope_theta")
    fields.problems += [f"{name}.{problem}" for problem in inner.problems]
    rest.pop("partial_rotary_factor", None)
    return {"rope_theta": theta, "rope_scaling": _scaling(fields, name, rest)}


def _scaling(fields: Fields, name: str, scaling: Any) -> RopeScaling | None:
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        fields.problems.append(f"{name}={scaling!r} must be an object or null")
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    wanted = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_max_len",
        },
    }
    if not isinstance(kind, str) or kind not in wanted:
        fields.problems.append(
            f"{name}.rope_type={kind!r} is not supported; supported: {_any_of(wanted)}"
        )
        return None
    names = wanted[kind]
    unknown = scaling.keys() - {*names, "rope_type", "type"}
    if missing := sorted(names.keys() - scaling.keys()):
        fields.problems.append(f"{name} of type {kind!r} lacks {', '.join(missing)}")
        return None
    for extra in sorted(unknown):
        # Older files repeat here what is written outside.
        if extra not in ("rope_theta", "original_max_position_embeddings"):
            fields.problems.append(f"{name}.{extra}={scaling[extra]!r} is unknown for {kind!r}")
    if kind == "default":
        return None
    try:
        return RopeScaling(kind, **{ours: scaling[theirs] for theirs, ours in names.items()})
    except ValueError as error:
        fields.problems.append(f"{name}: {error}")
        return None


def _write_rope(config: Config) -> dict[str, Any]:
    return {"rope_theta": config.rope_theta, "rope_scaling": _write_scaling(config.rope_scaling)}


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    content: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        content |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_len,
        }
    return content


def _sizes(fields: Fields, head_dim: int | None = None) -> dict[str, Any]:
    """Sizes under the names that most families use."""
    d_model, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": d_model,
        "n_layers": fields.integer("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": fields.integer("num_key_value_heads", n_heads),
        "head_dim": fields.integer("head_dim", head_dim or max(1, d_model // n_heads)),
        "d_ff": fields.integer("intermediate_size"),
    }


def _write_sizes(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _llama_like(
    fields: Fields, *, theta: float = 10_000.0, head_dim: int | None = None, ties: bool = False
) -> dict[str, Any]:
    """What Llama, Mistral and Qwen have in common."""
    return {
        **_sizes(fields, head_dim),
        **_rope(fields, theta),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_embeddings": fields.switch("tie_word_embeddings", ties),
        "activation": fields.choice("hidden_act", _ACTIVATIONS, "silu"),
    }


def _write_llama_like(config: Config) -> dict[str, Any]:
    return {
        **_write_sizes(config),
        **_write_rope(config),
        "rms_norm_eps": config.norm_eps,
        "hidden_act": _ACTIVATION_NAMES[config.activation],
    }


def read_llama(fields: Fields) -> dict[str, Any]:
    has_biases = fields.switch("attention_bias", False)
    return {
        **_llama_like(fields),
        "qkv_bias": has_biases,
        "output_bias": has_biases,
        "mlp_bias": fields.switch("mlp_bias", False),
    }


def write_llama(config: Config) -> dict[str, Any]:
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return {**_write_llama_like(config), **biases}


def read_mistral(fields: Fields) -> dict[str, Any]:
    window = fields.get("sliding_window", 4096)
    return {**_llama_like(fields), "windows": _windows(fields, window, lambda index: True)}


def write_mistral(config: Config) -> dict[str, Any]:
    return {**_write_llama_like(config), **_write_windows(config)}


def read_qwen2(fields: Fields) -> dict[str, Any]:
    return {**_llama_like(fields), "qkv_bias": True, "windows": _qwen_windows(fields)}


def write_qwen(config: Config) -> dict[str, Any]:
    return {
        **_write_llama_like(config),
        **_write_windows(config),
        "use_sliding_window": bool(config.windows),
        "layer_types": _layer_types(config),
    }


def read_qwen3(fields: Fields) -> dict[str, Any]:
    has_biases = fields.switch("attention_bias", False)
    return {
        **_llama_like(fields, head_dim=128),
        "qkv_bias": has_biases,
        "output_bias": has_biases,
        "qk_norm": True,
        "windows": _qwen_windows(fields),
    }


def write_qwen3(config: Config) -> dict[str, Any]:
    return {**write_qwen(config), "attention_bias": config.qkv_bias}


def _qwen_windows(fields: Fields) -> tuple[int, ...]:
    window, first = fields.get("sliding_window", 4096), fields.get("max_window_layers", 28)
    fields.get("layer_types")
    if not fields.switch("use_sliding_window", False):
        return ()
    if isinstance(first, bool) or not isinstance(first, int):
        fields.problems.append(f"max_window_layers={first!r} must be an integer")
        return ()
    return _windows(fields, window, lambda index: index >= first)


def _read_gemma(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    sizes = _sizes(fields, 256)
    name = "hidden_activation" if "hidden_activation" in fields.content else "hidden_act"
    activation = fields.choice(name, _ACTIVATIONS, "gelu_pytorch_tanh")
    fields.get("hidden_act")
    return {
        **sizes,
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_embeddings": fields.switch("tie_word_embeddings", True),
        "norm_adds_one": True,
        "post_norms": True,
        "activation": activation,
        "attention_scale": fields.number("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_scale": sizes["d_model"] ** 0.5,
    }


def read_gemma2(fields: Fields) -> dict[str, Any]:
    fields.fixed("attention_bias", False)
    fields.get("sliding_window_size")  # an older name, written beside the newer
    return {
        **_read_gemma(fields),
        **_rope(fields, 10_000.0),
        "attention_softcap": fields.optional_number("attn_logit_softcapping", 50.0),
        "logit_softcap": fields.optional_number("final_logit_softcapping", 30.0),
        "windows": _windows(fields, fields.get("sliding_window", 4096), lambda i: i % 2 == 0),
    }


def _write_gemma(config: Config) -> dict[str, Any]:
    scale = config.attention_scale or config.head_dim**-0.5
    return {
        **_write_sizes(config),
        **_write_windows(config),
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": _ACTIVATION_NAMES[config.activation],
        "query_pre_attn_scalar": _plain(scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "layer_types": _layer_types(config),
    }


def write_gemma2(config: Config) -> dict[str, Any]:
    return {**_write_gemma(config), **_write_rope(config)}


def read_gemma3(fields: Fields) -> dict[str, Any]:
    fields.fixed("attention_bias", False)
    pattern = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 1:
        fields.problems.append(f"sliding_window_pattern={pattern!r} must be an integer above 0")
        pattern = 1
    window = fields.get("sliding_window", 4096)
    options = {
        **_read_gemma(fields),
        "qk_norm": True,
        "attention_softcap": fields.optional_number("attn_logit_softcapping"),
        "logit_softcap": fields.optional_number("final_logit_softcapping"),
        "windows": _windows(fields, window, lambda index: (index + 1) % pattern != 0),
    }
    parameters = fields.get("rope_parameters")
    if isinstance(parameters, dict) and "full_attention" in parameters:
        name = "rope_parameters.full_attention"
        options |= _rope_parameters(fields, name, parameters["full_attention"], 1_000_000.0)
        name = "rope_parameters.sliding_attention"
        local = _rope_parameters(fields, name, parameters.get("sliding_attention", {}), 10_000.0)
        if local.get("rope_scaling") is not None:
            fields.problems.append(f"{name} is scaled; supported: rope_type 'default'")
        return {**options, "local_rope_theta": local.get("rope_theta")}
    local_theta = fields.number("rope_local_base_freq", 10_000.0)
    return {**options, **_rope(fields, 1_000_000.0), "local_rope_theta": local_theta}


def write_gemma3(config: Config) -> dict[str, Any]:
    local_theta = config.local_rope_theta or config.rope_theta
    return {
        **_write_gemma(config),
        **_write_rope(config),
        "rope_local_base_freq": local_theta,
    }


def _plain(value: float) -> float:
    """A number free of the rounding of a square root taken and undone."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _windows(fields: Fields, window: Any, is_local: Callable[[int], bool]) -> tuple[int, ...]:
    """The windows of all layers, cut to one period: from `layer_types`, or else by number."""
    n_layers, types = fields.integer("num_hidden_layers"), fields.get("layer_types")
    if window is None:
        return ()
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        fields.problems.append(f"sliding_window={window!r} must be an integer above 0 or null")
        return ()
    if n_layers > _MAX_LAYERS:
        fields.problems.append(f"num_hidden_layers={n_layers} is more than {_MAX_LAYERS}")
        return ()
    if types is None:
        types = [_LAYER_TYPES[is_local(index)] for index in range(n_layers)]
    is_list = isinstance(types, list) and len(types) == n_layers
    if not is_list or not all(one in _LAYER_TYPES for one in types):
        fields.problems.append(
            f"layer_types={types!r} must be {n_layers} of {', '.join(_LAYER_TYPES)}"
        )
        return ()
    sizes = tuple(window if one == _LAYER_TYPES[True] else 0 for one in types)
    for period in range(1, n_layers + 1):
        if all(sizes[index] == sizes[index % period] for index in range(n_layers)):
            return sizes[:period] if any(sizes) else ()
    return ()


# Of a list with an entry for each layer; a damaged file can ask for a billion.
_MAX_LAYERS = 10_000
_LAYER_TYPES = ("full_attention", "sliding_attention")


def _layer_types(config: Config) -> list[str]:
    return [_LAYER_TYPES[config.window(index) > 0] for index in range(config.n_layers)]


def _write_windows(config: Config) -> dict[str, Any]:
    return {"sliding_window": max(config.windows, default=0) or None}


def read_gpt_neox(fields: Fields) -> dict[str, Any]:
    sizes = _sizes(fields)
    parameters = fields.get("rope_parameters")
    share = fields.get("rotary_pct", 0.25)
    if isinstance(parameters, dict):
        share = parameters.get("partial_rotary_factor", share)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        fields.problems.append(f"rotary_pct={share!r} must be a number in (0, 1]")
        share = 1.0
    rotary_dim = int(sizes["head_dim"] * share)
    has_biases = fields.switch("attention_bias", True)
    return {
        **sizes,
        **_rope(fields, 10_000.0, "rotary_emb_base"),
        "norm_eps": fields.number("layer_norm_eps", 1e-5),
        "tie_embeddings": fields.switch("tie_word_embeddings", False),
        "norm": "layer",
        "parallel_blocks": fields.switch("use_parallel_residual", True),
        "qkv_bias": has_biases,
        "output_bias": has_biases,
        "mlp_bias": True,
        "gated_mlp": False,
        "activation": fields.choice("hidden_act", _ACTIVATIONS, "gelu"),
        "rotary_dim": None if rotary_dim == sizes["head_dim"] else rotary_dim,
    }


def write_gpt_neox(config: Config) -> dict[str, Any]:
    sizes = _write_sizes(config)
    return {
        **{name: sizes[name] for name in sizes if name not in ("num_key_value_heads", "head_dim")},
        "rope_scaling": _write_scaling(config.rope_scaling),
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": (config.rotary_dim or config.head_dim) / config.head_dim,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_blocks,
        "attention_bias": config.qkv_bias,
        "hidden_act": _ACTIVATION_NAMES[config.activation],
    }


def _old_style(fields: Fields, d_model: int, n_heads: int) -> dict[str, Any]:
    """What GPT-2 and OPT have in common: LayerNorm, biases everywhere, as many keys as queries."""
    return {
        "norm": "layer",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
        "vocab_size": fields.integer("vocab_size"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": max(1, d_model // n_heads),
        "tie_embeddings": fields.switch("tie_word_embeddings", True),
    }


def read_gpt2(fields: Fields) -> dict[str, Any]:
    d_model = fields.integer("n_embd")
    fields.fixed("scale_attn_weights", True)
    fields.fixed("scale_attn_by_inverse_layer_idx", False)
    return {
        **_old_style(fields, d_model, fields.integer("n_head")),
        "n_layers": fields.integer("n_layer"),
        "d_ff": fields.integer("n_inner", 4 * d_model),
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "activation": fields.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        "learned_positions": fields.integer("n_positions", 1024),
    }


def write_gpt2(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "n_positions": config.learned_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
    }


# OPT's table has two rows in front that no token uses.
_OPT_OFFSET = 2


def read_opt(fields: Fields) -> dict[str, Any]:
    d_model = fields.integer("hidden_size")
    fields.fixed("do_layer_norm_before", True)
    fields.fixed("_remove_final_layer_norm", False)
    fields.fixed("enable_bias", True)
    fields.fixed("layer_norm_elementwise_affine", True)
    fields.fixed("word_embed_proj_dim", d_model)
    return {
        **_old_style(fields, d_model, fields.integer("num_attention_heads")),
        "n_layers": fields.integer("num_hidden_layers"),
        "d_ff": fields.integer("ffn_dim"),
        "activation": fields.choice("activation_function", _ACTIVATIONS, "relu"),
        "learned_positions": fields.integer("max_position_embeddings", 2048) + _OPT_OFFSET,
        "position_offset": _OPT_OFFSET,
    }


def write_opt(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "word_embed_proj_dim": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "ffn_dim": config.d_ff,
        "max_position_embeddings": (config.learned_positions or 0) - _OPT_OFFSET,
        "activation_function": _ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
    }
