"""`jaxsd train`: trains a model from the command line, in a folder that can be continued."""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

from jaxsd.models import checkpoint, configs, training, transformer
from jaxsd.models import corpus as corpus_lib

TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")


def train(
    out: str,
    config: str = "tiny",
    corpus: str | None = None,
    suffixes: Sequence[str] | None = None,
    tokenizer: str = "bpe",
    vocab_size: int = 2048,
    d_model: int | None = None,
    n_layers: int | None = None,
    n_heads: int | None = None,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    d_ff: int | None = None,
    steps: int = 2000,
    batch_size: int = 16,
    sequence_length: int = 256,
    learning_rate: float = 2e-3,
    warmup_steps: int = 100,
    final_learning_rate: float = 0.05,
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    clip_norm: float = 1.0,
    accumulation: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    distill_from: str | None = None,
    distill_weight: float = 0.5,
    init_from: str | None = None,
    seed: int = 0,
    eval_every: int = 500,
    eval_batches: int = 16,
    checkpoint_every: int = 500,
    log_every: int = 10,
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16",
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a transformer on a folder of text.

    Continues by itself if `out` holds a run of the same settings. The model is in `out`/model,
    renewed at every checkpoint.

    Args:
      out: folder of this run.
      config: name of a shape; the sizes below change it.
      corpus: folder of text; by default Python's standard library on this machine.
      suffixes: endings of the files to read; by default .py, .md, .rst and .txt.
      tokenizer: "bpe", "bytes", or the folder of a model whose tokenizer to use. A draft and its
        target must share one.
      vocab_size: pieces a new "bpe" tokenizer learns.
      d_model: width of the residual stream.
      n_layers: number of layers.
      n_heads: query heads.
      n_kv_heads: key and value heads.
      head_dim: size of a head.
      d_ff: hidden size of the feed-forward part.
      steps: optimiser steps.
      batch_size: sequences per step.
      sequence_length: tokens per sequence.
      learning_rate: its peak.
      warmup_steps: steps until the peak.
      final_learning_rate: last learning rate as a fraction of the peak.
      weight_decay: of matrices.
      b1: decay of AdamW's first moment.
      b2: decay of AdamW's second moment.
      clip_norm: largest gradient norm.
      accumulation: micro batches per step.
      dtype: of the computation, float32 or bfloat16.
      distill_from: folder of a model to imitate.
      distill_weight: share of the imitation in the loss.
      init_from: folder of a model of the same shape to start from, instead of random weights.
      seed: of initial parameters and data order.
      eval_every: steps between evaluations.
      eval_batches: batches per evaluation.
      checkpoint_every: steps between checkpoints.
      log_every: steps between lines of the log.
      export_dtype: of the model in `out`/model, bfloat16 or float32.
      progress: show progress on stderr.

    Returns:
      Sizes, losses in nats per token and per byte, and seconds; JSON values.

    Raises:
      ValueError: an argument is wrong, in one line.
    """
    if config not in configs.CONFIGS:
        raise ValueError(f"config={config!r} must be one of {', '.join(sorted(configs.CONFIGS))}")
    train_config = training.TrainConfig(
        steps=steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        final_learning_rate=final_learning_rate,
        weight_decay=weight_decay,
        b1=b1,
        b2=b2,
        clip_norm=clip_norm,
        accumulation=accumulation,
        dtype=dtype,
        distill_weight=0.0 if distill_from is None else distill_weight,
        seed=seed,
        eval_every=eval_every,
        eval_batches=eval_batches,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
    )
    if export_dtype not in checkpoint.EXPORT_DTYPES:
        wanted = ", ".join(checkpoint.EXPORT_DTYPES)
        raise ValueError(f"export_dtype={export_dtype!r} must be one of {wanted}")
    files, description = _read_corpus(corpus, suffixes)
    pieces = _make_tokenizer(tokenizer, vocab_size, files)
    sizes = {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "d_ff": d_ff,
    }
    changes = {name: size for name, size in sizes.items() if size is not None}
    model_config = dataclasses.replace(
        configs.CONFIGS[config], vocab_size=pieces.vocab_size, **changes
    )
    teacher = None if distill_from is None else _load_teacher(distill_from, pieces)
    initial = None if init_from is None else _load_initial(init_from, model_config, pieces)
    data = corpus_lib.encode_corpus(files, pieces)
    num_parameters = transformer.num_parameters(model_config)
    summary = {
        "parameters": num_parameters,
        "corpus": {
            **description,
            "files": data.num_files,
            "train_bytes": data.num_bytes,
            "train_tokens": len(data.train),
            "held_out_bytes": data.num_held_out_bytes,
            "held_out_tokens": len(data.held_out),
            "fingerprint": data.fingerprint,
        },
        "training": dataclasses.asdict(train_config),
        "distilled_from": distill_from,
        "initialised_from": init_from,
    }
    if progress:
        print(
            f"{num_parameters:,} parameters, {len(data.train):,} training tokens in "
            f"{data.num_files} files, {steps * batch_size * sequence_length:,} tokens to see",
            file=sys.stderr,
        )

    folder = pathlib.Path(out)

    def export(state: training.TrainState, status: dict[str, Any]) -> None:
        checkpoint.save_model(
            folder / "model",
            model_config,
            state.params,
            pieces,
            dtype=export_dtype,
            metadata={**summary, "progress": status},
        )

    result = training.train(
        folder,
        model_config,
        train_config,
        data,
        pieces,
        teacher=teacher,
        initial_params=initial,
        on_checkpoint=export,
        show_progress=progress,
    )
    return {
        "model": str(folder / "model"),
        "parameters": num_parameters,
        "steps": steps,
        "tokens": result.num_tokens,
        "train_nats_per_token": result.train_loss,
        "held_out_nats_per_token": result.held_out.nats_per_token,
        "held_out_nats_per_byte": result.held_out.nats_per_byte,
        "seconds": result.seconds,
    }


def _read_corpus(
    folder: str | None, suffixes: Sequence[str] | None
) -> tuple[corpus_lib.Files, dict[str, Any]]:
    if folder is None:
        files = corpus_lib.read_files(
            corpus_lib.standard_library(),
            suffixes or (".py",),
            exclude=corpus_lib.STANDARD_LIBRARY_EXCLUDE,
        )
        version = ".".join(map(str, sys.version_info[:3]))
        return files, {"name": f"the standard library of Python {version}"}
    files = corpus_lib.read_files(folder, suffixes or TEXT_SUFFIXES)
    return files, {"name": pathlib.Path(folder).name}


def _make_tokenizer(name: str, vocab_size: int, files: corpus_lib.Files) -> corpus_lib.Tokenizer:
    if name == "bytes":
        return corpus_lib.ByteTokenizer()
    if name == "bpe":
        documents, _ = corpus_lib.split_documents(files.documents)
        return corpus_lib.train_bpe((document.text for document in documents), vocab_size)
    if not os.path.isdir(name):
        raise ValueError(f"tokenizer={name!r} must be 'bpe', 'bytes' or the folder of a model")
    return corpus_lib.load_tokenizer(name)


def _load_teacher(folder: str, tokenizer: corpus_lib.Tokenizer) -> training.Teacher:
    teacher = checkpoint.load_model(folder)
    if teacher.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise ValueError(
            f"distill_from={folder!r} has another tokenizer: pass tokenizer={folder!r} too"
        )
    return training.Teacher(teacher.config, teacher.params)


def _load_initial(
    folder: str, config: configs.Config, tokenizer: corpus_lib.Tokenizer
) -> dict[str, Any]:
    model = checkpoint.load_model(folder)
    if model.config != config:
        raise ValueError(f"init_from={folder!r} has another shape: {model.config}, not {config}")
    if model.tokenizer.fingerprint() != tokenizer.fingerprint():
        raise ValueError(f"init_from={folder!r} has another tokenizer: pass tokenizer={folder!r}")
    return model.params


if __name__ == "__main__":
    import tyro

    try:
        print(json.dumps(tyro.cli(train)))
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
