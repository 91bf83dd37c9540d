"""Published checkpoints: the logits that transformers has for them, and what is refused."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers

import jaxsd
from jaxsd import models
from jaxsd.models import convert, corpus, families, hf_tokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"  # made by make_golden.py
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())
# Float32, sums of at most 64 terms of order one, in another order.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
LLAMA = "llama_with_biases"


@functools.cache
def loaded(name):
    return models.load_hf(GOLDEN / name)


@functools.cache
def golden(name):
    with np.load(GOLDEN / name / "golden.npz") as content:
        return content["tokens"], content["lengths"], content["logits"]


def assert_logits(name, logits):
    """Within each row's length; `logits` `[B, T, V]` are of the golden tokens."""
    _, lengths, expected = golden(name)
    inside = np.arange(expected.shape[1])[None, :] < lengths[:, None]
    np.testing.assert_allclose(np.asarray(logits)[inside], expected[inside], **TOLERANCE)


def noisy_cache(model, batch_size, max_len):
    """What a cache may hold where nothing was written."""
    return jax.tree.map(
        lambda leaf: 50.0 * jax.random.normal(jax.random.key(3), leaf.shape),
        model.init_cache(batch_size, max_len),
    )


# -- logits ---------------------------------------------------------------------------------------


def test_every_family_has_a_golden_checkpoint():
    found = {
        json.loads((GOLDEN / name / "config.json").read_text())["model_type"] for name in FAMILIES
    }
    assert found == set(families.FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_texts_have_the_published_logits(name):
    model = loaded(name)
    assert_logits(name, models.forward(model.config, model.params, golden(name)[0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_and_single_tokens_have_the_published_logits(name):
    """A ragged batch: rows are filled up to half of their length, then go on one by one."""
    config, params = loaded(name)[:2]
    tokens, lengths, _ = golden(name)
    model = models.language_model(config)
    cache = noisy_cache(model, len(tokens), NUM_SLOTS)
    logits, cache = model.apply(params, tokens, positions_of(tokens), cache)
    found, rows = np.array(logits), np.arange(len(tokens))
    # From here on the prefill's own keys beyond the half are junk that must not be seen.
    apply, at = jax.jit(model.apply), lengths // 2
    while np.any(at < lengths):
        here = np.minimum(at, lengths - 1).astype(np.int32)
        step, cache = apply(params, tokens[rows, here][:, None], here[:, None], cache)
        found[rows, here] = step[:, 0]
        at = at + 1
    assert_logits(name, found)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chain_scored_as_a_tree_has_the_published_logits(name):
    """In two calls, so that nodes see earlier ones in the cache: windows count positions."""
    config, params = loaded(name)[:2]
    tokens, places = golden(name)[0], positions_of(golden(name)[0])
    model = models.language_model(config)
    cache = noisy_cache(model, len(tokens), NUM_SLOTS)
    third = tokens.shape[1] // 3
    first, cache = model.apply(params, tokens[:, :third], places[:, :third], cache)
    found, starts = [first], jnp.full(len(tokens), third, jnp.int32)
    for before in (0, third):
        seen = np.tril(np.ones((third, before + third), bool), before)
        seen = jnp.broadcast_to(seen, (len(tokens), *seen.shape))
        block = slice(third + before, 2 * third + before)
        logits, cache = model.apply_tree(
            params, tokens[:, block], places[:, block], cache, starts, seen
        )
        found.append(logits)
    assert_logits(name, np.concatenate(found, axis=1))


NUM_SLOTS = 21


def positions_of(tokens):
    return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


# Node: parent. Siblings at every depth, so that slots and positions differ; deeper than windows.
TREE = (-1, 0, 0, 1, 2, 3, 3, 5, 6, 7, 7, 9)


def test_each_path_of_a_tree_has_the_logits_of_its_text():
    """Of a model with windows; half of the nodes are scored in a later call."""
    config, params = loaded("gemma3")[:2]
    model = models.language_model(config)
    text, nodes = golden("gemma3")[0][:, :6], golden("gemma3")[0][:, 6:]
    cache = noisy_cache(model, 3, NUM_SLOTS)
    _, cache = model.apply(params, text, positions_of(text), cache)
    paths = []
    for node, parent in enumerate(TREE):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    depths = np.array([len(path) - 1 for path in paths], np.int32)
    found, half = [], len(TREE) // 2
    for part in (slice(0, half), slice(half, len(TREE))):
        seen = np.array([[w in path for w in range(part.stop)] for path in paths[part]])
        logits, cache = model.apply_tree(
            params,
            nodes[:, part],
            jnp.broadcast_to(6 + depths[part], (3, half)),
            cache,
            jnp.full(3, 6, jnp.int32),
            jnp.broadcast_to(seen, (3, *seen.shape)),
        )
        found.append(logits)
    found = np.concatenate(found, axis=1)
    assert max(depths) > max(config.windows)
    for row in range(3):
        whole = np.zeros((len(TREE), 18), np.int32)
        for node, path in enumerate(paths):
            whole[node, : 6 + len(path)] = [*text[row], *nodes[row, path]]
        expected = models.forward(config, params, whole)[np.arange(len(TREE)), 6 + depths]
        np.testing.assert_allclose(found[row], expected, **TOLERANCE)


def test_a_published_model_decodes_speculatively_to_its_own_greedy_text():
    target = loaded("mistral")
    model = models.language_model(target.config)
    draft = models.exit_early(model, 1)
    prompts, params = golden("mistral")[0][:2, :4], {"target": target.params}
    decoders = [
        jaxsd.speculative(model, drafter, max_len=14, eos_id=target.eos_ids)
        for drafter in (jaxsd.no_drafter(), jaxsd.early_exit_drafter(draft, num_tokens=3))
    ]
    plain, fast = (one.generate(params, prompts, None, jax.random.key(0)) for one in decoders)
    np.testing.assert_array_equal(plain.tokens, fast.tokens)


def test_a_text_beyond_the_learned_positions_is_refused():
    config, params = loaded("gpt2")[:2]
    with pytest.raises(ValueError, match=r"41 slots .* exceed the 40 positions"):
        models.language_model(config).init_cache(1, 41)
    with pytest.raises(ValueError, match="41 tokens exceed the 40 positions"):
        models.forward(config, params, jnp.zeros((1, 41), jnp.int32))


# -- full sizes -----------------------------------------------------------------------------------

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# Sizes as the models' own config.json files have them, and the number of parameters they amount to.
FULL_SIZES = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"intermediate_size": 14336, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
        | {"rope_scaling": LLAMA3_SCALING, "tie_word_embeddings": False},
    ),
    "Mistral-7B": (
        7_241_732_096,
        {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"intermediate_size": 14336, "rms_norm_eps": 1e-5, "sliding_window": 4096},
    ),
    "Qwen2.5-7B": (
        7_615_616_512,
        {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584}
        | {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
        | {"intermediate_size": 18944, "rope_theta": 1000000.0, "use_sliding_window": False}
        | {"sliding_window": 131072, "max_window_layers": 28, "use_mrope": False},
    ),
    "Qwen3-8B": (
        8_190_735_360,
        {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "head_dim": 128}
        | {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"intermediate_size": 12288, "rope_theta": 1000000, "rope_scaling": None},
    ),
    "Gemma-2-9B": (
        9_241_705_984,
        {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "head_dim": 256}
        | {"num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"intermediate_size": 14336, "hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096}
        | {"query_pre_attn_scalar": 256, "sliding_window_size": 4096},
    ),
    "Gemma-3-1B": (
        999_885_952,
        {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "head_dim": 256}
        | {"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1}
        | {"intermediate_size": 6912, "sliding_window": 512, "sliding_window_pattern": 6}
        | {"rope_theta": 1000000, "rope_local_base_freq": 10000, "query_pre_attn_scalar": 256},
    ),
    "Pythia-6.9B": (
        6_857_302_016,
        {"model_type": "gpt_neox", "vocab_size": 50432, "hidden_size": 4096}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 16384}
        | {"rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True},
    ),
    "GPT-2": (
        124_439_808,
        {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
        | {"n_ctx": 1024, "n_positions": 1024, "activation_function": "gelu_new"},
    ),
    "OPT-6.7B": (
        6_658_473_984,
        {"model_type": "opt", "vocab_size": 50272, "hidden_size": 4096, "ffn_dim": 16384}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "word_embed_proj_dim": 4096}
        | {"max_position_embeddings": 2048, "do_layer_norm_before": True, "prefix": "</s>"},
    ),
}


@pytest.mark.parametrize("name", FULL_SIZES)
def test_full_size_has_the_published_number_of_parameters(name):
    """Of our tree, and of the tensors that would be looked for in a checkpoint."""
    expected, content = FULL_SIZES[name]
    config = families.read_config(content)
    assert models.num_parameters(config) == expected
    wanted = families.pieces(families.FAMILIES[content["model_type"]], config)
    assert sum(int(np.prod(piece.shape)) for piece in wanted) == expected
    assert len({piece.name for piece in wanted}) == len(wanted)


def test_windows_of_full_sizes():
    windows = {name: families.read_config(FULL_SIZES[name][1]).windows for name in FULL_SIZES}
    assert windows["Mistral-7B"] == (4096,)
    assert windows["Gemma-2-9B"] == (4096, 0)
    assert windows["Gemma-3-1B"] == (512, 512, 512, 512, 512, 0)
    assert {windows[name] for name in ("Llama-3.1-8B", "Qwen2.5-7B", "Qwen3-8B")} == {()}
    some = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 5}
    some = FULL_SIZES["Qwen2.5-7B"][1] | some | {"max_window_layers": 3}
    assert families.read_config(some).windows == (0, 0, 0, 8, 8)
    types = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    assert families.read_config(some | {"layer_types": types}).windows == (0, 8)
    with pytest.raises(ValueError, match=r"layer_types=.* must be 5 of full_attention, sl"):
        families.read_config(some | {"layer_types": ["chunked_attention"] * 5})


# -- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("Llama-3.1-8B", {"model_type": "mamba"}, "model_type='mamba' is not supported; .*llama"),
        ("Llama-3.1-8B", {"hidden_act": "quick"}, "hidden_act='quick' is not supported; .*silu"),
        ("Llama-3.1-8B", {"num_experts": 8}, "num_experts=8 is unknown for model_type='llama'"),
        ("Llama-3.1-8B", {"quantization_config": {"bits": 4}}, "quantization_config=.*unknown"),
        ("Llama-3.1-8B", {"hidden_size": "wide"}, "hidden_size='wide' must be an integer"),
        ("Llama-3.1-8B", {"num_key_value_heads": 7}, "n_kv_heads=7 must divide"),
        (
            "Llama-3.1-8B",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type='yarn' is not supported; supported: 'default', 'linear', 'llam",
        ),
        ("Llama-3.1-8B", {"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ("Qwen2.5-7B", {"use_mrope": True}, "use_mrope=True is not supported"),
        ("Gemma-2-9B", {"sliding_window": -1}, "sliding_window=-1"),
        ("Mistral-7B", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than"),
        ("Gemma-2-9B", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("Pythia-6.9B", {"rotary_pct": 2.0}, r"rotary_pct=2.0 must be a number in \(0, 1\]"),
        ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("OPT-6.7B", {"word_embed_proj_dim": 512}, "word_embed_proj_dim=512 is not supported"),
        ("OPT-6.7B", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
    ],
)
def test_a_field_that_is_not_supported_is_refused_by_name_and_value(name, fields, message):
    with pytest.raises(ValueError, match=message):
        families.read_config(FULL_SIZES[name][1] | fields)


@pytest.mark.parametrize("name", FULL_SIZES)
def test_no_value_of_a_field_is_more_than_refused(name):
    """Whatever stands in a config.json, what comes of it is a config or a ValueError."""
    content = FULL_SIZES[name][1] | {"rope_parameters": None, "layer_types": None}
    num_refused = 0
    for field in content:
        for value in (None, "x", -1, 0, 1.5, True, [], [1], {}, {"rope_type": []}):
            try:
                families.read_config(content | {field: value, "num_hidden_layers": 2})
            except ValueError:
                num_refused += 1
    assert num_refused > 5 * len(content)


def test_every_wrong_field_is_named_at_once():
    content = FULL_SIZES["Llama-3.1-8B"][1] | {"num_experts": 8, "hidden_act": "quick"}
    del content["vocab_size"]
    with pytest.raises(ValueError, match=r"vocab_size=None.*hidden_act='quick'.*num_experts=8"):
        families.read_config(content)
    good = families.read_config(FULL_SIZES["Llama-3.1-8B"][1])
    assert families.read_config(FULL_SIZES["Llama-3.1-8B"][1] | {"x": 1}, ignore=["x"]) == good


@pytest.mark.parametrize("name", [name for name in FULL_SIZES if name not in ("GPT-2", "OPT-6.7B")])
def test_both_ways_to_write_rotary_settings_are_read(name):
    """Newer files gather them in `rope_parameters`, per type of layer if there are two."""
    content = dict(FULL_SIZES[name][1])
    old = families.read_config(content)
    theta_name = "rotary_emb_base" if content["model_type"] == "gpt_neox" else "rope_theta"
    parameters = {"rope_theta": content.pop(theta_name, 10_000.0), "rope_type": "default"}
    parameters |= content.pop("rope_scaling", None) or {}
    if content["model_type"] == "gpt_neox":
        parameters["partial_rotary_factor"] = content.pop("rotary_pct")
    if content["model_type"] == "gemma3_text":
        local = {"rope_theta": content.pop("rope_local_base_freq"), "rope_type": "default"}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    assert families.read_config(content | {"rope_parameters": parameters}) == old


def test_a_config_with_options_survives_json():
    for name in FAMILIES:
        config = loaded(name).config
        assert models.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    plain = models.CONFIGS["tiny"].to_dict()
    assert len(plain) == 10  # no options: what is written is what was written before there were any
    with pytest.raises(ValueError, match=r"rope_scaling\.kind='x'"):
        models.Config.from_dict(plain | {"rope_scaling": {"kind": "x", "factor": 2.0}})
    with pytest.raises(ValueError, match=r"config.rope_scaling has unknown fields \['speed'\]"):
        models.Config.from_dict(plain | {"rope_scaling": {"kind": "linear", "speed": 2.0}})


# -- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / LLAMA, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    return shutil.copytree(GOLDEN / "qwen2", tmp_path / "model")


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    path.write_bytes(safetensors.numpy.save(tensors))


def edit_json(folder, name, edit):
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def refused(folder, *messages):
    with pytest.raises(ValueError, match="cannot load checkpoint") as info:
        models.load_hf(folder)
    text = str(info.value)
    assert "\n" not in text
    for message in messages:
        assert message in text


def test_everything_wrong_with_the_tensors_is_reported_at_once(folder):
    def spoil(tensors):
        del tensors["model.layers.0.self_attn.k_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.7.extra"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
        tensors["model.layers.0.mlp.down_proj.weight"][2, 3:5] = np.nan
        tensors["model.layers.1.self_attn.v_proj.bias"][0] = np.inf
        tensors["model.layers.1.mlp.up_proj.bias"] = np.zeros(40, np.int32)

    edit_weights(folder, spoil)
    refused(
        folder,
        "missing tensors model.layers.0.self_attn.k_proj.weight, model.norm.weight",
        "unexpected tensors model.layers.7.extra",
        "tensor lm_head.weight has shape (63, 32), the config asks for (64, 32)",
        "tensor model.layers.0.mlp.down_proj.weight has 2 values that are not finite",
        "tensor model.layers.1.self_attn.v_proj.bias has 1 values that are not finite",
        "tensor model.layers.1.mlp.up_proj.bias has type I32; supported: F32, F16, BF16",
    )


def test_more_layers_than_tensors_is_refused_before_anything_is_built(folder):
    edit_json(folder, "config.json", lambda content: content.update(num_hidden_layers=10**9))
    refused(folder, "tensors cannot hold n_layers=1000000000")


def test_a_value_too_large_for_the_wanted_type_is_refused(folder):
    edit_weights(folder, lambda tensors: tensors["lm_head.weight"].fill(1e6))
    models.load_hf(folder)
    with pytest.raises(ValueError, match="2048 values that are not finite as float16"):
        models.load_hf(folder, jnp.float16)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "model.safetensors: is truncated or corrupt")


def test_a_corrupt_header_is_refused(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:24] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    refused(folder, "model.safetensors: is truncated or corrupt")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_read(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    refused(folder, name, "never loaded here", "save_pretrained")


def test_a_pickle_by_the_name_of_safetensors_is_refused(folder):
    for magic in (b"PK\x03\x04", b"\x80\x02}q"):
        (folder / "model.safetensors").write_bytes(magic + bytes(200))
        refused(folder, "model.safetensors: is no safetensors file", "never loaded here")


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "C:\\x.safetensors"],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(sharded, name):
    def spoil(content):
        content["weight_map"]["model.norm.weight"] = name

    (sharded.parent / "x.safetensors").write_bytes(b"")
    edit_json(sharded, convert.INDEX_FILE, spoil)
    refused(sharded, f"names {name!r}, which is no file of the folder")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(folder, name):
    outside = folder.parent / "outside"
    (folder / name).unlink(missing_ok=True)
    shutil.copy(GOLDEN / LLAMA / (name if name != "tokenizer.json" else "config.json"), outside)
    (folder / name).symlink_to(outside)
    refused(folder, f"{name} is a link out of the folder")


def test_a_shard_that_links_out_of_the_folder_is_refused(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[0]
    shutil.move(shard, sharded.parent / "outside")
    shard.symlink_to(sharded.parent / "outside")
    refused(sharded, f"{shard.name} is a link out of the folder")


def test_an_index_of_pickles_and_missing_or_lying_shards_are_refused(sharded):
    first, second, *_ = sorted(path.name for path in sharded.glob("model-*.safetensors"))

    def swap(content):
        names = content["weight_map"]
        content["weight_map"] = {
            tensor: {first: second, second: first}.get(file, file) for tensor, file in names.items()
        }

    edit_json(sharded, convert.INDEX_FILE, swap)
    refused(sharded, f"is not in {first}, where {convert.INDEX_FILE} says it is")
    (sharded / first).unlink()
    refused(sharded, f"{first} is missing")
    edit_json(
        sharded, convert.INDEX_FILE, lambda content: content.update(weight_map={"a": "x.bin"})
    )
    refused(sharded, "names 'x.bin', which is no safetensors file", "never loaded here")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[1]", '{"eos_token_id": "two"}'])
def test_a_damaged_json_file_is_refused(folder, name, text):
    (folder / name).write_text(text)
    if name == "tokenizer.json" and text != "{":
        assert models.load_hf(folder).tokenizer is None
    else:
        refused(folder, name)


def test_a_folder_that_is_not_there_or_empty_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "cannot read config.json", "model.safetensors.index.json are missing")


def test_a_stored_head_must_be_the_embedding_it_is_tied_to(folder):
    edit_json(folder, "config.json", lambda content: content.update(tie_word_embeddings=True))
    refused(folder, "lm_head.weight is not the embedding")
    edit_weights(
        folder,
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
    )
    assert "head" not in models.load_hf(folder).params


def test_names_without_prefix_and_computed_tables_are_read(tmp_path):
    """As the first published GPT-2 files have them."""
    folder = shutil.copytree(GOLDEN / "gpt2", tmp_path / "model")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.ones((1, 1, 40, 40), np.float32)

    edit_weights(folder, rename)
    assert_same(models.load_hf(folder).params, loaded("gpt2").params)


# -- there and back -------------------------------------------------------------------------------


def assert_same(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def all_tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(path)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_exported_has_the_bytes_of_what_was_loaded(name, tmp_path):
    model = models.load_hf(GOLDEN / name, dtype=None)
    folder = tmp_path / "exported"
    models.export_hf(
        folder,
        model.config,
        model.params,
        eos_ids=model.eos_ids,
        fields=model.metadata["config"],
        max_shard_bytes=60_000 if name == "qwen2" else 10**9,
    )
    ours, theirs = all_tensors(folder), all_tensors(GOLDEN / name)
    assert ours.keys() == theirs.keys()
    for tensor in ours:
        assert ours[tensor].dtype == theirs[tensor].dtype
        assert ours[tensor].tobytes() == theirs[tensor].tobytes()
    assert (folder / convert.INDEX_FILE).exists() == (name == "qwen2")
    again = models.load_hf(folder, dtype=None)
    assert (again.config, again.eos_ids) == (model.config, model.eos_ids)
    assert_same(again.params, model.params)


def test_export_refuses_what_no_family_can_say_and_what_does_not_fit(tmp_path):
    config, params = loaded(LLAMA)[:2]
    mixed = models.Config(**{**config.to_dict(), "rope_scaling": None, "post_norms": True})
    with pytest.raises(ValueError, match=r"no config.json of llama, .*says what"):
        models.export_hf(tmp_path / "x", mixed, params)
    with pytest.raises(ValueError, match=r"no config.json of gpt2 says what"):
        models.export_hf(tmp_path / "x", config, params, model_type="gpt2")
    with pytest.raises(ValueError, match="missing tensors head"):
        models.export_hf(tmp_path / "x", config, {k: params[k] for k in params if k != "head"})
    with pytest.raises(ValueError, match="tensor head has type int32"):
        models.export_hf(tmp_path / "x", config, {**params, "head": jnp.ones((64, 32), int)})
    assert not (tmp_path / "x").exists()


def test_the_embedded_draft_goes_to_a_llama_folder_and_back(tmp_path):
    draft = models.load_embedded("draft")
    models.export_hf(tmp_path / "llama", draft.config, draft.params, tokenizer=draft.tokenizer)
    again = models.load_hf(tmp_path / "llama")
    assert again.config == draft.config
    assert_same(again.params, draft.params)


def test_each_array_goes_where_it_is_told_as_soon_as_it_is_whole(folder):
    placed = []

    def place(name, array):
        placed.append(name)
        return jax.device_put(array, jax.devices()[0])

    model = models.load_hf(folder, jnp.bfloat16, place=place)
    assert len(set(placed)) == len(placed) == len(jax.tree.leaves(model.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}


MEMORY = """
import pathlib, sys
from jaxsd import models

def kilobytes(field):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])

sharding = models.sharding
where = {}
if len(sys.argv) > 3:
    mesh = sharding.make_mesh(data=2, model=4)
    where = {"mesh": mesh, "rules": getattr(sharding, sys.argv[3])}
models.load_hf(sys.argv[1], **where)  # whatever is loaded or compiled once
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = kilobytes("VmRSS")
model = models.load_hf(sys.argv[2], **where)
print((kilobytes("VmHWM") - before) * 1024)
print(sum(sharding.bytes_per_device(model.params).values()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of 146 MB, and the bytes of its leaves."""
    config = models.Config(
        vocab_size=16000,
        d_model=512,
        n_layers=4,
        n_heads=8,
        n_kv_heads=4,
        head_dim=64,
        d_ff=4096,
    )
    params = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.5, np.float32), models.abstract_params(config)
    )
    folder = tmp_path_factory.mktemp("large") / "model"
    models.export_hf(folder, config, params)
    return folder, [leaf.nbytes for leaf in jax.tree.leaves(params)]


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("rules", [[], ["FULLY_SHARDED"]], ids=["one device", "eight devices"])
def test_peak_memory_is_the_parameters_and_little_more(rules, large):
    """At most 1.2 times the largest tensor more, and 8 MB for what Python does meanwhile."""
    folder, leaves = large
    path = os.pathsep.join([str(pathlib.Path(jaxsd.__file__).parent.parent)])
    flags = f"--xla_force_host_platform_device_count={8 if rules else 1}"
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(GOLDEN / LLAMA), str(folder), *rules],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, held = map(int, done.stdout.split())
    # On a mesh all but the norms is divided, so that what is held is what was read.
    assert sum(leaves) <= held < 1.01 * sum(leaves)
    assert held < peak < held + 1.2 * max(leaves) + 8e6


def test_a_mesh_says_where_arrays_go_and_so_may_nothing_else(folder):
    mesh = models.sharding.make_mesh(data=1, model=1)
    rules = models.sharding.FULLY_SHARDED
    params = models.load_hf(folder, mesh=mesh, rules=rules).params
    wanted = models.sharding.shardings(loaded(LLAMA).config, mesh, rules)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == wanted
    assert_same(params, loaded(LLAMA).params)
    with pytest.raises(ValueError, match=r"mesh=.* and place=.* both say where"):
        models.load_hf(folder, mesh=mesh, place=lambda name, array: array)
    with pytest.raises(ValueError, match=r"the rules also name \['tensor'\]"):
        models.load_hf(folder, mesh=mesh, rules={"mlp": "tensor"})


# -- tokenizers -----------------------------------------------------------------------------------

TEXTS = ["def f(x):\n    return x\n", "for ï in naïve: pass  # ünïcödé", "a <s> </s> b", ""]


def byte_level():
    """As Llama 3's and Qwen's: bytes, a begin-of-text in front of prompts, special tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def sentence_piece():
    """As Llama 2's: spaces are ▁, one in front of every text, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁adefrntux():#", "▁r", "▁re"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "r"), ("▁r", "e")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_texts_survive_a_published_tokenizer(make, tmp_path):
    library = make()
    bos, eos = library.token_to_id("<s>"), library.token_to_id("</s>")
    tokenizer = hf_tokenizer.read_tokenizer(library.to_str(), eos)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {bos, eos} & set(ids)
        assert tokenizer.encode_prompt(text) == [bos, *ids]
        assert tokenizer.decode([bos, *ids, eos]) == text
        stream = corpus.StreamingDecoder(tokenizer)
        pieces = "".join(stream.push([one]) for one in [bos, *ids, eos])
        assert pieces.removeprefix(" ") == text.removeprefix(" ")
    with pytest.raises(ValueError, match="surrogates"):
        tokenizer.encode("\ud800")
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    assert tokenizer.token_bytes()[eos] == b""
    tokenizer.save(tmp_path)
    again = hf_tokenizer.read_tokenizer((tmp_path / "tokenizer.json").read_text(), eos)
    assert again.fingerprint() == tokenizer.fingerprint()


def test_a_folder_has_its_tokenizer_or_says_why_not(folder):
    assert loaded(LLAMA).metadata["tokenizer_problem"] == "tokenizer.json is missing"
    small = byte_level()
    edit_json(
        folder, "config.json", lambda content: content.update(vocab_size=small.get_vocab_size())
    )

    def widen(tensors):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = np.resize(tensors[name], (small.get_vocab_size(), 32))

    edit_weights(folder, widen)
    small.save(str(folder / "tokenizer.json"))
    model = models.load_hf(folder)
    assert model.tokenizer.eos_id == model.eos_ids[0] == 2
    assert model.metadata["tokenizer_problem"] is None
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(folder / "tokenizer.json"))
    model = models.load_hf(folder)
    assert model.tokenizer is None
    assert "'WordLevel', not 'BPE'" in model.metadata["tokenizer_problem"]


def test_ends_of_text_come_from_the_generation_config_first(folder):
    assert loaded("llama").eos_ids == (2, 5)
    edit_json(folder, "generation_config.json", lambda content: content.update(eos_token_id=[7, 9]))
    assert models.load_hf(folder).eos_ids == (7, 9)
    (folder / "generation_config.json").unlink()
    assert models.load_hf(folder).eos_ids == (2,)
    edit_json(folder, "config.json", lambda content: content.pop("eos_token_id"))
    assert models.load_hf(folder).eos_ids == ()
