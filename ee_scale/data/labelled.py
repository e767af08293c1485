"""Labelled text for classification: files to examples, examples to token ids, ids to batches that no grid changes."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ee_scale.data.encode import token_with_row, without_row
from ee_scale.data.folders import bad_bytes, setting_name
from ee_scale.data.readers import KINDS, RECORDS, file_kind, read_records, whole_characters
from ee_scale.data.utf8 import BadBytes
from ee_scale.errors import UserError

LABELLED_SUFFIXES = tuple(suffix for suffix, kind in KINDS.items() if kind in RECORDS)
# Batch lengths are multiples of this: fewer shapes, and matrix sizes that kernels like.
LENGTH_STEP = 8
ENCODE_AT_ONCE = 1024
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True)
class Example:
    """One text, or a pair of them that is judged together, and its class."""

    text: str
    pair: str | None
    label: str


def read_labelled(
    path: Path | str,
    text_key: str = "text",
    label_key: str = "label",
    pair_key: str | None = None,
    fields: str = "data",
    errors: str = "strict",
) -> list[Example]:
    """The examples of a file of records (`.csv` and `.tsv` with a header line, `.parquet`), in the file's order.

    A label is a string, or in JSON also an integer or a bool, which is kept as JSON writes it ('3', 'true'); white
    space around it does not count. A quote in a `.tsv` is a character like any other, as in the files of GLUE.
    `pair_key` names the second text of tasks on two. Blank lines are skipped. Raises `UserError` naming file, line and
    field; `fields` is the config group it names.
    """
    path = Path(path).expanduser()
    here = f"{setting_name(fields, 'path')}='{path}'"
    kind, bad = _kind(path, here), bad_bytes(fields, errors)
    keys = {"text_key": text_key, "pair_key": pair_key, "label_key": label_key}
    examples = []
    for found in read_records(path, kind, here, bad):
        row, place = found.record, f"{here} {found.place}"
        for setting, key in keys.items():
            if key is not None and key not in row:
                names = ", ".join(sorted(row)[:12])
                name = setting_name(fields, setting)
                raise UserError(f"{place}: no field '{key}' (fields: {names}); set {name}")
        examples.append(_example(row, text_key, label_key, pair_key, place, bad))
    if not examples:
        raise UserError(f"{here}: no example in it")
    return examples


def _kind(path: Path, here: str) -> str:
    """What the file is read as. Raises `UserError`."""
    if path.is_dir():
        raise UserError(f"{here}: cannot read a folder; labelled data is one file")
    if not path.exists():
        raise UserError(f"{here}: no such file")
    if (kind := file_kind(path, here)) not in RECORDS:
        raise UserError(f"{here}: labelled text is a {', '.join(LABELLED_SUFFIXES)} file, this one is '{path.suffix}'")
    return kind


def _example(
    row: dict[str, Any], text_key: str, label_key: str, pair_key: str | None, here: str, bad: BadBytes
) -> Example:
    pair = None if pair_key is None else _text(row[pair_key], pair_key, here, bad)
    label = row[label_key]
    if not isinstance(label, str | int):
        kind = type(label).__name__
        raise UserError(f"{here}: field '{label_key}' is not a string, an integer or a bool but {kind}")
    label = (label if isinstance(label, str) else json.dumps(label)).strip()
    if not label:
        raise UserError(f"{here}: field '{label_key}' is empty")
    return Example(_text(row[text_key], text_key, here, bad), pair, label)


def _text(value: object, key: str, here: str, bad: BadBytes) -> str:
    if not isinstance(value, str):
        raise UserError(f"{here}: field '{key}' is not text but {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{here}: field '{key}' is empty")
    return whole_characters(bad.without_nul(value, f"{here}: field '{key}'"))


def label_names(examples: Iterable[Example]) -> list[str]:
    """The distinct labels: by number if all are integers, else by name. Class i of a model is the i-th of them."""
    names = sorted({example.label for example in examples})
    return sorted(names, key=int) if all(_INTEGER.fullmatch(name) for name in names) else names


def check_labels(labels: Sequence[str], examples: Iterable[Example], path: Path | str, fields: str = "data") -> None:
    """Refuse (`UserError`) fewer than two classes, and examples of the file `path` with a label not in `labels`.

    `labels` are those of the training data: check the training file itself first, then the files to evaluate on.
    """
    here = f"{setting_name(fields, 'path')}='{path}'"
    if len(labels) < 2:
        raise UserError(f"{here}: {len(labels)} class ({', '.join(labels)}), classification needs 2 or more")
    unknown = sorted({example.label for example in examples} - set(labels))
    if unknown:
        names = ", ".join(f"'{name}'" for name in unknown[:5])
        known = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
        raise UserError(f"{here}: label {names} is not in the training data ({len(labels)} classes: {known})")


@dataclass(frozen=True)
class LabelledData:
    """Token ids of examples, one after the other: example i is the tokens starts[i]:starts[i+1].

    `tokens` [N] int32, `token_types` [N] int8, `starts` [n+1] int64, `labels` [n] int64.
    """

    tokens: Tensor
    token_types: Tensor
    starts: Tensor
    labels: Tensor
    pad_id: int
    seq_length: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 of what a model sees."""
        found = hashlib.sha256(f"{self.pad_id} {self.seq_length}".encode())
        for tensor in (self.tokens, self.token_types, self.starts, self.labels):
            found.update(tensor.numpy().tobytes())
        return found.hexdigest()

    @property
    def lengths(self) -> Tensor:
        """[n] int64: tokens of each example, special ones included."""
        return self.starts.diff()

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """tokens, attention_mask and token_type_ids [B, S] int64, labels and sample [B] int64, padded on the right.

        S is the longest of the examples rounded up to a multiple of LENGTH_STEP, at most seq_length.
        """
        spans = [(int(self.starts[i]), int(self.starts[i + 1])) for i in indices]
        longest = max(end - start for start, end in spans)
        shape = (len(spans), min(self.seq_length, -(-longest // LENGTH_STEP) * LENGTH_STEP))
        tokens = torch.full(shape, self.pad_id, dtype=torch.int64)
        mask, types = torch.zeros_like(tokens), torch.zeros_like(tokens)
        for row, (start, end) in enumerate(spans):
            tokens[row, : end - start] = self.tokens[start:end]
            types[row, : end - start] = self.token_types[start:end]
            mask[row, : end - start] = 1
        sample = torch.tensor(indices, dtype=torch.int64)
        found = {"tokens": tokens, "attention_mask": mask, "token_type_ids": types}
        return {**found, "labels": self.labels[sample], "sample": sample}


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    seq_length: int,
    vocab_size: int | None = None,
    fields: str = "data",
) -> LabelledData:
    """Token ids as the model's own tokenizer makes them: special tokens, token types, cut to `seq_length`.

    Of a pair the longer text is cut first. Token types are 0 where the tokenizer makes none. Every label must be in
    `labels` (see `check_labels`). Raises `UserError` for a tokenizer that cannot pad, a `seq_length` without room, and
    a text with a token that a model of `vocab_size` rows does not have.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer of {tokenizer.name_or_path or 'the model'}: no pad_token; batches need one")
    special = tokenizer.num_special_tokens_to_add(pair=any(example.pair is not None for example in examples))
    if seq_length <= special:
        name = setting_name(fields, "seq_length")
        raise UserError(f"{name}={seq_length}: the tokenizer adds {special} special tokens, no room for text")
    numbers = {name: number for number, name in enumerate(labels)}
    tokens, types, lengths = [], [], [0]
    rows_of_model = len(tokenizer) if vocab_size is None else vocab_size
    for first in range(0, len(examples), ENCODE_AT_ONCE):
        rows = _encoded(examples[first : first + ENCODE_AT_ONCE], tokenizer, seq_length)
        tokens.append(torch.tensor([token for ids, _ in rows for token in ids], dtype=torch.int32))
        types.append(torch.tensor([kind for _, kinds in rows for kind in kinds], dtype=torch.int8))
        lengths += [len(ids) for ids, _ in rows]
        if (largest := int(tokens[-1].max())) >= rows_of_model:
            raise UserError(f"{setting_name(fields, 'path')}: {without_row(tokenizer, largest, rows_of_model)}")
    return LabelledData(
        tokens=torch.cat(tokens),
        token_types=torch.cat(types),
        starts=torch.tensor(lengths).cumsum(0),
        labels=torch.tensor([numbers[example.label] for example in examples]),
        pad_id=token_with_row(rows_of_model, tokenizer.pad_token_id, tokenizer.eos_token_id),
        seq_length=seq_length,
    )


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, seq_length: int
) -> list[tuple[list[int], list[int]]]:
    """(ids, token types) of each example."""
    texts = [example.text for example in examples]
    pairs = [example.pair for example in examples] if examples[0].pair is not None else None
    found = tokenizer(texts, pairs, truncation=True, max_length=seq_length, return_attention_mask=False)
    ids = found["input_ids"]
    for example, row in zip(examples, ids, strict=True):
        if not row:  # attention over nothing is not a number
            raise UserError(f"text {example.text[:40]!r}: the tokenizer makes no token of it")
    return list(zip(ids, found.get("token_type_ids") or [[0] * len(row) for row in ids], strict=True))


def labelled_batches(
    data: LabelledData,
    *,
    micro_batch_size: int,
    num_micro_batches: int,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int = 0,
    seed: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of one replica without end, as `LabelledData.batch` makes them; every rank of a replica gets these.

    The order is a shuffle per epoch that depends on (seed, epoch) alone; epochs are joined and nothing is dropped. With
    b = micro_batch_size, M = num_micro_batches, D = dp_size and G = b * M * D, step t covers the samples
    [consumed + t*G, consumed + (t+1)*G) of it, and micro-batch m of replica d starts (m*D + d)*b into them. So the m-th
    micro-batches of all replicas are together the m-th one of a single replica with micro_batch_size b * D: whatever
    is drawn per micro-batch (a subnet) meets the same samples on every grid. `consumed_samples`, any count from 0 on,
    goes on where another run stopped, also at another dp, micro_batch_size or num_micro_batches.
    """
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank={dp_rank} is not in [0, dp_size={dp_size})")
    if min(micro_batch_size, num_micro_batches) < 1 or consumed_samples < 0:
        counts = f"micro_batch_size={micro_batch_size}, num_micro_batches={num_micro_batches}"
        raise ValueError(f"{counts} and consumed_samples={consumed_samples} must be at least 1, 1 and 0")
    return _deal(data, micro_batch_size, dp_rank, dp_size, consumed_samples, seed)


def _deal(data: LabelledData, size: int, dp_rank: int, dp_size: int, start: int, seed: int) -> Iterator:
    @lru_cache(maxsize=2)  # a micro-batch may reach into the next epoch
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(data))

    # (m*D + d)*b into step t is (d + D * (t*M + m)) * b from the start: steps need no loop of their own.
    first = start + dp_rank * size
    while True:
        places = (divmod(place, len(data)) for place in range(first, first + size))
        yield data.batch([int(order(epoch)[index]) for epoch, index in places])
        first += size * dp_size


def evaluation_batches(data: LabelledData, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Every example once, the longest first (little padding, and memory runs out at once or not at all).

    Examples of one length stay in order; the last batch may be smaller.
    """
    order = data.lengths.argsort(descending=True, stable=True).tolist()
    for first in range(0, len(order), batch_size):
        yield data.batch(order[first : first + batch_size])
