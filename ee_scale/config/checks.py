"""Checks between the fields of a config, with the numbers in the message. Pure: no torch, no files."""

from typing import Any

from ee_scale.errors import UserError


def check_tune(config: Any) -> None:
    """Refuse a tune config that cannot run on any model. Raises `UserError`."""
    _at_least(1, config, "parallel.tp", "parallel.pp", "parallel.dp", "exits.rank", "exits.loss_chunk_tokens")
    _at_least(1, config, "train.steps", "train.micro_batch_size", "train.global_batch_size", "train.save_every")
    _at_least(1, config, "train.keep", "logging.every", "data.seq_length")
    _at_least(0, config, "optim.lr", "exits.kl_weight", "exits.loss_weight_warmup_steps", "data.num_workers")
    _check_run(config)
    _check_optim(config.optim)
    check_batch(config.train.global_batch_size, config.train.micro_batch_size, config.parallel.dp)
    if config.train.zero != 1:
        raise UserError(
            f"train.zero={config.train.zero}: exits train under ZeRO-1 (DeepSpeed's pipeline engine refuses ZeRO-2 "
            "and ZeRO-3); use train.zero=1"
        )
    if config.optim.min_lr > config.optim.lr:
        raise UserError(f"optim.min_lr={config.optim.min_lr} is above optim.lr={config.optim.lr}")
    _check_backbone(config)
    if config.exits.kl_temperature <= 0:
        raise UserError(f"exits.kl_temperature={config.exits.kl_temperature}: must be above 0")


def _check_backbone(config: Any) -> None:
    backbone = config.backbone
    _at_least(1, config, "backbone.rank")
    _at_least(0, config, "backbone.final_weight")
    if backbone.mode == "frozen":
        return
    if not backbone.targets or set(backbone.targets) - {"attention", "mlp"}:
        raise UserError(f"backbone.targets={list(backbone.targets)}: choose of attention and mlp")
    if config.exits.kl_weight > 0:
        raise UserError(
            f"exits.kl_weight={config.exits.kl_weight} with backbone.mode={backbone.mode}: exits can learn from the "
            "final layer of a frozen backbone only; use exits.kl_weight=0 or backbone=frozen"
        )


def check_supernet(config: Any) -> None:
    """Refuse a supernet config that cannot run on any model. Raises `UserError`."""
    _at_least(1, config, "parallel.tp", "parallel.pp", "parallel.dp", "distill.feature_dim", "importance.samples")
    _at_least(1, config, "train.micro_batch_size", "train.global_batch_size", "train.save_every", "train.keep")
    _at_least(1, config, "logging.every", "data.seq_length", "distill.loss_chunk_tokens", "importance.batch_size")
    _at_least(0, config, "distill.feature_weight", "sampling.randoms", "data.num_workers")
    _check_run(config)
    _check_optim(config.optim)
    check_batch(config.train.global_batch_size, config.train.micro_batch_size, config.parallel.dp)
    if not config.stages:
        raise UserError("stages=[]: give at least one stage, or choose recipe=mlfs")
    for number, stage in enumerate(config.stages):
        for name, least in (("steps", 1), ("rank", 0), ("lr", 0)):
            if stage[name] is not None and stage[name] < least:
                raise UserError(f"stages[{number}].{name}={stage[name]}: must be at least {least}")
        lr, name = (config.optim.lr, "optim.lr") if stage.lr is None else (stage.lr, f"stages[{number}].lr")
        if config.optim.min_lr > lr:
            raise UserError(f"optim.min_lr={config.optim.min_lr} is above {name}={lr}")
        if number and not stage.axes and config.stages[number - 1].axes:
            raise UserError(f"stages[{number}].axes=[]: stages without axes come first, they make the teacher")
    if not 0 <= config.distill.kl_weight <= 1:
        raise UserError(
            f"distill.kl_weight={config.distill.kl_weight}: must be in [0, 1]; the task's loss has the rest"
        )
    if config.distill.temperature <= 0:
        raise UserError(f"distill.temperature={config.distill.temperature}: must be above 0")
    if not config.sampling.smallest and config.sampling.randoms == 0:
        raise UserError("sampling.smallest=false and sampling.randoms=0: no subnet would train beside the full model")
    places = ("attention", "mlp", "embeddings", "head")
    if unknown := [target for target in config.factors.targets if target not in places]:
        raise UserError(f"factors.targets={unknown}: choose among {', '.join(places)}")
    if not config.factors.vectors and not {"attention", "mlp"} & set(config.factors.targets):
        targets = list(config.factors.targets)
        raise UserError(
            f"factors.targets={targets} and factors.vectors=false: the layers would have nothing to train; add "
            "attention or mlp, or train vectors"
        )


def check_batch(global_batch_size: int, micro_batch_size: int, dp: int) -> int:
    """Micro-batches per step and rank. Raises `UserError` if the sizes do not divide."""
    if global_batch_size % (micro_batch_size * dp):
        raise UserError(
            f"train.global_batch_size={global_batch_size} is not a multiple of "
            f"train.micro_batch_size x parallel.dp = {micro_batch_size} x {dp}"
        )
    return global_batch_size // (micro_batch_size * dp)


def _check_run(config: Any) -> None:
    """What every run that trains has."""
    _at_least(1, config, "train.max_skipped", "logging.trace_steps", "launcher.nodes")
    _at_least(0, config, "train.spike_factor", "logging.trace_after", "launcher.max_restarts")
    if config.logging.peak_tflops is not None and config.logging.peak_tflops <= 0:
        raise UserError(f"logging.peak_tflops={config.logging.peak_tflops}: must be above 0")
    if config.parallel.device_memory_gb is not None and config.parallel.device_memory_gb <= 0:
        raise UserError(f"parallel.device_memory_gb={config.parallel.device_memory_gb}: must be above 0")
    if config.parallel.timeout_minutes <= 0:
        raise UserError(f"parallel.timeout_minutes={config.parallel.timeout_minutes}: must be above 0")


def _check_optim(optim: Any) -> None:
    for name in ("min_lr", "clip_grad", "weight_decay"):
        if optim[name] < 0:
            raise UserError(f"optim.{name}={optim[name]}: must be at least 0")
    if not 0 <= optim.warmup_fraction < 1:
        raise UserError(f"optim.warmup_fraction={optim.warmup_fraction}: must be in [0, 1)")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"optim.betas={list(optim.betas)}: two numbers in [0, 1)")


def _at_least(smallest: float, config: Any, *keys: str) -> None:
    for key in keys:
        group, name = key.split(".")
        if config[group][name] < smallest:
            raise UserError(f"{key}={config[group][name]}: must be at least {smallest}")
