"""Decoding with a model that is cut over pipeline stages and tensor ranks.

Every token runs through every layer, so that all caches hold what they hold without exits. But the answer leaves early:
the exit that decides tells the first stage at once, and that stage starts the row's next token while later stages still
fill their caches with this one. The rows of a batch are separate streams that fill the pipe together.
In lossless decoding an exit's answer is a draft, and the last stage answers too: see `pipeline_lossless`.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ee_scale.backbone.stages import StagePlan
from ee_scale.errors import UserError
from ee_scale.exits.stage import TuningStage
from ee_scale.families.sizes import with_layers
from ee_scale.grid import Grid
from ee_scale.inference.pipeline_lossless import PipelineSpeculation, Reach, reach
from ee_scale.inference.pipeline_messages import Decision, Line, Token
from ee_scale.inference.pipeline_model import drafting_exit, stage_costs
from ee_scale.inference.pipeline_rows import Row, RowMaker
from ee_scale.modeling.attention import without_cudnn
from ee_scale.modeling.kinds import Tap
from ee_scale.modeling.policies import Decisions, ExitPolicy
from ee_scale.modeling.transfers import read
from ee_scale.modeling.versions import CACHE

Key = TypeVar("Key", int, tuple[int, int])


@dataclass(frozen=True)
class Decoded:
    """New tokens of each row (with the end mark, if it came), the layer each came from, and its score.

    The score is the policy's at the deepest exit that was asked, NaN if none was; in lossless decoding, that of a draft
    that was in flight and accepted. stats: how many drafts set out (`drafted`), and how many of them were `accepted`.
    """

    tokens: list[list[int]]
    exit_layers: list[list[int]]
    exit_confidences: list[list[float]]
    stats: dict[str, int] = field(default_factory=dict)


def check_pipeline(tp: int, pp: int, policy_name: str | None, dp: int = 1) -> None:
    """Refuse what several devices cannot decode. Raises `UserError`."""
    if dp != 1:
        raise UserError(f"parallel.dp={dp}: decoding has no replicas; use dp=1 and start one command per replica")
    if policy_name == "lossless" and pp == 1 and tp > 1:
        raise UserError(
            f"policy=lossless: on a grid one stage drafts while later ones verify, but parallel.pp={pp} with "
            f"parallel.tp={tp}; use pp=2 or more, tp=1, or policy=threshold"
        )


class PipelineDecoder:
    """This rank's part in decoding. All ranks make one and call `generate` with the same arguments."""

    def __init__(self, stage: TuningStage, plan: StagePlan, grid: Grid, generation_config: GenerationConfig):
        """`stage` comes from `load_decoding_stage` on the same `plan`."""
        check_pipeline(grid.layout.tp, grid.layout.pp, None, grid.layout.dp)
        self.stage, self.plan, self.grid = stage, plan, grid
        self.config = stage.backbone.model_config
        # An exit's own layer is a copy of the last one.
        self.exit_config = with_layers(self.config, [self.config.num_hidden_layers - 1])
        self.is_last = plan.is_last(grid.stage)
        dtype = next(stage.backbone.parameters()).dtype
        self.line = Line(grid, self.config.hidden_size, self.config.vocab_size, dtype)
        self.make_rows = RowMaker(self.config, generation_config, grid.device)
        stage.on_exit(self._at_exit)

    @torch.no_grad()
    @without_cudnn()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        policy: ExitPolicy,
        *,
        seed: int = 0,
        first_row: int = 0,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: object,
    ) -> Decoded | None:
        """Continue each prompt (token ids, any lengths). Returns the texts on the ranks of the first stage, else None.

        settings: those of transformers' `generate` (`max_new_tokens`, `do_sample`, `temperature`, ...), over the
        model's own generation config; stop strings need the `tokenizer`. Each row draws from a generator of its own,
        made of the seed and its number, from `first_row` on. `streamer` gets the tokens of a single prompt, on rank 0.
        Lossless: the plan's first stage with an exit drafts, from its deepest one.
        Raises `UserError` for an empty prompt or what several devices cannot do.
        """
        check_pipeline(self.grid.layout.tp, self.grid.layout.pp, policy.name)
        if streamer is not None and len(prompts) > 1:
            raise UserError(f"streaming needs a single prompt, not {len(prompts)}")
        rows, settings = self.make_rows(prompts, seed, first_row, settings, tokenizer)
        self.policy, self.reach = self._who_drafts(policy, len(rows))
        self.decisions = Decisions(self.policy, len(rows), self.grid.device)
        self.numbers = torch.arange(len(rows), device=self.grid.device)
        self.caches: dict[int, DynamicCache] = {}
        self.exit_caches: dict[tuple[int, int], DynamicCache] = {}
        # Without them an answer is one small message.
        self.wants_logits = settings.do_sample or any(row.processors for row in rows)
        self.line.open(self.reach.in_flight if self.reach else len(rows), policy.max_pending)
        if self.grid.stage == 0:
            stats = self._lead(rows, streamer if self.grid.rank == 0 else None)
        else:
            self._follow()
        if not self.is_last:
            self.line.pass_on(None, None)
        self.line.close()
        self.caches, self.exit_caches = {}, {}
        if self.grid.stage > 0:
            return None
        return Decoded([row.tokens for row in rows], [row.layers for row in rows], [row.scores for row in rows], stats)

    def _who_drafts(self, policy: ExitPolicy, rows: int) -> tuple[ExitPolicy, Reach | None]:
        """The policy that exits are asked by, and how far drafts run ahead (None: nobody drafts)."""
        if policy.name != "lossless":
            return policy, None
        if policy.draft_length == 0:
            return replace(policy, layers=()), None
        k = drafting_exit(self.plan, policy.layers)
        costs = stage_costs(self.config, self.stage.spec, self.plan, k)
        far = reach(self.plan.stage_of(k), costs, rows, policy.draft_length)
        return replace(policy, layers=(k,), layer=k), far

    def _lead(self, rows: list[Row], streamer: BaseStreamer | None) -> dict[str, int]:
        """The first stage: what sets out, and what is made of the answers. Returns what became of drafts."""

        def tell(row: Row) -> None:
            if hasattr(streamer, "put_exits"):
                streamer.put_exits(row.tokens[-1:], row.layers[-1:])
            if streamer is not None:
                streamer.put(row.ids[0, -1:].cpu())

        if streamer is not None:
            streamer.put(rows[0].ids.cpu())
        drafted = accepted = 0
        if self.reach is None:
            self._token_by_token(rows, tell)
        else:
            layers, hear = (self.policy.layers[0], self.config.num_hidden_layers), self._hear
            drafted, accepted = PipelineSpeculation(rows, *layers, self.reach, self._launch, hear, tell).run()
        if streamer is not None:
            streamer.end()
        return {"drafted": drafted, "accepted": accepted} if self.policy.name == "lossless" else {}

    def _token_by_token(self, rows: list[Row], tell: Callable[[Row], None]) -> None:
        """One token of each row is in flight, and the oldest is waited for."""
        flight = deque((number, *self._launch(number, row.ids, 0)) for number, row in enumerate(rows))
        while flight:
            number, token, decision = flight.popleft()
            row, decision = rows[number], decision or self._await(token)
            row.keep(row.choose(decision), decision.layer, decision.score)
            tell(row)
            if not row.ended:
                flight.append((number, *self._launch(number, row.ids[:, -1:], row.ids.shape[1] - 1)))

    def _launch(self, row: int, ids: torch.Tensor, start: int) -> tuple[Token, Decision | None]:
        """Run this stage on ids [1, S] and send them on; returns the decision, if it was made here."""
        token = Token(row, start, ids.shape[1])
        return token, self._run(token, ids)

    def _await(self, token: Token) -> Decision:
        """The decision about the oldest token in flight: later stages are heard in their order."""
        for stage in range(1, self.plan.launched):
            if self._speaks(stage, token):
                decision = self._hear(stage)
                if decision.layer:
                    return decision
        raise AssertionError("the last stage always decides")

    def _hear(self, stage: int) -> Decision:
        return self.line.hear(stage, self.wants_logits)

    def _follow(self) -> None:
        """Any other stage: what comes from the stage before, until the batch ends."""
        while (message := self.line.receive()) is not None:
            self._run(*message)

    def _run(self, token: Token, x: torch.Tensor) -> Decision | None:
        """This stage's layers on ids [1, S] or hidden states [1, S, D]; the exits are asked on the way.

        Sends answer and hidden states on; returns the decision, if it was made here.
        """
        open_before = not token.decided
        self.now, self.decision = token, None
        self.decisions.resume(token.row, token.last, token.agreed)
        cache = self._cache(self.caches, token.row, self.stage.backbone.base.config)
        hidden = self.stage.backbone(x, use_cache=True, **{CACHE: cache})
        if self.is_last and (self.reach is not None or not token.decided):
            logits = self._final_logits(hidden)
            self._decide(self.config.num_hidden_layers, int(logits.argmax(-1)), logits)
        token.last, token.agreed = self.decisions.said(token.row)
        if open_before and not token.decided and self.grid.stage > 0 and self._speaks(self.grid.stage, token):
            self.line.answer(Decision(), self.wants_logits)
        if not self.is_last:
            self.line.pass_on(token, hidden)
        return self.decision

    def _at_exit(self, k: int, tap: Tap) -> None:
        """Layer k of this stage has run on the current token."""
        token = self.now
        if k not in self.policy.layers:
            return
        silent = token.decided or (token.prefill and self.reach is None)
        if self.stage.spec.exit_kind.attends:
            cache = self._cache(self.exit_caches, (k, token.row), self.exit_config)
            hidden = self.stage.exit_hidden(k, tap, cache)  # its cache needs every token
        elif not silent:
            hidden = self.stage.exit_hidden(k, tap.at(slice(-1, None)))
        if silent:
            return
        head = self.stage.exit_heads[str(k)]
        scored = head.scored_logits(hidden[:, -1], self.stage.backbone.lm_head)
        logits = head.over_vocabulary(self._whole(scored, head.spec.scored(self.config.vocab_size)))
        (leave,), (token.score,), (best,) = read(*self.decisions.ask(k, logits, self.numbers[token.row, None]))
        if leave:
            self._decide(k, best, logits)

    def _decide(self, layer: int, best: int, logits: torch.Tensor) -> None:
        """Answer with a layer's most likely token and logits [1, V]: at once, later layers still have to run."""
        kept = logits if self.wants_logits else None
        self.now.decided, self.decision = True, Decision(best, layer, self.now.score, kept)
        if self.grid.stage > 0:
            self.line.answer(self.decision, self.wants_logits)

    def _speaks(self, stage: int, token: Token) -> bool:
        """Whether a stage says anything about a token that arrives undecided."""
        has_exits = not token.prefill and any(k in self.policy.layers for k in self.plan.exits(stage))
        return has_exits or self.plan.is_last(stage)

    def _final_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normed states [1, S, D] -> the model's own logits [1, V] at the last position."""
        backbone = self.stage.backbone
        return backbone.family.cap(self._whole(backbone.lm_head(hidden[:, -1]), self.config.vocab_size), self.config)

    def _whole(self, logits: torch.Tensor, count: int) -> torch.Tensor:
        """Logits [1, V/tp] of V = `count` tokens -> [1, V], the same bits on every tensor rank."""
        if self.grid.layout.tp > 1:
            parts = [torch.empty_like(logits) for _ in range(self.grid.layout.tp)]
            dist.all_gather(parts, logits.contiguous(), group=self.grid.tp_group)
            logits = torch.cat(parts, dim=-1)
        return logits[:, :count]

    def _cache(self, caches: dict[Key, DynamicCache], key: Key, config: PreTrainedConfig) -> DynamicCache:
        """Keys and values before the current token."""
        if key not in caches:
            # One that forgets what has left a sliding window could not take drafts back.
            caches[key] = DynamicCache(config=config if self.reach is None else None)
        surplus = caches[key].get_seq_length() - self.now.start
        if surplus > 0:
            caches[key].crop(-surplus)
        return caches[key]
