"""The tokens that a shortlist head scores: the most frequent ones of the training data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.config.groups import DataConfig
from ee_scale.data.corpora import num_tokens, open_tokens, read_tokens
from ee_scale.data.dataset import SCAN_TOKENS, checked_weights
from ee_scale.data.inputs import load_tokenizer, run_prefixes
from ee_scale.errors import UserError


@dataclass(frozen=True)
class FrequentTokens:
    """Token ids, most frequent first (ties: smaller id first).

    Attributes:
        coverage: their share of the data; distinct: how many different tokens the data has.
    """

    ids: tuple[int, ...]
    coverage: float
    distinct: int

    def words(self, vocab_size: int) -> str:
        """What a person should know of them."""
        count = len(self.ids)
        rare = f"; only {self.distinct:,} occur in it, so the list is filled by id" if self.distinct < count else ""
        return (
            f"exits.shortlist={count}: {count:,} of {vocab_size:,} tokens are {self.coverage:.2%} of the training data"
            f"{rare}; labels outside are left out of the exits' loss"
        )


def count_tokens(prefix: str, vocab_size: int) -> np.ndarray:
    """How often each id occurs in tokenised data that was checked against the vocabulary, int64 [V]."""
    dataset, counts = open_tokens(prefix), np.zeros(vocab_size, np.int64)
    total = num_tokens(dataset)
    for start in range(0, total, SCAN_TOKENS):
        ids = read_tokens(dataset, start, min(SCAN_TOKENS, total - start))
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


def most_frequent(counts: np.ndarray, size: int, always: Sequence[int] = ()) -> FrequentTokens:
    """`size` ids by how often they occur, fp64 or int64 [V], those of `always` among them however rare they are."""
    order = np.lexsort((np.arange(len(counts)), -counts))
    forced = np.isin(order, np.array(sorted(set(always)), np.int64))
    room = np.cumsum(~forced) <= size - forced.sum()
    ids = order[forced | room]
    return FrequentTokens(tuple(ids.tolist()), float(counts[ids].sum() / counts.sum()), int((counts > 0).sum()))


def frequent_tokens(data: DataConfig, model_dir: Path, vocab_size: int, size: int) -> FrequentTokens:
    """Those of text that `check_run_text` has tokenised, as `data.weights` mix it; special tokens are always in it.

    Raises `UserError` if there are more special tokens than `size`.
    """
    tokenizer = load_tokenizer(model_dir)
    ends = ModelFolder(model_dir).generation_config().eos_token_id
    special = {*tokenizer.all_special_ids, *(ends if isinstance(ends, list) else [ends])}
    special = {token for token in special if token is not None and 0 <= token < vocab_size}
    if len(special) > size:
        raise UserError(
            f"exits.shortlist={size}: the model has {len(special)} special tokens, which a shortlist always holds; "
            "give a larger one"
        )
    prefixes = run_prefixes(data, model_dir)
    counts = [count_tokens(prefix, vocab_size) for prefix in prefixes]
    if data.weights and (weights := checked_weights(prefixes, list(data.weights), "data")) is not None:
        counts = [weight * own / own.sum() for weight, own in zip(weights, counts, strict=True)]
    return most_frequent(np.sum(counts, axis=0), size, sorted(special))
