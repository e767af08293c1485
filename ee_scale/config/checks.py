"""Checks between the fields of a config, with the numbers in the message. Pure: no torch, no files."""

from dataclasses import fields, is_dataclass
from typing import TypeGuard

from ee_scale.config.groups import Settings
from ee_scale.config.supernet import SupernetConfig
from ee_scale.config.tune import TuneConfig
from ee_scale.errors import UserError


def check_rules(config: Settings, prefix: str = "") -> None:
    """Refuse a value that the rule of its field refuses, naming both. Raises `UserError`."""
    for field in fields(config):
        value, key = getattr(config, field.name), prefix + field.metadata.get("written", field.name)
        rule = field.metadata.get("rule")
        if _is_group(value):
            check_rules(value, f"{key}.")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if _is_group(item):
                    check_rules(item, f"{key}[{number}].")
        if rule is not None and value is not None and not rule.holds(value):
            raise UserError(f"{key}={value}: {rule.words}")


def _is_group(value: object) -> TypeGuard[Settings]:
    return is_dataclass(value)


def check_tune(config: TuneConfig) -> None:
    """Refuse a tune config that cannot run on any model. Raises `UserError`."""
    check_rules(config)
    check_batch(config.train.global_batch_size, config.train.micro_batch_size, config.parallel.dp)
    if config.optim.min_lr > config.optim.lr:
        raise UserError(f"optim.min_lr={config.optim.min_lr} is above optim.lr={config.optim.lr}")
    data = config.data
    if data.own_text and data.own_text_prompt >= data.seq_length:
        raise UserError(
            f"data.own_text_prompt={data.own_text_prompt} is not below data.seq_length={data.seq_length}: nothing is "
            "left to write"
        )
    _check_held_out(config)
    backbone = config.backbone
    if backbone.mode == "frozen":
        return
    if config.data.cache_taps:
        raise UserError(
            f"data.cache_taps=true with backbone.mode={backbone.mode}: what exits read changes with the backbone; use "
            "data.cache_taps=false or backbone=frozen"
        )
    if not backbone.targets or set(backbone.targets) - {"attention", "mlp"}:
        raise UserError(f"backbone.targets={backbone.targets}: choose of attention and mlp")
    if config.exits.kl_weight > 0:
        raise UserError(
            f"exits.kl_weight={config.exits.kl_weight} with backbone.mode={backbone.mode}: exits can learn from the "
            "final layer of a frozen backbone only; use exits.kl_weight=0 or backbone=frozen"
        )


def _check_held_out(config: TuneConfig) -> None:
    train, mode = config.train, config.backbone.mode
    if train.early_stop and not train.held_out:
        raise UserError(f"train.early_stop={train.early_stop} needs train.held_out=<text that is not trained on>")
    if train.held_out and mode != "frozen":
        raise UserError(
            f"train.held_out with backbone.mode={mode}: exits are measured on a frozen backbone alone; leave it out, "
            "or use backbone=frozen"
        )


def check_supernet(config: SupernetConfig) -> None:
    """Refuse a supernet config that cannot run on any model. Raises `UserError`."""
    check_rules(config)
    check_batch(config.train.global_batch_size, config.train.micro_batch_size, config.parallel.dp)
    data = config.data
    for key, value in (("cache_taps", data.cache_taps), ("own_text", data.own_text)):
        if value:
            raise UserError(f"data.{key}={str(value).lower()}: a setting of ee-scale tune alone; leave it out")
    if not config.stages:
        raise UserError("stages=[]: give at least one stage, or choose recipe=mlfs")
    for number, stage in enumerate(config.stages):
        lr, name = (config.optim.lr, "optim.lr") if stage.lr is None else (stage.lr, f"stages[{number}].lr")
        if config.optim.min_lr > lr:
            raise UserError(f"optim.min_lr={config.optim.min_lr} is above {name}={lr}")
        if number and not stage.axes and config.stages[number - 1].axes:
            raise UserError(f"stages[{number}].axes=[]: stages without axes come first, they make the teacher")
    if not config.sampling.smallest and config.sampling.randoms == 0:
        raise UserError("sampling.smallest=false and sampling.randoms=0: no subnet would train beside the full model")
    if config.distill.teacher == "live":
        if config.sampling.full_every != 1:
            every = f"sampling.full_every={config.sampling.full_every}"
            raise UserError(f"{every} with distill.teacher=live: the full net teaches in every step; give 1, or frozen")
        if config.distill.cache:
            raise UserError("distill.cache=true with distill.teacher=live: a teacher that trains says something new")
    places = ("attention", "mlp", "embeddings", "head")
    if unknown := [target for target in config.factors.targets if target not in places]:
        raise UserError(f"factors.targets={unknown}: choose among {', '.join(places)}")
    if not config.factors.vectors and not {"attention", "mlp"} & set(config.factors.targets):
        raise UserError(
            f"factors.targets={config.factors.targets} and factors.vectors=false: the layers would have nothing to "
            "train; add attention or mlp, or train vectors"
        )


def check_batch(global_batch_size: int, micro_batch_size: int, dp: int) -> int:
    """Micro-batches per step and rank. Raises `UserError` if the sizes do not divide."""
    if global_batch_size % (micro_batch_size * dp):
        raise UserError(
            f"train.global_batch_size={global_batch_size} is not a multiple of "
            f"train.micro_batch_size x parallel.dp = {micro_batch_size} x {dp}"
        )
    return global_batch_size // (micro_batch_size * dp)
