"""Models that transformers builds here and now: the same logits from us, and from what we export.

`pip install -e '.[parity]'`; skipped where torch or transformers are absent. `test_convert.py` has
the logits of such models on file, and goes through the cache and through trees.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from jaxsd import models

# What torch and transformers warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
SEED = 100  # other weights and texts than the golden ones


@pytest.mark.parametrize("name", published.MODELS)
def test_logits_are_those_of_transformers_both_ways(name, tmp_path):
    """A ragged batch: as whole texts, by prefill and then token by token; then our export, read
    by transformers."""
    reference = published.build(name, SEED)
    tokens, lengths = published.ragged_batch(SEED, batch_size=4, length=24)
    expected = published.logits_of_rows(reference, tokens, lengths)
    reference.save_pretrained(tmp_path / "theirs")
    config, params, _, eos_ids, metadata = models.load_hf(tmp_path / "theirs")
    inside = np.arange(tokens.shape[1])[None, :] < lengths[:, None]

    whole = models.forward(config, params, tokens)
    np.testing.assert_allclose(np.asarray(whole)[inside], expected[inside], **TOLERANCE)
    stepwise = prefill_then_step(config, params, tokens, lengths)
    np.testing.assert_allclose(stepwise[inside], expected[inside], **TOLERANCE)

    models.export_hf(tmp_path / "ours", config, params, eos_ids=eos_ids, fields=metadata["config"])
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
    )
    found = published.logits_of_rows(again, tokens, lengths)
    np.testing.assert_allclose(found, expected, **TOLERANCE)  # gelu may have another name


def prefill_then_step(config, params, tokens, lengths):
    """Logits by way of the cache, each row prefilled up to a place of its own."""
    model = models.language_model(config)
    apply = jax.jit(model.apply)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, cache = apply(params, tokens, places, model.init_cache(*tokens.shape))
    found, rows, at = np.array(logits), np.arange(len(tokens)), lengths // 3
    while np.any(at < lengths):
        here = np.minimum(at, lengths - 1)
        step, cache = apply(params, tokens[rows, here][:, None], here[:, None], cache)
        found[rows, here] = step[:, 0]
        at = at + 1
    return found


def test_a_model_of_ours_is_read_by_transformers(tmp_path):
    draft = models.load_embedded("draft")
    models.export_hf(tmp_path / "llama", draft.config, draft.params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "llama", attn_implementation="eager", dtype=torch.float32
    )
    tokens = np.arange(20, dtype=np.int32)[None] * 7
    expected = published.logits_of_rows(theirs, tokens, [20])
    found = models.forward(draft.config, draft.params, tokens)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", published.MODELS)
def test_parameters_are_as_many_as_those_of_transformers(name, tmp_path):
    reference = published.build(name, SEED)
    reference.save_pretrained(tmp_path)
    config = models.load_hf(tmp_path).config
    assert models.num_parameters(config) == sum(one.numel() for one in reference.parameters())
