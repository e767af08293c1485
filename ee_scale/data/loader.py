"""Batches for training, the same for every grid and from every step on, and windows for evaluation."""

from collections.abc import Iterator

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ee_scale.data.corpora import num_tokens, open_mask, open_tokens, read_tokens
from ee_scale.errors import UserError

BATCH_KEYS = ("tokens", "labels", "loss_mask")


class MicroBatchSampler(Sampler[list[int]]):
    """Sample numbers of one replica's micro-batches.

    With b = micro_batch_size, M = num_micro_batches and G = b * M * dp_size, step t covers the samples
    [consumed + t*G, consumed + (t+1)*G), and micro-batch m of replica d starts (d*M + m)*b into them.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        micro_batch_size: int,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int = 0,
    ) -> None:
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} is not in [0, dp_size={dp_size})")
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self.dp_rank = dp_rank
        self.global_batch_size = micro_batch_size * num_micro_batches * dp_size
        self.starts = range(consumed_samples, num_samples - self.global_batch_size + 1, self.global_batch_size)

    def __len__(self) -> int:
        return len(self.starts) * self.num_micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for start in self.starts:
            for index in range(self.num_micro_batches):
                first = start + (self.dp_rank * self.num_micro_batches + index) * self.micro_batch_size
                yield list(range(first, first + self.micro_batch_size))


def batches(
    dataset: Dataset,
    *,
    micro_batch_size: int,
    num_micro_batches: int,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int = 0,
    num_workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of one replica: tokens and labels [B, S] int64, loss_mask [B, S] float32.

    Every rank of a replica gets the same ones. Ends when no full global batch is left. Where a mask says what is
    learned, each token of a step weighs the same: a loss_mask is then the micro-batch's share of the step's learned
    tokens x the number of micro-batches of all replicas (the mean over those is what the losses of a step are).
    """
    sampler = MicroBatchSampler(
        len(dataset),
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
        dp_rank=dp_rank,
        dp_size=dp_size,
        consumed_samples=consumed_samples,
    )
    # A loader draws its workers' seed from the global generator, which must not depend on when data is opened.
    generator = torch.Generator()
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=_stack, generator=generator)
    if not getattr(dataset, "masked", False):
        return iter(loader)
    return _weighted(loader, dataset, sampler, num_micro_batches * dp_size)


def _weighted(
    loader: DataLoader, dataset: Dataset, sampler: MicroBatchSampler, total: int
) -> Iterator[dict[str, Tensor]]:
    found = iter(loader)
    for start in sampler.starts:
        samples = range(start, start + sampler.global_batch_size)
        learned = max(1.0, sum(float(dataset[index]["loss_mask"].sum()) for index in samples))
        for _ in range(sampler.num_micro_batches):
            batch = next(found)
            mask = batch["loss_mask"]
            yield {**batch, "loss_mask": mask * (mask.sum() * total / learned)}


def _stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in BATCH_KEYS}


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch where it is used. A GPU copies it when it comes to it, and the host does not wait: from pinned memory,
    which is used again when it is done (torch's allocator knows), so that the next batch is made meanwhile."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


def windows(
    prefixes: list[str], seq_length: int, batch_size: int, max_tokens: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens [B, S+1] int64 and which predictions count, bool [B, S]: the datasets one after the other, cut into
    windows that share no token; the rest is dropped.

    A window predicts `seq_length` tokens; at most `max_tokens` are predicted (0: all), yet at least one window comes.
    The last batch may be smaller. Where no dataset fills a window, the longest one is a single shorter row.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    for dataset, count, length in _plan(prefixes, seq_length, max_tokens):
        mask = open_mask(dataset.path_prefix)
        for index in range(count):
            tokens = torch.from_numpy(read_tokens(dataset, index * length, length))
            rows.append((tokens, read_learned(mask, index * length + 1, length - 1)))
            if len(rows) == batch_size:
                yield _stacked(rows)
                rows = []
    if rows:
        yield _stacked(rows)


def _stacked(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    tokens, learned = zip(*rows, strict=True)
    return torch.stack(tokens), torch.stack(learned)


def read_learned(mask: IndexedDataset | None, start: int, count: int) -> Tensor:
    """[count] bool, from token `start` on: which tokens a mask (None: there is none) says are learned."""
    if mask is None:
        return torch.ones(count, dtype=torch.bool)
    return torch.from_numpy(read_tokens(mask, start, count)).bool()


def num_windows(prefixes: list[str], seq_length: int, max_tokens: int = 0) -> int:
    """How many rows `windows` gives."""
    return sum(count for _, count, _ in _plan(prefixes, seq_length, max_tokens))


def _plan(prefixes: list[str], seq_length: int, max_tokens: int) -> list[tuple[IndexedDataset, int, int]]:
    """(dataset, number of windows, tokens of each). Raises `UserError` when there is nothing to predict."""
    datasets = [open_tokens(prefix) for prefix in prefixes]
    left = max(1, max_tokens // seq_length) if max_tokens else None
    plan = []
    for dataset in datasets:
        count = num_tokens(dataset) // (seq_length + 1)
        if left is not None:
            count = min(count, left)
            left -= count
        if count:
            plan.append((dataset, count, seq_length + 1))
    if plan:
        return plan
    longest = max(datasets, key=num_tokens)
    if num_tokens(longest) < 2:
        raise UserError(f"'{longest.path_prefix}': {num_tokens(longest)} token, a prediction needs 2")
    return [(longest, 1, num_tokens(longest))]
