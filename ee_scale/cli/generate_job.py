"""A `generate` command, checked: everything that can be wrong is said here, before anything heavy starts."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ee_scale.cli.prompts import encode_prompts, read_prompts
from ee_scale.config.compose import as_dict
from ee_scale.errors import UserError, one_line
from ee_scale.inference.pipeline import check_pipeline
from ee_scale.inference.pipeline_model import ModelParts, find_parts, plan_decoding
from ee_scale.inference.settings import check_settings
from ee_scale.modeling.policies import ExitPolicy, resolve_policy

OPTIONS = ("threshold", "patience", "layer", "min_layer", "max_pending", "draft_length", "shortlist")


@dataclass(frozen=True)
class Job:
    """A checked command.

    Attributes:
        tags: one per prompt, or None.
        streams: the one prompt's answer goes to stdout as it comes.
    """

    config: Any
    parts: ModelParts
    tokenizer: Any
    texts: list[str]
    prompts: list[list[int]]
    tags: list[str] | None
    streams: bool

    @property
    def num_layers(self) -> int:
        return self.parts.config.num_hidden_layers

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return self.parts.spec.layers if self.parts.spec else ()

    def policy(self, tags: list[str] | None, rows: int) -> ExitPolicy:
        """The policy of a batch."""
        return read_policy(self.config, self.parts, tags, rows)

    def batches(self) -> Iterator[tuple[list[list[int]], list[str] | None]]:
        """(prompts, tags) of each batch."""
        size = self.config.batch_size
        for start in range(0, len(self.prompts), size):
            yield self.prompts[start : start + size], self.tags and self.tags[start : start + size]

    def sampling(self) -> dict[str, Any]:
        """Settings of transformers' `generate`."""
        config = self.config
        chosen = {"max_new_tokens": config.max_new_tokens, "do_sample": config.temperature > 0}
        if config.temperature > 0:
            values = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
            chosen |= {name: value for name, value in values.items() if value is not None}
        return chosen


def check_config(config: Any) -> None:
    """Refuse numbers that mean nothing. Raises `UserError`."""
    for key in ("max_new_tokens", "batch_size"):
        if config[key] < 1:
            raise UserError(f"{key}={config[key]}: must be at least 1")
    if not isfinite(config.temperature) or config.temperature < 0:
        raise UserError(f"temperature={config.temperature}: must be 0 (the most likely token) or above")
    for key, fits in (("top_k", lambda k: k >= 1), ("top_p", lambda p: 0 < p <= 1)):
        if config[key] is not None and not fits(config[key]):
            raise UserError(f"{key}={config[key]}: must be {'at least 1' if key == 'top_k' else 'above 0, at most 1'}")
        if config[key] is not None and config.temperature == 0:
            raise UserError(
                f"{key}={config[key]}: temperature=0 takes the most likely token; set temperature to sample"
            )
    if config.out is not None:
        out = Path(config.out).expanduser()
        if out.exists() or not out.parent.is_dir():
            raise UserError(
                f"out={config.out}: {'exists already' if out.exists() else 'no such folder'}; choose another"
            )
    if config.log is not None and not Path(config.log).expanduser().parent.is_dir():
        raise UserError(f"log={config.log}: no such folder")
    if config.audit is not None and not 0 <= config.audit <= 1:
        raise UserError(f"audit={config.audit}: give a share between 0 and 1")
    logs = [key for key in ("log", "tag", "audit") if config[key] is not None]
    if config.policy == "off" and logs:
        raise UserError(f"{logs[0]}={config[logs[0]]}: policy=off makes no decisions; choose a policy")
    parallel = config.parallel
    check_pipeline(parallel.tp, parallel.pp, config.policy, parallel.dp)
    if config.audit is not None and parallel.tp * parallel.pp > 1:
        raise UserError(f"audit={config.audit}: needs one device, not tp={parallel.tp} x pp={parallel.pp}")


def check_model(config: Any) -> ModelParts:
    """Find the model and check policy and grid against it. Raises `UserError`."""
    folder = Path(config.model).expanduser()
    if not folder.is_dir():
        raise UserError(f"model={config.model}: no such folder")
    parts = find_parts(folder)
    if parts.spec is None and config.policy != "off":
        raise UserError(f"policy={config.policy}: {config.model} has no exits; use policy=off, or export a tuned run")
    policy = read_policy(config, parts)
    parallel = config.parallel
    grid = parallel.tp * parallel.pp > 1
    check_settings(parts.generation_config(), own_loop=grid or policy.name != "off", grid=grid)
    plan_decoding(parts, parallel.tp, parallel.pp, policy.layers, parallel.stages)
    return parts


def check_prompts(config: Any, parts: ModelParts, tokenizer: Any) -> Job:
    """Read and encode the prompts. Raises `UserError`."""
    texts = read_prompts(config)
    prompts = encode_prompts(texts, tokenizer, parts.config, config)
    tags = (
        None if config.tag is None else [config.tag] * len(texts) if isinstance(config.tag, str) else list(config.tag)
    )
    if tags is not None and len(tags) != len(texts):
        raise UserError(f"tag={tags}: {len(tags)} tags for {len(texts)} prompts")
    # Beams know their text at the end only.
    streams = len(texts) == 1 and config.out is None and (parts.generation_config().num_beams or 1) == 1
    if config.show_exits and not streams:
        raise UserError(f"show_exits=true: colours one answer on the terminal, not {len(texts)} prompts or a file")
    return Job(config, parts, tokenizer, texts, prompts, tags, streams)


def read_policy(config: Any, parts: ModelParts, tags: list[str] | None = None, rows: int | None = None) -> ExitPolicy:
    """The policy of a batch with these tags. Raises `UserError`."""
    with plain_words():
        return resolve_policy(
            config.policy,
            parts.spec.layers if parts.spec else (),
            calibration=parts.calibration(),
            tags=tags,
            batch_size=rows,
            vocab_size=parts.config.vocab_size,
            **policy_options(config),
        )


def policy_options(config: Any) -> dict[str, Any]:
    """The policy's settings that were given."""
    values = as_dict(config)
    return {name: values[name] for name in OPTIONS if values[name] is not None}


@contextmanager
def plain_words() -> Iterator[None]:
    """Errors of a model's `generate` in this command's words: its `exit_threshold` is `threshold` here."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(re.sub(r"\bexit_(\w+)", r"\1", one_line(error))) from error
