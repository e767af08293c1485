"""`exits=drafter`: the measured recipe on another model than it was measured on."""

from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli

from ee_scale.artifact.run_folder import read_run
from ee_scale.cli.main import main
from ee_scale.config.compose import compose_config
from ee_scale.errors import UserError
from ee_scale.inference.model import open_model

GIVEN = ["model=m", "data=d"]


def test_it_sets_the_optimizer_too_and_words_of_the_command_line_win():
    plain, recipe = compose_config("tune", GIVEN), compose_config("tune", [*GIVEN, "exits=drafter"])
    assert (recipe.exits.kind, recipe.exits.head) == ("layer", "shortlist")
    assert recipe.exits.kl_weight > 0
    assert recipe.optim.lr > plain.optim.lr
    assert recipe.train.global_batch_size < plain.train.global_batch_size
    words = ["optim.lr=0.5", "train.global_batch_size=8", "exits.kl_weight=0", "exits.layers=[2]"]
    mine = compose_config("tune", [*GIVEN, *words, "exits=drafter"])
    assert (mine.optim.lr, mine.train.global_batch_size) == (0.5, 8)
    assert (mine.exits.kl_weight, mine.exits.layers) == (0, [2])


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-3", "many", "true"])
def test_what_no_shortlist_is_is_refused(value):
    with pytest.raises(UserError, match=r"^exits\.shortlist=\S+: give a number of tokens"):
        compose_config("tune", [*GIVEN, f"exits.shortlist={value}"])


def test_it_runs_on_a_small_model_and_drafts_losslessly(model_dir, corpus, tmp_path: Path):
    words = [
        "exits=drafter",
        f"model={model_dir}",
        f"data={corpus}",
        f"data.cache_dir={tmp_path}",
        "data.seq_length=32",
    ]
    finished = run_cli(["tune", *words, "train.steps=40", "parallel.device=cpu", "out=run"], tmp_path)
    assert finished.code == 0, finished.output
    spec = read_run(tmp_path / "run")["early_exit"]
    assert spec["layers"] == [1]  # a thirtieth of 4 layers is at least the first
    assert spec["shortlist"] == round(0.0833 * 301)
    assert main(["export", f"src={tmp_path / 'run'}", f"out={tmp_path / 'model'}"]) == 0
    model = open_model(tmp_path / "model").eval()
    ids = torch.arange(3, 11)[None]
    plain = model.generate(ids, max_new_tokens=20, do_sample=False, exit_policy="off")
    drafted = model.generate(
        ids,
        max_new_tokens=20,
        do_sample=False,
        exit_policy="lossless",
        exit_draft_length=2,
        return_dict_in_generate=True,
    )
    assert torch.equal(drafted.sequences, plain)
    assert drafted.exit_stats["drafted"] > 0
