"""A model folder or a checkpoint is whole, or it is refused with every reason named."""

import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxsd.models import Config, abstract_params, checkpoint, corpus, num_parameters

CONFIG = Config(vocab_size=257, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16)
TOKENIZER = corpus.ByteTokenizer()


def make_params(config, seed=0):
    """Of the right shapes; nothing is compiled for it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), abstract_params(config)
    )


@pytest.fixture(scope="module")
def params():
    return make_params(CONFIG)


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save_model(folder, CONFIG, params, TOKENIZER, dtype="float32", metadata={"steps": 7})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit_config(folder, edit):
    path = folder / checkpoint.CONFIG_FILE
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_weights(folder, edit):
    """Changes the tensors and signs the result, so that what is behind the checksum is tested."""
    path = folder / checkpoint.WEIGHTS_FILE
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    sign(folder, safetensors.numpy.save(tensors))


def sign(folder, data):
    (folder / checkpoint.WEIGHTS_FILE).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit_config(folder, lambda c: c["weights"].update(num_bytes=len(data), sha256=digest))


def test_a_saved_model_reads_back_exactly(saved, params):
    model = checkpoint.load_model(saved)
    assert model.config == CONFIG
    assert model.metadata["steps"] == 7
    assert model.tokenizer.fingerprint() == TOKENIZER.fingerprint()
    assert jax.tree.structure(model.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


@pytest.mark.parametrize("bpe_size", [257, 300])
def test_bfloat16_is_stored_rounded_and_read_in_any_type(params, tmp_path, bpe_size):
    tokenizer = corpus.train_bpe(["def f(x):\n    return x\n" * 9], bpe_size)
    config = Config(**{**CONFIG.to_dict(), "vocab_size": tokenizer.vocab_size})
    params = make_params(config)
    checkpoint.save_model(tmp_path / "m", config, params, tokenizer)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    for dtype, wanted in ((jnp.float32, jnp.float32), (None, jnp.bfloat16)):
        loaded = checkpoint.load_model(tmp_path / "m", dtype=dtype).params
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(wanted)}
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), loaded, rounded
        )
    size = (tmp_path / "m" / checkpoint.WEIGHTS_FILE).stat().st_size
    assert size < 2.2 * num_parameters(config) + 4096


def test_the_file_is_plain_safetensors(saved, params):
    tensors = safetensors.numpy.load_file(saved / checkpoint.WEIGHTS_FILE)
    np.testing.assert_array_equal(
        tensors["layers.0.attention.qkv"], params["layers"]["0"]["attention"]["qkv"]
    )


def test_saving_replaces_a_model_and_leaves_nothing_else(folder, params):
    (folder.parent / ".model.writing").mkdir()  # of a process that was killed
    (folder.parent / ".model.writing" / "half").write_text("")
    twice = jax.tree.map(lambda leaf: 2 * leaf, params)
    checkpoint.save_model(folder, CONFIG, twice, TOKENIZER, dtype="float32")
    loaded = checkpoint.load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, twice)
    assert os.listdir(folder.parent) == ["model"]
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_save_that_fails_leaves_the_old_model(folder, params, monkeypatch):
    before = checkpoint.load_model(folder)

    def fail(self, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus.ByteTokenizer, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_model(folder, CONFIG, params, TOKENIZER)
    assert checkpoint.load_model(folder).metadata == before.metadata


def set_item(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name].copy())

    return edit


def with_nan(array):
    array[3] = np.nan
    return array


WEIGHT_DAMAGE = {
    "missing": (lambda t: t.pop("embedding"), "missing tensors embedding"),
    "unexpected": (
        lambda t: t.update(extra=np.zeros(2, np.float32)),
        "unexpected tensors extra",
    ),
    "misshapen": (
        set_item("layers.0.mlp.down", lambda a: a[:, :-1].copy()),
        r"tensor layers\.0\.mlp\.down has shape \(8, 15\), the config asks for \(8, 16\)",
    ),
    "transposed": (
        set_item("layers.0.mlp.down", lambda a: a.T.copy()),
        r"has shape \(16, 8\)",
    ),
    "nan": (
        set_item("final_norm.scale", with_nan),
        r"tensor final_norm\.scale has 1 values that are not finite",
    ),
    "infinite": (
        set_item("embedding", lambda a: np.where(a > 0, np.inf, a)),
        r"tensor embedding has \d+ values that are not finite",
    ),
    "integers": (
        set_item("embedding", lambda a: a.astype(np.int32)),
        "tensor 'embedding' has type I32",
    ),
}


@pytest.mark.parametrize(("edit", "message"), WEIGHT_DAMAGE.values(), ids=WEIGHT_DAMAGE.keys())
def test_wrong_tensors_are_refused(folder, edit, message):
    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=r"cannot load model '.*model'.*model\.safetensors.*"):
        checkpoint.load_model(folder)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
@pytest.mark.parametrize("signed", [False, True])
def test_truncated_weights_are_refused(folder, kept, signed):
    """Also if the checksum was made of the truncated file."""
    path = folder / checkpoint.WEIGHTS_FILE
    data = path.read_bytes()[:kept]
    if signed:
        sign(folder, data)
        message = r"model\.safetensors is truncated or corrupt"
    else:
        path.write_bytes(data)
        message = rf"model\.safetensors has {len(data)} bytes, config\.json says"
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(folder)


def test_one_flipped_bit_is_noticed(folder):
    path = folder / checkpoint.WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is corrupt: its SHA-256 is not the recorded one"):
        checkpoint.load_model(folder)


CONFIG_DAMAGE = {
    "unknown": (lambda c: c["config"].update(width=3), r"unknown fields \['width'\]"),
    "missing": (lambda c: c["config"].pop("d_ff"), r"lacks fields \['d_ff'\]"),
    "string": (lambda c: c["config"].update(d_model="8"), "d_model='8'"),
    "negative": (lambda c: c["config"].update(n_layers=-1), "n_layers=-1"),
    "float": (lambda c: c["config"].update(n_heads=2.0), r"n_heads=2\.0"),
    "no config": (lambda c: c.pop("config"), "field 'config' is missing or not an object"),
    "no weights": (lambda c: c.pop("weights"), "field 'weights' is missing or not an object"),
    "metadata": (lambda c: c.update(metadata=[]), "field 'metadata' is missing"),
    "format": (lambda c: c.update(format="other-2"), "has format 'other-2'"),
    "other shape": (lambda c: c["config"].update(d_ff=24), r"asks for \(2, 24, 8\)"),
    "many layers": (lambda c: c["config"].update(n_layers=10**9), "cannot hold n_layers=1000000"),
    "wide": (lambda c: c["config"].update(d_model=10**30), r"asks for \(257, 10{30}\)"),
    "vocabulary": (
        lambda c: c["config"].update(vocab_size=300),
        r"tokenizer has 257 tokens, config\.vocab_size is 300",
    ),
    "fingerprint": (
        lambda c: c["metadata"].update(tokenizer_fingerprint="0"),
        "is not the one the model was trained with",
    ),
}


@pytest.mark.parametrize(("edit", "message"), CONFIG_DAMAGE.values(), ids=CONFIG_DAMAGE.keys())
def test_a_wrong_config_is_refused(folder, edit, message):
    edit_config(folder, edit)
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"x"', "\xff"])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / checkpoint.CONFIG_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|has format)"):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"cannot read .*{name}.*No such file"):
        checkpoint.load_model(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model folder '.*nowhere' does not exist"):
        checkpoint.load_model(tmp_path / "nowhere")


def test_all_problems_are_reported_at_once(folder):
    edit_weights(folder, lambda t: t.pop("embedding"))
    edit_weights(folder, set_item("final_norm.scale", with_nan))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"missing.*embedding.*not finite.*tokenizer\.json"):
        checkpoint.load_model(folder)


def test_what_cannot_be_loaded_is_not_saved(params, tmp_path):
    bad = {**params, "final_norm": {"scale": params["final_norm"]["scale"].at[0].set(jnp.nan)}}
    cases = [
        ({"params": bad}, "final_norm.scale has 1 values that are not finite"),
        ({"params": {**params, "x.y": jnp.ones(1)}}, "'x.y' must be a string without dots"),
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
        ({"tokenizer": corpus.train_bpe(["aa"], 258)}, "tokenizer has 258 tokens"),
        ({"metadata": {"loss": float("nan")}}, "not JSON compliant"),
    ]
    for changes, message in cases:
        arguments = {"params": params, "tokenizer": TOKENIZER, **changes}
        with pytest.raises(ValueError, match=message):
            checkpoint.save_model(tmp_path / "m", CONFIG, **arguments)
    assert os.listdir(tmp_path) == []


def test_a_pair_with_different_tokenizers_is_refused(saved):
    target = checkpoint.load_model(saved)
    checkpoint.check_pair(target, target)
    draft = target._replace(tokenizer=corpus.train_bpe(["abab" * 9], 257))
    with pytest.raises(ValueError, match=r"different tokenizers.*257 tokens and \w+ with 257"):
        checkpoint.check_pair(target, draft)
