"""A checkpoint of a training run is whole, or it is refused with the reason named."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import mesh_worker
import numpy as np
import pytest

import jaxsd
from jaxsd import models
from jaxsd.models import states


def make_state(seed):
    key = jax.random.key(seed)
    return {
        "params": {"a": jax.random.normal(key, (64, 33)), "b": jnp.arange(5, dtype=jnp.int32)},
        "half": jnp.ones((7,), jnp.bfloat16) / 3,
        "step": jnp.int32(seed),
    }


LIKE = jax.eval_shape(lambda: make_state(0))


@pytest.fixture(scope="module")
def saved_state(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    for step in (10, 20, 30):
        states.save_checkpoint(folder, step, make_state(step), extra={"seconds": step / 8})
    return folder


def test_the_last_two_checkpoints_are_kept_and_read_back_exactly(saved_state):
    names = sorted(os.listdir(saved_state))
    assert [n for n in names if "." not in n] == ["00000020", "00000030"]
    assert len(names) == 4
    assert states.latest_checkpoint(saved_state) == 30
    for step in (20, 30):
        state, extra = states.restore_checkpoint(saved_state, step, LIKE)
        assert extra == {"seconds": step / 8}
        jax.tree.map(np.testing.assert_array_equal, state, make_state(step))
        assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, LIKE)


def test_every_file_of_a_checkpoint_is_checked(saved_state, tmp_path):
    names = [p.relative_to(saved_state) for p in saved_state.rglob("0*/**/*") if p.is_file()]
    names = [name for name in names if name.parts[0] == "00000030"]
    assert len(names) > 5
    for i, name in enumerate(names):
        for j, damage in enumerate((lambda d: d[: len(d) // 2], lambda d: d[:-1] + b"\0", None)):
            folder = shutil.copytree(saved_state, tmp_path / f"{i}-{j}")
            data = (folder / name).read_bytes()
            if damage is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(damage(data))
            if (folder / name).exists() and (folder / name).read_bytes() == data:
                continue
            with pytest.raises(ValueError, match=r"checkpoint '.*00000030' is damaged") as error:
                states.restore_checkpoint(folder, 30, LIKE)
            assert name.name in str(error.value)


def test_a_damaged_manifest_is_refused(saved_state, tmp_path):
    for i, text in enumerate(["", "{}", "[]", '{"step": 30, "extra": {}, "files"']):
        folder = shutil.copytree(saved_state, tmp_path / str(i))
        (folder / "00000030.manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"checkpoint '.*00000030' has .*manifest"):
            states.restore_checkpoint(folder, 30, LIKE)


def test_deleting_a_damaged_checkpoint_goes_back_to_the_one_before(saved_state, tmp_path):
    """What the error message advises."""
    folder = shutil.copytree(saved_state, tmp_path / "state")
    shutil.rmtree(folder / "00000030")
    with pytest.raises(ValueError, match=r"00000030.*is damaged"):
        states.restore_checkpoint(folder, 30, LIKE)
    (folder / "00000030.manifest.json").unlink()
    assert states.latest_checkpoint(folder) == 20


def test_an_interrupted_save_does_not_count_and_is_swept_away(saved_state, tmp_path):
    folder = shutil.copytree(saved_state, tmp_path / "state")
    shutil.copytree(folder / "00000030", folder / "00000040")  # no manifest yet
    (folder / "00000040" / "_METADATA").unlink()
    (folder / ".00000035.manifest.json.writing").write_text("{")
    (folder / "00000036.orbax-checkpoint-tmp").mkdir()
    (folder / "notes.txt").write_text("not ours")
    assert states.latest_checkpoint(folder) == 30
    states.save_checkpoint(folder, 40, make_state(40))
    state, _ = states.restore_checkpoint(folder, 40, LIKE)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(40))
    names = ["00000030", "00000030.manifest.json", "00000040", "00000040.manifest.json"]
    assert sorted(os.listdir(folder)) == [*names, "notes.txt"]


def test_a_state_of_another_shape_is_refused(saved_state):
    for other in (
        {**LIKE, "step": jax.ShapeDtypeStruct((3,), jnp.int32)},
        {**LIKE, "more": LIKE["step"]},
        {"step": LIKE["step"]},
    ):
        with pytest.raises(ValueError, match=r"checkpoint '.*00000030' does not fit this run"):
            states.restore_checkpoint(saved_state, 30, other)


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    assert states.latest_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="no readable manifest"):
        states.restore_checkpoint(tmp_path, 3, LIKE)
    with pytest.raises(ValueError, match="keep=0 must be at least 1"):
        states.save_checkpoint(tmp_path, 3, make_state(0), keep=0)


def test_a_checkpoint_of_another_version_is_refused_and_the_first_ones_are_read(
    saved_state, tmp_path
):
    """The first manifests named no format."""
    folder = shutil.copytree(saved_state, tmp_path / "state")
    path = folder / "00000030.manifest.json"
    content = json.loads(path.read_text())
    assert content.pop("format") == "jaxsd-checkpoint-1"
    path.write_text(json.dumps(content))
    state, _ = states.restore_checkpoint(folder, 30, LIKE)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(30))
    path.write_text(json.dumps({**content, "format": "jaxsd-checkpoint-9"}))
    with pytest.raises(ValueError, match="has format 'jaxsd-checkpoint-9', not 'jaxsd-check"):
        states.restore_checkpoint(folder, 30, LIKE)


# -- while training goes on


class Gate:
    """Holds up the last step of writing, which is to describe the files."""

    def __init__(self, monkeypatch):
        self.may_go_on, describe = threading.Event(), states.atomic.describe

        def wait_and_describe(folder):
            assert self.may_go_on.wait(60)
            return describe(folder)

        monkeypatch.setattr(states.atomic, "describe", wait_and_describe)


def test_a_save_returns_at_once_and_counts_when_it_is_done(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    pending = models.start_checkpoint(tmp_path, 3, make_state(3))
    assert not pending.is_done()
    assert models.latest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="no readable manifest"):
        models.restore_checkpoint(tmp_path, 3, LIKE)
    gate.may_go_on.set()
    pending.wait()
    pending.wait()
    assert pending.is_done()
    assert models.latest_checkpoint(tmp_path) == 3
    state, _ = models.restore_checkpoint(tmp_path, 3, LIKE)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(3))


def test_a_save_waits_for_the_one_before_in_its_folder(tmp_path, monkeypatch):
    """Tidying up after the first would sweep away what the second has written so far."""
    gate = Gate(monkeypatch)
    first = models.start_checkpoint(tmp_path, 1, make_state(1), keep=1)
    threading.Timer(0.3, gate.may_go_on.set).start()
    second = models.start_checkpoint(tmp_path, 2, make_state(2), keep=1)
    assert first.is_done()
    second.wait()
    assert sorted(os.listdir(tmp_path)) == ["00000002", "00000002.manifest.json"]


def test_a_save_that_fails_says_so_when_waited_for_and_does_not_count(tmp_path, monkeypatch):
    models.save_checkpoint(tmp_path, 1, make_state(1))

    def fail(folder):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(states.atomic, "describe", fail)
        pending = models.start_checkpoint(tmp_path, 2, make_state(2))
        with pytest.raises(OSError, match="disk full"):
            pending.wait()
        assert models.latest_checkpoint(tmp_path) == 1
        models.start_checkpoint(tmp_path, 3, make_state(3))  # it was told once; this one never
        with pytest.raises(OSError, match="disk full"):
            models.save_checkpoint(tmp_path, 4, make_state(4))
    models.save_checkpoint(tmp_path, 4, make_state(4))
    assert models.latest_checkpoint(tmp_path) == 4


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_states
from jaxsd.models import states
states.atomic.describe = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
states.save_checkpoint({folder!r}, 40, test_states.make_state(40))
"""


def test_a_process_killed_while_it_saves_leaves_the_checkpoint_before(saved_state, tmp_path):
    folder = shutil.copytree(saved_state, tmp_path / "state")
    program = KILLED.format(tests=os.path.dirname(__file__), folder=str(folder))
    done = run_python(["-c", program], devices=1)
    assert done.returncode == -9, done.stderr
    assert (folder / "00000040").is_dir()
    assert models.latest_checkpoint(folder) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step=-1 must be at least 0"),
        ({"step": 2.0}, r"step=2\.0 must be at least 0, an integer"),
        ({"keep": 0}, "keep=0 must be at least 1"),
        ({"extra": {"loss": float("nan")}}, "not JSON compliant"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        models.start_checkpoint(tmp_path / "x", **{"step": 1, "state": {}, **arguments})
    assert os.listdir(tmp_path) == []


# -- from mesh to mesh


def run_python(arguments, devices):
    """With that many virtual devices, and this copy of jaxsd."""
    path = os.pathsep.join([str(pathlib.Path(jaxsd.__file__).parent.parent)])
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory):
    """The folder that eight devices read and wrote, and what they found."""
    folder = tmp_path_factory.mktemp("mesh")
    models.save_checkpoint(folder / "state", 5, mesh_worker.make_state())
    done = run_python([mesh_worker.__file__, str(folder)], devices=8)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_a_training_state_goes_from_any_mesh_to_any_other(on_eight_devices):
    """2 by 4, 1 by 8, along one axis only, one device: saved on each, restored on all."""
    folder, found = on_eight_devices
    wrong = [what for what, is_right in found.items() if not is_right]
    assert not wrong
    assert len(found) == 14
    # The last two are kept: of one device, and of 2 by 4.
    for step in (3, 10):
        state, _ = models.restore_checkpoint(folder / "states", step, mesh_worker.state_like())
        assert mesh_worker.is_same(state, mesh_worker.make_state())


def test_a_model_that_eight_devices_wrote_is_read_by_one(on_eight_devices):
    folder, _ = on_eight_devices
    for name in ("model", "one file"):
        model = models.load_model(folder / name)
        assert model.config == mesh_worker.CONFIG
        rounded = jax.tree.map(
            lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), mesh_worker.make_params()
        )
        assert mesh_worker.is_same(model.params, rounded)
    assert sorted(os.listdir(folder / "model")) == ["config.json", "tokenizer.json", "weights"]


def test_every_file_of_a_sharded_model_is_checked(on_eight_devices, tmp_path):
    whole = on_eight_devices[0] / "model"
    names = [path.relative_to(whole) for path in (whole / "weights").rglob("*") if path.is_file()]
    assert len(names) > 5
    for number, name in enumerate(names):
        for damage in ("flip", "delete"):
            folder = shutil.copytree(whole, tmp_path / f"{number}-{damage}")
            data = bytearray((folder / name).read_bytes())
            (folder / name).unlink()
            if damage == "flip" and data:
                data[len(data) // 2] ^= 1
                (folder / name).write_bytes(data)
            with pytest.raises(ValueError, match="weights is damaged") as info:
                models.load_model(folder)
            assert name.name in str(info.value)
            assert "\n" not in str(info.value)
            shutil.rmtree(folder)


SHARDED_DAMAGE = {
    "layers": (
        lambda c: c["config"].update(n_layers=10**9),
        "bytes of weights cannot hold n_layers=1000000000",
    ),
    "more layers": (lambda c: c["config"].update(n_layers=3), "does not hold what the config asks"),
    "shape": (lambda c: c["config"].update(d_ff=264), "does not hold what the config asks for"),
    "files": (lambda c: c["weights"].pop("files"), "weights must have a dtype and files"),
    "dtype": (lambda c: c["weights"].update(dtype="int8"), "weights must have a dtype and files"),
    "format": (lambda c: c.update(format="jaxsd-model-3"), "has format 'jaxsd-model-3', not 'jax"),
}


@pytest.mark.parametrize(("edit", "message"), SHARDED_DAMAGE.values(), ids=SHARDED_DAMAGE.keys())
def test_a_wrong_config_of_a_sharded_model_is_refused(on_eight_devices, tmp_path, edit, message):
    folder = shutil.copytree(on_eight_devices[0] / "model", tmp_path / "model")
    path = folder / "config.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as info:
        models.load_model(folder)
    assert str(info.value).startswith(f"cannot load model {str(folder)!r}")


def test_a_sharded_model_that_is_not_finite_is_not_saved(tmp_path):
    params = mesh_worker.make_params()
    params["final_norm"]["scale"][3] = np.nan
    with pytest.raises(ValueError, match=r"tensor final_norm\.scale has 1 values that are not fin"):
        models.save_model(
            tmp_path / "m", mesh_worker.CONFIG, params, mesh_worker.tokenizer(), sharded=True
        )
    assert os.listdir(tmp_path) == []
