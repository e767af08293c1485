"""What a model's generation_config.json asks for: kept by every loop, or refused by name."""

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StopStringCriteria
from transformers.generation.configuration_utils import GenerationMode

from ee_scale.errors import UserError

PLAIN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# What turns greedy decoding or sampling into something else.
OTHER_MODES = (
    "num_beams",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
)


def check_settings(settings: GenerationConfig, *, own_loop: bool = False, grid: bool = False) -> None:
    """Refuse settings that would be ignored. Raises `UserError` that names setting, value and way out.

    own_loop: with exits, or on a grid; else transformers decodes. grid: over several devices.
    """
    _refuse(settings, "num_return_sequences", "a prompt gets one answer here; set it to 1 there", neutral=1)
    _refuse(settings, "token_healing", "prompts are not changed here; set it to false there")
    if own_loop:
        _refuse(settings, "guidance_scale", "a second model runs with policy=off on one device only", neutral=1)
        if settings.get_generation_mode() not in PLAIN_MODES:
            for name in OTHER_MODES:
                why = "only transformers' own loop does this: use policy=off on one device, or set it to null there"
                _refuse(settings, name, why, neutral=1 if name == "num_beams" else None)
    if grid:
        _refuse(settings, "max_time", "the ranks of a grid have no common clock; use tp=1 pp=1, or max_new_tokens")


def _refuse(settings: GenerationConfig, name: str, why: str, neutral: int | None = None) -> None:
    value = getattr(settings, name, None)
    if value is not None and value is not False and value != neutral:
        raise UserError(f"{name}={value} (generation_config.json): {why}")


def stop_criterion(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> StoppingCriteria | None:
    """transformers' criterion for `stop_strings`, if there are any. Raises `UserError` without a tokenizer."""
    if not settings.stop_strings:
        return None
    if tokenizer is None:
        raise UserError(f"stop_strings={settings.stop_strings!r}: pass the tokenizer too")
    return StopStringCriteria(tokenizer, settings.stop_strings)


def end_marks(settings: GenerationConfig) -> list[int]:
    """Token ids that end a text."""
    ends = settings.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def new_lengths(ids: torch.Tensor, prompt: int, settings: GenerationConfig, stop: StoppingCriteria | None) -> list[int]:
    """Texts [B, prompt + N], padded on the right -> new tokens of each row, its end included."""
    lengths: list[int | None] = [None] * len(ids)
    ends = torch.tensor(end_marks(settings), dtype=ids.dtype, device=ids.device)
    for length in range(prompt + 1, ids.shape[1] + 1):
        done = torch.isin(ids[:, length - 1], ends)
        if stop is not None:
            done = done | stop(ids[:, :length], None)
        for row, ended in enumerate(done.tolist()):
            if ended and lengths[row] is None:
                lengths[row] = length - prompt
    return [ids.shape[1] - prompt if length is None else length for length in lengths]
