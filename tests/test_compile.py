"""What the compilers make of the loop: in place on CPU and TPU, and lowered for every platform.

A copy of a whole cache inside the loop would cost more than the pass itself. XLA decides silently,
so the compiled text is searched.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import pytest

import jaxsd
from jaxsd import models
from jaxsd.models import compiled_text

TARGET = dataclasses.replace(models.CONFIGS["tiny"], n_layers=3)
DRAFT = models.CONFIGS["tiny"]
MAX_LEN = 240
DRAFTERS = {
    "none": jaxsd.no_drafter(),
    "model": jaxsd.model_drafter(models.language_model(DRAFT), num_tokens=4),
    "prompt_lookup": jaxsd.prompt_lookup(num_tokens=4),
    "tree": jaxsd.tree_drafter(models.language_model(DRAFT), jaxsd.trees.balanced((2, 2))),
    "confident tree": jaxsd.confident_tree_drafter(
        models.language_model(DRAFT), 6, depth=2, width=2
    ),
    "model of any length": jaxsd.model_drafter(models.language_model(DRAFT), num_tokens=4),
}
DRAFT_LENGTHS = {"model of any length": (0, 2, 4)}
VERIFIERS = {
    "tree": jaxsd.traversal_verification,
    "confident tree": jaxsd.target_matching,
}


def abstract_loop(name, batch_size, target=TARGET, dtype=jnp.float32, max_len=None):
    """A decoder and the shapes its loop takes, nothing allocated; or give a drafter itself."""
    model = models.language_model(target, cache_dtype=dtype)
    decoder = jaxsd.speculative(
        model,
        DRAFTERS.get(name, name),
        VERIFIERS.get(name, jaxsd.block_verification),
        max_len=MAX_LEN if max_len is None else max_len,
        draft_lengths=DRAFT_LENGTHS.get(name),
    )
    params = {
        "target": models.abstract_params(target, dtype),
        "draft": models.abstract_params(DRAFT, jnp.float32),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts = jnp.zeros((batch_size, 16), jnp.int32)
    state = jax.eval_shape(lambda p, k: decoder.init(p, prompts, None, k), params, key)
    return decoder, params, state


@functools.cache
def compiled_loop(name, batch_size):
    """The loop's optimised text on this machine's CPU, its parameters' and its state's shapes."""
    decoder, params, state = abstract_loop(name, batch_size)
    return decoder.run.lower(params, state, jaxsd.UNTIL_DONE).compile().as_text(), params, state


def cache_copies(text, state, **where):
    """Lines of compiled text that copy an array of the size of a target cache."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.target_cache)}
    return list(compiled_text.cache_copies(text, shapes, **where).copies)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("name", DRAFTERS)
def test_compiled_loop_copies_no_cache_on_cpu(name, batch_size):
    text, _, state = compiled_loop(name, batch_size)
    assert cache_copies(text, state, inside_loops=False) == []


def test_compiled_loop_of_a_model_with_every_option_copies_no_cache():
    """Two windows, two rotations, caps, norms of heads and of outputs; masks of trees for each."""
    options = {
        "windows": (16, 0),
        "local_rope_theta": 100.0,
        "rope_scaling": models.RopeScaling("linear", 8.0),
        "qk_norm": True,
        "post_norms": True,
        "attention_softcap": 50.0,
        "qkv_bias": True,
    }
    decoder, params, state = abstract_loop("tree", 2, dataclasses.replace(TARGET, **options))
    lowered = decoder.run.lower(params, state, jaxsd.UNTIL_DONE)
    assert cache_copies(lowered.compile().as_text(), state, inside_loops=False) == []


def test_compiled_loop_that_reads_parts_of_a_cache_copies_no_whole_one():
    decoder, params, state = abstract_loop("model", 8, max_len=1100)
    text = decoder.run.lower(params, state, jaxsd.UNTIL_DONE).compile().as_text()
    assert " conditional(" in text
    assert cache_copies(text, state) == []


def test_search_for_copies_finds_a_planted_one():
    """The same loop over a model that writes before it reads: the usual order, which XLA copies."""

    class WriteFirst(models.TransformerLM):
        def apply(self, params, tokens, positions, cache):
            logits, cache = super().apply(params, tokens, positions, cache)
            # A second use of the old buffer after the write leaves no order without a copy.
            return logits, jax.tree.map(lambda leaf: jax.lax.optimization_barrier(leaf + 0), cache)

    decoder = jaxsd.speculative(WriteFirst(TARGET), DRAFTERS["none"], max_len=MAX_LEN)
    _, params, state = abstract_loop("none", 1)

    def keep_old(params, state):
        new, _ = decoder.step(params, state)
        return new, state.target_cache

    text = jax.jit(keep_old, donate_argnums=1).lower(params, state).compile().as_text()
    assert cache_copies(text, state, inside_loops=False)


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_cache_buffer_is_donated_to_the_loop(name):
    text, _, state = compiled_loop(name, 1)
    leaves = jax.tree.leaves((state.target_cache, state.drafter_state))
    caches = [leaf for leaf in leaves if leaf.ndim == 4]
    assert len(caches) >= 2 * TARGET.n_layers
    found = compiled_text.aliased_caches(text, {leaf.shape for leaf in caches})
    assert found == (len(caches), len(caches))


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_loop_and_prefill_lower_for(platform):
    decoder, params, state = abstract_loop("model", 2)
    exported = jax.export.export(decoder.run, platforms=[platform])(params, state, jaxsd.UNTIL_DONE)
    assert exported.platforms == (platform,)
    key = jax.eval_shape(lambda: jax.random.key(0))
    prompts = jnp.zeros((2, 16), jnp.int32)
    prefill = jax.jit(lambda p, k: decoder.init(p, prompts, None, k))
    assert jax.export.export(prefill, platforms=[platform])(params, key).platforms == (platform,)


TPU_PROGRAM = """
import jax, sys
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
sys.path.insert(0, {folder!r})
import test_compile

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
mesh = Mesh(np.array(topology.devices[:1]), ("one",))
place = NamedSharding(mesh, PartitionSpec())
for name, batch_size in (("model", 1), ("model", 8), ("tree", 8), ("model of any length", 8)):
    decoder, params, state = test_compile.abstract_loop(
        name, batch_size, dtype=test_compile.jnp.bfloat16
    )
    on_tpu = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    params, state = jax.tree.map(on_tpu, (params, state))
    text = decoder.run.lower(params, state, test_compile.jaxsd.UNTIL_DONE).compile().as_text()
    # Before and after the loop, once in a generation, a cache of so small heads is laid out anew.
    print(name, batch_size, len(test_compile.cache_copies(text, state)))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install '.[tpu]'",
)
def test_loop_compiles_for_a_tpu_and_copies_no_cache(tmp_path):
    """Ahead of time, without a TPU; in a process of its own, as libtpu locks what it opens."""
    script = tmp_path / "compile_for_tpu.py"
    script.write_text(TPU_PROGRAM.format(folder=str(pathlib.Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "model 1 0",
        "model 8 0",
        "tree 8 0",
        "model of any length 8 0",
    ]
