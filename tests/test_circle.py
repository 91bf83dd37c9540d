"""A study of drafts: what is counted, fitted and predicted, and that it can be killed anywhere."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

import jaxsd
from jaxsd import costmodel, models
from jaxsd.cli import (
    circle,
    circle_design,
    circle_family,
    circle_figures,
    circle_laws,
    circle_measure,
    circle_page,
    circle_plan,
    circle_predict,
    circle_report,
    circle_study,
    circle_times,
)
from jaxsd.models import checkpoint, corpus

VOCAB = corpus.ByteTokenizer.vocab_size
TARGET_CONFIG = models.Config(VOCAB, 32, 1, 2, 1, 16, 64)
LAW = costmodel.ShapeLossLaw(
    costmodel.LossLaw(1.2, 60.0, 0.4, 60.0, 0.45), 0.002, 0.9, reference_aspect_ratio=0.0
)
# Where one token was accepted, the next is more often.
POSITIONS = costmodel.PositionAcceptanceLaw(
    slopes=np.array([-0.9, -0.8, -0.75]), intercepts=np.array([3.7, 3.9, 4.1])
)
PLAN = dataclasses.replace(
    circle_plan.BUDGETS["smoke"],
    target_config=None,
    target_steps=0,
    shapes=((16, 1), (16, 3), (32, 1), (32, 2), (48, 1), (32, 3)),
    held_out_shapes=((32, 1),),
    head_dim=16,
    steps=(40, 100, 250),
    calibration_shapes=((16, 1), (32, 2), (48, 1)),
    calibration_contexts=(8,),
    lengths=(1, 2, 3),
    fitted_lengths=(1, 3),
    batches=(1,),
    temperatures=(1.0,),
    num_prompts=2,
    prompt_length=8,
    new_tokens=8,
    windows=2,
    sequence_length=16,
    max_width=48,
)


@pytest.fixture(scope="module")
def family():
    """Rows of members whose losses follow the planted law, and what was measured of them."""
    rows, measured = [], {}
    for member in PLAN.members:
        row = circle_design.sizes_of(PLAN, member, VOCAB)
        row["is_held_out"] = member.is_held_out
        row["loss"] = circle_laws.predict_loss(LAW, row)
        row["perplexity"] = math.exp(row["loss"])
        row["losses_along_the_way"] = [[row["training_tokens"] // 2, row["loss"] + 0.1]]
        rows.append(row)
        measured[row["name"]] = planted_acceptance(row["perplexity"])
    return rows, measured


def planted_acceptance(perplexity):
    """What is measured of the acceptance of a draft that follows the planted law."""
    shares = np.asarray(POSITIONS.shares(*np.float64([perplexity, 1.0])), np.float64)
    return {
        "alpha_of_text": {"1": float(shares[0])},
        "alpha": {"1": float(shares[0])},
        "shares": {"1": shares.tolist()},
        "rounds": {"1": 1e9},
        "tokens": {"1": (1 + np.cumsum(shares)).tolist()},
        "autocorrelation": {"1": [0.3, 0.2, 0.1]},
    }


@pytest.mark.parametrize("name", circle_plan.BUDGETS)
def test_what_is_held_out_lies_between_what_is_fitted(name):
    plan = circle_plan.BUDGETS[name]
    assert set(plan.held_out_shapes) < set(plan.shapes)
    assert len({member.name for member in plan.members}) == len(plan.shapes) * len(plan.steps)
    vocab_size = 2048
    rows = [circle_design.sizes_of(plan, member, vocab_size) for member in plan.members]
    fitted, held = (
        [row for row, one in zip(rows, plan.members, strict=True) if one.is_held_out == is_out]
        for is_out in (False, True)
    )
    for value in (
        lambda row: row["parameters_total"],
        lambda row: row["d_model"] / row["n_layers"],
        lambda row: row["training_tokens"],
    ):
        inside = [value(row) for row in fitted]
        assert all(min(inside) <= value(row) <= max(inside) for row in held)
    for width, layers in (*plan.shapes, *plan.calibration_shapes):
        circle_plan.config_of(plan, vocab_size, width, layers)
    assert set(plan.fitted_lengths) <= set(plan.lengths)
    assert all(plan.num_prompts % batch == 0 for batch in plan.batches)
    # Twice the text: a row that is lucky must not be at its end while the others go on.
    assert plan.max_len > plan.prompt_length + 2 * plan.new_tokens


def test_small_has_shapes_of_equal_size_and_other_proportions():
    plan = circle_plan.BUDGETS["small"]
    sizes = {
        member.shape_name: circle_design.sizes_of(plan, member, 2048)["parameters_non_embedding"]
        for member in plan.members
    }
    for first, second in (("w64-l4", "w128-l1"), ("w128-l2", "w192-l1"), ("w128-l4", "w256-l1")):
        assert sizes[first] == pytest.approx(sizes[second], rel=0.12)


def test_shares_of_rounds_equal_those_of_all_outcomes():
    rng = np.random.default_rng(0)
    kept = [rng.uniform(0, 1, 7), rng.uniform(0, 1, 5)]
    num_tokens = 2
    counted, total = np.zeros(num_tokens), 0.0
    for row in kept:
        # Every pattern of kept and not kept, and the rounds that it leads to.
        for pattern in itertools.product((0, 1), repeat=len(row)):
            chance = np.prod(np.where(pattern, row, 1 - row))
            place = 0
            while place < len(row) - num_tokens:
                accepted = 0
                while accepted < num_tokens and pattern[place + accepted]:
                    accepted += 1
                counted[:accepted] += chance
                total += chance
                place += accepted + 1
    expected = counted / total
    found, num_rounds = circle_measure.shares_of_rounds(kept, num_tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert num_rounds == pytest.approx(total, rel=1e-12)


def test_autocorrelation_is_that_of_a_known_chain():
    rng = np.random.default_rng(0)
    series = [0.0]
    for shock in rng.normal(0, 1, 20000):
        series.append(0.6 * series[-1] + shock)
    series = np.array(series)
    # 0.36 +- 0.007 by Bartlett's formula: five standard errors are 0.035, an alarm in a million.
    assert circle_measure.autocorrelation([series], 2) == pytest.approx(0.36, abs=0.035)
    assert circle_measure.autocorrelation([np.ones(9)], 1) == 0.0


def test_the_targets_side_of_rounds_is_recovered(texts):
    plan = dataclasses.replace(PLAN, calibration_shapes=((16, 1), (32, 2), (48, 1), (48, 2)))
    timed = planted_times(plan, None, checkpoint.load_model(texts / "large"))
    calibration = circle_times.fit_times(plan, timed)
    known, found = planted_calibration().rounds[1], calibration.rounds[1]
    np.testing.assert_allclose(found.target_side.seconds, known.target_side.seconds, rtol=1e-6)
    assert found.parameter == pytest.approx(known.parameter, rel=1e-4)
    assert calibration.error.value < 1e-3
    assert calibration.error.degrees == len(plan.batches) * len(plan.fitted_lengths)
    shape = circle_times.shape_of(circle_plan.config_of(plan, VOCAB, 32, 1))
    for rows in circle_times.DRAFT_ROWS:
        seconds = circle_times.draft_seconds(calibration, shape, 1, rows)
        planted = circle_times.draft_seconds(planted_calibration(), shape, 1, rows)
        assert seconds == pytest.approx(planted, rel=1e-3)
    # Rounds that noise made shorter with a larger draft: a parameter costs nothing, not less.
    names = {one["draft"] for one in timed["rounds"]}
    for one in timed["rounds"]:
        if one["draft"] != timed["rounds"][0]["draft"]:
            one["seconds"] /= 3
    assert len(names) == 3
    assert circle_times.fit_rounds(timed, 1).parameter == 0
    assert circle_times.fit_times(plan, timed).error.value > 0.5
    assert circle_times.fit_rounds(timed, 1).replaced == ()


def test_passes_that_noise_made_longer_than_their_round_end_no_study(texts):
    timed = planted_times(PLAN, None, checkpoint.load_model(texts / "large"))
    rounds = {one["length"]: one for one in timed["rounds"] if one["draft"] == "w16-l1"}
    rounds[2]["seconds"] /= 1e3
    found = circle_times.fit_rounds(timed, 1)
    assert found.replaced == (2,)
    plain, first, second, third = np.asarray(found.target_side.seconds)
    assert plain == second == rounds[0]["seconds"] < first < third
    for length in (1, 3):
        rounds[length]["seconds"] /= 1e3
    calibration = circle_times.fit_times(PLAN, timed)
    assert calibration.rounds[1].replaced == (1, 2, 3)
    assert calibration.error.value > 0.1
    config = circle_plan.config_of(PLAN, VOCAB, 32, 1)
    predicted = circle_predict.predict_rounds(PLAN, calibration, config)[1]
    assert (predicted["seconds"] > predicted["plain"]).all()
    assert min(predicted[part].min() for part in circle_predict.PARTS) >= 0


def test_tokens_and_seconds_of_turns_are_pooled():
    """Tokens over batches, by prompt; seconds over turns."""
    alone = {"rounds": 10, "tokens": [20], "prompts": [0]}
    pair = {"rounds": 10, "tokens": [10, 40], "prompts": [0, 1]}
    tokens = circle_measure._tokens([alone, pair])
    assert tokens.value == pytest.approx(70 / 30)
    assert tokens.num == 30
    # Prompt 0 has 1.5 tokens a round, prompt 1 has 4.
    assert tokens.relative_error == pytest.approx(np.std([1.5, 4], ddof=1) / (7 / 3) / math.sqrt(2))
    seconds = circle_measure._seconds(np.array([[0.02], [0.03], [0.03]]))
    assert seconds.value == pytest.approx(0.03)
    assert seconds.num == 3
    assert seconds.relative_error > 0
    speed = circle_measure._speed(2, 3, tokens, seconds, circle_measure.Counted(0.02, 0.1, 9))
    assert speed["speedup"] == pytest.approx(70 / 30 * 2 / 3)
    assert speed["tokens_per_second"] == pytest.approx(2 * 70 / 30 / 0.03)
    assert speed["relative_error"] > math.hypot(0.1, tokens.relative_error)
    # One turn says nothing of its spread.
    assert circle_measure._tokens([alone]).relative_error == 0
    assert circle_measure._seconds(np.array([[0.02]])).relative_error == 0


def test_planted_laws_are_found_and_predict_what_was_held_out(family):
    rows, measured = family
    laws = circle_laws.fit_laws(PLAN, rows, measured, target_loss=2.0)
    assert isinstance(laws.loss.law, costmodel.ShapeLossLaw)
    assert laws.loss.error < 1e-3
    held = [row for row in rows if row["is_held_out"]]
    assert held
    for row in held:
        predicted = circle_predict.predict_draft(PLAN, laws, row)
        assert predicted.loss == pytest.approx(row["loss"], abs=2e-3)
        exact = measured[row["name"]]["tokens"]["1"]
        np.testing.assert_allclose(predicted.tokens, exact, rtol=2e-3)
        assert (predicted.tokens_error < 0.01).all()
    # Held out means: whatever is measured there changes nothing.
    other_rows = [{**row, "loss": 9.0, "perplexity": 8e3} if row in held else row for row in rows]
    other = {**measured, held[0]["name"]: {**measured[held[0]["name"]], "alpha": {"1": 0.01}}}
    again = circle_laws.fit_laws(PLAN, other_rows, other, target_loss=2.0)
    jax.tree.map(np.testing.assert_array_equal, again.loss.law, laws.loss.law)
    jax.tree.map(np.testing.assert_array_equal, again.position["1"].law, laws.position["1"].law)


def test_a_family_that_determines_nothing_is_refused(family):
    rows, _ = family
    alike = [{**row, "loss": 3.0, "training_tokens": 1000} for row in rows]
    with pytest.raises(ValueError, match="the family determines no loss law"):
        circle_laws.best_loss_law(alike)


def test_intervals_widen_with_what_is_not_known():
    Error = circle_times.Error
    narrow = circle_predict.interval(1.5, [Error(0.03, 4)])
    wide = circle_predict.interval(1.5, [Error(0.03, 4), Error(0.04, 6)])
    assert wide[0] < narrow[0] < 1.5 < narrow[1] < wide[1]
    # Student's t of 4 degrees of freedom: 2.132 standard deviations.
    assert math.log(narrow[1] / 1.5) == pytest.approx(2.132 * 0.03, rel=1e-3)
    # Of (9 + 16)^2 / (81 / 4 + 256 / 6) = 9.94 degrees, of which 9 are whole: 1.833.
    assert math.log(wide[1] / 1.5) == pytest.approx(1.833 * 0.05, rel=1e-3)
    assert circle_predict.interval(1.5, [Error(0.0, 4)]) == [1.5, 1.5]


def test_intervals_hold_as_often_as_they_say():
    """Errors of normal laws whose deviations are estimated from few others."""
    rng = np.random.default_rng(3)
    deviations, degrees, trials = np.array([0.05, 0.1, 0.02]), np.array([4, 6, 60]), 4000
    inside = 0
    for _ in range(trials):
        known = deviations * np.sqrt(rng.chisquare(degrees) / degrees)
        errors = [circle_times.Error(*one) for one in zip(known, degrees.tolist(), strict=True)]
        low, high = circle_predict.interval(1.0, errors)
        inside += low <= math.exp(rng.normal(0, deviations).sum()) <= high
    # Five standard errors of a share of 0.9 are 0.024; whole degrees and Welch's form add a little.
    assert inside / trials == pytest.approx(circle_predict.COVERAGE, abs=0.03)


def test_noise_of_the_timed_rounds_is_no_error_of_predicting(texts):
    plan = dataclasses.replace(PLAN, calibration_shapes=((16, 1), (32, 2), (48, 1), (48, 2)))
    timed = planted_times(plan, None, checkpoint.load_model(texts / "large"))
    chip = circle_times.fit_times(plan, timed).chip
    _, middle, _ = dict.fromkeys(one["draft"] for one in timed["rounds"])
    for one in timed["rounds"]:
        if one["draft"] == middle:
            one["seconds"] *= 1.1
    off = circle_times.round_error(plan, timed, chip)
    assert off.value == pytest.approx(math.log(1.1), abs=2e-3)
    for noise, left in ((0.05, math.sqrt(math.log(1.1) ** 2 - 0.05**2)), (0.2, 0.0)):
        for one in timed["rounds"]:
            one["relative_error"] = noise
        found = circle_times.round_error(plan, timed, chip)
        assert found.value == pytest.approx(left, abs=2e-3)


def test_a_state_of_a_longer_draft_serves_a_shorter_one(texts):
    """Prompts are read by one program for all lengths; what is then decoded is the same."""
    large = checkpoint.load_model(texts / "large")
    target = circle_times.make_model(large.config, large.params)
    draft = circle_times.random_draft(PLAN, VOCAB, (16, 1))
    params = {"target": target.params, "draft": draft.params}
    prompts = np.arange(2 * PLAN.prompt_length, dtype=np.int32).reshape(2, -1) % VOCAB
    make = circle_times.decoder_maker(PLAN, target)

    def start(length):
        lengths = np.full(2, PLAN.prompt_length, np.int32)
        return make(draft, length).start(
            params,
            prompts,
            lengths,
            jax.random.key(0),
            sampling=jaxsd.Sampling(1.0),
            max_new_tokens=PLAN.max_len - PLAN.prompt_length,
        )

    for length in PLAN.lengths:
        whole = start(circle_times.reading_length(PLAN, length))
        decoder = make(draft, length)
        there = decoder.run(params, circle_times.for_length(whole, length), jaxsd.UNTIL_DONE)
        here = decoder.run(params, start(length), jaxsd.UNTIL_DONE)
        np.testing.assert_array_equal(there.tokens, here.tokens)
        jax.tree.map(np.testing.assert_array_equal, there.stats, here.stats)
    assert circle_times.reading_length(PLAN, 0) == 0


# -- the folder -----------------------------------------------------------------------------------


def test_a_stage_is_done_once_and_anew_if_something_before_it_changed(tmp_path):
    calls = []

    def make():
        calls.append(len(calls))
        return {"value": len(calls)}

    def study():
        return circle_study.Study(tmp_path, show_progress=False)

    assert study().stage("a/b", {"x": 1}, make) == {"value": 1}
    assert study().stage("a/b", {"x": 1}, make) == {"value": 1}
    assert study().stage("a/b", {"x": 2}, make) == {"value": 2}
    assert len(calls) == 2
    log = (tmp_path / circle_study.LOG_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["stage"] for line in log] == ["a/b", "a/b"]


def test_a_stage_that_was_killed_is_not_taken_for_done(tmp_path):
    study = circle_study.Study(tmp_path, show_progress=False)

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.stage("a", {}, killed)
    assert not study.has("a")
    assert study.stage("a", {}, lambda: {"value": 1}) == {"value": 1}
    text = study.path("a").read_text(encoding="utf-8")
    study.path("a").write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json' is no stage of a study: .*delete it"):
        study.stage("a", {}, lambda: {"value": 2})


def test_a_folder_of_another_study_is_refused(tmp_path):
    study = circle_study.Study(tmp_path, show_progress=False)
    asked = {"plan": PLAN.to_dict(), "target": "embedded", "corpus": None}
    study.stage(circle_study.PLAN_STAGE, asked, lambda: {**asked, "device": "an abacus"})
    circle.claim(study, asked, "an abacus")
    other = {**asked, "plan": dataclasses.replace(PLAN, seed=3).to_dict()}
    with pytest.raises(ValueError, match=r"holds a study with another seed: choose"):
        circle.claim(study, other, "an abacus")
    with pytest.raises(ValueError, match=r"a study of an abacus, this is a chip"):
        circle.claim(study, asked, "a chip")


# -- what is measured -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A corpus, and a target with random weights."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "texts").mkdir()
    for number in range(40):  # files are held out by name
        text = "".join(f"x = {number} + {line}\n" for line in range(30))
        (folder / "texts" / f"{number}.py").write_text(text, encoding="utf-8")
    params = models.init_params(TARGET_CONFIG, jax.random.key(0))
    checkpoint.save_model(folder / "target", TARGET_CONFIG, params, corpus.ByteTokenizer())
    # A draft may have a share of the target's parameters, and no more.
    config = dataclasses.replace(TARGET_CONFIG, d_model=256, n_layers=2, d_ff=512)
    params = models.init_params(config, jax.random.key(0))
    checkpoint.save_model(folder / "large", config, params, corpus.ByteTokenizer())
    return folder


@pytest.mark.parametrize("wrong", ["target", "corpus"])
def test_what_cannot_be_read_does_not_take_the_folder(wrong, texts, tmp_path):
    """The mended command may use the same folder."""
    study = circle_study.Study(tmp_path, show_progress=False)
    there = {"target": str(texts / "target"), "corpus": str(texts / "texts")}
    with pytest.raises(ValueError, match="nowhere"):
        circle.prepare(PLAN, study, **{**there, wrong: str(texts / "nowhere")})
    assert not study.has(circle_study.PLAN_STAGE)
    assert circle.prepare(PLAN, study, **there).base["target"] == there["target"]
    assert study.has(circle_study.PLAN_STAGE)


def test_drafts_are_measured_in_turns(texts, tmp_path):
    """With the target itself as one of the drafts, everything that it proposes is accepted."""
    plan = dataclasses.replace(PLAN, lengths=(1, 2), temperatures=(1.0, 0.0), num_prompts=4)
    plan = dataclasses.replace(plan, batches=(2,), fitted_lengths=(1,))
    target = checkpoint.load_model(texts / "target")
    text = circle_family.read_text(plan, str(texts / "texts"), target.tokenizer)
    written = circle_measure.write_texts(plan, target, text.prompts)["texts"]
    assert np.shape(written["1"]) == (8, 16)
    assert np.shape(written["0"]) == (4, 16)
    np.testing.assert_array_equal(np.array(written["0"])[:, :8], text.prompts)
    other = models.init_params(TARGET_CONFIG, jax.random.key(1))
    drafts = {"itself": target, "another": target._replace(params=other)}
    study = circle_study.Study(tmp_path, show_progress=False)
    read = circle_measure.read_shape(plan, target, drafts, text.windows, written)
    narrow = circle_plan.config_of(plan, VOCAB, 16, 1)
    drafts["narrow"] = target._replace(
        config=narrow, params=models.init_params(narrow, jax.random.key(2))
    )
    rounds = {name: [4.0, 3.0] for name in drafts}
    bench = circle_measure.Bench(plan, study, target, drafts, rounds, text.prompts)
    # Plain decoding as often as there are shapes.
    assert bench.members == {"w32-l1": ["itself", "another"], "w16-l1": ["narrow"]}
    assert [case.length for case in bench.cases] == [0, 0, 1, 2, 1, 2]
    turns = [bench.turn(number) for number in range(4)]
    json.dumps(turns, allow_nan=False)
    assert {run["draft"] for turn in turns for run in turn["runs"]} == {None, *drafts}
    of_itself = [run for turn in turns for run in turn["runs"] if run["draft"] == "itself"]
    assert len({tuple(run["prompts"]) for run in of_itself}) == 2
    loops = bench.accept()
    speeds, timed = circle_measure.summarise_turns(plan, bench, turns)
    assert set(speeds) == set(drafts)
    circle_times.fit_rounds(timed, 2)
    for name in ("itself", "another"):
        one = {**read[name], "speed": speeds[name], "loop": loops[name]}
        for heat in ("1", "0"):
            counted = one["loop"][heat]
            by_position = np.array(counted["accepted_by_position"])
            assert by_position.sum() == counted["accepted"] <= counted["drafted"]
            assert (np.diff(by_position, prepend=counted["rounds"]) <= 0).all()
            if name == "itself":
                assert one["alpha"][heat] == pytest.approx(1, abs=1e-5)
                np.testing.assert_allclose(one["shares"][heat], 1, atol=1e-4)
                assert counted["accepted"] == counted["drafted"]
                assert one["tokens"][heat] == pytest.approx([2, 3], rel=1e-4)
            else:
                assert 0 < one["alpha"][heat] < 1
                assert 1 <= one["tokens"][heat][0] <= one["tokens"][heat][1] < 3
        speed = one["speed"]["2"]
        plain = speed["plain_round_seconds"]
        for length, row in zip(plan.lengths, speed["by_length"], strict=True):
            assert row["length"] == length
            assert 1 <= row["tokens"] <= length + 1
            assert row["speedup"] == pytest.approx(row["tokens"] * plain / row["round_seconds"])
    itself = speeds["itself"]["2"]["by_length"]
    assert [row["tokens"] for row in itself] == [2, 3]


def test_passes_and_rounds_are_timed(texts, tmp_path):
    plan = dataclasses.replace(
        PLAN, lengths=(1,), fitted_lengths=(1,), calibration_shapes=((48, 1), (16, 1), (32, 2))
    )
    target = checkpoint.load_model(texts / "target")
    study = circle_study.Study(tmp_path, show_progress=False)
    timed = circle_times.calibrate(plan, study, target)
    json.dumps(timed, allow_nan=False)
    kinds = {(one["model"], one["batch"], one["rows"]) for one in timed["passes"]}
    assert kinds == {
        *(("target", 1, rows) for rows in (1, 2)),
        *((name, 1, rows) for name in ("w16-l1", "w32-l2", "w48-l1") for rows in (1, 2)),
    }
    assert all(0 < one["lowest"] <= one["highest"] for one in timed["passes"])
    rounds = [(one["length"], one["draft"]) for one in timed["rounds"]]
    # With the smallest draft all, with others some.
    assert rounds[:2] == [(0, "w16-l1"), (1, "w16-l1")]
    assert set(rounds[2:]) == {(1, "w32-l2"), (1, "w48-l1")}
    calibration = circle_times.fit_times(plan, timed)
    config = circle_plan.config_of(plan, VOCAB, 32, 1)
    predicted = circle_predict.predict_rounds(plan, calibration, config)[1]
    parts = [predicted[part] for part in circle_predict.PARTS]
    assert np.min(parts) >= 0
    np.testing.assert_allclose(sum(parts), predicted["seconds"], rtol=1e-5)
    assert predicted["plain"] > 0


# -- the whole ------------------------------------------------------------------------------------


def planted_calibration():
    """A device that is known exactly."""
    table = costmodel.TokenTimes(np.array([1.0, 2.0, 3.0, 4.0]), np.array([4.0, 4.4, 5, 5]) * 1e-3)
    chip = costmodel.Chip(1e12, 0.0, 0.0, 1e9, 1e15, 1.0)
    stack = costmodel.Stack(0.8, 1.0, 1e-5, 5e-5, 0.0, 0.0, 1.0, 0.0)
    side = table._replace(seconds=np.asarray(table.seconds) + np.array([1, 3, 3.3, 3.6]) * 1e-4)
    stacks = {(1, 1): stack, (1, 2): stack._replace(layer_seconds=8e-5)}
    rounds = {1: circle_times.BatchTimes(side, 1e-9)}
    no_error = circle_times.Error(0.0, 1)
    return circle_times.Calibration(table, rounds, stacks, {1: stack}, chip, no_error, PLAN.context)


def planted_seconds(plan, programs):
    """What passes and rounds of a calibration take on it."""
    known = planted_calibration()
    seconds = []
    for model, batch, rows, context in programs.points:
        if model.name == circle_times.TARGET:
            taken = circle_times.table_seconds(known.target, batch, rows, context)
        else:
            shape = circle_times.shape_of(model.config)
            taken = circle_times.draft_seconds(known._replace(context=context), shape, batch, rows)
        seconds.append(float(taken))
    return [*seconds, *(round_seconds(draft.config, k) for _, k, draft in programs.rounds)]


def round_seconds(config, length):
    """A round of one sequence on it."""
    times = circle_times.round_times(planted_calibration(), circle_times.shape_of(config), 1)
    return float(circle_times.round_seconds(times, 1, length))


def planted_times(plan, study, target):
    """What `circle_times.calibrate` would time on it."""
    whole = circle_times.make_model(target.config, target.params, circle_times.TARGET)
    programs = circle_times.list_programs(plan, whole)
    found = circle_times.describe(programs, np.array([planted_seconds(plan, programs)]))
    return {**found, "bytes_per_second": 1e9, "flops_per_second": 1e12}


def planted_loss(name):
    """Of a member by the planted law, whatever it was trained on."""
    width, layers, tokens = name.replace("w", "").replace("-l", "-").split("-")
    per_step = PLAN.batch_size * PLAN.sequence_length
    steps = round(float(tokens[:-1]) * 1e6 / per_step)
    row = circle_design.sizes_of(PLAN, PLAN.member(int(width), int(layers), steps), VOCAB)
    return circle_laws.predict_loss(LAW, row)


def planted_readings(plan, target, drafts, windows, texts):
    """What `circle_measure.read_shape` would find, were the planted laws the truth."""
    return {name: planted_acceptance(math.exp(planted_loss(name))) for name in drafts}


class PlantedBench(circle_measure.Bench):
    """What turns would find, were the planted laws the truth, on a machine a third as fast."""

    def turn(self, number):
        runs = []
        for case in self.cases:
            draft, tokens = None, 1.0
            config = next(iter(self._drafts.values())).config
            if case.length:
                names = self.members[case.shape]
                draft = names[number % len(names)]
                config = self._drafts[draft].config
                law = planted_acceptance(math.exp(planted_loss(draft)))
                tokens = law["tokens"]["1"][case.length - 1]
            # A turn is slower than the one before, and all is slower than before the training.
            seconds = 3.0 * (1 + number) * round_seconds(config, case.length)
            # The two prompts differ by 2 %, so that a mean of them is known to 1 %.
            some = {"rounds": 100, "tokens": [99 * tokens, 101 * tokens], "prompts": [0, 1]}
            runs.append({"draft": draft, "seconds": seconds, **some})
        seconds = 3.0 * (1 + number) * np.array(planted_seconds(self._plan, self.programs))
        return {"calibration": seconds.tolist(), "runs": runs}

    def accept(self):
        return {name: {} for name in self._drafts}


def test_a_study_that_is_killed_goes_on_and_reports_the_same(texts, tmp_path, monkeypatch):
    """Drafts and times stand in for trained and timed ones, and follow laws that are known."""
    trained, turns = [], []

    def train_member(plan, member, out, target_folder, target, text, show_progress=False):
        trained.append(member.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        config = circle_plan.config_of(plan, VOCAB, member.d_model, member.n_layers)
        params = models.init_params(config, jax.random.key(len(trained)))
        checkpoint.save_model(out / "model", config, params, target.tokenizer)
        row = circle_design.sizes_of(plan, member, VOCAB)
        loss = planted_loss(member.name)
        extra = {"loss": loss, "perplexity": math.exp(loss), "losses_along_the_way": []}
        return {**row, "is_held_out": member.is_held_out, "d_ff": config.d_ff, **extra}

    class Killed(PlantedBench):
        def turn(self, number):
            turns.append(number)
            if len(turns) == 2:
                raise KeyboardInterrupt
            return super().turn(number)

    monkeypatch.setattr(circle_family, "train_member", train_member)
    monkeypatch.setattr(circle_measure, "Bench", Killed)
    monkeypatch.setattr(circle_measure, "read_shape", planted_readings)
    monkeypatch.setattr(circle_times, "calibrate", planted_times)
    # Five runs of the same programs, and they are few: none has to make room for others.
    monkeypatch.setattr(circle.jax, "clear_caches", lambda: None)
    out = tmp_path / "out"

    def run():
        study = circle_study.Study(out, show_progress=False)
        return circle.run(PLAN, study, str(texts / "large"), str(texts / "texts"))

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(trained) == 3
    with pytest.raises(KeyboardInterrupt):
        run()
    # What was being trained is trained again; beside the family there is the designed draft.
    everything = set(trained)
    assert len(trained) == len(everything) + 1
    assert len(everything - {member.name for member in PLAN.members}) <= 1
    assert turns == [0, 1]
    result = run()
    assert turns == [0, 1, *range(1, 1 + turns[-1])]
    num_turns = len(turns)
    names = (circle_report.REPORT_JSON, circle_report.REPORT_PAGE)
    before = [(out / name).read_bytes() for name in names]
    run()
    assert (len(trained), len(turns)) == (len(everything) + 1, num_turns)
    assert [(out / name).read_bytes() for name in names] == before
    assert circle_report.load(out) == json.loads(json.dumps(result))
    assert result["calibration"]["in_the_same_turns"]
    twice = result["calibration"]["timed_twice"]
    assert twice["num"] == len(PLAN.lengths)
    assert twice["worst"] < 1e-6

    held = [one["name"] for one in result["members"] if one["is_held_out"]]
    assert held == [member.name for member in PLAN.members if member.is_held_out]
    # The laws and the device being known, what is predicted is what is measured.
    for kind in ("from_sizes", "given_acceptance"):
        assert result["held_out"][kind]["worst"] < 0.01
        assert result["held_out"][kind]["coverage"] == 1
    assert result["held_out"]["best_member"]["1"]["loss"] < 0.01
    assert result["held_out"]["by_one_alpha"]["worst"] > 0.01
    design = result["design"]
    assert design["training_flops"] <= design["training_flops_limit"] * (1 + 1e-6)
    assert design["member"]["d_model"] % PLAN.head_dim == 0
    assert design["predicted_speedup"] == pytest.approx(design["measured_speedup"], rel=0.01)
    assert design["relative_to_family"] > -0.01
    assert abs(design["length"] - design["best_length"]) <= 1
    page = (out / circle_report.REPORT_PAGE).read_text(encoding="utf-8")
    pictures = [*out.glob("*.png")]
    assert len(pictures) == 6
    for picture in pictures:
        assert f"({picture.name})" in page
        assert picture.stat().st_size > 5000
    assert result["command"].startswith("jaxsd circle --out DIR --device-budget smoke --target")
    assert "nan" not in page.lower().replace("finance", "")

    assert "The device was not quiet" not in page
    rounds = {
        batch: {**one, "replaced_lengths": [2]}
        for batch, one in result["calibration"]["rounds"].items()
    }
    noisy = {**result, "calibration": {**result["calibration"], "rounds": rounds}}
    page = circle_page.to_markdown(noisy, circle_figures.figures(noisy))
    assert "\n1 of these 6 times of rounds that draft are those of plain rounds: " in page

    # Where a process cannot hold all programs, groups of drafts are measured one after the other.
    monkeypatch.setattr(circle_measure, "loop_capacity", lambda: 10.0)
    apart = run()
    assert not apart["calibration"]["in_the_same_turns"]
    assert {path.stem for path in (out / "loops").iterdir()} >= {"w16-l1", "w32-l2"}
    for one, other in zip(apart["members"], result["members"], strict=True):
        speedups = [[point["measured"] for point in each["points"]] for each in (one, other)]
        np.testing.assert_allclose(*speedups, rtol=1e-6)
    assert "1, earlier" in (out / circle_report.REPORT_PAGE).read_text(encoding="utf-8")


def test_drafts_are_in_groups_where_a_process_holds_few_programs(family, monkeypatch, tmp_path):
    rows, _ = family
    monkeypatch.setattr(circle_measure, "loop_capacity", lambda: math.inf)
    assert circle_measure.in_groups(PLAN, rows) == [rows]
    # Two shapes of three lengths and plain decoding.
    monkeypatch.setattr(circle_measure, "loop_capacity", lambda: 7.9)
    groups = circle_measure.in_groups(PLAN, rows)
    assert [len(group) for group in groups] == [2 * len(PLAN.steps)] * 3
    assert list(itertools.chain.from_iterable(groups)) == rows
    monkeypatch.undo()
    assert circle_measure.loop_capacity() > 0
    monkeypatch.setattr(circle_measure, "_MAP_LIMIT", tmp_path / "nowhere")
    assert circle_measure.loop_capacity() == math.inf
