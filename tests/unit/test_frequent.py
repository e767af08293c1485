"""The tokens of a shortlist: the most frequent ones, special ones among them, in an order that no machine changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.chats import chat_tokenizer
from helpers.models import write_model
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from ee_scale.config.groups import DataConfig
from ee_scale.data import frequent, inputs
from ee_scale.data.frequent import count_tokens, frequent_tokens, most_frequent
from ee_scale.data.inputs import run_prefixes
from ee_scale.errors import UserError

VOCAB = 12


def write_tokens(prefix, counts: dict[int, int]) -> str:
    """A tokenised document that has each token so often."""
    ids = np.concatenate([np.full(count, token) for token, count in counts.items()])
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_item(torch.from_numpy(np.random.default_rng(0).permutation(ids)))
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_most_frequent_first_and_ties_by_id():
    found = most_frequent(np.array([0, 5, 2, 5, 0, 9, 2]), 4)
    assert found.ids == (5, 1, 3, 2)
    assert found.coverage == pytest.approx(21 / 23)
    assert found.distinct == 5


def test_special_tokens_take_the_place_of_the_rarest():
    counts = np.array([0, 5, 2, 5, 0, 9, 2])
    assert most_frequent(counts, 4, [6, 4]).ids == (5, 1, 6, 4)
    assert most_frequent(counts, 4, [5]).ids == (5, 1, 3, 2)
    assert most_frequent(counts, 2, [6, 4]).ids == (6, 4)


def test_too_few_different_tokens_are_filled_by_id_and_told():
    found = most_frequent(np.array([0, 0, 3, 0, 0, 1]), 4)
    assert found.ids == (2, 5, 0, 1)
    assert "only 2 occur in it, so the list is filled by id" in found.words(6)
    assert "4 of 6 tokens are 100.00% of the training data" in found.words(6)
    assert "filled" not in most_frequent(np.array([1, 2, 3]), 2).words(3)


def test_counts_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(frequent, "SCAN_TOKENS", 7)
    counts = {3: 20, 11: 1, 0: 5}
    assert count_tokens(write_tokens(tmp_path / "a", counts), VOCAB).tolist() == [
        counts.get(token, 0) for token in range(VOCAB)
    ]


@pytest.fixture
def model(monkeypatch):
    """A tokenizer with two special tokens, one of them without a row, and a model with two ends of text."""
    settings = SimpleNamespace(eos_token_id=[9, 10])
    for module in (frequent, inputs):
        monkeypatch.setattr(module, "load_tokenizer", lambda folder: SimpleNamespace(all_special_ids=[9, VOCAB]))
    monkeypatch.setattr(frequent, "ModelFolder", lambda f: SimpleNamespace(generation_config=lambda: settings))


MIXED = [(None, (1, 2, 9, 10)), ([1.0, 1.0], (1, 3, 9, 10)), ([1, 9], (3, 4, 9, 10))]


@pytest.mark.parametrize(("weights", "ids"), MIXED)
def test_as_the_weights_mix_the_data(model, tmp_path, weights, ids):
    """The second text is a tenth of the first, but half of what is trained on if the weights say so."""
    paths = [write_tokens(tmp_path / "a", {1: 60, 2: 40}), write_tokens(tmp_path / "b", {3: 5, 4: 4, 1: 1})]
    data = DataConfig(path=paths, weights=weights)
    assert frequent_tokens(data, tmp_path, VOCAB, 4).ids == ids


def test_special_tokens_need_room(model, tmp_path):
    data = DataConfig(path=write_tokens(tmp_path / "a", {1: 3}))
    assert frequent_tokens(data, tmp_path, VOCAB, 2).ids == (9, 10)
    with pytest.raises(UserError, match=r"exits.shortlist=1: the model has 2 special tokens, .*; give a larger one"):
        frequent_tokens(data, tmp_path, VOCAB, 1)


def test_bytes_that_are_no_text_are_those_of_the_run(tmp_path):
    """Counted are the tokens of `errors=replace`, which are not read a second time, strictly."""
    tokenizer = chat_tokenizer()
    write_model(tmp_path, "llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"the layer reads the token \xff " * 20)
    data = DataConfig(str(tmp_path / "text.txt"), errors="replace", cache_dir=str(tmp_path / "cache"))
    prefixes = run_prefixes(data, tmp_path)
    most = int(count_tokens(prefixes[0], len(tokenizer)).argmax())
    assert most in frequent_tokens(data, tmp_path, len(tokenizer), 8).ids
    assert len(list((tmp_path / "cache").glob("text-*"))) == 1
