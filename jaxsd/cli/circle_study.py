"""A study's folder: stages that are done once, whole, and continued after whatever ended them.

Every stage is one JSON file that is written under another name and renamed. It holds the
fingerprint of what the stage was made from, so that a stage is done anew exactly if something
before it changed.
"""

import datetime
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxsd.models import atomic, corpus

from . import info

LOG_FILE = "log.jsonl"
PLAN_STAGE = "plan"

Record = dict[str, Any]


class Study:
    """The folder, and how far the study has come.

    Attributes:
      folder: of everything.
      seconds: that the stages in it took, of this run and of those before.
    """

    def __init__(self, folder: pathlib.Path, show_progress: bool = True) -> None:
        self.folder = folder
        self.show_progress = show_progress
        self.seconds = 0.0
        self._began = time.perf_counter()
        self._left: dict[str, float] = {}
        self._done = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def expect(self, weights: Mapping[str, float]) -> None:
        """Names the stages that take long, each with about how long in any unit."""
        self._left = {name: weight for name, weight in weights.items() if not self.has(name)}

    def path(self, name: str) -> pathlib.Path:
        """The file of a stage."""
        return self.folder / f"{name}.json"

    def has(self, name: str) -> bool:
        """Whether a stage was ever finished."""
        return self.path(name).is_file()

    def stage(self, name: str, made_from: Any, make: Callable[[], Record]) -> Record:
        """The result of a stage: read if it was made from the same, else made now, and kept.

        Args:
          name: of the stage, and of its file.
          made_from: JSON values that decide the result.
          make: returns JSON values.
        """
        path, fingerprint = self.path(name), corpus.fingerprint(made_from)
        found = read(path)
        if found is not None and found.get("made_from") == fingerprint:
            self._finished(name, found["seconds"])
            return found["result"]
        self.say(f"{name}{self._time_left()}")
        began = time.perf_counter()
        # Through JSON and back, so that a study that goes on computes with the very same values.
        result = json.loads(json.dumps(make(), allow_nan=False))
        seconds = time.perf_counter() - began
        record = {
            "stage": name,
            "made_from": fingerprint,
            "date": _now(),
            "seconds": seconds,
            "device": info.describe_device(),
            "versions": info.versions(),
            "result": result,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, record)
        self._log({"date": record["date"], "stage": name, "seconds": seconds})
        self._done += self._left.get(name, 0.0)
        self._finished(name, seconds)
        return result

    def say(self, text: str) -> None:
        """A line for whoever waits."""
        if self.show_progress:
            print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)

    def _finished(self, name: str, seconds: float) -> None:
        self.seconds += seconds
        self._left.pop(name, None)

    def _time_left(self) -> str:
        """From the pace of the stages of this run so far; nothing while there is none."""
        left = sum(self._left.values())
        if not self._done or not left:
            return ""
        seconds = (time.perf_counter() - self._began) * left / self._done
        return f"  (about {datetime.timedelta(seconds=round(seconds))} left)"

    def _log(self, line: Record) -> None:
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read(path: pathlib.Path) -> Record | None:
    """The record of a stage; None if there is none.

    Raises:
      ValueError: the file is not one that `Study.stage` wrote.
    """
    if not path.is_file():
        return None
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if not {"made_from", "seconds", "result"} <= set(content):
            raise ValueError("it lacks a field")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is no stage of a study: {error}; delete it to do the stage again"
        ) from error
    return content


def write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes JSON so that the file is whole or not there."""
    temporary = atomic.hidden_sibling(path, "writing")
    atomic.write_bytes(temporary, atomic.json_bytes(content))
    temporary.replace(path)
    atomic.sync_folder(path.parent)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
