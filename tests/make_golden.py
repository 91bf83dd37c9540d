"""Writes tests/golden/: a small checkpoint of every family, and the logits transformers has for it.

    pip install -e '.[parity]' && python tests/make_golden.py

A folder is what `save_pretrained` writes, with `golden.npz` (tokens, lengths, logits) beside it.
Three are stored in 16 bits, one in shards; logits are computed in float32 from what is stored.
"""

import pathlib
import shutil

import numpy as np
import published
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parent / "golden"
DTYPES = {"mistral": "bfloat16", "gemma3": "bfloat16", "opt": "float16"}
SHARDED = ("qwen2",)


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for seed, name in enumerate(published.MODELS):
        dtype = DTYPES.get(name, "float32")
        model = published.build(name, seed, dtype)
        tokens, lengths = published.ragged_batch(seed)
        logits = published.logits_of_rows(model, tokens, lengths)
        folder = GOLDEN / name
        shard_size = "60KB" if name in SHARDED else "1GB"
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
        np.savez_compressed(
            folder / "golden.npz",
            tokens=tokens,
            lengths=lengths,
            logits=logits,
            versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        )
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{name}: {size / 1000:.0f} kB, largest logit {np.abs(logits).max():.1f}")


if __name__ == "__main__":
    main()
