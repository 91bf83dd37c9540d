"""Flax transformers that satisfy `jaxsd.LanguageModel`, their training and their files."""

from .configs import CONFIGS, Config
from .transformer import (
    TransformerLM,
    abstract_params,
    forward,
    init_params,
    language_model,
    num_parameters,
)

__all__ = [
    "CONFIGS",
    "Config",
    "TransformerLM",
    "abstract_params",
    "forward",
    "init_params",
    "language_model",
    "num_parameters",
]
