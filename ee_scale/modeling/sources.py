"""Where the drafts of lossless decoding come from.

A source drafts up to g tokens for each of R rows; the full model then checks all of them in one pass, from the layer
behind those that the source shares with it, or from layer 0. A source may be wrong as often as it likes: what stands is
what the full model says. V vocabulary, D hidden size.
"""

from dataclasses import dataclass, field

import torch

from .clocks import Clock
from .drafting import Drafting
from .layer_runner import Block, LayerRunner
from .policies import most_likely, score
from .sequences import Sequences, looks_back
from .short_head import ShortHead
from .transfers import read, waits_are_free


@dataclass
class Cycle:
    """What a source starts from: R unfinished rows.

    Attributes:
        rows: their places in the batch; index: the same on the device, [R].
        starts: position (cache column) of each row's newest token, which no layer has run on yet. Columns from there on
            belong to nobody: drafting may write keys and values into them, and the pass that verifies writes its own.
        tokens: the newest token of each row, [R].
        most: drafts that are allowed, at least 1.
    """

    rows: list[int]
    index: torch.Tensor
    starts: list[int]
    tokens: torch.Tensor
    most: int
    clock: Clock


@dataclass
class Draft:
    """What a source drafted: g tokens for each of R rows.

    Attributes:
        tokens: g tensors [R].
        q: for each, the distribution it was drawn from, [R, V]; None where it was not drawn: all of it is that token's.
        confidences: for each, fp32 [R]; none where nobody asks.
        counts: for each row, how many of its drafts are the source's, [R]; those behind only fill the pass. None: all.
        states: what the source's shared layers left at the newest token and the drafts, [R, g+1, D]; None: nothing.
    """

    tokens: list[torch.Tensor] = field(default_factory=list)
    q: list[torch.Tensor | None] = field(default_factory=list)
    confidences: list[torch.Tensor] = field(default_factory=list)
    states: torch.Tensor | None = None
    counts: list[int] | None = None

    def of_rows(self, rows: int) -> list[int]:
        """How many drafts of each row are the source's."""
        return [len(self)] * rows if self.counts is None else self.counts

    def __len__(self) -> int:
        return len(self.tokens)


class Source:
    """One source.

    Attributes:
        name: as statistics and the log write it.
        layer: the layer that is told of its accepted tokens.
        shared: decoder layers that drafting runs on every draft and verification need not run again.
        each: what one draft takes, in decoder layers, until it is measured; not looked at where layers are shared.
    """

    name: str
    layer: int
    shared: int = 0
    each: float = 0.0

    def draft(self, cycle: Cycle) -> Draft:
        """1 to `cycle.most` drafts for each row, as `Drafting` wants. Laps: `early` for passes, `check` for others."""
        raise NotImplementedError

    def agrees(self, runner: LayerRunner, want: torch.Tensor, block: Block, at: slice) -> torch.Tensor | None:
        """Where in a block of prompts that `runner` reads, bool [R, n], the source says what the full model says,
        `want` [R, n].

        None where that tells nothing.
        """

    def grew(self, row: int, tokens: list[int]) -> None:
        """These tokens stand behind the text of a row (of the batch) now, whoever drafted them."""

    def forget(self, row: int) -> None:
        """A row has left; another one may have its number."""


class ExitSource(Source):
    """An exit that reads the first k layers of the model, whose states verification goes on from.

    Early layers run once more than drafts are read: on the last draft, for verification.
    """

    def __init__(
        self, k: int, runner: LayerRunner, sequences: Sequences, drafting: Drafting, short: ShortHead | None = None
    ):
        """short: the head for the tokens that drafts are chosen among; None: all that the exit's own head scores."""
        self.k, self.runner, self.sequences, self.drafting, self.short = k, runner, sequences, drafting, short
        self.name, self.layer, self.shared = f"exit {k}", k, k
        self.ids = None if short is None else short.shortlist.ids(runner.device)
        self.waits_are_free = waits_are_free(runner.device)

    def draft(self, cycle: Cycle) -> Draft:
        draft, tokens, chances, more = Draft(), cycle.tokens, [1.0] * len(cycle.rows), True
        while more:
            block, hidden = self.early(cycle, len(draft), tokens)
            cycle.clock.lap("early")
            tokens, scores, q = self.pick(cycle, hidden, block, draft)
            draft.tokens.append(tokens)
            draft.q.append(q)
            if scores is not None:
                draft.confidences.append(scores)
                chances = self._chances(chances, scores)
            more = len(draft) < cycle.most and self.drafting.goes_on(len(draft), chances)
            cycle.clock.lap("check")
        self.finish(cycle, draft)
        return draft

    def early(self, cycle: Cycle, drafted: int, tokens: torch.Tensor) -> tuple[Block, torch.Tensor]:
        """The first k layers on tokens [R], `drafted` positions behind the newest ones: hidden states [R, 1, D]."""
        block = self.runner.block([start + drafted for start in cycle.starts], 1)
        return block, self.runner.run(self.runner.embed(tokens[:, None]), block, 0, self.k)

    def finish(self, cycle: Cycle, draft: Draft) -> None:
        """What verification needs, after the last draft."""
        self.early(cycle, len(draft), draft.tokens[-1])
        draft.states = self.runner.recall(self.k, self.runner.block(cycle.starts, len(draft) + 1))
        cycle.clock.lap("early")

    def _chances(self, chances: list[float], scores: torch.Tensor) -> list[float]:
        """For each row, that all its drafts are right: chances before the last draft, whose confidences are [R].

        Where looking at them would hold the device up, what is known of the exit on the whole has to do.
        """
        drafting, name = self.drafting, self.name
        if self.waits_are_free:
            return [c * drafting.calibrated(name, value) for c, value in zip(chances, read(scores)[0], strict=True)]
        return [c * drafting.acceptance(name) for c in chances]

    def pick(
        self, cycle: Cycle, hidden: torch.Tensor, block: Block, draft: Draft
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Next draft of each row: (tokens [R], confidences [R], the distribution they were drawn from [R, V]).

        No confidences where the draft's length is fixed; no distribution where the most likely token is taken.
        """
        sequences = self.sequences
        logits = self.runner.exit_logits(self.k, hidden, block, -1, self.short)
        adaptive = self.drafting.length is None
        scores, best = score("threshold", logits) if adaptive else (None, most_likely(logits))
        if not sequences.do_sample and not sequences.draft_processors:
            return (best if self.ids is None else self.ids[best]), scores, None
        if self.short is not None:
            logits = self.short.shortlist.over_vocabulary(logits)
        if draft.tokens and looks_back(sequences.processors):
            sequences.try_tokens(cycle.index, cycle.rows, len(draft) - 1, draft.tokens[-1])
        prefixes = [sequences.lengths[row] + len(draft) for row in cycle.rows]
        processed = sequences.process(logits, cycle.rows, prefixes, draft=True)
        if not sequences.do_sample:
            return most_likely(processed), scores, None
        q = processed.softmax(-1)
        # A processor may forbid the whole shortlist: then any token will do, and is rejected or accepted by the rule.
        q = torch.where(q.isnan().any(-1, keepdim=True), torch.full_like(q, 1 / q.shape[-1]), q)
        return torch.multinomial(q, 1)[:, 0], scores, q

    def agrees(self, runner: LayerRunner, want: torch.Tensor, block: Block, at: slice) -> torch.Tensor | None:
        k = self.k
        tokens = most_likely(runner.exit_logits(k, runner.recall(k, block), block, at, self.short))
        return (tokens if self.ids is None else self.ids[tokens]) == want
