"""lm-eval with `--model ee-scale`: a local task, offline; log-likelihoods against HFLM's and a plain computation."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ee_scale.cli.main import main
from ee_scale.errors import UserError

pytest.importorskip("lm_eval", reason="optional: pip install 'ee-scale[eval]'")

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
TASK = """
task: local_exits
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"question": "a layer reads the hidden state", "choices": [" of", " sure if", " it"], "answer": 0},
    {"question": "an exit says what comes", "choices": [" next", " token and", " a"], "answer": 0},
    {"question": "if it is sure", "choices": [" one", " layer reads", " of"], "answer": 2},
]


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    assert main(["export", f"src={finished_run}", f"out={folder / 'model'}"]) == 0
    assert main(["export", f"src={finished_run}", f"out={folder / 'sidecar'}", "kind=sidecar"]) == 0
    return folder


@pytest.fixture(scope="module")
def plugin():
    from ee_scale.evaluation import lm_eval_plugin

    return lm_eval_plugin


def _requests():
    from lm_eval.api.instance import Instance

    pairs = [(item["question"], choice) for item in QUESTIONS for choice in item["choices"]]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def _open(plugin, folder, **options):
    return plugin.EarlyExitLM(str(folder), device="cpu", batch_size=2, **options)


def _sums(lm, select):
    """Log-likelihoods by hand: one row at a time, `select` picks the logits [S, V] of a forward pass."""
    sums = []
    for request in _requests():
        start, more = (lm.tok_encode(text) for text in request.args)
        ids = torch.tensor([start + more])
        with torch.no_grad():
            logits = select(lm.model(ids)).log_softmax(-1)
        at = range(len(start) - 1, len(start) + len(more) - 1)
        sums.append(sum(logits[i, ids[0, i + 1]].item() for i in at))
    return sums


def test_final_layer_equals_hflm(plugin, exported):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(str(exported / "model"), device="cpu", batch_size=2).loglikelihood(_requests())
    for options in ({}, {"exit_policy": "off"}, {"exit_policy": "lossless"}):
        ours = _open(plugin, exported / "model", **options).loglikelihood(_requests())
        assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-5)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("form", ["model", "sidecar"])
@pytest.mark.parametrize("k", [1, 3])
def test_fixed_exit_by_hand(plugin, exported, form, k):
    lm = _open(plugin, exported / form, exit_layer=k)
    found = [value for value, _ in lm.loglikelihood(_requests())]
    assert found == pytest.approx(_sums(lm, lambda output: output.exit_logits[k][0]), abs=1e-4)
    assert found != pytest.approx(_sums(lm, lambda output: output.logits[0]), abs=1e-3)


def test_threshold_takes_each_position_from_its_own_layer(plugin, exported):
    plain, taken = _open(plugin, exported / "model"), []
    ids = torch.tensor([plain.tok_encode(" ".join(item["question"] for item in QUESTIONS))])
    with torch.no_grad():
        sure = {k: logits[0].softmax(-1).amax(-1) for k, logits in plain.model(ids).exit_logits.items()}
    limits = {k: sure[k].quantile(0.6).item() for k in (1, 3)}
    lm = _open(plugin, exported / "model", exit_policy="threshold", exit_threshold=f"{limits[1]}:{limits[3]}")

    def select(output):
        rows = []
        for i in range(output.logits.shape[1]):
            sure = {k: output.exit_logits[k][0, i].softmax(-1).max() for k in (1, 3)}
            k = 1 if sure[1] >= limits[1] else 3 if sure[3] >= limits[3] else 4
            taken.append(k)
            rows.append(output.logits[0, i] if k == 4 else output.exit_logits[k][0, i])
        return torch.stack(rows)

    expected = _sums(lm, select)
    assert set(taken) == {1, 3, 4}, "the limits must send positions to every layer"
    assert [value for value, _ in lm.loglikelihood(_requests())] == pytest.approx(expected, abs=1e-4)


def test_generation_gets_the_policy(plugin, exported, monkeypatch):
    from lm_eval.api.instance import Instance

    lm, seen = _open(plugin, exported / "model", exit_policy="lossless", exit_layer=1), []
    plain, generate = _open(plugin, exported / "model"), lm.model.generate
    monkeypatch.setattr(lm.model, "generate", lambda *args, **kwargs: seen.append(kwargs) or generate(*args, **kwargs))
    requests = [
        Instance("generate_until", {}, (item["question"], {"until": ["."], "max_gen_toks": 12}), i)
        for i, item in enumerate(QUESTIONS)
    ]
    assert lm.generate_until(requests) == plain.generate_until(requests)
    assert {(given["exit_policy"], given["exit_layer"]) for given in seen} == {("lossless", 1)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exit_layer": 2}, "exit_layer=2: the model has exits at 1, 3"),
        ({"exit_policy": "threshold", "exit_threshold": "0.1:0.2:0.3"}, "3 limits for 2 exits"),
        ({"exit_policy": "perhaps"}, "exit_policy='perhaps'"),
        ({"exit_threshold": 0.5}, "give exit_policy"),
        ({"peft": "adapter"}, "peft=adapter"),
    ],
)
def test_bad_options(plugin, exported, options, said):
    with pytest.raises(ValueError, match=said):
        _open(plugin, exported / "model", **options)


def test_model_without_exits(plugin, model_dir):
    with pytest.raises(ValueError, match="has no exits"):
        _open(plugin, model_dir, exit_layer=1)
    assert len(_open(plugin, model_dir).loglikelihood(_requests())) == 9
    with pytest.raises(ValueError, match="no such folder"):
        _open(plugin, model_dir / "nowhere")


def test_command_line_on_a_local_task(exported, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_exits.yaml").write_text(TASK.format(data=data))
    command = [sys.executable, "-m", "ee_scale.evaluation.lm_eval_plugin", "--model", "ee-scale"]
    command += ["--model_args", f"pretrained={exported / 'model'},exit_layer=3", "--device", "cpu"]
    command += [
        "--tasks",
        "local_exits",
        "--include_path",
        str(tmp_path / "tasks"),
        "--output_path",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "ee-scale" in finished.stdout
    (report,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(report.read_text())["results"]["local_exits"]["acc,none"]
    from ee_scale.evaluation.lm_eval_plugin import EarlyExitLM

    lm = EarlyExitLM(str(exported / "model"), device="cpu", exit_layer=3)
    values = torch.tensor(_sums(lm, lambda output: output.exit_logits[3][0])).view(3, 3)
    answers = torch.tensor([item["answer"] for item in QUESTIONS])
    assert found == pytest.approx((values.argmax(-1) == answers).double().mean().item())


def test_a_task_does_not_choose_what_is_logged(tmp_path):
    """Its generation_kwargs come from a file that somebody else may have written."""
    from ee_scale.evaluation.lm_eval_plugin import EarlyExitLM

    lm = object.__new__(EarlyExitLM)
    for policy in ("off", "fixed"):
        lm.policy = SimpleNamespace(name=policy)
        with pytest.raises(UserError, match="exit_log: in generation_kwargs of the task; give it in --model_args"):
            lm._model_generate(torch.ones(1, 2), 4, [], exit_log=str(tmp_path / "log"), exit_policy="fixed")
