"""The files of a published checkpoint: JSON, safetensors, and which of them may be touched.

What a folder says is checked before and while it is read: names stay inside the folder, and nothing
is unpickled.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors

from . import checkpoint

INDEX_FILE = "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.bin.index.json")
_HOW_TO_CONVERT = (
    "a pickle runs code when it is read and is never loaded here; where you trust it, convert it: "
    "transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) "
    "writes safetensors"
)


_PATHS = (pathlib.PurePosixPath, pathlib.PureWindowsPath)


class Folder:
    """The files of one folder, and what is wrong with them. None outside it is touched."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.problems: list[str] = []
        if not folder.is_dir():
            self.problems.append("it does not exist or is not a folder")
            self.raise_problems()

    def raise_problems(self) -> None:
        if self.problems:
            raise ValueError(
                f"cannot load checkpoint {str(self.folder)!r}: {'; '.join(self.problems)}"
            )

    def path(self, name: str) -> pathlib.Path:
        return self.folder / name

    def is_inside(self, name: str) -> bool:
        """Whether a file lies in the folder itself, links followed; a problem if not."""
        if self.path(name).resolve().parent == self.folder.resolve():
            return True
        self.problems.append(
            f"{name} is a link out of the folder; copy what it leads to (cp -rL) and load the copy"
        )
        return False

    def read_text(self, name: str) -> str | None:
        if not self.is_inside(name):
            return None
        try:
            return self.path(name).read_text(encoding="utf-8")
        except OSError as error:
            self.problems.append(f"cannot read {name} ({error.strerror})")
        except ValueError as error:
            self.problems.append(f"{name} is not UTF-8 ({error})")
        return None

    def read_json(self, name: str, required: bool = True) -> dict[str, Any]:
        """The object in a JSON file; an empty one, and a problem, if there is none."""
        if not required and not self.path(name).is_symlink() and not self.path(name).exists():
            return {}
        text = self.read_text(name)
        if text is None:
            return {}
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{name} is not JSON ({error})")
            return {}
        if not isinstance(content, dict):
            self.problems.append(f"{name} is not a JSON object")
            return {}
        return content

    def weight_files(self) -> tuple[list[str], dict[str, str] | None]:
        """Names of the safetensors files, and which tensor the index says is in which."""
        if self.path(checkpoint.WEIGHTS_FILE).exists():
            one = checkpoint.WEIGHTS_FILE
            return ([one] if self.is_inside(one) else []), None
        if not self.path(INDEX_FILE).exists():
            found = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
            self.problems.append(
                f"{checkpoint.WEIGHTS_FILE} and {INDEX_FILE} are missing"
                + (f", and {', '.join(found)}: {_HOW_TO_CONVERT}" if found else "")
            )
            return [], None
        listed = self.read_json(INDEX_FILE).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            self.problems.append(f"{INDEX_FILE} has no object weight_map")
            return [], None
        names = sorted({str(name) for name in listed.values()})
        return [name for name in names if self._is_weight_file(name)], listed

    def _is_weight_file(self, name: str) -> bool:
        is_plain = all(path(name).name == name for path in _PATHS) and name != ".."
        if not is_plain:
            self.problems.append(f"{INDEX_FILE} names {name!r}, which is no file of the folder")
            return False
        if not name.endswith(".safetensors"):
            self.problems.append(
                f"{INDEX_FILE} names {name!r}, which is no safetensors file: {_HOW_TO_CONVERT}"
            )
            return False
        if not self.path(name).is_symlink() and not self.path(name).is_file():
            self.problems.append(f"{name} is missing, which {INDEX_FILE} names")
            return False
        return self.is_inside(name)


class _Entry(NamedTuple):
    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file, in bytes


class Tensors:
    """Where each tensor lies, and what is wrong with the tensors. Reads one at a time.

    Every tensor that is not read into its place is read into one and the same buffer: freed and
    allocated anew, the buffers of a few tensors would stay in memory side by side.
    """

    def __init__(self, paths: Mapping[str, pathlib.Path]):
        self.entries: dict[str, _Entry] = {}
        self.files: dict[str, str] = {}
        self.problems: list[str] = []
        self._buffer = np.empty(0, np.uint8)
        for name, path in paths.items():
            try:
                entries = _read_header(path)
            except ValueError as error:
                self.problems.append(f"{name}: {error}")
                continue
            for tensor, entry in entries.items():
                if tensor in self.entries:
                    self.problems.append(f"tensor {tensor} is in {self.files[tensor]} and {name}")
                self.entries[tensor], self.files[tensor] = entry, name

    def dtype(self, name: str) -> np.dtype:
        return checkpoint.DTYPES[self.entries[name].dtype]

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored type; it holds until the next is read."""
        entry, dtype = self.entries[name], self.dtype(name)
        size = math.prod(entry.shape) * dtype.itemsize
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        data = self._buffer[:size]
        self._read_bytes(entry, data)
        return data.view(dtype).reshape(entry.shape)

    def read_into(self, name: str, view: np.ndarray, is_transposed: bool) -> None:
        """One tensor into its place in a final array."""
        if view.flags.c_contiguous and view.dtype == self.dtype(name) and not is_transposed:
            self._read_bytes(self.entries[name], view.reshape(-1).view(np.uint8))
            return
        tensor = self.read(name)
        with np.errstate(over="ignore"):  # an overflow in the cast is found as not finite
            view[...] = (tensor.T if is_transposed else tensor).reshape(view.shape)

    def _read_bytes(self, entry: _Entry, data: np.ndarray) -> None:
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.start)
            rest = data.data
            while len(rest):
                count = file.readinto(rest)  # at most 2 GB a call
                if not count:
                    raise ValueError(f"{str(entry.path)!r} became shorter while it was read")
                rest = rest[count:]


def _read_header(path: pathlib.Path) -> dict[str, _Entry]:
    """What a safetensors file holds, no tensor being read."""
    try:
        # The library checks that the header fits the file, and that tensors lie side by side.
        with safetensors.safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            start = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start))
    except safetensors.SafetensorError as error:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic[:2] == b"PK" or magic[:1] == b"\x80":
            raise ValueError(f"is no safetensors file: {_HOW_TO_CONVERT}") from error
        raise ValueError(f"is truncated or corrupt ({error})") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error})") from error
    header.pop("__metadata__", None)
    return {
        name: _Entry(
            path, entry["dtype"], tuple(entry["shape"]), 8 + start + entry["data_offsets"][0]
        )
        for name, entry in header.items()
    }
