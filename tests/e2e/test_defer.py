"""`ee-scale defer`: scores are the model's own, the limit and the table follow from them; classifiers; bad input."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from helpers.runs import WORDS
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig

import ee_scale
from ee_scale.cli.main import main
from ee_scale.config.defer import DeferConfig
from ee_scale.evaluation.answering import Case, answer
from ee_scale.exits.placement import exit_spec
from ee_scale.inference.deferral import read_rule
from ee_scale.inference.model import untrained_exits

NEW, COUNT = 4, 120
BOUND = ["loss=0.2", "confidence=0.8"]


def refused(arguments, capsys) -> str:
    """The one line that the command leaves."""
    capsys.readouterr()
    assert main(["defer", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def plain(model_dir):
    """Prompts, and what transformers itself answers and how sure it is: mean margin of the answer's tokens."""
    pick = random.Random(1)
    prompts = [" ".join(pick.choices(WORDS, k=pick.randint(2, 9))) for _ in range(COUNT)]
    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir).eval()
    texts, scores = [], []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        new = output.sequences[0, ids.input_ids.shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
        best = torch.stack([logits[0].softmax(-1).topk(2).values for logits in output.logits])
        scores.append(float((best[:, 0] - best[:, 1]).mean()))
    return prompts, texts, np.array(scores)


@pytest.fixture(scope="module")
def records(plain, tmp_path_factory):
    """The large model agrees where the small one is surer than usual, and is always right."""
    prompts, texts, scores = plain
    sure = scores >= np.quantile(scores, 0.5)
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows = [
        {"prompt": prompt, "reference": text if own else "no", "api": text if own else "no", "task": "ab"[int(own)]}
        for prompt, text, own in zip(prompts, texts, sure, strict=True)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_scores_are_those_of_plain_transformers(plain, model_dir):
    prompts, texts, scores = plain
    config = DeferConfig(small=str(model_dir), data="", out="", max_new_tokens=NEW, device="cpu", dtype="fp32")
    cases = [Case(prompt, None, (), "", None) for prompt in prompts[:20]]
    found = answer(config, "small", cases, scored=True)
    assert found.texts == texts[:20]
    assert found.scores == pytest.approx(scores[:20], abs=1e-5)
    assert found.ms > 0


def test_the_agreement_of_exits(model_dir, tmp_path):
    """As the forward pass of the model, on its own answer, says."""
    folder = tmp_path / "exits"
    shutil.copytree(model_dir, folder)
    spec = exit_spec(AutoConfig.from_pretrained(model_dir), (1, 3), "norm", "full", 1)
    model = untrained_exits(model_dir, spec)
    torch.manual_seed(0)
    for head in model.exit_heads.parameters():
        torch.nn.init.normal_(head)
    model.save_pretrained(folder)
    model = ee_scale.EarlyExitForCausalLM.from_pretrained(folder)
    prompt = "the hidden state of one token says"
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    text = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        output = model(text[:, :-1])  # of exits that say something else
    start = ids.shape[1] - 1
    same = [logits[0, start:].argmax(-1) == text[0, start + 1 :] for logits in output.exit_logits.values()]
    config = DeferConfig(small=str(folder), data="", out="", score="agreement", max_new_tokens=NEW, device="cpu")
    found = answer(config, "small", [Case(prompt, None, (), "", None)], scored=True)
    share = float(torch.stack(same).double().mean())
    assert found.scores == pytest.approx([share])
    assert share < 1


def test_a_limit_its_table_and_what_is_stored(model_dir, records, plain, tmp_path, capsys):
    out = tmp_path / "out"
    settings = [f"small={model_dir}", "large_key=api", f"data={records}", f"max_new_tokens={NEW}", "tag_key=task"]
    timing = ["small_ms=10", "large_ms=60", "link.ms=40", "link.cost=0.5"]
    assert main(["defer", *settings, *timing, *BOUND, f"out={out}", "device=cpu", "dtype=fp32"]) == 0
    shown = capsys.readouterr().out
    said = " ".join(shown.split())
    assert sorted(path.name for path in out.iterdir()) == ["deferral.json", "deferral.png"]
    rule = read_rule(out / "deferral.json")
    # Half of the answers are as good as the large model's, and those are the surer ones.
    scores = plain[2]
    assert 0 < rule.limit < np.quantile(scores, 0.5) + 1e-6
    kept = scores >= rule.limit
    assert (kept & (scores < np.quantile(scores, 0.5))).mean() < 0.2 + 0.1
    assert rule.evidence["p_value"] <= 0.2
    assert rule.evidence["tested"] == COUNT // 2
    assert (rule.score, rule.quality, rule.loss, rule.confidence) == ("margin", "exact", 0.2, 0.8)
    assert set(rule.tags) == {"a", "b"}
    assert rule.tags["b"] == 0.0  # always as good
    assert "Guaranteed with confidence 0.8 on records like these" in said
    assert "Check on records that chose and tested nothing" in said
    assert "An answer takes 10.0 ms; asking the large model 40.0 ms on the way and 60.0 ms to answer." in said
    rows = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines()]
    assert ["110.0", "500"] in [row[-3:-1] for row in rows]  # the line that always asks
    assert ["10.0", "0"] in [row[-3:-1] for row in rows]  # the one that never does


def test_classifiers(bert_dir, labelled, tmp_path, capsys):
    """Two models of one palette, here random: scores and classes are those of the stock model, text by text."""
    torch.manual_seed(0)
    tokenizer, folders = AutoTokenizer.from_pretrained(bert_dir), []
    names = dict(enumerate(("hill", "sea", "town")))
    for layers in (1, 2):
        config = BertConfig.from_pretrained(bert_dir, num_hidden_layers=layers, id2label=names)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        folders.append(tmp_path / f"bert{layers}")
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    small = AutoModelForSequenceClassification.from_pretrained(folders[0])
    texts = [json.loads(line)["text"] for line in labelled["valid"].read_text().splitlines()][:7]
    with torch.no_grad():
        logits = torch.cat([small(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    config = DeferConfig(small=str(folders[0]), data="", out="", task="classify", score="probability", device="cpu")
    found = answer(config, "small", [Case(text, None, (), "", None) for text in texts], scored=True)
    assert found.texts == [names[i] for i in logits.argmax(-1).tolist()]
    assert found.scores == pytest.approx(logits.softmax(-1).amax(-1).tolist(), abs=1e-5)

    models = [f"small={folders[0]}", f"large={folders[1]}", f"data={labelled['valid']}", "task=classify"]
    assert main(["defer", *models, *BOUND, f"out={tmp_path / 'out'}", "device=cpu"]) == 0
    assert "loss" in capsys.readouterr().out
    assert read_rule(tmp_path / "out" / "deferral.json").task == "classify"
    (tmp_path / "odd.jsonl").write_text('{"text": "a ship", "label": "moon"}\n' * 40)
    line = refused([*models, *BOUND, f"data={tmp_path / 'odd.jsonl'}", f"out={tmp_path / 'odd'}"], capsys)
    assert line == f"small={folders[0]}: no class 'moon' (its classes: hill, sea, town)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "large=None and large_key=None: give exactly one of them"),
        (["large_key=api", "large={model}"], "give exactly one of them"),
        (["large_key=api", "small=nowhere"], "small=nowhere: no such folder"),
        (["large=nowhere"], "large=nowhere: no such folder"),
        (["large_key=api", "score=agreement"], "score=agreement: small={model} has no exits"),
        (["large_key=api", "pair_key=b"], "pair_key=b: goes with task=classify"),
        (["large_key=api", "task=classify", "reference_key=reference", "prompt_key=prompt"], "needs a classifier"),
        (["large_key=api", "loss=0"], "loss=0.0: must be between 0 and 1"),
        (["large_key=api", "score=luck"], "score=luck: choose one of margin"),
        (["large_key=api", "link.ms=-1"], "link.ms=-1.0: must be 0 or above"),
        (["large_key=api", "loss=0.01"], "so no limit can be named"),
        (["large_key=api", "max_new_tokens=4000"], "small={model}: max_new_tokens=4000"),
        (["large_key=none"], "line 1: no field 'none'"),
        (["large_key=api", "chat=true"], "small={model}: chat=true: the tokenizer"),
    ],
)
def test_bad_input(model_dir, records, tmp_path, capsys, settings, message):
    given = [text.format(model=model_dir) for text in settings]
    base = [f"small={model_dir}", f"data={records}", *BOUND, f"out={tmp_path / 'out'}", "device=cpu"]
    assert message.format(model=model_dir) in refused([*base, *given], capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_refused_before_anything_is_read(model_dir, records, tmp_path, capsys):
    settings = [f"small={model_dir}", "large_key=api", f"data={records}", f"out={tmp_path}"]
    assert refused(settings, capsys) == f"out={tmp_path}: exists already; choose another folder"
