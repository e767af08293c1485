"""`ee-scale calibrate`: limits, evidence and the model folder, for both kinds of export; bad input."""

import json
import random
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ee_scale
from ee_scale.cli.main import main
from ee_scale.modeling.policies import choose_layers, resolve_policy

KEY = "early_exit_calibration"


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    """Both kinds of export of one run."""
    folder = tmp_path_factory.mktemp("exports")
    for kind in ("early_exit", "sidecar"):
        assert main(["export", f"src={finished_run}", f"out={folder / kind}", f"kind={kind}"]) == 0
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    """Its own copy of an export, to write into."""
    return lambda kind="early_exit": shutil.copytree(exported / kind, tmp_path / kind)


@pytest.fixture(scope="module")
def settings(corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    given = [f"data={corpus}", f"cache_dir={cache}", "max_tokens=6000", "seq_length=16", "batch_size=64"]
    return [*given, "agreement=0.6", "device=cpu"]


def stored(folder) -> dict:
    return json.loads((folder / "generation_config.json").read_text())[KEY]


def refused(arguments, capsys) -> str:
    """The one line that the command leaves."""
    capsys.readouterr()
    assert main(["calibrate", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("error: ")


def test_limits_evidence_and_what_is_said(copy, settings, corpus, tmp_path, capsys):
    folder = copy()
    before = json.loads((folder / "generation_config.json").read_text())
    assert main(["calibrate", f"model={folder}", *settings, "max_tokens=0", f"out={tmp_path / 'out'}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    found = stored(folder)
    assert found["certified"]
    assert found["p_value"] <= 0.05
    assert found["match_rate"] >= 0.6
    assert found["tokens"] > 10_000
    assert found["tested_units"] == found["units"] - round(found["units"] / 4)
    assert found["data"] == [str(corpus)]
    assert set(found) >= {"date", "ee_scale", "data_sha256", "confidence", "agreement", "mean_depth", "exits", "unit"}
    assert json.loads((tmp_path / "out" / "calibrate.json").read_text()) == found
    assert "Guaranteed with confidence 0.95 on text like this: at least 0.6 of all tokens" in shown
    assert "Not guaranteed: other kinds of text" in shown
    after = json.loads((folder / "generation_config.json").read_text())
    assert {**before, KEY: found} == {**after, **{k: v for k, v in before.items() if k == "_from_model_config"}}

    # Measured again by hand, on all the text: the shares are those of the testing part, so roughly.
    model = ee_scale.EarlyExitForCausalLM.from_pretrained(folder)
    assert getattr(model.generation_config, KEY) == found
    policy = resolve_policy("threshold", (1, 3), calibration=getattr(model.generation_config, KEY))
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(corpus.read_text()).input_ids)
    ids = ids[: len(ids) // 16 * 16].view(-1, 16)
    with torch.no_grad():
        output = model(ids, use_cache=False)
    logits = {k: value.flatten(0, 1) for k, value in output.exit_logits.items()}
    layers = choose_layers(policy, logits, 4)
    final = output.logits.flatten(0, 1).argmax(-1)
    said = final.clone()
    for k, value in logits.items():
        said = torch.where(layers == k, value.argmax(-1), said)
    assert float((said == final).float().mean()) == pytest.approx(found["match_rate"], abs=0.03)
    assert float(layers.float().mean()) == pytest.approx(found["mean_depth"], abs=0.1)
    assert float(layers.float().mean()) < 4
    counts = torch.bincount(final, minlength=301)
    # Another cut into windows changes some predictions, not which token is the most frequent.
    assert found["shortlist"][0] == int(counts.argmax())
    assert len(set(found["shortlist"])) == len(found["shortlist"])


def test_a_sidecar_keeps_its_own(copy, settings, exported, model_dir):
    folder = copy("sidecar")
    before = (model_dir / "generation_config.json").read_bytes()
    assert main(["calibrate", f"model={folder}", *settings]) == 0
    assert json.loads((folder / "generation_config.json").read_text()) == {KEY: stored(folder)}
    model = ee_scale.EarlyExitForCausalLM.from_pretrained(folder)
    assert getattr(model.generation_config, KEY) == stored(folder)
    assert model.generation_config.eos_token_id is not None
    assert (model_dir / "generation_config.json").read_bytes() == before


def test_it_survives_every_way_to_open_and_save(copy, settings, tmp_path):
    folder = copy()
    assert main(["calibrate", f"model={folder}", *settings, "policy=margin", "seed=3"]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert getattr(model.generation_config, KEY)["policy"] == "margin"
    model.save_pretrained(tmp_path / "again")
    again = ee_scale.EarlyExitForCausalLM.from_pretrained(tmp_path / "again")
    assert getattr(again.generation_config, KEY) == stored(folder)


@pytest.mark.parametrize("policy", ["entropy", "threshold"])
def test_a_loss_bound(copy, settings, policy):
    folder = copy()
    own = [text for text in settings if not text.startswith("agreement")]
    assert main(["calibrate", f"model={folder}", *own, "loss_increase=0.3", f"policy={policy}"]) == 0
    found = stored(folder)
    assert found["certified"]
    assert found["loss_increase"] <= 0.3
    assert (found["policy"], found["loss_increase_bound"], found["agreement"]) == (policy, 0.3, None)


def test_nothing_can_be_shown(copy, settings, capsys):
    """Untrained exits and a bound that leaves no room: every exit is 'never', and the command says so."""
    folder = copy()
    own = [text for text in settings if not text.startswith("agreement")]
    assert main(["calibrate", f"model={folder}", *own, "agreement=0.99", "max_tokens=8000"]) == 0
    found = stored(folder)
    assert found["thresholds"] == {"1": None, "3": None}
    assert not found["certified"]
    assert found["match_rate"] == 1.0
    assert found["mean_depth"] == 4
    assert found["p_value"] > 0.05
    shown = " ".join(capsys.readouterr().out.split())
    assert "Nothing could be promised" in shown
    assert "Every exit is set to never" in shown
    assert "never" in shown


def test_limits_per_tag(copy, settings, corpus, tmp_path, capsys):
    pick = random.Random(0)
    lines = corpus.read_text().splitlines()
    data = tmp_path / "tagged.jsonl"
    rows = [{"text": line, "task": pick.choice("ab")} for line in lines] + [{"text": lines[0], "task": "rare"}] * 3
    data.write_text("\n".join(map(json.dumps, rows)))
    folder = copy()
    assert main(["calibrate", f"model={folder}", *settings, f"data={data}", "tag_key=task", "max_tokens=0"]) == 0
    found = stored(folder)
    assert set(found["tags"]) == {"a", "b"}
    assert set(found["tags_without_limits"]) == {"rare"}
    assert all(own["certified"] and own["confidence"] == 0.95 for own in found["tags"].values())
    assert found["units"] == sum(own["units"] for own in found["tags"].values()) + found["tags_without_limits"]["rare"]
    # What decoding reads: the tag's own limits, or the overall ones.
    rows = resolve_policy("threshold", (1, 3), calibration=found, tags=["a", "rare"]).limits
    parts = (found["tags"]["a"], found)
    own, overall = (resolve_policy("threshold", (1, 3), calibration=part).limits[0] for part in parts)
    assert rows == (own, overall)
    shown = " ".join(capsys.readouterr().out.split())
    assert "on its own, not all of them together" in shown
    assert "the limits above are used without a promise: 'rare' (" in shown


def test_documents_as_units(copy, settings, corpus, tmp_path, capsys):
    data = tmp_path / "documents.jsonl"
    data.write_text("\n".join(json.dumps({"text": line}) for line in corpus.read_text().splitlines()))
    folder = copy()
    assert main(["calibrate", f"model={folder}", *settings, f"data={data}", "unit=document", "max_tokens=0"]) == 0
    assert stored(folder)["units"] == 1500
    assert "averaged over documents" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agreement=1.2", "agreement=1.2: must be above 0 and below 1"),
        ("confidence=0", "confidence=0.0: must be above 0 and below 1"),
        ("loss_increase=0.1", "agreement=0.6 and loss_increase=0.1: give exactly one of them"),
        ("policy=patience", "policy=patience: choose one of threshold, entropy, margin"),
        ("seq_length=65", "seq_length=65 is above the model's max_position_embeddings=64"),
        ("seq_length=0", "seq_length=0: must be at least 1"),
        ("max_tokens=64", "data: agreement=0.6 at confidence=0.95 needs at least"),
        ("tag_key=task", "tag_key=task: data="),
        ("model=nowhere", "model=nowhere: no such folder"),
        ("data=nothing.txt", "data='nothing.txt': no such file or folder"),
    ],
)
def test_bad_input(exported, settings, capsys, override, message):
    before = (exported / "early_exit" / "generation_config.json").read_bytes()
    assert refused([f"model={exported / 'early_exit'}", *settings, override], capsys).startswith(message)
    assert (exported / "early_exit" / "generation_config.json").read_bytes() == before


def test_a_model_without_exits_and_an_unknown_tag(exported, model_dir, settings, tmp_path, capsys):
    assert refused([f"model={model_dir}", *settings], capsys).startswith(f"model={model_dir}: it has no exits")
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"text": "a layer", "task": "x"}))
    given = [f"model={exported / 'early_exit'}", *settings, f"data={data}", "tag_key=customer"]
    assert "line 1: no field 'customer' (fields: task, text); set tag_key" in refused(given, capsys)
