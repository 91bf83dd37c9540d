"""Model folders: a finished model on disk, whole or refused.

A folder holds `config.json` (shape, checksum, metadata), `tokenizer.json` and `model.safetensors`,
or in its place, where many devices wrote it, a folder `weights` of orbax. It is checked whole
before anything in it is used, and comes into being under another name and is renamed, so that a
folder that is there is a folder that was finished. Nothing is unpickled.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from . import atomic, corpus, sharding, states
from .configs import Config
from .transformer import abstract_params

MODEL_FORMAT = "jaxsd-model-1"
SHARDED_FORMAT = "jaxsd-model-2"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_FOLDER = "weights"

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
EXPORT_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"]}


class Pretrained(NamedTuple):
    """A model read from a folder."""

    config: Config
    params: dict[str, Any]  # nested, as `init_params` makes it
    tokenizer: corpus.Tokenizer
    metadata: dict[str, Any]  # what training recorded; holds "tokenizer_fingerprint"


def save_model(
    folder: str | os.PathLike,
    config: Config,
    params: Mapping[str, Any],
    tokenizer: corpus.Tokenizer,
    *,
    dtype: str = "bfloat16",
    metadata: Mapping[str, Any] | None = None,
    sharded: bool = False,
) -> None:
    """Writes a model folder that `load_model` reads; replaces one that is there.

    All files are written to a hidden sibling folder which is then renamed, so a reader, or a
    power cut, never meets half a model. In a program of several processes all of them call this,
    with one folder that all of them see.

    Args:
      folder: where; its parents are made.
      config: the shape of `params`.
      params: nested dict of arrays; dotted paths become tensor names.
      tokenizer: saved with the model; its size must be the config's.
      dtype: "bfloat16" or "float32", the type of the stored tensors.
      metadata: JSON values about the training (data, steps, losses).
      sharded: every device writes its own part, and no process needs room for all of them.

    Raises:
      ValueError: unknown dtype, parameters that do not fit the config, non-finite parameters, a
        tokenizer of another size, or parameters that only several processes hold together, which
        take `sharded=True`.
    """
    if dtype not in EXPORT_DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(EXPORT_DTYPES)}")
    folder = pathlib.Path(folder).absolute()
    tensors = _cast(flatten(params), EXPORT_DTYPES[dtype], sharded)
    problems = tensor_problems(config, tensors)
    if tokenizer.vocab_size != config.vocab_size:
        problems.append(
            f"tokenizer has {tokenizer.vocab_size} tokens, config.vocab_size is {config.vocab_size}"
        )
    if problems:
        raise ValueError(f"cannot save model {str(folder)!r}: {'; '.join(problems)}")
    content = {
        "format": SHARDED_FORMAT if sharded else MODEL_FORMAT,
        "config": config.to_dict(),
        "metadata": {**(metadata or {}), "tokenizer_fingerprint": tokenizer.fingerprint()},
    }
    atomic.json_bytes(content)  # what is no JSON is found before anything is written

    temporary = atomic.hidden_sibling(folder, "writing")
    if states.is_first_process():
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed here
        temporary.mkdir(parents=True)
    states.agree("folder of model made")
    if sharded:
        states.start_writing(temporary / WEIGHTS_FOLDER, unflatten(tensors)).close()
    if states.is_first_process():
        weights = {"dtype": dtype, **_write_weights(temporary, tensors, sharded)}
        tokenizer.save(temporary)
        atomic.write_bytes(
            temporary / CONFIG_FILE, atomic.json_bytes({**content, "weights": weights})
        )
        atomic.sync_folder(temporary)
        atomic.replace_folder(temporary, folder)
    states.agree("model written")


def _cast(tensors: Mapping[str, Any], dtype: np.dtype, sharded: bool) -> dict[str, Any]:
    """In the type to be stored, on the devices they are on, or on this host."""
    if sharded:
        return {name: jnp.asarray(leaf).astype(dtype) for name, leaf in tensors.items()}
    away = [
        name
        for name, leaf in tensors.items()
        if isinstance(leaf, jax.Array)
        and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    ]
    if away:
        raise ValueError(f"params {away[0]} is in part with other processes: give sharded=True")
    with np.errstate(over="ignore"):  # an overflow in the cast is found as a value not finite
        return {name: np.asarray(leaf).astype(dtype) for name, leaf in tensors.items()}


def _write_weights(
    folder: pathlib.Path, tensors: Mapping[str, Any], sharded: bool
) -> dict[str, Any]:
    """Writes what the devices have not, and says what is there to check."""
    if sharded:
        return {"files": atomic.describe(folder / WEIGHTS_FOLDER)}
    weights = safetensors.numpy.save(dict(tensors), {"format": "jaxsd"})
    atomic.write_bytes(folder / WEIGHTS_FILE, weights)
    return {
        "file": WEIGHTS_FILE,
        "num_bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def load_model(
    folder: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules = sharding.TENSOR,
) -> Pretrained:
    """Reads a model folder, checking everything before anything is used.

    Args:
      folder: written by `save_model`, sharded or not.
      dtype: type of the returned parameters; None keeps the stored type.
      mesh: devices to divide the parameters among; of a folder that was saved sharded, on whatever
        mesh, each reads its own part. In a program of several processes all of them call this.
      rules: from logical axis to mesh axis; see `jaxsd.models.sharding`.

    Returns:
      Config, parameters as a nested dict of arrays, tokenizer and metadata.

    Raises:
      ValueError: one error that names the folder and every problem found: missing or unreadable
        files, unknown, missing or ill-typed config fields, weights that are truncated or whose
        checksum differs, tensors that are missing, unexpected, misshapen or not finite, a
        tokenizer of another size or with another fingerprint. Also if the rules do not fit the
        mesh.
    """
    put = _put_anywhere if mesh is None else sharding.placer(mesh, rules)
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ValueError(f"model folder {str(folder)!r} does not exist or is not a folder")
    problems: list[str] = []
    content = _read_config_file(folder / CONFIG_FILE, problems)
    config = _read_config(content, problems)
    metadata = _expect(content, "metadata", dict, problems)
    recorded = _expect(content, "weights", dict, problems)
    if content.get("format") == SHARDED_FORMAT:
        name = WEIGHTS_FOLDER
        tensors = _read_sharded(folder, recorded, config, dtype, mesh, rules, problems)
    else:
        name, tensors = WEIGHTS_FILE, _read_weights(folder, recorded, problems)
    if config is not None and tensors is not None:
        problems += [f"{name}: {text}" for text in tensor_problems(config, tensors)]
    tokenizer = _read_tokenizer(folder, config, metadata, problems)
    if problems or config is None or tensors is None or metadata is None or tokenizer is None:
        raise ValueError(f"cannot load model {str(folder)!r}: {'; '.join(problems)}")
    arrays = {
        # Where it is to be already, or on this host.
        name: tensor
        if isinstance(tensor, jax.Array)
        else put(name, tensor if dtype is None else tensor.astype(jnp.dtype(dtype)))
        for name, tensor in tensors.items()
    }
    return Pretrained(config, unflatten(arrays), tokenizer, metadata)


def _put_anywhere(name: str, array: np.ndarray) -> jax.Array:
    del name
    return jnp.asarray(array)


def check_pair(target: Pretrained, draft: Pretrained) -> None:
    """Makes sure that a draft's token ids mean what the target's mean.

    Raises:
      ValueError: the two tokenizers differ.
    """
    ours, theirs = target.tokenizer.fingerprint(), draft.tokenizer.fingerprint()
    if ours != theirs:
        raise ValueError(
            f"target and draft have different tokenizers (fingerprints {ours[:12]} with "
            f"{target.tokenizer.vocab_size} tokens and {theirs[:12]} with "
            f"{draft.tokenizer.vocab_size}): their token ids do not mean the same"
        )


def params_fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 over names, shapes, types and bytes of all arrays of a nested dict."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read_config_file(path: pathlib.Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"cannot read {path.name} ({error.strerror})")
        return {}
    except ValueError as error:
        problems.append(f"{path.name} is not JSON ({error})")
        return {}
    known = (MODEL_FORMAT, SHARDED_FORMAT)
    if not isinstance(content, dict) or content.get("format") not in known:
        found = content.get("format") if isinstance(content, dict) else content
        problems.append(f"{path.name} has format {found!r}, not {' or '.join(map(repr, known))}")
        return {}
    return content


def _expect(
    content: Mapping[str, Any], key: str, kind: type, problems: list[str]
) -> dict[str, Any] | None:
    """A field of config.json, or None and a problem. Silent where the whole file was no good."""
    if not content:
        return None
    value = content.get(key)
    if not isinstance(value, kind):
        problems.append(f"{CONFIG_FILE}: field {key!r} is missing or not an object")
        return None
    return value


def _read_config(content: Mapping[str, Any], problems: list[str]) -> Config | None:
    values = _expect(content, "config", dict, problems)
    if values is None:
        return None
    try:
        return Config.from_dict(values)
    except ValueError as error:
        problems.append(f"{CONFIG_FILE}: {error}")
        return None


def _read_weights(
    folder: pathlib.Path, recorded: Mapping[str, Any] | None, problems: list[str]
) -> dict[str, np.ndarray] | None:
    path = folder / WEIGHTS_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.append(f"cannot read {path.name} ({error.strerror})")
        return None
    if recorded is not None:
        num_bytes, checksum = recorded.get("num_bytes"), recorded.get("sha256")
        if len(data) != num_bytes:
            problems.append(f"{path.name} has {len(data)} bytes, {CONFIG_FILE} says {num_bytes}")
            return None
        if hashlib.sha256(data).hexdigest() != checksum:
            problems.append(f"{path.name} is corrupt: its SHA-256 is not the recorded one")
            return None
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        problems.append(f"{path.name} is truncated or corrupt ({error})")
        return None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            problems.append(f"{path.name}: tensor {name!r} has type {entry['dtype']}")
            continue
        flat = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def _read_sharded(
    folder: pathlib.Path,
    recorded: Mapping[str, Any] | None,
    config: Config | None,
    dtype: Any,
    mesh: jax.sharding.Mesh | None,
    rules: sharding.Rules,
    problems: list[str],
) -> dict[str, Any] | None:
    """Tensors in their places on the mesh; without one, on this host."""
    if config is None or recorded is None:
        return None
    stored, described = recorded.get("dtype"), recorded.get("files")
    if stored not in EXPORT_DTYPES or not isinstance(described, dict):
        problems.append(f"{CONFIG_FILE}: weights must have a dtype and files")
        return None
    if damage := atomic.damage(folder / WEIGHTS_FOLDER, described):
        problems.append(f"{WEIGHTS_FOLDER} is damaged: {damage}")
        return None
    # Before anything is built: a damaged config can ask for more layers than memory holds.
    num_bytes = sum(size for size, _ in described.values())
    if config.n_layers > num_bytes:
        problems.append(f"{num_bytes} bytes of weights cannot hold n_layers={config.n_layers}")
        return None
    wanted_dtype = EXPORT_DTYPES[stored] if dtype is None else jnp.dtype(dtype)
    try:
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, wanted_dtype), abstract_params(config)
        )
        wanted = (
            states.on_host(like) if mesh is None else sharding.shapes_on_mesh(like, mesh, rules)
        )
        return flatten(states.read((folder / WEIGHTS_FOLDER).absolute(), wanted))
    except (OverflowError, TypeError, ValueError) as error:
        problems.append(f"{WEIGHTS_FOLDER} does not hold what the config asks for ({error})")
        return None


def tensor_problems(config: Config, tensors: Mapping[str, Any]) -> list[str]:
    """What is wrong with tensors, of this host or of devices, as those of a config."""
    # Before anything is built: a damaged config can ask for more layers than memory holds.
    if config.n_layers > len(tensors):
        return [f"{len(tensors)} tensors cannot hold n_layers={config.n_layers}"]
    try:
        expected = flatten(abstract_params(config))
    except (OverflowError, TypeError, ValueError) as error:
        return [f"no parameters have the shape of the config ({error})"]
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing tensors {', '.join(missing)}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        problems.append(f"unexpected tensors {', '.join(unexpected)}")
    for name in sorted(expected.keys() & tensors.keys()):
        tensor = tensors[name]
        if tensor.shape != expected[name].shape:
            problems.append(
                f"tensor {name} has shape {tensor.shape}, the config asks for "
                f"{expected[name].shape}"
            )
        elif num_bad := tensor.size - _num_finite(tensor):
            problems.append(f"tensor {name} has {num_bad} values that are not finite")
    return problems


def _num_finite(tensor: Any) -> int:
    """Counted where the tensor is."""
    if isinstance(tensor, jax.Array):
        return int(jnp.sum(jnp.isfinite(tensor)))
    return int(np.isfinite(tensor.astype(np.float32)).sum())


def _read_tokenizer(
    folder: pathlib.Path,
    config: Config | None,
    metadata: Mapping[str, Any] | None,
    problems: list[str],
) -> corpus.Tokenizer | None:
    try:
        tokenizer = corpus.load_tokenizer(folder)
    except ValueError as error:
        problems.append(str(error))
        return None
    if config is not None and tokenizer.vocab_size != config.vocab_size:
        problems.append(
            f"tokenizer has {tokenizer.vocab_size} tokens, config.vocab_size is {config.vocab_size}"
        )
    if metadata is not None and metadata.get("tokenizer_fingerprint") != tokenizer.fingerprint():
        problems.append(f"{corpus.TOKENIZER_FILE} is not the one the model was trained with")
    return tokenizer


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": x}}` to `{"a.b": x}`."""
    flat = {}
    for key, value in tree.items():
        if not isinstance(key, str) or "." in key:
            raise ValueError(f"parameter name {key!r} must be a string without dots")
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
