"""Small models of every published family, with every option that their config.json can turn on.

Needs torch and transformers, which only `make_golden.py` and `test_parity.py` ask for.
"""

import numpy as np

# Windows are shorter than the texts, caps low enough to bite, and the three ranges of Llama 3's
# frequencies all occur. Sizes agree where they can: what is run op by op is then compiled once.
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NEOX = {name: COMMON[name] for name in COMMON if name not in ("num_key_value_heads", "head_dim")}
NEOX |= {"num_attention_heads": 2}
MODELS = {
    "llama": COMMON
    | {"model_type": "llama", "tie_word_embeddings": True, "eos_token_id": [2, 5]}
    | {"rope_scaling": LLAMA3, "rope_theta": 10000.0},
    "llama_with_biases": COMMON
    | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}
    | {"num_attention_heads": 2, "rope_theta": 5000.0}
    | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": COMMON | {"model_type": "mistral", "sliding_window": 4},
    "qwen2": COMMON
    | {"model_type": "qwen2", "num_hidden_layers": 3, "num_attention_heads": 2}
    | {"num_key_value_heads": 1}
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": COMMON | {"model_type": "qwen3", "tie_word_embeddings": True, "rope_theta": 1e6},
    "gemma2": COMMON
    | {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 24}
    | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 12.0},
    "gemma3": COMMON
    | {"model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window": 4}
    | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    | {"query_pre_attn_scalar": 24, "rope_theta": 1e6, "rope_local_base_freq": 100.0}
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gpt_neox": NEOX | {"model_type": "gpt_neox", "rotary_pct": 0.25},
    "gpt_neox_in_series": NEOX
    | {"model_type": "gpt_neox", "use_parallel_residual": False, "rotary_pct": 1.0}
    | {"hidden_act": "gelu_new", "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    | {"n_inner": 40, "n_positions": 40, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {"model_type": "opt", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "ffn_dim": 40, "max_position_embeddings": 40}
    | {"word_embed_proj_dim": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def build(name, seed, dtype="float32"):
    """A model of transformers with random weights of that type, computing in float32."""
    import torch
    import transformers

    fields = dict(MODELS[name])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.eval().float()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            noise = rng.normal(size=tuple(parameter.shape))
            if parameter.ndim == 2:
                is_table = any(part in parameter_name for part in ("embed", "wte", "wpe"))
                noise *= 0.5 if is_table else parameter.shape[-1] ** -0.5
            elif parameter_name.endswith("bias") or fields.get("query_pre_attn_scalar"):
                noise *= 0.3
            else:
                noise = 1.0 + 0.3 * noise
            values = torch.tensor(noise, dtype=torch.float32).to(getattr(torch, dtype))
            parameter.copy_(values.float())
    return model


def logits_of_rows(model, tokens, lengths):
    """`[B, T, V]`, each row on its own and without padding; zeros behind its end."""
    import torch

    rows = []
    for row, length in zip(tokens, lengths, strict=True):
        with torch.no_grad():
            found = model(torch.tensor(np.asarray(row[:length]))[None]).logits[0].float().numpy()
        rows.append(np.pad(found, ((0, len(row) - length), (0, 0))))
    return np.stack(rows)


def ragged_batch(seed, batch_size=3, length=18, vocab_size=64):
    """Tokens and lengths; the first row is as long as can be."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab_size, (batch_size, length)).astype(np.int32)
    lengths = np.concatenate([[length], rng.integers(2, length, batch_size - 1)]).astype(np.int32)
    return tokens, lengths
