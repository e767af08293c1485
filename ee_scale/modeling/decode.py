"""`generate` with exits: options, checks and the result."""

import time
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.utils import logging

from .calibration import CALIBRATION_KEY
from .early_exits import EarlyExits
from .heads import ModelWithExits
from .layer_runner import LayerRunner
from .loop import DecodeLoop
from .policies import ExitPolicy, resolve_policy
from .position_cache import fill_dynamic_cache
from .row_texts import RowTexts
from .sequences import Sequences
from .speculate import Speculation
from .static_runner import StaticRunner
from .trail import Trail
from .versions import CACHE

OPTIONS = {
    "exit_policy": "name",
    "exit_threshold": "threshold",
    "exit_patience": "patience",
    "exit_layer": "layer",
    "exit_min_layer": "min_layer",
    "exit_max_pending": "max_pending",
    "exit_draft_length": "draft_length",
    "exit_shortlist": "shortlist",
    "exit_draft_weights": "draft_weights",
    "exit_draft_sources": "draft_sources",
}
GRAPHS = "exit_graphs"
# They name what is written, or hold what outlives a call: arguments only.
LOG_OPTIONS = ("exit_log", "exit_tags", "exit_requests", "exit_audit", "exit_follow")
logger = logging.get_logger(__name__)


@dataclass
class EarlyExitGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' output, and where the tokens came from.

    Attributes:
        exit_layers: int64 [B, new]: the exit that gave each token, the number of layers for the final layer, 0 behind
            the end of a row. `lossless`: the drafting exit where its draft was accepted.
        exit_confidences: fp32 [B, new]: the policy's score at the deepest exit that was looked at, NaN if none was.
        exit_sources: for each row and new token, the source of an accepted draft ("exit 3", "prompt"), None for others.
        exit_stats: numbers of this call: layer_calls (per layer), layer_positions, exit_checks, passes, seconds, ...
    """

    exit_layers: torch.LongTensor | None = None
    exit_confidences: torch.FloatTensor | None = None
    exit_sources: list[list[str | None]] | None = None
    exit_stats: dict[str, Any] | None = None


class ExitDecoding:
    """The callable that `generate(custom_generate=...)` runs; one object per call, nothing stays on the model."""

    def __init__(self, options: dict[str, Any], streamer: BaseStreamer | None = None):
        """options: the `exit_*` arguments of `generate`."""
        self.options, self.streamer = options, streamer

    def __call__(
        self,
        model: ModelWithExits,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> EarlyExitGenerateOutput | torch.Tensor:
        """Called by transformers with everything prepared. Raises ValueError in one line."""
        # Not parameters: transformers hands those that a loop names over before it has prepared them.
        attention_mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
        started = time.perf_counter()
        check_request(generation_config, model_kwargs)
        pads = count_padding(input_ids, attention_mask, model.config.max_position_embeddings)
        options = per_row(self.options, len(input_ids), generation_config.num_return_sequences or 1)
        policy = choose_policy(options, model, generation_config, len(input_ids))
        lossless = policy.name == "lossless"
        if policy.draft_weights == "int8" and wants_graphs(options):
            raise ValueError(f"{GRAPHS}=True: int8 drafts are not recorded (leave exit_draft_weights out)")
        input_ids = input_ids.to(model.device)
        room = policy.max_draft + 1 if lossless else 0
        sequences = Sequences(
            input_ids, logits_processor, stopping_criteria, generation_config, self.streamer, draft_room=room
        )
        wants_cache = isinstance(cache, DynamicCache) and bool(
            generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        )
        # Room for the usual answer; a longer one makes the cache grow.
        capacity = input_ids.shape[1] + min(sequences.max_length - input_ids.shape[1], 512)
        capacity += max(room, policy.max_pending + 1)
        trail = Trail(options, policy, input_ids, model)
        loop = make_loop(model, options, policy, sequences, trail, pads, capacity, wants_cache)
        try:
            loop.run(generation_config.prefill_chunk_size)
        finally:
            loop.runner.close()
            trail.write(sequences)
        ids = sequences.finish()
        if wants_cache:
            fill_dynamic_cache(cache, model.config, loop.retired, pads)
        if not generation_config.return_dict_in_generate:
            return ids
        return EarlyExitGenerateOutput(
            sequences=ids,
            scores=sequences.gathered(sequences.scores, float("-inf")),
            logits=sequences.gathered(sequences.logits, 0.0),
            exit_layers=sequences.per_token(sequences.layers, torch.long),
            exit_confidences=sequences.per_token(sequences.confidences, torch.float32),
            exit_sources=[
                [trail.sources.get((row, index)) for index in range(len(layers))]
                for row, layers in enumerate(sequences.layers)
            ],
            exit_stats=totals(loop, started),
            **{CACHE: cache if wants_cache else None},
        )


def make_loop(
    model: ModelWithExits,
    options: dict[str, Any],
    policy: ExitPolicy,
    sequences: Sequences | RowTexts,
    trail: Trail,
    pads: list[int],
    capacity: int,
    wants_cache: bool = False,
) -> DecodeLoop:
    """The loop of a policy, for as many rows as there are `pads`; its runner is to be closed."""
    runner = (StaticRunner if wants_graphs(options) else LayerRunner)(model, policy.layers, len(pads), capacity)
    loop = Speculation if policy.name == "lossless" else EarlyExits
    return loop(runner, sequences, policy, pads, trail, wants_cache)


def totals(loop: DecodeLoop, started: float) -> dict[str, Any]:
    """`exit_stats` of what a loop has done since then."""
    runner = loop.runner
    return {
        "seconds": time.perf_counter() - started,
        "layer_calls": runner.layer_calls(),
        "layer_positions": runner.layer_positions(),
        "exit_checks": {k: runner.checks[k] for k in loop.policy.layers},
        **loop.stats(),
    }


def per_row(options: dict[str, Any], batch_size: int, copies: int) -> dict[str, Any]:
    """Lists that name something per prompt, repeated for `num_return_sequences`. Raises ValueError on wrong lengths."""
    options, prompts = dict(options), batch_size // copies
    for key in ("exit_tags", "exit_requests"):
        if (given := options.get(key)) is None:
            continue
        if isinstance(given, str):
            raise ValueError(f"{key}={given!r}: give a list, one for each of the {prompts} prompts")
        given = [check_name(key, name) for name in given]
        if len(given) not in (prompts, batch_size):
            raise ValueError(f"{key}: {len(given)} values for {prompts} prompts")
        options[key] = [item for item in given for _ in range(batch_size // len(given))]
    limits = options.get("exit_threshold")
    if (
        isinstance(limits, list | tuple)
        and len(limits) == prompts
        and all(isinstance(row, list | tuple) for row in limits)
    ):
        options["exit_threshold"] = [row for row in limits for _ in range(copies)]
    return options


def wants_graphs(options: dict[str, Any]) -> bool:
    """Whether steps run with static shapes. Raises ValueError for what is neither true nor false."""
    wanted = options.get(GRAPHS, False)
    if not isinstance(wanted, bool):
        raise ValueError(f"{GRAPHS}={wanted!r}: give true or false")
    return wanted


def check_name(key: str, name: object) -> str | int | None:
    """A request or tag as the log writes it; tags are text there and in a calibration. Raises ValueError."""
    if name is None or isinstance(name, str):
        return name
    if isinstance(name, bool) or not isinstance(name, Integral):
        raise ValueError(f"{key}: {name!r} is no name; give text or a whole number")
    return str(int(name)) if key == "exit_tags" else int(name)


def choose_policy(
    options: dict[str, Any], model: ModelWithExits, generation_config: GenerationConfig, batch_size: int
) -> ExitPolicy:
    """The checked policy for these `exit_*` arguments."""
    return resolve_policy(
        spec_layers=model.exit_spec.layers,
        calibration=getattr(generation_config, CALIBRATION_KEY, None),
        tags=options.get("exit_tags"),
        batch_size=batch_size,
        vocab_size=model.config.vocab_size,
        head_tokens=model.exit_spec.shortlist_ids,
        **{OPTIONS[key]: value for key, value in options.items() if key in OPTIONS},
    )


def take_options(kwargs: dict[str, Any], *configs: GenerationConfig | None) -> dict[str, Any]:
    """Take the `exit_*` arguments out of generate's; those not given come from the generation configs, first first.

    Not so what is logged, and where: a generation config may come from strangers, with a model or with a request.
    """
    options = {key: value for key in LOG_OPTIONS if (value := kwargs.pop(key, None)) is not None}
    ignored = [key for key in LOG_OPTIONS if any(getattr(config, key, None) is not None for config in configs)]
    if ignored:
        names = ", ".join(ignored)
        logger.warning_once(f"generation config: {names} ignored; give what is logged as arguments of generate")
    for key in (*OPTIONS, GRAPHS):
        sources = [kwargs.pop(key, None), *(getattr(config, key, None) for config in configs)]
        value = next((value for value in sources if value is not None), None)
        if value is not None:
            options[key] = value
    if options and "exit_policy" not in options:
        raise ValueError(f"{next(iter(options))} is given but no exit_policy")
    return options


def settle_cache(kwargs: dict[str, Any], given: GenerationConfig | None, own: GenerationConfig | None) -> None:
    """Exits keep a cache of their own: raise ValueError for another kind that generate's kwargs or the `given`
    generation config ask for; where only the model's `own` config does, which changes no token, it gives way.
    """
    default = getattr(own, "cache_implementation", None)
    asked = kwargs.get("cache_implementation")
    if asked is None and (asked := getattr(given, "cache_implementation", None)) == default:
        asked = None
    if asked not in (None, "dynamic"):
        raise ValueError(
            f"exit_policy: cache_implementation={asked!r}: exits keep their own cache and hand back a DynamicCache, no "
            "StaticCache or the like (leave cache_implementation out)"
        )
    cache = kwargs.get(CACHE)
    if cache is not None and (type(cache) is not DynamicCache or cache.offloading):
        raise ValueError(
            "exit_policy: exits keep their own cache and hand back a DynamicCache that is not offloaded, no "
            f"{type(cache).__name__} like the one given (leave {CACHE} out)"
        )
    if default is not None:
        kwargs["cache_implementation"] = "dynamic"


def take_stop_strings(kwargs: dict[str, Any], *configs: GenerationConfig | None) -> None:
    """transformers hands no tokenizer on to a custom loop, so the criterion for `stop_strings` is made here.

    kwargs are generate's; strings that are not among them come from the generation configs, first first.
    """
    tokenizer = kwargs.pop("tokenizer", None)
    found = (kwargs.get("stop_strings"), *(getattr(config, "stop_strings", None) for config in configs))
    strings = next((strings for strings in found if strings), None)
    if strings is None:
        return
    if tokenizer is None:
        raise ValueError(f"stop_strings={strings!r}: pass the tokenizer too")
    kwargs["stop_strings"] = None  # done; nobody is to look for them again
    criteria = kwargs.get("stopping_criteria") or []
    if not any(type(item) is StopStringCriteria for item in criteria):  # the caller's own take its place
        kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, strings)])


def check_request(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Raise ValueError for what `generate` can do without exits only."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"exit_policy: exits decode greedily or by sampling, not by {mode.value} (leave exit_policy out)"
        )
    for option in ("output_attentions", "output_hidden_states"):
        if getattr(config, option):
            raise ValueError(f"exit_policy: {option}=True needs every layer of every token (leave exit_policy out)")
    if config.guidance_scale not in (None, 1):
        raise ValueError(
            f"exit_policy: guidance_scale={config.guidance_scale} runs a second model (leave exit_policy out)"
        )
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("exit_policy: give input_ids, not inputs_embeds")


def count_padding(input_ids: torch.Tensor, mask: torch.Tensor | None, context: int) -> list[int]:
    """Padding columns in front of each row. Raises ValueError for empty and too long prompts, and holes in the mask."""
    length = input_ids.shape[1]
    if length == 0:
        raise ValueError("the prompt is empty: there is no token to start from")
    if mask is None:
        pads = [0] * len(input_ids)
    else:
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns, input_ids {length}: pass the whole text, also with a "
                "filled cache"
            )
        pads = [length - count for count in mask.bool().sum(1).tolist()]
        for row, pad in enumerate(pads):
            if pad == length:
                raise ValueError(f"the prompt of row {row} is empty: there is no token to start from")
            if not bool(mask[row, pad:].all()):
                raise ValueError(f"attention_mask: row {row} is not padded on the left (tokenizer.padding_side='left')")
    longest = length - min(pads)
    if longest > context:
        raise ValueError(f"the prompt has {longest} tokens, the model's context {context}")
    return pads
