"""A study of drafts: what is counted, fitted and predicted, and that it can be killed anywhere."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

from jaxsd import costmodel, models
from jaxsd.cli import (
    circle,
    circle_design,
    circle_family,
    circle_laws,
    circle_measure,
    circle_plan,
    circle_predict,
    circle_report,
    circle_study,
    circle_times,
)
from jaxsd.models import checkpoint, corpus

VOCAB = corpus.ByteTokenizer.vocab_size
LAW = costmodel.ShapeLossLaw(
    costmodel.LossLaw(1.5, 60.0, 0.4, 900.0, 0.45), 0.002, 0.9, reference_aspect_ratio=0.0
)
# Logits of the conditional acceptance: at ln perplexity 3 about 0.62, 0.66, 0.69.
POSITIONS = costmodel.PositionAcceptanceLaw(
    slopes=np.array([-0.9, -0.8, -0.75]), intercepts=np.array([3.2, 3.05, 3.05])
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
        shares = np.asarray(POSITIONS.shares(*np.float64([row["perplexity"], 1.0])), np.float64)
        tokens = 1 + np.cumsum(shares)
        measured[row["name"]] = {
            "alpha": {"1": float(shares[0])},
            "shares": {"1": shares.tolist()},
            "tokens": {"1": tokens.tolist()},
            "autocorrelation": {"1": [0.3, 0.2, 0.1]},
        }
    return rows, measured


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
    found = circle_measure.shares_of_rounds(kept, num_tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_autocorrelation_is_that_of_a_known_chain():
    rng = np.random.default_rng(0)
    series = [0.0]
    for shock in rng.normal(0, 1, 20000):
        series.append(0.6 * series[-1] + shock)
    series = np.array(series)
    # 0.36 +- 0.007 by Bartlett's formula: five standard errors are 0.035, an alarm in a million.
    assert circle_measure.autocorrelation([series], 2) == pytest.approx(0.36, abs=0.035)
    assert circle_measure.autocorrelation([np.ones(9)], 1) == 0.0


def test_what_rounds_take_beyond_their_passes_is_recovered():
    planted = circle_times.Beyond(2e-4, 3e-4, 5e-5, 1e-10)
    rows = []
    for length, size in ((0, 2e5), (2, 2e5), (7, 2e5), (2, 2e6), (7, 2e6)):
        more = planted.host
        if length:
            more += planted.switch + planted.token * 4 * length + planted.parameter * size
        rows.append(circle_times.TimedRound(4, length, size, 5e-3 + more, 5e-3))
    found = circle_times.fit_beyond(rows)
    np.testing.assert_allclose(found, planted, rtol=1e-8)
    # A term that noise makes negative is left out, and the others are fitted anew.
    rows[3] = rows[3]._replace(seconds=rows[1].seconds - 1e-5)
    rows[4] = rows[4]._replace(seconds=rows[2].seconds - 1e-5)
    found = circle_times.fit_beyond(rows)
    assert found.parameter == 0
    assert min(found) == 0 < found.switch


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


def test_intervals_widen_with_what_is_not_known(family):
    rows, measured = family
    laws = circle_laws.fit_laws(PLAN, rows, measured, target_loss=2.0)
    narrow = circle_predict._interval(laws, 1.5, 0.03)
    wide = circle_predict._interval(laws, 1.5, 0.03, 0.04)
    assert wide[0] < narrow[0] < 1.5 < narrow[1] < wide[1]
    # Student's t of 4 degrees of freedom, five fitted shapes: 2.132 standard deviations.
    assert math.log(narrow[1] / 1.5) == pytest.approx(2.132 * 0.03, rel=1e-3)


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


# -- the whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A corpus, and a target with random weights."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "texts").mkdir()
    for number in range(40):  # files are held out by name
        text = "".join(f"x = {number} + {line}\n" for line in range(30))
        (folder / "texts" / f"{number}.py").write_text(text, encoding="utf-8")
    config = models.Config(VOCAB, 32, 1, 2, 1, 16, 64)
    params = models.init_params(config, jax.random.key(0))
    checkpoint.save_model(folder / "target", config, params, corpus.ByteTokenizer())
    return folder


def test_a_study_that_is_killed_goes_on_and_reports_the_same(texts, tmp_path, monkeypatch, family):
    """Training is stood in for: random weights, losses by the planted law. All else is real."""
    losses = {row["name"]: row for row in family[0]}
    trained, interrupted = [], []

    def train_member(plan, member, out, target_folder, target, text, show_progress=False):
        trained.append(member.name)
        config = circle_plan.config_of(plan, VOCAB, member.d_model, member.n_layers)
        params = models.init_params(config, jax.random.key(len(trained)))
        checkpoint.save_model(out / "model", config, params, text_tokenizer(target))
        row = circle_design.sizes_of(plan, member, VOCAB)
        loss = circle_laws.predict_loss(LAW, row)
        extra = {"loss": loss, "perplexity": math.exp(loss), "losses_along_the_way": []}
        assert member.name not in losses or losses[member.name]["loss"] == loss
        return {**row, "is_held_out": member.is_held_out, "d_ff": config.d_ff, **extra}

    def text_tokenizer(target):
        return target.tokenizer

    measure_shape = circle_measure.measure_shape

    def killed_once(*arguments):
        found = measure_shape(*arguments)
        if not interrupted and len(found) == 3:
            interrupted.append(True)
            raise KeyboardInterrupt
        # Random weights follow no acceptance law: what they are said to accept is planted.
        for name, one in found.items():
            perplexity = math.exp(circle_laws.predict_loss(LAW, _row(name)))
            shares = np.asarray(POSITIONS.shares(*np.float64([perplexity, 1.0])), np.float64)
            one["shares"]["1"] = shares.tolist()
            one["tokens"]["1"] = (1 + np.cumsum(shares)).tolist()
            one["alpha"]["1"] = float(shares[0])
        return found

    def _row(name):
        width, layers, tokens = name.replace("w", "").replace("-l", "-").split("-")
        steps = float(tokens[:-1]) * 1e6 / (PLAN.batch_size * PLAN.sequence_length)
        return circle_design.sizes_of(
            PLAN, PLAN.member(int(width), int(layers), round(steps)), VOCAB
        )

    monkeypatch.setattr(circle_family, "train_member", train_member)
    monkeypatch.setattr(circle_measure, "measure_shape", killed_once)
    where = str(texts / "target"), str(texts / "texts")

    def run():
        return circle.run(PLAN, circle_study.Study(tmp_path / "out", False), *where)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(trained) == len(PLAN.members)
    result = run()
    report = (tmp_path / "out" / circle_report.REPORT_JSON).read_bytes()
    page = (tmp_path / "out" / circle_report.REPORT_PAGE).read_text(encoding="utf-8")
    num_trained = len(trained)
    assert len(PLAN.members) <= num_trained <= len(PLAN.members) + 1  # the designed one
    run()
    assert len(trained) == num_trained
    assert (tmp_path / "out" / circle_report.REPORT_JSON).read_bytes() == report
    assert (tmp_path / "out" / circle_report.REPORT_PAGE).read_text(encoding="utf-8") == page

    held = [one for one in result["members"] if one["is_held_out"]]
    assert [one["name"] for one in held] == [
        member.name for member in PLAN.members if member.is_held_out
    ]
    for one in result["members"]:
        for point in one["points"]:
            low, high = point["from_sizes_interval"]
            assert low < point["from_sizes"] < high
            gain = point["tokens"]["from_sizes"] * point["plain_seconds"]["predicted"]
            assert point["from_sizes"] == pytest.approx(gain / point["round_seconds"]["predicted"])
            measured = point["tokens"]["measured"] * point["plain_seconds"]["measured"]
            assert point["measured"] == pytest.approx(measured / point["round_seconds"]["measured"])
    design = result["design"]
    assert design["training_flops"] <= design["training_flops_limit"] * (1 + 1e-6)
    assert design["member"]["d_model"] % PLAN.head_dim == 0
    assert design["length"] in PLAN.lengths
    for name in ("predicted_and_measured", "speedup_by_size", "acceptance", "loss"):
        assert f"({name}.png)" in page
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000
    assert result["command"].startswith("jaxsd circle --out DIR --device-budget smoke --target")
