"""Who may import whom, and what no shipped file may contain: checked on the syntax tree."""

import ast
import functools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("jaxsd", "models", "costmodel")

# Third-party packages each part may import. The command line may import everything that an install
# without extras brings.
ALLOWED = {
    "jaxsd": {"jax", "numpy"},
    "costmodel": {"jax", "numpy", "optax"},
    "models": {"flax", "jax", "jaxsd", "ml_dtypes", "numpy", "optax", "orbax"}
    | {"rich", "safetensors", "tokenizers"},
}
# Pictures need matplotlib, an extra: imported where they are drawn, its absence told in one line.
ALLOWED["jaxsd/cli"] = {"tyro", "cycler", "matplotlib"}.union(*ALLOWED.values())

# What runs code that came with data, by module and by name.
UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_NAMES = {"__import__", "compile", "eval", "exec"}
# In the decoder's package: the loop, and the losslessness checker.
COMPILERS = ("jaxsd/decoding.py", "jaxsd/cases.py", "jaxsd/replay.py", "jaxsd/testing.py")
# What takes a compiled program back to the host.
HOST_CALLS = (
    "jax.debug",
    "jax.experimental.host_callback",
    "jax.experimental.io_callback",
    "jax.io_callback",
    "jax.pure_callback",
)


def shipped_files():
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


@functools.cache
def public_names():
    """`jaxsd.__all__`, from its source."""
    for node in ast.parse((ROOT / "jaxsd/__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise LookupError("jaxsd/__init__.py has no __all__")


def part_of(path):
    """The entry of `ALLOWED` that a file falls under."""
    return "jaxsd/cli" if path.startswith("jaxsd/cli/") else path.split("/")[0]


def problems(path, source):
    """What is wrong with a file of that path and source, one line each."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    found = [problem for node in imports for problem in import_problems(path, node)]
    found += [problem for node in ast.walk(tree) for problem in node_problems(node)]
    aliases = imported_names(imports)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            found += use_problems(path, dotted_name(node, aliases))
    for name in aliases.values():
        found += use_problems(path, name)
    return sorted(set(found))


def import_problems(path, node):
    part = part_of(path)
    if isinstance(node, ast.ImportFrom) and node.level:
        yield from relative_problems(path, node)
        return
    names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    for name in names:
        top = name.split(".")[0]
        if top in UNSAFE_MODULES:
            yield f"imports {top}, which runs what it reads"
        elif top not in ALLOWED[part] and top not in sys.stdlib_module_names:
            yield f"{part} may not import {name}"
        elif top == "jaxsd" and part == "models":
            yield from jaxsd_problems(name, node)


def relative_problems(path, node):
    """One dot, inside the own folder; the decoder's folder also holds two others when installed."""
    part = part_of(path)
    if part == "jaxsd/cli":
        return
    if node.level > 1:
        yield f"{part} may not leave its folder by a relative import"
    if part == "jaxsd":
        names = [node.module] if node.module else [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] in ("models", "costmodel", "cli"):
                yield f"jaxsd may not import .{name}"


def jaxsd_problems(name, node):
    """Of jaxsd, models may use what is in `jaxsd.__all__`: public names, modules among them."""
    imported = name.split(".")[1:]
    if isinstance(node, ast.ImportFrom) and not imported:
        used = [alias.name for alias in node.names]
    else:
        used = imported[:1]
    for one in used:
        if one not in public_names():
            yield f"models may not import {one} of jaxsd: it is not public"


def imported_names(imports):
    """What each imported name stands for: `jnp` for `jax.numpy`."""
    aliases = {}
    for node in imports:
        for alias in node.names:
            if isinstance(node, ast.Import):
                name = alias.name if alias.asname else alias.name.split(".")[0]
                aliases[alias.asname or name] = name
            elif not node.level:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return aliases


def dotted_name(node, aliases):
    """`jax.numpy.sum` for `jnp.sum`; an empty string if it does not start at a name."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        start = dotted_name(node.value, aliases)
        return start and f"{start}.{node.attr}"
    return ""


def use_problems(path, name):
    part = part_of(path)
    if name.removeprefix("builtins.") in UNSAFE_NAMES:
        yield f"uses {name}"
    if name == "importlib.import_module" and part != "jaxsd/cli":
        yield f"uses {name}, which hides an import"
    if any(name == call or name.startswith(f"{call}.") for call in HOST_CALLS):
        yield f"uses {name}: no host call inside a compiled program"
    if name == "flax.nnx.jit":
        yield "uses flax.nnx.jit, which costs host time at every call"
    is_compiler = name in ("jax.jit", "jax.pmap") and part == "jaxsd"
    if is_compiler and path not in COMPILERS:
        yield f"uses {name}: the decoder compiles in decoding.py alone"
    is_ours = name.startswith("jaxsd.") and part == "models"
    if is_ours and name.split(".")[1] not in public_names():
        yield f"models may not use {name}: it is not public"


def node_problems(node):
    if isinstance(node, ast.Assert):
        yield "has a bare assert, which -O removes: raise ValueError"
    if isinstance(node, ast.keyword):
        if node.arg in ("static_argnames", "static_argnums"):
            yield f"uses {node.arg}: what is static is an argument of the factory"
        is_false = isinstance(node.value, ast.Constant) and node.value.value is False
        if node.arg == "allow_pickle" and not is_false:
            yield "allows pickle, which runs what it reads"


@pytest.mark.parametrize("path", shipped_files())
def test_file_keeps_the_arrows(path):
    assert problems(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_part_was_looked_at():
    assert {part_of(path) for path in shipped_files()} == set(ALLOWED)


def test_the_decoder_is_compiled_in_one_file():
    """The rule is not kept by having no compiled decoder at all."""
    assert "jax.jit(" in (ROOT / "jaxsd/decoding.py").read_text(encoding="utf-8")


PLANTED = [
    # The arrows.
    ("jaxsd/drafters.py", "import optax"),
    ("jaxsd/drafters.py", "from flax import nnx"),
    ("jaxsd/drafters.py", "import scipy.special"),
    ("jaxsd/drafters.py", "from . import models"),
    ("jaxsd/drafters.py", "from .costmodel import speedup"),
    ("jaxsd/drafters.py", "import jaxsd.models"),
    ("jaxsd/drafters.py", "def f():\n    import rich"),
    ("costmodel/laws.py", "import jaxsd"),
    ("costmodel/laws.py", "from .. import sampling"),
    ("costmodel/laws.py", "import scipy"),
    ("models/transformer.py", "from jaxsd.costmodel import Shape"),
    ("models/transformer.py", "import jaxsd.models.configs"),
    ("models/transformer.py", "from jaxsd.types import Params"),
    ("models/transformer.py", "from jaxsd import decoding"),
    ("models/transformer.py", "import jaxsd\njaxsd.drafters.block_positions"),
    ("models/transformer.py", "from ..types import Params"),
    ("models/transformer.py", "import transformers"),
    ("models/transformer.py", "import importlib\nimportlib.import_module('jaxsd.cli')"),
    ("jaxsd/cli/main.py", "import pandas"),
    # Code that came with data.
    ("models/checkpoint.py", "import pickle"),
    ("models/checkpoint.py", "from joblib import load"),
    ("models/checkpoint.py", "import numpy as np\nnp.load('a.npy', allow_pickle=True)"),
    ("jaxsd/cli/main.py", "eval('1')"),
    ("jaxsd/cli/main.py", "run = exec"),
    ("jaxsd/cli/main.py", "import builtins\nbuiltins.eval('1')"),
    # Compilation and the host.
    ("jaxsd/sampling.py", "import jax\nf = jax.jit(len)"),
    ("jaxsd/sampling.py", "from jax import jit\n@jit\ndef f(): ..."),
    ("jaxsd/decoding.py", "import jax\nf = jax.jit(len, static_argnames='n')"),
    ("costmodel/laws.py", "import functools, jax\nfunctools.partial(jax.jit, static_argnums=0)"),
    ("models/training.py", "from flax import nnx\nf = nnx.jit(len)"),
    ("models/training.py", "import jax\njax.debug.print('loss')"),
    ("models/training.py", "from jax import debug as d\nd.callback(print)"),
    ("jaxsd/decoding.py", "import jax\njax.pure_callback(len, None)"),
    ("jaxsd/decoding.py", "from jax.experimental import io_callback"),
    # Checks that vanish.
    ("jaxsd/sampling.py", "assert True"),
]


@pytest.mark.parametrize(("path", "source"), PLANTED)
def test_planted_breach_is_found(path, source):
    assert len(problems(path, source)) >= 1


KEPT = [
    ("jaxsd/drafters.py", "import jax\nfrom . import sampling\nfrom .types import Drafter"),
    ("jaxsd/decoding.py", "import jax\nf = jax.jit(len, donate_argnums=1)"),
    ("jaxsd/testing.py", "import jax\nf = jax.jit(len)"),
    ("jaxsd/cli/main.py", "import tyro\nfrom jaxsd import costmodel, models\nfrom .. import types"),
    ("costmodel/search.py", "import jax, optax\nf = jax.jit(len)\nfrom .laws import loss"),
    ("models/training.py", "import jax\nimport re\nre.compile('a')\njax.eval_shape(len)"),
    ("models/transformer.py", "import jaxsd\njaxsd.Sampling\njaxsd.stats.acceptance_rate"),
    ("models/transformer.py", "from jaxsd import Sampling, testing\nimport jaxsd.testing"),
]


@pytest.mark.parametrize(("path", "source"), KEPT)
def test_what_is_allowed_is_not_condemned(path, source):
    assert problems(path, source) == []
