"""A generated text in which each token has the colour of the layer that it came from."""

from collections.abc import Callable, Mapping, Sequence

import torch
from rich.color import ColorSystem
from rich.style import Style
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

COLOURS = ("green", "cyan", "blue", "magenta", "red", "bright_yellow", "bright_cyan", "bright_magenta")


@torch.no_grad()
def exit_choices(
    model: PreTrainedModel, prompt_ids: torch.Tensor, new_tokens: int
) -> tuple[list[int], dict[int, list[int]]]:
    """Greedy continuation of a prompt [1, S] by the final layer: its token ids, and each exit's most likely tokens."""
    ids = model.generate(prompt_ids, max_new_tokens=new_tokens, do_sample=False, use_cache=True)
    output = model(ids[:, :-1], use_cache=False)
    start, new_ids = prompt_ids.shape[1], ids[0, prompt_ids.shape[1] :]
    return new_ids.tolist(), {k: logits[0, start - 1 :].argmax(-1).tolist() for k, logits in output.exit_logits.items()}


def first_agreeing(ids: Sequence[int], choices: Mapping[int, Sequence[int]]) -> list[int | None]:
    """For each token the shallowest exit whose choice it is (None: no exit's)."""
    return [next((k for k, said in choices.items() if said[i] == token), None) for i, token in enumerate(ids)]


def coloured_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], exits: list[int | None], layers: list[int]
) -> Text:
    """The prompt in bold, then the tokens; white ones needed the whole model."""
    text = Text(prompt, style="bold")
    streamer = PieceStreamer(tokenizer, lambda piece, k: text.append(piece, style=_colour(layers, k)))
    streamer.in_prompt = False
    streamer.put_exits(ids, exits)
    streamer.put(torch.tensor(ids))
    streamer.end()
    return text


def legend(
    exits: Sequence[int | None],
    layers: Sequence[int],
    num_layers: int,
    title: str = "first exit with the final layer's token",
) -> Text:
    """Colours, layers, how many tokens each gave, and their mean depth; None is the final layer."""
    text = Text(f"{title}: ")
    for k in layers:
        text.append(f"layer {k}: {exits.count(k)}  ", style=_colour(layers, k))
    text.append(f"all {num_layers} layers: {exits.count(None)}", style=_colour(layers, None))
    if exits:
        text.append(f"  mean depth {sum(k or num_layers for k in exits) / len(exits):.1f}", style="default")
    return text


def paint(text: str, layers: Sequence[int], k: int | None) -> str:
    """The text in the colour of a layer, as a terminal reads it; no character of the text is changed."""
    return Style.parse(_colour(layers, k)).render(text, color_system=ColorSystem.STANDARD)


class PieceStreamer(BaseStreamer):
    """A streamer for `generate` that hands on text as soon as it is whole, with the layer that it came from.

    The pieces together are the decoded text: what is kept back is a character whose bytes have not all come.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str, int | None], None]):
        """`write(piece, layer)`; the layer is None where generation does not tell (`put_exits`)."""
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.start = self.shown = 0  # tokens that are context, and tokens whose text was handed on
        self.layers: list[int | None] = []
        self.in_prompt = True

    def put_exits(self, token_ids: Sequence[int], layers: Sequence[int | None]) -> None:
        """Where the tokens of the next `put` come from."""
        self.layers = list(layers)

    def put(self, value: torch.Tensor) -> None:
        """First the prompt, then new tokens: [N] or [1, N]. Raises ValueError for a batch."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError("streaming needs a batch of one row")
        if self.in_prompt:
            self.in_prompt = False
            return
        tokens = value.flatten().tolist()
        for token, layer in zip(tokens, self.layers or [None] * len(tokens), strict=True):
            self.ids.append(token)
            self._show(layer, last=False)
        self.layers = []

    def end(self) -> None:
        """Hand on what was kept back."""
        self._show(None, last=True)
        self.ids, self.start, self.shown, self.in_prompt = [], 0, 0, True

    def _show(self, layer: int | None, *, last: bool) -> None:
        # Some tokenizers drop the space in front of the first token, so a piece is decoded behind the one before it.
        before = self._decode(self.ids[self.start : self.shown])
        text = self._decode(self.ids[self.start :])
        if len(text) > len(before) and (last or not text.endswith("\ufffd")):
            self.write(text[len(before) :], layer)
            self.start, self.shown = self.shown, len(self.ids)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _colour(layers: Sequence[int], k: int | None) -> str:
    return "white" if k is None or k not in layers else COLOURS[list(layers).index(k) % len(COLOURS)]
