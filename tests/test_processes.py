"""Two processes as one program: the text, the weights and the checkpoints of one device."""

import contextlib
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import process_worker
import pytest

import jaxsd
from jaxsd import models
from jaxsd.models import sharding

ENDS = ("out", "err")
SECONDS = 300  # for both together; on two quiet cores half a minute


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_pair(folder):
    """What the two processes printed, and None, or what went wrong."""
    environment = {name: os.environ[name] for name in os.environ if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(pathlib.Path(jaxsd.__file__).parent.parent)
    port, deadline = str(free_port()), time.monotonic() + SECONDS
    processes = []
    with contextlib.ExitStack() as opened:
        for number in range(2):
            out, err = (
                opened.enter_context((folder / f"{number}.{end}").open("w")) for end in ENDS
            )
            command = [sys.executable, process_worker.__file__, str(number), port, str(folder)]
            processes.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment
                )
            )
        # One that dies leaves the other waiting for it.
        while any(one.poll() is None for one in processes):
            if any(one.poll() for one in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [one.poll() for one in processes]
        for one in processes:
            one.kill()
            one.wait()
    if codes != [0, 0]:
        ends = [(folder / f"{number}.err").read_text()[-2000:] for number in range(2)]
        return None, f"exit codes {codes}: {' --- '.join(ends)}"
    texts = [(folder / f"{number}.out").read_text() for number in range(2)]
    return [json.loads(text.splitlines()[-1]) for text in texts], None


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder that the processes wrote, and what each found."""
    folder = tmp_path_factory.mktemp("pair")
    found, problem = run_pair(folder)
    if found is None and "address already in use" in problem.lower():
        found, problem = run_pair(folder)  # another program was faster to take the port
    assert found is not None, problem
    return folder, found


@functools.cache
def alone():
    """The same request on one device."""
    target, draft = (
        models.language_model(c) for c in (process_worker.TARGET, process_worker.DRAFT)
    )
    decoder = process_worker.make_decoder(target, draft)
    params = {
        "target": process_worker.make_params(process_worker.TARGET, 0),
        "draft": process_worker.make_params(process_worker.DRAFT, 1),
    }
    arguments, sampling = process_worker.request()
    return decoder.generate(params, *arguments, sampling=sampling)


def test_two_processes_write_the_text_of_one_device(pair):
    """Two greedy rows and two sampled ones, rows, heads and weights divided; in both processes."""
    out = jax.tree.map(np.asarray, alone())
    assert set(out.lengths.tolist()) == {process_worker.MAX_LEN}
    for found in pair[1]:
        assert found["tokens"] == out.tokens.tolist()
        assert found["lengths"] == out.lengths.tolist()
        assert found["rounds"] == out.stats.num_rounds.tolist()
        starts = process_worker.request()[0][1]
        assert found["streamed"] == [
            row[start : start + 3].tolist() for row, start in zip(out.tokens, starts, strict=True)
        ]


def test_each_device_holds_an_eighth_and_the_whole_draft(pair):
    target = models.language_model(process_worker.TARGET)
    cache = jax.eval_shape(lambda: target.init_cache(4, process_worker.MAX_LEN + 2))
    sizes = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for name, tree in {
            "caches": cache,
            "weights": models.abstract_params(process_worker.TARGET),
            "draft": models.abstract_params(process_worker.DRAFT),
        }.items()
    }
    devices = [name for found in pair[1] for name in found["caches"]]
    assert len(set(devices)) == 8
    for found in pair[1]:
        assert set(found["caches"].values()) == {sizes["caches"] // 8}
        # Norms are everywhere; the rest is divided by eight.
        (part,) = set(found["weights"].values())
        assert sizes["weights"] / 8 <= part < 1.05 * sizes["weights"] / 8
        assert set(found["draft"].values()) == {sizes["draft"]}


def test_what_two_processes_save_is_restored_on_another_mesh_and_on_one_device(pair):
    folder, both = pair
    for found in both:
        assert found["latest"] == 7
        assert [found[name] for name in ("restored", "loaded", "published")] == [True] * 3
        assert "in part with other processes: give sharded=True" in found["refused"]
    want = process_worker.make_params(process_worker.TARGET, 0)
    like = models.abstract_params(process_worker.TARGET)
    state, extra = models.restore_checkpoint(folder / "states", 7, like)
    assert extra == {"loss": 0.5}
    jax.tree.map(np.testing.assert_array_equal, state, want)
    model = models.load_model(folder / "model")
    jax.tree.map(np.testing.assert_array_equal, model.params, want)
    names = sorted(path.name for path in folder.iterdir() if not path.suffix)
    assert names == ["model", "states"]


def test_what_one_process_holds_is_fetched_as_it_is():
    tree = {"a": jax.numpy.arange(3), "b": np.ones(2, np.float32), "c": 2.0}
    found = sharding.fetch(tree)
    assert {name: type(found[name]) for name in found} == dict.fromkeys(tree, np.ndarray)
    jax.tree.map(np.testing.assert_array_equal, found, tree)
