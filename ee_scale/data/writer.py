"""Ids of documents into a Megatron dataset, and beside it the mask of what is learned."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path
from transformers import PreTrainedTokenizerBase

from ee_scale.data.chat import Rendered
from ee_scale.data.corpora import mask_prefix
from ee_scale.data.encode import Ids

# Prefixes in a folder. The second's tokens are worth nothing without their mask, which its name says.
TOKENS, MASKED = "tokens", "masked"


class Writer:
    """One sequence per document: TOKENS, or MASKED where there are conversations."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder = folder
        self.end_mark = np.array([tokenizer.eos_token_id])
        largest = max(len(tokenizer) - 1, tokenizer.eos_token_id, *tokenizer.get_vocab().values())
        self.tokens = IndexedDatasetBuilder(str(folder / f"{TOKENS}.bin"), dtype=DType.optimal_dtype(largest + 1))
        self.mask: IndexedDatasetBuilder | None = None  # made for the first conversation
        self.num_documents = self.num_empty = self.num_tokens = self.num_learned = 0
        self.waiting: list[np.ndarray] = []  # white space, as long as nothing else came
        self.lengths: list[int] = []

    def add(self, part: Ids) -> None:
        """Append ids of a text, which are all learned; it may go on in the next call."""
        self.waiting.append(part.ids)
        if self.lengths or not part.blank:
            for ids in self.waiting:
                self._append(ids)
            self.waiting = []
        if part.last:
            self.waiting = []
            if self.lengths:
                self._append(self.end_mark)
            self._end_document()

    def add_conversation(self, documents: list[Rendered]) -> None:
        """Append the documents of a conversation; none: it was empty."""
        if documents and self.mask is None:
            self.mask = IndexedDatasetBuilder(get_bin_path(mask_prefix(str(self.folder / MASKED))), dtype=np.uint8)
            for length in self.tokens.sequence_lengths:
                self.mask.add_item(torch.ones(length, dtype=torch.uint8))
            self.mask.document_indices = list(self.tokens.document_indices)
        for document in documents:
            self._append(document.ids, document.learned)
            self._end_document()
        self.num_empty += not documents

    def finish(self) -> str:
        """Write the indices. Returns the name of the prefix in the folder."""
        self.tokens.finalize(str(self.folder / f"{TOKENS}.idx"))
        if self.mask is None:
            return TOKENS
        self.mask.finalize(get_idx_path(mask_prefix(str(self.folder / MASKED))))
        for end in (".bin", ".idx"):
            (self.folder / f"{TOKENS}{end}").rename(self.folder / f"{MASKED}{end}")
        return MASKED

    def told(self) -> Iterator[str]:
        """What was written, in words."""
        skipped = f" ({self.num_empty} empty documents skipped)" if self.num_empty else ""
        yield f"{self.num_documents} documents, {self.num_tokens} tokens{skipped}"
        if self.mask is not None:
            yield f"{self.num_learned} of them learned: of conversations the assistant's alone"

    def _append(self, ids: np.ndarray, learned: np.ndarray | None = None) -> None:
        if len(ids):
            self.tokens.add_item(torch.from_numpy(ids))
            learned = np.ones(len(ids), bool) if learned is None else learned
            if self.mask is not None:
                self.mask.add_item(torch.from_numpy(learned.astype(np.uint8)))
            self.lengths.append(len(ids))
            self.num_learned += int(learned.sum())

    def _end_document(self) -> None:
        if not self.lengths:
            self.num_empty += 1
            return
        total = sum(self.lengths)
        for builder in (self.tokens, *([] if self.mask is None else [self.mask])):
            if total <= np.iinfo(np.int32).max:
                # GPTDataset shuffles sequences: a document in pieces would come out as pieces of many documents.
                builder.sequence_lengths[-len(self.lengths) :] = [total]
            builder.end_document()
        self.num_documents += 1
        self.num_tokens += total
        self.lengths = []
