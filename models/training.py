"""Training a model on a token stream: the step, the schedule, and a run that can be killed.

A run is a folder. Its state (parameters, optimiser, step) is checkpointed, the batch of a step
depends on seed and step only, and the compiled step is deterministic on one CPU or TPU: stopped
anywhere and started again, a run ends in exactly the parameters it would have ended in. (A GPU
adds in any order unless XLA_FLAGS holds --xla_gpu_deterministic_ops=true.)
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from . import checkpoint, corpus, states, transformer
from .configs import Config

RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"

_COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_SECONDS_PER_LINE = 30.0
# What may differ between a run and its continuation: none of it reaches the parameters.
_FREE_FIELDS = ("eval_every", "eval_batches", "checkpoint_every", "log_every")


# NaN is in none of them.
_RANGES = (
    (
        "above 0",
        lambda value: value > 0,
        (
            *("steps", "batch_size", "sequence_length", "accumulation"),
            *("learning_rate", "clip_norm"),
            *("eval_every", "eval_batches", "checkpoint_every", "log_every"),
        ),
    ),
    ("at least 0", lambda value: value >= 0, ("warmup_steps", "weight_decay", "seed")),
    ("in [0, 1]", lambda value: 0 <= value <= 1, ("final_learning_rate", "distill_weight")),
    ("in [0, 1)", lambda value: 0 <= value < 1, ("b1", "b2")),
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
      steps: optimiser steps.
      batch_size: sequences per step.
      sequence_length: predicted tokens per sequence.
      learning_rate: peak, reached after the warm-up.
      warmup_steps: steps of linear increase from zero.
      final_learning_rate: what the cosine decays to, as a fraction of the peak.
      weight_decay: decoupled, of matrices only.
      b1: decay of AdamW's first moment.
      b2: decay of AdamW's second moment.
      clip_norm: largest global norm of a gradient.
      accumulation: micro batches a step is computed in; divides `batch_size`. Changes memory, and
        the result by rounding only.
      dtype: "float32" or "bfloat16", of the computation; master parameters are float32.
      distill_weight: weight of the distillation loss, 0 to 1; needs a teacher if above 0.
      seed: of the initial parameters and the order of the data.
      eval_every: steps between evaluations on held-out text; there is always one at the end.
      eval_batches: batches in an evaluation.
      checkpoint_every: steps between checkpoints; there is always one at the end.
      log_every: steps between lines of the log.

    Raises:
      ValueError: a value out of range; names all of them.

    >>> TrainConfig(steps=1000, batch_size=8, accumulation=2).learning_rate
    0.002
    >>> TrainConfig(steps=0, b1=1.0)
    Traceback (most recent call last):
    ...
    ValueError: steps=0 must be above 0; b1=1.0 must be in [0, 1)
    """

    steps: int
    batch_size: int = 16
    sequence_length: int = 256
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_learning_rate: float = 0.05
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    clip_norm: float = 1.0
    accumulation: int = 1
    dtype: str = "float32"
    distill_weight: float = 0.0
    seed: int = 0
    eval_every: int = 500
    eval_batches: int = 16
    checkpoint_every: int = 500
    log_every: int = 10

    def __post_init__(self):
        problems = [
            f"{name}={value} must be {wanted}"
            for wanted, is_valid, names in _RANGES
            for name in names
            if not is_valid(value := getattr(self, name))
        ]
        if not problems and self.warmup_steps >= self.steps:
            problems.append(f"warmup_steps={self.warmup_steps} must be below steps={self.steps}")
        if not problems and self.batch_size % self.accumulation:
            problems.append(
                f"accumulation={self.accumulation} must divide batch_size={self.batch_size}"
            )
        if self.dtype not in _COMPUTE_DTYPES:
            problems.append(f"dtype={self.dtype!r} must be one of {', '.join(_COMPUTE_DTYPES)}")
        if problems:
            raise ValueError("; ".join(problems))


class Teacher(NamedTuple):
    """The model a draft is trained to imitate."""

    config: Config
    params: Mapping[str, Any]


class TrainState(NamedTuple):
    """Everything a run needs to go on."""

    params: Any  # nested dict, float32
    optimizer: optax.OptState
    step: Array  # [] int32, finished steps


class Evaluation(NamedTuple):
    """Loss on text; natural logarithms."""

    nats_per_token: float
    nats_per_byte: float  # comparable across tokenizers
    num_tokens: int


class TrainResult(NamedTuple):
    """Where a run ended."""

    state: TrainState
    train_loss: float  # nats per token, mean over the last logged steps
    held_out: Evaluation
    num_tokens: int  # predicted in training
    seconds: float  # over all sessions


# -- the step -------------------------------------------------------------------------------------


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear from 0 to the peak at `warmup_steps`, then a cosine to the final rate at `steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_learning_rate,
    )


def decay_mask(params: Any) -> Any:
    """True for matrices, False for scales: a norm's scale pulled to zero only slows learning."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (https://arxiv.org/abs/1711.05101) behind a clip of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )


def init_state(
    config: Config, train_config: TrainConfig, params: Mapping[str, Any] | None = None
) -> TrainState:
    """Fresh parameters, a function of the seed, or copies of `params`; fresh optimiser state."""
    if params is None:
        own = transformer.init_params(config, jax.random.key(train_config.seed))
    else:  # copies, as a step donates its state
        own = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), dict(params))
    return TrainState(own, make_optimizer(train_config).init(own), jnp.zeros((), jnp.int32))


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[labels], in nats.

    Args:
      logits: `[..., V]` float32.
      labels: `[...]` int32 in 0 to V - 1.

    Returns:
      `[...]` float32.

    >>> print(f"{cross_entropy(jnp.zeros((1, 4)), jnp.array([3]))[0]:.4f}")  # log 4
    1.3863
    """
    # A comparison, not a gather: its gradient is a scatter, which runs on one thread on a CPU.
    is_label = labels[..., None] == jax.lax.broadcasted_iota(
        labels.dtype, logits.shape, logits.ndim - 1
    )
    chosen = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def distillation_loss(teacher_logits: Array, logits: Array) -> Array:
    """KL(teacher || student) at temperature 1 over the full vocabulary, in nats.

    The forward KL of DistillSpec (https://arxiv.org/abs/2310.08461), here on text of the corpus.

    Args:
      teacher_logits: `[..., V]` float32, not differentiated.
      logits: `[..., V]` float32.

    Returns:
      `[...]` float32, not negative up to rounding.

    >>> logits = jnp.array([[0.0, 1.0, 2.0]])
    >>> float(distillation_loss(logits, logits)[0])
    0.0
    """
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits), axis=-1)
    student = jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def loss(
    config: Config,
    params: Mapping[str, Any],
    windows: Array,
    *,
    dtype: Any = jnp.float32,
    teacher: Teacher | None = None,
    distill_weight: float = 0.0,
) -> tuple[Array, Array]:
    """The mean training loss of a batch, and its cross entropy, in nats per token.

    Args:
      config: shape of the model.
      params: nested dict of arrays.
      windows: `[B, T + 1]` int32.
      dtype: of the computation.
      teacher: model to imitate.
      distill_weight: w in (1 - w) * cross entropy + w * KL(teacher || model).

    Returns:
      Two float32 scalars; they are equal without a teacher.
    """
    inputs, labels = windows[:, :-1], windows[:, 1:]
    logits = transformer.forward(config, _cast(params, dtype), inputs)
    nats = jnp.mean(cross_entropy(logits, labels))
    if teacher is None:
        return nats, nats
    teacher_logits = transformer.forward(teacher.config, _cast(teacher.params, dtype), inputs)
    divergence = jnp.mean(distillation_loss(teacher_logits, logits))
    return (1.0 - distill_weight) * nats + distill_weight * divergence, nats


@functools.lru_cache(maxsize=8)
def make_step(
    config: Config, train_config: TrainConfig, teacher_config: Config | None = None
) -> Callable[[TrainState, Array | np.ndarray, Any], tuple[TrainState, dict[str, Array]]]:
    """The compiled optimiser step.

    Returns:
      `step(state, windows [batch_size, sequence_length + 1], teacher_params or None)` to the next
      state and the scalars "loss" (what is minimised), "nats" (cross entropy) and
      "gradient_norm". The state given is donated: its buffers are gone afterwards. Equal
      arguments get the same function, compiled once.
    """
    optimizer = make_optimizer(train_config)
    num_micro = train_config.accumulation

    def gradient(params, windows, teacher_params):
        teacher = None if teacher_config is None else Teacher(teacher_config, teacher_params)

        def objective(params):
            return loss(
                config,
                params,
                windows,
                dtype=_COMPUTE_DTYPES[train_config.dtype],
                teacher=teacher,
                distill_weight=train_config.distill_weight,
            )

        (total, nats), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        return gradients, {"loss": total, "nats": nats}

    def accumulated_gradient(params, windows, teacher_params):
        if num_micro == 1:
            return gradient(params, windows, teacher_params)
        micro = windows.reshape(num_micro, -1, windows.shape[-1])

        def add(totals, windows):
            return jax.tree.map(jnp.add, totals, gradient(params, windows, teacher_params)), None

        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, params, micro[0], teacher_params),
        )
        totals, _ = jax.lax.scan(add, zeros, micro)
        return jax.tree.map(lambda total: total / num_micro, totals)

    def step(state, windows, teacher_params):
        gradients, metrics = accumulated_gradient(state.params, windows, teacher_params)
        # optax raises floats to integer powers, which the caller may have forbidden.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)]
        metrics["gradient_norm"] = jnp.sqrt(sum(squares))
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def make_evaluation(
    config: Config, tokenizer: corpus.Tokenizer, windows: np.ndarray, batch_size: int
) -> Callable[[Mapping[str, Any]], Evaluation]:
    """A function from parameters to their loss on fixed windows `[N, T + 1]`, in float32."""
    num_bytes = np.array([len(piece) for piece in tokenizer.token_bytes()])
    total_nats = _make_total_nats(config)

    def evaluate(params: Mapping[str, Any]) -> Evaluation:
        nats = 0.0
        for start in range(0, len(windows), batch_size):
            nats += float(total_nats(params, windows[start : start + batch_size]))
        labels = windows[:, 1:]
        total_bytes = max(1, int(num_bytes[labels].sum()))
        return Evaluation(nats / labels.size, nats / total_bytes, labels.size)

    return evaluate


@functools.lru_cache(maxsize=8)
def _make_total_nats(config: Config) -> Callable[[Mapping[str, Any], Array | np.ndarray], Array]:
    @jax.jit
    def total_nats(params, windows):
        logits = transformer.forward(config, params, windows[:, :-1])
        return jnp.sum(cross_entropy(logits, windows[:, 1:]))

    return total_nats


def _cast(params: Mapping[str, Any], dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


# -- the run --------------------------------------------------------------------------------------


def train(
    folder: str | os.PathLike,
    config: Config,
    train_config: TrainConfig,
    data: corpus.Corpus,
    tokenizer: corpus.Tokenizer,
    *,
    teacher: Teacher | None = None,
    initial_params: Mapping[str, Any] | None = None,
    on_checkpoint: Callable[[TrainState, dict[str, Any]], None] | None = None,
    show_progress: bool = True,
) -> TrainResult:
    """Trains a model in a run folder, or continues what the folder holds.

    The folder gets `run.json` (settings and fingerprints), `log.jsonl` (a line every `log_every`
    steps and per evaluation) and `checkpoints/` (the last two). A continued run loses what came
    after its last checkpoint, computes it again to the same bits, and cuts the log back to match.

    Args:
      folder: of this run alone.
      config: shape of the model; its vocabulary must be the tokenizer's.
      train_config: how to train.
      data: tokens to learn from and tokens to be evaluated on.
      tokenizer: that made them.
      teacher: model to imitate if `train_config.distill_weight` is above 0; same vocabulary.
      initial_params: weights to start from instead of random ones; of the same shape.
      on_checkpoint: called after each checkpoint, and with the one a run is continued from, with
        the state and a JSON summary of the run.
      show_progress: a progress bar on a terminal, else a line every 30 seconds, on stderr.

    Returns:
      The final state and its losses.

    Raises:
      ValueError: the folder holds a run with other settings, corpus, tokenizer or teacher; a
        checkpoint is damaged; sizes do not match.
      FloatingPointError: the loss stopped being finite. The last checkpoint is from before.
    """
    folder = pathlib.Path(folder)
    _check_sizes(config, train_config, tokenizer, teacher)
    batch_size, steps = train_config.batch_size, train_config.steps
    batches = corpus.Batches(
        data.train, batch_size, train_config.sequence_length, train_config.seed
    )
    windows = corpus.held_out_windows(
        data.held_out, train_config.eval_batches * batch_size, train_config.sequence_length
    )
    evaluate = make_evaluation(config, tokenizer, windows, batch_size)
    step_fn = make_step(config, train_config, None if teacher is None else teacher.config)
    teacher_params = None if teacher is None else teacher.params

    described = _describe_run(config, train_config, data, tokenizer, teacher, initial_params)
    _claim_folder(folder, described)
    state, status = _restore_or_init(folder, config, train_config, initial_params)
    start = int(state.step)
    tokens_per_step = batch_size * train_config.sequence_length
    clock = _Clock(status.seconds)
    log = _Log(folder / LOG_FILE, start, tokens_per_step, clock)
    if start and on_checkpoint is not None:
        # The process may have been killed between the checkpoint and this call.
        on_checkpoint(state, status.summary(start, tokens_per_step))

    with _progress(steps, start, tokens_per_step, show_progress) as report:
        for step in range(start + 1, steps + 1):
            state, metrics = step_fn(state, batches(step - 1), teacher_params)
            nats, objective = float(metrics["nats"]), float(metrics["loss"])
            if not math.isfinite(nats + objective):
                raise FloatingPointError(_explain_divergence(folder, step, nats, train_config))
            status = status._replace(recent=[*status.recent, nats])
            report(step, nats, status.held_out)
            if step == steps or step % train_config.log_every == 0:
                status = status._replace(train_loss=float(np.mean(status.recent)), recent=[])
                norm = float(metrics["gradient_norm"])
                log.write(step, loss=status.train_loss, objective=objective, gradient_norm=norm)
            if step == steps or step % train_config.eval_every == 0:
                status = status._replace(held_out=evaluate(state.params)._asdict())
                log.write(step, held_out=status.held_out)
            if step == steps or step % train_config.checkpoint_every == 0:
                if not _is_finite(state.params):
                    raise FloatingPointError(
                        f"parameters are not finite after step {step} of {str(folder)!r}"
                    )
                status = status._replace(seconds=clock.seconds())
                states.save_checkpoint(folder / CHECKPOINTS, step, state, extra=status._asdict())
                if on_checkpoint is not None:
                    on_checkpoint(state, status.summary(step, tokens_per_step))
    return TrainResult(
        state,
        status.train_loss,
        Evaluation(**status.held_out),
        steps * tokens_per_step,
        status.seconds,
    )


class _Status(NamedTuple):
    """What a run remembers besides its state; JSON values, saved with every checkpoint."""

    seconds: float = 0.0
    # Losses since the last log line: with them the next line after a kill is the one that an
    # uninterrupted run would have written.
    recent: Sequence[float] = ()
    train_loss: Any = None
    held_out: Any = None  # the fields of an `Evaluation`

    def summary(self, step: int, tokens_per_step: int) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": step * tokens_per_step,
            "seconds": self.seconds,
            "train_loss": self.train_loss,
            "held_out": self.held_out,
        }


def _check_sizes(
    config: Config,
    train_config: TrainConfig,
    tokenizer: corpus.Tokenizer,
    teacher: Teacher | None,
) -> None:
    if config.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"config.vocab_size={config.vocab_size} must be the tokenizer's {tokenizer.vocab_size}"
        )
    if (teacher is None) != (train_config.distill_weight == 0):
        raise ValueError(
            f"distill_weight={train_config.distill_weight} "
            + ("needs a model to distill from" if teacher is None else "must be above 0")
        )
    if teacher is not None and teacher.config.vocab_size != config.vocab_size:
        raise ValueError(
            f"the model to distill from has {teacher.config.vocab_size} tokens, "
            f"this one {config.vocab_size}"
        )


def _describe_run(
    config: Config,
    train_config: TrainConfig,
    data: corpus.Corpus,
    tokenizer: corpus.Tokenizer,
    teacher: Teacher | None,
    initial_params: Mapping[str, Any] | None,
) -> dict[str, Any]:
    settings = dataclasses.asdict(train_config)
    return {
        "model": config.to_dict(),
        "training": {name: settings[name] for name in settings if name not in _FREE_FIELDS},
        "corpus": data.fingerprint,
        "tokenizer": tokenizer.fingerprint(),
        "teacher": None if teacher is None else checkpoint.params_fingerprint(teacher.params),
        "initial": (
            None if initial_params is None else checkpoint.params_fingerprint(initial_params)
        ),
    }


def _claim_folder(folder: pathlib.Path, description: dict[str, Any]) -> None:
    """Writes `run.json`, or makes sure that the one there says the same."""
    path = folder / RUN_FILE
    if path.exists():
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
        ours, theirs = _flat(description), _flat(recorded)
        differences = [
            f"{key} is {ours.get(key)!r}, was {theirs.get(key)!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        if differences:
            raise ValueError(
                f"{str(folder)!r} holds a run with other settings ({'; '.join(differences)}): "
                "use another folder, or the same settings"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RUN_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _restore_or_init(
    folder: pathlib.Path,
    config: Config,
    train_config: TrainConfig,
    initial_params: Mapping[str, Any] | None,
) -> tuple[TrainState, _Status]:
    step = states.latest_checkpoint(folder / CHECKPOINTS)
    if step is None:
        return init_state(config, train_config, initial_params), _Status()
    like = jax.eval_shape(lambda: init_state(config, train_config))
    state, extra = states.restore_checkpoint(folder / CHECKPOINTS, step, like)
    return state, _Status(**extra)


def _explain_divergence(
    folder: pathlib.Path, step: int, nats: float, train_config: TrainConfig
) -> str:
    return (
        f"the loss is {nats} at step {step} of {str(folder)!r}: lower learning_rate="
        f"{train_config.learning_rate} or raise warmup_steps={train_config.warmup_steps}"
    )


def _is_finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


class _Log:
    """Appends JSON lines; on opening, drops what a killed run wrote after its last checkpoint."""

    def __init__(self, path: pathlib.Path, step: int, tokens_per_step: int, clock: "_Clock"):
        self._path = path
        self._tokens_per_step = tokens_per_step
        self._clock = clock
        kept = []
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                is_kept = json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                is_kept = False  # a line cut off by the kill
            if is_kept:
                kept.append(line)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)

    def write(self, step: int, **fields: Any) -> None:
        tokens = step * self._tokens_per_step
        fields = {"step": step, **fields, "tokens": tokens, "seconds": self._clock.seconds()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, allow_nan=False) + "\n")


class _Clock:
    """Seconds of a run over all its sessions."""

    def __init__(self, before: float):
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._start


@contextlib.contextmanager
def _progress(
    steps: int, start: int, tokens_per_step: int, show: bool
) -> Iterator[Callable[[int, float, Any], None]]:
    """Yields `report(step, nats, held_out)`."""
    begin = time.monotonic()
    # Of the last steps only, and from the end of the first: it compiles.
    marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=100)

    def line(step: int, nats: float, held_out: Any) -> str:
        text = f"loss {nats:.3f}"
        if held_out is not None:
            per_token, per_byte = held_out["nats_per_token"], held_out["nats_per_byte"]
            text += f"  held out {per_token:.3f} ({per_byte:.3f}/byte)"
        marks.append((time.monotonic(), step))
        (first_time, first_step), (last_time, _) = marks[0], marks[-1]
        if step == first_step:
            return text
        rate = (step - first_step) / max(last_time - first_time, 1e-9)
        minutes, seconds = divmod(round((steps - step) / rate), 60)
        return f"{text}  {rate * tokens_per_step:,.0f} tokens/s  {minutes}:{seconds:02d} left"

    if not show:
        yield lambda step, nats, held_out: None
    elif sys.stderr.isatty():
        import rich.console
        import rich.progress

        columns = (
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(),
            rich.progress.TextColumn("{task.fields[line]}"),
        )
        console = rich.console.Console(stderr=True)
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=steps, completed=start, line="")
            yield lambda step, nats, held_out: bar.update(
                task, completed=step, line=line(step, nats, held_out)
            )
    else:
        last = begin

        def report(step: int, nats: float, held_out: Any) -> None:
            nonlocal last
            text = line(step, nats, held_out)
            if time.monotonic() - last >= _SECONDS_PER_LINE or step in (start + 1, steps):
                last = time.monotonic()
                print(f"step {step}/{steps}  {text}", file=sys.stderr, flush=True)

        yield report
