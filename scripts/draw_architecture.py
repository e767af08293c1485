"""Draw the rooms of `ee_scale/` and which of them import which: docs/figures/architecture.svg.

python scripts/draw_architecture.py

Everything in the picture is read from the code: a room's text is the first clause of its docstring, an arrow means
that it imports the other room and none between the two does. A test compares the committed file with what this draws.
"""

import ast
import re
import sys
import textwrap
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "figures" / "architecture.svg"
BASE = "errors, log, files"  # the small modules that every room uses, as one box
SMALL = ("errors", "log", "libraries", "files", "reading", "progress")
WIDTH, BOX_WIDTH, BOX_HEIGHT, ROW, MARGIN = 940, 214, 54, 82, 16
STYLE = """
text { font: 12px sans-serif; fill: #24292f; text-anchor: middle; }
.name { font: bold 14px monospace; }
rect { fill: #eef3fb; stroke: #5b7db1; }
.paper { fill: white; stroke: none; }
path { fill: none; stroke: #8a94a3; stroke-width: 1.4; marker-end: url(#tip); }
marker path { fill: #8a94a3; stroke: none; marker-end: none; }
"""


def main() -> int:
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(drawing(), encoding="utf-8")
    return 0


def drawing() -> str:
    """The picture, as SVG."""
    uses, texts = read_rooms()
    rows = levels(uses)
    boxes = {
        room: (WIDTH * (2 * at + 1) / (2 * len(row)), MARGIN + ROW * number)
        for number, row in enumerate(rows)
        for at, room in enumerate(row)
    }
    height = 2 * MARGIN + ROW * (len(rows) - 1) + BOX_HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>The rooms of ee_scale: each imports only from rooms below it</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
    ]
    lines += [_arrow(boxes[room], boxes[other]) for room in sorted(uses) for other in sorted(direct(uses, room))]
    lines += [line for room in boxes for line in _box(room, texts[room], *boxes[room])]
    return "\n".join([*lines, "</svg>", ""])


def read_rooms() -> tuple[dict[str, set[str]], dict[str, str]]:
    """The rooms that each room imports from, and what each one is."""
    uses: dict[str, set[str]] = {BASE: set()}
    texts = {BASE: "the way out, one logger, whole files"}
    for path in sorted((ROOT / "ee_scale").rglob("*.py")):
        tree, room = ast.parse(path.read_text(encoding="utf-8")), _room(path.relative_to(ROOT).as_posix().split("/")[1])
        if room.startswith("__"):
            continue
        if room != BASE and path in (ROOT / "ee_scale" / f"{room}.py", ROOT / "ee_scale" / room / "__init__.py"):
            texts[room] = re.split(r"[:;.] |[:;.]$", ast.get_docstring(tree).partition("\n")[0])[0].replace("`", "")
        found = {_room(name) for node in ast.walk(tree) for name in _imported(node)}
        uses.setdefault(room, set()).update(found - {room})
    return uses, texts


def _imported(node: ast.AST) -> list[str]:
    """The parts of the package that an import statement names."""
    if not isinstance(node, ast.ImportFrom) or node.level or not (node.module or "").startswith("ee_scale"):
        return []
    return [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


def _room(name: str) -> str:
    name = name.removesuffix(".py")
    return BASE if name in SMALL else name


def levels(uses: dict[str, set[str]]) -> list[list[str]]:
    """Rooms by height, the highest first: a room stands above all that it imports from, and near those that use it."""

    @cache
    def height(room: str) -> int:
        return 1 + max(map(height, uses[room]), default=-1)

    places: dict[str, float] = {}
    rows = []
    for at in range(max(map(height, uses)), -1, -1):
        users = {room: [places[user] for user in places if room in direct(uses, user)] for room in uses}
        middle = {room: sum(found) / len(found) if found else 0.5 for room, found in users.items()}
        here = [room for room in uses if height(room) == at]
        rows.append(sorted(here, key=lambda room: (middle[room], len(direct(uses, room)), room)))
        places |= {room: (2 * number + 1) / (2 * len(here)) for number, room in enumerate(rows[-1])}
    return rows


def direct(uses: dict[str, set[str]], room: str) -> set[str]:
    """What a room imports from, without what those rooms import from in their turn."""

    @cache
    def below(other: str) -> frozenset[str]:
        return frozenset(uses[other]).union(*map(below, uses[other]))

    return {other for other in uses[room] if not any(other in below(third) for third in uses[room])}


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (to_x, to_y) = (start[0], start[1] + BOX_HEIGHT), end
    bend = (to_y - y) / 2
    return f'<path d="M{x:g} {y:g} C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y - 1:g}"/>'


def _box(room: str, text: str, x: float, y: float) -> list[str]:
    shown = textwrap.wrap(text, 33)
    shown = [shown[0], shown[1] + (" ..." if len(shown) > 2 else "")] if len(shown) > 1 else shown
    lines = [f'<rect x="{x - BOX_WIDTH / 2:g}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>']
    lines += [f'<text class="name" x="{x:g}" y="{y + 17}">{escape(room)}</text>']
    return lines + [f'<text x="{x:g}" y="{y + 33 + 14 * at}">{escape(line)}</text>' for at, line in enumerate(shown)]


if __name__ == "__main__":
    sys.exit(main())
