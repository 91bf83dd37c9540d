"""The front of bias against rejections, measured: the embedded pair decodes with lossy rules.

Every rule decodes the same prompts for the same number of rounds, far from any limit, so that no
place which was judged is hidden. Then both models read the finished texts, and the cost model says,
from its own definitions, what chance of a rejection and what loss every judged place had. What was
counted and what the decoder reports is held against that.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

NUM_DRAFT_TOKENS = 4
FACTOR, THRESHOLD, DELTA = 0.3, 0.1, 0.5
# Of the curves of the theory.
FINE_EPSILONS = np.concatenate([[0.0], np.geomspace(1e-3, 1.0, 28)])


class Settings(NamedTuple):
    """How much is decoded."""

    epsilons: tuple[float, ...] = (0.0, 0.005, 0.03, 0.2)  # with the optimal residual
    naive_epsilons: tuple[float, ...] = (0.0, 0.005, 0.03)  # rejected tokens drawn from the target
    has_others: bool = True  # lenience and typical acceptance
    temperatures: tuple[float, ...] = (1.0, 0.7)
    num_prompts: int = 8
    copies: int = 2  # of every prompt at every temperature, each with a key of its own
    num_rounds: int = 24


FULL = Settings()


class Rule(NamedTuple):
    """A lossy verifier, and what theory says of it."""

    name: str
    kind: str  # optimal or target, which is the residual of over-acceptance; lenience, typical
    epsilon: float  # nan if it has none
    verifier: Any
    acceptance: Callable[[Any, Any], Any]  # of the laws of draft and target


class Point(NamedTuple):
    """A rule at a temperature: sums over all places that it judged."""

    name: str
    kind: str
    epsilon: float
    temperature: float
    num_places: int
    rejections: int  # counted
    expected_rejections: float  # sum of the chances, each given the text before its place
    variance: float  # sum of chance times one less the chance
    loss: float  # as the decoder reports it
    expected_loss: float  # from the laws of both models at the places
    variation: float  # sum of total variations between these laws
    num_tokens: int  # that were decoded
    num_passes: int  # of the target

    @property
    def is_on_the_line(self) -> bool:
        """Whether theory wants rejections and loss to add up to the total variation."""
        return self.kind != "target"

    @property
    def total(self) -> float:
        """Rejections that were counted and losses that were reported, over total variation."""
        return (self.rejections + self.loss) / self.variation

    @property
    def expected_total(self) -> float:
        """The same of the chances of a rejection, and of the losses that the laws give."""
        return (self.expected_rejections + self.expected_loss) / self.variation

    @property
    def standard_error(self) -> float:
        """Of `rejections`: what they are beyond their chances is a martingale."""
        return float(np.sqrt(self.variance))

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass of the target yields."""
        return self.num_tokens / self.num_passes


class Curve(NamedTuple):
    """The theory's means over the places that the lossless rule judged, by `FINE_EPSILONS`."""

    rejection: np.ndarray
    loss_optimal: np.ndarray
    loss_target: np.ndarray


class Measured(NamedTuple):
    """What was decoded, and what theory says of it."""

    points: list[Point]
    curves: dict[float, Curve]  # temperature -> theory
    target_params: int
    draft_params: int
    settings: Settings


def num_steps(settings: Settings) -> int:
    """How often `measure` calls `step`."""
    return 1 + len(_rules(settings))


def measure(settings: Settings, step: Callable[[str], None]) -> Measured:
    """Decodes with every rule and reads what it wrote; `step` is told what was done."""
    import jax

    import jaxsd
    from jaxsd import models

    from . import measure as measure_lib
    from . import pair

    # On accelerators products are else rounded to fewer bits than the comparison allows for.
    with jax.default_matmul_precision("highest"):
        target, draft = pair.load_pair(None, None)
        params = {"target": target.params, "draft": draft.params}
        texts = pair.load_prompts(None)[: settings.num_prompts]
        requests = measure_lib.pad_prompts([target.tokenizer.encode(text.text) for text in texts])
        copies = len(settings.temperatures) * settings.copies
        prompts = np.tile(np.concatenate([request.tokens for request in requests]), (copies, 1))
        lengths = np.tile(np.array([request.length for request in requests], np.int32), copies)
        temperatures = np.repeat(
            np.array(settings.temperatures, np.float32), settings.copies * len(requests)
        )
        rules = _rules(settings)
        max_len = prompts.shape[1] + settings.num_rounds * (NUM_DRAFT_TOKENS + 1)
        target_model = models.language_model(target.config)
        drafter = jaxsd.model_drafter(models.language_model(draft.config), NUM_DRAFT_TOKENS)
        make = functools.partial(jaxsd.speculative, target_model, drafter, max_len=max_len)
        first = int(lengths.min())
        decode = _make_decode(make, rules, settings.num_rounds)
        read = _make_read(target.config, draft.config, first)
        judge, fronts = _make_judge(rules), _make_fronts()
        # A prefilled state does not depend on the verifier.
        state = make().start(
            params,
            prompts,
            lengths,
            jax.random.key(0),
            sampling=jaxsd.Sampling(temperatures),
        )
        step("decoding with the embedded pair")

        points, curves = [], {}
        for index, rule in enumerate(rules):
            which = np.int32(index)
            final, before, accepted = decode(params, state, which)
            laws = read(params, final.tokens, temperatures)
            rejection, loss, variation = map(np.asarray, judge(*laws, which))
            is_judged, num_rejected = _judged(
                np.asarray(before), np.asarray(accepted), first, rejection.shape
            )
            new = np.asarray(final.lengths) - lengths
            reported = np.asarray(final.stats.loss, np.float64)
            for temperature in settings.temperatures:
                rows = temperatures == np.float32(temperature)
                places = is_judged & rows[:, None]
                chance = rejection[places].astype(np.float64)
                points.append(
                    Point(
                        rule.name,
                        rule.kind,
                        rule.epsilon,
                        temperature,
                        num_places=int(places.sum()),
                        rejections=int(num_rejected[rows].sum()),
                        expected_rejections=float(chance.sum()),
                        variance=float((chance * (1 - chance)).sum()),
                        loss=float(reported[rows].sum()),
                        expected_loss=float(loss[places].sum(dtype=np.float64)),
                        variation=float(variation[places].sum(dtype=np.float64)),
                        num_tokens=int(new[rows].sum()),
                        num_passes=int(rows.sum()) * settings.num_rounds,
                    )
                )
            if index == 0:  # epsilon is 0, and the residual the optimal one: lossless
                found = list(map(np.asarray, fronts(*laws)))
                for temperature in settings.temperatures:
                    places = is_judged & (temperatures == np.float32(temperature))[:, None]
                    curves[temperature] = Curve(
                        *(part[places].mean(0, dtype=np.float64) for part in found)
                    )
            step("decoding with the embedded pair")
    return Measured(
        points=points,
        curves=curves,
        target_params=models.num_parameters(target.config),
        draft_params=models.num_parameters(draft.config),
        settings=settings,
    )


def _rules(settings: Settings) -> list[Rule]:
    """The lossless rule first."""
    import jax.numpy as jnp

    from jaxsd import costmodel, lossy

    def over(epsilon: float) -> Callable[[Any, Any], Any]:
        return lambda draft, target: costmodel.over_acceptance(draft, target, epsilon)

    def lenient(draft: Any, target: Any) -> Any:
        return jnp.minimum(target / (FACTOR * jnp.where(draft > 0, draft, 1)), 1)

    def typical(draft: Any, target: Any) -> Any:
        logs = jnp.log(jnp.where(target > 0, target, 1))
        enough = DELTA * jnp.exp((target * logs).sum(-1, keepdims=True))
        is_typical = target > jnp.minimum(enough, THRESHOLD)
        return jnp.where(is_typical, 1, costmodel.over_acceptance(draft, target, 0.0))

    if settings.epsilons[0] != 0:
        raise ValueError(f"epsilons={settings.epsilons!r} must begin with 0, the lossless rule")
    rules = [
        Rule(
            f"ε = {epsilon:g}",
            kind,
            epsilon,
            lossy.over_acceptance(epsilon, residual=kind),
            over(epsilon),
        )
        for kind, epsilons in (
            ("optimal", settings.epsilons),
            ("target", settings.naive_epsilons),
        )
        for epsilon in epsilons
    ]
    if settings.has_others:
        rules += [
            Rule("lenience", "lenience", np.nan, lossy.lenience(FACTOR), lenient),
            Rule(
                "typical acceptance",
                "typical",
                np.nan,
                lossy.typical_acceptance(THRESHOLD, DELTA, atypical="lossless"),
                typical,
            ),
        ]
    return rules


class _Chosen:
    """One of several lossy verifiers, by a traced number: one compiled loop serves all."""

    is_lossy = True

    def __init__(self, verifiers: Sequence[Any], which: Any) -> None:
        self.verifiers, self.which = verifiers, which

    def __call__(self, key: Any, target_probs: Any, draft: Any, spent: Any) -> Any:
        """As of `LossyVerifier`."""
        import jax

        return jax.lax.switch(self.which, self.verifiers, key, target_probs, draft, spent)


def _make_decode(make: Callable[..., Any], rules: Sequence[Rule], num_rounds: int) -> Any:
    """So many rounds with one of the rules: the state after them; lengths before, and accepted."""
    import jax

    @jax.jit
    def decode(params: Any, state: Any, which: Any) -> Any:
        decoder = make(_Chosen([rule.verifier for rule in rules], which))
        # Each rule has keys of its own, so that errors of several rules are independent.
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, which)

        def body(state: Any, _: None) -> Any:
            after, info = decoder.step(params, state)
            return after, (state.lengths, info.num_accepted)

        final, (lengths, num_accepted) = jax.lax.scan(
            body, state._replace(keys=keys), None, length=num_rounds
        )
        return final, lengths, num_accepted

    return decode


def _make_read(target_config: Any, draft_config: Any, first: int) -> Any:
    """From texts to the laws of draft and target, `[B, L - first, V]`, from place `first` on."""
    import jax

    from jaxsd.models import transformer

    @jax.jit
    def read(params: Any, tokens: Any, temperatures: Any) -> Any:
        def law(config: Any, weights: Any) -> Any:
            # Logits at a place are about the token after it.
            logits = transformer.forward(config, weights, tokens)[:, first - 1 : -1]
            return jax.nn.softmax(logits / temperatures[:, None, None])

        return law(draft_config, params["draft"]), law(target_config, params["target"])

    return read


def _make_judge(rules: Sequence[Rule]) -> Any:
    """From laws of draft and target to a rule's rejection, its loss, and the total variation."""
    import jax

    from jaxsd import costmodel

    def judged_by(rule: Rule) -> Callable[[Any, Any], Any]:
        def judged(draft: Any, target: Any) -> Any:
            acceptance = rule.acceptance(draft, target)
            rejection = costmodel.rejection_probability(acceptance, draft)
            if rule.kind == "target":
                emitted = costmodel.emitted_law(acceptance, draft, target)
                return rejection, costmodel.total_variation(emitted, target)
            return rejection, costmodel.residual_loss(acceptance, draft, target)

        return judged

    @jax.jit
    def judge(draft: Any, target: Any, which: Any) -> Any:
        found = jax.lax.switch(which, [judged_by(rule) for rule in rules], draft, target)
        return *found, costmodel.total_variation(draft, target)

    return judge


def _make_fronts() -> Any:
    """From laws of draft and target to the front at every place, `[B, T, E]`, row by row."""
    import jax

    from jaxsd import costmodel

    epsilons = FINE_EPSILONS.astype(np.float32)

    @jax.jit
    def fronts(draft: Any, target: Any) -> Any:
        def place(laws: tuple[Any, Any]) -> Any:
            return costmodel.bias_speed_front(laws[0], laws[1], epsilons)

        def one(laws: tuple[Any, Any]) -> Any:
            return jax.lax.map(place, laws)

        return jax.lax.map(one, (draft, target))

    return fronts


def _judged(
    lengths: np.ndarray, num_accepted: np.ndarray, first: int, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Which places were judged, `[B, T]`, and how many rejected, `[B]`.

    A round at length n that accepted a tokens, both `[rounds, B]`, judged places n to n + a, but
    for the bonus token's.
    """
    is_judged = np.zeros(shape, bool)
    rows = np.broadcast_to(np.arange(shape[0]), lengths.shape)
    for offset in range(NUM_DRAFT_TOKENS):
        reached = num_accepted >= offset
        is_judged[rows[reached], lengths[reached] - first + offset] = True
    return is_judged, (num_accepted < NUM_DRAFT_TOKENS).sum(0)
