"""Training: the numbers of a step, and a run that ends the same however often it is killed."""

import functools
import json
import math
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsd.cli import train as command
from jaxsd.models import Config, checkpoint, corpus, forward, states, training

CONFIG = Config(
    vocab_size=257, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32
)
TOKENIZER = corpus.ByteTokenizer()
STEPS = 12
SETTINGS = training.TrainConfig(
    steps=STEPS,
    batch_size=4,
    sequence_length=16,
    learning_rate=3e-3,
    warmup_steps=3,
    eval_every=5,
    eval_batches=2,
    checkpoint_every=4,
    log_every=3,
)


LOSS = jax.jit(functools.partial(training.loss, CONFIG))
FORWARD = jax.jit(functools.partial(forward, CONFIG))


def replace(**changes):
    return training.TrainConfig(**{**vars(SETTINGS), **changes})


def make_data():
    documents = [
        corpus.Document(f"module_{i}.py", f"def add_{i}(a, b):\n    return a + b * {i}\n")
        for i in range(40)
    ]
    return corpus.encode_corpus(corpus.Files(documents, 0), TOKENIZER)


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def params():
    return training.init_state(CONFIG, replace(seed=3)).params


@pytest.fixture(scope="module")
def windows(data):
    return corpus.Batches(data.train, 4, 16)(0)


def run(folder, data, settings=SETTINGS, **arguments):
    arguments = {"show_progress": False, **arguments}
    return training.train(folder, CONFIG, settings, data, TOKENIZER, **arguments)


def read_log(folder):
    lines = [json.loads(line) for line in (folder / training.LOG_FILE).read_text().splitlines()]
    return [{key: line[key] for key in line if key != "seconds"} for line in lines]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -- the step


def test_the_schedule_warms_up_peaks_and_ends():
    schedule = training.learning_rate_schedule(replace(final_learning_rate=0.1))
    rates = [float(schedule(jnp.float32(step))) for step in range(STEPS + 3)]
    # A cosine from the peak at 3 to a tenth of it at 12, from its definition.
    expected = [
        3e-3 * (step / 3 if step < 3 else 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / 9)))
        for step in range(STEPS + 1)
    ]
    np.testing.assert_allclose(rates[: STEPS + 1], expected, rtol=1e-5, atol=1e-9)
    assert rates[0] == 0
    np.testing.assert_allclose(rates[STEPS:], 3e-4, rtol=1e-5)


def test_weight_decay_spares_norm_scales(params):
    """With a gradient of zero, AdamW's update is the decay alone."""
    optimizer = training.make_optimizer(replace(weight_decay=0.5, warmup_steps=0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for update, leaf in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        expected = -3e-3 * 0.5 * leaf if leaf.ndim >= 2 else jnp.zeros_like(leaf)
        np.testing.assert_allclose(update, expected, rtol=1e-5)
    assert {leaf.ndim for leaf in jax.tree.leaves(params)} > {1, 2}


def test_the_loss_is_the_negative_log_likelihood(params, windows):
    total, nats = LOSS(params, windows)
    logits = np.asarray(FORWARD(params, windows[:, :-1]), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.mean(np.take_along_axis(log_probs, windows[:, 1:, None], -1))
    np.testing.assert_allclose([total, nats], expected, rtol=1e-5)


def test_the_distillation_loss_is_a_divergence():
    rng = np.random.default_rng(0)
    teacher, student = rng.normal(size=(2, 5, 11)).astype(np.float32) * 3
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, student))
    expected = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(training.distillation_loss(teacher, student), expected, rtol=1e-4)
    assert (expected > 0.1).all()
    np.testing.assert_allclose(training.distillation_loss(teacher, teacher), 0, atol=1e-6)
    # Its gradient is q - p: the minimum over students is the teacher itself.
    gradient = jax.grad(lambda s: training.distillation_loss(teacher, s).sum())(student)
    np.testing.assert_allclose(gradient, q - p, atol=1e-5)
    flow = jax.grad(lambda t: training.distillation_loss(t, student).sum())(teacher)
    np.testing.assert_array_equal(flow, 0)


def test_the_two_losses_are_mixed_by_weight(params, windows):
    teacher_params = jax.tree.map(lambda leaf: leaf[..., ::-1], params)

    @jax.jit
    def mixed(params, weight):
        teacher = training.Teacher(CONFIG, teacher_params)
        return training.loss(CONFIG, params, windows, teacher=teacher, distill_weight=weight)

    _, nats = LOSS(params, windows)
    (none, _), (quarter, quarter_nats), (divergence, _) = (mixed(params, w) for w in (0, 0.25, 1))
    expected = training.distillation_loss(
        *(FORWARD(p, windows[:, :-1]) for p in (teacher_params, params))
    ).mean()
    assert float(divergence) > 0.01
    np.testing.assert_allclose(divergence, expected, rtol=1e-4)
    np.testing.assert_allclose([none, quarter_nats], nats, rtol=1e-5)
    np.testing.assert_allclose(quarter, 0.75 * nats + 0.25 * divergence, rtol=1e-5)


def first_step(settings, windows):
    """The state after one step, its metrics, and the clipped gradient.

    The first moment of Adam is (1 - b1) times the gradient; the update itself hides its scale.
    """
    state = training.init_state(CONFIG, settings)
    state, metrics = training.make_step(CONFIG, settings)(state, windows, None)
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    (adam,) = filter(is_adam, jax.tree.leaves(state.optimizer, is_leaf=is_adam))
    gradient = jax.tree.map(lambda leaf: np.asarray(leaf) / (1 - settings.b1), adam.mu)
    return state, metrics, gradient


def test_accumulation_equals_the_big_batch(windows):
    """Up to rounding: sums of 16 terms here, of 64 there."""
    _, metrics, gradient = first_step(SETTINGS, windows)
    _, other_metrics, other_gradient = first_step(replace(accumulation=4), windows)
    for name in ("loss", "nats", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_the_gradient_is_clipped(windows):
    _, metrics, gradient = first_step(SETTINGS, windows)
    norm = math.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(gradient)))
    assert float(metrics["gradient_norm"]) > 1.05 * SETTINGS.clip_norm
    np.testing.assert_allclose(norm, SETTINGS.clip_norm, rtol=1e-4)


def test_bfloat16_computes_nearly_the_same_and_keeps_float32_parameters(windows):
    _, exact, _ = first_step(SETTINGS, windows)
    state, rounded, _ = first_step(replace(dtype="bfloat16"), windows)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    # Eight bits of mantissa: a relative error of 2^-9 per rounding, averaged over 64 tokens.
    np.testing.assert_allclose(rounded["nats"], exact["nats"], rtol=0.01)
    assert float(rounded["nats"]) != float(exact["nats"])


def test_evaluation_counts_bytes_of_text_and_not_its_ends(params, data):
    windows = corpus.held_out_windows(data.held_out, 4, 16)
    found = training.make_evaluation(CONFIG, TOKENIZER, windows, 2)(params)
    _, nats = LOSS(params, windows)
    np.testing.assert_allclose(found.nats_per_token, nats, rtol=1e-5)
    assert found.num_tokens == windows[:, 1:].size
    num_ends = int((windows[:, 1:] == TOKENIZER.eos_id).sum())
    assert num_ends > 0
    total = found.nats_per_token * found.num_tokens
    np.testing.assert_allclose(found.nats_per_byte, total / (found.num_tokens - num_ends))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be above 0"),
        ({"warmup_steps": STEPS}, "warmup_steps=12 must be below steps=12"),
        ({"accumulation": 3}, "accumulation=3 must divide batch_size=4"),
        ({"dtype": "float16"}, "dtype='float16' must be one of float32, bfloat16"),
        ({"distill_weight": 1.5, "b1": 1.0}, r"distill_weight=1.5 .*; b1=1.0 must be in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(**changes)


# -- the run


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, data)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


def test_a_run_logs_every_step_it_should(whole_run):
    folder, result = whole_run
    lines = read_log(folder)
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "held_out" in line] == [5, 10, 12]
    assert lines[-1]["held_out"]["nats_per_token"] == result.held_out.nats_per_token
    assert lines[-1]["tokens"] == result.num_tokens == STEPS * 4 * 16
    assert int(result.state.step) == STEPS
    assert result.seconds > 0
    assert states.latest_checkpoint(folder / training.CHECKPOINTS) == STEPS


@pytest.mark.parametrize("moment", ["step", "log", "save", "manifest", "after"])
def test_a_killed_run_ends_in_the_same_bits(whole_run, data, tmp_path, monkeypatch, moment):
    """Killed between steps, while logging, and before, within and after saving a checkpoint."""
    at = {"step": 7, "log": 2, "save": 2, "manifest": 2, "after": 2}[moment]
    where = {
        "step": (corpus.Batches, "__call__"),
        "log": (training._Log, "write"),
        "save": (states.ocp.StandardCheckpointer, "save"),
        "manifest": (states.atomic, "describe"),
        "after": (states, "_delete_old"),
    }[moment]
    original, calls = getattr(*where), 0

    def kill(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(*where, kill)
        with pytest.raises(Killed):
            run(tmp_path, data)
    with (tmp_path / training.LOG_FILE).open("a") as file:
        file.write('{"step": 11, "loss": 0.0}\n{"step": 12, "lo')  # written after the checkpoint
    result = run(tmp_path, data)
    assert_same(result.state, whole_run[1].state)
    assert read_log(tmp_path) == read_log(whole_run[0])
    assert result.train_loss == whole_run[1].train_loss


PROGRAM = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from jaxsd.models import corpus
import test_training
original, calls = corpus.Batches.__call__, 0
def kill(self, step):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, step)
corpus.Batches.__call__ = kill
import pathlib
test_training.run(pathlib.Path(sys.argv[2]), test_training.make_data())
"""


def test_a_process_killed_for_good_ends_in_the_same_bits(whole_run, data, tmp_path):
    """A process dies of SIGKILL at a random step; this one finishes its run."""
    kill_at = int(np.random.default_rng().integers(1, STEPS + 1))
    print("killed at step", kill_at)  # shown if the test fails
    arguments = [os.path.dirname(__file__), str(tmp_path), str(kill_at)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    result = run(tmp_path, data)
    assert_same(result.state, whole_run[1].state)
    assert read_log(tmp_path) == read_log(whole_run[0])


def test_a_finished_run_is_not_trained_again(whole_run, data):
    folder, result = whole_run
    before = (folder / training.LOG_FILE).read_bytes()
    exported = []
    again = run(folder, data, on_checkpoint=lambda state, status: exported.append(status))
    assert_same(again.state, result.state)
    assert again.held_out == result.held_out
    assert again.train_loss == result.train_loss
    assert (folder / training.LOG_FILE).read_bytes() == before
    assert [status["step"] for status in exported] == [STEPS]


def test_a_run_with_other_settings_is_refused(whole_run, data):
    folder, _ = whole_run
    with pytest.raises(ValueError, match=r"other settings \(training\.b1 is 0\.8, was 0\.9\)"):
        run(folder, data, replace(b1=0.8))
    with pytest.raises(ValueError, match=r"corpus is 'x', was"):
        run(folder, data._replace(fingerprint="x"))
    config = Config(**{**CONFIG.to_dict(), "d_ff": 64})
    with pytest.raises(ValueError, match=r"model\.d_ff is 64, was 32"):
        training.train(folder, config, SETTINGS, data, TOKENIZER, show_progress=False)
    run(folder, data, replace(eval_every=6, log_every=7, checkpoint_every=9))  # not part of it


def test_a_tokenizer_of_another_size_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size=257 must be the tokenizer's 258"):
        training.train(tmp_path, CONFIG, SETTINGS, data, corpus.train_bpe(["aa"], 258))


def test_a_teacher_and_its_weight_go_together(data, params, tmp_path):
    with pytest.raises(ValueError, match=r"distill_weight=0\.5 needs a model"):
        run(tmp_path, data, replace(distill_weight=0.5))
    with pytest.raises(ValueError, match=r"distill_weight=0\.0 must be above 0"):
        run(tmp_path, data, teacher=training.Teacher(CONFIG, params))


def test_a_damaged_checkpoint_stops_the_run(data, tmp_path):
    run(tmp_path, data)
    (path,) = (tmp_path / training.CHECKPOINTS / f"{STEPS:08d}").glob("d/*")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"checkpoint '.*00000012' is damaged: d/\w+ is missing"):
        run(tmp_path, data)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    """Before anything is saved: the last checkpoint must be one to go back to."""
    spoilt = training.init_state(CONFIG, SETTINGS)
    spoilt = spoilt._replace(params=jax.tree.map(lambda leaf: leaf * jnp.inf, spoilt.params))
    monkeypatch.setattr(training, "init_state", lambda *args: spoilt)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 1 of .*learning_rate="):
        run(tmp_path, data)
    assert states.latest_checkpoint(tmp_path / training.CHECKPOINTS) is None


def test_parameters_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch):
    """The loss of a step is that of the parameters before it, so it can be the last to be fine."""
    step = training.make_step(CONFIG, SETTINGS)

    def spoil(state, windows, teacher_params):
        state, metrics = step(state, windows, teacher_params)
        if int(state.step) == 4:
            state = state._replace(params=jax.tree.map(lambda leaf: leaf / 0, state.params))
        return state, metrics

    monkeypatch.setattr(training, "make_step", lambda *args: spoil)
    with pytest.raises(FloatingPointError, match="parameters are not finite after step 4"):
        run(tmp_path, data)
    assert states.latest_checkpoint(tmp_path / training.CHECKPOINTS) is None


# -- it learns, from the command line


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Arithmetic written out: easy to learn, and of high entropy byte by byte."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        lines = (f"the sum of {a} and {a + 1} is {2 * a + 1}\n" for a in range(i, i + 12))
        (folder / f"module_{i}.txt").write_text("".join(lines))
    return folder


ARGUMENTS = {
    "tokenizer": "bytes",
    "d_model": 32,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "d_ff": 64,
    "steps": 150,
    "batch_size": 8,
    "sequence_length": 64,
    "learning_rate": 1e-2,
    "warmup_steps": 10,
    "progress": False,
}


@pytest.fixture(scope="module")
def trained(text_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, command.train(str(out), corpus=str(text_folder), **ARGUMENTS)


def test_a_small_model_learns_more_than_letter_frequencies(trained, text_folder):
    out, summary = trained
    data = corpus.encode_corpus(corpus.read_files(text_folder, (".txt",)), TOKENIZER)
    counts = np.bincount(data.held_out)
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * np.log(frequencies)).sum()
    assert entropy > 2.5
    assert summary["held_out_nats_per_token"] < 0.5 * entropy
    # It has no more to say about the training text than about the other: nothing leaked.
    assert summary["train_nats_per_token"] < 0.5 * entropy
    assert summary["tokens"] == 150 * 8 * 64
    assert json.loads(json.dumps(summary)) == summary
    model = checkpoint.load_model(out / "model")
    assert model.metadata["progress"]["step"] == 150
    assert model.metadata["corpus"]["fingerprint"] == data.fingerprint
    evaluate = training.make_evaluation(
        model.config, model.tokenizer, corpus.held_out_windows(data.held_out, 99, 64), 16
    )
    # The export is in bfloat16.
    np.testing.assert_allclose(
        evaluate(model.params).nats_per_token, summary["held_out_nats_per_token"], rtol=0.1
    )


def test_distillation_alone_brings_a_draft_close_to_its_target(trained, text_folder, tmp_path):
    """With weight 1 the labels play no part: all that the draft knows it has from the target."""
    folder = str(trained[0] / "model")
    changes = {"tokenizer": folder, "distill_from": folder, "distill_weight": 1.0, "seed": 1}
    command.train(str(tmp_path), corpus=str(text_folder), **{**ARGUMENTS, **changes})
    target, draft = checkpoint.load_model(folder), checkpoint.load_model(tmp_path / "model")
    checkpoint.check_pair(target, draft)
    data = corpus.encode_corpus(corpus.read_files(text_folder, (".txt",)), TOKENIZER)
    windows = corpus.held_out_windows(data.held_out, 16, 64)
    logits_fn = jax.jit(functools.partial(forward, target.config))
    target_logits, draft_logits = (logits_fn(m.params, windows[:, :-1]) for m in (target, draft))
    # Against a draft that knows how frequent each byte is and no more.
    frequencies = np.log(np.bincount(data.train, minlength=257) + 0.5).astype(np.float32)
    frequencies = np.broadcast_to(frequencies, target_logits.shape)
    by_draft, by_frequency = (
        float(training.distillation_loss(target_logits, logits).mean())
        for logits in (draft_logits, frequencies)
    )
    assert by_draft < 0.3 * by_frequency


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "huge"}, "config='huge' must be one of"),
        ({"corpus": "/nowhere"}, "corpus folder '/nowhere' does not exist"),
        ({"tokenizer": "words"}, "tokenizer='words' must be 'bpe', 'bytes' or the folder"),
        ({"n_heads": 3}, "n_kv_heads=2 must divide n_heads=3"),
        ({"export_dtype": "int8"}, "export_dtype='int8' must be one of"),
        ({"distill_from": "/nowhere"}, "model folder '/nowhere' does not exist"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    text_folder, tmp_path, arguments, message
):
    arguments = {"corpus": str(text_folder), "tokenizer": "bytes", **arguments}
    with pytest.raises(ValueError, match=message):
        command.train(str(tmp_path / "out"), progress=False, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_another_tokenizer_is_refused(trained, text_folder, tmp_path):
    arguments = {"corpus": str(text_folder), "distill_from": str(trained[0] / "model")}
    with pytest.raises(ValueError, match="has another tokenizer: pass tokenizer="):
        command.train(str(tmp_path), vocab_size=300, **arguments)


def test_progress_goes_to_stderr_line_by_line(data, tmp_path, capsys):
    run(tmp_path, data, show_progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    first, *_, last = captured.err.splitlines()
    assert first.startswith("step 1/12  loss ")
    assert last.startswith("step 12/12  loss ")
    assert "tokens/s" in last
    assert "0:00 left" in last


def test_a_run_starts_from_the_weights_it_is_given_and_leaves_them_whole(tmp_path, data, params):
    before = jax.tree.map(np.array, params)
    settings = replace(steps=1, warmup_steps=0, learning_rate=1e-12, weight_decay=0.0)
    result = run(tmp_path / "run", data, settings, initial_params=params)
    assert_same(params, before)  # a step donates its state, and this is the caller's
    for leaf, start in zip(
        jax.tree.leaves(result.state.params), jax.tree.leaves(before), strict=True
    ):
        np.testing.assert_allclose(leaf, start, atol=1e-9)
    other = jax.tree.map(lambda leaf: leaf + 1.0, params)
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path / "run", data, settings, initial_params=other)


def test_a_model_of_another_shape_is_no_start(tmp_path):
    params = training.init_state(CONFIG, SETTINGS).params
    checkpoint.save_model(tmp_path / "small", CONFIG, params, TOKENIZER)
    with pytest.raises(ValueError, match=r"init_from=.*another shape"):
        command.train(str(tmp_path / "run"), tokenizer="bytes", init_from=str(tmp_path / "small"))
