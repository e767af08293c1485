"""`ee-scale generate`: what it prints and writes, on one device and on a grid, and what it refuses."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from helpers.server import HARD, write_drifting_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_scale.cli.main import main
from ee_scale.modeling.row_queue import RowQueue
from ee_scale.modeling.trail import AuditDraws

PROMPT = "one token reads"
NEW = 12
NUMBERS = re.compile(r"(\d+) tokens in [\d.]+ s: [\d.]+ tokens/s")


@pytest.fixture(scope="module")
def folder(finished_run, tmp_path_factory) -> Path:
    """A folder with the exported model, and its sidecar beside it."""
    root = tmp_path_factory.mktemp("generate")
    assert main(["export", f"src={finished_run}", f"out={root / 'model'}"]) == 0
    assert main(["export", f"src={finished_run}", f"out={root / 'sidecar'}", "kind=sidecar"]) == 0
    return root


@pytest.fixture
def given(folder, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["generate", f"model={folder / 'model'}", "device=cpu", f"max_new_tokens={NEW}"]


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, str]:
    """What transformers says, alone and without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model, texts = AutoModelForCausalLM.from_pretrained(folder / "model"), {}
    for prompt in (PROMPT, "an", "the hidden state of one token and an exit"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
        texts[prompt] = tokenizer.decode(new, skip_special_tokens=True)
    return texts


def said(arguments: list[str], capsys) -> tuple[str, str]:
    """(stdout, stderr) of a command that succeeds."""
    capsys.readouterr()
    assert main(arguments) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.parametrize(
    "policy",
    [["policy=off"], ["policy=lossless"], ["policy=lossless", "graphs=true"], ["policy=threshold", "threshold=1.1"]],
)
def test_the_text_is_that_of_transformers(policy, given, expected, capsys):
    text, numbers = said([*given, *policy, f"prompt={PROMPT}"], capsys)
    assert text == expected[PROMPT] + "\n"
    assert int(NUMBERS.search(numbers)[1]) == NEW


def test_a_sidecar_and_a_plain_model(folder, model_dir, given, expected, capsys):
    for model, policy in ((folder / "sidecar", "lossless"), (model_dir, "off")):
        text, _ = said([*given, f"model={model}", f"policy={policy}", f"prompt={PROMPT}"], capsys)
        assert text == expected[PROMPT] + "\n"


def test_show_exits_counts_layers(given, capsys):
    fixed = [*given, "policy=fixed", "layer=3", f"prompt={PROMPT}"]
    text, words = said([*fixed, "--show-exits"], capsys)
    assert "\x1b" not in text  # no colours outside a terminal
    legend = re.search(r"layer 1: (\d+)  layer 3: (\d+)  all 4 layers: (\d+)  mean depth ([\d.]+)", words)
    assert legend.groups() == ("0", str(NEW - 1), "1", "3.1")  # the prompt's own token is the final layer's
    assert "mean depth 3.1 of 4, 92% of the tokens left early" in words
    assert said([*fixed, "show_exits=true"], capsys)[0] == text


def test_colours_on_a_terminal(given, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text, _ = said([*given, "policy=fixed", "layer=3", f"prompt={PROMPT}", "--show-exits"], capsys)
    monkeypatch.delenv("FORCE_COLOR")
    plain, _ = said([*given, "policy=fixed", "layer=3", f"prompt={PROMPT}"], capsys)
    assert "\x1b[36m" in text  # cyan: the second exit
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == plain


def test_prompts_of_a_file_in_batches(given, expected, capsys):
    prompts = list(expected)
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    Path("p.txt").write_text("\n".join(prompts) + "\n")
    for name, policy in (("p.jsonl", "lossless"), ("p.txt", "off")):
        out, _ = said([*given, f"prompts={name}", "batch_size=2", f"policy={policy}", f"out=out-{name}.jsonl"], capsys)
        assert out == ""
        rows = [json.loads(line) for line in Path(f"out-{name}.jsonl").read_text().splitlines()]
        assert {row["prompt"]: row["text"] for row in rows} == expected
        assert [row["tokens"] for row in rows] == [NEW] * 3
        assert [len(row.get("exit_layers", [])) for row in rows] == ([NEW] * 3 if policy == "lossless" else [0] * 3)
    out, _ = said([*given, f'prompt=["{prompts[0]}", "{prompts[1]}"]'], capsys)
    assert [json.loads(line)["text"] for line in out.splitlines()] == [expected[prompt] for prompt in prompts[:2]]


@pytest.mark.parametrize(
    "policy",
    [["policy=off"], ["policy=threshold", "threshold=0.02"], ["policy=lossless"], ["policy=off", "temperature=1.0"]],
)
def test_a_full_batch_says_what_one_prompt_at_a_time_says(policy, given, capsys, monkeypatch):
    """Eight prompts of all lengths, three places; answers in the order of the prompts."""
    taken, add = [], RowQueue.add
    monkeypatch.setattr(RowQueue, "add", lambda queue, row: taken.append(row) or add(queue, row))
    words = ["the", "hidden", "state", "of", "one", "token", "and", "an", "exit", "reads", "one", "layer"]
    prompts = [" ".join(words[: count + 1]) for count in (3, 0, 9, 1, 6, 2, 11, 4)]
    said_by: dict[int, list[dict]] = {}
    for size in (1, 3):
        out = f"of-{size}.jsonl"
        said([*given, *policy, f"prompt={json.dumps(prompts)}", f"batch_size={size}", f"out={out}"], capsys)
        said_by[size] = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [row["prompt"] for row in said_by[3]] == prompts
    assert len(taken) == 16
    if policy == ["policy=lossless"]:  # what is drafted is measured
        said_by = {size: [{**row, "exit_layers": None} for row in rows] for size, rows in said_by.items()}
    assert said_by[3] == said_by[1]


def test_standard_input(given, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert said([*given, "prompt=-"], capsys)[0] == expected[PROMPT] + "\n"


def test_sampling_is_repeatable(given, capsys):
    sampled = [*given, "temperature=1.0", "top_k=20", f"prompt={PROMPT}"]
    texts = [said([*sampled, f"seed={seed}"], capsys)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_decision_log(given, capsys):
    said([*given, "policy=threshold", "threshold=0", f"prompt={PROMPT}", "log=log.jsonl", "tag=sql", "audit=1"], capsys)
    header, *lines = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert header["num_layers"] == 4
    assert [line["layer"] for line in lines] == [4] + [1] * (NEW - 1)
    assert {line["tag"] for line in lines} == {"sql"}


def test_limits_follow_exits_that_are_wrong(tmp_path, capsys):
    """They are raised until no exit is taken, which is told once each."""
    model = write_drifting_model(tmp_path)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": AutoTokenizer.from_pretrained(model).decode([HARD])}))
    settings = [f"prompts={tmp_path / 'p.jsonl'}", f"out={tmp_path / 'out.jsonl'}", "max_new_tokens=60", "device=cpu"]
    _, told = said(
        ["generate", f"model={model}", *settings, "policy=threshold", "threshold=0.5", "audit=1", "follow=0.8"], capsys
    )
    layers = json.loads((tmp_path / "out.jsonl").read_text())["exit_layers"]
    assert 1 in layers[:30]
    assert set(layers[-20:]) == {2}
    assert [told.count(words) for words in ("were raised", "take no exit any more")] == [1, 1]


def test_audits_of_one_seed_fall_anywhere(given, capsys, monkeypatch):
    """One prompt over and over, each command as if in a process of its own."""
    for _ in range(12):
        monkeypatch.setattr("ee_scale.modeling.trail.DRAWS", AuditDraws())
        said([*given, "policy=fixed", "layer=1", f"prompt={PROMPT}", "log=log.jsonl", "audit=0.3"], capsys)
    lines = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    places: dict[str, set[int]] = {}
    for line in lines:
        if "request" in line:
            places.setdefault(line["request"], set()).update([line["position"]] * (line["agrees"] is not None))
    assert len(places) == 12  # a request of one command is not that of another
    assert len(set(map(frozenset, places.values()))) > 6
    assert len(set().union(*places.values())) > 6


def test_chat(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "chat")
    settings = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0]['content'] }} says"
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(settings))
    given = ["generate", f"model={tmp_path / 'chat'}", "device=cpu", "max_new_tokens=5"]
    templated, _ = said([*given, "chat=true", "prompt=one token"], capsys)
    assert templated == said([*given, "prompt=one token says"], capsys)[0]


def test_ranks_of_a_launcher_say_the_same(folder, given, expected, tmp_path, capsys):
    """tp=2; the first rank writes, the other is silent."""
    policy = ["policy=threshold", "threshold=0.004", f"prompt={PROMPT}", "log=log.jsonl"]
    alone, numbers = said([*given, *policy], capsys)
    one_device = Path("log.jsonl").read_text().splitlines()
    finished = run_cli([*given, *policy, "log=grid.jsonl", "parallel.tp=2"], tmp_path, 2)
    assert finished.codes == [0, 0], finished.output
    assert finished.output.startswith(alone)
    assert finished.outputs[1] == ""
    share = re.search("mean depth .* left early", numbers)[0]
    assert share in finished.output
    grid = Path("grid.jsonl").read_text().splitlines()
    assert len({json.loads(line).get("request") for line in grid + one_device}) == 3  # none in headers, one per command
    assert [json.loads(line).get("layer") for line in grid] == [json.loads(line).get("layer") for line in one_device]


def test_lossless_over_stages(given, expected, tmp_path):
    """The first stage drafts from the exit at layer 1."""
    command = [*given, "policy=lossless", f"prompt={PROMPT}", "log=log.jsonl", "parallel.pp=2", "parallel.stages=[2,2]"]
    finished = run_cli(command, tmp_path, 2)
    assert finished.codes == [0, 0], finished.output
    assert finished.output.startswith(expected[PROMPT] + "\n")
    header, *lines = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert header["policy"] == "lossless"
    assert {line["layer"] for line in lines} <= {1, 4}
    accepted = sum(line["layer"] == 1 for line in lines)
    assert re.search(rf", {accepted} of \d+ drafts accepted", finished.output)


def test_it_starts_its_own_ranks(given, capfd, monkeypatch):
    """Two stages; the prompt comes through standard input to the first rank."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with Path("prompt").open("w+") as file:
        file.write(PROMPT)
        file.seek(0)
        before = os.dup(0)
        os.dup2(file.fileno(), 0)
        capfd.readouterr()
        try:
            assert main([*given, "policy=fixed", "layer=1", "parallel.pp=2", "prompt=-"]) == 0
        finally:
            os.dup2(before, 0)
    text, words = capfd.readouterr()
    assert int(NUMBERS.search(words)[1]) == NEW
    assert "mean depth 1.2 of 4, 92% of the tokens left early" in words
    assert text == said([*given, "policy=fixed", "layer=1", f"prompt={PROMPT}"], capfd)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=nowhere"], "model=nowhere: no such folder"),
        (
            ["policy=sometimes"],
            "policy=sometimes: choose one of off, threshold, entropy, margin, patience, fixed, loss",
        ),
        (["policy=threshold", "threshold=[0.5]"], "threshold=[0.5]: 1 limits for 2 exits (at layers 1, 3)"),
        (["policy=threshold", "threshold=nan"], "threshold=[nan, nan]: nan is not a number"),
        (["policy=threshold"], "policy=threshold: give threshold, or run `ee-scale calibrate` on the model"),
        (["policy=threshold", "threshold={2:0.5}"], "threshold: no exit at layer 2; the model has exits at 1, 3"),
        (["policy=fixed", "layer=2"], "layer=2: the model has exits at 1, 3"),
        (["policy=fixed"], "policy=fixed: say which exit with layer, one of 1, 3"),
        (["threshold=0.5"], "threshold=0.5: policy=off has no threshold"),
        (["prompt="], "prompt: empty"),
        (["prompts=p.txt"], "give either prompt=<text> (or prompt=- for standard input) or prompts=<file>"),
        (["prompt=" + "layer " * 70], "prompt: 350 tokens, but the model's context has 64; shorten it"),
        (["prompt=a token", "max_new_tokens=63"], "max_new_tokens=63: with the 2 tokens of prompt above the model's"),
        (["max_new_tokens=0"], "max_new_tokens=0: must be at least 1"),
        (["temperature=-1"], "temperature=-1.0: must be 0 (the most likely token) or above"),
        (["top_p=0", "temperature=1"], "top_p=0.0: must be above 0, at most 1"),
        (["top_k=5"], "top_k=5: temperature=0 takes the most likely token; set temperature to sample"),
        (["out=."], "out=.: exists already; choose another"),
        (["log=x.jsonl"], "log=x.jsonl: policy=off makes no decisions; choose a policy"),
        (["policy=lossless", "log=nowhere/x.jsonl"], "log=nowhere/x.jsonl: no such folder"),
        (["policy=lossless", "audit=2"], "audit=2.0: give a share between 0 and 1"),
        (
            ["policy=lossless", "audit=1", "follow=0.9"],
            "follow=0.9: policy=lossless has no limits that could follow",
        ),
        (
            ["policy=patience", "audit=1", "follow=0.9"],
            "follow=0.9: policy=patience has no limits that could follow",
        ),
        (
            ["policy=threshold", "threshold=0.5", "follow=0.9"],
            "follow=0.9: nothing is compared with the full model; give audit, the share that is",
        ),
        (["policy=threshold", "threshold=0.5", "audit=1", "follow=0"], "follow=0.0: must be between 0 and 1"),
        (["policy=lossless", "tag=[a,b]"], "tag=['a', 'b']: 2 tags for 1 prompts"),
        (["prompt=[a,b]", "show_exits=true"], "show_exits=true: colours one answer on the terminal, not 2 prompts"),
        (["chat=true"], "chat=true: the tokenizer of"),
        (["parallel.dp=2"], "parallel.dp=2: decoding has no replicas"),
        (["graphs=true"], "graphs=true: policy=off leaves decoding to transformers; choose a policy"),
        (["policy=patience", "graphs=true", "parallel.pp=2"], "graphs=true: needs one device, not tp=1 x pp=2"),
        (
            ["policy=lossless", "parallel.tp=2"],
            "policy=lossless: on a grid one stage drafts while later ones verify, but parallel.pp=1 with parallel.tp=2",
        ),
        (
            ["policy=lossless", "layer=3", "parallel.pp=2", "parallel.stages=[2,2]"],
            "policy=lossless: no exit stands before the last of 2 stages (layers 1-2, 3-4), only at 3",
        ),
        (
            ["policy=lossless", "shortlist=[3,4]", "parallel.pp=2"],
            "shortlist=[3, 4]: drafts over a grid read whole heads",
        ),
        (["parallel.tp=3"], "parallel.tp=3 does not divide num_attention_heads=4 of the model"),
        (["parallel.pp=5"], "parallel.pp=5: more stages than the model's 4 layers"),
        (["policy=fixed", "layer=1", "audit=0.5", "parallel.pp=2"], "audit=0.5: needs one device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_bad_input(arguments, message, given, capsys, monkeypatch):
    monkeypatch.setattr("ee_scale.cli.generate.run_ranks", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setattr("ee_scale.cli.generate.decode_here", lambda *_: pytest.fail("decoding was started"))
    capsys.readouterr()
    assert main([*given, "prompt=one token", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}"), error
    assert error.count("\n") == 1


def test_bad_model_folders(folder, model_dir, given, tmp_path, capsys):
    shutil.copytree(model_dir, tmp_path / "silent", ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    cases = [
        (["prompt=a", f"model={model_dir}", "policy=lossless"], "has no exits; use policy=off, or export a tuned run"),
        (["prompt=a", "model=silent"], "error: model=silent: no tokenizer in it"),
        (["prompts=p.jsonl"], "error: prompts=p.jsonl: line 2 is no JSON object with a field 'prompt'"),
        (["prompts=no.txt"], "error: prompts=no.txt: cannot read it"),
        ([], "error: give either prompt=<text>"),
    ]
    for arguments, message in cases:
        capsys.readouterr()
        assert main([*given, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(1)
