"""What the built wheel holds, and that the copy under test is the checkout's own."""

import ast
import filecmp
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import jaxsd
from jaxsd import costmodel, models

ROOT = pathlib.Path(__file__).parent.parent
# Where the three folders of a checkout are in a wheel.
PLACES = {"jaxsd": "jaxsd", "models": "jaxsd/models", "costmodel": "jaxsd/costmodel"}
# Litter of a checkout, where no git says what belongs to it.
LEFT_BEHIND = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "*.pyc", "build", "dist", "runs"
)


def tracked_files():
    """What git knows or would add, as paths from the root; none if this is not a repository."""
    if shutil.which("git") is None:
        return []
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def copy_sources(destination):
    """What a clean clone would hold."""
    names = tracked_files()
    if "pyproject.toml" not in names:
        shutil.copytree(ROOT, destination, ignore=LEFT_BEHIND)
        return
    for name in names:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, destination / name)


def shipped_files(sources):
    """Every file of the three folders, by the name it should have in the wheel."""
    return {
        f"{place}/{path.relative_to(sources / folder).as_posix()}": path
        for folder, place in PLACES.items()
        for path in (sources / folder).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    destination = tmp_path_factory.mktemp("clone") / "jaxsd"
    copy_sources(destination)
    return destination


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """Built once; in this environment if its setuptools is new enough, which needs no download."""
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(dist)]
    setuptools = importlib.metadata.version("setuptools")
    if int(setuptools.split(".")[0]) >= 77:
        command.append("--no-isolation")
    done = subprocess.run(
        command, cwd=sources, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = dist.iterdir()
    with zipfile.ZipFile(path) as wheel:
        yield wheel


@pytest.fixture(scope="module")
def metadata(wheel):
    """Text of a file of the wheel's dist-info, by name."""
    return lambda name: wheel.read(f"jaxsd-{jaxsd.__version__}.dist-info/{name}").decode()


def test_wheel_holds_every_file_of_the_three_folders_and_no_other(wheel, sources):
    """So there is no top-level `models` or `costmodel`, and nothing stale from an earlier build."""
    expected = shipped_files(sources)
    for name in ("py.typed", "models/__init__.py", "costmodel/__init__.py", "cli/__init__.py"):
        assert f"jaxsd/{name}" in expected
    dist_info = f"jaxsd-{jaxsd.__version__}.dist-info/"
    names = {name for name in wheel.namelist() if not name.startswith(dist_info)}
    assert names == set(expected)


def test_files_arrive_unchanged(wheel, sources):
    for name, path in shipped_files(sources).items():
        assert wheel.read(name) == path.read_bytes(), name


def test_metadata_is_that_of_the_project(metadata, sources):
    text = metadata("METADATA")
    assert f"\nVersion: {jaxsd.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    readme = (sources / "README.md").read_text(encoding="utf-8")
    assert text.rstrip().endswith(readme.rstrip())
    assert metadata("licenses/LICENSE") == (sources / "LICENSE").read_text(encoding="utf-8")


def test_the_command_exists(wheel, metadata):
    (target,) = re.findall(r"^jaxsd = (\S+)$", metadata("entry_points.txt"), re.MULTILINE)
    module, function = target.split(":")
    body = ast.parse(wheel.read(f"{module.replace('.', '/')}.py")).body
    assert function in {getattr(node, "name", None) for node in body}


def test_the_copy_under_test_is_that_of_the_checkout():
    """`pytest` imports what is installed: after an edit, an install that copies is out of date."""
    for folder, package in (("jaxsd", jaxsd), ("models", models), ("costmodel", costmodel)):
        imported = pathlib.Path(package.__file__).parent
        for path in (ROOT / folder).rglob("*.py"):
            copy = imported / path.relative_to(ROOT / folder)
            same = copy.is_file() and filecmp.cmp(path, copy, shallow=False)
            assert same, f"{copy} is not {path}: install again, or with `pip install -e .`"
