"""Megatron-Core's GPTModel with experts on CPU ranks, from rank files and from `torch_dist`."""

import dataclasses
import itertools
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state

from helpers.megatron import (
    VARIANTS,
    Signature,
    build,
    compute_logits,
    index_of,
    model_parallel,
    save_sharded,
    sharded,
    signature,
    tensors,
)

Place = tuple[int, int, int]  # tensor rank, stage, expert rank


@dataclasses.dataclass(frozen=True)
class Job:
    """A model at a grid (tensor ranks, stages, expert ranks), by our converter.

    Attributes:
        ranks: rank files of this grid; sharded: `torch_dist`, of another; again: where Megatron saves it, if it does.
    """

    name: str
    grid: Place
    ranks: Path
    sharded: Path
    again: Path | None = None


@dataclasses.dataclass
class Seen:
    """What one rank saw.

    Attributes:
        place: of this rank; asked, found: what GPTModel has and what its rank file has; logits: of the last stage.
        same: the first name that has other values from `torch_dist` than from the rank file; index: see `index_of`.
    """

    place: Place
    asked: Signature
    found: Signature
    logits: torch.Tensor | None
    same: str | None
    index: dict[str, tuple]


def take(rank: int, jobs: list[Job], ids: torch.Tensor) -> dict[tuple[str, Place], Seen]:
    """Load each, strictly, from both; compute; save in each of Megatron's layouts."""
    found = {}
    for grid, group in itertools.groupby(jobs, lambda job: job.grid):
        with model_parallel(*grid[:2], ep=grid[2]) as copy:
            for job in group:
                seen = _take(job, ids)
                if not copy:
                    found[job.name, grid] = seen
    return found


def _take(job: Job, ids: torch.Tensor) -> Seen:
    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    content = torch.load(job.ranks / _folder(place, job.grid) / "model_optim_rng.pt", weights_only=False)
    args = content["args"]
    model = build(args, fused_names=True)
    asked, file = signature(model.state_dict()), signature(content["model"])
    model.load_state_dict(content["model"], strict=True)
    logits, expected = compute_logits(model, ids), dict(tensors(model))
    other = build(args, fused_names=True)
    index = index_of(sharded({"model": other}))
    states = dist_checkpointing.load(sharded({"model": other}), str(job.sharded))
    other.load_state_dict(states["model"], strict=True)
    got = dict(tensors(other))
    assert got.keys() == expected.keys()
    differing = next((name for name in expected if not torch.equal(got[name], expected[name])), None)
    for name, metadata in VARIANTS.items() if job.again else ():
        saved = build(args, fused_names=name != "stacked")  # both names that a norm in front of a router may have
        saved.load_state_dict(content["model"], strict=True)
        save_sharded(job.again / name, {"model": saved}, args, metadata)
    return Seen(place, asked, file, logits, differing, index)


def _folder(place: Place, grid: Place) -> str:
    """As Megatron-LM names it (`get_checkpoint_name`)."""
    name = f"mp_rank_{place[0]:02d}"
    if grid[1] > 1:
        name += f"_{place[1]:03d}"
    if grid[2] > 1:
        name += f"_{place[2]:03d}"
    return name
