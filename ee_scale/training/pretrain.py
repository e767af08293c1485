"""Train a small model from scratch for a given time: the demo's backbone, nothing more."""

import time
from collections.abc import Callable, Iterator
from math import cos, pi

import torch
from transformers import PreTrainedModel


def pretrain(
    model: PreTrainedModel,
    batches: Iterator[dict[str, torch.Tensor]],
    seconds: float,
    report: Callable[[float, float], None],
    *,
    lr: float = 3e-3,
) -> float:
    """AdamW under bf16 autocast with a learning rate that reaches zero when the time is up.

    `batches` yields tokens and labels [B, S]; `report` is told (share of the time, loss). Returns the last loss,
    smoothed.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    started, smooth, share = time.perf_counter(), float("nan"), 0.0
    for batch in batches:
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
        smooth = loss.item() if smooth != smooth else 0.95 * smooth + 0.05 * loss.item()
        report(share, smooth)
    model.eval()
    return smooth
