"""`jaxsd reproduce theory`: what is judged agrees, and its numbers are found by other means."""

import math

import numpy as np
import pytest

from jaxsd.cli import reproduce_theory, reproduction, theory_measured, theory_results

NUM_RUNS, NUM_CHAINS = 4000, 200
SETTINGS = theory_measured.Settings(
    epsilons=(0.0, 0.03),
    naive_epsilons=(0.0,),
    temperatures=(1.0,),
    num_prompts=2,
    num_rounds=12,
)


@pytest.fixture(scope="module")
def results():
    return theory_results.compute(NUM_RUNS, NUM_CHAINS, SETTINGS)


@pytest.fixture(scope="module")
def built(results):
    del results  # computed once for both
    return reproduce_theory.build(NUM_RUNS, NUM_CHAINS, SETTINGS)


def rows_of(built, start):
    """The rows of the one table whose title begins so."""
    (table,) = (table for table in built.tables if table.title.startswith(start))
    return {row.name: row for row in table.rows}


def total_variation(draft, target):
    return 0.5 * np.abs(np.asarray(draft) - np.asarray(target)).sum(-1)


def test_every_judged_figure_agrees(built):
    wrong = [
        (table.title, row)
        for table in built.tables
        for row in table.rows
        if reproduction.agrees(row) is False
    ]
    assert wrong == []
    judged, agreeing = reproduction.count(built)
    # 5 of figure 2a, 2 of theorem 2, 4 of figure 2b, 1 of figure 3, 1 of theorem 5, 1 of texts;
    # 8 of what is measured: five rules, four of them together, the losses and the line.
    assert judged == agreeing == 22


def test_only_the_papers_numbers_are_called_the_papers(built):
    """All else that is judged is an identity, or a formula beside a simulation, and says so."""
    for table in built.tables:
        for row in table.rows:
            if reproduction.agrees(row) is not None and str(row.paper) not in ("16.41", "3.05"):
                assert row.paper == 1 or row.note.startswith("ours"), row


def test_a_wrong_figure_would_not_agree(built):
    for table in built.tables:
        for row in table.rows:
            if reproduction.agrees(row) is not None:
                assert not reproduction.agrees(row._replace(ours=3 * row.ours)), row


def test_theorem_1_by_a_loop_over_the_text(results):
    """Rejections, and passes, of the simulated chain: in plain numpy, token by token."""
    draft, target = ([np.asarray(part) for part in chain] for chain in results.rejections.chain)
    law, by_position = target[0], [total_variation(draft[0], target[0])]
    for p, q in zip(draft[1], target[1], strict=True):
        by_position.append(law @ total_variation(p, q))
        law = law @ q
    simulated = results.rejections.simulations[1]
    assert simulated.expected == pytest.approx(sum(by_position), rel=1e-12)
    unlimited = results.rejections.calls[None, False]
    assert float(unlimited.calls) == pytest.approx(1 + sum(by_position[:-1]), rel=1e-12)
    assert float(unlimited.tokens_per_call) < 50 / simulated.expected
    four = results.rejections.calls[4, False]
    assert float(four.rejections) == pytest.approx(simulated.expected, rel=1e-12)
    assert float(four.calls) > float(unlimited.calls)


def test_random_chains_are_where_the_paper_is(results):
    """The mean over 200 chains: 0.3 / sqrt(200) = 0.02 of standard error, six of them allowed."""
    totals = results.rejections.by_law["uniform numbers"]
    assert totals.shape == (NUM_CHAINS,)
    assert totals.mean() == pytest.approx(16.31, abs=0.13)
    assert 0.2 < totals.std() < 0.4
    for name in ("exponential numbers", "exponentials of normal numbers"):
        assert results.rejections.by_law[name].min() > 20
    for m in theory_results.BATCHES:
        assert (results.rejections.by_batch[m] < totals).all()


def test_simulations_stop_where_the_formula_is(results):
    for found in results.rejections.simulations.values():
        assert found.tokens.shape == (NUM_RUNS, theory_results.LENGTH)
        assert abs(found.rejections.mean() - found.expected) < 5 * found.standard_error
        assert 0.01 < found.standard_error < 0.1


def test_block_verification_is_below_the_bound(built):
    rows = rows_of(built, "Theorem 2")
    # By enumeration of all blocks, to three digits, for (1/2, 1/2) and (4/5, 1/5); the second pair
    # has the same labels and comes later.
    rates = [row.ours for table in built.tables for row in table.rows if "block ver" in row.name]
    np.testing.assert_allclose(rates[1:5], [0.265, 0.222, 0.192, 0.171], atol=5e-4)
    np.testing.assert_allclose(rates[6:], [0.267, 0.231, 0.202, 0.181], atol=5e-4)
    assert rates[0] == pytest.approx(0.3, abs=1e-12)
    assert rows["random unbiased token rules: fewest rejections over TV"].ours >= 1 - 1e-12


def test_more_drafts_have_a_limit(results):
    for length, curve in results.rejections.curves.items():
        assert (np.diff(curve) < 0).all()
        limit = results.rejections.limits[length]
        assert 0.6 * curve[0] < limit < curve[-1] < 1.01 * limit
    vector = results.rejections.vector
    expected = {1: 1.5, 2: 1.3745104704, 3: 1.282708231084, 1000: 0.9759}
    for m, value in expected.items():
        assert vector[m] == pytest.approx(value, abs=5e-11)


def test_best_sizes_of_uniform_laws(built):
    rows = rows_of(built, "Figure 3")
    ratios = np.linspace(1.001, 20, 400_000)
    for m in (2, 4, 8, 16):
        saved = (1 - 1 / ratios) - (1 - 1 / ratios) ** m
        best = rows[f"uniform: V / V' at which {m} drafts save most"].ours
        assert best == pytest.approx(ratios[saved.argmax()], abs=1e-3)


def test_fronts(results):
    found = results.tradeoff
    variation = total_variation(*found.pair)
    rejection, optimal, resampling = (np.asarray(part) for part in found.front)
    np.testing.assert_allclose(rejection + optimal, np.full_like(optimal, variation), atol=1e-14)
    assert (resampling >= optimal - 1e-14).all()
    assert resampling[0] > 0.05
    assert found.excess.min() > -1e-14
    assert (found.points.sum(0) >= variation - 1e-14).all()
    # Some random rules come near the line.
    assert found.points.sum(0).min() < 1.02 * variation
    assert (found.short_bias <= found.short.loss + 1e-14).all()
    # The loss of a text is no straight line, but nearly one.
    text = found.text
    line = text.loss[-1] * (1 - text.rejection / text.rejection[0])
    assert 1e-4 < np.abs(text.loss - line).max() / text.loss[-1] < 0.02
    # The first chain is lossless at threshold 0: rejections are those of theorem 1.
    assert text.rejection[0] == pytest.approx(results.rejections.simulations[1].expected)


def test_the_embedded_pair_is_on_the_line(results):
    """Counted beside the exact chances: each within 5 standard errors, false alarm 6e-7 a rule."""
    points = {(point.kind, point.epsilon): point for point in results.measured.points[:3]}
    lenience, typical = results.measured.points[3:]
    assert (lenience.kind, typical.kind) == ("lenience", "typical")
    lossless, lossy = (points["optimal", epsilon] for epsilon in SETTINGS.epsilons)
    naive = points["target", 0.0]
    for point in results.measured.points:
        assert point.num_passes == 4 * SETTINGS.num_rounds
        # A round judges a place more than it accepts, but for a bonus token's.
        assert point.num_tokens - point.num_places == point.num_passes - point.rejections
        assert abs(point.rejections - point.expected_rejections) < 5 * point.standard_error
        assert 0 < point.standard_error < math.sqrt(point.expected_rejections)
        assert point.is_on_the_line == (point.kind != "target")
        if point.is_on_the_line:
            assert point.expected_total == pytest.approx(1, abs=1e-6)
        if point is not lossless:
            assert point.loss == pytest.approx(point.expected_loss, rel=1e-5)
            assert point.loss > 0.1 * point.variation
    assert lossless.loss == 0
    assert lossless.expected_loss == pytest.approx(0, abs=1e-5)
    assert naive.expected_total > 1.2
    assert lossy.tokens_per_pass > lossless.tokens_per_pass + 0.5


def test_the_curves_begin_at_what_was_judged(results):
    found = results.measured
    curve, lossless = found.curves[1.0], found.points[0]
    each = lossless.variation / lossless.num_places
    assert curve.rejection[0] == pytest.approx(each, rel=1e-6)
    line = np.full_like(curve.rejection, each)
    np.testing.assert_allclose(curve.rejection + curve.loss_optimal, line, rtol=1e-6)
    assert (curve.loss_target >= curve.loss_optimal - 1e-7).all()
    assert curve.rejection[-1] == pytest.approx(0, abs=1e-7)


def test_judged_places_by_a_loop():
    rng = np.random.default_rng(0)
    accepted = rng.integers(0, theory_measured.NUM_DRAFT_TOKENS + 1, (6, 3))
    first = 5
    lengths = (
        5 + np.arange(3) + np.concatenate([np.zeros((1, 3), int), accepted[:-1] + 1]).cumsum(0)
    )
    found, rejected = theory_measured._judged(lengths, accepted, first, (3, 40))
    for row in range(3):
        places, count = set(), 0
        for begin, number in zip(lengths[:, row], accepted[:, row], strict=True):
            for offset in range(theory_measured.NUM_DRAFT_TOKENS):
                places.add(begin + offset - first)
                if offset == number:  # rejected here
                    count += 1
                    break
        assert set(np.flatnonzero(found[row])) == places
        assert rejected[row] == count


def test_the_lossless_rule_comes_first():
    settings = theory_measured.Settings(epsilons=(0.1, 0.0))
    with pytest.raises(ValueError, match="must begin with 0"):
        theory_measured.num_steps(settings)


def test_what_is_not_computed_is_named(built):
    text = "\n".join(built.errata)
    for word in ("Not known", "Not computed", "pythia", "GPT-4", "block", "first pass"):
        assert word.lower() in text.lower()
    # Brackets would be read as colours where they are printed.
    names = [row.name + row.note for table in built.tables for row in table.rows]
    assert "[" not in text + "".join(names)


def test_everything_fits_into_json(built):
    content = reproduction.as_json(built)
    assert content["judged"] == content["agreeing"]
    for table in content["tables"]:
        for row in table["rows"]:
            assert math.isfinite(float(row["ours"])), row


def test_figures_are_drawn(built, tmp_path):
    pytest.importorskip("matplotlib")
    for figure in built.figures:
        (file,) = reproduction.draw(
            figure.draw, tmp_path / figure.name, figure.size, endings=(".svg",)
        )
        assert file.stat().st_size > 10_000
        assert figure.caption.endswith(".")
    names = {figure.name for figure in built.figures}
    assert {"figure_2", "figure_3", "figure_4", "measured_front"} < names
