"""What test_processes.py runs twice: two processes of four devices each that are one program.

`python process_worker.py NUMBER PORT FOLDER`: writes to the folder, prints JSON.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np

import jaxsd
from jaxsd import models
from jaxsd.models import corpus, sharding

TARGET = dataclasses.replace(
    models.CONFIGS["tiny"],
    vocab_size=264,
    n_layers=1,
    n_heads=8,
    n_kv_heads=4,
    tie_embeddings=False,
)
DRAFT = dataclasses.replace(models.CONFIGS["tiny"], vocab_size=264, n_layers=1)
MAX_LEN = 14
GOLDEN = pathlib.Path(__file__).parent / "golden" / "llama"


def make_params(config, seed):
    """Of the right shapes, on this host; nothing is compiled for it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32),
        models.abstract_params(config),
    )


def make_decoder(target, draft):
    return jaxsd.speculative(target, jaxsd.model_drafter(draft, 2), max_len=MAX_LEN)


def request():
    """Four rows of different lengths, the first two greedy; a key and settings as ever."""
    arguments = np.arange(20).reshape(4, 5), np.array([5, 3, 1, 2]), jax.random.key(3)
    return arguments, jaxsd.Sampling(np.array([0.0, 0.0, 0.8, 1.0], np.float32))


def main(folder):
    assert (jax.process_count(), len(jax.devices()), len(jax.local_devices())) == (2, 8, 4)
    # Rows along "data", which is one process or the other: each holds two rows.
    mesh, rules = sharding.make_mesh(data=2, model=4), sharding.FULLY_SHARDED
    weights = make_params(TARGET, 0)
    params = {
        "target": sharding.place(weights, mesh, rules),
        "draft": sharding.place(make_params(DRAFT, 1), mesh, sharding.REPLICATED),
    }
    decoder = make_decoder(
        sharding.on_mesh(models.language_model(TARGET), mesh, rules),
        sharding.on_mesh(models.language_model(DRAFT), mesh, {"batch": "data"}),
    )
    arguments, sampling = request()
    out = decoder.generate(params, *arguments, sampling=sampling)
    found = {"tokens": sharding.fetch(out.tokens).tolist()}
    found["lengths"] = sharding.fetch(out.lengths).tolist()
    found["rounds"] = sharding.fetch(out.stats.num_rounds).tolist()
    rounds = list(decoder.stream(params, *arguments, sampling=sampling, max_new_tokens=3))
    found["streamed"] = [
        [token for one in rounds for token in one.tokens[row, : one.num_tokens[row]].tolist()]
        for row in range(4)
    ]
    state = decoder.start(params, *arguments, sampling=sampling)
    found["caches"] = sharding.bytes_per_device(state.target_cache)
    found["weights"] = sharding.bytes_per_device(params["target"])
    found["draft"] = sharding.bytes_per_device(params["draft"])

    # Onto a mesh on which the other process's parts come here.
    across = sharding.make_mesh(model=2, data=4)
    pending = models.start_checkpoint(folder / "states", 7, params["target"], extra={"loss": 0.5})
    pending.wait()
    found["latest"] = models.latest_checkpoint(folder / "states")
    like = models.abstract_params(TARGET)
    restored, extra = models.restore_checkpoint(
        folder / "states", 7, like, mesh=across, rules=rules
    )
    found["restored"] = is_same(restored, weights) and extra == {"loss": 0.5}
    tokenizer = corpus.train_bpe(["def f(x):\n    return x\n" * 9], TARGET.vocab_size)
    models.save_model(
        folder / "model", TARGET, params["target"], tokenizer, dtype="float32", sharded=True
    )
    loaded = models.load_model(folder / "model", mesh=across, rules=rules)
    found["loaded"] = is_same(loaded.params, weights)
    published = models.load_hf(GOLDEN, mesh=across, rules=rules)
    found["published"] = is_same(published.params, models.load_hf(GOLDEN).params)
    try:
        models.save_model(folder / "no", TARGET, params["target"], tokenizer)
    except ValueError as error:
        found["refused"] = str(error)
    print(json.dumps(found))


def is_same(divided, whole):
    """Every bit that is with this process."""
    return all(
        np.array_equal(shard.data, np.asarray(theirs)[shard.index])
        for ours, theirs in zip(jax.tree.leaves(divided), jax.tree.leaves(whole), strict=True)
        for shard in ours.addressable_shards
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1])
    )
    main(pathlib.Path(sys.argv[3]))
