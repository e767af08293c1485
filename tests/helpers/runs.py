"""Fixtures for all tests: a small trained-for-nothing model with a tokenizer, text, and runs on them, made once."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

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


# -- supernets ---------------------------------------------------------------------------------------------------------

TOPICS = {"sea": ["wave", "ship", "salt", "gull"], "hill": ["rock", "goat", "snow", "path"], "town": ["tram", "shop"]}
STAGES = "stages=[{name: teacher, axes: [], steps: %d, lr: %g, rank: %d}, {name: width, axes: [hidden, ffn], steps: %d, lr: %g, rank: %d}, {name: both, axes: [hidden, heads, ffn, depth], steps: %d, lr: %g, rank: %d}]"  # noqa: E501


def recipe(steps: tuple[int, int, int], lr: float, rank: int) -> str:
    """The override for three stages: the full net, narrower ones, narrower and shallower ones."""
    return STAGES % tuple(value for count in steps for value in (count, lr, rank))


@pytest.fixture(scope="session")
def supernet_arguments(model_dir, corpus, tmp_path_factory) -> list[str]:
    """Ten steps in three stages (3, 3, 4) on text, with an early exit in the space."""
    folder = tmp_path_factory.mktemp("supernet-data")
    (folder / "valid.txt").write_text(_text(1, 60))
    return [
        "supernet",
        f"model={model_dir}",
        f"data={corpus}",
        f"data.valid={folder / 'valid.txt'}",
        f"data.cache_dir={folder}",
        "data.seq_length=16",
        "space={hidden: [1.0, 0.5], ffn: [1.0, 0.5], depth: [4, 2], exits: [1]}",
        "recipe=paper",  # full, smallest and random nets in every step
        recipe((3, 3, 4), 1e-2, 4),
        "importance={samples: 8, batch_size: 4}",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        "train.save_every=2",
        "train.keep=9",
        "optim.warmup_fraction=0",
        "logging.every=1",
        "parallel.device=cpu",
    ]


@pytest.fixture(scope="session")
def supernet_run(supernet_arguments, tmp_path_factory) -> Path:
    """The output folder of that run, on one process."""
    from helpers.cli import run_cli

    folder = tmp_path_factory.mktemp("supernet")
    finished = run_cli([*supernet_arguments, "out=run"], folder)
    assert finished.code == 0, finished.output
    return folder / "run"


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory) -> Path:
    """A random bare 4-layer BERT (no classifier) with the tokenizer of the words below."""
    folder = tmp_path_factory.mktemp("bert")
    words = sorted({*WORDS, *(word for topic in TOPICS.values() for word in topic)})
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    pieces = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    PreTrainedTokenizerFast(tokenizer_object=pieces, model_max_length=32, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(vocab), max_position_embeddings=32, initializer_range=0.1, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> dict[str, Path]:
    """Sentences whose class is the topic that two of their words belong to: 'train' and 'valid'."""
    folder, found = tmp_path_factory.mktemp("labelled"), {}
    for seed, (name, count) in enumerate({"train": 300, "valid": 90}.items()):
        pick, lines = random.Random(seed), []
        for i in range(count):
            topic = list(TOPICS)[i % 3]
            words = [*pick.choices(WORDS, k=pick.randint(3, 8)), *pick.choices(TOPICS[topic], k=2)]
            pick.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "label": topic}))
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("\n".join(lines) + "\n")
    return found


@pytest.fixture(scope="session")
def classify_arguments(bert_dir, labelled) -> list[str]:
    """160 steps in three stages on the labelled sentences."""
    return [
        "supernet",
        f"model={bert_dir}",
        f"data={labelled['train']}",
        f"data.valid={labelled['valid']}",
        "data.seq_length=24",
        "space={hidden: [1.0, 0.5], ffn: [1.0, 0.5], depth: [4, 2]}",
        "recipe=paper",
        recipe((60, 40, 60), 1e-2, 8),
        "importance={samples: 32, batch_size: 16}",
        "train.micro_batch_size=16",
        "train.global_batch_size=16",
        "logging.every=5",
        "parallel.device=cpu",
    ]


@pytest.fixture(scope="session")
def classify_run(classify_arguments, tmp_path_factory) -> Path:
    """The output folder of that run, on one process."""
    from helpers.cli import run_cli

    folder = tmp_path_factory.mktemp("classify")
    finished = run_cli([*classify_arguments, "out=run"], folder)
    assert finished.code == 0, finished.output
    return folder / "run"
