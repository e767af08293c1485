"""A small trained-for-nothing model with a tokenizer, and text, made once."""

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from ee_scale.data.builtin import llama_config, train_tokenizer

WORDS = [
    "a",
    "layer",
    "reads",
    "the",
    "hidden",
    "state",
    "of",
    "one",
    "token",
    "and",
    "an",
    "exit",
    "says",
    "what",
    "comes",
    "next",
    "if",
    "it",
    "is",
    "sure",
    "of",
    "it",
]


def _text(seed: int, sentences: int) -> str:
    pick = random.Random(seed)
    return "\n".join(" ".join(pick.choices(WORDS, k=12)) + "." for _ in range(sentences))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A text file of some 20,000 tokens."""
    path = tmp_path_factory.mktemp("corpus") / "train.txt"
    path.write_text(_text(0, 1500))
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, corpus) -> Path:
    """A random 4-layer Llama with 4 heads and 2 KV heads; vocabulary of 301 (odd, so that tp=2 pads)."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([corpus.read_text()], 301)
    torch.manual_seed(0)
    config = llama_config(tokenizer, layers=4, hidden=128, max_positions=64)
    config.vocab_size = 301
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tune_arguments(model_dir, corpus, tmp_path_factory) -> list[str]:
    """A short run: 8 steps, two exits of which one needs two stages at pp=2."""
    return [
        "tune",
        f"model={model_dir}",
        f"data={corpus}",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "data.seq_length=32",
        "exits.layers=[1,3]",
        "exits.rank=4",
        "train.steps=8",
        "train.micro_batch_size=2",
        "train.global_batch_size=8",
        "train.save_every=3",
        "optim.lr=1e-3",
        "logging.every=1",
        "parallel.device=cpu",
    ]


@pytest.fixture(scope="session")
def finished_run(tune_arguments, tmp_path_factory) -> Path:
    """The output folder of that run, on one process."""
    from helpers.cli import run_cli

    folder = tmp_path_factory.mktemp("run")
    finished = run_cli([*tune_arguments, "out=run"], folder)
    assert finished.code == 0, finished.output
    return folder / "run"
