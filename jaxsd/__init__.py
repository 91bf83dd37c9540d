"""Speculative decoding in JAX, and a differentiable model of its throughput.

The decoder is here: `speculative` and its parts. `jaxsd.models` has Flax transformers and their
training, `jaxsd.costmodel` the throughput model, `jaxsd.testing` the losslessness checker.
"""

import pathlib

# In a checkout models/ and costmodel/ lie beside this folder; in a wheel, inside it.
_here = pathlib.Path(__file__).parent
if not (_here / "models").is_dir():
    __path__.append(str(_here.parent))

from . import stats, testing  # noqa: E402
from .decoding import UNTIL_DONE, speculative  # noqa: E402
from .drafters import model_drafter, no_drafter, prompt_lookup  # noqa: E402
from .sampling import categorical, probabilities  # noqa: E402
from .types import (  # noqa: E402
    Decoder,
    DecodeState,
    Draft,
    Drafter,
    Generation,
    LanguageModel,
    Proposal,
    Sampling,
    Statistics,
    StepInfo,
    Verdict,
    Verifier,
)
from .verifiers import rejection_sampling  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "UNTIL_DONE",
    "DecodeState",
    "Decoder",
    "Draft",
    "Drafter",
    "Generation",
    "LanguageModel",
    "Proposal",
    "Sampling",
    "Statistics",
    "StepInfo",
    "Verdict",
    "Verifier",
    "categorical",
    "model_drafter",
    "no_drafter",
    "probabilities",
    "prompt_lookup",
    "rejection_sampling",
    "speculative",
    "stats",
    "testing",
]
