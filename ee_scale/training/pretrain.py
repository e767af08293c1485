"""Train a small model from scratch for a given time: the demo's backbone where no real one is installed."""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from math import cos, pi
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from ee_scale.data.builtin import llama_config, made_of, train_tokenizer
from ee_scale.data.corpora import open_source, python_documents
from ee_scale.data.dataset import build_gpt_dataset
from ee_scale.data.loader import batches
from ee_scale.data.text import prepare_text
from ee_scale.files import published

LAYERS, HIDDEN, VOCAB, SEQ_LENGTH, BATCH = 12, 128, 1024, 256, 4


def trained_llama(cache: Path, minutes: float, report: Callable[[float], None]) -> Path:
    """Folder of a small Llama trained on Python's documentation and library; trained once, then cached in `cache`.

    `report` is told the share of the time while it trains.
    """
    text = open_source("python", "text").identity
    folder = cache / "models" / f"demo-{LAYERS}x{HIDDEN}-{minutes:g}min-{made_of(VOCAB, SEQ_LENGTH, BATCH, text)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer((text for _, text in islice(python_documents(), 300)), VOCAB)
    prefixes = prepare_text(["python"], tokenizer, folder, cache / "data", "text", True)
    ids = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    dataset = build_gpt_dataset(prefixes, None, SEQ_LENGTH, 20_000, 0, *ids, len(tokenizer), cache / "data")
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(tokenizer, layers=LAYERS, hidden=HIDDEN, max_positions=2 * SEQ_LENGTH))
    data = batches(dataset, micro_batch_size=BATCH, num_micro_batches=1, dp_rank=0, dp_size=1)
    pretrain(model, data, 60 * minutes, report)
    with published(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def pretrain(
    model: PreTrainedModel,
    data: Iterator[dict[str, torch.Tensor]],
    seconds: float,
    report: Callable[[float], None],
    *,
    lr: float = 3e-3,
) -> None:
    """AdamW under bf16 autocast with a learning rate that reaches zero when the time is up.

    `data` yields tokens and labels [B, S]; `report` is told the share of the time.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    started = time.perf_counter()
    for batch in data:
        share = (time.perf_counter() - started) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, share / 0.05) * 0.5 * (1 + cos(pi * share))
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            logits = model(batch["tokens"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(share)
    model.eval()
