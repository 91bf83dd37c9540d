"""Text to token batches: which files, which tokenizer, which batch at which step.

Every choice is a pure function of its inputs. A file is held out because of its name, not of its
place in a list; the batch of a step is known from the seed and the step alone. So a training run
can be killed anywhere and continued without any iterator state, and two models trained on the
same folder saw the same text.
"""

import codecs
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
HELD_OUT_FRACTION = 0.05

# Not sources of the library itself, or sources no one reads: tests are long and repetitive.
STANDARD_LIBRARY_EXCLUDE = (
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
)


# -- files ----------------------------------------------------------------------------------------


class Document(NamedTuple):
    """One text file."""

    path: str  # relative to the folder it was found in, with forward slashes
    text: str


class Files(NamedTuple):
    """What `read_files` found."""

    documents: list[Document]  # sorted by path
    num_skipped: int  # files that are not UTF-8


def standard_library() -> pathlib.Path:
    """The folder of the running interpreter's own Python sources: a corpus every machine has."""
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def read_files(
    folder: str | os.PathLike,
    suffixes: Sequence[str] = (".py",),
    *,
    exclude: Sequence[str] = ("__pycache__",),
) -> Files:
    """Reads all text files below a folder, in sorted order, byte for byte (no newline translation).

    Args:
      folder: where to look, recursively; symbolic links to folders are not followed.
      suffixes: the endings of file names to read.
      exclude: names of folders to pass over, wherever they lie.

    Returns:
      The documents sorted by relative path; empty files and files that are not UTF-8 are left out,
      the latter counted.

    Raises:
      ValueError: the folder does not exist or holds no such text, or a file cannot be read.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"corpus folder {str(folder)!r} does not exist or is not a folder")
    paths = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in exclude]
        paths += [pathlib.Path(where, name) for name in names if name.endswith(tuple(suffixes))]
    documents, num_skipped = [], 0
    for relative, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
        if not path.is_file():
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            num_skipped += 1
            continue
        except OSError as error:
            raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from error
        if text:
            documents.append(Document(relative, text))
    if not documents:
        endings = ", ".join(suffixes)
        raise ValueError(f"corpus folder {str(folder)!r} holds no UTF-8 file ending in {endings}")
    return Files(documents, num_skipped)


def is_held_out(path: str, fraction: float = HELD_OUT_FRACTION) -> bool:
    """Whether the file of this relative path belongs to the held-out side, whatever its content.

    A hash of the path decides, so that adding or removing other files moves nothing across.

    >>> [name for name in ("ast.py", "json/tool.py", "traceback.py") if is_held_out(name)]
    ['traceback.py']
    """
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def split_documents(
    documents: Iterable[Document], fraction: float = HELD_OUT_FRACTION
) -> tuple[list[Document], list[Document]]:
    """Splits by file into `(train, held_out)`, keeping the order; see `is_held_out`."""
    train, held_out = [], []
    for document in documents:
        (held_out if is_held_out(document.path, fraction) else train).append(document)
    return train, held_out


# -- tokenizers -----------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """What training, checkpoints and the command line need of a tokenizer.

    `decode(encode(text)) == text` for every text that UTF-8 can hold. `encode` never returns
    `eos_id`, not even for a text that spells the marker out, and raises ValueError for a text
    that UTF-8 cannot hold (lone surrogates).
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the end-of-text token included."""
        ...

    @property
    def eos_id(self) -> int:
        """Id of the token between documents; it stands for no bytes."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, end of text becomes nothing."""
        ...

    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for, `vocab_size` of them; empty for `eos_id`."""
        ...

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` into an existing folder; `load_tokenizer` reads it."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what an id means; equal exactly if the ids agree."""
        ...


class ByteTokenizer:
    """One id per byte, 0 to 255, and 256 for end of text.

    >>> ByteTokenizer().encode("né")
    [110, 195, 169]
    >>> ByteTokenizer().decode([110, 195, 169, 256])
    'né'
    """

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of the text."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes; see `Tokenizer.decode`."""
        return _decode(self.token_bytes(), ids)

    def token_bytes(self) -> list[bytes]:
        """`[b"\\x00", ..., b"\\xff", b""]`."""
        return [bytes([byte]) for byte in range(256)] + [b""]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json`, which here only says that ids are bytes."""
        text = json.dumps({"type": "bytes", "vocab_size": 257, "eos_id": 256})
        pathlib.Path(folder, TOKENIZER_FILE).write_text(text + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`."""
        return fingerprint(["bytes"])


class BPETokenizer:
    """Byte-level byte-pair encoding (GPT-2's alphabet and word splitting), by `tokenizers`.

    Id 0 is `<|endoftext|>`, ids 1 to 256 are the single bytes, the others are merges in the order
    they were learnt. Make one with `train_bpe` or `load_tokenizer`.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        if problems := _bpe_problems(json.loads(tokenizer.to_str())):
            raise ValueError("; ".join(problems))
        # Otherwise a document that spells the marker out would be cut in two, and not read back.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._token_bytes = _bpe_token_bytes(tokenizer)
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.eos_id: int = tokenizer.get_vocab()[END_OF_TEXT]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; see `Tokenizer.encode`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on several threads."""
        for text in texts:
            text.encode("utf-8")  # the library calls a lone surrogate a TypeError
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; see `Tokenizer.decode`."""
        return _decode(self._token_bytes, ids)

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id; see `Tokenizer.token_bytes`."""
        return list(self._token_bytes)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `tokenizer.json` in the format of the `tokenizers` library."""
        self._tokenizer.save(str(pathlib.Path(folder, TOKENIZER_FILE)), pretty=False)

    def fingerprint(self) -> str:
        """See `Tokenizer.fingerprint`: vocabulary, merges and how text is cut into words."""
        content = json.loads(self._tokenizer.to_str())
        parts = {key: content.get(key) for key in ("model", "normalizer", "pre_tokenizer")}
        return fingerprint(["bpe", parts])


def train_bpe(texts: Iterable[str], vocab_size: int = 2048) -> BPETokenizer:
    """Learns a byte-level BPE; the same texts give the same tokenizer.

    Args:
      texts: training text; give it the train side only.
      vocab_size: pieces in all, at least 257: end of text, the 256 bytes, and merges. Fewer come
        out if the text has too few pairs to merge.

    Returns:
      The tokenizer; `.vocab_size` is the true number of pieces.

    Raises:
      ValueError: `vocab_size` is below 257.

    >>> tokenizer = train_bpe(["def f(x):\\n    return x\\n"] * 9, vocab_size=300)
    >>> [tokenizer.decode([i]) for i in tokenizer.encode("    return x")]
    ['  ', ' ', ' return', ' x']
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least 257: 256 bytes and end of text")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BPETokenizer(tokenizer)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Reads the `tokenizer.json` of a folder (a model folder, for example).

    Raises:
      ValueError: the file is missing, is not JSON, or is no byte-level BPE with all 256 bytes.
    """
    path = pathlib.Path(folder, TOKENIZER_FILE)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read tokenizer {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"tokenizer {str(path)!r} is not JSON: {error}") from error
    if isinstance(content, dict) and content.get("type") == "bytes":
        return ByteTokenizer()
    try:
        return BPETokenizer(tokenizers.Tokenizer.from_str(text))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise ValueError(f"tokenizer {str(path)!r} is not usable: {error}") from error


class StreamingDecoder:
    """Text from tokens as they come: a character is given out when its last byte is there.

    The pieces joined equal `tokenizer.decode` of all ids. Make one per stream.

    >>> decoder = StreamingDecoder(ByteTokenizer())
    >>> [decoder.push([byte]) for byte in "né!".encode()]
    ['n', '', 'é', '!']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text these ids complete; bytes in the middle of a character are held back."""
        return self._decoder.decode(b"".join(self._token_bytes[i] for i in ids))

    def finish(self) -> str:
        """What is left: U+FFFD if the stream broke off inside a character, else nothing."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _decode(token_bytes: Sequence[bytes], ids: Iterable[int]) -> str:
    return b"".join(token_bytes[int(i)] for i in ids).decode("utf-8", "replace")


def fingerprint(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _bpe_problems(content: Mapping[str, Any]) -> list[str]:
    """What in a `tokenizer.json` would make encoding lossy or ids mean something else."""
    model = content.get("model") or {}
    words = content.get("pre_tokenizer") or {}
    added = [token.get("content") for token in content.get("added_tokens") or []]
    required = (
        ("model.type", model.get("type"), "BPE"),
        ("model.dropout", model.get("dropout"), None),
        ("model.unk_token", model.get("unk_token"), None),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix"), None),
        ("model.end_of_word_suffix", model.get("end_of_word_suffix"), None),
        ("pre_tokenizer.type", words.get("type"), "ByteLevel"),
        ("pre_tokenizer.add_prefix_space", words.get("add_prefix_space"), False),
        ("normalizer", content.get("normalizer"), None),
        ("truncation", content.get("truncation"), None),
        ("padding", content.get("padding"), None),
        ("added_tokens", added, [END_OF_TEXT]),
    )
    return [
        f"{name} is {found!r}, not {wanted!r}"
        for name, found, wanted in required
        if found != wanted
    ]


def _bpe_token_bytes(tokenizer: tokenizers.Tokenizer) -> list[bytes]:
    """Bytes of each id, from the printable characters that stand for them in the vocabulary."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    pieces = tokenizer.get_vocab()
    if sorted(pieces.values()) != list(range(len(pieces))):
        raise ValueError("token ids are not 0 to vocab_size - 1")
    if missing := [byte for character, byte in byte_of.items() if character not in pieces]:
        raise ValueError(f"{len(missing)} of the 256 bytes are missing from the vocabulary")
    result = [b""] * len(pieces)
    for piece, i in pieces.items():
        if piece == END_OF_TEXT:
            continue
        if not all(character in byte_of for character in piece):
            raise ValueError(f"piece {piece!r} is not made of bytes")
        result[i] = bytes(byte_of[character] for character in piece)
    return result


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself if printable in Latin-1, else from U+0100.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py, `bytes_to_unicode`.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, num_moved = [], 0
    for byte in range(256):
        characters.append(chr(byte if byte in printable else 0x100 + num_moved))
        num_moved += byte not in printable
    return characters


# -- tokens ---------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """A tokenized corpus."""

    train: np.ndarray  # [num_tokens] int32; documents, each followed by end of text
    held_out: np.ndarray  # [num_held_out_tokens] int32, likewise, of files never trained on
    num_files: int
    num_skipped: int  # files left out because they are not UTF-8
    num_bytes: int  # UTF-8 bytes of the train side
    num_held_out_bytes: int
    fingerprint: str  # SHA-256 of both token streams


def encode_corpus(
    files: Files, tokenizer: Tokenizer, fraction: float = HELD_OUT_FRACTION
) -> Corpus:
    """Splits files by name and turns both sides into token streams.

    Raises:
      ValueError: one of the two sides is empty.
    """
    train, held_out = split_documents(files.documents, fraction)
    if not train or not held_out:
        raise ValueError(
            f"{len(files.documents)} files are too few to split: "
            f"{len(train)} for training, {len(held_out)} held out"
        )
    streams = [_stream(side, tokenizer) for side in (train, held_out)]
    digest = hashlib.sha256()
    for stream in streams:
        digest.update(len(stream).to_bytes(8, "little") + stream.astype("<i4").tobytes())
    num_bytes, num_held_out_bytes = (
        sum(len(document.text.encode("utf-8")) for document in side) for side in (train, held_out)
    )
    return Corpus(
        *streams,
        num_files=len(files.documents),
        num_skipped=files.num_skipped,
        num_bytes=num_bytes,
        num_held_out_bytes=num_held_out_bytes,
        fingerprint=digest.hexdigest(),
    )


def _stream(documents: Sequence[Document], tokenizer: Tokenizer) -> np.ndarray:
    encoded: list[np.ndarray] = []
    # A few documents at a time: lists of Python integers are ten times as large as the array.
    for start in range(0, len(documents), 256):
        texts = [document.text for document in documents[start : start + 256]]
        for ids in tokenizer.encode_batch(texts):
            encoded.append(np.array([*ids, tokenizer.eos_id], np.int32))
    return np.concatenate(encoded)


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batch of every step, as a pure function of `(seed, step)`.

    The stream is cut into windows of `sequence_length` tokens that do not overlap, each read with
    the one token after it, its last label. An epoch visits every window once, in an order and from
    an offset of its own. A batch may hold the end of one epoch and the start of the next.

    Args:
      tokens: `[num_tokens]` int32.
      batch_size: windows per batch.
      sequence_length: predicted tokens per window.
      seed: of order and offsets.

    Raises:
      ValueError: a size is not positive, or the stream is shorter than one window at any offset.

    >>> batches = Batches(np.arange(100, dtype=np.int32), batch_size=2, sequence_length=8, seed=1)
    >>> batches(500).shape
    (2, 9)
    >>> bool((batches(500) == batches(500)).all())
    True
    """

    tokens: np.ndarray
    batch_size: int
    sequence_length: int
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if len(self.tokens) < 2 * self.sequence_length:
            raise ValueError(
                f"{len(self.tokens)} tokens are too few for sequence_length="
                f"{self.sequence_length}: at least {2 * self.sequence_length} are needed"
            )

    @property
    def windows_per_epoch(self) -> int:
        """Windows that fit whatever the offset, so that all epochs are equally long."""
        return (len(self.tokens) - self.sequence_length) // self.sequence_length

    def __call__(self, step: int) -> np.ndarray:
        """`[batch_size, sequence_length + 1]` int32: inputs are `[:, :-1]`, labels `[:, 1:]`."""
        windows = step * self.batch_size + np.arange(self.batch_size)
        epochs, places = np.divmod(windows, self.windows_per_epoch)
        starts = [self._starts(e)[p] for e, p in zip(epochs.tolist(), places, strict=True)]
        return self.tokens[np.array(starts)[:, None] + np.arange(self.sequence_length + 1)]

    def _starts(self, epoch: int) -> np.ndarray:
        return _window_starts(
            self.seed, epoch, len(self.tokens), self.sequence_length, self.windows_per_epoch
        )


@functools.lru_cache(maxsize=4)
def _window_starts(
    seed: int, epoch: int, num_tokens: int, sequence_length: int, num_windows: int
) -> np.ndarray:
    """First token of each window, in the order of this epoch. `[num_windows]`"""
    rng = np.random.default_rng([seed, epoch])
    # The last window needs its last label, hence the one token less.
    offset = rng.integers(num_tokens - num_windows * sequence_length)
    return offset + sequence_length * rng.permutation(num_windows)


def held_out_windows(tokens: np.ndarray, num_windows: int, sequence_length: int) -> np.ndarray:
    """Windows spread evenly over a stream, always the same. `[N, sequence_length + 1]` int32.

    N is `num_windows`, or as many as fit without overlap if that is fewer.

    Raises:
      ValueError: not one window fits.
    """
    fitting = (len(tokens) - 1) // sequence_length
    if fitting < 1:
        raise ValueError(
            f"{len(tokens)} held-out tokens are too few for sequence_length={sequence_length}"
        )
    chosen = np.linspace(0, fitting - 1, min(num_windows, fitting)).round().astype(np.int64)
    return tokens[sequence_length * chosen[:, None] + np.arange(sequence_length + 1)]


def held_out_prompts(
    tokenizer: Tokenizer, tokens: np.ndarray, num_prompts: int, length: int, *, seed: int = 0
) -> np.ndarray:
    """Picks prompts from a held-out stream: `[num_prompts, length]` int32.

    Each starts at the beginning of a line and lies within one document, so that it reads as text
    and asks for what the model was trained to do. No two start at the same token.

    Raises:
      ValueError: the stream has fewer such places.
    """
    ends_line = np.array([piece.endswith(b"\n") for piece in tokenizer.token_bytes()])
    ends_line[tokenizer.eos_id] = True
    starts = 1 + np.flatnonzero(ends_line[tokens[:-1]])
    num_ends = np.concatenate([[0], np.cumsum(tokens == tokenizer.eos_id)])
    starts = starts[starts + length <= len(tokens)]
    starts = starts[num_ends[starts + length] == num_ends[starts]]
    if len(starts) < num_prompts:
        raise ValueError(
            f"only {len(starts)} places for prompts of {length} tokens, {num_prompts} wanted"
        )
    chosen = np.random.default_rng(seed).choice(len(starts), num_prompts, replace=False)
    return tokens[starts[chosen][:, None] + np.arange(length)].astype(np.int32)
