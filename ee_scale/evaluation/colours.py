"""A generated text in which each token has the colour of the first exit that would have said the same."""

from typing import Any

import torch
from rich.text import Text

COLOURS = ("green", "cyan", "blue", "magenta", "red", "bright_yellow", "bright_cyan", "bright_magenta")


@torch.no_grad()
def first_agreeing_exits(model: Any, prompt_ids: torch.Tensor, new_tokens: int) -> tuple[list[int], list[int | None]]:
    """Greedy continuation of a prompt [1, S] by the final layer, in one go.

    Returns the new token ids and, for each, the shallowest exit whose most likely token it was (None: no exit's).
    """
    ids = model.generate(prompt_ids, max_new_tokens=new_tokens, do_sample=False, use_cache=True)
    output = model(ids[:, :-1], use_cache=False)
    start, new_ids = prompt_ids.shape[1], ids[0, prompt_ids.shape[1] :]
    choices = {k: logits[0, start - 1 :].argmax(-1) for k, logits in output.exit_logits.items()}
    exits = [next((k for k, tokens in choices.items() if tokens[i] == token), None) for i, token in enumerate(new_ids)]
    return new_ids.tolist(), exits


def coloured_text(tokenizer: Any, prompt: str, ids: list[int], exits: list[int | None], layers: list[int]) -> Text:
    """The prompt in bold, then the tokens; white ones needed the whole model."""
    text = Text(prompt, style="bold")
    for token, k in zip(ids, exits, strict=True):
        text.append(tokenizer.decode([token]), style="white" if k is None else _colour(layers, k))
    return text


def legend(exits: list[int | None], layers: list[int], num_layers: int) -> Text:
    """Colours, layers, and how many tokens each exit could have produced."""
    text = Text("first exit with the final layer's token: ")
    for k in layers:
        text.append(f"layer {k}: {exits.count(k)}  ", style=_colour(layers, k))
    return text.append(f"all {num_layers} layers: {exits.count(None)}", style="white")


def _colour(layers: list[int], k: int) -> str:
    return COLOURS[layers.index(k) % len(COLOURS)]
