"""The size and the joints of the package, measured: what the rules in CONTRIBUTING.md ask for.

python scripts/house.py            # of this checkout
python scripts/house.py <folder>   # of another one
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES, FUNCTION_LINES = 350, 60
# What an object should know instead of the places that ask.
ASKED = {
    "isinstance(plan, ...)": r"isinstance\((?:\w+\.)?plan,",
    "model_type ==, in, [...]": r"model_type (?:==|!=|in|not in) |\[[\w.]*model_type\]",
    "kind of exit ==, in": r"spec\.kind (?:==|!=|in|not in) ",
    "noqa": r"# noqa",
    "type: ignore": r"# type: ignore",
}


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT)
    sources = sorted((root / "ee_scale").rglob("*.py"))
    texts = {path.relative_to(root): path.read_text(encoding="utf-8") for path in sources}
    lengths = {path: text.count("\n") for path, text in texts.items()}
    rows = {
        "files": str(len(texts)),
        "lines": f"{sum(lengths.values()):,}",
        f"files above {FILE_LINES} lines": _named(f"{p} {n}" for p, n in lengths.items() if n > FILE_LINES),
        f"functions above {FUNCTION_LINES} lines": _named(_long_functions(texts)),
        "parameters annotated Any": str(sum(map(_any_parameters, texts.values()))),
        "imported files per file": f"{_imports(texts) / len(texts):.1f}",
    }
    for name, pattern in ASKED.items():
        found = {path: len(re.findall(pattern, text)) for path, text in texts.items()}
        rows[name] = f"{sum(found.values())} in {sum(map(bool, found.values()))} files"
    width = max(map(len, rows))
    sys.stdout.writelines(f"{name:<{width}}  {value}\n" for name, value in rows.items())
    return 0


def _named(found: Iterator[str]) -> str:
    names = list(found)
    return f"{len(names)}" + (f" ({', '.join(names)})" if names else "")


def _functions(text: str) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))


def _long_functions(texts: dict[Path, str]) -> Iterator[str]:
    for path, text in texts.items():
        for function in _functions(text):
            if (lines := function.end_lineno - function.lineno + 1) > FUNCTION_LINES:
                yield f"{path}:{function.name} {lines}"


def _any_parameters(text: str) -> int:
    """Parameters whose annotation is Any itself, also through * and **."""
    count = 0
    for function in _functions(text):
        given = function.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        count += sum(isinstance(a.annotation, ast.Name) and a.annotation.id == "Any" for a in every if a is not None)
    return count


def _imports(texts: dict[Path, str]) -> int:
    """Pairs of files of which one imports the other, counted by the names in import statements."""
    pairs = set()
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ee_scale"):
                pairs.add((path, node.module))
    return len(pairs)


if __name__ == "__main__":
    sys.exit(main())
