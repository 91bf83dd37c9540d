"""What test_states.py runs in a process of its own that has eight devices.

`python mesh_worker.py FOLDER`: reads what the test has put there, writes, prints JSON.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxsd import models
from jaxsd.models import corpus, sharding, training

CONFIG = dataclasses.replace(
    models.CONFIGS["tiny"], vocab_size=264, n_heads=8, n_kv_heads=4, tie_embeddings=False
)
GOLDEN = pathlib.Path(__file__).parent / "golden" / "llama"


def make_params(seed=0):
    """Of the right shapes, on this host; nothing is compiled for it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), models.abstract_params(CONFIG)
    )


def state_like():
    settings = training.TrainConfig(steps=10, warmup_steps=1)
    return jax.eval_shape(lambda: training.init_state(CONFIG, settings))


def make_state(seed=0):
    """Of a training run: parameters, AdamW's moments of them, counts."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.asarray(rng.normal(size=leaf.shape) * 100).astype(leaf.dtype), state_like()
    )


def tokenizer():
    return corpus.train_bpe(["def f(x):\n    return x\n" * 9], CONFIG.vocab_size)


def is_same(ours, theirs):
    """Structure, types and every bit."""
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        return False
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(
        a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs
    )


def lies_as(tree, mesh, rules):
    """Whether every array lies where the rules put it."""
    wanted = jax.tree.leaves(sharding.shardings_of(tree, mesh, rules))
    return all(
        leaf.sharding.is_equivalent_to(where, leaf.ndim)
        for leaf, where in zip(jax.tree.leaves(tree), wanted, strict=True)
    )


def main(folder):
    assert len(jax.devices()) == 8
    square, long = sharding.make_mesh(data=2, model=4), sharding.make_mesh(data=1, model=8)
    places = {
        "2x4": (square, sharding.FULLY_SHARDED),
        "1x8": (long, sharding.TENSOR),
        "2x4, rows only": (square, {"embed": "data"}),
        "one device": None,
    }
    state, found = make_state(), {}

    def restore(folder, step, to):
        options = dict(zip(("mesh", "rules"), places[to] or (), strict=False))
        got, _ = models.restore_checkpoint(folder, step, state_like(), **options)
        is_placed = not options or lies_as(got, *places[to])
        return is_same(got, state) and is_placed

    found["from the test, one device"] = all(
        restore(folder / "state", 5, to) for to in ("2x4", "1x8", "one device")
    )
    for step, at in enumerate(places):
        placed = state if places[at] is None else sharding.place(state, *places[at])
        models.save_checkpoint(folder / "states", step, placed, keep=9)
        found[f"from {at}"] = all(restore(folder / "states", step, to) for to in places)
    moments = sharding.place(state, *places["2x4"]).optimizer
    found["moments are divided"] = len(moments) > 0 and all(
        len({str(shard.index) for shard in leaf.addressable_shards}) == 8
        for path, leaf in jax.tree.leaves_with_path(moments)
        if "qkv" in str(path)
    )

    # Overwritten as soon as saving has returned.
    placed = sharding.place(jax.tree.map(np.copy, state), *places["2x4"])
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    pending = models.start_checkpoint(folder / "states", 10, placed)
    jax.block_until_ready(overwrite(placed))
    pending.wait()
    found["overwritten"] = restore(folder / "states", 10, "1x8")

    params = make_params()
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    on_square = sharding.place(params, *places["2x4"])
    models.save_model(folder / "model", CONFIG, on_square, tokenizer(), sharded=True)
    models.save_model(folder / "one file", CONFIG, on_square, tokenizer())
    for name in ("model", "one file"):
        for to in ("1x8", "2x4"):
            mesh, rules = places[to]
            got = models.load_model(folder / name, None, mesh=mesh, rules=rules)
            same = is_same(got.params, rounded) and lies_as(got.params, mesh, rules)
            found[f"{name} onto {to}"] = same and got.config == CONFIG
        found[f"{name} onto one device"] = is_same(
            models.load_model(folder / name, None).params, rounded
        )

    mesh, rules = places["2x4"]
    direct = models.load_hf(GOLDEN, mesh=mesh, rules=rules).params
    after = sharding.place(models.load_hf(GOLDEN).params, mesh, rules)
    found["published"] = is_same(direct, after) and lies_as(direct, mesh, rules)
    print(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
