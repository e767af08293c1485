"""`ee-scale check`: what a run would be, without starting it."""

import re
from pathlib import Path

from helpers.cli import run_cli

from ee_scale.config.compose import compose_config
from ee_scale.training.tune import Tune


def test_a_plan_is_printed_and_nothing_starts(tune_arguments: list[str], tmp_path: Path) -> None:
    more = ["parallel.pp=2", "parallel.tp=2", "parallel.dp=2", "out=run"]
    finished = run_cli(["check", *tune_arguments, *more], tmp_path)
    assert finished.code == 0, finished.output
    text = finished.output
    assert "8 = tp 2 x pp 2 x dp 2" in text
    assert "256 per step, 2,048 in 8 steps" in text
    assert "2 per step and rank, of 2 sequences" in text
    assert "stages run ahead" in text
    assert re.search(r"exits\.rank +4 *\n", text)
    assert "train.keep" not in text  # as by default
    assert not (tmp_path / "run").exists()
    assert "not launched" not in text


def test_stages_behind_the_deepest_exit_are_named(tune_arguments: list[str], tmp_path: Path) -> None:
    finished = run_cli(["check", *tune_arguments, "exits.layers=[1]", "parallel.pp=4"], tmp_path)
    assert finished.code == 0, finished.output
    assert finished.output.count("not launched") == 3
    assert "1 = tp 1 x pp 1 x dp 1" in finished.output


def test_a_gpu_run_is_checked_where_no_gpu_is(tune_arguments: list[str], tmp_path: Path) -> None:
    for memory, code in (("80", 0), ("1", 2)):
        arguments = [*tune_arguments, "parallel.device=cuda", f"parallel.device_memory_gb={memory}"]
        finished = run_cli(["check", *arguments], tmp_path)
        assert finished.code == code, finished.output
        assert "(bf16, cuda)" in finished.output
    assert finished.output.splitlines()[-1].startswith("error: a rank of stage 0 needs")


def test_the_change_that_is_proposed_fits(tune_arguments: list[str], tmp_path: Path) -> None:
    verb, *arguments = [*tune_arguments, "exits.loss_chunk_tokens=16"]

    def needed(*more: str) -> float:
        config = compose_config(verb, [*arguments, *more])
        return max(rank.total for rank in Tune.of(config).plan.memory(bf16=False, device="cpu")) / 2**30

    limit = (needed() + needed("parallel.tp=2")) / 2
    refused = run_cli(["check", verb, *arguments, f"parallel.device_memory_gb={limit}"], tmp_path)
    assert refused.code == 2
    change = re.search(r"the device has [\d.]+ \w+: (\S+) would need", refused.output.splitlines()[-1])
    assert change is not None, refused.output
    assert change[1] == "parallel.tp=2"
    done = run_cli(["check", verb, *arguments, f"parallel.device_memory_gb={limit}", change[1]], tmp_path)
    assert done.code == 0, done.output


def test_a_supernet_is_checked(supernet_arguments: list[str], tmp_path: Path) -> None:
    finished = run_cli(["check", *supernet_arguments, "parallel.pp=2", "out=run"], tmp_path)
    assert finished.code == 0, finished.output
    assert "2 = tp 1 x pp 2 x dp 1" in finished.output
    assert "p=2, m=8 forward-backward pairs" in finished.output  # two micro-batches, four subnets
    assert not (tmp_path / "run").exists()


def test_what_a_run_would_refuse_is_refused(tune_arguments: list[str], tmp_path: Path) -> None:
    finished = run_cli(["check", *tune_arguments, "parallel.tp=3"], tmp_path)
    assert finished.code == 2
    assert "parallel.tp=3 does not divide" in finished.output
