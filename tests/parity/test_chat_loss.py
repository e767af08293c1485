"""From conversations in a file to the loss of a step, on several grids: transformers' own loss with labels -100."""

import json
from pathlib import Path

import pytest
import torch
from helpers.chats import CHATML, chat_tokenizer, conversations
from helpers.models import load_whole, write_model
from helpers.reference import BATCH, Job, start_noise
from helpers.spawn import spawn
from helpers.tuning import build_engine

from ee_scale.config.groups import DataConfig
from ee_scale.data.inputs import run_dataset
from ee_scale.data.loader import batches
from ee_scale.grid import Layout, join_grid, leave_grid

# An exit of the last layer, with a norm of its own, says what the model says.
JOB = Job("llama", "norm", "tied", exit_layers=(5,), loss_weights=(1.0,), micro_batches=4, clip_grad=0.0)
SEQUENCE, STEPS = 16, 3
GRIDS = [(1, 1, 1), (2, 2, 1), (1, 2, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("chat"), chat_tokenizer(CHATML)
    write_model(folder, "llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    rows = [{"messages": messages} for messages in conversations(60)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def samples(folder: Path) -> torch.utils.data.Dataset:
    """As a run has them, with the epochs around them."""
    data = DataConfig(str(folder / "chat.jsonl"), seq_length=SEQUENCE, seed=1, cache_dir=str(folder / "cache"))
    return run_dataset(data, folder, len(chat_tokenizer(CHATML)), STEPS * JOB.micro_batches * BATCH)


def train(rank: int, folder: Path, layouts: list[tuple[int, int, int]]) -> dict:
    """(losses, gradient norms) of every step, by layout."""
    found = {}
    for layout in layouts:
        grid = join_grid(Layout(*layout), torch.device("cpu"))
        engine, each = build_engine(folder, JOB, grid), JOB.micro_batches // grid.layout.dp
        numbers = {"dp_rank": grid.dp_rank, "dp_size": grid.layout.dp}
        data = batches(samples(folder), micro_batch_size=BATCH, num_micro_batches=each, **numbers)
        engine.set_lr(0.0)  # the same model at every step
        steps = []
        for _ in range(STEPS):
            losses = {k: float(value[0]) for k, value in engine.train_step(data).items()}
            steps.append((losses, {k: float(norm) for k, norm in engine.grad_norms.items()}))
        found[layout] = (grid.stage, steps)
        leave_grid()
    return found


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[tuple[float, float]]:
    """(loss, norm of its gradient) of every step, from transformers: one forward over the whole global batch."""
    model, data, found = load_whole(folder), samples(folder), []
    norm = model.model.norm.weight
    norm.data += start_noise("5.norm.weight", tuple(norm.shape))
    norm.requires_grad_(True)
    size = JOB.micro_batches * BATCH
    for step in range(STEPS):
        items = [data[i] for i in range(step * size, (step + 1) * size)]
        ids = torch.stack([torch.cat([item["tokens"], item["labels"][-1:]]) for item in items])
        labels = ids.clone()
        labels[:, 1:][torch.stack([item["loss_mask"] for item in items]) == 0] = -100
        norm.grad = None
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        found.append((loss.item(), norm.grad.norm().item()))
    return found


@pytest.fixture(scope="module")
def found(folder: Path) -> dict:
    samples(folder)  # tokenised once
    ranks = {}
    for world in (1, 4):
        layouts = [layout for layout in GRIDS if Layout(*layout).world_size == world]
        by_rank = spawn(train, world, folder, layouts)
        ranks |= {layout: [records[layout] for records in by_rank] for layout in layouts}
    return ranks


@pytest.mark.parametrize("layout", GRIDS, ids=str)
def test_loss_and_gradient_are_those_of_transformers(layout, found, wanted):
    """Micro-batches with few learned tokens and with many weigh by their tokens, on every grid."""
    last = [steps for stage, steps in found[layout] if stage == layout[1] - 1]
    for step, (loss, norm) in enumerate(wanted):
        replicas = [steps[step][0][5] for steps in last]
        assert sum(replicas) / len(replicas) == pytest.approx(loss, rel=1e-5)
        assert all(steps[step][1][5] == pytest.approx(norm, rel=1e-4) for steps in last)


def test_micro_batches_differ(folder):
    """Or a mean of means would pass too."""
    data = samples(folder)
    counts = [sum(int(data[i + j]["loss_mask"].sum()) for j in range(BATCH)) for i in range(0, 8, BATCH)]
    assert len(set(counts)) > 1
