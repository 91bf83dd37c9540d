"""Other packages decoding the same models: one `Way` for each thing they can do.

A peer reads the folders that `models.export_hf` wrote, decodes greedily without an end of text, and
says how many passes of the target it made.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import shared


class Pair(NamedTuple):
    """Target and draft, and where other packages find them."""

    name: str
    target: shared.LoadedModel
    draft: shared.LoadedModel
    target_folder: pathlib.Path
    draft_folder: pathlib.Path


class Way(NamedTuple):
    """One way of decoding."""

    package: str
    kind: str  # plain, or speculative
    dtype: str
    batch: int
    run: Callable[[], tuple[np.ndarray, int]]  # [B, new] tokens, and passes of the target

    @property
    def name(self) -> str:
        """Of the way at any batch size."""
        return f"{self.package} {self.kind} {self.dtype}"


MODULES = {
    "transformers": ("torch", "transformers"),
    "openvino": ("openvino_genai", "optimum.intel"),
}
EXTRAS = {"transformers": "parity", "openvino": "openvino"}
DTYPES = {"transformers": ("float32", "bfloat16"), "openvino": ("float32",)}


def check_installed(peer: str) -> None:
    """Raises:
    ValueError: what the peer needs is missing; says what to install.
    """
    missing = [name for name in MODULES[peer] if not _found(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing: pip install -e '.[{EXTRAS[peer]}]'")


def versions(peers: list[str]) -> dict[str, str]:
    """Versions of what we are compared with."""
    packages = {"torch", "transformers", "openvino-genai", "optimum-intel"}
    if peers == ["transformers"]:
        packages = {"torch", "transformers"}
    return {name: importlib.metadata.version(name) for name in sorted(packages) if _has(name)}


def ways(peer: str, pair: Pair, args: Any, prompts: dict[int, np.ndarray]) -> list[Way]:
    """All that a peer does: plain decoding at every batch size, speculation at batch 1."""
    make = {"transformers": transformers_ways, "openvino": openvino_ways}[peer]
    return [way for dtype in DTYPES[peer] for way in make(pair, args, prompts, dtype)]


def transformers_ways(
    pair: Pair, args: Any, prompts: dict[int, np.ndarray], dtype: str
) -> list[Way]:
    """`generate`, plain and with an assistant model, in one type of numbers."""
    import torch
    import transformers

    torch.set_num_threads(num_cores())

    def read(folder: pathlib.Path) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.eval()

    target, draft = read(pair.target_folder), read(pair.draft_folder)
    draft.generation_config.num_assistant_tokens = args.num_tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    target.register_forward_hook(count)

    def way(kind: str, batch: int, **options: Any) -> Way:
        tokens = torch.tensor(prompts[batch], dtype=torch.long)
        mask = torch.ones_like(tokens)

        def run() -> tuple[np.ndarray, int]:
            passes[0] = 0
            with torch.inference_mode():
                out = target.generate(
                    tokens,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=args.new_tokens,
                    min_new_tokens=args.new_tokens,
                    **options,
                )
            return out[:, args.prompt_tokens :].numpy(), passes[0]

        return Way("transformers", kind, dtype, batch, run)

    found = [way("plain", batch) for batch in args.batches]
    if 1 in args.batches:
        found.append(way("speculative", 1, assistant_model=draft))
    return found


def openvino_ways(pair: Pair, args: Any, prompts: dict[int, np.ndarray], dtype: str) -> list[Way]:
    """OpenVINO GenAI's pipeline, plain and with a draft model; weights and cache in float32."""
    import openvino
    import openvino_genai

    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_NUM_THREADS": num_cores(),
    }
    target, draft = (convert(folder) for folder in (pair.target_folder, pair.draft_folder))
    plain = openvino_genai.LLMPipeline(target, "CPU", **options)

    def way(kind: str, batch: int, pipeline: Any) -> Way:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = args.new_tokens
        config.do_sample, config.ignore_eos = False, True
        if kind == "speculative":
            config.num_assistant_tokens = args.num_tokens
        tokens = prompts[batch].astype(np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(tokens), openvino.Tensor(np.ones_like(tokens))
        )

        def run() -> tuple[np.ndarray, int]:
            out = pipeline.generate(inputs, config)
            # Every pass writes one token beside those it accepts.
            passes = args.new_tokens
            if kind == "speculative":
                passes -= out.extended_perf_metrics.get_num_accepted_tokens()
            return np.array(out.tokens), passes

        return Way("openvino", kind, dtype, batch, run)

    found = [way("plain", batch, plain) for batch in args.batches]
    if 1 in args.batches:
        drafting = openvino_genai.LLMPipeline(
            target,
            "CPU",
            draft_model=openvino_genai.draft_model(draft, "CPU", **options),
            **options,
        )
        found.append(way("speculative", 1, drafting))
    return found


def convert(folder: pathlib.Path) -> pathlib.Path:
    """The model of a folder in OpenVINO's form, unquantised, in a folder within it."""
    import openvino
    import openvino_tokenizers
    from optimum.intel import OVModelForCausalLM

    out = folder / "openvino"
    with _quiet():
        model = OVModelForCausalLM.from_pretrained(
            folder, export=True, compile=False, load_in_8bit=False
        )
        model.save_pretrained(out)
        # A pipeline wants a tokenizer, though it is given tokens and asked for tokens.
        both = openvino_tokenizers.convert_tokenizer(_any_tokenizer(), with_detokenizer=True)
        for name, part in zip(("tokenizer", "detokenizer"), both, strict=True):
            openvino.save_model(part, out / f"openvino_{name}.xml")
    return out


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _any_tokenizer() -> Any:
    """The least that OpenVINO converts: bytes, a merge, a token that ends."""
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pair = letters[0], letters[0]
    vocabulary = {letter: index for index, letter in enumerate([*letters, "".join(pair)])}
    one = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[pair]))
    one.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = tokenizers.decoders.ByteLevel()
    one.add_special_tokens(["<|end|>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=one, eos_token="<|end|>")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what a conversion says of itself."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that the module would be in
        return False


def _has(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
