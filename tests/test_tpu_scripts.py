"""The scripts of tpu_scripts/ run, on models of a few thousand weights, and their figures fit."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from jaxsd import costmodel, models
from jaxsd.cli import rows as rows_lib
from jaxsd.models import checkpoint, corpus

FOLDER = pathlib.Path(__file__).parent.parent / "tpu_scripts"
SCRIPTS = ("bench_decode", "bench_pass", "calibrate", "compare_peers", "train_family")
CONFIG = dataclasses.replace(
    models.CONFIGS["tiny"], vocab_size=257, d_model=32, n_layers=2, d_ff=32, head_dim=8
)
PAIR = ["--target", "random:probe", "--draft", "random:probe-draft", "--quick"]


@pytest.fixture
def script(monkeypatch):
    """Imports a script as it is when it is run: with its folder in front of the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(models.CONFIGS, "probe", CONFIG)
    small = dataclasses.replace(CONFIG, n_layers=1)
    monkeypatch.setitem(models.CONFIGS, "probe-draft", small)
    return importlib.import_module


def last_document(capsys):
    """What the last line of stdout holds, and the lines before it."""
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), lines


def check_document(document, name, lines):
    """What every script says of where its figures are from."""
    assert document["script"] == name
    assert document["command"].startswith(f"python tpu_scripts/{name}.py --")
    assert document["versions"]["jax"] == jax.__version__
    assert document["device"]
    assert document["date"].startswith("20")
    assert "commit" in document
    assert lines[0].startswith("device ")
    assert any("passes/s" in line for line in lines[:4])


def test_passes_are_timed_over_the_grid(script, capsys, tmp_path):
    out = tmp_path / "sub" / "passes.json"
    returned = script("bench_pass").main([*PAIR, "--out", str(out)])
    document, lines = last_document(capsys)
    check_document(document, "bench_pass", lines)
    assert document == returned == json.loads(out.read_text(encoding="utf-8"))
    points = document["points"]
    places = [(one["role"], one["batch"], one["rows"], one["context"]) for one in points]
    assert places == [
        *(("target", batch, rows, 16) for batch in (1, 2) for rows in (1, 2)),
        *(("draft", batch, 1, 16) for batch in (1, 2)),
    ]
    for one in points:
        assert 0 < one["seconds_lowest"] <= one["seconds_highest"]
        assert one["bytes_per_second"] == pytest.approx(one["bytes"] / one["seconds"])
    # All weights, and what 16 tokens left in the cache, in 32 bits.
    weights = models.num_parameters(CONFIG)
    cache = 2 * 2 * CONFIG.n_kv_heads * CONFIG.head_dim
    assert points[0]["bytes"] == pytest.approx(4 * (weights + 17 * cache))


def test_decoding_is_timed_stage_by_stage(script, capsys):
    script("bench_decode").main(PAIR)
    document, lines = last_document(capsys)
    check_document(document, "bench_decode", lines)
    plain, drafted = document["results"]
    assert (plain["num_tokens"], drafted["num_tokens"]) == (0, 2)
    assert plain["speedup"] == plain["mean_acceptance_length"] == 1
    assert plain["draft_seconds"] == 0
    assert 1 <= drafted["mean_acceptance_length"] <= 3
    assert drafted["acceptance_rate"] == pytest.approx(
        np.mean(drafted["acceptance_by_position"]), abs=1e-5
    )
    for row in document["results"]:
        parts = row["draft_seconds"] + row["verify_seconds"] + row["rest_seconds"]
        assert row["round_seconds"] == pytest.approx(parts)
        assert row["verify_seconds"] > 0
    assert drafted["bytes_per_round"] > plain["bytes_per_round"]
    draft = models.num_parameters(models.CONFIGS["probe-draft"])
    assert drafted["model_and_cache_bytes"] > plain["model_and_cache_bytes"] + 4 * draft


def test_the_cost_model_is_held_against_measurements(script, capsys):
    script("calibrate").main(PAIR)
    document, lines = last_document(capsys)
    check_document(document, "calibrate", lines)
    held, passes = document["held_out"]["points"], document["passes"]
    assert 0 < len(held) < len(passes)
    errors = [abs(one["table"] / one["seconds"] - 1) for one in held]
    assert document["held_out"]["table"]["median_error"] == pytest.approx(np.median(errors))
    rows = document["lengths"]
    assert [row["num_tokens"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert 1 <= row["predicted_tokens"] <= row["num_tokens"] + 1
        assert 1 <= row["measured_tokens"] <= row["num_tokens"] + 1
        for side in ("predicted", "measured"):
            gain = row[f"{side}_tokens"] * rows[0][f"{side}_round_seconds"]
            assert row[f"{side}_speedup"] == pytest.approx(gain / row[f"{side}_round_seconds"])
    chosen = max(rows[1:], key=lambda row: row["predicted_speedup"])
    best = max(row["measured_speedup"] for row in rows[1:])
    assert document["chosen"] == chosen["num_tokens"]
    assert document["chosen_loses"] == pytest.approx(1 - chosen["measured_speedup"] / best)


def test_rounds_that_were_fitted_are_predicted_as_they_were(script):
    """The line through two lengths goes through both, where no part of it would be negative."""
    calibrate = script("calibrate")
    table = costmodel.TokenTimes([1.0, 2.0, 8.0], [1e-3, 2e-3, 3e-3])
    small = costmodel.TokenTimes([1.0], [1e-4])
    rounds = {0: 1.2e-3, 1: 2.7e-3, 7: 5.4e-3}
    times = calibrate.fit_rounds({"target": table, "draft": small}, rounds, 100.0)
    for count, seconds in rounds.items():
        got = float(costmodel.round_seconds(times, 1, count))
        assert got == pytest.approx(seconds, rel=1e-5)


def test_shapes_count_the_weights(script):
    shared = script("shared")
    for config in models.CONFIGS.values():
        shape = shared.shape_of(config)
        assert costmodel.parameters_total(shape) == models.num_parameters(config)
        assert shape.other_parameters == 0


def test_a_family_is_trained_once(script, capsys, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):  # files are held out by name
        (texts / f"{number}.py").write_text(f"x = {number}\n" * 40, encoding="utf-8")
    rng = np.random.default_rng(0)
    config = dataclasses.replace(CONFIG, n_layers=1)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        models.abstract_params(config),
    )
    checkpoint.save_model(tmp_path / "target", config, params, corpus.ByteTokenizer())
    arguments = ["--folder", str(tmp_path / "family"), "--target", str(tmp_path / "target")]
    arguments += ["--corpus", str(texts), "--widths", "16,32", "--depths", "1", "--head-dim", "16"]
    train_family = script("train_family")
    train_family.main([*arguments, "--quick"])
    document, lines = last_document(capsys)
    check_document(document, "train_family", lines)
    drafts = document["drafts"]
    assert [(one["d_model"], one["n_layers"]) for one in drafts] == [(16, 1), (32, 1)]
    written = (tmp_path / "family" / "family.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in written.splitlines()] == drafts
    for one in drafts:
        assert 0 < one["alpha"] < 1
        assert 0 <= one["greedy_agreement"] <= 1
        assert one["training_tokens"] == 2 * 2 * 16
        assert one["draft_perplexity"] == pytest.approx(np.exp(one["loss"]))
    for kind in ("acceptance", "loss"):
        table = rows_lib.read_table(tmp_path / "family" / f"{kind}.csv", kind)
        assert [row["name"] for row in table] == ["w16-l1", "w32-l1"]
    weights = {path: path.read_bytes() for path in (tmp_path / "family").rglob("*.safetensors")}
    assert len(weights) == 2
    again = train_family.main([*arguments, "--quick"])["drafts"]
    assert [one["training_seconds"] for one in again] == [one["training_seconds"] for one in drafts]
    assert {path: path.read_bytes() for path in weights} == weights


@pytest.mark.filterwarnings("ignore")
def test_transformers_says_the_same_with_as_many_passes(script, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    script("compare_peers").main(["--quick", "--pairs", "random:probe"])
    document, lines = last_document(capsys)
    check_document(document, "compare_peers", lines)
    ways = {(way["way"], way["batch"]): way for way in document["results"][0]["ways"]}
    for kind in ("plain", "speculative"):
        ours = ways[f"jaxsd {kind} float32", 1]
        theirs = ways[f"transformers {kind} float32", 1]
        assert theirs["equal_tokens"] == ours["equal_tokens"] == 1
        assert abs(theirs["target_passes"] - ours["target_passes"]) <= 1
    ratios = {(one["name"], one["batch"]) for one in document["results"][0]["ratios"]}
    assert ("plain / transformers plain float32", 2) in ratios
    assert ("speculative / transformers speculative float32", 1) in ratios
    assert ("speculative / plain, ours", 1) in ratios


def test_a_peer_that_is_not_installed_is_named(script, monkeypatch):
    compare_peers = script("compare_peers")
    monkeypatch.setitem(sys.modules["peers"].MODULES, "openvino", ("no_such_module.part", "numpy"))
    with pytest.raises(ValueError, match=r"^no_such_module\.part missing: .*\[openvino\]"):
        compare_peers.main(["--peers", "openvino"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_command(script, name, capsys):
    with pytest.raises(SystemExit) as ended:
        script(name).main(["--help"])
    assert ended.value.code == 0
    assert f"python tpu_scripts/{name}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bench_pass", ["--batches", "0,1"], "'0,1' must be numbers of at least 1"),
        ("bench_pass", ["--rows", "few"], "'few' must be whole numbers separated by commas"),
        ("bench_decode", ["--temperatures", "-1"], "'-1' must be numbers of at least 0"),
        ("bench_decode", ["--chip", "abacus"], "invalid choice: 'abacus'"),
        ("calibrate", ["--held-out", "1"], "--held-out 1.0 must be above 0 and below 1"),
        ("calibrate", ["--fitted-lengths", "3"], "needs two lengths or more"),
        ("train_family", ["--folder", "x", "--widths", "48"], "is no multiple of --head-dim"),
    ],
)
def test_wrong_arguments_are_named(script, name, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        script(name).main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "random:nobody"], "wanted random:NAME"),
        (["--target", "random:tiny"], "a pair has one vocabulary"),
        (["--max-tokens", "1", "--rows", "2"], "raise --max-tokens"),
    ],
)
def test_models_and_grids_that_are_none_are_refused(script, arguments, message):
    both = ["--draft", "random:probe-draft", "--target", "random:probe"]
    # A chip by name: its peak is looked up and not measured.
    with pytest.raises(ValueError, match=message):
        script("bench_pass").main([*both, "--chip", "tpu-v5e", *arguments])


def test_a_script_ends_in_one_line_when_it_is_asked_wrongly():
    command = [sys.executable, str(FOLDER / "bench_pass.py"), "--target", "random:nobody"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --target random:nobody: wanted random:NAME")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_every_script_is_tried_here():
    found = {path.stem for path in FOLDER.glob("*.py")} - {"peers", "shared"}
    assert found == set(SCRIPTS)
