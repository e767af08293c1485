"""A real labelled set without a download: docstrings of installed packages, labelled with the package they document.

    python scripts/docstring_set.py out=sets/docstrings                 # 12 classes, up to 600 training texts of each
    python scripts/docstring_set.py out=sets/small classes=4 per_class=100

Writes train.jsonl, valid.jsonl, test.jsonl (fields text, label, module) and info.json. The classes are those of
PACKAGES that are installed and have most docstrings. A text is the prose of the docstring of a class or function, up
to its first section (parameters, examples, ...) and at most 400 characters; sources are parsed and never imported.

The names of all chosen packages become 'pkg' in every text, inside words too (DeepSpeedEngine, `torch_dtype`): the own
name would give the label away, another's name would rule a label out, and nothing in its place would break sentences
and dotted names. A module file lies in one split as a whole (80/10/10 by a hash of its name). Texts that are the same
up to case, digits and punctuation count once, and not at all when two packages have them. Same packages, same set: it
is built again only when a version or a setting changes.
"""

import ast
import hashlib
import json
import platform
import re
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import track

from ee_scale.files import published, remove_folder

FORMAT_VERSION = 1
LONGEST, SHORTEST = 400, 40
MARK = "pkg"
PYTHON = "python"
# Distributions that come with this project (some with its extras), and what a package is called in texts.
PACKAGES: dict[str, tuple[str, ...]] = {
    PYTHON: ("cpython", "python"),
    "accelerate": ("accelerate",),
    "deepspeed": ("deepspeed",),
    "fonttools": ("fonttools",),
    "huggingface-hub": ("hugging face",),
    "matplotlib": ("matplotlib", "pyplot", "pylab", "plt", "mpl"),
    "megatron-core": ("megatron-core", "megatron", "mcore"),
    "networkx": ("networkx", "nx"),
    "nltk": ("nltk",),
    "numpy": ("numpy", "np"),
    "onnxruntime": ("onnxruntime", "ort"),
    "optuna": ("optuna",),
    "pandas": ("pandas", "pd"),
    "pydantic": ("pydantic",),
    "rich": ("rich",),
    "scikit-learn": ("scikit-learn", "sklearn"),
    "scipy": ("scipy",),
    "setuptools": ("setuptools",),
    "sqlalchemy": ("sqlalchemy",),
    "sympy": ("isympy", "sympy"),
    "torch": ("functorch", "pytorch", "torch"),
    "transformers": ("transformers", "hugging face"),
    "wandb": ("wandb", "weights & biases", "w&b"),
}
# What is no part of the package: tests, installed packages below the standard library, copies of other people's.
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data",
    "_vendor", "vendor", "vendored", "extern", "externals", "third_party",
}  # fmt: skip
# Where the prose of a docstring ends: at a heading with a rule or colon, a field, a directive, an example, a comment.
SECTION = re.compile(
    r"^[ \t]*(?:\w[^\n]*\n[ \t]*[-=~^]{3,}|(?:args|arguments|parameters|keyword \w+|attributes|returns?|yields?|raises|"
    r"examples?|notes?|see also|usage|shape|inputs?|outputs?):|:\w[^:\n]*:(?!`)|\.\. \w|>>>|@\w+|<!--)",
    re.IGNORECASE | re.MULTILINE,
)
SPLITS = ("train", "valid", "test")


@dataclass
class Settings:
    """What the command line sets."""

    out: str = MISSING
    classes: int = 12
    per_class: int = 600


@dataclass(frozen=True)
class Package:
    """Sources that share a label: (module file as a name, its path)."""

    label: str
    version: str
    files: tuple[tuple[str, Path], ...]


@dataclass(frozen=True)
class Row:
    """One example."""

    text: str
    label: str
    module: str


def find_packages(site: Path, stdlib: Path) -> list[Package]:
    """The installed ones of PACKAGES, by label."""
    found = [Package(PYTHON, platform.python_version(), _files_below(stdlib))]
    for distribution in distributions(path=[str(site)]):
        label = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if label in PACKAGES:
            found.append(Package(label, distribution.version, _files_of(distribution)))
    return sorted(found, key=lambda package: package.label)


def _files_below(root: Path) -> tuple[tuple[str, Path], ...]:
    return _wanted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))


def _files_of(distribution: Distribution) -> tuple[tuple[str, Path], ...]:
    return _wanted((file.as_posix(), Path(distribution.locate_file(file))) for file in distribution.files or [])


def _wanted(files: Iterable[tuple[str, Path]]) -> tuple[tuple[str, Path], ...]:
    return tuple(
        sorted(
            (name, path)
            for name, path in files
            if name.endswith(".py") and not SKIPPED_FOLDERS.intersection(name.split("/")[:-1]) and path.is_file()
        )
    )


def package_rows(package: Package) -> list[Row]:
    """The texts of its docstrings, names not yet masked."""
    return [Row(text, package.label, name) for name, path in package.files for text in texts(path.read_bytes())]


def texts(source: bytes) -> Iterator[str]:
    """Prose of the docstrings of classes and functions: white space joined, cut to LONGEST at a word."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates, other encodings, null bytes
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            text = " ".join(SECTION.split(docstring, maxsplit=1)[0].split())
            if text:
                yield text if len(text) <= LONGEST else text[: LONGEST + 1].rpartition(" ")[0] or text[:LONGEST]


def name_pattern(labels: Iterable[str]) -> re.Pattern[str]:
    """Matches the names of these packages anywhere, short ones (np, rich) as a word or the start of CamelCase."""
    names = sorted({name for label in labels for name in PACKAGES[label]}, key=lambda name: (-len(name), name))
    parts = []
    for name in names:
        part = f"(?i:{re.sub('[- ]', '[-_ ]?', name)})"
        parts.append(part if len(name) >= 5 else f"(?<![A-Za-z]){part}(?![a-z])")
    return re.compile("|".join(parts))


def masked(rows: Iterable[Row], pattern: re.Pattern[str]) -> list[Row]:
    """The rows with MARK for every name; what is then shorter than SHORTEST is dropped."""
    found = [Row(pattern.sub(MARK, row.text), row.label, row.module) for row in rows]
    return [row for row in found if len(row.text) >= SHORTEST and fingerprint(row.text)]


def fingerprint(text: str) -> str:
    """What makes two texts the same: the letters alone."""
    return "".join(char for char in text.casefold() if char.isalpha())


def distinct(rows: Sequence[Row]) -> list[Row]:
    """The first row of each text; none of a text that has two labels."""
    labels = defaultdict(set)
    for row in rows:
        labels[fingerprint(row.text)].add(row.label)
    first = {fingerprint(row.text): row for row in reversed(rows)}
    return [row for key, row in first.items() if len(labels[key]) == 1]


def split_of(row: Row) -> str:
    """The split of its module file."""
    tenth = _digest(row.label, row.module)[0] % 10
    return "valid" if tenth == 8 else "test" if tenth == 9 else "train"


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).digest()


def build(packages: Sequence[Package], classes: int, per_class: int) -> dict[str, list[Row]]:
    """The splits, shuffled: at most `per_class` rows of a class in train, a quarter of that in the other two."""
    rows = {p.label: package_rows(p) for p in track(packages, "parsing", transient=True, console=Console(stderr=True))}
    sizes = {label: len({row.text for row in found if len(row.text) >= SHORTEST}) for label, found in rows.items()}
    ranking = sorted((label for label in sizes if sizes[label]), key=lambda label: (-sizes[label], label))
    if len(ranking) < classes:
        raise SystemExit(f"classes={classes}: docstrings of {len(ranking)} packages were found")
    chosen = sorted(ranking[:classes])
    found = distinct(masked((row for label in chosen for row in rows[label]), name_pattern(chosen)))
    limits = {"train": per_class, "valid": -(-per_class // 4), "test": -(-per_class // 4)}
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    counts: Counter[tuple[str, str]] = Counter()
    for row in sorted(found, key=lambda row: _digest(row.label, row.module, row.text)):
        split = split_of(row)
        if counts[split, row.label] < limits[split]:
            counts[split, row.label] += 1
            splits[split].append(row)
    # Large packages come first in the order of choice: they fill up sooner.
    return {split: sorted(rows, key=lambda row: _digest("order", row.text)) for split, rows in splits.items()}


def identity(packages: Sequence[Package], settings: Settings) -> dict[str, Any]:
    """What the set depends on."""
    return {
        "format": FORMAT_VERSION,
        "classes": settings.classes,
        "per_class": settings.per_class,
        "versions": {package.label: package.version for package in packages},
    }


def write(folder: Path, splits: dict[str, list[Row]], info: dict[str, Any]) -> None:
    """The whole folder, or nothing new; it replaces a set that is there."""
    counts = {split: dict(sorted(Counter(row.label for row in rows).items())) for split, rows in splits.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with published(folder) as temporary:
        for split, rows in splits.items():
            lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
            (temporary / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        text = json.dumps({**info, "counts": counts}, indent=1) + "\n"
        (temporary / "info.json").write_text(text, encoding="utf-8")
        remove_folder(folder)


def is_built(folder: Path, info: dict[str, Any]) -> bool:
    """Whether this very set is there; a folder with anything but a set of ours is refused."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        stored = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        ours = {"format", "counts"} <= stored.keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours or {path.name for path in folder.iterdir()} - {"info.json", *(f"{split}.jsonl" for split in SPLITS)}:
        raise SystemExit(f"out={folder}: is there and is not a set of this script; give a new folder")
    return all((folder / f"{split}.jsonl").is_file() for split in SPLITS) and info.items() <= stored.items()


def read_settings(arguments: list[str]) -> Settings:
    """name=value from the command line."""
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_cli(arguments)))
    except OmegaConfBaseException as error:
        raise SystemExit(f"{error.args[0].splitlines()[0]}; usage: out=DIR [classes=12] [per_class=600]") from error
    if settings.classes < 2 or settings.per_class < 1:
        raise SystemExit(f"classes={settings.classes} per_class={settings.per_class}: must be at least 2 and 1")
    return settings


def main(arguments: list[str]) -> None:
    """Build the set unless it is there."""
    out = Console()
    settings = read_settings(arguments)
    folder = Path(settings.out).expanduser()
    packages = find_packages(Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib")))
    info = identity(packages, settings)
    if is_built(folder, info):
        out.print(f"{folder}: there already, same settings and versions")
        return
    splits = build(packages, settings.classes, settings.per_class)
    write(folder, splits, info)
    out.print(f"{folder}: " + ", ".join(f"{len(rows)} {split}" for split, rows in splits.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
