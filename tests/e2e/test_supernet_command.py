"""`ee-scale supernet` through its command line: what it learns, what it leaves, how it dies and goes on."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run_cli
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ee_scale.artifact.checkpoint import checkpoints
from ee_scale.backbone.loading import read_config
from ee_scale.elastic.architecture import ElasticMap
from ee_scale.elastic.order import UnitOrder
from ee_scale.elastic.stage import base_tensors
from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.files import file_digest
from ee_scale.palettes.cut_out import read_supernet, subnet_model
from ee_scale.reading import read_json, write_json

ENDS = (3, 6, 10)


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the speed; the steps must be 1, 2, 3, ..."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    measured = ("tokens_per_second", "mfu", "idle", "memory_gib")
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def digests(run: Path, step: int) -> dict[str, str]:
    """Digests of the tensors of a checkpoint."""
    folder = checkpoints(run / "checkpoints")[step]
    return {path.name: file_digest(path) for path in folder.glob("*.safetensors")}


def factors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every factor of a checkpoint, whichever pipeline stage wrote it."""
    folder, found = checkpoints(run / "checkpoints")[step], {}
    for path in folder.glob("factors_*.safetensors"):
        found |= load_file(path)
    return found


# -- what a run leaves -------------------------------------------------------------------------------------------------


def test_a_run_leaves_one_folder_with_everything(supernet_run):
    names = {path.name for path in supernet_run.iterdir()}
    assert names == {"config.yaml", "run.json", "metrics.jsonl", "order.safetensors", "checkpoints"}
    assert list(checkpoints(supernet_run / "checkpoints")) == [2, 3, 4, 6, 8, 10]
    last = checkpoints(supernet_run / "checkpoints")[10]
    assert {path.name for path in last.iterdir()} == {
        "factors_000.safetensors",
        "optimizer_000.safetensors",
        "state.json",
    }
    state = json.loads((last / "state.json").read_text())
    assert (state["step"], state["consumed_samples"], state["recipe_stage"]) == (10, 40, 2)
    identity = json.loads((supernet_run / "run.json").read_text())
    assert (identity["kind"], identity["task"], identity["labels"]) == ("supernet", "causal_lm", [])


def test_the_loss_falls_and_each_stage_says_what_it_trained(supernet_run):
    rows = metrics(supernet_run)
    assert len(rows) == 10
    for row in rows:
        trained = ["full"] if row["step"] <= ENDS[0] else ["full", "smallest", "random"]
        assert all(list(row[name]) == trained for name in ("loss", "kl", "features"))
        assert row["tokens"] == row["step"] * 4 * 16
    assert rows[2]["loss"]["full"] < rows[0]["loss"]["full"] - 0.05
    assert rows[-1]["loss"]["full"] < rows[2]["loss"]["full"]
    assert rows[-1]["loss"]["smallest"] < rows[3]["loss"]["smallest"]
    # Every stage has a decay of its own, from its peak to optim.min_lr.
    assert [rows[end - 1]["learning_rate"] for end in ENDS] == pytest.approx([1e-5] * 3)
    assert all(rows[start]["learning_rate"] > 6e-3 for start in (0, *ENDS[:-1]))


def test_a_stage_keeps_the_factors_of_earlier_ones_to_the_bit(supernet_run):
    ends = [factors(supernet_run, step) for step in ENDS]
    for earlier, later in pairwise(ends):
        assert set(earlier) < set(later)
        assert all(torch.equal(later[name], tensor) for name, tensor in earlier.items())
    assert {name.split(".")[0] for name in ends[2]} == {"0", "1", "2"}
    assert not all(torch.equal(tensor, factors(supernet_run, 8)[name]) for name, tensor in ends[2].items())


def test_a_switched_off_subnet_has_no_figures(supernet_arguments, tmp_path):
    short = [*supernet_arguments, "stages=[{name: all, axes: [ffn], steps: 1}]", "out=run"]
    finished = run_cli([*short, "sampling.smallest=false", "sampling.randoms=1", "distill.teacher=live"], tmp_path)
    assert finished.code == 0, finished.output
    assert list(metrics(tmp_path / "run")[0]["loss"]) == ["full", "random"]


def accuracy(run: Path, spec: SubnetSpec, valid: Path) -> float:
    """Of the stock model that is cut out, on the held-out sentences, one at a time."""
    supernet = read_supernet(run)
    config = read_config(supernet.base)
    config.num_labels = len(supernet.identity["labels"])
    elastic_map = ElasticMap(config, "classify")
    order = UnitOrder.load(run / "order.safetensors", elastic_map.shape)
    model = subnet_model(elastic_map, base_tensors(supernet.base, elastic_map), order, supernet, spec)
    tokenizer = AutoTokenizer.from_pretrained(supernet.base)
    right = 0
    with torch.no_grad():
        for line in valid.read_text().splitlines():
            example = json.loads(line)
            logits = model(**tokenizer(example["text"], return_tensors="pt")).logits
            right += supernet.identity["labels"][int(logits.argmax())] == example["label"]
    return right / 90


def test_classes_are_learned_by_the_full_net_and_by_smaller_ones(classify_run, labelled):
    assert json.loads((classify_run / "run.json").read_text())["labels"] == ["hill", "sea", "town"]
    rows = metrics(classify_run)
    assert rows[-1]["loss"]["full"] < 0.5 * rows[0]["loss"]["full"]
    kept = UnitOrder.load(
        classify_run / "order.safetensors", ElasticMap(read_config(read_supernet(classify_run).base), "classify").shape
    ).drop
    assert accuracy(classify_run, SubnetSpec(64, 4, 128, (0, 1, 2, 3)), labelled["valid"]) > 0.8
    halved = tuple(sorted(kept[2:].tolist()))
    assert accuracy(classify_run, SubnetSpec(64, 4, 64, halved), labelled["valid"]) > 0.6  # chance: 0.33


# -- stopped and continued ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(supernet_arguments, tmp_path_factory) -> dict[str, Path]:
    """The same run killed where a stage has just begun (last checkpoint: step 6), and within one (step 8)."""
    found = {}
    for name, step in (("boundary", 7), ("mid-stage", 9)):
        folder = tmp_path_factory.mktemp("killed")
        assert run_cli([*supernet_arguments, "out=run"], folder, die_at_step=step).code == -9
        assert max(checkpoints(folder / "run" / "checkpoints")) == step - 1
        found[name] = folder / "run"
    return found


@pytest.mark.parametrize("where", ["boundary", "mid-stage"])
def test_killed_and_resumed_is_the_same_to_the_last_digit(killed, supernet_run, supernet_arguments, tmp_path, where):
    shutil.copytree(killed[where], tmp_path / "run")
    resumed = run_cli([*supernet_arguments, "out=run"], tmp_path)
    assert resumed.code == 0, resumed.output
    assert f"continuing from run/checkpoints/step_{6 if where == 'boundary' else 8:08d}" in resumed.output
    assert "measuring the importance" not in resumed.output
    assert metrics(tmp_path / "run") == metrics(supernet_run)
    assert digests(tmp_path / "run", 10) == digests(supernet_run, 10)


@pytest.mark.parametrize(("where", "grid"), [("mid-stage", "pp"), ("boundary", "tp")])
def test_resumed_on_another_grid_is_the_same_run(killed, supernet_run, supernet_arguments, tmp_path, where, grid):
    shutil.copytree(killed[where], tmp_path / "run")
    resumed = run_cli([*supernet_arguments, "out=run", f"parallel.{grid}=2"], tmp_path, world_size=2)
    assert resumed.codes == [0, 0], resumed.outputs
    ours, whole = metrics(tmp_path / "run"), metrics(supernet_run)
    assert len(ours) == len(whole)
    for mine, one_process in zip(ours, whole, strict=True):
        for name in ("loss", "kl", "features"):
            assert mine[name] == pytest.approx(one_process[name], rel=1e-5, abs=1e-7), (mine["step"], name)
    # The subnets stay those that one process chose, not those that pp=2 would have.
    assert file_digest(tmp_path / "run" / "order.safetensors") == file_digest(supernet_run / "order.safetensors")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["parts"] == 1
    mine, one_process = factors(tmp_path / "run", 10), factors(supernet_run, 10)
    assert set(mine) == set(one_process)
    for name, tensor in mine.items():
        if name.startswith("2."):  # AdamW's first steps make signs of gradients that are zero but for rounding
            assert (tensor - one_process[name]).norm() <= 1e-2 * one_process[name].norm() + 1e-6, name
        else:
            assert torch.equal(tensor, one_process[name]), name


def test_a_finished_run_says_so_and_no_other_run_enters_its_folder(supernet_run, supernet_arguments, tmp_path):
    shutil.copytree(supernet_run, tmp_path / "run")
    finished = run_cli([*supernet_arguments, "out=run"], tmp_path)
    assert finished.code == 0
    assert "run is finished (step 10)" in finished.output
    other = run_cli([*supernet_arguments, "out=run", "distill.kl_weight=0.5"], tmp_path)
    assert other.code == 2
    assert "(distill.kl_weight=0.9 there, 0.5 here)" in other.output


def test_debug_config_starts_its_own_ranks(tmp_path):
    finished = run_cli(["supernet", "+debug=supernet_cpu", "out=run"], tmp_path)
    assert finished.code == 0, finished.output
    assert len(metrics(tmp_path / "run")) == 15
    assert "next: ee-scale palette src=run" in finished.output
    assert {path.name for path in (tmp_path / "run" / "checkpoints" / "step_00000015").glob("factors_*")} == {
        "factors_000.safetensors",
        "factors_001.safetensors",
    }


# -- cheaper steps -----------------------------------------------------------------------------------------------------

PALETTE = "space.palette=[{ffn: 0.5}, {hidden: 0.5, depth: 2}]"
STAGES = "{name: t, axes: [], steps: 2, rank: 2}, {name: a, axes: [hidden, ffn, depth], steps: 40, rank: 2, lr: 1e-3}"
CHEAP = ["distill.cache=true", "sampling.full_every=2", "sampling.palette_share=0.8", PALETTE]


def test_a_kept_teacher_says_the_same_whether_it_fits_or_not(supernet_arguments, tmp_path):
    """Sixteen sequences that come again and again."""
    lines = []
    for number, room in enumerate((4.0, 2e-5, 1e-9)):
        cheap = [*CHEAP, "data.sequences=16", f"distill.cache_gb={room}", f"out=run{number}"]
        finished = run_cli([*supernet_arguments, *cheap], tmp_path)
        assert finished.code == 0, finished.output
        assert "the teacher is kept: " in finished.output
        lines.append(metrics(tmp_path / f"run{number}"))
    assert lines[0] == lines[1] == lines[2]
    assert all(math.isfinite(value) for line in lines[0] for value in line["kl"].values())
    assert [("full" in line["loss"]) for line in lines[0]] == [True] * 3 + [step % 2 == 0 for step in range(3, 10)]


def test_a_kept_teacher_of_classes_is_the_teacher(classify_arguments, tmp_path):
    lines = []
    for cache in ("true", "false"):
        given = [word for word in classify_arguments if not word.startswith("stages=")]
        finished = run_cli([*given, f"stages=[{STAGES}]", f"distill.cache={cache}", f"out={cache}"], tmp_path)
        assert finished.code == 0, finished.output
        lines.append(metrics(tmp_path / cache))
    for kept, computed in zip(*lines, strict=True):
        for name in ("loss", "kl", "features", "grad_norm"):
            assert kept[name] == pytest.approx(computed[name], rel=1e-3, abs=1e-4)


def test_a_run_of_a_version_without_palettes_goes_on_with_the_papers_recipe(supernet_run, supernet_arguments, tmp_path):
    """What it did not have has no value that another recipe could contradict."""
    run = tmp_path / "run"
    shutil.copytree(supernet_run, run)
    identity = read_json(run / "run.json")
    new = ("sampling.full_every", "sampling.palette_share", "space.palette", "importance.layer", "distill.cache")
    kept = {key: value for key, value in identity["settings"].items() if not key.startswith(new)}
    assert len(kept) < len(identity["settings"])
    write_json(run / "run.json", {**identity, "settings": kept})
    finished = run_cli([*supernet_arguments, "out=run"], tmp_path)
    assert finished.code == 0, finished.output
    finished = run_cli([*supernet_arguments, "sampling.full_every=2", "out=run"], tmp_path)
    assert (finished.code, "sampling.full_every=1 there, 2 here" in finished.output) == (2, True), finished.output
