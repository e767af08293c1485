"""Properties of all readers of JSON documents: a value that the file really says, or one line that says why not."""

import json
from dataclasses import MISSING, asdict, fields
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.hostile import (
    DEEP,
    HOSTILE_JSON,
    as_json,
    damaged,
    examples,
    hostile_json,
    json_files,
    json_values,
    mutated,
    refused,
)
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from ee_scale.artifact.checkpoint import STATE, read_checkpoint
from ee_scale.artifact.run_folder import IDENTITY, METRICS, read_run, trim_metrics
from ee_scale.backbone.exit_layers import read_spec
from ee_scale.backbone.model_folder import SIDECAR_CONFIG, SIDECAR_WEIGHTS, ModelFolder, read_sidecar
from ee_scale.backbone.small_files import GENERATION_CONFIG
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.errors import UserError
from ee_scale.evaluation.log_report import report_table, warnings, write_log_report
from ee_scale.evaluation.log_summary import summarise
from ee_scale.files import file_digest
from ee_scale.inference.prompts import read_prompts
from ee_scale.launching.multirun import last_losses
from ee_scale.modeling.calibration import CALIBRATION_KEY
from ee_scale.modeling.decision_log import DecisionLog
from ee_scale.modeling.heads import HEADS, ExitSpec
from ee_scale.modeling.kinds import KINDS
from ee_scale.modeling.policies import NEVER, ExitPolicy, resolve_policy
from ee_scale.palettes.manifest import MANIFEST, Device, Manifest, Member, Tried, read_manifest, write_manifest
from ee_scale.reading import DEEPEST, parse_json, read_json, read_object, write_json

SPEC = ExitSpec((2, 4), "mlp", "low_rank", 8).to_dict()
SHORT = ExitSpec((2, 4), "norm", "shortlist", shortlist=3, shortlist_ids=(5, 0, 7)).to_dict()
CALIBRATION = {
    "policy": "threshold",
    "thresholds": {"2": 0.9, "4": None},
    "certified": True,
    "exits": {"2": {"share": 0.5, "agreement": 0.99}},
    "tags": {"sql": {"thresholds": {"2": 0.8, "4": 0.7}}},
    "shortlist": [5, 3, 1],
}
LOG = [
    {"num_layers": 6, "layers": [2, 4], "policy": "threshold"},
    {"time": 1767225600.1, "request": "a", "position": 1, "layer": 2, "confidence": 0.9, "tag": "sql", "agrees": True},
    {"time": 1767225601.0, "request": 7, "position": 2, "layer": 6, "confidence": None, "tag": None, "agrees": None},
]
METRIC_LINES = [{"step": step, "loss": {"2": 1.5, "4": 1.25}, "tokens": 64 * step} for step in (1, 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    return tmp_path_factory.mktemp("documents")


# --- JSON itself


@given(st.one_of(hostile_json, json_values.map(as_json), damaged(as_json(LOG))))
@examples(150)
def test_json_is_a_value_or_a_line(folder, content) -> None:
    path = folder / "any.json"
    path.write_bytes(content)
    found = refused(lambda: read_object(path), megabytes=20)
    if found is not None:
        json.dumps(found)  # shallow enough for whatever walks it later
        assert as_json(found) == as_json(json.loads(content))


@given(json_values)
@examples(60)
def test_json_round_trip(value) -> None:
    assert as_json(parse_json(json.dumps(value))) == as_json(value)


@pytest.mark.parametrize(
    "text", ["[" * DEEP, '"' + '\\"' * DEEP, '["' * DEEP, '{"a\\\\":' * DEEP, "[" * DEEP + "]" * DEEP]
)
def test_deep_texts_take_no_time(text) -> None:
    with pytest.raises(ValueError, match=r"nested more|Unterminated|delimiter"):
        parse_json(text)


def test_brackets_in_strings_are_no_depth() -> None:
    text = json.dumps(["[{" * DEEP, 'a"' + "[" * DEEP])
    assert parse_json(text) == json.loads(text)
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    with pytest.raises(ValueError, match=f"nested more than {DEEPEST} levels deep"):
        parse_json("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1))


# --- documents with a digest


def _signed(path, document: Any) -> None:
    """As somebody who knows how digests are made."""
    if isinstance(document, dict):
        write_json(path, document)
    else:
        path.write_bytes(as_json(document))


STATE_DOCUMENT = {"step": 3, "consumed_samples": 12, "steps": 9, "files": {"a.bin": ""}, "early_exit": SPEC}


@given(json_files({**STATE_DOCUMENT, "sha256": "0" * 64}))
@examples(40)
def test_unsigned_documents_are_refused(folder, content) -> None:
    (folder / "signed.json").write_bytes(content)
    assert refused(lambda: read_json(folder / "signed.json")) is None


@given(mutated(STATE_DOCUMENT))
@example({**STATE_DOCUMENT, "files": {"x" * 600: ""}})
@example({**STATE_DOCUMENT, "files": {"\x00": ""}})
@example({**STATE_DOCUMENT, "files": ["a.bin"]})
@example({**STATE_DOCUMENT, "step": True})
@examples(80)
def test_states_of_checkpoints(folder, document) -> None:
    (folder / "a.bin").write_bytes(b"weights")
    if isinstance(document, dict) and isinstance(document.get("files"), dict) and document["files"].get("a.bin") == "":
        document = {**document, "files": {**document["files"], "a.bin": file_digest(folder / "a.bin")}}
    _signed(folder / STATE, document)
    found = refused(lambda: read_checkpoint(folder))
    if found is not None:
        assert as_json(found) == as_json(document)
        assert type(found["step"]) is int
        assert set(found["files"]) <= {"a.bin", ".", ""}


RUN = {
    "kind": "tune",
    "base_model": "models/base",
    "base_fingerprint": "f00d",
    "settings": {"optim": {"lr": 1e-4}},
    "early_exit": SPEC,
    "run_id": "0a1b2c3d",
}
SUPERNET = {**RUN, "kind": "supernet", "task": "classify", "labels": ["no", "yes"], "parts": 1}


@given(st.sampled_from((RUN, SUPERNET)).flatmap(lambda run: st.tuples(st.just(run["kind"]), mutated(run))))
@examples(80)
def test_identities_of_runs(folder, case) -> None:
    kind, document = case
    _signed(folder / IDENTITY, document)
    found = refused(lambda: read_run(folder, kind))
    if found is not None:
        assert as_json(found) == as_json(document)
        if kind == "tune":
            assert ExitSpec.from_dict(found["early_exit"]).to_dict() == {
                **ExitSpec(()).to_dict(),
                **found["early_exit"],
            }
        else:
            assert all(isinstance(label, str) for label in found["labels"])


@given(mutated({"base_model": "models/base", "base_fingerprint": "f00d", "early_exit": SPEC, "step": 3}))
@examples(40)
def test_sidecars(folder, document) -> None:
    (folder / SIDECAR_WEIGHTS).write_bytes(b"weights")
    if isinstance(document, dict):
        document = {"files": {SIDECAR_WEIGHTS: file_digest(folder / SIDECAR_WEIGHTS)}, **document}
    _signed(folder / SIDECAR_CONFIG, document)
    found = refused(lambda: read_sidecar(folder))
    if found is not None:
        assert as_json(found) == as_json(document)
        assert isinstance(found["base_model"], str)


# --- manifests

specs = st.builds(
    SubnetSpec,
    st.integers(1, 4096),
    st.integers(1, 64),
    st.integers(1, 16384),
    st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True).map(sorted).map(tuple),
)
figures = st.floats(allow_nan=False)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
qualities = st.dictionaries(names, figures, max_size=2)
members = st.builds(
    Member,
    folder=names,
    spec=specs,
    params=st.integers(0, 10**15),
    layer_params=st.integers(0, 10**15),
    flops=st.integers(0, 10**20),
    prefill_ms=figures,
    token_ms=st.none() | figures,
    memory_mb=figures,
    file_mb=figures,
    joules_per_token=figures | names,
    quality=qualities,
    estimated_ms=st.none() | figures,
    onnx=st.dictionaries(names, qualities, max_size=2),
)
manifests = st.builds(
    Manifest,
    *(names, names, names, names),
    device=st.builds(Device, names, st.integers(1, 512), names),
    limits=qualities,
    objective=names,
    latency=names,
    metric=names,
    full=members,
    members=st.lists(members, max_size=2),
    tried=st.lists(st.builds(Tried, specs, qualities, qualities), max_size=2),
)


@given(manifests)
@examples(40)
def test_a_manifest_comes_back(folder, manifest) -> None:
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


ONE = Member("m", SubnetSpec(64, 2, 128, (0, 3)), 10, 8, 20, 1.5, None, 90.0, 0.5, "not measured", {"f1": 0.5}, 2.0)
MANIFEST_DOCUMENT = json.loads(
    json.dumps(
        Manifest(
            "base", "f00d", "runs/s", "classify", Device("cpu", 2, "2"), {"params": 9.0}, "params", "prefill_ms", "f1",
            ONE, [ONE], [Tried(ONE.spec, {"f1": 0.5}, {})],
        ).to_dict()
    )
)  # fmt: skip


@given(mutated(MANIFEST_DOCUMENT))
@example({**MANIFEST_DOCUMENT, "members": [{**MANIFEST_DOCUMENT["members"][0], "params": "10"}]})
@example({**MANIFEST_DOCUMENT, "full": None})
@examples(150)
def test_a_changed_manifest_says_what_it_says(folder, document) -> None:
    _signed(folder / MANIFEST, document)
    found = refused(lambda: read_manifest(folder))
    if found is not None:
        told = json.loads(json.dumps(asdict(found)))
        for kind, values in (
            (Manifest, document),
            *((Member, one) for one in (document["full"], *document["members"])),
        ):
            for name, value in _what_may_be_left_out(kind).items():
                values.setdefault(name, value)
        del document["version"]
        assert told == document or "NaN" in json.dumps(told)


def _what_may_be_left_out(kind: type) -> dict[str, object]:
    made = {f.name: f.default_factory() for f in fields(kind) if f.default_factory is not MISSING}
    return made | {f.name: f.default for f in fields(kind) if f.default is not MISSING}


# --- exits and calibrations


@given(mutated(SPEC) | mutated(SHORT))
@example({**SHORT, "shortlist_ids": [5, 0, 10]})
@example({**SHORT, "shortlist": 10**12})
@example({**SPEC, "layers": "12"})
@example({**SPEC, "layers": [[1]]})
@example({**SPEC, "rank": 10**12})
@example({**SPEC, "kind": {}})
@examples(100)
def test_exits_of_a_config(document) -> None:
    found = refused(lambda: read_spec(document, "config.json", SimpleNamespace(num_hidden_layers=6, vocab_size=10)))
    if found is not None:
        assert found.to_dict() == {**ExitSpec(()).to_dict(), **document}
        assert all(1 <= k <= 6 for k in found.layers)
        assert (found.kind in KINDS, found.head in HEADS) == (True, True)
        assert all(0 <= token < 10 for token in found.shortlist_ids)


@given(json_files({"eos_token_id": 1, CALIBRATION_KEY: CALIBRATION}))
@example(as_json({CALIBRATION_KEY: {**CALIBRATION, "thresholds": {"2": "high"}}}))
@example(as_json({CALIBRATION_KEY: {**CALIBRATION, "thresholds": {"2": float("nan")}}}))
@example(as_json({CALIBRATION_KEY: {**CALIBRATION, "shortlist": [0.5]}}))
@example(as_json({CALIBRATION_KEY: {**CALIBRATION, "tags": [1]}}))
@example(as_json({CALIBRATION_KEY: [CALIBRATION]}))
@example(b"[" * DEEP)
@examples(150)
def test_calibrations(folder, content) -> None:
    (folder / GENERATION_CONFIG).write_bytes(content)
    found = refused(lambda: ModelFolder(folder).calibration())
    if found is not None:
        assert as_json(found) == as_json(json.loads(content)[CALIBRATION_KEY])
        policy = resolve_policy(found["policy"], (2, 4), calibration=found, tags=["sql", "other"])
        assert isinstance(policy, ExitPolicy)
        assert all(limit == limit for row in policy.limits for limit in row)
        if found.get("shortlist"):
            ids = resolve_policy("lossless", (2, 4), calibration=found, shortlist=2).shortlist
            assert ids == tuple(found["shortlist"][:2])


@given(mutated(CALIBRATION))
@examples(80)
def test_a_generation_config_of_a_stranger(document) -> None:
    """The same through `generate`, which takes it from the model: ValueError in one line, or limits that it names."""
    for name in (*NEVER, "lossless"):
        try:
            policy = resolve_policy(name, (2, 4), calibration=document, tags=["sql"], vocab_size=100)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert len(str(error)) < 1000  # noqa: PT017
        else:
            assert isinstance(policy, ExitPolicy)


# --- decision logs and metrics


def _lines(*records: Any) -> bytes:
    return b"".join(as_json(record) + b"\n" for record in records)


BIG = {**LOG[1], "time": 10**400}
logs = st.one_of(
    st.integers(0, 2).flatmap(lambda i: mutated(LOG[i]).map(lambda one: _lines(*LOG[:i], one, *LOG[i + 1 :]))),
    damaged(_lines(*LOG)),
    hostile_json.map(lambda text: _lines(*LOG) + text),
)


@given(logs)
@example(_lines(LOG[0], BIG, LOG[1]))
@example(_lines(LOG[0], {**LOG[1], "time": float("nan")}, LOG[2]))
@example(_lines(LOG[0], {**LOG[1], "layer": 2.5}, LOG[2]))
@example(_lines(LOG[0], {**LOG[1], "tag": ["sql"]}, LOG[2]))
@example(_lines(LOG[0], {**LOG[1], "tag": "[/red]"}, LOG[2]))
@example(_lines(LOG[0], {**LOG[1], "tag": "\ud800"}, LOG[2]))
@example(_lines(LOG[0], {**LOG[1], "confidence": "high"}, LOG[2]))
@example(_lines({**LOG[0], "num_layers": [6]}, LOG[1]))
@example(_lines("num_layers", LOG[1]))
@example(_lines(*LOG) + b"[" * DEEP)
@examples(100)
def test_decision_logs(folder, content) -> None:
    path = folder / "log.jsonl"
    path.write_bytes(content)
    summary = refused(lambda: summarise([path], 3600.0), megabytes=20)
    if summary is None:
        return
    for axis in (None, 0, 1):
        with (folder / "table.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=200, markup=False).print(report_table(summary, axis, "title", 0.95))
    warnings(summary, 0.99, 0.95)
    total = summary.by(None)[None]
    assert total.tokens + summary.skipped <= content.count(b"\n") + 1
    assert 0 <= total.agreed <= total.audited <= total.exited <= total.tokens


@given(st.integers(0, 2).flatmap(lambda i: mutated(LOG[i]).map(lambda one: _lines(*LOG[:i], one, *LOG[i + 1 :]))))
@example(_lines(LOG[0], {**LOG[1], "tag": "\ud800"}, LOG[2]))
@example(_lines(LOG[0], {**LOG[1], "time": 0}, {**LOG[2], "time": (1 << 36) - 1}))
@examples(4)
def test_reports_of_decision_logs(folder, content) -> None:
    path = folder / "log.jsonl"
    path.write_bytes(content)
    summary = refused(lambda: summarise([path], 3600.0))
    if summary is not None:
        write_log_report(folder / "report", summary, {"files": [str(path)]}, 0.99, 0.95)
        assert json.loads((folder / "report" / "report.json").read_text())["total"]["tokens"] > 0


def test_a_log_without_line_ends(folder) -> None:
    """One line of many megabytes is no decision, and is not held in memory."""
    path = folder / "endless.jsonl"
    path.write_bytes(_lines(*LOG) + b"[1, " * (8 << 20))
    summary = refused(lambda: summarise([path], 3600.0), megabytes=16)
    assert summary.by(None)[None].tokens == 2
    assert summary.skipped > 0


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


decisions_made = st.tuples(
    texts | st.integers(),
    st.integers(0, 99),
    st.integers(1, 12),
    st.none() | st.floats(-100, 100) | st.just(float("nan")),
    st.none() | texts,
    st.sampled_from((None, True, False)),
)


@given(st.lists(decisions_made, min_size=1, max_size=6))
@example([("a", 1, 2, 0.5, "\ud800", None)])
@examples(50)
def test_a_decision_log_comes_back(folder, decisions) -> None:
    path = folder / "own.jsonl"
    path.unlink(missing_ok=True)
    with DecisionLog(path) as log:
        log.describe(12, [3, 6], "threshold")
        for decision in decisions:
            log.add(*decision[:4], tag=decision[4], agrees=decision[5])
    summary = summarise([path], 3600.0)
    assert (summary.skipped, summary.num_layers) == (0, {12})
    total = summary.by(None)[None]
    assert total.tokens == len(decisions)
    assert total.depth == sum(decision[2] for decision in decisions)
    tags = {"-" if tag is None else tag.encode("utf-8", "replace").decode() for *_, tag, _ in decisions}
    assert set(summary.by(1)) == tags


@st.composite
def metric_files(draw) -> tuple[int, bytes]:
    """(lines before the changed one, content)."""
    if draw(st.booleans()):
        return 0, draw(damaged(_lines(*METRIC_LINES)) | hostile_json.map(lambda text: text + b"\n"))
    at = draw(st.integers(0, 2))
    return at, _lines(*METRIC_LINES[:at], draw(mutated(METRIC_LINES[at])), *METRIC_LINES[at + 1 :])


@given(metric_files())
@example((0, b"[]\n"))
@example((0, b'{"step": "1"}\n'))
@example((0, b"\xff\n"))
@examples(100)
def test_metrics(folder, case) -> None:
    good, content = case
    (folder / METRICS).write_bytes(content)
    losses = last_losses(folder)
    assert all(isinstance(value, float) for key, value in losses.items() if key != "step")
    trim_metrics(folder / METRICS, 2)
    kept = (folder / METRICS).read_bytes().split(b"\n")[:-1]
    assert content.startswith(b"\n".join(kept))
    assert len(kept) >= min(good, 2)
    assert all(json.loads(line)["step"] <= 2 for line in kept)


# --- prompts


def _prompts(path) -> list[str]:
    return read_prompts(SimpleNamespace(prompt=None, prompts=str(path)))


@given(st.one_of(json_files({"prompt": "def main("}), damaged(_lines({"prompt": "a"}, {"prompt": "ü\n"}))))
@example(b'{"prompt": "\\ud800"}')
@example(b"[" * DEEP)
@example(b'{"prompt": ' + b"9" * 5000 + b"}")
@example(b'"prompt"')
@examples(100)
def test_prompt_files(folder, content) -> None:
    for name in ("prompts.jsonl", "prompts.txt"):
        (folder / name).write_bytes(content)
        found = refused(lambda path=folder / name: _prompts(path), megabytes=20)
        for text in found or ():
            assert text
            assert text.encode("utf-8")


@given(st.lists(texts.filter(lambda text: text.strip()), min_size=1, max_size=4))
@examples(40)
def test_prompts_come_back(folder, wanted) -> None:
    (folder / "own.jsonl").write_bytes(_lines(*({"prompt": text} for text in wanted)))
    assert _prompts(folder / "own.jsonl") == wanted


def test_names_that_no_file_has(folder) -> None:
    for name in ("x" * 600, "\x00", "a/" * 3000):
        with pytest.raises(UserError, match="prompts="):
            _prompts(name)


def test_all_hostile_texts_are_small() -> None:
    assert all(len(text) < 1_000_000 for text in HOSTILE_JSON)
