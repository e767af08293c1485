"""A rank holds, and reads, its shard: about a quarter of the model at TP2 x PP2."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_config
from helpers.spawn import spawn
from helpers.tuning import stage_backbone
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.stages import plan_stages
from ee_scale.grid import Layout, join_grid

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
SIZES |= {"num_hidden_layers": 6, "vocab_size": 4099, "head_dim": 64}
STATUS = Path("/proc/self/status")

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """(folder, bytes by tensor) of a model of some 300 MB."""
    folder = tmp_path_factory.mktemp("memory")
    config = tiny_config("llama", **SIZES)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    tensors = {name: torch.full(tensor.shape, 0.01) for name, tensor in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, {name: tensor.nbytes for name, tensor in tensors.items()}


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (a mapped weight file is the kernel's cache, shared by all ranks)."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


@contextmanager
def peak_growth() -> Iterator[list[int]]:
    """Largest growth of `anonymous_bytes` inside the block, looked at every millisecond."""
    start, found, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            found[0] = max(found[0], anonymous_bytes() - start)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found[0] = max(found[0], anonymous_bytes() - start)


def load(rank: int, folder: Path, layout: Layout) -> tuple[dict[str, int], int]:
    """(bytes by parameter of this rank, peak growth while loading)."""
    grid = join_grid(layout, torch.device("cpu"))
    config = ModelFolder(folder).decoder_config
    plan = plan_stages(config.num_hidden_layers, layout.pp, [1], whole_model=True)
    last = grid.stage == layout.pp - 1
    with peak_growth() as growth:
        backbone = stage_backbone(folder, config, plan, grid, torch.float32, final_norm=True, lm_head=last)
    return {name: p.nbytes for name, p in backbone.named_parameters()}, growth[0]


def test_each_rank_holds_and_reads_its_quarter(model: tuple[Path, dict[str, int]]) -> None:
    folder, tensors = model
    whole = sum(tensors.values())
    assert whole > 250e6
    layer = sum(size for name, size in tensors.items() if name.startswith("model.layers.0."))
    vocabulary = tensors["lm_head.weight"]
    assert layer * 6 + 2 * vocabulary == pytest.approx(whole, rel=1e-3)
    for held, growth in spawn(load, 4, folder, Layout(2, 2, 1)):
        # Three of six layers and one of the two vocabulary matrices, halved; norms are whole on both tensor ranks.
        assert sum(held.values()) == pytest.approx((3 * layer + vocabulary) / 2, rel=5e-3)
        assert sum(held.values()) == pytest.approx(whole / 4, rel=0.02)
        assert growth < 0.4 * whole, f"peak {growth / 1e6:.0f} MB for {sum(held.values()) / 1e6:.0f} MB"


def test_the_gauge_sees_a_whole_model(model: tuple[Path, dict[str, int]]) -> None:
    """On one rank the same measure reads the whole model, and not twice that."""
    folder, tensors = model
    ((held, growth),) = spawn(load, 1, folder, Layout())
    whole = sum(tensors.values())
    assert sum(held.values()) == whole
    assert 0.95 * whole < growth < 1.3 * whole
