"""A checkpoint of a training run is whole, or it is refused with the reason named."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
