"""Every public name explains itself, and every example in a docstring runs and is true."""

import ast
import doctest
import importlib
import inspect
import pathlib

import pytest

import jaxsd
from jaxsd import costmodel, models

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = {"jaxsd": "jaxsd", "models": "jaxsd.models", "costmodel": "jaxsd.costmodel"}


def module_names():
    """Import names of all shipped modules, from the files: pkgutil would also see tests here."""
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if parts[-1:] != ("__main__",):
                yield ".".join((package, *parts))


def doctests(module):
    """One doctest per docstring in the module's source.

    doctest's own finder asks the objects, and passes over jitted functions and nested ones.
    """
    path = inspect.getsourcefile(module)
    parser = doctest.DocTestParser()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))):
        text = isinstance(node, kinds) and ast.get_docstring(node)
        if text:
            name = f"{module.__name__}.{getattr(node, 'name', '__doc__')}"
            line = node.body[0].lineno - 1
            test = parser.get_doctest(text, dict(vars(module)), name, path, line)
            if test.examples:
                yield test


def run(tests):
    """Number of examples run, and what the failing ones printed."""
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags, verbose=False)
    output = []
    for test in tests:
        runner.run(test, out=output.append)
    return runner.summarize(verbose=False).attempted, "".join(output)


@pytest.mark.parametrize("name", list(module_names()))
def test_examples_are_true(name):
    _, output = run(doctests(importlib.import_module(name)))
    assert not output, output


@pytest.mark.parametrize("package", list(PACKAGES.values()))
def test_every_package_has_examples(package):
    names = [name for name in module_names() if name.startswith(f"{package}.")]
    assert any(test.examples for name in names for test in doctests(importlib.import_module(name)))


def test_a_false_example_is_found():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "planted", None, 0)
    attempted, output = run([test])
    assert attempted == 1
    assert "Expected:\n    3" in output


def has_docstring(value, name):
    """Whether somebody wrote one: a class made by a factory has its signature there instead."""
    text = inspect.getdoc(value) or ""
    return bool(text.strip()) and not text.startswith(f"{name}(")


def is_explained_in_source(module, name):
    """Whether the constant has a string below it or a comment above it where it is assigned."""
    for path in pathlib.Path(module.__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        lines, body = source.splitlines(), ast.parse(source).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(node, ast.Assign | ast.AnnAssign) and name in map(ast.unparse, targets):
                value = getattr(after, "value", None)
                below = isinstance(after, ast.Expr) and isinstance(value, ast.Constant)
                return below or lines[node.lineno - 2].startswith("#")
    return False


@pytest.mark.parametrize("module", [jaxsd, models, costmodel], ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module):
    silent = []
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value) or callable(value):
            explained = has_docstring(value, name)
        else:
            explained = is_explained_in_source(module, name)
        if not explained:
            silent.append(name)
    assert silent == []


def test_a_generated_docstring_does_not_count():
    record = type("Record", (), {"__doc__": "Record(a: int)"})
    assert not has_docstring(record, "Record")
    assert has_docstring(jaxsd.Draft, "Draft")
