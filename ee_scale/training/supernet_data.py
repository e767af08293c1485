"""The data of a supernet run: text for a causal LM, labelled texts for a classifier."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ee_scale.config.supernet import SupernetConfig
from ee_scale.data.dataset import check_tokens
from ee_scale.data.epochs import Epochs
from ee_scale.data.inputs import check_run_text, data_identity, load_tokenizer, run_dataset, run_prefixes, sources
from ee_scale.data.labelled import (
    Example,
    LabelledData,
    check_labels,
    encode,
    label_names,
    labelled_batches,
    read_labelled,
)
from ee_scale.data.loader import MicroBatchSampler, batches
from ee_scale.data.provenance import SOURCES, TextSource, licenses_of, text_sources
from ee_scale.data.text import prepare_text
from ee_scale.errors import UserError
from ee_scale.grid import Grid
from ee_scale.planning.supernet import SupernetPlan


def read_labels(config: SupernetConfig) -> list[str]:
    """The classes of labelled data. Raises `UserError`."""
    (path,) = _one_file(config.data.path, "data.path")
    labels = label_names(_examples(path, config))
    if len(labels) < 2:
        raise UserError(f"data.path={path}: one class ({labels[0]}); a classifier needs two")
    if config.data.valid is not None:
        (valid,) = _one_file(config.data.valid, "data.valid")
        check_labels(labels, _examples(valid, config, "data.valid"), valid, "data.valid")
    return labels


def _one_file(path: str | Sequence[str], name: str) -> list[str]:
    found = sources(path)
    if len(found) != 1:
        raise UserError(f"{name}={found}: labelled data is one file")
    return found


def _examples(path: str, config: SupernetConfig, fields: str = "data") -> list[Example]:
    data = config.data
    return read_labelled(path, data.text_key, data.label_key, data.pair_key, fields, data.errors)


def prepare_data(plan: SupernetPlan, *, progress: bool) -> dict[str, Any]:
    """Tokenise what is not cached, check it against the model, and say which data it is. Raises `UserError`."""
    tokenizer, config = load_tokenizer(plan.model_dir), plan.config
    vocab_size, names = plan.map.config.vocab_size, sources(config.data.path)
    licenses = licenses_of(names, config.data.licenses)
    valid = [] if config.data.valid is None else sources(config.data.valid)  # better missing now than in the palette
    if plan.task == "classify":
        for path, fields in [*((path, "data.valid") for path in valid), (names[0], "data")]:
            found = encode_labelled(plan, _examples(path, config, fields), tokenizer, fields)
        source = TextSource(names[0], found.digest, len(found), len(found.tokens), licenses[0])
        return {**data_identity([found.digest], tokenizer), SOURCES: [asdict(source)]}
    if valid:
        given = (tokenizer, plan.model_dir, config.data.cache_dir, config.data.text_key, progress)
        prefixes = prepare_text(valid, *given, fields="data.valid", errors=config.data.errors)
        check_tokens(prefixes, vocab_size, 1, names=valid, fields="data.valid", tokenizer=tokenizer)
    identity = check_run_text(config.data, plan.model_dir, vocab_size, progress=progress)
    told = text_sources(names, run_prefixes(config.data, plan.model_dir), identity["tokens"], licenses)
    return {**identity, SOURCES: [asdict(source) for source in told]}


def encode_labelled(
    plan: SupernetPlan, examples: list[Example], tokenizer: PreTrainedTokenizerBase, fields: str = "data"
) -> LabelledData:
    """Token ids of examples that the model has rows for. Raises `UserError`."""
    config = plan.map.config
    return encode(examples, tokenizer, plan.labels, plan.config.data.seq_length, config.vocab_size, fields)


class Data:
    """The run's training data, for steps and for measuring importance."""

    def __init__(self, plan: SupernetPlan, grid: Grid):
        self.plan, self.grid, config = plan, grid, plan.config
        if plan.task == "classify":
            examples = _examples(sources(config.data.path)[0], config)
            self.data: LabelledData | Epochs = encode_labelled(plan, examples, load_tokenizer(plan.model_dir))
            return
        samples = plan.total_steps * config.train.global_batch_size
        self.data = run_dataset(config.data, plan.model_dir, plan.map.config.vocab_size, samples)

    def micro_batches(self, consumed_samples: int) -> Iterator[dict[str, torch.Tensor]]:
        """This replica's micro-batches after so many samples; 'sample' [B] says which texts they are."""
        config, grid = self.plan.config, self.grid
        common = {
            "micro_batch_size": config.train.micro_batch_size,
            "num_micro_batches": self.plan.num_micro_batches,
            "dp_rank": grid.dp_rank,
            "dp_size": grid.layout.dp,
            "consumed_samples": consumed_samples,
        }
        if isinstance(self.data, LabelledData):
            return labelled_batches(self.data, seed=config.data.seed, **common)
        numbers = MicroBatchSampler(len(self.data), **common)
        found = batches(self.data, num_workers=config.data.num_workers, **common)
        return ({**batch, "sample": self.data.sequences(mine)} for batch, mine in zip(found, numbers, strict=True))

    def sample(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        """The first sequences of the run in batches, the same on every rank."""
        size = min(self.plan.config.importance.batch_size, count, len(self.data))
        one = {"micro_batch_size": size, "num_micro_batches": 1, "dp_rank": 0, "dp_size": 1}
        seed = self.plan.config.data.seed
        found = (
            labelled_batches(self.data, seed=seed, **one)
            if isinstance(self.data, LabelledData)
            else batches(self.data, **one)
        )
        return islice(found, max(1, count // size))
