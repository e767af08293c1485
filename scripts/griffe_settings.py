"""For the API reference: a config's field says its default, its help line and its rule, read from `setting(...)`."""

import ast
from pathlib import Path

from griffe import Attribute, Docstring, Extension

RULES = {"at_least": "at least {}", "above": "above {}", "one_of": "one of {}", "Rule": "{}"}
GROUPS = Path(__file__).resolve().parents[1] / "ee_scale" / "config" / "groups.py"
SHARED = {  # help lines that several settings have
    node.targets[0].id: node.value.value
    for node in ast.parse(GROUPS.read_text(encoding="utf-8")).body
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
}


class SettingFields(Extension):
    """Turns `lr: float = setting(1e-4, "peak learning rate", rule=at_least(0))` into a default and a docstring."""

    def on_attribute(self, *, attr: Attribute, **_: object) -> None:
        """Called by griffe for each attribute, when its module has been read."""
        if attr.value is None or not attr.path.startswith("ee_scale.config."):
            return
        call = ast.parse(str(attr.value), mode="eval").body
        name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else None
        if name == "field":  # a config within a config
            attr.value, attr.docstring = None, Docstring("A group of settings.", parent=attr)
        if name == "setting":
            attr.value, words = described(call)
            attr.docstring = Docstring(words, parent=attr)


def described(call: ast.Call) -> tuple[str, str]:
    """(default, help line with its rule) of a call of `setting`."""
    default, text = call.args
    words = SHARED[text.id] if isinstance(text, ast.Name) else ast.literal_eval(text)
    for keyword in call.keywords:
        if keyword.arg == "written":
            words += f"; on the command line: {ast.literal_eval(keyword.value)}"
        if keyword.arg == "rule" and (rule := _rule(keyword.value)):
            words += f" ({rule})"
    return ast.unparse(default).replace("MISSING", "<required>"), f"{words}."


def _rule(rule: ast.expr) -> str | None:
    """In words; None where the words stand in another module."""
    if not isinstance(rule, ast.Call) or rule.func.id not in RULES:
        return None
    given = rule.args[:1] if rule.func.id == "Rule" else rule.args
    values = [value.value if isinstance(value, ast.Constant) else ast.unparse(value) for value in given]
    return RULES[rule.func.id].format(", ".join(map(str, values)))
