"""Rules of the project itself: import order, packages, names."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ee_scale
from ee_scale.families.registry import FAMILIES
from ee_scale.modeling.modeling_early_exit import code_files
from ee_scale.modeling.versions import NEWEST, OLDEST

ROOT = Path(ee_scale.__file__).parents[1]
SOURCES = sorted((ROOT / "ee_scale").rglob("*.py"))
# A module imports only from packages to its left.
ORDER = [
    "errors",
    "log",
    "progress",
    "libraries",
    "files",
    "reading",
    "modeling",
    "config",
    "families",
    "gpu",
    "grid",
    "backbone",
    "exits",
    "elastic",
    "data",
    "planning",
    "engine",
    "training",
    "artifact",
    "palettes",
    "conversion",
    "inference",
    "evaluation",
    "launching",
    "serving",
    "api",
    "cli",
    "__main__",
]


def _package(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = path.relative_to(ROOT).with_suffix("").parts
            base = list(here[: len(here) - node.level]) if node.level else []
            found.append(".".join([*base, node.module or ""]).strip("."))
            found += [f"{found[-1]}.{alias.name}" for alias in node.names] if found[-1] == "ee_scale" else []
    return [name for name in found if name.startswith("ee_scale.")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_left(path: Path):
    here = path.relative_to(ROOT / "ee_scale").parts[0].removesuffix(".py")
    if here == "__init__":
        assert not _imports(path)
        return
    for name in _imports(path):
        assert ORDER.index(_package(name)) <= ORDER.index(here), f"{path.name} imports {name}"


def test_no_circles_between_files():
    graph = {}
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set(_imports(path))
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name in done or name not in graph:
            return
        for other in graph[name]:
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_exported_code_stands_alone():
    """Every file that goes into exported folders imports its neighbours there, torch, transformers and Python only."""
    paths = code_files()
    assert {path.parent for path in paths} == {ROOT / "ee_scale" / "modeling"}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots = {node.module.split(".")[0]}
            else:
                continue
            if getattr(node, "level", 0):
                assert roots <= {path.stem for path in paths}, (path, roots)
            else:
                assert roots <= {*sys.stdlib_module_names, "torch", "transformers"}, (path, roots)


def test_the_lock_pins_what_the_ranges_allow():
    """One version for every system and Python, without a build's own tag (+cpu) or the name of an index."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    locked = {}
    for pinned in map(Requirement, lines):
        assert re.fullmatch(r"==[\w.]+", str(pinned.specifier)), pinned
        assert canonicalize_name(pinned.name) not in locked
        locked[canonicalize_name(pinned.name)] = str(pinned.specifier)[2:]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            assert requirement.specifier.contains(locked[name]), requirement
        if name == "transformers":  # what exported folders say of themselves
            assert str(requirement.specifier).split(",")[-1] == f">={OLDEST}"
            assert locked[name].startswith(f"{NEWEST}.")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked, that is built from the sdist, unpacked; neither build has anything to say."""
    folder = tmp_path_factory.mktemp("wheel")
    build(ROOT, "sdist", folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    build(next(path for path in folder.iterdir() if path.is_dir()), "wheel", folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def build(root: Path, target: str, folder: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower(), done.stderr


def test_the_wheel_holds_every_file(wheel: Path):
    wanted = {path.relative_to(ROOT) for path in (*SOURCES, *(ROOT / "ee_scale").rglob("*.html"))}
    wanted |= {
        Path("ee_scale", path.relative_to(ROOT))
        for folder in ("configs", "launch")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert {path.relative_to(wheel) for path in (wheel / "ee_scale").rglob("*") if path.is_file()} == wanted


def test_commands_of_the_wheel_need_no_checkout(wheel: Path, tmp_path: Path):
    """Settings and launch scripts are those inside it."""
    code = "import ee_scale; print(ee_scale.__file__); from ee_scale.cli.main import main; assert main() == 0"
    settings = ["launch", "tune", "+debug=cpu", "launcher=torchrun", "launcher.head=here", "--dry-run"]
    command = [sys.executable, "-c", code, *settings]
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(wheel))
    assert "launch/torchrun.sh" in done.stdout


def test_nothing_that_git_ignores_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout of git")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-ci", "--exclude-standard"]  # whoever owns the checkout
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (listed.returncode, listed.stdout) == (0, ""), listed.stderr


def test_nothing_is_named_like_the_builtin():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            names += [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
            names += [node.arg] if isinstance(node, ast.arg) else []
            assert "exit" not in names, path


def test_only_their_room_names_families():
    """What differs between models is asked of their family: no `model_type == ...`, no table by names of families."""
    for path in SOURCES:
        if path.is_relative_to(ROOT / "ee_scale" / "families"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value.split(".")[0] not in FAMILIES, (path, node.value)
            if isinstance(node, ast.Compare):
                compared = [getattr(side, "attr", None) for side in (node.left, *node.comparators)]
                assert "model_type" not in compared, (path, node.lineno)


MOST_ANY = 15  # what other code takes as it comes


def test_parameters_have_types():
    """Few parameters are annotated `Any`."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument is not None]
                names = [argument.annotation for argument in arguments]
                found += [path for name in names if isinstance(name, ast.Name) and name.id == "Any"]
    assert len(found) <= MOST_ANY, f"{len(found)} parameters are of type Any"


def test_every_test_is_collected(request: pytest.FixtureRequest):
    """pytest leaves folders of some names out, and takes one of two files of the same name."""
    files, left_out = sorted((ROOT / "tests").rglob("test_*.py")), request.config.getini("norecursedirs")
    folders = {folder for file in files for folder in file.relative_to(ROOT).parts[:-1]}
    assert {"dist", "unit"} <= folders
    assert not [folder for folder in folders for pattern in left_out if fnmatch(folder, pattern)]
    assert len({file.name for file in files}) == len(files)
