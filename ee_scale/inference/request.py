"""A `generate` command, checked: everything that can be wrong is said here, before anything heavy starts."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.proof import check_decoding_proof
from ee_scale.config.schema import GenerateConfig
from ee_scale.config.serve import ServeConfig
from ee_scale.data.inputs import load_tokenizer
from ee_scale.errors import UserError, one_line
from ee_scale.inference.pipeline import check_pipeline
from ee_scale.inference.pipeline_model import plan_decoding
from ee_scale.inference.prompts import encode_prompts, read_prompts
from ee_scale.inference.settings import check_settings
from ee_scale.log import log
from ee_scale.modeling.following import Followed, FollowedLimits, change_words, check_following
from ee_scale.modeling.policies import ExitPolicy, resolve_policy
from ee_scale.modeling.policy_names import SCORED

OPTIONS = (
    "threshold",
    "patience",
    "layer",
    "min_layer",
    "max_pending",
    "draft_length",
    "shortlist",
    "draft_weights",
    "draft_sources",
)


@dataclass(frozen=True)
class Request:
    """A checked command.

    Attributes:
        tags: one per prompt, or None.
        streams: the one prompt's answer goes to stdout as it comes.
    """

    config: GenerateConfig
    folder: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    texts: list[str]
    prompts: list[list[int]]
    tags: list[str] | None
    streams: bool

    @property
    def num_layers(self) -> int:
        return self.folder.config.num_hidden_layers

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return self.folder.exits.layers if self.folder.exits else ()

    def policy(self, tags: list[str] | None, rows: int) -> ExitPolicy:
        """The policy of a batch."""
        return read_policy(self.config, self.folder, tags, rows)

    def batches(self) -> Iterator[tuple[list[list[int]], list[str] | None]]:
        """(prompts, tags) of each batch."""
        size = self.config.batch_size
        for start in range(0, len(self.prompts), size):
            yield self.prompts[start : start + size], self.tags and self.tags[start : start + size]

    def sampling(self) -> dict[str, Any]:
        """Settings of transformers' `generate`."""
        config = self.config
        chosen: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "do_sample": config.temperature > 0}
        if config.temperature > 0:
            values = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
            chosen |= {name: value for name, value in values.items() if value is not None}
        return chosen


def check_config(config: GenerateConfig) -> None:
    """Refuse numbers that mean nothing. Raises `UserError`."""
    for key in ("top_k", "top_p"):
        if (value := getattr(config, key)) is not None and config.temperature == 0:
            raise UserError(f"{key}={value}: temperature=0 takes the most likely token; set temperature to sample")
    if config.out is not None:
        out = Path(config.out).expanduser()
        if out.exists() or not out.parent.is_dir():
            raise UserError(
                f"out={config.out}: {'exists already' if out.exists() else 'no such folder'}; choose another"
            )
    if config.log is not None and not Path(config.log).expanduser().parent.is_dir():
        raise UserError(f"log={config.log}: no such folder")
    logs = [key for key in ("log", "tag", "audit") if getattr(config, key) is not None]
    if config.policy == "off" and logs:
        raise UserError(f"{logs[0]}={getattr(config, logs[0])}: policy=off makes no decisions; choose a policy")
    parallel = config.parallel
    check_pipeline(parallel.tp, parallel.pp, config.policy)
    if config.shortlist is not None and parallel.tp * parallel.pp > 1:
        raise UserError(
            f"shortlist={config.shortlist}: drafts over a grid read whole heads; leave it out, or use one device"
        )
    for key in ("draft_sources", "draft_weights") if parallel.tp * parallel.pp > 1 else ():
        if (value := getattr(config, key)) is not None:
            raise UserError(f"{key}={value}: over a grid the exits draft, as they are; leave it out, or use one device")
    if config.graphs and config.policy == "off":
        raise UserError("graphs=true: policy=off leaves decoding to transformers; choose a policy")
    if config.graphs and config.draft_weights == "int8":
        raise UserError("graphs=true: int8 drafts are not recorded; leave draft_weights out")
    if config.graphs and parallel.tp * parallel.pp > 1:
        raise UserError(f"graphs=true: needs one device, not tp={parallel.tp} x pp={parallel.pp}")
    if config.audit is not None and parallel.tp * parallel.pp > 1:
        raise UserError(f"audit={config.audit}: needs one device, not tp={parallel.tp} x pp={parallel.pp}")
    followed_limits(config, [config.policy])


def check_model(config: GenerateConfig) -> ModelFolder:
    """Find the model and check policy and grid against it. Raises `UserError`."""
    folder = ModelFolder.named(config.model).checked()
    if folder.exits is None and config.policy != "off":
        raise UserError(f"policy={config.policy}: {config.model} has no exits; use policy=off, or export a tuned run")
    policy = read_policy(config, folder)
    parallel = config.parallel
    grid = parallel.tp * parallel.pp > 1
    if grid or policy.name != "off":
        check_decoding_proof(folder.config)
    check_settings(folder.generation_config(), own_loop=grid or policy.name != "off", grid=grid)
    drafts = grid and policy.name == "lossless"
    plan_decoding(folder, parallel.tp, parallel.pp, policy.layers, parallel.stages, drafts=drafts)
    return folder


def check_prompts(config: GenerateConfig, folder: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> Request:
    """Read and encode the prompts. Raises `UserError`."""
    texts = read_prompts(config)
    prompts = encode_prompts(texts, tokenizer, folder.config, config)
    tags = (
        None if config.tag is None else [config.tag] * len(texts) if isinstance(config.tag, str) else list(config.tag)
    )
    if tags is not None and len(tags) != len(texts):
        raise UserError(f"tag={tags}: {len(tags)} tags for {len(texts)} prompts")
    # Beams know their text at the end only.
    streams = len(texts) == 1 and config.out is None and (folder.generation_config().num_beams or 1) == 1
    if config.show_exits and not streams:
        raise UserError(f"show_exits=true: colours one answer on the terminal, not {len(texts)} prompts or a file")
    return Request(config, folder, tokenizer, texts, prompts, tags, streams)


def checked_request(config: GenerateConfig) -> Request:
    """Everything that a config asks for, with its prompts. Raises `UserError`."""
    check_config(config)
    folder = check_model(config)
    return check_prompts(config, folder, load_tokenizer(folder.base, "model"))


def read_policy(
    config: GenerateConfig, folder: ModelFolder, tags: list[str] | None = None, rows: int | None = None
) -> ExitPolicy:
    """The policy of a batch with these tags. Raises `UserError`."""
    with plain_words():
        return resolve_policy(
            config.policy,
            folder.exits.layers if folder.exits else (),
            calibration=folder.calibration(),
            tags=tags,
            batch_size=rows,
            vocab_size=folder.config.vocab_size,
            head_tokens=folder.exits.shortlist_ids if folder.exits else (),
            **policy_options(config),
        )


def policy_options(config: GenerateConfig | ServeConfig) -> dict[str, Any]:
    """The policy's settings that were given."""
    given = {name: getattr(config, name) for name in OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def tell_change(tag: str | None, known: Followed) -> None:
    """The state of a tag, in the log."""
    log.warning(f"follow: {change_words(tag, known)}")


def followed_limits(config: GenerateConfig | ServeConfig, policies: Sequence[str]) -> FollowedLimits | None:
    """What `follow` asks for; None: limits stay. Raises `UserError` where no policy's limits could follow."""
    if config.follow is None:
        return None
    follow = FollowedLimits(config.follow, tell=tell_change)
    try:
        check_following(follow, next((name for name in policies if name in SCORED), policies[0]), config.audit or 0.0)
    except ValueError as error:
        why = str(error).removeprefix("exit_follow").replace("exit_", "")
        raise UserError(f"follow={config.follow}{why}") from error
    return follow


@contextmanager
def plain_words() -> Iterator[None]:
    """Errors of a model's `generate` in this command's words: its `exit_threshold` is `threshold` here."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(re.sub(r"\bexit_(\w+)", r"\1", one_line(error))) from error
