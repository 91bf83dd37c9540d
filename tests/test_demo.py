"""The demo, on a pair of random models: every documented figure, and figures that fit together."""

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest

from jaxsd import costmodel, models
from jaxsd.cli import demo, main, measure
from jaxsd.models import checkpoint, corpus

CONFIG = dataclasses.replace(
    models.CONFIGS["tiny"], vocab_size=257, d_model=16, n_layers=1, d_ff=16, head_dim=4
)
NUM_DRAFT_TOKENS, NUM_PROMPTS, NEW_TOKENS, RUNS = 2, 3, 8, 2


def random_params(seed):
    """Weights without the compilation that `init_params` takes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.normal(0, 0.3, leaf.shape).astype(np.float32)),
        models.abstract_params(CONFIG),
    )


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The JSON document and what went to stderr, of one run for all tests."""
    root = tmp_path_factory.mktemp("demo")
    for seed, name in enumerate(("target", "draft")):
        tokenizer, params = corpus.ByteTokenizer(), random_params(seed)
        checkpoint.save_model(root / name, CONFIG, params, tokenizer, dtype="float32")
    passages = [{"file": f"{n}.py", "text": "x = 1\n" * (n + 1)} for n in range(NUM_PROMPTS)]
    (root / "prompts.json").write_text(json.dumps({"prompts": passages}), encoding="utf-8")
    folders = ("--target", str(root / "target"), "--draft", str(root / "draft"))
    sizes = ("--max-new-tokens", str(NEW_TOKENS), "--runs", str(RUNS))
    argv = ["demo", *folders, "--prompts", str(root / "prompts.json"), *sizes, "--json", "-"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "VERIFIED", (1, NUM_DRAFT_TOKENS))
        patch.setattr(demo, "STEP_REPEATS", 2)
        out, err = _captured(lambda: main.main([*argv, "--num-draft-tokens", "2"]))
    return json.loads(out), err


def _captured(call):
    """Stdout and stderr of a call that must succeed; capsys is not for a whole module."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert call() == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


def test_documented_keys_are_there_and_greedy_outputs_are_equal(shown):
    result, _ = shown
    assert result["outputs_equal"] is True
    assert result["differences"] == []
    headline = result["temperatures"][0]["measured"]
    assert result["temperatures"][0]["temperature"] == 1
    for key in (
        "plain_tokens_per_second",
        "speculative_tokens_per_second",
        "mean_acceptance_length",
        "speedup",
    ):
        assert result[key] == headline[key]
        assert result[key] > 0
    assert result["num_draft_tokens"] == NUM_DRAFT_TOKENS
    assert result["batch_size"] == 1
    assert result["device"]
    assert result["compile_seconds"] > 0
    assert result["versions"]["jax"] == jax.__version__
    assert result["design"]["draft_parameters"] == pytest.approx(312760391.8, rel=1e-6)


def test_measured_figures_of_a_temperature_fit_together(shown):
    result, _ = shown
    assert [row["temperature"] for row in result["temperatures"]] == [1, 0.7, 0]
    for row in result["temperatures"]:
        measured = row["measured"]
        shares = measured["acceptance_by_position"]
        assert len(shares) == NUM_DRAFT_TOKENS
        assert sorted(shares, reverse=True) == shares
        # Both count accepted tokens per round.
        assert measured["mean_acceptance_length"] == pytest.approx(1 + sum(shares), abs=1e-5)
        assert measured["acceptance_rate"] == pytest.approx(sum(shares) / 2, abs=1e-5)
        ratios = measured["speedup_runs"]
        assert len(ratios) == RUNS
        assert measured["speedup_min"] == min(ratios)
        assert measured["speedup_max"] == max(ratios)
        assert min(ratios) <= measured["speedup"] <= max(ratios)


def test_predictions_are_the_cost_model_s_from_the_measured_parts(shown):
    result, _ = shown
    times = result["step_times"]
    assert times["measured"] == [0, 1, 2]
    for row in result["temperatures"]:
        predicted = row["predicted"]
        prediction = costmodel.best_num_tokens(
            predicted["alpha"],
            times["target_seconds"],
            times["draft_seconds"],
            np.array(times["verify_seconds"]),
        )
        assert row["recommended_num_draft_tokens"] == int(prediction.num_tokens)
        assert row["predicted_speedup_by_num_draft_tokens"] == pytest.approx(
            np.asarray(prediction.speedup).tolist()
        )
        assert predicted["speedup"] == row["predicted_speedup_by_num_draft_tokens"][2]
        assert predicted["plain_tokens_per_second"] == pytest.approx(1 / times["target_seconds"])
        assert predicted["mean_acceptance_length"] == pytest.approx(
            1 + sum(predicted["acceptance_by_position"])
        )


def test_everything_is_shown_on_stderr_when_stdout_is_json(shown):
    result, err = shown
    assert "0.py" in err
    assert "Greedy output with speculation equals plain output" in err
    assert "Recommended draft length" in err
    assert "312.8M" in err
    assert f"{result['speedup']:.2f}" in err
    assert max(len(line) for line in err.splitlines()) <= 80
    assert "…" not in err  # no cell cut off


def test_overlap_is_the_probability_of_acceptance():
    """sum(min(p, q)) computed by hand, and the margin of the two best logits."""
    target, draft = (
        checkpoint.Pretrained(CONFIG, random_params(seed), corpus.ByteTokenizer(), {})
        for seed in (0, 1)
    )
    tokens = np.array([[1, 2, 3, 4]], np.int32)
    overlap, margin = measure.make_overlap(target, draft)(tokens, 0.5)
    logits = [
        np.asarray(models.forward(CONFIG, model.params, tokens), np.float64)
        for model in (target, draft)
    ]
    weights = [np.exp(2 * (one - one.max(-1, keepdims=True))) for one in logits]
    probs = [one / one.sum(-1, keepdims=True) for one in weights]
    np.testing.assert_allclose(overlap, np.minimum(*probs).sum(-1), rtol=1e-4)
    largest = np.sort(logits[0], axis=-1)
    np.testing.assert_allclose(margin, largest[..., -1] - largest[..., -2], atol=1e-5)


def test_steps_between_measured_lengths_lie_on_a_line():
    seconds = {0: 1.0, 1: 2.0, 3: 6.0}
    times = measure.step_times(
        lambda params, state: 1.5,
        {k: lambda params, state, value=value: value for k, value in seconds.items()},
        lambda params, state: 0.25,
        params=None,
        make_state=lambda: None,
        repeats=3,
    )
    assert times.pass_seconds == [1.0, 2.0, 4.0, 6.0]
    # Beyond its pass a plain round took half a second, and so does every other.
    assert times.verify_seconds == [1.5, 2.5, 4.5, 6.5]
    assert (times.target_seconds, times.draft_seconds, times.measured) == (1.5, 0.25, [0, 1, 3])


def test_prompts_are_padded_to_one_length():
    requests = measure.pad_prompts([[1, 2, 3], [4] * 17])
    assert [request.tokens.shape for request in requests] == [(1, 32), (1, 32)]
    assert [request.length for request in requests] == [3, 17]
    assert requests[0].tokens[0, :4].tolist() == [1, 2, 3, 0]
