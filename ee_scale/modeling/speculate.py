"""Lossless decoding: a source drafts, the full model checks all drafts in one pass.

One cycle, for any batch, with columns that are positions: a source drafts; the layers that it does not share with the
model then run on all drafts at once (an exit shares its early layers, as in LayerSkip, arXiv 2404.16710); the accepted
prefix and one token of the full model are kept. Rejected columns are simply overwritten. Greedy: the tokens of the full
model. Sampling: its distribution, by the rule of arXiv 2211.17192. R rows, g drafts, V vocabulary.
"""

from collections import Counter
from dataclasses import dataclass
from math import nan
from typing import Any

import torch

from .clocks import start_clock
from .drafting import SEEN, Drafting, known_of
from .int8_source import Int8Source
from .layer_runner import Block, LayerRunner
from .loop import DecodeLoop
from .policies import most_likely
from .prompt_lookup import PromptSource
from .sequences import looks_back
from .short_head import ShortHead
from .shortlist import Shortlist
from .sources import Cycle, Draft, ExitSource, Source
from .transfers import read, send


@dataclass
class Fate:
    """What became of a source's drafts: cycles that it drafted in, drafts of all rows, and those that were accepted."""

    cycles: int = 0
    drafted: int = 0
    accepted: int = 0


class Speculation(DecodeLoop):
    """One cycle per step; rows accept different numbers of drafts."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        policy, runner = self.policy, self.runner
        known = known_of(runner.model, runner.device, runner.dtype, len(self.pads), policy.layers, policy.shortlist)
        self.drafting = Drafting(runner.num_layers, policy.max_draft, policy.draft_length, known)
        kinds = [ExitSource] if policy.draft_weights == "model" else [Int8Source]
        if kinds == [Int8Source] and policy.draft_length is None:
            kinds.append(ExitSource)  # measured costs decide
        short: dict[int, ShortHead] = {}
        if policy.shortlist is not None:
            shortlist = Shortlist(policy.shortlist, runner.model.config.vocab_size)
            short = {k: ShortHead(runner.model, k, shortlist) for k in policy.layers}
        sources: list[Source] = [
            kind(k, runner, self.sequences, self.drafting, short.get(k)) for kind in kinds for k in policy.layers
        ]
        self.prompt: PromptSource | None = None
        if "prompt" in policy.draft_sources:
            self.prompt = PromptSource(runner.num_layers, self.sequences, self.pads, self.drafting)
            sources.append(self.prompt)
        self.sources = {source.name: source for source in sources}
        self.drafting.meet(self.sources.values())
        self.fates = {name: Fate() for name in self.sources}
        self.slot_cycles = self.row_drafts = 0
        self.accepted_at: Counter[int] = Counter()  # place in a draft, from 0 -> accepted ones

    def step(self) -> None:
        """Draft, verify, accept."""
        runner, drafting = self.runner, self.drafting
        clock = start_clock(runner.device)
        matches = self.prompt.matches(self.rows) if self.prompt is not None else ()
        source, starts = self.sources[drafting.start(matches)], list(self.next)
        most = min(max(self.sequences.room(row) for row in self.rows) - 1, drafting.max_draft)
        draft, first = Draft(), 0
        if most > 0 and drafting.goes_on(0, [1.0] * len(starts)):
            draft = source.draft(Cycle(self.rows, self.index, starts, self.tokens, most, clock))
            first = source.shared
        block = runner.block(starts, len(draft) + 1)
        states = runner.embed(torch.stack([self.tokens, *draft.tokens], 1)) if draft.states is None else draft.states
        hidden = runner.run(states, block, first, runner.num_layers)
        clock.lap("late")
        logits, fate = runner.final_logits(hidden), self.fates[source.name]
        accepted = fate.accepted
        if self.sequences.in_step:
            new = self._commit_in_step(source, logits, draft)
        else:
            new = self._commit(source, self._verify(logits, draft), logits, draft)
        if draft.tokens:
            fate.cycles += 1
            drafting.tried(source.name, fate.accepted - accepted)
        clock.end("tail")
        drafting.took(source.name, len(draft), clock["early"], clock["check"], clock["late"], clock["tail"])
        drafting.cycle_done(new, len(starts), clock.total())

    def _verify(self, logits: torch.Tensor, draft: Draft) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Final logits [R, g+1, V] -> (drafts accepted [R], the tokens after them [R], scores [R, g+1, V])."""
        sequences, drafts, count, scores = self.sequences, draft.tokens, len(draft), logits
        if sequences.processors or sequences.do_sample:
            if looks_back(sequences.processors):
                for drafted, tokens in enumerate(drafts):
                    sequences.try_tokens(self.index, self.rows, drafted, tokens)
            rows = [row for row in self.rows for _ in range(count + 1)]
            prefixes = [sequences.lengths[row] + i for row in self.rows for i in range(count + 1)]
            scores = sequences.process(logits.flatten(0, 1), rows, prefixes).view(logits.shape)
        tried = torch.stack(drafts, 1) if drafts else self.tokens.new_zeros(len(self.rows), 0)
        if sequences.do_sample:
            return *accept_sampled(scores.float().softmax(-1), tried, draft.q), scores
        target = most_likely(scores)
        accepted = (tried == target[:, :count]).long().cumprod(1).sum(1)
        return accepted, target.gather(1, accepted[:, None])[:, 0], scores

    def _commit(
        self,
        source: Source,
        verified: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        logits: torch.Tensor,
        draft: Draft,
    ) -> int:
        """Keep the accepted prefixes; returns the number of new tokens of all rows."""
        sequences, runner, count = self.sequences, self.runner, len(draft)
        accepted, self.tokens, scores = verified
        right, after, *rest = read(accepted, self.tokens, *draft.tokens, *draft.confidences)
        tried = [list(row) for row in zip(*rest[:count], strict=True)] or [[] for _ in right]
        seen = [list(row) for row in zip(*rest[count:], strict=True)] or [[nan] * count for _ in right]
        for slot, row in enumerate(self.rows) if sequences.keeps_scores else ():
            for i in range(min(right[slot] + 1, sequences.room(row))):
                sequences.keep_scores(row, sequences.lengths[row] + i, scores[slot, i], logits[slot, i])
        # Drafts that only fill the pass may be right too; they are nobody's.
        own = [min(m, most) for m, most in zip(right, draft.of_rows(len(right)), strict=True)]
        starts = [len(sequences.layers[row]) for row in self.rows]
        new = [[*row[:m], token] for row, m, token in zip(tried, right, after, strict=True)]
        counts = sequences.append(
            self.rows,
            new,
            [[source.layer] * m + [runner.num_layers] * (n + 1 - m) for m, n in zip(own, right, strict=True)],
            [[*row[:m], nan] for row, m in zip(seen, right, strict=True)],
            count + 1,
        )
        self.next = [place + new for place, new in zip(self.next, counts, strict=True)]
        for row, start, m, tokens, n in zip(self.rows, starts, own, new, counts, strict=True):
            self._stand(source, row, start, tokens[:n], m)
        self._count(source, [min(m, n) for m, n in zip(own, counts, strict=True)], draft)
        if draft.confidences:
            for row, m in zip(seen, right, strict=True):
                self.drafting.fared(source.name, row, m)
        runner.clip(self.next)
        return sum(counts)

    def _stand(self, source: Source, row: int, start: int, tokens: list[int], own: int) -> None:
        """New tokens of a row, from its new token `start` on: the first `own` are accepted drafts of this source."""
        for index in range(start, start + min(own, len(tokens))):
            self.trail.sources[row, index] = source.name
        for other in self.sources.values():
            other.grew(row, tokens)

    def _count(self, source: Source, accepted: list[int], draft: Draft) -> None:
        """Accepted drafts of each row."""
        fate, counts = self.fates[source.name], draft.of_rows(len(accepted))
        fate.drafted += sum(counts)
        fate.accepted += sum(accepted)
        self.row_drafts += sum(count > 0 for count in counts)
        self.accepted_at.update(place for count in accepted for place in range(count))
        self.slot_cycles += len(accepted)

    def _commit_in_step(self, source: Source, logits: torch.Tensor, draft: Draft) -> int:
        """Verify and keep, token by token: final logits [R, g+1, V]; returns the number of new tokens of all rows.

        All rows stop where one rejects its draft, so that processors, criteria and streamers are called exactly as in
        plain decoding: once per token, behind the texts that stand.
        """
        sequences, runner, total = self.sequences, self.runner, 0
        drafts, q, confidences = draft.tokens, draft.q, draft.confidences
        counts = draft.of_rows(len(self.rows))
        right, known = [0] * len(self.rows), [[nan] * len(self.rows)] * len(drafts)
        sequences.forget_trials(len(drafts))
        for i in range(len(drafts) + 1):
            slots = [slot for slot, row in enumerate(self.rows) if not sequences.done[row]]
            if not slots:
                break
            rows, index = [self.rows[slot] for slot in slots], send(slots, runner.device)
            scores = self.scored(logits[index, i], rows)
            if i < len(drafts):
                fine, chosen = self._judge(scores, drafts[i][index], None if q[i] is None else q[i][index])
            else:
                fine, chosen = torch.zeros_like(index, dtype=torch.bool), sequences.pick(scores, rows)
            self.tokens[index] = chosen
            ended = sequences.write(rows, self.index[index], chosen)
            good, tokens, ended, *first = read(fine, chosen, ended, *(confidences if i == 0 else ()))
            known = first or known
            own = [yes and i < counts[slot] for slot, yes in zip(slots, good, strict=True)]
            layers = [source.layer if yes else runner.num_layers for yes in own]
            seen = [known[i][slot] if yes else nan for slot, yes in zip(slots, good, strict=True)]
            sequences.append_to_all(rows, tokens, layers, seen, ended)
            total += len(slots)
            for slot, row, token, yes in zip(slots, rows, tokens, own, strict=True):
                self._stand(source, row, len(sequences.layers[row]) - 1, [token], int(yes))
                self.next[slot] += 1
                right[slot] += yes
            if not all(good):
                break
        self._count(source, right, draft)
        if self.drafting.length is None and confidences:
            for row, m in zip(zip(*known[: i + 1], strict=True), right, strict=False):
                self.drafting.fared(source.name, row, m)
        runner.clip(self.next)
        return total

    def _judge(
        self, scores: torch.Tensor, draft: torch.Tensor, q: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft per row [N] against the full model's scores [N, V]: (accepted [N], the token that stands [N])."""
        if not self.sequences.do_sample:
            target = most_likely(scores)
            return target == draft, target
        p = scores.softmax(-1)
        accepted, other = accept_sampled(torch.stack([p, p], 1), draft[:, None], [q])
        return accepted.bool(), torch.where(accepted.bool(), draft, other)

    def _keep(self, slots: list[int]) -> None:
        before = self.rows
        super()._keep(slots)
        for row in set(before) - set(self.rows):
            for source in self.sources.values():
                source.forget(row)

    def saw_prompt(self, runner: LayerRunner, lengths: list[int], hidden: torch.Tensor, block: Block) -> None:
        """First estimates of acceptance: how often a source agrees with the final layer on the prompt."""
        if self.policy.draft_length is not None or not self.policy.layers or block.end < max(lengths):
            return
        width = min(SEEN, block.length)  # logits are dear
        last = slice(block.length - width, None)
        want = most_likely(runner.final_logits(hidden[:, last]))
        ends = send(lengths, runner.device)[:, None]
        valid = runner.numbers[block.end - width : block.end] < ends
        said = {name: source.agrees(runner, want, block, last) for name, source in self.sources.items()}
        known = {name: yes for name, yes in said.items() if yes is not None}
        ((count, *agreed),) = read(torch.stack([valid.sum(), *((yes & valid).sum() for yes in known.values())]))
        for name, right in zip(known, agreed, strict=True):
            self.drafting.foresaw(name, right, count)
        runner.clip(lengths)

    def stats(self) -> dict[str, Any]:
        """Drafts and their fate, on the whole and by source."""
        drafted = sum(fate.drafted for fate in self.fates.values())
        accepted = sum(fate.accepted for fate in self.fates.values())
        return super().stats() | {
            "drafted": drafted,
            "accepted": accepted,
            "cycles": self.passes,
            "slot_cycles": self.slot_cycles,
            "sources": {name: vars(fate).copy() for name, fate in self.fates.items()},
            "acceptance": accepted / drafted if drafted else 0.0,
        }


def accept_sampled(
    p: torch.Tensor, drafts: torch.Tensor, q: list[torch.Tensor | None], generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling (arXiv 2211.17192), for rows at once.

    p [R, g+1, V]: the full model's distributions; drafts [R, g]; q: g distributions [R, V] that the drafts were drawn
    from, None for drafts that were not drawn. Accept draft x with probability min(1, p(x) / q(x)); after the first
    rejection draw from norm(max(0, p - q)), after none from p. Returns (accepted [R], the token after them [R]).
    """
    count = drafts.shape[1]
    nothing = torch.zeros_like(p[:, 0])
    known = [nothing.scatter(1, drafts[:, i, None], 1.0) if some is None else some for i, some in enumerate(q)]
    q_all = torch.stack([*known, nothing], 1)  # behind the last draft there is nothing to subtract
    p_drafts = p[:, :count].gather(2, drafts[..., None])[..., 0]
    q_drafts = q_all[:, :count].gather(2, drafts[..., None])[..., 0]
    # u q < p instead of u < p / q: no division by zero.
    chance = torch.rand(p_drafts.shape, dtype=p.dtype, device=p.device, generator=generator)
    fine = chance * q_drafts < p_drafts
    accepted = fine.long().cumprod(1).sum(1)
    rows = torch.arange(len(p), device=p.device)
    last = p[rows, accepted]
    rest = (last - q_all[rows, accepted]).clamp(min=0)
    # Rounding can leave nothing where p = q: then p itself is right.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, last)
    return accepted, torch.multinomial(rest, 1, generator=generator)[:, 0]
