"""Flax transformers that satisfy `jaxsd.LanguageModel`, their training and their files."""

from . import corpus, sharding, training
from .checkpoint import Pretrained, check_pair, load_model, save_model
from .configs import CONFIGS, Config, RopeScaling
from .convert import HFModel, export_hf, load_hf
from .early_exit import EarlyExitLM, exit_early
from .embedded import load_embedded
from .quantise import QuantisedKernel, bytes_of, dequantise, quantise, quantised_self
from .states import (
    PendingCheckpoint,
    latest_checkpoint,
    restore_checkpoint,
    save_checkpoint,
    start_checkpoint,
)
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
    "EarlyExitLM",
    "HFModel",
    "PendingCheckpoint",
    "Pretrained",
    "QuantisedKernel",
    "RopeScaling",
    "TransformerLM",
    "abstract_params",
    "bytes_of",
    "check_pair",
    "corpus",
    "dequantise",
    "exit_early",
    "export_hf",
    "forward",
    "init_params",
    "language_model",
    "latest_checkpoint",
    "load_embedded",
    "load_hf",
    "load_model",
    "num_parameters",
    "quantise",
    "quantised_self",
    "restore_checkpoint",
    "save_checkpoint",
    "save_model",
    "sharding",
    "start_checkpoint",
    "training",
]
