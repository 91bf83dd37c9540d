"""`jaxsd generate`: continues one text and says what speculation did."""

import pathlib
import sys
import time
from typing import Annotated, Any, Literal

import jax
import numpy as np
import rich.console
import rich.style
import tyro
from rich.color import ColorSystem

import jaxsd
from jaxsd import stats as stats_lib

DEFAULT_NUM_DRAFT_TOKENS = 3
ACCEPTED_STYLE = rich.style.Style(color="green")
TARGET_STYLE = rich.style.Style(color="magenta", bold=True)

Folder = Annotated[str | None, tyro.conf.arg(metavar="DIR")]
Number = Annotated[int | None, tyro.conf.arg(metavar="INT")]


def generate(
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None,
    prompt_file: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    target: Folder = None,
    draft: Folder = None,
    drafter: Literal["model", "prompt-lookup", "none"] = "model",
    num_draft_tokens: Number = None,
    plain: bool = False,
    temperature: float = 0.7,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    max_len: Number = None,
    seed: int = 0,
    color: bool = False,
) -> dict[str, Any]:
    """Continues a text, streamed as it comes, with statistics on stderr at the end.

    Without a prompt it begins a new text.

    Args:
      prompt: text to continue.
      prompt_file: file with the text to continue; - for stdin.
      target: folder of the target; by default the one in the package.
      draft: folder of the draft; by default the one in the package.
      drafter: who proposes: the draft model, copies from the text itself, or nobody.
      num_draft_tokens: tokens proposed per round, at least 1; by default 3.
      plain: decode without a drafter; short for --drafter none.
      temperature: divides the logits; 0 is greedy.
      top_k: sample among the k most probable tokens; 0 for all.
      top_p: sample among the most probable tokens that hold this mass; 1 for all.
      max_new_tokens: length of the continuation.
      max_len: length of the token buffer, prompt included; by default what is needed.
      seed: of the random choices.
      color: accepted draft tokens green, tokens of the target magenta.

    Returns:
      Text, tokens, statistics and settings; JSON values.

    Raises:
      ValueError: an argument or a model is wrong, in one line.
    """
    proposes, num_tokens = _check_drafter(drafter, num_draft_tokens, plain)
    text = _read_prompt(prompt, prompt_file)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    sampling = jaxsd.Sampling(temperature, top_k, top_p)
    key = jax.random.key(seed)

    from jaxsd import models

    from . import pair

    if proposes == "model":
        target_model, draft_model = pair.load_pair(target, draft)
    else:
        target_model, draft_model = pair.load_target(target), None
    tokenizer = target_model.tokenizer
    tokens = tokenizer.encode(text) or [tokenizer.eos_id]
    if max_len is None:
        max_len = len(tokens) + max_new_tokens
    if max_len <= len(tokens):
        raise ValueError(f"max_len={max_len} must exceed the prompt's {len(tokens)} tokens")

    params = {"target": target_model.params}
    if draft_model is not None:
        params["draft"] = draft_model.params
        proposer = jaxsd.model_drafter(models.language_model(draft_model.config), num_tokens)
    elif proposes == "prompt-lookup":
        proposer = jaxsd.prompt_lookup(num_tokens)
    else:
        proposer = jaxsd.no_drafter()
    decoder = jaxsd.speculative(
        models.language_model(target_model.config),
        proposer,
        max_len=max_len,
        eos_id=tokenizer.eos_id,
    )

    status = rich.console.Console(stderr=True, highlight=False)
    began = time.perf_counter()
    with status.status("compiling"):
        rounds = decoder.stream(
            params,
            np.array([tokens], np.int32),
            None,
            key,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
        )
        # The first round also compiles; what the others take is the speed.
        infos = [next(rounds)]
    compiled = time.perf_counter()
    writer = Writer(tokenizer, sys.stdout, color)
    writer.write(infos[0])
    for info in rounds:
        writer.write(info)
        infos.append(info)
    writer.finish()
    seconds = time.perf_counter() - compiled

    generated = [int(token) for info in infos for token in info.tokens[0, : info.num_tokens[0]]]
    num_timed = len(generated) - int(infos[0].num_tokens[0])
    statistics = summarize(infos, decoder.num_tokens)
    statistics |= {
        "num_tokens": len(generated),
        "first_round_seconds": compiled - began,
        "tokens_per_second": num_timed / seconds if num_timed else None,
    }
    _show(status, statistics)
    return {
        "prompt": text,
        "text": tokenizer.decode(generated),
        "tokens": generated,
        "prompt_tokens": tokens,
        "statistics": statistics,
        "settings": {
            "target": target or "embedded",
            "draft": None if proposes != "model" else draft or "embedded",
            "drafter": proposes,
            "num_draft_tokens": decoder.num_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
            "max_len": max_len,
            "seed": seed,
        },
    }


class Writer:
    """Writes one row's tokens as text, each as soon as its characters are whole.

    Control characters go out as the model made them, like those of any other file; the end of text
    is nothing. Not through rich, which would wrap lines and expand tabs.
    """

    def __init__(self, tokenizer: Any, file: Any, color: bool):
        from jaxsd.models import corpus

        self._text = corpus.StreamingDecoder(tokenizer)
        self._file = file
        self._color = color

    def write(self, info: jaxsd.StepInfo) -> None:
        """The tokens that one round committed."""
        for place in range(int(info.num_tokens[0])):
            is_accepted = place < int(info.num_accepted[0])
            piece = self._text.push([int(info.tokens[0, place])])
            self._put(piece, ACCEPTED_STYLE if is_accepted else TARGET_STYLE)
        self._file.flush()

    def finish(self) -> None:
        """What is left of an unfinished character, and the end of the line."""
        self._put(self._text.finish(), TARGET_STYLE)
        self._file.write("\n")
        self._file.flush()

    def _put(self, piece: str, style: rich.style.Style) -> None:
        if self._color and piece:
            # A colour that is left on over a line's end would run on in some terminals.
            lines = [
                style.render(line, color_system=ColorSystem.STANDARD) for line in piece.split("\n")
            ]
            piece = "\n".join(lines)
        self._file.write(piece)


def summarize(infos: list[jaxsd.StepInfo], num_draft_tokens: int) -> dict[str, Any]:
    """Statistics of a stream of one row."""
    active = [info for info in infos if info.num_tokens[0]]
    accepted = np.array([int(info.num_accepted[0]) for info in active], np.int32)
    places = np.arange(num_draft_tokens)
    stats = jaxsd.Statistics(
        num_rounds=np.array([len(active)], np.int32),  # pyright: ignore[reportArgumentType]
        num_drafted=np.array([sum(int(info.num_drafted[0]) for info in active)], np.int32),  # pyright: ignore[reportArgumentType]
        num_accepted=np.array([accepted.sum()], np.int32),  # pyright: ignore[reportArgumentType]
        accepted_by_position=(accepted[:, None] > places[None, :]).sum(0, dtype=np.int32)[None],
    )
    return describe_statistics(stats)


def describe_statistics(stats: jaxsd.Statistics) -> dict[str, Any]:
    """The counts of all rows together, and what they mean, as JSON values."""
    stats = stats_lib.total(jax.tree.map(jax.numpy.asarray, stats))
    return {
        "num_rounds": int(stats.num_rounds),
        "num_drafted": int(stats.num_drafted),
        "num_accepted": int(stats.num_accepted),
        "acceptance_rate": float(stats_lib.acceptance_rate(stats)),
        "acceptance_by_position": [
            float(share) for share in stats_lib.acceptance_by_position(stats)
        ],
        "mean_acceptance_length": float(stats_lib.mean_acceptance_length(stats)),
    }


def _check_drafter(drafter: str, num_tokens: int | None, plain: bool) -> tuple[str, int]:
    if plain:
        drafter = "none"
    if drafter == "none":
        if num_tokens:
            raise ValueError(f"num_draft_tokens={num_tokens} needs a drafter, and there is none")
        return drafter, 0
    if num_tokens is None:
        return drafter, DEFAULT_NUM_DRAFT_TOKENS
    if num_tokens < 1:
        raise ValueError(
            f"num_draft_tokens={num_tokens} with drafter {drafter!r} must be at least 1; for plain "
            "decoding use --plain"
        )
    return drafter, num_tokens


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ValueError("prompt and prompt_file exclude each other")
    try:
        if prompt_file == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8")
        elif prompt_file is not None:
            prompt = pathlib.Path(prompt_file).read_bytes().decode("utf-8")
        text = prompt or ""
        text.encode("utf-8")  # bytes of the command line that are no UTF-8 become lone surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"the prompt is not UTF-8 text ({error.reason})") from error
    return text


def _show(console: rich.console.Console, statistics: dict[str, Any]) -> None:
    parts = [f"{statistics['num_tokens']} tokens in {statistics['num_rounds']} rounds"]
    if statistics["tokens_per_second"] is not None:
        parts.append(f"{statistics['tokens_per_second']:.0f} tokens/s")
    if statistics["num_drafted"]:
        shares = " ".join(f"{share:.2f}" for share in statistics["acceptance_by_position"])
        parts.append(f"mean acceptance length {statistics['mean_acceptance_length']:.2f}")
        parts.append(f"acceptance by position {shares}")
    parts.append(f"first round, with compilation, {statistics['first_round_seconds']:.1f} s")
    console.print("; ".join(parts), style="dim")
