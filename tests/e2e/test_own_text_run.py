"""`ee-scale tune data.own_text=0.5`: the model writes once, and runs train on it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import run_cli
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoModelForCausalLM

from ee_scale.training.own_text import ROWS

PROMPT, LENGTH = 8, 32
OWN = ["data.own_text=0.5", f"data.own_text_prompt={PROMPT}", "train.steps=2", "data.own_text_tokens=600"]


def losses(run: Path) -> list[dict[str, float]]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_model_writes_once_and_every_grid_trains_on_it(tune_arguments, model_dir, tmp_path):
    arguments = [*tune_arguments, *OWN, f"data.cache_dir={tmp_path / 'cache'}", "data.cache_taps=true"]
    finished = run_cli([*arguments, "out=run", "parallel.pp=2"], tmp_path, world_size=2)
    assert finished.codes == [0, 0], finished.outputs
    assert "own text: 32 documents" in finished.output
    again = run_cli([*arguments, "out=again"], tmp_path)
    assert again.code == 0, again.output
    assert "own text:" not in again.output
    assert "taps: nothing to be written" in again.output
    for ours, theirs in zip(losses(tmp_path / "run"), losses(tmp_path / "again"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    corpus = run_cli([*tune_arguments, "train.steps=2", "out=corpus"], tmp_path)
    assert corpus.code == 0, corpus.output
    assert losses(tmp_path / "corpus")[0] != pytest.approx(losses(tmp_path / "again")[0], rel=1e-4)
    check_greedy(next((tmp_path / "cache").glob("own-*")), model_dir)


@torch.no_grad()
def check_greedy(folder: Path, model_dir: Path) -> None:
    """The first half is what transformers generates greedily; the second is something else."""
    dataset = IndexedDataset(str(folder / "tokens"))
    found = [torch.from_numpy(np.asarray(dataset[i]).astype(np.int64)) for i in range(len(dataset))]
    assert len(found) == 2 * ROWS
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    end, same = model.config.eos_token_id, []
    for document in found:
        assert document[-1] == end
        greedy = model.generate(document[None, :PROMPT], max_new_tokens=LENGTH - PROMPT, do_sample=False)[0]
        same.append(torch.equal(greedy[: len(document) - 1], document[:-1]))
    assert all(same[:ROWS])
    assert not any(same[ROWS:])
