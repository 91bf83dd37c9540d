"""From a smooth optimum to a shape that can be built, and to the best of its neighbours."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ._problem import LIMIT_NAMES, VARIABLES, Problem
from .estimate import Design, draft_devices
from .hardware import kv_fits

# How far a variable moves in one round of comparing neighbours. A batch has many values, of which
# the best is often the largest that fits.
_MOVES = {"batch": (-16, -1, 0, 1, 16)}
_EVERY_OTHER = (-1, 0, 1)
_MAX_ROUNDS = 200
# Of the smooth search's best ends, so many are rounded; mostly they are one and the same.
_NUM_ENDS = 2
# How far above a limit a real design may be: what rounding of the arithmetic may do.
_TOLERANCE = 1e-9
_INFEASIBLE = 1e3
_CHUNK = 256  # designs per call


class Found(NamedTuple):
    """The best lattice point."""

    design: Design  # whole numbers; the training tokens that go with it
    batch: float


class Lattice:
    """The real shapes of a search: which there are, and who neighbours whom."""

    def __init__(self, names: Sequence[str], problem: Problem, width_multiple: int):
        self.names = tuple(name for name in names if name != "tokens")
        self.problem = problem
        self.box = {
            name: (math.exp(problem.low[place]), math.exp(problem.high[place]))
            for place, name in enumerate(VARIABLES)
            if name in names
        }
        shape = problem.template.shape
        self.shape = shape
        self.degree = int(draft_devices(problem.hardware).tensor_parallel)
        # Every chip gets whole heads, and d_model whole heads and whole tiles.
        self.head_dim = int(shape.head_dim)
        self.head_share = float(shape.n_heads * shape.head_dim / shape.d_model)
        heads_wide = self.head_dim * self.degree if self.head_share == 1 else 1
        self.width_step = math.lcm(width_multiple, heads_wide)
        self.ff_step = math.lcm(width_multiple, self.degree)

    def nearest(self, point: dict[str, float]) -> tuple[int, ...]:
        """The lattice point next to values of the free variables, in `names`' order."""
        width = self._width(
            point["d_model"] if "d_model" in self.names else float(self.shape.d_model)
        )
        out = []
        for name in self.names:
            value = point[name]
            if name == "d_model":
                out.append(width)
            elif name == "ff_ratio":
                out.append(max(round(value * width / self.ff_step), 1) * self.ff_step)
            elif name == "n_kv_heads":
                out.append(self._kv(self._heads(width), value))
            else:
                out.append(max(round(value), 1))
        return tuple(out)

    def neighbours(self, point: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Every point one move away in any set of variables, the point itself first."""
        moves = [
            self._moves(name, value, point) for name, value in zip(self.names, point, strict=True)
        ]
        every = [x for x in itertools.product(*moves) if self.allowed(x)]
        return [point, *(x for x in every if x != point)]

    def design(self, point: tuple[int, ...]) -> Design:
        """The design at a lattice point, in whole numbers; training tokens as in the template."""
        given: dict[str, Any] = dict(zip(self.names, point, strict=True))
        shape = self.shape
        width = given.get("d_model", shape.d_model)
        heads = self._heads(width) if "d_model" in given else shape.n_heads
        kv, ff = shape.n_kv_heads, shape.d_ff
        if "n_kv_heads" in given or "d_model" in given:
            wanted = heads * shape.n_kv_heads / shape.n_heads
            kv = self._kv(int(heads), given.get("n_kv_heads", wanted))
        if "ff_ratio" in given:
            ff = given["ff_ratio"]
        elif "d_model" in given:
            ratio = shape.d_ff / shape.d_model
            ff = max(round(ratio * width / self.ff_step), 1) * self.ff_step
        new = shape._replace(
            d_model=width,
            n_layers=given.get("n_layers", shape.n_layers),
            n_heads=heads,
            n_kv_heads=kv,
            d_ff=ff,
        )
        template = self.problem.template
        return template._replace(shape=new, gamma=given.get("gamma", template.gamma))

    def batch(self, point: tuple[int, ...]) -> float:
        """The batch at a lattice point."""
        given: dict[str, Any] = dict(zip(self.names, point, strict=True))
        return float(given.get("batch", self.problem.workload.batch))

    def _width(self, value: float) -> int:
        return max(round(value / self.width_step), 1) * self.width_step

    def _heads(self, width: float) -> int:
        heads = width * self.head_share / self.head_dim
        return max(round(heads / self.degree), 1) * self.degree

    def _kv_choices(self, heads: int) -> list[int]:
        """Numbers of key and value heads that share query heads evenly, on every chip."""
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        return [n for n in divisors if kv_fits(n, self.degree)]

    def _kv(self, heads: int, wanted: float) -> int:
        return min(self._kv_choices(heads), key=lambda n: abs(math.log(n / wanted)))

    def _moves(self, name: str, value: int, point: tuple[int, ...]) -> list[int]:
        moves = _MOVES.get(name, _EVERY_OTHER)
        if name == "n_kv_heads":
            given: dict[str, Any] = dict(zip(self.names, point, strict=True))
            heads = self._heads(given.get("d_model", self.shape.d_model))
            choices = self._kv_choices(int(heads))
            place = choices.index(self._kv(int(heads), value))
            return choices[max(place - 1, 0) : place + 2]
        step = {"d_model": self.width_step, "ff_ratio": self.ff_step}.get(name, 1)
        return [value + move * step for move in moves]

    def allowed(self, point: tuple[int, ...]) -> bool:
        """Inside the box, and at least 1 of everything."""
        given: dict[str, Any] = dict(zip(self.names, point, strict=True))
        width = given.get("d_model", self.shape.d_model)
        if min(point) < 1:
            return False
        for name, value in given.items():
            low, high = self.box[name]
            size = value / width if name == "ff_ratio" else value
            # A width, and a ratio of widths, may leave the box by what rounding it takes.
            slack = 1.0
            if name in ("d_model", "ff_ratio"):
                step = self.width_step if name == "d_model" else self.ff_step / width
                slack = 1 + step / size
            if not low / slack <= size <= high * slack:
                return False
        return True


def round_design(lattice: Lattice, ends: np.ndarray, evaluate: Callable[..., Any]) -> "Found | str":
    """The best real design near the smooth ends, plain decoding included, or why there is none."""
    results = []
    for end in ends[:_NUM_ENDS]:
        point = lattice.nearest(dict(zip(VARIABLES, map(float, end), strict=True)))
        results.append(_descend(lattice, point, evaluate))
    results.append(_plain(lattice, evaluate))
    # A draft has to be better than plain decoding by more than rounding.
    feasible = [result for result in results if result.excess <= _TOLERANCE]
    if not feasible:
        closest = min(results, key=lambda result: result.excess)
        much = math.exp(closest.excess)
        return f"{describe(lattice.problem)}: {closest.limit} is {much:.3g} times what is allowed"
    plain_first = sorted(feasible, key=lambda result: result.design.gamma != 0)
    best = min(plain_first, key=lambda result: round(result.cost, 12))
    return Found(best.design, best.batch)


def describe(problem: Problem) -> str:
    """Where the models sit, in a few words."""
    hardware = problem.hardware
    target = int(hardware.target.tensor_parallel)
    draft = int(draft_devices(hardware).tensor_parallel)
    where = "of its own" if float(hardware.draft_apart) else "of these"
    chips = "chip" if target == 1 else "chips"
    return f"target on {target} {chips}, draft on {draft} {where}"


class _Result(NamedTuple):
    """A lattice point and what it is worth."""

    cost: float
    excess: float  # of the limit that is exceeded most, or kept with the smallest margin
    limit: str  # its name
    design: Design
    batch: float


def _descend(lattice: Lattice, point: tuple[int, ...], evaluate: Callable[..., Any]) -> _Result:
    """From a point to the best of its neighbours, until it is that itself."""
    results: list[_Result] = []
    for _ in range(_MAX_ROUNDS):
        points = lattice.neighbours(point)
        pairs = [(lattice.design(x), lattice.batch(x)) for x in points]
        results = _evaluate(lattice, pairs, evaluate)
        ranks = [_rank(result) for result in results]
        best = int(np.argmin(ranks))
        if best == 0 or ranks[best] >= ranks[0] - 1e-13 * abs(ranks[0]):
            break
        point = points[best]
    return results[0]


def _plain(lattice: Lattice, evaluate: Callable[..., Any]) -> _Result:
    """Plain decoding, at the best batch where that is free: a draft that is never asked."""
    low, high = lattice.box.get("batch", (lattice.problem.workload.batch,) * 2)
    sizes = np.unique(np.round(np.geomspace(low, high, 1000))) if "batch" in lattice.box else [low]
    smallest = lattice.nearest({name: bounds[0] for name, bounds in lattice.box.items()})
    design = lattice.design(smallest)._replace(gamma=0)
    pairs = [(design, float(size)) for size in sizes if low <= size <= high]
    return min(_evaluate(lattice, pairs, evaluate), key=_rank)


def _rank(result: _Result) -> float:
    """Feasible designs by cost, behind them the others by what they exceed."""
    return result.cost if result.excess <= _TOLERANCE else _INFEASIBLE * (1 + result.excess)


def _evaluate(
    lattice: Lattice,
    pairs: list[tuple[Design, float]],
    evaluate: Callable[..., Any],
) -> list[_Result]:
    """Costs and excesses of so many designs, in calls of one size: each new one would compile."""
    out = []
    question = jax.tree.map(lambda x: np.asarray(x, np.float64), lattice.problem)
    for start in range(0, len(pairs), _CHUNK):
        some = pairs[start : start + _CHUNK]
        padded = some + [some[0]] * (_CHUNK - len(some))
        designs = jax.tree.map(
            lambda *x: np.array(x, np.float64), *(design for design, _ in padded)
        )
        if "tokens" in lattice.box:
            designs = designs._replace(tokens=np.full(_CHUNK, lattice.box["tokens"][1]))
        batch = np.array([size for _, size in padded], np.float64)
        costs, excess, tokens = jax.device_get(evaluate(question, designs, batch))
        for i, (design, size) in enumerate(some):
            worst = int(np.argmax(excess[i]))
            cost = float("inf") if np.isnan(costs[i]) else float(costs[i])
            trained = design._replace(tokens=float(tokens[i]))
            out.append(_Result(cost, float(excess[i, worst]), LIMIT_NAMES[worst], trained, size))
    return out
