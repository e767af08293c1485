"""What is kept of what exits read: shards, places, damage, room; and the epochs that read it again."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_config, write_model

from ee_scale.cli.main import main
from ee_scale.config.compose import compose_config
from ee_scale.data.epochs import Epochs
from ee_scale.engine.schedule import FrozenSchedule
from ee_scale.errors import RunError, UserError
from ee_scale.exits.taps import ABANDONED, FINAL, TapCache, TapShape, tap_name
from ee_scale.modeling.heads import ExitSpec
from ee_scale.planning.taps import check_room
from ee_scale.planning.tune import TunePlan, plan_tune
from ee_scale.training.taps import prepare_taps

LENGTH, WIDTH, COUNT = 5, 8, 12
SHAPE = TapShape(LENGTH, WIDTH, torch.float32)
TOKENS = torch.arange(COUNT * LENGTH).view(COUNT, LENGTH)
STATES = torch.randn(COUNT, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))


def open_cache(folder: Path, *names: str) -> TapCache:
    return TapCache(folder, names or ("003",), SHAPE, torch.zeros(COUNT, dtype=torch.bool))


def write(cache: TapCache, sequences: list[int], name: str = "003") -> None:
    cache.write(name, sequences, TOKENS[sequences], STATES[sequences])


def files(folder: Path, name: str = "003") -> list[str]:
    return sorted(path.name for path in (folder / name).iterdir())


def test_what_was_written_is_read_in_any_order_and_batch(tmp_path):
    first = open_cache(tmp_path)
    write(first, [0, 1, 2])
    write(first, [2, 3, 7, 5])  # 2 is there, 3 lies alone, 7 and 5 are not neighbours in that order
    write(first, [8, 9, 10, 11])
    assert files(tmp_path) == [
        "00000000-3.safetensors",
        "00000003-1.safetensors",
        "00000005-1.safetensors",
        "00000007-1.safetensors",
        "00000008-4.safetensors",
    ]
    for cache in (first, open_cache(tmp_path)):
        for sequences in ([0, 1, 2, 3], [9, 2, 5, 8], [7], [11, 10, 0, 0]):
            found = cache.read("003", sequences, TOKENS[sequences])
            assert torch.equal(found, STATES[sequences])
            assert found.is_contiguous()


def test_what_another_run_writes_meanwhile_is_found(tmp_path):
    ours, theirs = open_cache(tmp_path), open_cache(tmp_path)
    write(ours, [0, 1])
    write(theirs, [2, 3])
    write(theirs, [0, 1, 4])  # both have written 0 and 1
    assert torch.equal(ours.read("003", [4, 0, 3], TOKENS[[4, 0, 3]]), STATES[[4, 0, 3]])


def test_states_of_other_tokens_are_not_read(tmp_path):
    cache = open_cache(tmp_path)
    write(cache, [0, 1])
    with pytest.raises(RunError, match="other tokens than those of sequence 1"):
        cache.read("003", [1], TOKENS[[2]])
    with pytest.raises(RunError, match="sequence 4 is gone"):
        cache.read("003", [4], TOKENS[[4]])


@pytest.mark.parametrize("cut", [lambda data: data[:-1], lambda data: data[:5], lambda data: b""])
def test_a_file_that_was_cut_off_is_written_again(tmp_path, caplog, cut):
    write(open_cache(tmp_path), [0, 1])
    path = tmp_path / "003" / "00000000-2.safetensors"
    path.write_bytes(cut(path.read_bytes()))
    cache = open_cache(tmp_path)
    with pytest.raises(RunError, match="is gone"):
        cache.read("003", [0], TOKENS[[0]])
    assert not path.exists()
    assert "00000000-2.safetensors: not whole" in caplog.text
    write(cache, [0, 1])
    assert torch.equal(cache.read("003", [1], TOKENS[[1]]), STATES[[1]])


def test_files_without_a_name_are_left_to_their_run_for_an_hour(tmp_path):
    write(open_cache(tmp_path), [0])
    young, old = (tmp_path / "003" / f".x.{name}.tmp" for name in ("young", "old"))
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (0, young.stat().st_mtime - ABANDONED - 1))
    write(open_cache(tmp_path), [1])
    assert young.exists()
    assert not old.exists()


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr("ee_scale.exits.taps.sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RunError, match=r"cannot write .*No space left.*data.cache_taps=false"):
        write(open_cache(tmp_path), [0])
    assert files(tmp_path) == []


def test_the_first_step_that_is_kept_is_computed_and_compared(tmp_path):
    cache = open_cache(tmp_path)
    all_of = torch.arange(4)
    steps = [cache.step(numbers, numbers.view(2, -1)) for numbers in (all_of, all_of + 2, all_of + 1, all_of)]
    assert [(step.held, step.reads) for step in steps] == [(False, False), (False, False), (True, False), (True, True)]
    write(cache, [0, 1])
    cache.compare("003", [0, 1], TOKENS[:2], STATES[:2] * (1 + 1e-6))
    for wrong in (STATES[:2] * 1.01, STATES[2:4], STATES[:2] * torch.nan):
        with pytest.raises(UserError, match="not what this model computes"):
            cache.compare("003", [0, 1], TOKENS[:2], wrong)


def test_kinds_that_read_the_same_share_it():
    names = {kind: tap_name(ExitSpec((3,), kind), 3) for kind in ("embedding", "norm", "mlp", "layer")}
    assert names == {"embedding": "003", "norm": "003", "layer": "003", "mlp": "003_mlp"}


@pytest.mark.parametrize("has_exits", [True, False])
@pytest.mark.parametrize("share_final", [True, False])
def test_a_step_that_reads_sends_nothing(has_exits, share_final):
    for stage in range(3):
        schedule = FrozenSchedule(2, 3, stage, has_exits=has_exits, share_final=share_final, reads_taps=True)
        names = [command.name for commands in schedule.steps() for command in commands]
        exits = ["TrainExits"] if has_exits else []
        assert names == ["LoadMicroBatch", "ReadTaps", *exits] * 2 + ["ReduceGrads", "OptimizerStep"] * has_exits
        assert schedule.num_pipe_buffers() == 1


def test_epochs():
    data = [f"sequence {number}" for number in range(20)]
    epochs = Epochs(data, 8, 30, seed=3)
    assert len(epochs) == 30
    rows = [epochs.sequences(range(start, min(start + 8, 30))).tolist() for start in range(0, 30, 8)]
    assert rows[0] == list(range(8))
    assert sorted(rows[1]) == sorted(rows[2]) == rows[0]
    assert len({tuple(row[:6]) for row in rows}) == 4
    assert [epochs[number] for number in (0, 9, 29)] == [data[rows[n // 8][n % 8]] for n in (0, 9, 29)]
    again = Epochs(data, 8, 100, seed=3)
    assert again.sequences([29, 17, 3]).tolist() == epochs.sequences([29, 17, 3]).tolist()
    assert Epochs(data, 8, 100, seed=4).sequences(range(8, 16)).tolist() != rows[1]


# -- plans -------------------------------------------------------------------------------------------------------------

TUNE = ["model=tiny", "data=python", "data.seq_length=16", "train.micro_batch_size=2", "train.global_batch_size=8"]
TUNE += ["exits.layers=[2,4]", "exits.rank=4", "train.steps=10", "parallel.device=cpu", "data.cache_taps=true"]


def plan(folder: Path, *overrides: str) -> TunePlan:
    config = compose_config("tune", [*TUNE, f"data.cache_dir={folder}", *overrides])
    return plan_tune(config, Path("nowhere"), tiny_config("llama"))


@pytest.mark.parametrize(
    ("overrides", "names", "sequences", "state"),
    [
        ([], ("002_mlp", "004_mlp"), 80, 4),
        (["exits.kind=norm", "data.sequences=24", "train.precision=bf16"], ("002", "004"), 24, 2),
        (["exits.kind=layer", "exits.kl_weight=1", "data.sequences=500"], ("002", "004", FINAL), 80, 4),
    ],
)
def test_the_size_is_known_before(tmp_path, overrides, names, sequences, state):
    kept = plan(tmp_path, *overrides).kept_taps
    assert kept.names == names
    assert kept.nbytes == len(names) * sequences * 16 * (64 * state + 4)
    cache = TapCache(tmp_path, names, kept.shape, torch.zeros(kept.distinct, dtype=torch.bool))
    assert kept.missing(tmp_path) == kept.nbytes
    for name in names:
        cache.write(
            name, [0, 1, 2], torch.zeros(3, 16, dtype=torch.int64), torch.zeros(3, 16, 64, dtype=kept.shape.dtype)
        )
    assert kept.missing(tmp_path) == kept.nbytes * (sequences - 3) // sequences
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert written == pytest.approx(kept.nbytes * 3 / sequences, abs=400 * len(names))  # headers


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(tmp_path, monkeypatch):
    kept = plan(tmp_path, "data.sequences=64").kept_taps
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 0, kept.nbytes - 1))
    needed = f"{kept.nbytes / 2**10:.1f} KiB"
    with pytest.raises(UserError, match=rf"data.cache_taps=true: {needed} are needed, {needed} are free in {tmp_path}"):
        check_room(kept, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 0, kept.nbytes))
    check_room(kept, tmp_path)
    assert kept.missing(tmp_path) == kept.nbytes


def test_what_changes_the_states_or_the_sequences_is_another_folder(tmp_path, monkeypatch):
    model, other = (write_model(tmp_path / str(seed), "llama", seed) for seed in (0, 1))
    data = {"tokens": ["a"], "eos_token_id": 1, "pad_token_id": 2}

    def folder(*overrides: str, model: Path = model, data: dict = data) -> Path:
        found = replace(plan(tmp_path, *overrides), model_dir=model)
        return prepare_taps(found, found.kept_taps, data)

    same = folder()
    kinds = ["exits.kind=norm", "exits.head=full", "exits.layers=[3]", "exits.kl_weight=1"]
    grids = ["parallel.tp=2", "parallel.pp=2", "parallel.dp=2", "train.micro_batch_size=1"]
    assert folder(*kinds) == folder(*grids, "optim.lr=1", "train.seed=5", "data.num_workers=2") == same
    others = ["data.seed=5", "data.sequences=24", "data.seq_length=12", "train.precision=bf16", "train.steps=20"]
    found = [folder(change) for change in (*others, "data.weights=[2]", "model.attn_implementation=eager")]
    found += [folder(model=other), folder(data={**data, "tokens": ["b"]})]
    assert len({same, *found}) == 1 + len(found)
    assert json.loads((same / "about.json").read_text())["tokens"] == ["a"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "total used free")(9, 9, 0))
    with pytest.raises(UserError, match=r"data.cache_taps=true"):
        folder("data.sequences=30")


def test_check_tells_the_size(tmp_path, capsys):
    assert main(["check", "tune", *TUNE, f"data.cache_dir={tmp_path}", "data.sequences=64"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "taps up to " in told
    assert "(64 sequences of " in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*TUNE, "backbone=full"], "data.cache_taps=true with backbone.mode=full: what exits read changes"),
        ([*TUNE, "backbone=low_rank"], "data.cache_taps=true with backbone.mode=low_rank: what exits read changes"),
        ([*TUNE, "data.sequences=0"], "data.sequences=0: must be at least 1"),
    ],
)
def test_refused(arguments, words, capsys):
    assert main(["tune", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}")


def test_a_supernet_has_no_taps(capsys):
    assert main(["supernet", "+debug=supernet_cpu", "data.cache_taps=true"]) == 2
    assert capsys.readouterr().err.startswith("error: data.cache_taps=true: a setting of ee-scale tune alone")
