"""The README is true: code runs, commands parse, files exist, figures name what made them."""

import functools
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

import jaxsd
from jaxsd.cli import main as cli

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("jaxsd", "models", "costmodel", "tests", "tpu_scripts")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SHELLS = ("bash", "console", "sh", "shell")
# Commands that run in seconds: they are run, not only parsed.
CHEAP = ("design", "info")


class Block(NamedTuple):
    """A fenced block: its language, the line it starts on, its text."""

    language: str
    line: int
    text: str


def read(name):
    """Text of a document, empty if there is none: `test_document_exists` reports that."""
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def blocks(text, *languages):
    found, start = [], None
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.fullmatch(r"\s*```+\s*([\w-]*).*", line)
        if fence and start is None:
            start, language, lines = number, fence[1], []
        elif fence:
            found.append(Block(language, start, "\n".join(lines) + "\n"))
            start = None
        elif start is not None:
            lines.append(line)
    return [block for block in found if block.language in languages]


def prose(text):
    """The text without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```\s*$", "", text, flags=re.MULTILINE | re.DOTALL)


def command_lines(text):
    """Shell lines of the shell blocks; of a block with prompts, the lines that have one."""
    for block in blocks(text, *SHELLS):
        lines = block.text.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        yield from (line.strip() for line in lines if line.strip())


def split_commands(line):
    """The simple commands of a shell line, without comments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command, skip = [], False
    for token in lexer:
        if set(token) <= set("();&|"):
            yield command
            command, skip = [], False
        elif set(token) <= set("<>"):
            skip = True
        elif not skip:
            command.append(token)
    yield command


def jaxsd_commands(text):
    """Arguments of every `jaxsd` command in shell blocks and in tables."""
    lines = [*command_lines(text), *(row["command"].strip("`") for row in figures(text))]
    commands = [tuple(c) for line in lines for c in split_commands(line)]
    return list(dict.fromkeys(c[1:] for c in commands if c[:1] == ("jaxsd",)))


def tables(text):
    """Rows of every table, as dicts by lower-case heading."""
    lines = [*prose(text).splitlines(), ""]
    for number, line in enumerate(lines):
        if re.fullmatch(r"\s*\|?(\s*:?-+:?\s*\|)+\s*(:?-+:?\s*)?", line) and number:
            heads = [cell.lower() for cell in cells(lines[number - 1])]
            end = next(i for i in range(number, len(lines)) if "|" not in lines[i])
            yield (
                heads,
                [dict(zip(heads, cells(row), strict=True)) for row in lines[number + 1 : end]],
            )


def cells(row):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def figures(text):
    """Rows of the tables of measurements: those that name a device and a command."""
    wanted = {"device", "command"}
    return [row for heads, rows in tables(text) if wanted <= set(heads) for row in rows]


def environment():
    """As outside of this test run, with the same copy of jaxsd, wherever it was imported from."""
    path = str(pathlib.Path(jaxsd.__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


def python(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def exit_status(arguments, monkeypatch):
    """Of a `jaxsd` command line whose command is replaced by nothing: whether it parses."""
    if arguments[0] in cli.COMMANDS:
        module = importlib.import_module(f"jaxsd.cli.{arguments[0]}")
        command = getattr(module, arguments[0])
        monkeypatch.setattr(module, arguments[0], functools.wraps(command)(lambda **_: {}))
    return cli.main(arguments)


def layout_problems(text):
    """What is wrong with the block that shows the layout; it has one line per file or folder."""
    trees = [b for b in blocks(text, "", "text") if re.search(r"^jaxsd/", b.text, re.MULTILINE)]
    if len(trees) != 1:
        return [f"{len(trees)} blocks have a line that starts with jaxsd/; wanted one"]
    named, parents, found = set(), [], []
    for line in trees[0].text.splitlines():
        match = re.fullmatch(r"([\s│├└─]*)(\S+)(?:\s{2,}(.*))?", line)
        if not match:
            continue
        indent, name, comment = len(match[1]), match[2], match[3]
        parents = [(i, folder) for i, folder in parents if i < indent]
        path = "".join(folder for _, folder in parents) + name
        named.add(path.rstrip("/"))
        if name.endswith("/"):
            parents.append((indent, name))
        if not (ROOT / path).exists():
            found.append(f"{path} does not exist")
        if not comment:
            found.append(f"{path} has no comment")
    for folder in ("jaxsd", "models", "costmodel"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if not path.name.startswith("_") and f"{folder}/{path.name}" not in named:
                found.append(f"{folder}/{path.name} is not named")
    return found


def missing_files(text):
    """Relative links and paths in code spans that lead nowhere."""
    text = prose(text)
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    links = [link for link in links if not re.match(r"[a-z]+:", link)]
    anchors = {slug(head) for head in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    missing = []
    for link in links:
        path, _, anchor = link.partition("#")
        if not (ROOT / path).exists() or (anchor and not path and anchor not in anchors):
            missing.append(link)
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", text):
        if path.split("/")[0] in (*FOLDERS, ".ci") and not (ROOT / path).exists():
            missing.append(path)
    return missing


def slug(heading):
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


README = read("README.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document_exists(name):
    assert read(name).strip(), f"{name} is missing or empty"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_named_files_exist(name):
    assert missing_files(read(name)) == []


def test_layout_is_that_of_the_checkout():
    assert layout_problems(README) == []


def test_there_is_code_and_a_demo():
    assert len(blocks(README, "python")) >= 2
    assert ("demo",) in jaxsd_commands(README)


@pytest.mark.parametrize("block", blocks(README, "python"), ids=lambda block: f"line{block.line}")
def test_code_runs(block, tmp_path):
    """In a process of its own, as the reader would run it: without this run's strict settings."""
    if block.text.lstrip().startswith(">>>"):
        options = ["-m", "doctest", "-o", "ELLIPSIS", "-o", "NORMALIZE_WHITESPACE"]
    else:
        options = []
    # Blank lines in front make the line numbers of a traceback those of the README.
    (tmp_path / "README.txt").write_text("\n" * block.line + block.text, encoding="utf-8")
    done = python(*options, "README.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", jaxsd_commands(README), ids=shlex.join)
def test_command_is_understood(arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where a result may be written
    assert exit_status(arguments, monkeypatch) == 0


def test_commands_in_the_text_exist():
    named = re.findall(r"`jaxsd ([a-z]\w*)", "".join(map(prose, map(read, DOCUMENTS))))
    assert sorted(set(named) - set(cli.COMMANDS)) == []


@pytest.mark.parametrize(
    "arguments", [a for a in jaxsd_commands(README) if a[0] in CHEAP], ids=shlex.join
)
def test_cheap_command_runs(arguments, tmp_path):
    done = python("-m", "jaxsd.cli.main", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if shlex.join(arguments).endswith("--json -"):
        assert isinstance(json.loads(done.stdout), dict)


def test_figures_have_a_setting_and_a_command():
    rows = figures(README)
    assert rows
    for row in rows:
        columns = " ".join(row)
        for word in ("device", "temperature", "baseline"):
            assert word in columns
        assert "k" in columns.split() or "draft tokens" in columns
        assert all(row.values()), row
        (command, *arguments), *_ = split_commands(row["command"].strip("`"))
        assert command in ("jaxsd", "python"), row["command"]
        if command == "python":
            assert (ROOT / arguments[0]).is_file(), row["command"]


def test_test_command_is_the_one_that_ci_runs():
    (command,) = {line for line in command_lines(README) if line.split()[-1] == "pytest"}
    assert command.startswith("pip install")
    assert command in [line.strip() for line in read(".ci/run").splitlines()]
    assert command in command_lines(read("CONTRIBUTING.md"))


EXAMPLE = """
# Title

Install: `jaxsd/types.py`, `tests/nowhere.py`, [here](#title), [there](#elsewhere), [x](nowhere.md).

```console
$ pip install . && jaxsd demo  # a minute
... output --with-no-option
$ jaxsd design --draft-tokens 180e9 \\
    --json - > out.json
```

```python
>>> 1 + 1
2
```

```
jaxsd/        the decoder
  types.py    pytrees
  absent.py   nothing
```

| device | K | command |
| --- | --: | --- |
| CPU | 4 | `jaxsd demo --seed -1` |
"""


def test_reading_finds_what_is_written():
    assert next(command_lines(EXAMPLE)) == "pip install . && jaxsd demo  # a minute"
    assert jaxsd_commands(EXAMPLE) == [
        ("demo",),
        ("design", "--draft-tokens", "180e9", "--json", "-"),
        ("demo", "--seed", "-1"),
    ]
    assert blocks(EXAMPLE, "python") == [Block("python", 13, ">>> 1 + 1\n2\n")]
    assert figures(EXAMPLE) == [{"device": "CPU", "k": "4", "command": "`jaxsd demo --seed -1`"}]


def test_reading_finds_what_is_wrong():
    assert missing_files(EXAMPLE) == ["#elsewhere", "nowhere.md", "tests/nowhere.py"]
    found = layout_problems(EXAMPLE)
    assert "jaxsd/absent.py does not exist" in found
    assert "jaxsd/sampling.py is not named" in found
    assert not [problem for problem in found if "jaxsd/types.py" in problem]


def test_a_command_that_does_not_parse_is_found(monkeypatch, capsys):
    good = ("design", "--target-params", "7e9", "--target-tokens", "1e12", "--draft-tokens", "1e12")
    assert exit_status(good, monkeypatch) == 0
    assert exit_status((*good, "--gama", "3"), monkeypatch) == 2
    assert exit_status(good[:-1], monkeypatch) == 2
    assert exit_status(("desing",), monkeypatch) == 2
    capsys.readouterr()
