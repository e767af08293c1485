"""What README and docs say of families is what the tests of them run."""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path

from helpers.features import FEATURES, tiny_model
from helpers.models import FAMILIES as WITH_AXES
from helpers.models import MORE_FAMILIES, VARIANTS

import ee_scale
from ee_scale.cli.models import model_rows
from ee_scale.families.decoders import DECODERS

ROOT = Path(ee_scale.__file__).parents[1]


def of(module: str, name: str) -> Iterable:
    """A list of cases in `tests/`."""
    return getattr(importlib.import_module(module), name)


def family(name: str) -> str:
    """Of a tiny model."""
    return name.partition("-")[0]


def test_the_table_of_models_is_what_the_tests_run() -> None:
    """In both directions: no axis without a case, no case without its axis."""
    axes: dict[str, set[str]] = {}
    for name, _, (tp, pp) in of("parity.test_logits", "CASES"):
        axes.setdefault(family(name), set()).update(["tp"] * (tp > 1) + ["pp"] * (pp > 1))
    decoded = {family(name) for name in of("parity.test_family_decoding", "DECODED")}
    cut = {case[0] for case in dict(of("parity.test_extraction", "CASES")).values()}
    converted = {*of("parity.test_convert_roundtrip", "FAMILIES"), *of("parity.test_convert_experts", "FAMILIES")}
    _, *rows = model_rows()
    told = {row[0]: row[1:] for row in rows}
    assert {name: {*tune.split()} - {"dp"} for name, (tune, *_) in told.items() if tune != "-"} == axes
    assert {name for name, (_, generate, *_) in told.items() if generate != "-"} == decoded
    assert {name for name, (_, _, supernet, *_) in told.items() if supernet != "-"} == cut
    assert {name for name, (*_, megatron, _) in told.items() if megatron != "-"} == converted


def test_the_readme_names_those_that_generate_on_a_grid() -> None:
    readme = (ROOT / "README.md").read_text()
    (said,) = re.findall(r"Of those from `gemma` on, (.*?) generate on a grid in the tests", readme)
    names = [each.name for each in DECODERS]
    tested = [name for name in of("dist.test_pipeline_decode", "MODELS") if name in names[names.index("gemma") :]]
    assert said.replace(" and ", ", ").split(", ") == tested


def test_the_table_of_features_is_what_the_tiny_models_have() -> None:
    models = {name: tiny_model(name) for name in (*WITH_AXES, *MORE_FAMILIES, *VARIANTS)}
    page = (ROOT / "docs" / "extend.md").read_text().split("| what | families |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()[2:]]
    for feature, row in zip(FEATURES, rows, strict=True):
        having = {family(name) for name, model in models.items() if feature.has(model)}
        assert row == [feature.words, ", ".join(each.name for each in DECODERS if each.name in having)]
        # What a config of the family may ask for is tried.
        assert {family(name) for name, model in models.items() if feature.may(model)} == having
