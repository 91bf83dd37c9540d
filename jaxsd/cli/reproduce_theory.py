"""A Theoretical Perspective for Speculative Decoding, arXiv 2411.00841: theorems and figures."""

import math

import numpy as np

from . import theory_figures, theory_results
from .reproduction import Comparison, Reproduction, Table
from .theory_measured import DELTA, FACTOR, FULL, NUM_DRAFT_TOKENS, THRESHOLD, Point, Settings
from .theory_results import EPSILONS, GAMMAS, LENGTH, MAX_DRAFTS, PAPER_REJECTIONS, Results

PAPER = "A Theoretical Perspective for Speculative Decoding Algorithm, arXiv 2411.00841v1"
PAPER_ACCELERATION = "3.05"
NUM_RUNS, NUM_CHAINS = 20_000, 1000
# Of a normal distribution: 95 % of random chains, and a simulation that is wrong by chance once in
# 1.7 million times.
Z_95, Z_SURE = 1.959964, 5.0


def build(
    num_runs: int = NUM_RUNS, num_chains: int = NUM_CHAINS, settings: Settings = FULL
) -> Reproduction:
    """Every theorem and figure, by formula and by what was generated.

    Args:
      num_runs: texts generated from a Markov chain.
      num_chains: random chains.
      settings: of what the embedded pair decodes.
    """
    results = theory_results.compute(num_runs, num_chains, settings)
    tables = [
        _theorem_1(results),
        _theorem_2(results),
        _theorem_3(results),
        _more_drafts(results),
        _closed_forms(),
        _front(results),
        _texts(results),
        _measured(results),
    ]
    return Reproduction(PAPER, tables, theory_figures.figures(results), _remarks(results))


def _theorem_1(results: Results) -> Table:
    found = results.rejections
    paper = float(PAPER_REJECTIONS)
    uniform = found.by_law["uniform numbers"]
    below = 100 * (uniform < paper).mean()
    acceleration = LENGTH / uniform
    rows = [
        Comparison(
            "rejections, mean of random chains",
            uniform.mean(),
            paper,
            Z_95 * uniform.std() / paper,
            f"Fig. 2a's chain is not known: {below:.0f} % of such chains have fewer; judged by "
            f"1.96 standard deviations of a chain, {uniform.std():.2f} each",
        )
    ]
    for name, totals in list(found.by_law.items())[1:]:
        away = (totals.mean() - paper) / totals.std()
        note = f"not judged: {away:.0f} standard deviations from the paper's"
        rows.append(Comparison(f"the same if rows were {name}", totals.mean(), paper, note=note))
    rows += [
        Comparison("T / E of the paper's own E", LENGTH / paper, PAPER_ACCELERATION),
        Comparison(
            "T / E, mean of random chains",
            acceleration.mean(),
            float(PAPER_ACCELERATION),
            Z_95 * acceleration.std() / float(PAPER_ACCELERATION),
            "judged as the first row",
        ),
        *_simulated(results, 1),
    ]
    unlimited, four, bonus = (found.calls[key] for key in ((None, False), (4, False), (4, True)))
    rows += [
        Comparison(
            "the simulated chain: target passes, drafting to the end", float(unlimited.calls)
        ),
        Comparison("the simulated chain: tokens per pass", float(unlimited.tokens_per_call)),
        Comparison("  passes with 4 drafted tokens a round", float(four.calls)),
        Comparison("  rejections with 4 drafted tokens a round", float(four.rejections)),
        Comparison("  passes with 4 and the bonus token", float(bonus.calls)),
        Comparison("  rejections with 4 and the bonus token", float(bonus.rejections)),
    ]
    return Table(
        "Theorem 1 and figure 2a: rejections in 50 tokens of a chain of 7 states",
        rows,
        "The simulated chain is the random one whose rejections are nearest to the paper's. Its "
        "rows are ours: what it is compared with is the formula, not a figure of the paper.",
    )


def _simulated(results: Results, num_drafts: int) -> list[Comparison]:
    """Texts against the formula: their rejections, and the law of their first two tokens."""
    found = results.rejections.simulations[num_drafts]
    error = found.standard_error
    first, kernels = map(np.asarray, results.rejections.chain[1])
    law = first[:, None] * kernels[0]
    counts = np.zeros_like(law)
    np.add.at(counts, tuple(found.tokens[:, :2].T), 1)
    expected = law * counts.sum()
    chi_square = float((np.square(counts - expected) / expected).sum())
    freedom = law.size - 1
    name = "one draft" if num_drafts == 1 else f"M = {num_drafts}"
    return [
        Comparison(f"{name}: the formula, on the simulated chain", found.expected),
        Comparison(
            f"{name}: mean of generated texts",
            found.rejections.mean(),
            found.expected,
            Z_SURE * error / found.expected,
            f"ours, beside the formula: {len(found.rejections)} texts, standard error {error:.3f}; "
            f"judged by {Z_SURE:g} of these",
        ),
        Comparison(
            f"{name}: chi-square of two tokens against the target",
            chi_square,
            float(freedom),
            Z_SURE * math.sqrt(2 / freedom),
            f"ours, beside the degrees of freedom; judged by {Z_SURE:g} standard deviations",
        ),
    ]


def _theorem_2(results: Results) -> Table:
    found = results.bound
    rows = []
    for name, rules in found.per_token.items():
        bound = rules["token"][0]
        rows.append(
            Comparison(
                f"{name}: the token rule over TV",
                _farthest(rules["token"] / _variation(name)),
                1.0,
                1e-12,
                f"the bound is attained: {bound:.3f} for every number of drafted tokens",
            )
        )
        for gamma, rate in zip(GAMMAS, rules["block"], strict=True):
            note = "" if gamma == 1 else f"{100 * (1 - rate / bound):.0f} % below the bound"
            rows.append(Comparison(f"  block verification, {gamma} a round", rate, note=note))
    rows += [
        Comparison(
            "random unbiased token rules: fewest rejections over TV",
            found.members.min(),
            note=f"{found.members.size} rules, of bias {found.member_bias:.0e} at most",
        ),
        Comparison("their median", float(np.median(found.members))),
    ]
    return Table(
        "Theorem 2: no unbiased rule of its class has fewer rejections than TV per token",
        rows,
        "Rejections per token, memoryless pairs, draft for target, without the bonus token. Block "
        "verification is unbiased with one draft, too, but lets later tokens decide on a token: "
        "it is outside the class, and below its bound without a contradiction.",
    )


def _theorem_3(results: Results) -> Table:
    found = results.rejections
    rows = []
    for m, totals in found.by_batch.items():
        rows += _simulated(results, m)
        rows.append(
            Comparison(
                f"M = {m}: the formula, mean of random chains",
                totals.mean(),
                note=f"standard deviation {totals.std():.2f}",
            )
        )
    rows += [
        Comparison(f"three tokens, T = 5, M = {m}", value) for m, value in found.vector.items()
    ]
    return Table(
        "Theorem 3 and figure 2b: M drafts where a batch begins",
        rows,
        "Figure 2b's values are not known, so nothing here is judged by them. Three tokens: draft "
        "(0.5, 0.3, 0.2), target (0.2, 0.3, 0.5) at every position.",
    )


def _more_drafts(results: Results) -> Table:
    found = results.rejections
    rows = []
    for length, curve in found.curves.items():
        limit = found.limits[length]
        rows += [
            Comparison(f"T = {length}, M = {m}", curve[m - 1]) for m in (1, 2, 4, 8, 16, MAX_DRAFTS)
        ]
        rows.append(
            Comparison(
                f"T = {length}, the limit",
                limit,
                note=f"{100 * limit / curve[0]:.0f} % of the rejections of one draft",
            )
        )
    return Table(
        "Proposition 1 and figure 2c: more drafts do not end rejections",
        rows,
        "Ours: the paper's values are not known. Only the first position of a batch profits.",
    )


def _closed_forms() -> Table:
    """The closed forms against the residuals that they sum up."""
    from jaxsd import costmodel
    from jaxsd.costmodel._inputs import float64_on_host

    from .theory_figures import DRAFT_PROBS, DRAFTS, GAP, RATIOS

    def saved(draft: list[float], target: list[float], m: int) -> float:
        laws = np.array(draft), np.array(target)
        failed = costmodel.residual_sequence(*laws, m).all_rejected
        return float(failed[1] - failed[m])

    pairs = []
    with float64_on_host():
        for m in DRAFTS:
            pairs += [
                (
                    float(costmodel.bernoulli_batch_improvement(u, u + GAP, m)),
                    saved([u, 1 - u], [u + GAP, 1 - u - GAP], m),
                )
                for u in DRAFT_PROBS[:3]
            ]
            for ratio in RATIOS:
                size = round(20 / ratio)
                pairs.append(
                    (
                        float(costmodel.uniform_batch_improvement(20, size, m)),
                        saved([1 / 20] * 20, [1 / size] * size + [0.0] * (20 - size), m),
                    )
                )
    closed, stepwise = np.array(pairs).T
    # (1 - x) - (1 - x)^M, x = V' / V, is largest where M (1 - x)^(M - 1) = 1.
    best = {m: 1 / (1 - m ** (-1 / (m - 1))) for m in DRAFTS}
    return Table(
        "Figure 3: what a batch saves where it begins, in closed form",
        [
            Comparison(
                "closed form over the residuals, farthest from 1",
                _farthest(closed / stepwise),
                1.0,
                1e-10,
                f"ours: {len(pairs)} cases of two tokens and of uniform laws",
            ),
            *(
                Comparison(f"uniform: V / V' at which {m} drafts save most", ratio)
                for m, ratio in best.items()
            ),
        ],
        "The figure's parameters are not known.",
    )


def _front(results: Results) -> Table:
    found = results.tradeoff
    rejection, optimal, resampling = (np.asarray(part) for part in found.front)
    rows = [
        Comparison(
            "theorem 5: (rejection + bias) / TV, farthest from 1",
            _farthest(found.sums),
            1.0,
            1e-12,
            f"{found.sums.size} random pairs and acceptances, the lossless rule's or more",
        ),
        Comparison(
            "the same for acceptances of any kind, least",
            found.any_sums.min(),
            note="never below 1",
        ),
        Comparison(
            "the same for any acceptance and residual, least",
            found.points.sum(0).min() / rejection[0],
            note=f"{found.points.shape[1]} random rules on the pair of figure 4",
        ),
        Comparison(
            "bias of UNO less that of OPT, least over pairs and thresholds",
            found.excess.min(),
            note="never below 0 but for rounding",
        ),
        Comparison(
            "bias of UNO at threshold 0, mean of the pairs",
            found.excess[:, 0].mean(),
            note="OPT has none",
        ),
    ]
    for epsilon in (0.0, 0.05, 0.1, 0.2):
        i = int(np.abs(EPSILONS - epsilon).argmin())
        text = f"figure 4's kind of sweep, threshold {epsilon:g}: "
        rows += [
            Comparison(text + "rejection", rejection[i]),
            Comparison(text + "bias of OPT", optimal[i]),
            Comparison(text + "bias of UNO", resampling[i]),
        ]
    return Table(
        "Theorems 4 and 5, figure 4: bias against rejections, for one token",
        rows,
        "The paper's example is not known; the pair here is random, of 7 tokens. OPT replaces a "
        "rejected token from the optimal law, UNO from the target's.",
    )


def _texts(results: Results) -> Table:
    found = results.tradeoff
    text, middle = found.text, int(np.abs(EPSILONS - 0.05).argmin())
    straight = text.loss[-1] * (1 - text.rejection / text.rejection[0])
    some = found.short.loss > 1e-9
    shares = found.short_bias[some] / found.short.loss[some]
    return Table(
        "Theorem 5 over whole texts",
        [
            Comparison(
                "(rejections + biases) / TV, summed over the text, farthest from 1",
                _farthest(found.identity),
                1.0,
                1e-12,
                f"{len(EPSILONS)} thresholds, contexts as the biased decoder writes them",
            ),
            Comparison("rejections at threshold 0.05", text.rejection[middle]),
            Comparison("biases of its tokens, summed, OPT", text.loss[middle]),
            Comparison("the same, UNO", text.loss_resampling[middle]),
            Comparison(
                "farthest from the straight line, of the largest bias",
                float(np.abs(text.loss - straight).max() / text.loss[-1]),
            ),
            Comparison(
                "bias of a whole text over the sum of its tokens', least",
                float(shares.min()),
                note="6 tokens, 3 states, every text gone through",
            ),
            Comparison("the same, most", float(shares.max()), note="the sum is a bound"),
        ],
        "Ours: the paper's theorem is about one token. The chain is that of figure 2a.",
    )


def _measured(results: Results) -> Table:
    found = results.measured
    rows = []
    for temperature in found.settings.temperatures:
        points = [point for point in found.points if point.temperature == temperature]
        rows += [_point(point) for point in points]
        together = [point for point in points if point.is_on_the_line]
        sums = np.array([(p.rejections, p.loss, p.variation, p.variance) for p in together]).sum(0)
        rows.append(
            Comparison(
                f"temperature {temperature:g}, all on the line together",
                (sums[0] + sums[1]) / sums[2],
                1.0,
                Z_SURE * math.sqrt(sums[3]) / sums[2],
                f"ours: {sum(point.num_places for point in together)} judged places, standard "
                f"error {math.sqrt(sums[3]) / sums[2]:.4f}",
            )
        )
    # The lossless rule has no loss but for rounding.
    biased = [point for point in found.points if point.expected_loss > 1e-4 * point.variation]
    rows += [
        Comparison(
            "losses that the decoder reports over those of the laws, farthest from 1",
            _farthest(np.array([point.loss / point.expected_loss for point in biased])),
            1.0,
            1e-5,
            "ours: both models read the finished texts; float32",
        ),
        Comparison(
            "(chances of a rejection + losses) / TV on the line, farthest from 1",
            _farthest(np.array([p.expected_total for p in found.points if p.is_on_the_line])),
            1.0,
            1e-5,
            "ours: the same places without the noise of counting",
        ),
    ]
    settings = found.settings
    texts = settings.num_prompts * settings.copies
    return Table(
        "Theorem 5 measured: (rejections + losses) / TV of the embedded pair",
        rows,
        "Ours: the paper has no such measurement. Rejections are counted, losses are those that "
        "the decoder reports, total variation is between the laws of both models at the places "
        f"that were judged. Target of {found.target_params} parameters, draft of "
        f"{found.draft_params}, float32; {NUM_DRAFT_TOKENS} drafted tokens a round; for every "
        f"rule and temperature {texts} texts of {settings.num_rounds} rounds, from "
        f"{settings.num_prompts} prompts that neither model was trained on. Rules on the line "
        f"replace a rejected token from the optimal law. Lenience has the factor {FACTOR:g}; "
        f"typical acceptance the threshold {THRESHOLD:g} and delta {DELTA:g}, and keeps other "
        f"tokens with the lossless chance. Judged by {Z_SURE:g} standard errors of the count.",
    )


def _point(point: Point) -> Comparison:
    """A rule at a temperature beside theory."""
    per_place = np.array([point.rejections, point.loss]) / point.num_places
    note = (
        f"ours: {per_place[0]:.3f} rejections, loss {per_place[1]:.3f} a place; "
        f"{point.tokens_per_pass:.2f} tokens a pass"
    )
    # Off the line theory has a number of its own for the places that were judged.
    wanted = 1.0 if point.is_on_the_line else point.expected_total
    ways = {"optimal": "optimal residual, ", "target": "target's law, "}
    return Comparison(
        f"temperature {point.temperature:g}, {ways.get(point.kind, '')}{point.name}",
        point.total,
        wanted,
        Z_SURE * point.standard_error / point.variation / wanted,
        note,
    )


def _remarks(results: Results) -> list[str]:
    """What cannot be as printed, what is not known, what was not computed; with our numbers."""
    found = results.rejections
    unlimited = found.calls[None, False]
    uniform, *others = found.by_law.values()
    paper = float(PAPER_REJECTIONS)
    away = min(abs(totals.mean() - paper) / totals.std() for totals in others)
    name, rules = next(iter(results.bound.per_token.items()))
    heat = results.measured.settings.temperatures[0]
    lossless, *_, lossy = (
        point
        for point in results.measured.points
        if (point.kind, point.temperature) == ("optimal", heat)
    )
    return [
        "Acceleration is T over the expected rejections, and T where nothing is rejected, which "
        "the formula does not give. It takes rejections for passes and leaves the first pass out: "
        f"the simulated chain, of {found.simulations[1].expected:.2f} rejections, takes "
        f"{unlimited.calls:.2f} passes, {unlimited.tokens_per_call:.2f} tokens each and not "
        f"{LENGTH / found.simulations[1].expected:.2f}.",
        "Theorem 2 is about rules that decide on a token from the past alone, with one fresh draft "
        "for every position. Block verification does not, and is unbiased with one draft as well: "
        f"{rules['block'][-1]:.3f} rejections per token instead of {rules['token'][-1]:.3f} for "
        f"{name} with {GAMMAS[-1]} drafted tokens.",
        "Not known here: the rows and seeds of the chains of figure 2, the values of its last two "
        "panels, the parameters of figure 3, the pair of figure 4. Rows of uniform numbers "
        f"over their sum give {uniform.mean():.2f} rejections, give or take {uniform.std():.2f}, "
        f"where the paper has {PAPER_REJECTIONS}; the other two laws are {away:.0f} standard "
        "deviations off.",
        "The batch algorithm and theorem 3 are computed as we understand them, not from the "
        "printed listing; that they fit together, and that the texts are unbiased, is simulated.",
        "Theorem 5 is about one token after a given text. Rules that write other texts meet other "
        f"total variations: at temperature {lossless.temperature:g} the embedded pair's is "
        f"{_each(lossless):.3f} a judged place with the lossless rule and {_each(lossy):.3f} at "
        f"threshold {lossy.epsilon:g}. So every measured point has a line of its own.",
        "Not computed: table 1, the share of answers that judges prefer (OPT over UNO, drafts by "
        "pythia-70m for pythia-2.8b, thresholds 0.1 to 0.8). It takes both models, 500 pairs of "
        "answers to each of 200 prompts and two judges, one of them GPT-4; there is no code of it. "
        "Of the bias per token the answer is known for all pairs of laws: with the same rejections "
        "that of OPT is never above that of UNO.",
    ]


def _farthest(ratios: np.ndarray) -> float:
    """The ratio that is farthest from 1."""
    return float(ratios[np.abs(ratios - 1).argmax()])


def _each(point: Point) -> float:
    """Total variation of a judged place."""
    return point.variation / point.num_places


def _variation(name: str) -> float:
    """Total variation of one of the pairs, by its definition."""
    draft, target = map(np.array, theory_results.PAIRS[name])
    return float(np.maximum(target - draft, 0).sum())
