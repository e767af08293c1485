"""Exits that score the most frequent tokens only, through the command line: chosen, trained, exported, measured."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ee_scale
from ee_scale.cli.main import main
from ee_scale.reading import read_json, write_json

SIZE = 15  # of 301, of which the text has about two dozen; odd, so that tp=2 pads
GIVEN = ["exits.head=shortlist", f"exits.shortlist={SIZE}", "exits.kl_weight=0.5", "exits.kl_temperature=2"]


@pytest.fixture(scope="module")
def arguments(tune_arguments) -> list[str]:
    return [*tune_arguments, *GIVEN]


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory) -> Path:
    """On one process."""
    folder = tmp_path_factory.mktemp("short")
    finished = run_cli([*arguments, "out=run"], folder)
    assert finished.code == 0, finished.output
    assert finished.output.count(f"exits.shortlist={SIZE}: {SIZE} of 301 tokens are ") == 1
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    assert main(["export", f"src={run}", f"out={folder / 'model'}"]) == 0
    assert main(["export", f"src={run}", "kind=sidecar", f"out={folder / 'sidecar'}"]) == 0
    return folder


def test_a_drafter_has_a_whole_head(run, exported, tmp_path: Path):
    """It scores the list as the exit does, and gives 0 for all other tokens."""
    assert main(["export", f"src={run}", "kind=drafter", "exit=3", f"out={tmp_path / 'out'}"]) == 0
    ids = torch.arange(3, 19)[None]
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    expected = ee_scale.EarlyExitForCausalLM.from_pretrained(exported / "model")(ids).exit_logits[3]
    tokens = chosen(run)
    torch.testing.assert_close(logits[..., tokens], expected[..., tokens], atol=1e-5, rtol=0)
    others = [token for token in range(logits.shape[-1]) if token not in tokens]
    assert not logits[..., others].any()
    assert f"scores {SIZE} tokens; the others have the logit 0" in (tmp_path / "out" / "drafter.md").read_text()


def chosen(run: Path) -> list[int]:
    return json.loads((run / "run.json").read_text())["early_exit"]["shortlist_ids"]


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def strict(path: Path) -> dict:
    """A file of JSON, which has no infinity."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


def test_the_tokens_are_the_most_frequent_ones(run, model_dir, corpus):
    """Counted here from the text itself; the end mark of the one document is among them however rare it is."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    counts = Counter([*tokenizer(corpus.read_text()).input_ids, tokenizer.eos_token_id])
    special, order = set(tokenizer.all_special_ids), sorted(counts, key=lambda token: (-counts[token], token))
    common = [token for token in order if token not in special]
    wanted = {*special, *common[: SIZE - len(special)]}
    assert chosen(run) == sorted(wanted, key=lambda token: (-counts[token], token))
    assert counts[tokenizer.eos_token_id] == 1
    trained = load_file(run / "checkpoints" / "step_00000008" / "exits_003.safetensors")
    assert trained["exit_heads.3.head.weight"].shape == (SIZE, 128)


def test_every_grid_trains_the_same_and_goes_on_elsewhere(run, arguments, tmp_path):
    grid = ["parallel.tp=2", "parallel.pp=2"]
    killed = run_cli([*arguments, "out=run", *grid], tmp_path, world_size=4, die_at_step=5)
    assert killed.code == -9
    assert chosen(tmp_path / "run") == chosen(run)
    resumed = run_cli([*arguments, "out=run"], tmp_path)
    assert resumed.code == 0, resumed.output
    assert "continuing from run/checkpoints/step_00000003" in resumed.output
    for ours, whole in zip(losses(tmp_path / "run"), losses(run), strict=True):
        assert ours == pytest.approx(whole, rel=2e-5)


def test_another_shortlist_is_another_run(run, arguments, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    for change, message in (
        ("exits.shortlist=14", f"(exits.shortlist={SIZE} there, 14 here)"),
        ("exits.head=full", "(exits.head=shortlist there, full here)"),
        ("exits.shortlist=302", "exits.shortlist=302 is above the model's vocab_size=301"),
        ("exits.shortlist=1", "exits.shortlist=1: "),
    ):
        assert main([*arguments, change, f"out={tmp_path / 'run'}"]) == 2
        said = capsys.readouterr().err
        assert said.count("error: ") == 1
        assert message in said
    # As if the special tokens had been others then.
    identity = read_json(tmp_path / "run" / "run.json")
    identity["early_exit"]["shortlist_ids"].reverse()
    write_json(tmp_path / "run" / "run.json", identity)
    assert main([*arguments, f"out={tmp_path / 'run'}"]) == 2
    assert f"its run's shortlist has other tokens than the {SIZE} chosen now" in capsys.readouterr().err


def test_the_length_means_nothing_to_other_heads(finished_run, tune_arguments, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    assert main([*tune_arguments, "exits.shortlist=14", f"out={tmp_path / 'run'}"]) == 0


def test_stock_transformers_and_ee_scale_open_the_same_exits(exported, run, model_dir):
    ids = torch.randint(301, (2, 12), generator=torch.Generator().manual_seed(0))
    models = [
        AutoModelForCausalLM.from_pretrained(exported / "model", trust_remote_code=True),
        ee_scale.EarlyExitForCausalLM.from_pretrained(exported / "model"),
        ee_scale.EarlyExitForCausalLM.from_pretrained(exported / "sidecar"),
    ]
    outputs = [model(ids) for model in models]
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    trained = load_file(run / "checkpoints" / "step_00000008" / "exits_001.safetensors")
    tokens = chosen(run)
    for model, output in zip(models, outputs, strict=True):
        assert torch.equal(output.logits, base(ids).logits)
        assert torch.equal(model.exit_heads["1"].head.weight, trained["exit_heads.1.head.weight"])
        for k in (1, 3):
            assert torch.equal(output.exit_logits[k], outputs[0].exit_logits[k])
            said = output.exit_logits[k].isfinite().any((0, 1)).nonzero()[:, 0]
            assert said.tolist() == sorted(tokens)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    said = base.generate(ids, **settings)
    assert torch.equal(models[0].generate(ids, exit_policy="lossless", **settings), said)
    early = models[0].generate(ids, exit_policy="fixed", exit_layer=1, **settings)
    assert set(early[:, 13:].flatten().tolist()) <= set(tokens)  # the first one is the final layer's


def test_measured_and_calibrated_with_what_it_cannot_say(exported, run, corpus, tmp_path, capsys):
    """Agreement counts every token; the loss is over those in the shortlist, whose share is told."""
    given = [f"data={corpus}", "seq_length=16", "max_tokens=8000", "device=cpu", f"cache_dir={tmp_path}"]
    model = shutil.copytree(exported / "model", tmp_path / "model")
    assert main(["calibrate", f"model={model}", *given, "agreement=0.5"]) == 0
    stored = strict(model / "generation_config.json")["early_exit_calibration"]
    assert set(stored["thresholds"]) == {"1", "3"}
    assert main(["evaluate", f"model={model}", *given, "sweep=true", "prompts=0", f"out={tmp_path / 'out'}"]) == 0
    assert "tokens scored" in capsys.readouterr().out
    report = strict(tmp_path / "out" / "evaluate.json")
    tokens = AutoTokenizer.from_pretrained(model)(corpus.read_text()).input_ids[: 17 * 20]
    opened, inside = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True), set(chosen(run))
    assert main(["evaluate", f"model={model}", *given, "max_tokens=320", f"out={tmp_path / 'few'}"]) == 0
    row = strict(tmp_path / "few" / "evaluate.json")["exits"][0]
    with torch.no_grad():
        windows = torch.tensor(tokens).view(20, 17)
        output, labels = opened(windows[:, :-1]), windows[:, 1:]
    scored = torch.tensor([token in inside for token in labels.flatten().tolist()])
    loss = torch.nn.functional.cross_entropy(output.exit_logits[1].flatten(0, 1), labels.flatten(), reduction="none")
    assert 0 < row["covered"] < 1
    assert row["covered"] == pytest.approx(float(scored.double().mean()))
    assert row["loss"] == pytest.approx(float(loss[scored].mean()), rel=1e-5)
    same = (output.exit_logits[1].argmax(-1) == output.logits.argmax(-1)).double().mean()
    assert row["agreement"] == pytest.approx(float(same))
    assert report["sweep"][-1]["loss"] is not None  # no exits


def test_what_scores_every_token_is_refused_by_name(exported, run, tmp_path, capsys):
    for arguments, message in (
        ([f"src={run}", "kind=submodel", "exit=3"], f"heads of kind 'shortlist', which score {SIZE} tokens"),
        ([f"src={exported / 'model'}", "format=onnx"], "a model with exits, which ONNX would leave out"),
    ):
        capsys.readouterr()
        assert main(["export", *arguments, f"out={tmp_path / 'out'}"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
