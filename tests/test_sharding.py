"""Many devices: where weights and caches lie, and that the text is that of one device."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from conftest import run_on_devices
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxsd import models
from jaxsd.models import sharding

CONFIG = dataclasses.replace(
    models.CONFIGS["tiny"], n_heads=8, n_kv_heads=4, d_ff=256, tie_embeddings=False
)


def mesh_of(data, model):
    """The shape of a mesh, without devices."""
    return AbstractMesh((data, model), ("data", "model"), (AxisType.Auto,) * 2)


def specs(mesh, rules, config=CONFIG):
    tree = sharding.shardings(config, mesh, rules)
    block = tree["layers"]["1"]
    return {
        "embedding": tree["embedding"].spec,
        "head": tree["head"].spec,
        "norm": tree["final_norm"]["scale"].spec,
        "qkv": block["attention"]["qkv"].spec,
        "out": block["attention"]["out"].spec,
        "gate_up": block["mlp"]["gate_up"].spec,
        "down": block["mlp"]["down"].spec,
    }


def test_rules_say_where_every_weight_lies():
    P = PartitionSpec
    assert specs(mesh_of(2, 4), sharding.TENSOR) == {
        "embedding": P("model"),
        "head": P("model"),
        "norm": P(),
        "qkv": P("model"),
        "out": P(None, "model"),
        "gate_up": P(None, "model"),
        "down": P(None, "model"),
    }
    assert specs(mesh_of(2, 4), sharding.FULLY_SHARDED) == {
        "embedding": P("model", "data"),
        "head": P("model", "data"),
        "norm": P(),
        "qkv": P("model", None, None, "data"),
        "out": P("data", "model"),
        "gate_up": P(None, "model", "data"),
        "down": P("data", "model"),
    }
    assert set(specs(mesh_of(2, 4), sharding.REPLICATED).values()) == {P()}


def test_biases_lie_with_their_matrices():
    plain = dataclasses.replace(CONFIG, qkv_bias=True, mlp_bias=True, gated_mlp=False)
    tree = sharding.shardings(plain, mesh_of(2, 4), sharding.TENSOR)["layers"]["0"]
    assert tree["mlp"]["up"].spec == tree["mlp"]["up_bias"].spec == PartitionSpec("model")
    assert tree["attention"]["qkv_bias"].spec == PartitionSpec("model")
    assert tree["mlp"]["down_bias"].spec == PartitionSpec()
    gated = dataclasses.replace(CONFIG, mlp_bias=True)
    tree = sharding.shardings(gated, mesh_of(2, 4), sharding.TENSOR)["layers"]["0"]
    assert tree["mlp"]["gate_up_bias"].spec == PartitionSpec(None, "model")


def test_what_a_mesh_axis_does_not_divide_is_whole():
    found = specs(mesh_of(1, 8), sharding.TENSOR)  # four key heads on eight devices
    assert found["qkv"] == PartitionSpec()
    assert found["gate_up"] == PartitionSpec(None, "model")


def test_an_axis_is_used_once():
    rules = {"embed": "model", "vocab": "model"}
    assert specs(mesh_of(2, 4), rules)["embedding"] == PartitionSpec("model")


PROGRAM = """
import dataclasses, json, sys
import jax, numpy as np
import jaxsd
from jaxsd import models
from jaxsd.models import sharding
sys.path.insert(0, {folder!r})
import test_sharding

def generate(target, draft, params):
    decoder = jaxsd.speculative(target, jaxsd.model_drafter(draft, 3), max_len=24)
    request = np.arange(20).reshape(4, 5), np.array([5, 3, 1, 2]), jax.random.key(3)
    sampling = jaxsd.Sampling(np.array([0.0, 0.0, 0.8, 1.0], np.float32))
    state = decoder.start(params, *request, sampling=sampling)
    caches = sharding.bytes_per_device(state.target_cache)
    state = decoder.run(params, state, jaxsd.UNTIL_DONE)
    return np.asarray(state.tokens).tolist(), caches

assert len(jax.devices()) == 8
config, small = test_sharding.CONFIG, models.CONFIGS["tiny"]
target, draft = models.language_model(config), models.language_model(small)
weights = jax.device_get(models.init_params(config, jax.random.key(0)))
own = jax.device_get(models.init_params(small, jax.random.key(1)))
alone, caches = generate(target, draft, {{"target": weights, "draft": own}})
mesh = sharding.make_mesh(data=2, model=4)
params = {{
    "target": sharding.place(weights, mesh, sharding.FULLY_SHARDED),
    "draft": sharding.place(own, mesh, sharding.REPLICATED),
}}
rows = {{"batch": "data"}}
together, divided = generate(
    sharding.on_mesh(target, mesh, sharding.FULLY_SHARDED),
    sharding.on_mesh(draft, mesh, rows),
    params,
)
print(json.dumps({{
    "equal": alone == together,
    "caches": [max(caches.values()), sorted(set(divided.values()))],
    "weights": [
        sum(leaf.nbytes for leaf in jax.tree.leaves(weights)),
        sorted(set(sharding.bytes_per_device(params["target"]).values())),
    ],
}}))
"""


def test_eight_devices_write_the_text_of_one_and_hold_an_eighth_each():
    """Two rows by four heads; greedy and sampled rows; the draft whole on every device."""
    code = PROGRAM.format(folder=str(pathlib.Path(__file__).parent))
    found = run_on_devices(code, 8)
    assert found["equal"] is True
    whole, parts = found["caches"]
    assert parts == [whole // 8]
    whole, parts = found["weights"]
    # Norms are everywhere; the rest is divided by eight.
    assert len(parts) == 1
    assert whole / 8 <= parts[0] < 1.02 * whole / 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sharding.make_mesh(data=0), "data=0 must be an integer of at least 1"),
        (lambda: sharding.make_mesh(data=10_000), "takes 10000 devices; there are"),
        (
            lambda: sharding.shardings(CONFIG, mesh_of(1, 1), {"width": "model"}),
            "rules name \\['width'\\]; wanted some of \\['batch', 'embed'",
        ),
        (
            lambda: sharding.shardings(CONFIG, mesh_of(1, 1), {"mlp": "tensor"}),
            "the rules also name \\['tensor'\\]",
        ),
        (
            lambda: sharding.place({}, jax.make_mesh((1,), ("data",)), {"batch": "data"}),
            "wanted Auto: see make_mesh",
        ),
    ],
)
def test_wrong_rules_and_meshes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_on_a_mesh_of_one_device_is_the_model():
    mesh = sharding.make_mesh(data=1, model=1)
    model = models.language_model(CONFIG)
    params = models.init_params(CONFIG, jax.random.key(0))
    divided = sharding.on_mesh(model, mesh)
    tokens, positions = np.array([[1, 2, 3], [0, 1, 2]], np.int32)[:, None]
    want, _ = model.apply(params, tokens, positions, model.init_cache(1, 8))
    placed = sharding.place(params, mesh)
    got, cache = divided.apply(placed, tokens, positions, divided.init_cache(1, 8))
    np.testing.assert_array_equal(got, want)
    assert cache[0].keys.sharding.mesh.axis_names == ("data", "model")
