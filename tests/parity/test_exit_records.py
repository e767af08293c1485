"""The decision log and audits of `generate`: true, complete, and without effect on the text."""

import json
from typing import Any

import pytest
import torch
from helpers.decoding import LAYERS, Pair, limits_for, make_pair, one_row, prompts, row_text

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
    again = pair.generate(inputs, "lossless", max_new_tokens=2, exit_log=path)
    assert len(_read(path)) > len(lines) + again.exit_layers.numel() / 2  # the log grows
