"""GPT datasets: Megatron's own, with an index that survives kills and an order that no grid changes."""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import get_bin_path, get_idx_path
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ee_scale.data.corpora import num_tokens, open_tokens, read_tokens
from ee_scale.data.encode import without_row
from ee_scale.data.folders import setting_name
from ee_scale.data.text import cache_root
from ee_scale.errors import UserError
from ee_scale.files import published

SCAN_TOKENS = 1 << 22
NO_PAD = -1


def check_tokens(
    prefixes: list[str],
    vocab_size: int,
    seq_length: int,
    *,
    names: list[str] | None = None,
    fields: str = "data",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """Refuse (`UserError`) a dataset too short for one sequence, or with an id outside the model's vocabulary.

    Reads every token once, in chunks: one rank is enough. `names` are what a person called the prefixes; `tokenizer`
    made those that are no prefixes themselves. Returns a SHA-256 per dataset, of its tokens and documents.
    """
    digests = []
    for prefix, name in zip(prefixes, names or prefixes, strict=True):
        here = f"{setting_name(fields, 'path')}='{name}'"
        dataset = open_tokens(prefix, name, fields)
        total = num_tokens(dataset)
        if total < seq_length + 1:
            needed = f"{setting_name(fields, 'seq_length')} + 1 = {seq_length + 1}"
            raise UserError(f"{here}: {total} tokens, one sequence needs {needed}")
        digest = hashlib.sha256(dataset.sequence_lengths.tobytes() + dataset.document_indices.tobytes())
        for start in range(0, total, SCAN_TOKENS):
            ids = read_tokens(dataset, start, min(SCAN_TOKENS, total - start))
            digest.update(ids.astype("<i4").tobytes())
            bad = ids[(ids >= vocab_size) | (ids < 0)]
            if bad.size and tokenizer is not None and name != prefix:
                raise UserError(f"{here}: {without_row(tokenizer, int(bad[0]), vocab_size)}")
            if bad.size:
                raise UserError(
                    f"{here}: token id {bad[0]} is outside the model's vocabulary of {vocab_size}; "
                    "was it tokenised for another model?"
                )
        digests.append(digest.hexdigest())
    return digests


def build_gpt_dataset(
    prefixes: list[str],
    weights: list[float] | None,
    seq_length: int,
    num_samples: int,
    seed: int,
    eos_id: int,
    pad_id: int | None,
    vocab_size: int,
    cache_dir: Path | str | None,
    fields: str = "data",
) -> Dataset:
    """At least `num_samples` shuffled sequences, in as many epochs as they need.

    An item is a dict of tokens, labels, position_ids ([S] int64) and loss_mask ([S] float32, 0 where the label is
    `pad_id`). The order depends on data, weights, seq_length, num_samples and seed alone; another `num_samples` is
    another order. `weights=None` draws by number of tokens. With torch.distributed initialised every rank must call
    this, on a shared file system. Raises `UserError` for bad weights.
    """
    weights = checked_weights(prefixes, weights, fields)
    prefixes = [os.path.abspath(prefix) for prefix in prefixes]
    identity = [weights, seq_length, num_samples, seed, eos_id, vocab_size]
    folder = _index_folder(prefixes, identity, cache_root(cache_dir, fields))
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=(prefixes, weights),
        split="1,0,0",
        tokenizer=_SpecialTokens(eod=eos_id, vocab_size=vocab_size),
        mid_level_dataset_surplus=_surplus(weights, num_samples),
        path_to_cache=str(folder),
        create_attention_mask=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    with _quiet("megatron.core.datasets"):
        _publish_index(config, num_samples, folder)
        return _Sequences(_build(config, num_samples, folder), pad_id if pad_id != eos_id else None)


def _index_folder(prefixes: list[str], identity: list[Any], root: Path) -> Path:
    files = [_fingerprint(prefix) for prefix in prefixes]
    # A blend built without torch.distributed leaves its top-level index out of the folder (see _Builder).
    content = json.dumps([files, identity, torch.distributed.is_initialized()])
    return root / f"index-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def _publish_index(config: GPTDatasetConfig, num_samples: int, folder: Path) -> None:
    """Rank 0 builds a missing index and renames it into place: Megatron takes half-written ones for whole."""
    if _rank() == 0 and not folder.is_dir():
        with published(folder) as temporary:
            _build(config, num_samples, temporary, only_rank_0=True)
    else:
        _build(config, num_samples, folder, only_rank_0=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _build(config: GPTDatasetConfig, num_samples: int, folder: Path, only_rank_0: bool = False) -> Dataset | None:
    config = copy.copy(config)
    config.path_to_cache = str(folder)
    on_this_rank = (lambda: _rank() == 0) if only_rank_0 else (lambda: True)
    return _Builder(GPTDataset, [num_samples, 0, 0], on_this_rank, config).build()[0]


class _Builder(BlendedMegatronDatasetBuilder):
    """Megatron's builder, which can also blend in a process without torch.distributed."""

    @staticmethod
    def build_generic_dataset(
        cls: type, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> Any:
        """BlendedDataset asks for its rank before it writes its index; without a cache folder it does not ask."""
        if cls is BlendedDataset and not torch.distributed.is_initialized():
            *args, config = args
            config = copy.copy(config)
            config.path_to_cache = None
            args = [*args, config]
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)


@dataclass(frozen=True)
class _SpecialTokens:
    """The part of a tokenizer that Megatron's datasets look at."""

    eod: int
    vocab_size: int
    # With a real pad id GPTDataset writes 0 over those tokens and keeps the first sample's loss mask for all others.
    pad: int = NO_PAD

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"class": "ee_scale", "eod": self.eod, "vocab_size": self.vocab_size}


class _Sequences(Dataset):
    """The items of a Megatron dataset, with padding masked out of the loss."""

    def __init__(self, dataset: Dataset, pad_id: int | None) -> None:
        self.dataset = dataset
        self.pad_id = NO_PAD if pad_id is None else pad_id

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.dataset[index]
        loss_mask = (item["labels"] != self.pad_id).float()
        return {**{key: item[key] for key in ("tokens", "labels", "position_ids")}, "loss_mask": loss_mask}


def checked_weights(prefixes: list[str], weights: list[float] | None, fields: str) -> list[float] | None:
    """One weight per prefix (None for a single one: there is nothing to blend). Raises `UserError`."""
    if weights is not None:
        here = f"{setting_name(fields, 'weights')}={list(weights)}"
        if len(weights) != len(prefixes):
            raise UserError(f"{here}: {len(weights)} weights for {len(prefixes)} paths")
        if not all(0 < weight < float("inf") for weight in weights):
            raise UserError(f"{here}: every weight must be larger than 0")
    if len(prefixes) == 1:
        return None
    if weights is None:
        # Megatron's own rule for a missing weight ends the data after one epoch.
        return [float(num_tokens(open_tokens(prefix, fields=fields))) for prefix in prefixes]
    return [float(weight) for weight in weights]


def _surplus(weights: list[float] | None, num_samples: int) -> float:
    """Spare samples per blended dataset, as a share: Megatron's 0.5% is too little for short runs of many datasets."""
    if weights is None:
        return 0.0
    smallest = num_samples * min(weights) / sum(weights)
    return 0.005 + len(weights) / num_samples + 1 / max(1.0, smallest)


def _fingerprint(prefix: str) -> list[Any]:
    """Changes when the files do: Megatron's own index cache knows a dataset by its path alone."""
    stats = [os.stat(path(prefix)) for path in (get_bin_path, get_idx_path)]
    return [prefix, *[[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for stat in stats]]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Megatron warns about a cache folder that is left out on purpose."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
