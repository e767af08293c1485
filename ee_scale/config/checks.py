"""Checks between the fields of a config, with the numbers in the message. Pure: no torch, no files."""

from typing import Any

from ee_scale.errors import UserError


def check_tune(config: Any) -> None:
    """Refuse a tune config that cannot run on any model. Raises `UserError`."""
    _at_least(1, config, "parallel.tp", "parallel.pp", "parallel.dp", "exits.rank", "exits.loss_chunk_tokens")
    _at_least(1, config, "train.steps", "train.micro_batch_size", "train.global_batch_size", "train.save_every")
    _at_least(1, config, "train.keep", "logging.every", "data.seq_length")
    _at_least(0, config, "optim.lr", "optim.min_lr", "optim.clip_grad", "optim.weight_decay", "exits.kl_weight")
    _at_least(0, config, "exits.loss_weight_warmup_steps", "data.num_workers")
    check_batch(config.train.global_batch_size, config.train.micro_batch_size, config.parallel.dp)
    if config.train.zero != 1:
        raise UserError(
            f"train.zero={config.train.zero}: exits train under ZeRO-1 (DeepSpeed's pipeline engine refuses ZeRO-2 "
            "and ZeRO-3); use train.zero=1"
        )
    if config.optim.min_lr > config.optim.lr:
        raise UserError(f"optim.min_lr={config.optim.min_lr} is above optim.lr={config.optim.lr}")
    if not 0 <= config.optim.warmup_fraction < 1:
        raise UserError(f"optim.warmup_fraction={config.optim.warmup_fraction}: must be in [0, 1)")
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise UserError(f"optim.betas={list(config.optim.betas)}: two numbers in [0, 1)")
    if config.exits.kl_temperature <= 0:
        raise UserError(f"exits.kl_temperature={config.exits.kl_temperature}: must be above 0")


def check_batch(global_batch_size: int, micro_batch_size: int, dp: int) -> int:
    """Micro-batches per step and rank. Raises `UserError` if the sizes do not divide."""
    if global_batch_size % (micro_batch_size * dp):
        raise UserError(
            f"train.global_batch_size={global_batch_size} is not a multiple of "
            f"train.micro_batch_size x parallel.dp = {micro_batch_size} x {dp}"
        )
    return global_batch_size // (micro_batch_size * dp)


def _at_least(smallest: float, config: Any, *keys: str) -> None:
    for key in keys:
        group, name = key.split(".")
        if config[group][name] < smallest:
            raise UserError(f"{key}={config[group][name]}: must be at least {smallest}")
