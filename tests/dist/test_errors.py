"""What cannot run is refused before anything is trained, with the numbers."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Lock, Thread

import pytest
import torch
from helpers.hangs import HangError, HangWatch, wait_asleep, wait_for
from helpers.models import tiny_config, write_model
from helpers.spawn import RankError, spawn
from helpers.tuning import stage_backbone
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.shard import tensor_plan
from ee_scale.backbone.stages import plan_stages
from ee_scale.errors import UserError
from ee_scale.grid import Layout, join_grid

NINE_HEADS = {"hidden_size": 63, "num_attention_heads": 9, "num_key_value_heads": 3}


def error_of(rank: int, what: str, root: Path) -> str:
    """The text of the `UserError` that this rank gets."""
    try:
        if what == "world":
            join_grid(Layout(2, 2, 1), torch.device("cpu"))
        else:
            grid = join_grid(Layout(2, 1, 1), torch.device("cpu"))
            config = ModelFolder(root).decoder_config
            stage_backbone(root, config, plan_stages(5, 1, [5]), grid, torch.float32)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        ("llama", NINE_HEADS, "parallel.tp=2 does not divide num_attention_heads=9"),
        ("llama", {"num_key_value_heads": 1}, "parallel.tp=2 does not divide num_key_value_heads=1"),
        ("qwen3", {"intermediate_size": 129}, "parallel.tp=2 does not divide intermediate_size=129"),
    ],
)
def test_tensor_parallel_that_does_not_fit(family: str, changes: dict, text: str) -> None:
    config = tiny_config(family, **changes)
    assert tensor_plan(config, 1)
    with pytest.raises(UserError, match=f"^{text}"):
        tensor_plan(config, 2)


def test_a_plan_for_the_vocabulary_is_not_ours() -> None:
    """Some configs have one."""
    config = tiny_config("llama")
    plan = tensor_plan(config, 2)
    config.base_model_tp_plan = {**config.base_model_tp_plan, "embed_tokens": "embedding_rowwise"}
    assert tensor_plan(config, 2) == plan


def test_a_style_that_is_not_known() -> None:
    config = tiny_config("llama")
    config.base_model_tp_plan = {**config.base_model_tp_plan, "layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(UserError, match=r"^parallel.tp=2: 'llama' asks for 'packed_colwise' on layers.\*.mlp.up_proj"):
        tensor_plan(config, 2)


def test_unsupported_architecture(tmp_path: Path) -> None:
    GPT2Config(n_layer=2, n_embd=16, n_head=2).save_pretrained(tmp_path)
    text = "'gpt2' is not supported: transformers has no plan that cuts it into embedding, decoder layers and norm"
    with pytest.raises(UserError, match=text):
        _ = ModelFolder(tmp_path).decoder_config


def test_world_of_another_size(tmp_path: Path) -> None:
    text = "2 processes, but tp=2 x pp=2 (stages launched) x dp=1 needs 4"
    assert spawn(error_of, 2, "world", tmp_path) == [text, text]


def test_missing_tensor_and_wrong_shape(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole", "llama")
    tensors = load_file(whole / "model.safetensors")
    up = "model.layers.3.mlp.up_proj.weight"
    cases = {
        "missing": ({n: t for n, t in tensors.items() if n != up}, f"no tensor '{up}' in its safetensors"),
        "rows": (
            tensors | {up: torch.zeros(126, 64)},
            f"'{up}' has shape [126, 64], but the config asks for [128, 64]",
        ),
        "norm": (
            tensors | {"model.layers.0.input_layernorm.weight": torch.zeros(63)},
            "'model.layers.0.input_layernorm.weight' has shape [63], but the config asks for [64]",
        ),
    }
    for name, (changed, text) in cases.items():
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        for error in spawn(error_of, 2, "load", folder):
            assert error == f"{folder}: {text}"
    assert spawn(error_of, 2, "load", whole) == ["no error"] * 2


def fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("a mistake in a test")
    torch.distributed.barrier()


def sleep_for_ever(rank: int, folder: Path) -> None:
    torch.distributed.barrier()
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 0:
        torch.distributed.recv(torch.zeros(1), 1)


def test_the_helper_reports_a_rank_that_fails() -> None:
    """The rank that waits for it is ended, and the cause is shown."""
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2.*fail_on_rank_one.*a mistake in a test"):
        spawn(fail_on_rank_one, 2)


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    """However long it took them to come there: the watch begins when both wait."""
    watch = HangWatch(quiet=1.0)

    def begin() -> None:
        wait_asleep(int(wait_for(tmp_path / str(rank)).read_text()) for rank in range(2))
        watch.start()

    Thread(target=begin, daemon=True).start()
    with pytest.raises(RankError, match=r"(?s)died with exit code -6.*in sleep_for_ever"):
        spawn(sleep_for_ever, 2, tmp_path)
    watch.stop()


def test_a_test_that_hangs_by_itself_is_ended() -> None:
    lock = Lock()
    with pytest.raises(HangError), lock, HangWatch(quiet=1.0):
        lock.acquire()


def test_work_is_no_hang() -> None:
    """Neither is waiting for a child process that works; too much of it is."""
    spin = [sys.executable, "-ISc", "import time\nwhile time.process_time() < 3: pass"]
    with HangWatch(quiet=1.0, least=0.02):  # a fiftieth of a core is work, on a busy machine
        assert subprocess.run(spin, check=False).returncode == 0
    with HangWatch(quiet=1.0, least=0.02, most=1.0):
        assert subprocess.run(spin, check=False).returncode == -signal.SIGABRT
