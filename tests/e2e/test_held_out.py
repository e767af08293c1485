"""Held-out text in `ee-scale tune`: which checkpoint is kept and exported, when a run ends, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from ee_scale.artifact.checkpoint import checkpoints, read_checkpoint
from ee_scale.cli.main import main
from ee_scale.inference.model import open_model

STEPS = re.compile(r"step (\d+): loss on held-out text (\d+\.\d+)")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Text in another order of letters than the corpus: learning the corpus makes it worse sooner or later."""
    path = tmp_path_factory.mktemp("held") / "held.txt"
    path.write_text("tixe eht si ti fi .ti si nekot eno fo etats neddih eht sdaer reyal a " * 8)
    return path


@pytest.fixture(scope="module")
def arguments(tune_arguments, held_out) -> list[str]:
    """A learning rate that soon overshoots, a checkpoint at every step, and patience for two."""
    rates = ["optim.lr=0.02", "optim.min_lr=0.02", "optim.warmup_fraction=0", "train.keep=1", "train.save_every=1"]
    return [*tune_arguments, *rates, f"train.held_out={held_out}", "train.early_stop=2", "train.steps=40"]


@pytest.fixture(scope="module")
def stopped(arguments, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("stopped")
    finished = run_cli([*arguments, "out=run"], folder)
    assert finished.code == 0, finished.output
    return folder / "run", finished.output


def test_the_run_ends_when_it_gets_no_better_and_the_best_step_is_exported(stopped, tmp_path):
    run, output = stopped
    losses = {int(step): float(loss) for step, loss in STEPS.findall(output)}
    best = min(losses, key=losses.get)
    assert best + 2 == max(losses) < 40
    assert f"train.early_stop=2: ends here, step {best} is the one to export" in output
    assert list(checkpoints(run / "checkpoints")) == [best, best + 2]  # the best one, and the last of keep=1
    assert "backbone unchanged" in output
    assert main(["export", f"src={run}", "kind=sidecar", f"out={tmp_path / 'exits'}"]) == 0
    assert json.loads((tmp_path / "exits" / "exits.json").read_text())["step"] == best


def test_the_loss_is_that_of_the_exported_exits(stopped, held_out, tmp_path):
    run, _ = stopped
    main(["export", f"src={run}", f"out={tmp_path / 'model'}"])
    state = read_checkpoint(max(checkpoints(run / "checkpoints").items())[1])
    model = open_model(tmp_path / "model").eval()
    ids = torch.tensor(whole_windows(model, held_out)).view(-1, 33)
    with torch.no_grad():
        exits = model(ids[:, :-1]).exit_logits
    losses = [cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) for logits in exits.values()]
    assert state["best"]["loss"] == pytest.approx(float(sum(losses) / len(losses)), rel=1e-4)


def whole_windows(model, path: Path) -> list[int]:
    """Whole windows of 33 tokens of a text."""
    ids = AutoTokenizer.from_pretrained(model.config.name_or_path)(path.read_text())["input_ids"]
    return ids[: len(ids) // 33 * 33]


def test_killed_and_resumed_it_ends_at_the_same_step(stopped, arguments, tmp_path):
    run, _ = stopped
    last = max(checkpoints(run / "checkpoints"))
    killed = run_cli([*arguments, "out=run"], tmp_path, die_at_step=last - 1)
    assert killed.code == -9
    again = run_cli([*arguments, "out=run"], tmp_path)
    assert again.code == 0, again.output
    ours, theirs = (max(checkpoints(folder / "checkpoints").items()) for folder in (tmp_path / "run", run))
    assert ours[0] == theirs[0]
    assert read_checkpoint(ours[1]) == read_checkpoint(theirs[1])
    third = run_cli([*arguments, "out=run"], tmp_path)  # it has ended, and stays so
    assert third.code == 0
    assert max(checkpoints(tmp_path / "run" / "checkpoints")) == last


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train.early_stop=2"], "train.early_stop=2 needs train.held_out=<text that is not trained on>"),
        (["train.held_out=nowhere.txt"], "train.held_out='nowhere.txt'"),
        (["train.held_out=python", "backbone=full"], "train.held_out with backbone.mode=full"),
        (["train.held_out=python", "parallel.pp=2"], "parallel.pp=2 launches 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(tune_arguments, tmp_path, capsys, words, line):
    assert main([*tune_arguments, *words, f"out={tmp_path / 'run'}"]) == 2
    assert line in capsys.readouterr().err
