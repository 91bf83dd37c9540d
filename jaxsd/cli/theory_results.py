"""What the reproduction of the theory computes before it compares or draws anything."""

import functools
import math
from typing import Any, Literal, NamedTuple

import numpy as np
import rich.console
import rich.progress

from . import theory_measured

# Figure 2: tokens of a text, states of the chain, drafts of a batch; the length of its third panel.
LENGTH, NUM_STATES, BATCHES, LONG_LENGTH = 50, 7, (4, 5), 100
PAPER_REJECTIONS = "16.41"
MAX_DRAFTS = 1000
GAMMAS = (1, 2, 4, 8, 16)
# Laws of draft and target, the same at every position, for what passes below the bound.
PAIRS = {
    "(1/2, 1/2) for (4/5, 1/5)": np.array([[0.5, 0.5], [0.8, 0.2]]),
    "(2/3, 1/3) for (1/3, 2/3)": np.array([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]),
}
# The same, of three tokens, over five positions.
VECTOR_PAIR, VECTOR_LENGTH = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]), 5
# Texts so short that all of them can be gone through.
SHORT_LENGTH, SHORT_STATES = 6, 3
EPSILONS = np.linspace(0, 0.4, 161)


class Simulation(NamedTuple):
    """Texts that were generated, and what the formula says of their rejections."""

    expected: float
    rejections: np.ndarray  # [num_runs]
    tokens: np.ndarray  # [num_runs, T]

    @property
    def standard_error(self) -> float:
        """Of the mean number of rejections."""
        return float(self.rejections.std(ddof=1) / math.sqrt(self.rejections.size))


class Rejections(NamedTuple):
    """Theorems 1 and 3, and figure 2."""

    by_law: dict[str, np.ndarray]  # law of the rows -> rejections in many random chains
    by_batch: dict[int, np.ndarray]  # drafts -> rejections of the batch algorithm in such chains
    chain: tuple[Any, Any]  # of draft and target: the one that is simulated
    simulations: dict[int, Simulation]  # drafts -> texts of that chain
    calls: dict[tuple[int | None, bool], Any]  # look-ahead, bonus -> costmodel.ExpectedCalls
    curves: dict[int, np.ndarray]  # T -> rejections with 1, 2, ..., MAX_DRAFTS drafts
    limits: dict[int, float]  # T -> rejections with drafts without end
    vector: dict[float, float]  # drafts -> rejections of `VECTOR_PAIR`


class Bound(NamedTuple):
    """Theorem 2."""

    per_token: dict[str, dict[str, np.ndarray]]  # pair -> rule -> rejections per token by GAMMAS
    members: np.ndarray  # rejections over TV of random unbiased rules that decide token by token
    member_bias: float  # the largest total variation between what they emit and the target


class Front(NamedTuple):
    """Rejections and bias over `EPSILONS`, for the two ways to replace a token."""

    rejection: np.ndarray
    loss: np.ndarray
    rejection_resampling: np.ndarray
    loss_resampling: np.ndarray


class Tradeoff(NamedTuple):
    """Theorems 4 and 5, and figure 4."""

    pair: tuple[np.ndarray, np.ndarray]  # laws of draft and target: the example
    front: Any  # costmodel.BiasSpeedFront of it over EPSILONS
    points: np.ndarray  # [2, n] rejection and bias of random rules on it
    sums: np.ndarray  # (rejection + loss) / TV: random pairs, acceptances of the lossless or more
    any_sums: np.ndarray  # the same for acceptances of any kind
    excess: np.ndarray  # [pairs, EPSILONS] loss by resampling from the target less the optimal
    text: Front  # of texts of the chain that is simulated
    identity: np.ndarray  # (rejections + losses) / total variations of these
    short: Front  # of texts of a short chain
    short_bias: np.ndarray  # [EPSILONS] exact total variation between the laws of those texts


class Results(NamedTuple):
    """What tables and figures are made of."""

    rejections: Rejections
    bound: Bound
    tradeoff: Tradeoff
    measured: theory_measured.Measured


@functools.cache
def compute(
    num_runs: int, num_chains: int, settings: theory_measured.Settings = theory_measured.FULL
) -> Results:
    """Formulas, and what they are held against.

    That is so many simulated texts and random chains, and texts of the embedded pair.
    """
    from jaxsd.costmodel._inputs import float64_on_host

    progress = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
        console=rich.console.Console(stderr=True),
        transient=True,
    )
    with progress:
        total = 3 + theory_measured.num_steps(settings)
        task = progress.add_task("drawing chains and texts", total=total)
        with float64_on_host():
            rejections = _rejections(num_runs, num_chains)
            progress.update(task, advance=1, description="verifying blocks")
            bound = _bound()
            progress.update(task, advance=1, description="following the front")
            tradeoff = _tradeoff(*rejections.chain)
        progress.update(task, advance=1, description="loading the embedded pair")
        measured = theory_measured.measure(
            settings, lambda text: progress.update(task, advance=1, description=text)
        )
    return Results(rejections, bound, tradeoff, measured)


def _rejections(num_runs: int, num_chains: int) -> Rejections:
    import jax

    from jaxsd import costmodel

    draws = {
        "uniform numbers": np.random.Generator.random,
        "exponential numbers": np.random.Generator.standard_exponential,
        "exponentials of normal numbers": lambda rng, shape: np.exp(rng.standard_normal(shape)),
    }
    # Compiled once for all laws.
    count = jax.jit(jax.vmap(lambda p, q: costmodel.expected_rejections(p, q).total))
    by_law = {name: np.asarray(count(*_chains(draw, num_chains))) for name, draw in draws.items()}
    drafts, targets = _chains(draws["uniform numbers"], num_chains)
    batch = jax.vmap(
        lambda p, q: [costmodel.expected_batch_rejections(p, q, m).total for m in BATCHES]
    )
    by_batch = dict(zip(BATCHES, map(np.asarray, jax.jit(batch)(drafts, targets)), strict=True))
    nearest = np.abs(by_law["uniform numbers"] - float(PAPER_REJECTIONS)).argmin()
    draft, target = (
        costmodel.Chain(*(field[nearest] for field in chains)) for chains in (drafts, targets)
    )
    keys = jax.random.split(jax.random.key(0))
    longer = [costmodel.random_chain(key, LONG_LENGTH, NUM_STATES) for key in keys]
    texts = {LENGTH: (draft, target), LONG_LENGTH: (longer[0], longer[1])}
    unbounded = {
        length: costmodel.expected_batch_rejections(p, q, math.inf)
        for length, (p, q) in texts.items()
    }
    vector = [costmodel.memoryless_chain(law, VECTOR_LENGTH) for law in VECTOR_PAIR]
    return Rejections(
        by_law=by_law,
        by_batch=by_batch,
        chain=(draft, target),
        simulations=_simulations(draft, target, num_runs),
        calls={
            key: costmodel.expected_calls(draft, target, *key)
            for key in ((None, False), (4, False), (4, True))
        },
        curves={
            length: np.asarray(costmodel.batch_rejection_curve(p, q, MAX_DRAFTS))
            for length, (p, q) in texts.items()
        },
        limits={length: float(answer.total) for length, answer in unbounded.items()},
        vector={
            m: float(costmodel.expected_batch_rejections(vector[0], vector[1], m).total)
            for m in (1, 2, 3, MAX_DRAFTS)
        },
    )


def _chains(draw: Any, count: int) -> tuple[Any, Any]:
    """Chains of draft and target, so many of each: numbers by `draw`, every row over its sum."""
    from jaxsd import costmodel

    rng = np.random.default_rng(0)
    shapes = (count, NUM_STATES), (count, LENGTH - 1, NUM_STATES, NUM_STATES)
    draft, target = (
        costmodel.Chain(*(x / x.sum(-1, keepdims=True) for x in (draw(rng, s) for s in shapes)))
        for _ in range(2)
    )
    return draft, target


def _simulations(draft: Any, target: Any, num_runs: int) -> dict[int, Simulation]:
    """Texts by speculative sampling, which is one draft, and by the batch algorithm."""
    import jax

    from jaxsd import costmodel

    keys = jax.random.split(jax.random.key(1), 1 + len(BATCHES))
    one = costmodel.expected_rejections(draft, target).total
    found = {1: (one, costmodel.simulate_rejections(keys[0], draft, target, num_runs))}
    for key, m in zip(keys[1:], BATCHES, strict=True):
        found[m] = (
            costmodel.expected_batch_rejections(draft, target, m).total,
            costmodel.simulate_batch_rejections(key, draft, target, num_runs, m),
        )
    return {
        m: Simulation(float(expected), np.asarray(texts.rejections), np.asarray(texts.tokens))
        for m, (expected, texts) in found.items()
    }


def _bound() -> Bound:
    from jaxsd import costmodel

    per_token = {}
    for name, laws in PAIRS.items():
        chains = {
            gamma: [costmodel.memoryless_chain(law, gamma) for law in laws] for gamma in GAMMAS
        }
        rules: tuple[Literal["token", "block"], ...] = ("token", "block")
        per_token[name] = {
            rule: np.array(
                [
                    costmodel.rejections_per_token(costmodel.round_acceptance(p, q, rule))
                    for p, q in chains.values()
                ]
            )
            for rule in rules
        }
    # Unbiased: nothing is accepted beyond the lossless rule, and the residual makes up for it.
    rng, draft, target = _random_pairs(2, 2000, NUM_STATES)
    acceptance = rng.random(draft.shape) ** rng.exponential(size=(2000, 1)) * np.asarray(
        costmodel.over_acceptance(draft, target, 0.0)
    )
    emitted = costmodel.emitted_law(
        acceptance, draft, costmodel.optimal_residual(acceptance, draft, target)
    )
    least = np.asarray(costmodel.total_variation(draft, target))
    return Bound(
        per_token=per_token,
        members=np.asarray(costmodel.rejection_probability(acceptance, draft)) / least,
        member_bias=float(np.max(costmodel.total_variation(emitted, target))),
    )


def _tradeoff(draft_chain: Any, target_chain: Any) -> Tradeoff:
    import jax

    from jaxsd import costmodel

    rng, draft, target = _random_pairs(3, 1000, NUM_STATES)
    variation = np.asarray(costmodel.total_variation(draft, target))
    lossless = np.asarray(costmodel.over_acceptance(draft, target, 0.0))
    sums = []
    for acceptance in (
        lossless + rng.random(draft.shape) * (1 - lossless),
        rng.random(draft.shape),
    ):
        rejection = costmodel.rejection_probability(acceptance, draft)
        loss = costmodel.residual_loss(acceptance, draft, target)
        sums.append(np.asarray(rejection + loss) / variation)
    fronts = costmodel.bias_speed_front(draft, target, EPSILONS)
    pair = draft[0], target[0]
    # Every second rule is near the best ones: it accepts no less than is lossless, and the residual
    # is partly the optimal one.
    share = rng.random((1500, 1)) * (np.arange(1500) % 2)[:, None]
    acceptance = rng.random((1500, NUM_STATES)) ** rng.exponential(size=(1500, 1))
    acceptance = np.where(share > 0, lossless[0] + acceptance * (1 - lossless[0]), acceptance)
    residual = share * np.asarray(costmodel.optimal_residual(acceptance, *pair))
    residual = residual + (1 - share) * rng.dirichlet(np.ones(NUM_STATES), 1500)
    emitted = costmodel.emitted_law(acceptance, pair[0], residual)
    points = (
        costmodel.rejection_probability(acceptance, pair[0]),
        costmodel.total_variation(emitted, pair[1]),
    )
    keys = jax.random.split(jax.random.key(4))
    short = tuple(costmodel.random_chain(key, SHORT_LENGTH, SHORT_STATES) for key in keys)
    text, identity = _front_of_texts(draft_chain, target_chain)
    return Tradeoff(
        pair=pair,
        front=costmodel.bias_speed_front(*pair, EPSILONS),
        points=np.array(points),
        sums=sums[0],
        any_sums=sums[1],
        excess=np.asarray(fronts.loss_target_resampling - fronts.loss_optimal),
        text=text,
        identity=identity,
        short=_front_of_texts(*short)[0],
        short_bias=_bias_of_texts(*short),
    )


def _random_pairs(seed: int, count: int, size: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """A generator, and laws of draft and target: exponential numbers, divided by their sum."""
    rng = np.random.default_rng(seed)
    draft, target = rng.dirichlet(np.ones(size), (2, count))
    return rng, draft, target


def _front_of_texts(draft: Any, target: Any) -> tuple[Front, np.ndarray]:
    """Rejections and bias summed over a text, for every epsilon; both sides of the identity."""
    import jax

    from jaxsd import costmodel

    def at(epsilon: Any) -> Any:
        acceptance = jax.tree.map(
            lambda p, q: costmodel.over_acceptance(p, q, epsilon), draft, target
        )
        return [
            jax.tree.map(lambda x: x.sum(), costmodel.sequence_tradeoff(*given))
            for given in ((acceptance, draft, target), (acceptance, draft, target, target))
        ]

    optimal, resampling = jax.jit(jax.vmap(at))(EPSILONS)
    sides = (optimal.rejection + optimal.loss) / optimal.total_variation
    parts = optimal.rejection, optimal.loss, resampling.rejection, resampling.loss
    return Front(*map(np.asarray, parts)), np.asarray(sides)


def _bias_of_texts(draft: Any, target: Any) -> np.ndarray:
    """Total variation between the emitted law of all texts and the target's, for every epsilon."""
    import jax

    from jaxsd import costmodel

    def joint(first: Any, kernels: Any) -> Any:
        law = first  # [texts so far]
        for kernel in kernels:
            law = (law.reshape(-1, SHORT_STATES)[:, :, None] * kernel[None]).ravel()
        return law

    def at(epsilon: Any) -> Any:
        def emit(p: Any, q: Any) -> Any:
            acceptance = costmodel.over_acceptance(p, q, epsilon)
            residual = costmodel.optimal_residual(acceptance, p, q)
            return costmodel.emitted_law(acceptance, p, residual)

        emitted = jax.tree.map(emit, draft, target)
        return costmodel.total_variation(joint(*emitted), joint(*target))

    return np.asarray(jax.jit(jax.vmap(at))(EPSILONS))
