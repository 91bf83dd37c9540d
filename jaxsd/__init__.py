"""Speculative decoding in JAX, and a differentiable model of its throughput.

The decoder is here: `speculative` and its parts. `jaxsd.models` has Flax transformers and their
training, `jaxsd.costmodel` the throughput model, `jaxsd.testing` the losslessness checker.
"""

import pathlib

# In a checkout models/ and costmodel/ lie beside this folder; in a wheel, inside it.
_here = pathlib.Path(__file__).parent
if not (_here / "models").is_dir():
    __path__.append(str(_here.parent))

from . import constraints, lengths, lossy, stats, testing, trees  # noqa: E402
from .cascades import cascade_drafter  # noqa: E402
from .constraints import Constraints, Grammar, stop_sequences, table_grammar  # noqa: E402
from .decoding import UNTIL_DONE, speculative  # noqa: E402
from .drafters import (  # noqa: E402
    confident_tree_drafter,
    model_drafter,
    no_drafter,
    prompt_lookup,
    tree_drafter,
)
from .early_exit import early_exit_drafter  # noqa: E402
from .lengths import (  # noqa: E402
    LengthPolicy,
    cost_aware_length,
    fixed_length,
    length_by_active,
)
from .ngrams import (  # noqa: E402
    NGramTable,
    load_ngram_table,
    ngram_drafter,
    ngram_law,
    ngram_table,
    save_ngram_table,
)
from .sampling import categorical, probabilities  # noqa: E402
from .types import (  # noqa: E402
    Decoder,
    DecodeState,
    Draft,
    Drafter,
    Generation,
    LanguageModel,
    LossyVerifier,
    Proposal,
    Sampling,
    SharedState,
    Statistics,
    StepInfo,
    TreeLanguageModel,
    Verdict,
    Verifier,
    shares_noise,
)
from .verifiers import (  # noqa: E402
    block_verification,
    gumbel_coupling,
    k_sequential,
    optimal_acceptance,
    recursive_rejection,
    rejection_sampling,
    target_matching,
    traversal_verification,
)
from .vocabularies import (  # noqa: E402
    SharedVocabulary,
    TranslatedParams,
    shared_vocabulary_model,
    translate_vocabulary,
)

__version__ = "0.1.0"

__all__ = [
    "UNTIL_DONE",
    "Constraints",
    "DecodeState",
    "Decoder",
    "Draft",
    "Drafter",
    "Generation",
    "Grammar",
    "LanguageModel",
    "LengthPolicy",
    "LossyVerifier",
    "NGramTable",
    "Proposal",
    "Sampling",
    "SharedState",
    "SharedVocabulary",
    "Statistics",
    "StepInfo",
    "TranslatedParams",
    "TreeLanguageModel",
    "Verdict",
    "Verifier",
    "block_verification",
    "cascade_drafter",
    "categorical",
    "confident_tree_drafter",
    "constraints",
    "cost_aware_length",
    "early_exit_drafter",
    "fixed_length",
    "gumbel_coupling",
    "k_sequential",
    "length_by_active",
    "lengths",
    "load_ngram_table",
    "lossy",
    "model_drafter",
    "ngram_drafter",
    "ngram_law",
    "ngram_table",
    "no_drafter",
    "optimal_acceptance",
    "probabilities",
    "prompt_lookup",
    "recursive_rejection",
    "rejection_sampling",
    "save_ngram_table",
    "shared_vocabulary_model",
    "shares_noise",
    "speculative",
    "stats",
    "stop_sequences",
    "table_grammar",
    "target_matching",
    "testing",
    "translate_vocabulary",
    "traversal_verification",
    "tree_drafter",
    "trees",
]
