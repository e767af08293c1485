"""Lossless decoding: an exit drafts, the full model checks all drafts in one pass.

One cycle (LayerSkip's sharing of early layers, arXiv 2404.16710, with columns that are positions, for any batch):
early layers run once per drafted token; the deep layers then run on all of them at once, from the hidden states that
the early layers left; the accepted prefix and one token of the full model are kept. Rejected columns are simply
overwritten. Greedy: the tokens of the full model. Sampling: its distribution, by the rule of arXiv 2211.17192.
R rows, g drafts, V vocabulary.
"""

from math import nan
from typing import Any

import torch

from .clocks import start_clock
from .drafting import SEEN, Drafting, known_of
from .layer_runner import Block, LayerRunner, ShortHead
from .loop import DecodeLoop
from .policies import score
from .sequences import looks_back
from .shortlist import Shortlist
from .transfers import read, send, waits_are_free


class Speculation(DecodeLoop):
    """One cycle per step; rows accept different numbers of drafts."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        policy, runner = self.policy, self.runner
        known = known_of(runner.model, runner.device, runner.dtype, len(self.pads), policy.layers, policy.shortlist)
        self.drafting = Drafting(policy.layers, runner.num_layers, policy.max_draft, policy.draft_length, known)
        self.short: dict[int, ShortHead] = {}
        self.shortlist: Shortlist | None = None
        self.ids: torch.Tensor | None = None
        if policy.shortlist is not None:
            self.shortlist = Shortlist(policy.shortlist, runner.model.config.vocab_size)
            self.ids = self.shortlist.ids(runner.device)
            self.short = {k: ShortHead(runner.model, k, self.shortlist) for k in policy.layers}
        self.waits_are_free = waits_are_free(runner.device)
        self.drafted = self.accepted = self.slot_cycles = 0
        self.used = dict.fromkeys(policy.layers, 0)

    def step(self) -> None:
        """Draft, verify, accept."""
        runner, drafting = self.runner, self.drafting
        clock = start_clock(runner.device)
        k, accepted = drafting.start(), self.accepted
        starts = list(self.next)
        most = min(max(self.sequences.room(row) for row in self.rows) - 1, drafting.max_draft)
        tokens, drafts, confidences, q = self.tokens, [], [], []  # all on the device
        chances = [1.0] * len(starts)
        more = most > 0 and drafting.goes_on(0, chances)
        while True:
            block = runner.block([start + len(drafts) for start in starts], 1)
            hidden = runner.run(runner.embed(tokens[:, None]), block, 0, k)
            clock.lap("early")
            if not more:
                break
            tokens, scores, probabilities = self._draft(k, hidden, block, drafts)
            drafts.append(tokens)
            q.append(probabilities)
            if scores is not None:
                confidences.append(scores)
                chances = self._chances(k, chances, scores)
            more = len(drafts) < most and drafting.goes_on(len(drafts), chances)
            clock.lap("check")
        block = runner.block(starts, len(drafts) + 1)
        states = hidden if not drafts else runner.recall(k, block)
        hidden = runner.run(states, block, k, runner.num_layers)
        clock.lap("late")
        logits = runner.final_logits(hidden)
        if self.sequences.in_step:
            new = self._commit_in_step(k, logits, drafts, q, confidences)
        else:
            new = self._commit(k, self._verify(logits, drafts, q), logits, drafts, confidences)
        self.used[k] += 1
        if drafts:
            drafting.tried(k, self.accepted - accepted)
        clock.end("tail")
        drafting.took(k, len(drafts), clock["early"], clock["check"], clock["late"], clock["tail"])
        drafting.cycle_done(new, len(starts), clock.total())

    def _chances(self, k: int, chances: list[float], scores: torch.Tensor) -> list[float]:
        """For each row, that all its drafts are right: chances before the last draft, whose confidences are [R].

        Where looking at them would hold the device up, what is known of the exit on the whole has to do.
        """
        if self.waits_are_free:
            return [c * self.drafting.calibrated(k, value) for c, value in zip(chances, read(scores)[0], strict=True)]
        return [c * self.drafting.acceptance(k) for c in chances]

    def _draft(
        self, k: int, hidden: torch.Tensor, block: Block, drafts: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Next draft of each row: (tokens [R], confidences [R], the distribution they were drawn from [R, V]).

        No confidences where the draft's length is fixed; no distribution where the most likely token is taken.
        """
        sequences = self.sequences
        logits = self.runner.exit_logits(k, hidden, block, -1, self.short.get(k))
        adaptive = self.drafting.length is None
        scores, best = score("threshold", logits) if adaptive else (None, logits.argmax(-1))
        if not sequences.do_sample and not sequences.draft_processors:
            return (best if self.ids is None else self.ids[best]), scores, None
        if self.shortlist is not None:
            logits = self.shortlist.over_vocabulary(logits)
        self._try(drafts)
        prefixes = [sequences.lengths[row] + len(drafts) for row in self.rows]
        processed = sequences.process(logits, self.rows, prefixes, draft=True)
        if not sequences.do_sample:
            return processed.argmax(-1), scores, None
        q = processed.softmax(-1)
        # A processor may forbid the whole shortlist: then any token will do, and is rejected or accepted by the rule.
        q = torch.where(q.isnan().any(-1, keepdim=True), torch.full_like(q, 1 / q.shape[-1]), q)
        return torch.multinomial(q, 1)[:, 0], scores, q

    def _try(self, drafts: list[torch.Tensor]) -> None:
        """Write drafts behind the texts, where processors look for what came before."""
        if drafts and looks_back(self.sequences.processors):
            self.sequences.try_tokens(self.index, self.rows, len(drafts) - 1, drafts[-1])

    def _verify(
        self, logits: torch.Tensor, drafts: list[torch.Tensor], q: list[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Final logits [R, g+1, V] -> (drafts accepted [R], the tokens after them [R], scores [R, g+1, V])."""
        sequences, count, scores = self.sequences, len(drafts), logits
        if sequences.processors or sequences.do_sample:
            self._try(drafts)
            rows = [row for row in self.rows for _ in range(count + 1)]
            prefixes = [sequences.lengths[row] + i for row in self.rows for i in range(count + 1)]
            scores = sequences.process(logits.flatten(0, 1), rows, prefixes).view(logits.shape)
        tried = torch.stack(drafts, 1) if drafts else self.tokens.new_zeros(len(self.rows), 0)
        if sequences.do_sample:
            return *accept_sampled(scores.float().softmax(-1), tried, q), scores
        target = scores.argmax(-1)
        accepted = (tried == target[:, :count]).long().cumprod(1).sum(1)
        return accepted, target.gather(1, accepted[:, None])[:, 0], scores

    def _commit(
        self,
        k: int,
        verified: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        logits: torch.Tensor,
        drafts: list[torch.Tensor],
        confidences: list[torch.Tensor],
    ) -> int:
        """Keep the accepted prefixes; returns the number of new tokens of all rows."""
        sequences, runner, count = self.sequences, self.runner, len(drafts)
        accepted, self.tokens, scores = verified
        right, after, *rest = read(accepted, self.tokens, *drafts, *confidences)
        tried = [list(row) for row in zip(*rest[:count], strict=True)] or [[] for _ in right]
        seen = [list(row) for row in zip(*rest[count:], strict=True)] or [[nan] * count for _ in right]
        for slot, row in enumerate(self.rows) if sequences.keeps_scores else ():
            for i in range(min(right[slot] + 1, sequences.room(row))):
                sequences.keep_scores(row, sequences.lengths[row] + i, scores[slot, i], logits[slot, i])
        counts = sequences.append(
            self.rows,
            [[*row[:m], token] for row, m, token in zip(tried, right, after, strict=True)],
            [[k] * m + [runner.num_layers] for m in right],
            [[*row[:m], nan] for row, m in zip(seen, right, strict=True)],
            count + 1,
        )
        self.next = [place + new for place, new in zip(self.next, counts, strict=True)]
        self._count([min(m, new) for m, new in zip(right, counts, strict=True)], count)
        if self.drafting.length is None:
            for row, m in zip(seen, right, strict=True):
                self.drafting.fared(k, row, m)
        runner.clip(self.next)
        return sum(counts)

    def _count(self, accepted: list[int], drafted: int) -> None:
        """Accepted drafts of each row, of so many drafted."""
        self.drafted += drafted * len(accepted)
        self.accepted += sum(accepted)
        self.slot_cycles += len(accepted)

    def _commit_in_step(
        self,
        k: int,
        logits: torch.Tensor,
        drafts: list[torch.Tensor],
        q: list[torch.Tensor | None],
        confidences: list[torch.Tensor],
    ) -> int:
        """Verify and keep, token by token: final logits [R, g+1, V]; returns the number of new tokens of all rows.

        All rows stop where one rejects its draft, so that processors, criteria and streamers are called exactly as in
        plain decoding: once per token, behind the texts that stand.
        """
        sequences, runner, total = self.sequences, self.runner, 0
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
            layers = [k if yes else runner.num_layers for yes in good]
            seen = [known[i][slot] if yes else nan for slot, yes in zip(slots, good, strict=True)]
            sequences.append_to_all(rows, tokens, layers, seen, ended)
            total += len(slots)
            for slot, yes in zip(slots, good, strict=True):
                self.next[slot] += 1
                right[slot] += yes
            if not all(good):
                break
        self._count(right, len(drafts))
        if self.drafting.length is None:
            for row, m in zip(zip(*known[: i + 1], strict=True), right, strict=False):
                self.drafting.fared(k, row, m)
        runner.clip(self.next)
        return total

    def _judge(
        self, scores: torch.Tensor, draft: torch.Tensor, q: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft per row [N] against the full model's scores [N, V]: (accepted [N], the token that stands [N])."""
        if not self.sequences.do_sample:
            target = scores.argmax(-1)
            return target == draft, target
        p = scores.softmax(-1)
        accepted, other = accept_sampled(torch.stack([p, p], 1), draft[:, None], [q])
        return accepted.bool(), torch.where(accepted.bool(), draft, other)

    def saw_prompt(self, runner: LayerRunner, lengths: list[int], hidden: torch.Tensor, block: Block) -> None:
        """First estimates of the exits' acceptance: how often they agree with the final layer on the prompt."""
        if self.policy.draft_length is not None or block.end < max(lengths):
            return
        width = min(SEEN, block.length)  # logits are dear
        last = slice(block.length - width, None)
        want = runner.final_logits(hidden[:, last]).argmax(-1)
        ends = send(lengths, runner.device)[:, None]
        valid = runner.numbers[block.end - width : block.end] < ends
        sums = [valid.sum()]
        for k in self.policy.layers:
            tokens = runner.exit_logits(k, runner.recall(k, block), block, last, self.short.get(k)).argmax(-1)
            tokens = tokens if self.ids is None else self.ids[tokens]
            sums.append(((tokens == want) & valid).sum())
        ((count, *agreed),) = read(torch.stack(sums))
        for k, right in zip(self.policy.layers, agreed, strict=True):
            self.drafting.foresaw(k, right, count)
        runner.clip(lengths)

    def stats(self) -> dict[str, Any]:
        """Drafts and their fate."""
        return super().stats() | {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "cycles": self.passes,
            "slot_cycles": self.slot_cycles,
            "cycles_by_exit": self.used,
            "acceptance": self.accepted / self.drafted if self.drafted else 0.0,
        }


def accept_sampled(
    p: torch.Tensor, drafts: torch.Tensor, q: list[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Speculative sampling (arXiv 2211.17192), for rows at once.

    p [R, g+1, V]: the full model's distributions; drafts [R, g]; q: g distributions [R, V] that the drafts were drawn
    from. Accept draft x with probability min(1, p(x) / q(x)); after the first rejection draw from norm(max(0, p - q)),
    after none from p. Returns (accepted [R], the token after them [R]).
    """
    count = drafts.shape[1]
    # Behind the last draft there is nothing to subtract.
    q_all = torch.stack([*q, torch.zeros_like(p[:, 0])], 1)
    p_drafts = p[:, :count].gather(2, drafts[..., None])[..., 0]
    q_drafts = q_all[:, :count].gather(2, drafts[..., None])[..., 0]
    # u q < p instead of u < p / q: no division by zero.
    fine = torch.rand_like(p_drafts) * q_drafts < p_drafts
    accepted = fine.long().cumprod(1).sum(1)
    rows = torch.arange(len(p), device=p.device)
    last = p[rows, accepted]
    rest = (last - q_all[rows, accepted]).clamp(min=0)
    # Rounding can leave nothing where p = q: then p itself is right.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, last)
    return accepted, torch.multinomial(rest, 1)[:, 0]
