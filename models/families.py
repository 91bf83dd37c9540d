"""The published families of models: how each one's config.json and tensors become ours.

A `Family` is two translations between a config.json and a `Config` (`hf_config.py`), and a table
from the leaves of our tree to the tensors that fill them (`hf_names.py`). Everything here is names
and shapes; `convert.py` moves the numbers.
"""

import fnmatch
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from . import checkpoint, hf_config, hf_names
from .configs import Config
from .transformer import abstract_params


class Family(NamedTuple):
    """One `model_type`.

    read: fields of a config.json to arguments of `Config`.
    write: a `Config` to the fields that `read` would read, as far as the family can say it.
    table: leaf, `{i}` for a layer, to the tensors in it.
    architecture: what config.json calls the model with a head.
    prefix: of all names but the head's; left out in some checkpoints.
    skipped: patterns of tensors that hold no weights.
    """

    read: Callable[[hf_config.Fields], dict[str, Any]]
    write: Callable[[Config], dict[str, Any]]
    table: Mapping[str, hf_names.Source]
    architecture: str
    prefix: str = "model."
    skipped: tuple[str, ...] = ("*.rotary_emb.inv_freq",)


class Piece(NamedTuple):
    """One tensor of a checkpoint: `view(leaf)` is what it fills, reshaped."""

    name: str
    shape: tuple[int, ...]  # in the checkpoint
    leaf: str  # dotted path in our tree
    view: Callable[[np.ndarray], np.ndarray]
    is_transposed: bool


def read_config(content: Mapping[str, Any], ignore: Collection[str] = ()) -> Config:
    """The `Config` that a config.json describes.

    Args:
      content: the JSON object.
      ignore: names of fields to pass over.

    Raises:
      ValueError: naming every field that is missing, unknown or not supported, with its value.
    """
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type={model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    fields = hf_config.Fields({name: content[name] for name in content if name not in ignore})
    options = FAMILIES[model_type].read(fields)
    fields.finish(model_type)
    return Config(**options)


def write_config(config: Config, model_type: str | None = None) -> dict[str, Any]:
    """The content of a config.json that reads as `config`.

    Args:
      config: any shape.
      model_type: the family to write; None: the first that can say all of the config.

    Raises:
      ValueError: no family, or not this one, can say it.
    """
    candidates = FAMILIES if model_type is None else [model_type]
    for name in candidates:
        if name not in FAMILIES:
            raise ValueError(f"model_type={name!r} must be one of {', '.join(FAMILIES)}")
        family = FAMILIES[name]
        content = {"model_type": name, "architectures": [family.architecture]}
        content |= family.write(config)
        try:
            if read_config(content) == config:
                return content
        except ValueError:
            continue
    raise ValueError(f"no config.json of {', '.join(candidates)} says what {config} says")


def pieces(family: Family, config: Config) -> list[Piece]:
    """Every tensor of a checkpoint of this shape, in the order of the tree's leaves."""
    found = []
    for path, leaf in checkpoint.flatten(abstract_params(config)).items():
        parents = path.split(".")
        layer = parents[1] if parents[0] == "layers" else ""
        template = path.replace(f"layers.{layer}.", "layers.{i}.") if layer else path
        source = family.table[template]
        views = _parts(parents[-1], len(source.names), source.is_transposed)
        outline = np.broadcast_to(np.empty((), np.bool_), leaf.shape)
        for name, view in zip(source.names, views, strict=True):
            shape = view(outline).shape
            is_vector = parents[-1].endswith("bias") or len(shape) == 1
            flat = (math.prod(shape),) if is_vector else (math.prod(shape[:-1]), shape[-1])
            stored = flat[::-1] if source.is_transposed else flat
            found.append(
                Piece(name.replace("{i}", layer), stored, path, view, source.is_transposed)
            )
    return found


def is_skipped(family: Family, name: str) -> bool:
    """Whether a tensor holds no weights: tables that are computed, masks."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in family.skipped)


def _parts(leaf: str, num_parts: int, is_transposed: bool) -> list[Callable]:
    """The views of a leaf that its tensors fill, in order."""
    if leaf in ("qkv", "qkv_bias") and num_parts == 3:
        # [H_kv, G + 2, ...]: the queries of a key head, its key, its value.
        return [lambda x: x[:, :-2], lambda x: x[:, -2], lambda x: x[:, -1]]
    if leaf in ("qkv", "qkv_bias") and is_transposed:
        # One tensor, but all queries first, then all keys, then all values.
        return [lambda x: x.swapaxes(0, 1)]
    if num_parts == 2:
        return [lambda x: x[0], lambda x: x[1]]
    return [lambda x: x]


FAMILIES: dict[str, Family] = {
    "llama": Family(
        hf_config.read_llama, hf_config.write_llama, hf_names.LLAMA, "LlamaForCausalLM"
    ),
    "mistral": Family(
        hf_config.read_mistral, hf_config.write_mistral, hf_names.LLAMA, "MistralForCausalLM"
    ),
    "qwen2": Family(hf_config.read_qwen2, hf_config.write_qwen, hf_names.LLAMA, "Qwen2ForCausalLM"),
    "qwen3": Family(
        hf_config.read_qwen3, hf_config.write_qwen3, hf_names.LLAMA, "Qwen3ForCausalLM"
    ),
    "gemma2": Family(
        hf_config.read_gemma2, hf_config.write_gemma2, hf_names.GEMMA, "Gemma2ForCausalLM"
    ),
    "gemma3_text": Family(
        hf_config.read_gemma3, hf_config.write_gemma3, hf_names.GEMMA, "Gemma3ForCausalLM"
    ),
    "gpt_neox": Family(
        hf_config.read_gpt_neox,
        hf_config.write_gpt_neox,
        hf_names.GPT_NEOX,
        "GPTNeoXForCausalLM",
        prefix="",
        skipped=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    ),
    "gpt2": Family(
        hf_config.read_gpt2,
        hf_config.write_gpt2,
        hf_names.GPT2,
        "GPT2LMHeadModel",
        prefix="transformer.",
        skipped=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
    ),
    "opt": Family(hf_config.read_opt, hf_config.write_opt, hf_names.OPT, "OPTForCausalLM"),
}
"""The families by their `model_type`."""
