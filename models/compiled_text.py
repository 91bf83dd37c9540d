"""What does a compiled program do with its caches, and what do its devices send each other?

XLA decides silently: whether a cache is written in place, how often it is copied, which collectives
a division over devices needs. The optimised text, `compiled.as_text()`, tells, and is the same
language for every backend.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a computation.

    name: of its result.
    opcode: such as "fusion".
    types: element type, dimensions and memory of each array of the result; memory 0 is the main
      one, others are on the chip.
    line: the whole.
    """

    name: str
    opcode: str
    types: tuple["ArrayType", ...]
    line: str


class ArrayType(NamedTuple):
    """`bf16[8,128]{...S(1)}` taken apart."""

    dtype: str
    dims: tuple[int, ...]
    memory: int

    @property
    def num_bytes(self) -> int:
        """Without padding."""
        bits = _BITS.get(self.dtype) or int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        return math.prod(self.dims) * bits // 8


class Collectives(NamedTuple):
    """The collectives of one kind.

    kind: such as "all-reduce".
    count: how many there are in the text; one in a loop counts once.
    num_bytes: of their results on one device.
    """

    kind: str
    num: int
    num_bytes: int


class CacheCopies(NamedTuple):
    """What moves whole caches.

    copies: lines that copy or transpose an array of a cache's size within one memory.
    moves: lines that bring one to another memory, or back: a part of reading it, and once more of
      writing it.
    """

    copies: tuple[str, ...]
    moves: tuple[str, ...]


def cache_copies(
    text: str, shapes: Iterable[Sequence[int]], *, inside_loops: bool = True
) -> CacheCopies:
    """Finds the lines of a compiled program that copy a whole cache.

    A copy in another shape is found too: what counts is the number of elements.

    Args:
      text: of a compiled program.
      shapes: of the caches' buffers as one device holds them.
      inside_loops: look only at what a `while` runs, directly or not; else at everything.

    Raises:
      ValueError: `inside_loops`, and the program has no loop.

    >>> text = '''
    ... %body (p: f32[4,8]) -> f32[4,8] {
    ...   %p = f32[4,8]{1,0} parameter(0)
    ...   ROOT %copy.1 = f32[4,8]{0,1} copy(%p)
    ... }
    ... ENTRY %main (p: f32[4,8]) -> f32[4,8] {
    ...   %p = f32[4,8]{1,0} parameter(0)
    ...   ROOT %w = f32[4,8]{1,0} while(%p), condition=%cond, body=%body
    ... }
    ... '''
    >>> cache_copies(text, [(4, 8)]).copies
    ('ROOT %copy.1 = f32[4,8]{0,1} copy(%p)',)
    """
    computations = _computations(text)
    names = _run_by("while", computations) if inside_loops else set(computations)
    if inside_loops and not names:
        raise ValueError("the compiled program has no loop; wanted one to search (inside_loops)")
    sizes = {math.prod(shape) for shape in shapes}
    # The inside of a fusion: nothing in it is stored.
    fused = _run_by("fusion", computations)
    copies, moves = [], []
    for name in computations:
        if name not in names or name in fused:
            continue
        memories: dict[str, int] = {}
        for one in computations[name]:
            memories[one.name] = one.types[0].memory if one.types else 0
            if _yields(one, sizes) and _copies(one, computations, sizes):
                source = memories.get(_first_operand(one), 0)
                (copies if source == one.types[0].memory else moves).append(one.line)
    return CacheCopies(tuple(copies), tuple(moves))


def collectives(text: str, *, inside_loops: bool = False) -> tuple[Collectives, ...]:
    """What the devices of a compiled program send each other, by kind.

    Args:
      text: of a compiled program.
      inside_loops: only what a `while` runs.

    Returns:
      By kind, the most bytes first; asynchronous ones count where they start.
    """
    computations = _computations(text)
    names = _run_by("while", computations) if inside_loops else set(computations)
    found: dict[str, list[int]] = {}
    for name in names:
        for one in computations[name]:
            kind = one.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                # An asynchronous one yields its operand beside its result.
                sizes = [part.num_bytes for part in one.types]
                size = max(sizes, default=0) if kind != one.opcode else sum(sizes)
                found.setdefault(kind, []).append(size)
    rows = (Collectives(kind, len(sizes), sum(sizes)) for kind, sizes in found.items())
    return tuple(sorted(rows, key=lambda row: (-row.num_bytes, row.kind)))


def aliased_caches(text: str, shapes: Iterable[Sequence[int]]) -> tuple[int, int]:
    """How many arguments of these shapes a program has, and how many it writes in place.

    Args:
      text: of a compiled program.
      shapes: of the caches' buffers as one device holds them.

    Returns:
      `(aliased, all)`.
    """
    wanted = {tuple(shape) for shape in shapes}
    header = text[: text.index("\n")]
    donated = {int(number) for number in _ALIAS.findall(header)}
    numbers = set()
    for one in _computations(text)[_entry_name(text)]:
        if one.opcode == "parameter" and one.types[0].dims in wanted:
            numbers.add(int(one.line.split(" parameter(")[1].split(")")[0]))
    return len(numbers & donated), len(numbers)


def num_custom_calls(text: str) -> int:
    """Calls of what is no instruction of XLA, in the program's own computation."""
    entry = _computations(text)[_entry_name(text)]
    return sum(one.opcode == "custom-call" for one in entry)


_COPIES = ("copy", "copy-start", "transpose")
_COLLECTIVES = (
    *("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)
_BITS = {"pred": 8, "token": 0}
_ALIAS = re.compile(r"\((\d+), \{\}, (?:may|must)-alias\)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(")
_CALLS = re.compile(r"(?:calls|body|condition|to_apply|\w+_computations?)=(\{[^{}]*\}|%?[\w.-]+)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .* )?\{$")


def _computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation, by its name."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = found.setdefault(header[2], [])
        elif line.startswith(" ") and (match := _INSTRUCTION.match(line.strip())):
            types = tuple(_array_types(match[2]))
            current.append(Instruction(match[1], match[3], types, line.strip()))
    return found


def _entry_name(text: str) -> str:
    start = text.index("\nENTRY ") + 1
    header = _HEADER.match(text[start : text.index("\n", start)])
    if header is None:
        raise ValueError(f"not the text of a compiled program: {text[start : start + 80]!r}")
    return header[2]


def _array_types(text: str) -> Iterator[ArrayType]:
    for dtype, dims, layout in _ARRAY.findall(text):
        memory = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size) for size in dims.split(",") if size)
        yield ArrayType(dtype, sizes, int(memory[1]) if memory else 0)


def _run_by(opcode: str, computations: dict[str, list[Instruction]]) -> set[str]:
    """Names of the computations that some such instruction runs, directly or through others."""
    return _reached(
        (
            name
            for instructions in computations.values()
            for one in instructions
            if one.opcode == opcode
            for name in _called(one, computations)
        ),
        computations,
    )


def _yields(one: Instruction, sizes: set[int]) -> bool:
    return any(math.prod(part.dims) in sizes for part in one.types)


def _copies(one: Instruction, computations: dict[str, list[Instruction]], sizes: set[int]) -> bool:
    """Whether it copies an array of such a size, itself or inside the fusion that it is.

    A fusion that yields less than the array reads it in another order, which is no copy.
    """
    if one.opcode in _COPIES:
        return True
    return one.opcode == "fusion" and any(
        inner.opcode in _COPIES and _yields(inner, sizes)
        for name in _reached(_called(one, computations), computations)
        for inner in computations[name]
    )


def _first_operand(one: Instruction) -> str:
    arguments = one.line.split(f" {one.opcode}(", 1)[1]
    names = re.findall(r"%([\w.-]+)", arguments) or re.findall(r"[\w.-]+", arguments)
    return names[0] if names else ""


def _reached(first: Iterable[str], computations: dict[str, list[Instruction]]) -> set[str]:
    """Names of these computations and of those that they call, directly or through others."""
    reached: set[str] = set()
    waiting = list(first)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += [other for one in computations[name] for other in _called(one, computations)]
    return reached


def _called(one: Instruction, computations: dict[str, list[Instruction]]) -> list[str]:
    """The computations that an instruction names: its body, its branches, what it applies."""
    words = [word for part in _CALLS.findall(one.line) for word in re.findall(r"[\w.-]+", part)]
    return [word for word in words if word in computations]
