"""Decoding with a model that is cut over pipeline stages and tensor ranks.

Every token runs through every layer, so that all caches hold what they hold without exits. But the answer leaves early:
the exit that decides tells the first stage at once, and that stage starts the row's next token while later stages still
fill their caches with this one. The rows of a batch are separate streams that fill the pipe together.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ee_scale.backbone.stages import StagePlan
from ee_scale.errors import UserError
from ee_scale.exits.stage import TuningStage
from ee_scale.families.sizes import with_layers
from ee_scale.grid import Grid
from ee_scale.inference.pipeline_messages import Decision, Line, Token
from ee_scale.inference.pipeline_rows import Row, RowMaker
from ee_scale.modeling.attention import without_cudnn
from ee_scale.modeling.kinds import Tap
from ee_scale.modeling.policies import Decisions, ExitPolicy
from ee_scale.modeling.transfers import read
from ee_scale.modeling.versions import CACHE


@dataclass(frozen=True)
class Decoded:
    """New tokens of each row (with the end mark, if it came), the layer each came from, and its score.

    The score is the policy's at the deepest exit that was asked, NaN if none was.
    """

    tokens: list[list[int]]
    exit_layers: list[list[int]]
    exit_confidences: list[list[float]]


def check_pipeline(tp: int, pp: int, policy_name: str | None, dp: int = 1) -> None:
    """Refuse what several devices cannot decode. Raises `UserError`."""
    if dp != 1:
        raise UserError(f"parallel.dp={dp}: decoding has no replicas; use dp=1 and start one command per replica")
    if policy_name == "lossless" and tp * pp > 1:
        raise UserError(
            f"policy=lossless drafts and verifies on one device, but parallel.tp={tp} x parallel.pp={pp}; "
            "use tp=1 pp=1, or policy=threshold"
        )


class PipelineDecoder:
    """This rank's part in decoding. All ranks make one and call `generate` with the same arguments."""

    def __init__(self, stage: TuningStage, plan: StagePlan, grid: Grid, generation_config: GenerationConfig):
        """`stage` comes from `load_decoding_stage` on the same `plan`."""
        check_pipeline(grid.layout.tp, grid.layout.pp, None, grid.layout.dp)
        self.stage, self.plan, self.grid = stage, plan, grid
        self.config = stage.backbone.model_config
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
        Raises `UserError` for an empty prompt or what several devices cannot do.
        """
        check_pipeline(self.grid.layout.tp, self.grid.layout.pp, policy.name)
        if streamer is not None and len(prompts) > 1:
            raise UserError(f"streaming needs a single prompt, not {len(prompts)}")
        rows, settings = self.make_rows(prompts, seed, first_row, settings, tokenizer)
        self.policy = policy
        self.decisions = Decisions(policy, len(rows), self.grid.device)
        self.numbers = torch.arange(len(rows), device=self.grid.device)
        self.caches: dict[int, DynamicCache] = {}
        self.exit_caches: dict[tuple[int, int], DynamicCache] = {}
        # Without them an answer is one small message.
        self.wants_logits = settings.do_sample or any(row.processors for row in rows)
        self.line.open(len(rows), policy.max_pending)
        if self.grid.stage == 0:
            self._lead(rows, settings, streamer if self.grid.rank == 0 else None)
        else:
            self._follow()
        if not self.is_last:
            self.line.pass_on(None, None)
        self.line.close()
        self.caches, self.exit_caches = {}, {}
        if self.grid.stage == 0:
            return Decoded([row.tokens for row in rows], [row.layers for row in rows], [row.scores for row in rows])
        return None

    def _lead(self, rows: list[Row], settings: GenerationConfig, streamer: BaseStreamer | None) -> None:
        """The first stage: one token of each row is in flight, and the oldest is waited for."""
        if streamer is not None:
            streamer.put(rows[0].ids.cpu())
        flight = deque(self._launch(number, row.ids, prefill=True) for number, row in enumerate(rows))
        while flight:
            token, decision = flight.popleft()
            row = rows[token.row]
            new = row.take(decision or self._await(token), settings)
            if streamer is not None:
                if hasattr(streamer, "put_exits"):
                    streamer.put_exits(row.tokens[-1:], row.layers[-1:])
                streamer.put(row.ids[0, -1:].cpu())
            if new is not None:
                flight.append(self._launch(token.row, new, prefill=False))
        if streamer is not None:
            streamer.end()

    def _launch(self, row: int, ids: torch.Tensor, *, prefill: bool) -> tuple[Token, Decision | None]:
        """Run this stage on ids [1, S] and send them on; returns the decision, if it was made here."""
        token = Token(row, ids.shape[1], prefill)
        return token, self._run(token, ids)

    def _await(self, token: Token) -> Decision:
        """The decision about the oldest token in flight: later stages are heard in their order."""
        for stage in range(1, self.plan.launched):
            if self._speaks(stage, token):
                decision = self.line.hear(stage, self.wants_logits)
                if decision.layer:
                    return decision
        raise AssertionError("the last stage always decides")

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
        if token.row not in self.caches:
            self.caches[token.row] = DynamicCache(config=self.stage.backbone.base.config)
        hidden = self.stage.backbone(x, use_cache=True, **{CACHE: self.caches[token.row]})
        if self.is_last and not token.decided:
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
        silent = token.prefill or token.decided
        if self.stage.spec.exit_kind.attends:
            hidden = self.stage.exit_hidden(k, tap, self._exit_cache(k, token.row))  # its cache needs every token
        elif not silent:
            hidden = self.stage.exit_hidden(k, tap)
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

    def _exit_cache(self, k: int, row: int) -> DynamicCache:
        """Keys and values of the own layer of exit k."""
        if (k, row) not in self.exit_caches:
            last = self.config.num_hidden_layers - 1  # whose copy the exit's own layer is
            self.exit_caches[k, row] = DynamicCache(config=with_layers(self.config, [last]))
        return self.exit_caches[k, row]
