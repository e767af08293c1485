"""`ee-scale evaluate`: the table's numbers are those of a plain loop over transformers' model."""

import csv
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_scale.cli.main import main


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "model"
    assert main(["export", f"src={finished_run}", f"out={folder}"]) == 0
    return folder


def test_numbers_files_and_table(exported, corpus, tmp_path, capsys):
    settings = ["seq_length=16", "batch_size=3", "max_tokens=160", f"cache_dir={tmp_path}", f"out={tmp_path / 'out'}"]
    assert main(["evaluate", f"model={exported}", f"data={corpus}", *settings]) == 0
    assert "4 (final)" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    rows = {row["layer"]: row for row in report["exits"]}
    assert report["tokens"] == 160

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    tokens = AutoTokenizer.from_pretrained(exported)(corpus.read_text()).input_ids
    losses, agreed = {1: [], 3: [], 4: []}, {1: [], 3: []}
    for start in range(0, 170, 17):
        window = torch.tensor([tokens[start : start + 17]])
        with torch.no_grad():
            output = model(window[:, :-1])
        for k, logits in {**output.exit_logits, 4: output.logits}.items():
            losses[k].append(torch.nn.functional.cross_entropy(logits[0], window[0, 1:]).item())
            if k != 4:
                agreed[k] += (logits.argmax(-1) == output.logits.argmax(-1)).flatten().tolist()
    for k, values in losses.items():
        assert rows[k]["loss"] == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert rows[k]["perplexity"] == pytest.approx(torch.tensor(rows[k]["loss"]).exp().item(), rel=1e-5)
    for k, values in agreed.items():
        assert rows[k]["agreement"] == pytest.approx(sum(values) / len(values))
    with (tmp_path / "out" / "evaluate.csv").open() as file:
        assert [int(row["layer"]) for row in csv.DictReader(file)] == [1, 3, 4]
    assert (tmp_path / "out" / "evaluate.png").read_bytes().startswith(b"\x89PNG")


def test_untrained_exits_of_a_plain_model(model_dir, corpus, tmp_path, capsys):
    given = [f"model={model_dir}", f"data={corpus}", "seq_length=16", "max_tokens=160", f"cache_dir={tmp_path}"]
    assert main(["evaluate", *given, "exits=[2,4]", f"out={tmp_path / 'out'}"]) == 0
    rows = json.loads((tmp_path / "out" / "evaluate.json").read_text())["exits"]
    assert [row["layer"] for row in rows] == [2, 4, 4]
    # The logit lens after the last layer is the final layer.
    assert rows[1]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-6)
    assert rows[1]["agreement"] == 1.0
    assert rows[0]["agreement"] < 1.0
