"""The decision log and audits of `generate`: true, complete, and without effect on the text."""

import json
import logging
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from helpers.decoding import LAYERS, Pair, limits_for, make_pair, one_row, prompts, row_text
from transformers import GenerationConfig

from ee_scale.modeling.calibration import CALIBRATION_KEY
from ee_scale.modeling.trail import AuditDraws

NEW = 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("records"), "llama", "mlp", "full", exits=(1, 2, 4), calm=0.3)


def _read(path: Any) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("wants_cache", [True, False])
def test_every_token_is_logged_and_audited(pair, tmp_path, wants_cache):
    inputs, limits = prompts(4), limits_for(pair, "threshold", (0.3, 0.4, 0.5))
    options = {"exit_threshold": limits, "max_new_tokens": NEW, "exit_max_pending": 3, "use_cache": wants_cache}
    plain = pair.generate(inputs, "threshold", **options)
    eos = int(plain.sequences[1, 9 + 5])  # a row that ends before the others
    plain = pair.generate(inputs, "threshold", eos_token_id=eos, **options)
    path, names, tags = tmp_path / "log.jsonl", ["a", "b", "c", "d"], ["sql", "prose", "sql", "code"]
    got = pair.generate(
        inputs,
        "threshold",
        eos_token_id=eos,
        **options,
        exit_log=path,
        exit_requests=names,
        exit_tags=tags,
        exit_audit=1.0,
    )
    assert torch.equal(got.sequences, plain.sequences)
    assert torch.equal(got.exit_layers, plain.exit_layers)
    header, *lines = _read(path)
    assert header == {"num_layers": LAYERS, "layers": [1, 2, 4], "policy": "threshold"}
    agreed = audited = 0
    for row in range(4):
        own = [line for line in lines if line["request"] == names[row]]
        text = row_text(got, inputs, row, eos)
        assert [line["position"] for line in own] == list(range(len(text)))
        assert [line["layer"] for line in own] == got.exit_layers[row, : len(text)].tolist()
        assert {line["tag"] for line in own} == {tags[row]}
        prompt = one_row(inputs, row)["input_ids"]
        with torch.no_grad():
            output = pair.model(torch.cat([prompt, torch.tensor([text])], 1))
        for index, line in enumerate(own):
            place = prompt.shape[1] + index - 1
            if line["layer"] == LAYERS:
                assert line["agrees"] is None
            else:
                said = output.exit_logits[line["layer"]][0, place]
                assert line["agrees"] == (int(said.argmax()) == int(output.logits[0, place].argmax()))
                assert line["confidence"] == pytest.approx(float(said.softmax(-1).max()), abs=1e-4)
                audited, agreed = audited + 1, agreed + line["agrees"]
    assert audited > 10
    assert 0 < agreed < audited
    assert (got.exit_stats["audited"], got.exit_stats["agreed"]) == (audited, agreed)


def test_a_share_is_audited_and_sampling_does_not_notice(pair, tmp_path):
    inputs = prompts(5)
    options = {"exit_layer": 1, "max_new_tokens": 40, "do_sample": True, "top_k": 0, "eos_token_id": None}
    texts = []
    for share in (0.0, 0.3, 1.0):
        torch.manual_seed(3)
        texts.append(pair.generate(inputs, "fixed", exit_audit=share, exit_log=tmp_path / f"{share}", **options))
        seen = [line["agrees"] is not None for line in _read(tmp_path / f"{share}")[1:] if line["layer"] == 1]
        assert len(seen) == 5 * 39
        assert abs(sum(seen) / len(seen) - share) < 0.12
    assert all(torch.equal(text.sequences, texts[0].sequences) for text in texts)


def test_drafts_in_the_log(pair, tmp_path):
    inputs, path = prompts(3), tmp_path / "log.jsonl"
    got = pair.generate(
        inputs, "lossless", max_new_tokens=NEW, exit_layer=4, exit_draft_length=2, exit_log=path, exit_audit=1.0
    )
    assert torch.equal(got.sequences, pair.reference(inputs, max_new_tokens=NEW))
    lines = _read(path)[1:]
    assert sum(line["layer"] == 4 for line in lines) == got.exit_stats["accepted"] > 0
    assert [line.get("source") for line in lines] == [source for row in got.exit_sources for source in row]
    assert {line["source"] for line in lines if line["layer"] == 4} == {"exit 4"}
    again = pair.generate(inputs, "lossless", max_new_tokens=2, exit_log=path)
    assert len(_read(path)) > len(lines) + again.exit_layers.numel() / 2  # the log grows


def _audited(
    pair: Pair, tmp_path: Any, requests: int, new: int, share: float = 0.05, named: bool = True, **options: Any
) -> list[list[int]]:
    """The audited places of each request, one prompt over and over."""
    path = tmp_path / "audits.jsonl"
    path.unlink(missing_ok=True)
    inputs = one_row(prompts(1), 0)
    for number in range(requests):
        pair.generate(
            inputs,
            "fixed",
            exit_layer=1,
            max_new_tokens=new,
            eos_token_id=None,
            exit_audit=share,
            exit_log=path,
            exit_requests=[number] if named else None,
            **options,
        )
    found: dict[Any, list[int]] = {}
    for line in _read(path):
        if "request" in line:
            found.setdefault(line["request"], []).extend([line["position"]] * (line["agrees"] is not None))
    assert len(found) == requests
    return list(found.values())


@pytest.mark.parametrize(("requests", "new"), [(100, 20), (40, 50)])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("seed", "named"), [(None, True), (5, True), (5, False)])
def test_audits_fall_anywhere(pair, tmp_path, requests, new, options, seed, named):
    if seed is None:
        torch.default_generator.manual_seed(torch.Generator().initial_seed())  # as in a process that nobody seeded
    else:
        torch.manual_seed(seed)
    found = _audited(pair, tmp_path, requests, new, named=named, **options)
    early = requests * (new - 1)
    count = sum(map(len, found))
    assert abs(count - 0.05 * early) < 5 * (early * 0.05 * 0.95) ** 0.5
    places = Counter(place for one in found for place in one)
    assert len(places) > 0.6 * (new - 1)
    assert max(places.values()) < 0.4 * requests


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("named", [True, False])
def test_audits_repeat_by_seed_and_take_no_number_of_torch(pair, tmp_path, options, named):
    runs = []
    # Without names nobody can see that the same seed was set again, if no number was drawn in between.
    for seed in (7, 7, 8) if named or options else (7, 8, 7):
        torch.manual_seed(seed)
        runs.append(_audited(pair, tmp_path, 6, 30, share=0.3, named=named, **options))
    different, again = (2, 1) if named or options else (1, 2)
    assert runs[0] == runs[again] != runs[different]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    _audited(pair, tmp_path, 2, 10, named=named)
    assert torch.equal(torch.get_rng_state(), before)


def test_audits_of_other_processes():
    ids, script = (
        torch.ones(1, 4, dtype=torch.long),
        (
            "import sys, torch; from ee_scale.modeling.trail import DRAWS; seed, token = map(int, sys.argv[1:])\n"
            "seed < 0 or torch.manual_seed(seed)\n"
            "print(DRAWS.streams(torch.full((1, 4), token), None)[0].random())"
        ),
    )

    def elsewhere(seed: int, token: int) -> float:
        command = [sys.executable, "-c", script, str(seed), str(token)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    torch.manual_seed(3)
    assert elsewhere(3, 1) == AuditDraws().streams(ids, None)[0].random() != elsewhere(3, 2)
    assert elsewhere(-1, 1) != elsewhere(-1, 1)


@pytest.mark.parametrize("where", ["model", "call"])
@pytest.mark.parametrize("policy", ["fixed", "off"])
def test_a_generation_config_does_not_choose_what_is_logged(pair, tmp_path, caplog, where, policy):
    inputs, path = prompts(2), tmp_path / "stranger.jsonl"
    values = {"exit_log": str(path), "exit_tags": ["a"], "exit_requests": [1], "exit_audit": "everything"}
    options = {"max_new_tokens": 4, **({"exit_layer": 1} if policy == "fixed" else {})}
    want = pair.generate(inputs, policy, **options).sequences
    config = GenerationConfig.from_dict({**pair.model.generation_config.to_dict(), **values})
    kept = pair.model.generation_config
    caplog.set_level(logging.WARNING)
    try:
        if where == "model":
            pair.model.generation_config = config
            got = pair.generate(inputs, policy, **options).sequences
            pair.model.save_pretrained(tmp_path / "saved")
        else:
            config.max_new_tokens, config.return_dict_in_generate = 4, True
            options = {key: value for key, value in options.items() if key != "max_new_tokens"}
            got = pair.model.generate(**inputs, exit_policy=policy, generation_config=config, **options).sequences
    finally:
        pair.model.generation_config = kept
    assert torch.equal(got, want)
    assert not path.exists()
    if where == "model":
        assert not set(values) & set(json.loads((tmp_path / "saved" / "generation_config.json").read_text()))


def test_it_is_said_that_a_generation_config_is_not_followed(monkeypatch):
    from ee_scale.modeling.decode import logger, take_options

    type(logger).warning_once.cache_clear()
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", said.append)
    for _ in range(3):
        take_options({}, None, GenerationConfig.from_dict({"exit_log": "a", "exit_audit": 1.0}))
    assert said == ["generation config: exit_log, exit_audit ignored; give what is logged as arguments of generate"]


def test_a_number_as_a_tag_is_its_text(pair, tmp_path):
    inputs, path = one_row(prompts(1), 0), tmp_path / "log.jsonl"
    limits = {str(k): 0.0 for k in (1, 2, 4)}
    never = dict.fromkeys(limits)
    calibration = {"policy": "threshold", "thresholds": never, "tags": {"7": {"thresholds": limits}}}
    setattr(pair.model.generation_config, CALIBRATION_KEY, calibration)
    try:
        for tag in (7, "7", torch.tensor(7).numpy()[()]):
            got = pair.generate(inputs, "threshold", max_new_tokens=4, exit_tags=[tag], exit_log=path)
            assert got.exit_layers[0].tolist() == [LAYERS, 1, 1, 1]
        for tag in (7.0, True, float("nan")):
            with pytest.raises(ValueError, match=f"exit_tags: {tag} is no name"):
                pair.generate(inputs, "threshold", max_new_tokens=4, exit_tags=[tag])
        with pytest.raises(ValueError, match="exit_tags='7': give a list"):
            pair.generate(inputs, "threshold", max_new_tokens=4, exit_tags="7")
    finally:
        delattr(pair.model.generation_config, CALIBRATION_KEY)
    assert {line["tag"] for line in _read(path) if "tag" in line} == {"7"}
