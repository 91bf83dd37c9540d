"""Published checkpoints: a local Hugging Face folder to our parameters, and back.

Everything wrong with the tensors is reported at once. They are read one by one into their place in
the final arrays, so that memory holds the parameters and little more; `hf_files.py` says where in
which file each lies.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from . import atomic, checkpoint, corpus, families, hf_files, hf_names, hf_tokenizer, sharding
from .configs import Config
from .hf_files import INDEX_FILE
from .transformer import abstract_params

GENERATION_FILE = "generation_config.json"


class HFModel(NamedTuple):
    """A model read from a Hugging Face folder."""

    config: Config
    params: dict[str, Any]  # nested, as `init_params` makes it
    tokenizer: hf_tokenizer.HFTokenizer | None  # None: see metadata["tokenizer_problem"]
    eos_ids: tuple[int, ...]  # what ends a text; for `speculative(..., eos_id=...)`
    metadata: dict[str, Any]  # "model_type", "config", "generation_config", "tokenizer_problem"


def load_hf(
    folder: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules = sharding.TENSOR,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
    ignore: Collection[str] = (),
) -> HFModel:
    """Reads a Hugging Face folder: its JSON files, its safetensors, its tokenizer.

    Families, by `model_type`: llama (1, 2, 3, 3.1, 3.2), mistral, qwen2 (1.5, 2, 2.5), qwen3,
    gemma2, gemma3_text, gpt_neox (Pythia), gpt2, opt. Nothing is downloaded and nothing unpickled.
    Peak memory is that of the parameters on this host and at most 1.2 times the largest array more.

    Args:
      folder: with config.json, and model.safetensors or shards and model.safetensors.index.json;
        where they are, tokenizer.json and generation_config.json are read too.
      dtype: type of the parameters; None keeps the stored type.
      mesh: devices to divide the parameters among; each array goes there as soon as it is read.
        In a program of several processes all of them call this with a mesh of all devices.
      rules: from logical axis to mesh axis; see `jaxsd.models.sharding`.
      place: instead of a mesh: puts one finished array, given its dotted name, where it belongs.
        Default: `jax.device_put`, which on a CPU copies nothing.
      ignore: fields of config.json to pass over, where an unknown one is known to be harmless.

    Returns:
      Config, parameters, tokenizer (None if there is none, or none of a kind that is read), the
      tokens that end a text, and what the JSON files say.

    Raises:
      ValueError: names the folder and every problem: of the files, or of the config's fields, or
        every tensor that is missing, unexpected, of another shape or not finite. Also where both
        `mesh` and `place` are given, or the rules do not fit the mesh.

    >>> import pathlib, tempfile, jax
    >>> from jaxsd import models
    >>> config = models.CONFIGS["tiny"]
    >>> params = models.init_params(config, jax.random.key(0))
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "llama"
    >>> models.export_hf(folder, config, params)
    >>> models.load_hf(folder).config == config
    True
    >>> mesh = models.sharding.make_mesh(data=1, model=1)
    >>> tuple(models.load_hf(folder, mesh=mesh).params["embedding"].sharding.spec)
    ('model',)
    """
    if mesh is not None:
        if place is not None:
            raise ValueError(f"mesh={mesh} and place={place} both say where arrays go; give one")
        place = sharding.placer(mesh, rules)
    folder = pathlib.Path(folder)
    files = hf_files.Folder(folder)
    content = files.read_json(checkpoint.CONFIG_FILE)
    generation = files.read_json(GENERATION_FILE, required=False)
    names, listed = files.weight_files()
    files.raise_problems()
    try:
        config = families.read_config(content, ignore)
    except ValueError as error:
        raise ValueError(
            f"cannot load checkpoint {str(folder)!r}: {checkpoint.CONFIG_FILE}: {error}"
        ) from error

    family = families.FAMILIES[content["model_type"]]
    tensors = hf_files.Tensors({name: files.path(name) for name in names})
    files.problems += tensors.problems
    files.raise_problems()
    wanted = _match(family, config, tensors, listed)
    params = _read_leaves(config, wanted, tensors, dtype, place or _place_by_default)
    eos_ids = _eos_ids(generation, content, tensors.problems)
    tokenizer, problem = _read_tokenizer(files, eos_ids, config)
    files.problems += tensors.problems
    files.raise_problems()
    metadata = {
        "model_type": content["model_type"],
        "config": content,
        "generation_config": generation,
        "tokenizer_problem": problem,
    }
    return HFModel(config, params, tokenizer, eos_ids, metadata)


def export_hf(
    folder: str | os.PathLike,
    config: Config,
    params: Mapping[str, Any],
    *,
    model_type: str | None = None,
    tokenizer: hf_tokenizer.HFTokenizer | corpus.BPETokenizer | None = None,
    eos_ids: Iterable[int] = (),
    fields: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """Writes a folder that `load_hf`, and `transformers`, read; replaces one that is there.

    Tensors keep their type: parameters loaded in the stored type come back byte for byte.

    Args:
      folder: where; its parents are made.
      config: the shape of `params`.
      params: nested dict of float32, float16 or bfloat16 arrays.
      model_type: the family to write; None: the first that can say all of the config.
      tokenizer: saved with the model.
      eos_ids: what ends a text.
      fields: more fields of config.json, such as `max_position_embeddings`; the
        `metadata["config"]` of a loaded model is welcome.
      max_shard_bytes: a file grows no larger, unless one tensor does.

    Raises:
      ValueError: no family can say the config, or the parameters do not fit it.
    """
    folder = pathlib.Path(folder).absolute()
    given = dict(fields or {})
    content = families.write_config(config, model_type or given.get("model_type"))
    # Written by us in the older form, which every version of transformers reads.
    content = {**{name: given[name] for name in given if name not in _REWRITTEN}, **content}
    leaves = {name: np.asarray(leaf) for name, leaf in checkpoint.flatten(params).items()}
    problems = checkpoint.tensor_problems(config, leaves)
    problems += [
        f"tensor {name} has type {leaf.dtype}"
        for name, leaf in leaves.items()
        if leaf.dtype not in checkpoint.DTYPES.values()
    ]
    if families.read_config(content) != config:
        problems.append(f"fields={given!r} say something else than the config")
    if problems:
        raise ValueError(f"cannot export model {str(folder)!r}: {'; '.join(problems)}")
    content["torch_dtype"] = leaves["embedding"].dtype.name
    eos = [int(one) for one in eos_ids]
    if eos:
        content["eos_token_id"] = eos[0] if len(eos) == 1 else eos

    temporary = atomic.hidden_sibling(folder, "writing")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed here
    temporary.mkdir(parents=True)
    wanted = families.pieces(families.FAMILIES[content["model_type"]], config)
    _write_tensors(temporary, wanted, leaves, max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(temporary)
    if eos:
        generation = atomic.json_bytes({"eos_token_id": content["eos_token_id"]})
        atomic.write_bytes(temporary / GENERATION_FILE, generation)
    atomic.write_bytes(temporary / checkpoint.CONFIG_FILE, atomic.json_bytes(content))
    atomic.sync_folder(temporary)
    atomic.replace_folder(temporary, folder)


_REWRITTEN = ("rope_parameters", "dtype")


# -- tensors ---------------------------------------------------------------------------------------


def _match(
    family: families.Family,
    config: Config,
    tensors: hf_files.Tensors,
    listed: Mapping[str, str] | None,
) -> list[families.Piece]:
    """The pieces whose tensors are there and fit. All that is wrong goes to the problems."""
    found, problems = tensors.entries, tensors.problems
    for name, file in (listed or {}).items():
        if tensors.files.get(name) != file:
            problems.append(f"tensor {name} is not in {file}, where {INDEX_FILE} says it is")
    if listed is not None and (extra := sorted(found.keys() - listed.keys())):
        problems.append(f"tensors {', '.join(extra)} are not in {INDEX_FILE}")
    # Before anything is built: a damaged config can ask for more layers than memory holds.
    if config.n_layers > len(found):
        problems.append(f"{len(found)} tensors cannot hold n_layers={config.n_layers}")
        return []
    try:
        wanted = families.pieces(family, config)
    except (OverflowError, TypeError, ValueError) as error:
        problems.append(f"no parameters have the shape of the config ({error})")
        return []
    has_prefix = any(name.startswith(family.prefix) for name in found)
    if not has_prefix:
        wanted = [piece._replace(name=piece.name.removeprefix(family.prefix)) for piece in wanted]
    names = {piece.name for piece in wanted}
    allowed = names | {hf_names.HEAD_NAME} if config.tie_embeddings else names
    if missing := sorted(names - found.keys()):
        problems.append(f"missing tensors {', '.join(missing)}")
    unexpected = [
        name for name in sorted(found.keys() - allowed) if not families.is_skipped(family, name)
    ]
    if unexpected:
        problems.append(f"unexpected tensors {', '.join(unexpected)}")
    good = []
    for piece in wanted:
        entry = found.get(piece.name)
        if entry is None:
            continue
        if entry.shape != piece.shape:
            problems.append(
                f"tensor {piece.name} has shape {entry.shape}, the config asks for {piece.shape}"
            )
        elif entry.dtype not in checkpoint.DTYPES:
            problems.append(
                f"tensor {piece.name} has type {entry.dtype}; supported: "
                f"{', '.join(checkpoint.DTYPES)}"
            )
        else:
            good.append(piece)
    return good


def _read_leaves(
    config: Config,
    wanted: list[families.Piece],
    tensors: hf_files.Tensors,
    dtype: Any,
    place: Callable[[str, np.ndarray], jax.Array],
) -> dict[str, Any]:
    """Fills one leaf after the other. With problems, the tensors are only looked at."""
    by_leaf: dict[str, list[families.Piece]] = {}
    for piece in wanted:
        by_leaf.setdefault(piece.leaf, []).append(piece)
    shapes = checkpoint.flatten(abstract_params(config)) if by_leaf else {}
    params = {}
    # The largest first: a second copy of an array, in passing, costs nothing as long as as much
    # is still to come.
    for leaf in sorted(by_leaf, key=lambda leaf: -math.prod(shapes[leaf].shape)):
        array = _read_leaf(by_leaf[leaf], shapes[leaf].shape, tensors, dtype)
        if leaf == "embedding" and config.tie_embeddings:
            _check_tied_head(tensors, array)
        if not tensors.problems:
            # Waited for, so that no more than one array is on its way.
            params[leaf] = jax.block_until_ready(place(leaf, array))
    return checkpoint.unflatten(params)


def _read_leaf(
    wanted: list[families.Piece], shape: tuple[int, ...], tensors: hf_files.Tensors, dtype: Any
) -> np.ndarray:
    if dtype is None:
        stored = {tensors.dtype(piece.name) for piece in wanted}
        dtype = stored.pop() if len(stored) == 1 else np.float32
    array = _aligned_empty(shape, jnp.dtype(dtype))
    for piece in wanted:
        view = piece.view(array)
        tensors.read_into(piece.name, view, piece.is_transposed)
        if num_bad := _num_not_finite(view):
            tensors.problems.append(
                f"tensor {piece.name} has {num_bad} values that are not finite as {array.dtype}"
            )
    return array


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that begins where JAX can take it over on a CPU, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


_ALIGNMENT = 64


def _place_by_default(name: str, array: np.ndarray) -> jax.Array:
    del name
    return jax.device_put(array)


def _check_tied_head(tensors: hf_files.Tensors, embedding: np.ndarray) -> None:
    """A head that is stored beside the embedding it is tied to must be the same."""
    entry = tensors.entries.get(hf_names.HEAD_NAME)
    if entry is None:
        return
    if entry.dtype not in checkpoint.DTYPES or entry.shape != embedding.shape:
        same = False
    else:
        head = tensors.read(hf_names.HEAD_NAME)
        rows = zip(head, embedding, strict=True)
        same = all(np.array_equal(ours.astype(theirs.dtype), theirs) for ours, theirs in rows)
    if not same:
        tensors.problems.append(
            f"tensor {hf_names.HEAD_NAME} is not the embedding, to which the config ties it"
        )


def _num_not_finite(array: np.ndarray) -> int:
    """Counted by rows, for the masks of a whole array would add to the peak of memory."""
    if array.ndim == 0:
        return int(not np.isfinite(array))
    step = max(1, _CHUNK * len(array) // max(1, array.size))
    return sum(
        int(np.count_nonzero(~np.isfinite(array[start : start + step])))
        for start in range(0, len(array), step)
    )


_CHUNK = 2**20


def _write_tensors(
    folder: pathlib.Path,
    wanted: list[families.Piece],
    leaves: Mapping[str, Any],
    max_shard_bytes: int,
) -> None:
    sizes = [math.prod(piece.shape) * leaves[piece.leaf].dtype.itemsize for piece in wanted]
    shards = list(_shards(wanted, sizes, max_shard_bytes))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = checkpoint.WEIGHTS_FILE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {piece.name: _take_piece(piece, leaves[piece.leaf]) for piece in shard}
        weight_map |= dict.fromkeys(tensors, name)
        atomic.write_bytes(folder / name, safetensors.numpy.save(tensors, {"format": "pt"}))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        atomic.write_bytes(folder / INDEX_FILE, atomic.json_bytes(index))


def _take_piece(piece: families.Piece, leaf: Any) -> np.ndarray:
    """The tensor of a checkpoint, out of our array."""
    view = piece.view(np.asarray(leaf))
    shape = piece.shape[::-1] if piece.is_transposed else piece.shape
    flat = view.reshape(shape)
    return np.ascontiguousarray(flat.T if piece.is_transposed else flat)


def _shards(
    wanted: list[families.Piece], sizes: list[int], max_bytes: int
) -> Iterator[list[families.Piece]]:
    shard, total = [], 0
    for piece, size in zip(wanted, sizes, strict=True):
        if shard and total + size > max_bytes:
            yield shard
            shard, total = [], 0
        shard.append(piece)
        total += size
    yield shard


# -- tokenizer and end of text --------------------------------------------------------------------


def _eos_ids(
    generation: Mapping[str, Any], content: Mapping[str, Any], problems: list[str]
) -> tuple[int, ...]:
    for source, name in ((generation, GENERATION_FILE), (content, checkpoint.CONFIG_FILE)):
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
            problems.append(f"{name}: eos_token_id={value!r} must be one token id or a list")
            continue
        return tuple(ids)
    return ()


def _read_tokenizer(
    files: hf_files.Folder, eos_ids: tuple[int, ...], config: Config
) -> tuple[hf_tokenizer.HFTokenizer | None, str | None]:
    """The tokenizer, or None and why."""
    name = corpus.TOKENIZER_FILE
    if not files.path(name).is_symlink() and not files.path(name).exists():
        return None, f"{name} is missing"
    text = files.read_text(name)
    try:
        json.loads(text or "")
    except (ValueError, RecursionError) as error:
        files.problems.append(f"{name} is not JSON ({error})")
        return None, None
    if text is None or not eos_ids:
        return None, "no eos_token_id says which token ends a text"
    try:
        tokenizer = hf_tokenizer.read_tokenizer(text, eos_ids[0])
    except ValueError as error:
        return None, f"{name}: {error}"
    if tokenizer.vocab_size > config.vocab_size:
        size = tokenizer.vocab_size
        return None, f"{name} has ids up to {size - 1}, vocab_size is {config.vocab_size}"
    return tokenizer, None
