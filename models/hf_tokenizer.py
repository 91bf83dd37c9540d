"""Published tokenizers: a `tokenizer.json` of the `tokenizers` library as our `Tokenizer`."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from . import corpus


class HFTokenizer:
    """A published byte-pair tokenizer whose every id stands for bytes.

    Two kinds: byte-level (GPT-2, Llama 3, Qwen, Pythia), and SentencePiece's with a byte for every
    character it lacks (Llama 1 and 2, Mistral, Gemma). `encode` adds nothing in front and reads
    special tokens as the text they are; `encode_prompt` adds what the model saw in front of every
    text in training.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_id: int):
        content = json.loads(tokenizer.to_str())
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.eos_id = eos_id
        self._token_bytes = _token_bytes(tokenizer, content, self.vocab_size)
        # Otherwise a text that spells out a special token would be cut in two.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._meaning = {
            key: content.get(key)
            for key in ("model", "normalizer", "pre_tokenizer", "added_tokens", "decoder")
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on several threads."""
        return self._encode(texts, False)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text as a model expects it: begin-of-text in front, where there is one."""
        return self._encode([text], True)[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out, as the `tokenizers` library puts it.

        It takes off the space that SentencePiece puts in front of a text.
        """
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id; see `Tokenizer.token_bytes`. None for special tokens."""
        return list(self._token_bytes)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` in the format of the `tokenizers` library."""
        self._tokenizer.save(str(pathlib.Path(folder, corpus.TOKENIZER_FILE)))

    def fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`: vocabulary, merges and how text is cut into words."""
        return corpus.fingerprint(["hf", self._meaning])

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        for text in texts:
            text.encode("utf-8")  # the library calls a lone surrogate a TypeError
        encodings = self._tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]


def read_tokenizer(text: str, eos_id: int) -> HFTokenizer:
    """The tokenizer of the text of a `tokenizer.json`.

    Args:
      text: JSON.
      eos_id: the token that ends a text: the file itself does not say which.

    Raises:
      ValueError: it cannot be read, or its ids do not all stand for bytes.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise ValueError(str(error)) from error
    return HFTokenizer(tokenizer, eos_id)


def _token_bytes(
    tokenizer: tokenizers.Tokenizer, content: Mapping[str, Any], vocab_size: int
) -> list[bytes]:
    """Bytes of each id; ids without a token, and special tokens, have none."""
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise ValueError(f"model.type is {model.get('type')!r}, not 'BPE'")
    read_piece = _byte_level if "ByteLevel" in _types(content.get("decoder")) else _sentence_piece
    if read_piece is _sentence_piece and not model.get("byte_fallback"):
        raise ValueError("neither is the decoder 'ByteLevel' nor has the model byte_fallback")
    result = [b""] * vocab_size
    for piece, i in tokenizer.get_vocab(with_added_tokens=False).items():
        result[i] = read_piece(piece)
    for token in content.get("added_tokens") or []:
        special = token.get("special", False)
        result[token["id"]] = b"" if special else token["content"].encode("utf-8")
    return result


def _types(part: Any) -> set[str]:
    """The types of a part of a tokenizer.json and, if it is a sequence, of what is in it."""
    if not isinstance(part, dict):
        return set()
    inner = [one for key in ("decoders", "pretokenizers") for one in part.get(key) or []]
    return {str(part.get("type"))}.union(*map(_types, inner))


_BYTE_OF = {character: byte for byte, character in enumerate(corpus.byte_characters())}


def _byte_level(piece: str) -> bytes:
    if not all(character in _BYTE_OF for character in piece):
        return piece.encode("utf-8")  # an added token that the vocabulary repeats
    return bytes(_BYTE_OF[character] for character in piece)


def _sentence_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode("utf-8")
