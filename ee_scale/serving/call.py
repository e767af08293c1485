"""A request on its way: its answers, each a row of the decode loop, and what is told of them as it comes."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import nan

import torch
from transformers import PreTrainedTokenizerBase

from ee_scale.evaluation.colours import PieceStreamer
from ee_scale.modeling.row_queue import QueuedRow
from ee_scale.modeling.row_texts import Ranking
from ee_scale.serving.errors import ApiError

STOP, LENGTH = "stop", "length"


@dataclass
class Piece:
    """Text that an answer has got, of one or more tokens.

    Attributes:
        row: place of the answer in the response.
        tokens, layers: those that the text is new with, and where each came from.
        rankings: of the same tokens, where the request wants them.
        finish: why the answer ends here, if it does: `stop` or `length`.
    """

    row: int
    text: str
    tokens: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    rankings: list[Ranking] = field(default_factory=list)
    finish: str | None = None


class Row(PieceStreamer):
    """One answer: hears of tokens from the decode loop, and keeps back what may become a stop text.

    Attributes:
        queued: the row of the queue.
        count: tokens so far.
        stopped: whether a stop text has come: nothing behind it counts.
        told: when its newest tokens were told (monotonic), None before the first.
        score: how sure the model is of the whole answer, 0 to 1; nan as long as that is not known.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        settings: dict[str, object],
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str],
        ends: frozenset[int],
    ):
        super().__init__(tokenizer, self._wrote)
        self.index, self.stops, self.ends = index, stops, ends
        self.queued = QueuedRow(prompt, settings, streamer=self)
        self.count, self.stopped = 0, False
        self.told: float | None = None
        self.score = nan
        self._held = ""
        self._news: list[Piece] = []
        self._open = Piece(index, "")

    def put(self, value: torch.Tensor) -> None:
        """As the base class, up to a stop text."""
        if self.in_prompt:
            super().put(value)
            return
        tokens, layers = value.flatten().tolist(), self.layers
        for token, layer in zip(tokens, layers, strict=True):
            if self.stopped:
                return
            self.count += 1
            self._open.tokens.append(token)
            self._open.layers.append(layer or 0)
            super().put_exits([token], [layer])
            super().put(torch.tensor([token]))

    def end(self) -> None:
        """What was kept back: no stop text came of it."""
        if not self.stopped:
            super().end()
            self._open.text += self._held
            self._held = ""

    def take(self, finish: str | None = None) -> list[Piece]:
        """What is new since the last time; with a `finish`, the end."""
        if finish is not None:
            self._open.finish = finish
            self._close()
        pieces, self._news = self._news, []
        done = self.count - sum(len(piece.tokens) for piece in pieces) - len(self._open.tokens)
        for piece in pieces:
            piece.rankings = self.queued.rankings[done : done + len(piece.tokens)]
            done += len(piece.tokens)
        return pieces

    def reason(self) -> str:
        """Why a row that is done has ended."""
        most = self.queued.settings["max_new_tokens"]
        last = self.queued.tokens[-1] if self.queued.tokens else None
        return LENGTH if len(self.queued.tokens) >= most and last not in self.ends else STOP

    def _wrote(self, text: str, layer: int | None) -> None:
        if self.stopped:
            return
        text = self._held + text
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, text, self._held = True, text[: min(found)], ""
        else:
            kept = max((_overlap(text, stop) for stop in self.stops), default=0)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        if text:
            self._open.text += text
            self._close()

    def _close(self) -> None:
        self._news.append(self._open)
        self._open = Piece(self.index, "")


@dataclass(eq=False)
class Call:
    """A checked request, and the way back to whoever waits for its answers.

    Attributes:
        options: `exit_*` options of the queue that decodes its rows; `kind`: the same for equal ones.
        prompt_tokens: of all prompts.
        deadline: by `time.monotonic`.
        scored: name of the score that rows get when they are done (`inference.deferral`); None: none.
        left: whether nobody waits any more.
    """

    rows: list[Row]
    options: dict[str, object]
    kind: str
    prompt_tokens: int
    deadline: float
    started: float = field(default_factory=time.monotonic)
    scored: str | None = None
    left: bool = False
    open: set[Row] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.open = set(self.rows)
        self._news: asyncio.Queue[list[Piece] | ApiError | None] = asyncio.Queue()
        self._home: asyncio.AbstractEventLoop | None = None

    def listen(self) -> None:
        """From the event loop of whoever waits."""
        self._home = asyncio.get_running_loop()

    def tell(self, news: list[Piece] | ApiError | None) -> None:
        """From any thread: pieces, or why there will be no more; None: nobody waits any more."""
        assert self._home is not None
        with suppress(RuntimeError):  # the event loop is closed
            self._home.call_soon_threadsafe(self._news.put_nowait, news)

    async def hear(self) -> list[Piece] | None:
        """The next pieces. Raises `ApiError`."""
        news = await self._news.get()
        if isinstance(news, ApiError):
            raise news
        return news


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first ones of a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
