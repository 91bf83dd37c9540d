"""The drafts of one target: trained alike, on the same text in the same order, and their losses."""

import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from jaxsd import models
from jaxsd.models import checkpoint, corpus, training

from . import train as train_lib
from .circle_plan import Member, Plan, feed_forward_width


class Text(NamedTuple):
    """What is trained and measured on; the held-out side was trained on by nobody."""

    folder: str | None  # of the corpus; None: the standard library
    tokens: corpus.Corpus
    windows: np.ndarray  # [N, T + 1] int32, held out, for losses
    prompts: np.ndarray  # [N, P] int32, held out


def read_text(plan: Plan, folder: str | None, tokenizer: corpus.Tokenizer) -> Text:
    """The corpus in the target's tokens, and which of its held-out tokens are measured on.

    Raises:
      ValueError: the corpus cannot be read, or its held-out side is too small.
    """
    if folder is None:
        where, exclude = corpus.standard_library(), corpus.STANDARD_LIBRARY_EXCLUDE
        files = corpus.read_files(where, (".py",), exclude=exclude)
    else:
        files = corpus.read_files(folder, train_lib.TEXT_SUFFIXES)
    tokens = corpus.encode_corpus(files, tokenizer)
    windows = corpus.held_out_windows(tokens.held_out, plan.windows, plan.sequence_length)
    prompts = corpus.held_out_prompts(
        tokenizer, tokens.held_out, plan.num_prompts, plan.prompt_length, seed=plan.seed
    )
    return Text(folder, tokens, windows.astype(np.int32), prompts.astype(np.int32))


def train_target(plan: Plan, out: pathlib.Path, folder: str | None) -> pathlib.Path:
    """The folder of a target that the study trains itself, continued if it was begun."""
    target_config = plan.target_config
    if target_config is None:
        raise ValueError(f"a study of budget {plan.budget!r} is given its target")
    result = train_lib.train(
        str(out),
        config=target_config,
        corpus=folder,
        vocab_size=models.CONFIGS[target_config].vocab_size,
        steps=plan.target_steps,
        batch_size=plan.batch_size,
        sequence_length=plan.sequence_length,
        learning_rate=6e-4,
        warmup_steps=max(1, plan.target_steps // 20),
        accumulation=plan.accumulation,
        eval_every=max(1, plan.target_steps // 10),
        checkpoint_every=max(1, plan.target_steps // 10),
        seed=plan.seed,
    )
    return pathlib.Path(result["model"])


def train_member(
    plan: Plan,
    member: Member,
    out: pathlib.Path,
    target_folder: str,
    target: checkpoint.Pretrained,
    text: Text,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Trains a draft, or goes on where it was killed, and measures its loss.

    Args:
      plan: of the study.
      member: which draft.
      out: folder of its run; the model is in `out`/model.
      target_folder: whose tokenizer it uses.
      target: the same, loaded.
      text: of the study.
      show_progress: on stderr.

    Returns:
      Sizes, the loss on held-out windows, the losses along the way and seconds; JSON values.
    """
    trained = train_lib.train(
        str(out),
        config="embedded-draft",
        corpus=text.folder,
        tokenizer=target_folder,
        d_model=member.d_model,
        n_layers=member.n_layers,
        n_heads=member.d_model // plan.head_dim,
        n_kv_heads=1,
        head_dim=plan.head_dim,
        d_ff=feed_forward_width(member.d_model),
        steps=member.steps,
        batch_size=plan.batch_size,
        sequence_length=plan.sequence_length,
        accumulation=plan.accumulation,
        learning_rate=plan.learning_rate,
        warmup_steps=max(1, min(150, member.steps // 10)),
        eval_every=max(1, member.steps // 8),
        eval_batches=max(1, plan.windows // plan.batch_size),
        checkpoint_every=max(1, member.steps // 4),
        export_dtype="float32",
        seed=plan.seed,
        progress=show_progress,
    )
    draft = checkpoint.load_model(trained["model"])
    loss = held_out_loss(draft, text.windows)
    return {
        "name": member.name,
        "d_model": member.d_model,
        "n_layers": member.n_layers,
        "d_ff": draft.config.d_ff,
        "is_held_out": member.is_held_out,
        "parameters_total": models.num_parameters(draft.config),
        "parameters_non_embedding": models.num_parameters(draft.config)
        - draft.config.vocab_size * draft.config.d_model,
        "training_tokens": member.tokens,
        "loss": loss,
        "perplexity": math.exp(loss),
        # With the learning rate of the moment, so above what a run that ends there would reach.
        "losses_along_the_way": losses_along_the_way(out),
        "train_nats_per_token": trained["train_nats_per_token"],
        "training_seconds": trained["seconds"],
    }


def losses_along_the_way(run: pathlib.Path) -> list[list[float]]:
    """Pairs of tokens seen and held-out loss, from the log of a training run."""
    pairs: dict[int, float] = {}
    for line in (run / training.LOG_FILE).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "held_out" in entry:  # a run that was killed may have one twice: the last counts
            pairs[entry["tokens"]] = entry["held_out"]["nats_per_token"]
    return [[tokens, pairs[tokens]] for tokens in sorted(pairs)]


def held_out_loss(model: checkpoint.Pretrained, windows: np.ndarray) -> float:
    """Nats per token of held-out windows `[N, T + 1]`, a window at a time."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def nats(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        logits = models.forward(model.config, params, tokens)
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, :, None], axis=2)
        return -found.mean()

    rows = windows.astype(np.int32)
    return float(np.mean([nats(model.params, row[None, :-1], row[None, 1:]) for row in rows]))
