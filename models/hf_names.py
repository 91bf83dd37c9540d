"""What published checkpoints call their tensors: from the leaves of our tree to those in each."""

from typing import NamedTuple


class Source(NamedTuple):
    """The tensors that fill one leaf.

    names: one, or one per part: queries, keys and values; gate and up.
    is_transposed: stored `[in, out]`.
    """

    names: tuple[str, ...]
    is_transposed: bool = False


HEAD_NAME = "lm_head.weight"


def _one(name: str) -> Source:
    return Source((name,))


def _affine(ours: str, theirs: str, bias: str = "bias") -> dict[str, Source]:
    """Weight and bias of one projection."""
    leaf = f"{ours}_bias" if bias == "bias" else bias
    return {ours: _one(f"{theirs}.weight"), leaf: _one(f"{theirs}.bias")}


def _layer_norm(ours: str, theirs: str) -> dict[str, Source]:
    return {f"{ours}.scale": _one(f"{theirs}.weight"), f"{ours}.bias": _one(f"{theirs}.bias")}


def _projections(layer: str, attention: str, names: tuple[str, ...]) -> dict[str, Source]:
    """Queries, keys and values in three tensors, weights and biases."""
    ours = "layers.{i}.attention.qkv"
    return {
        ours: Source(tuple(f"{layer}.{attention}.{name}.weight" for name in names)),
        f"{ours}_bias": Source(tuple(f"{layer}.{attention}.{name}.bias" for name in names)),
    }


_QKV = ("q_proj", "k_proj", "v_proj")
_LAYER = "model.layers.{i}"
LLAMA: dict[str, Source] = {
    "embedding": _one("model.embed_tokens.weight"),
    "head": _one(HEAD_NAME),
    "final_norm.scale": _one("model.norm.weight"),
    "layers.{i}.attention_norm.scale": _one(f"{_LAYER}.input_layernorm.weight"),
    **_projections(_LAYER, "self_attn", _QKV),
    "layers.{i}.attention.query_norm.scale": _one(f"{_LAYER}.self_attn.q_norm.weight"),
    "layers.{i}.attention.key_norm.scale": _one(f"{_LAYER}.self_attn.k_norm.weight"),
    **_affine("layers.{i}.attention.out", f"{_LAYER}.self_attn.o_proj"),
    "layers.{i}.mlp_norm.scale": _one(f"{_LAYER}.post_attention_layernorm.weight"),
    "layers.{i}.mlp.gate_up": Source(
        (f"{_LAYER}.mlp.gate_proj.weight", f"{_LAYER}.mlp.up_proj.weight")
    ),
    "layers.{i}.mlp.gate_up_bias": Source(
        (f"{_LAYER}.mlp.gate_proj.bias", f"{_LAYER}.mlp.up_proj.bias")
    ),
    **_affine("layers.{i}.mlp.down", f"{_LAYER}.mlp.down_proj"),
}
GEMMA = {
    **LLAMA,
    "layers.{i}.attention_post_norm.scale": _one(f"{_LAYER}.post_attention_layernorm.weight"),
    "layers.{i}.mlp_norm.scale": _one(f"{_LAYER}.pre_feedforward_layernorm.weight"),
    "layers.{i}.mlp_post_norm.scale": _one(f"{_LAYER}.post_feedforward_layernorm.weight"),
}
_NEOX_LAYER = "gpt_neox.layers.{i}"
GPT_NEOX = {
    "embedding": _one("gpt_neox.embed_in.weight"),
    "head": _one("embed_out.weight"),
    **_layer_norm("final_norm", "gpt_neox.final_layer_norm"),
    **_layer_norm("layers.{i}.attention_norm", f"{_NEOX_LAYER}.input_layernorm"),
    **_affine("layers.{i}.attention.qkv", f"{_NEOX_LAYER}.attention.query_key_value"),
    **_affine("layers.{i}.attention.out", f"{_NEOX_LAYER}.attention.dense"),
    **_layer_norm("layers.{i}.mlp_norm", f"{_NEOX_LAYER}.post_attention_layernorm"),
    **_affine("layers.{i}.mlp.up", f"{_NEOX_LAYER}.mlp.dense_h_to_4h"),
    **_affine("layers.{i}.mlp.down", f"{_NEOX_LAYER}.mlp.dense_4h_to_h"),
}
_GPT2_LAYER = "transformer.h.{i}"
GPT2 = {
    "embedding": _one("transformer.wte.weight"),
    "position_embedding": _one("transformer.wpe.weight"),
    "head": _one(HEAD_NAME),
    **_layer_norm("final_norm", "transformer.ln_f"),
    **_layer_norm("layers.{i}.attention_norm", f"{_GPT2_LAYER}.ln_1"),
    **_affine("layers.{i}.attention.qkv", f"{_GPT2_LAYER}.attn.c_attn"),
    **_affine("layers.{i}.attention.out", f"{_GPT2_LAYER}.attn.c_proj"),
    **_layer_norm("layers.{i}.mlp_norm", f"{_GPT2_LAYER}.ln_2"),
    **_affine("layers.{i}.mlp.up", f"{_GPT2_LAYER}.mlp.c_fc"),
    **_affine("layers.{i}.mlp.down", f"{_GPT2_LAYER}.mlp.c_proj"),
}
# Its projections are stored [in, out].
for _name in ("attention.qkv", "attention.qkv_bias", "attention.out", "mlp.up", "mlp.down"):
    GPT2[f"layers.{{i}}.{_name}"] = GPT2[f"layers.{{i}}.{_name}"]._replace(is_transposed=True)
_OPT_LAYER = "model.decoder.layers.{i}"
OPT = {
    "embedding": _one("model.decoder.embed_tokens.weight"),
    "position_embedding": _one("model.decoder.embed_positions.weight"),
    "head": _one(HEAD_NAME),
    **_layer_norm("final_norm", "model.decoder.final_layer_norm"),
    **_layer_norm("layers.{i}.attention_norm", f"{_OPT_LAYER}.self_attn_layer_norm"),
    **_projections(_OPT_LAYER, "self_attn", _QKV),
    **_affine("layers.{i}.attention.out", f"{_OPT_LAYER}.self_attn.out_proj"),
    **_layer_norm("layers.{i}.mlp_norm", f"{_OPT_LAYER}.final_layer_norm"),
    **_affine("layers.{i}.mlp.up", f"{_OPT_LAYER}.fc1"),
    **_affine("layers.{i}.mlp.down", f"{_OPT_LAYER}.fc2"),
}
