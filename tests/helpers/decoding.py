"""Tiny models with exits, slow references without any cache, and drafts that tests script."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ee_scale.inference.model import untrained_exits
from ee_scale.modeling.early_exits import EarlyExits
from ee_scale.modeling.prompt_lookup import PromptSource
from ee_scale.modeling.sources import Cycle, Draft, ExitSource
from ee_scale.modeling.speculate import Speculation
from ee_scale.modeling.versions import CACHE
from helpers.models import VOCAB, spec_of, write_model

LAYERS = 5  # of every model here
EOS = 120
PAD = 2
PADDING = (0, 3, 8, 1, 5, 2, 0, 8)  # columns in front of the rows of a batch of 8: prompts of 9 ... 1 tokens
PATTERNS = ("natural", "none", "mixed", "all")


@dataclass
class Pair:
    """transformers' own model, and the same weights with exits; both answer in evaluation mode."""

    base: Any
    model: Any

    def reference(self, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
        """What transformers says, greedily unless told otherwise."""
        return self.base.generate(**inputs, **{"do_sample": False, **options})

    def generate(self, inputs: dict[str, torch.Tensor], policy: str, **options: Any) -> Any:
        """The same with exits, with all particulars."""
        options = {"do_sample": False, "return_dict_in_generate": True, **options}
        return self.model.generate(**inputs, exit_policy=policy, **options)


def make_pair(
    folder: Path,
    family: str,
    kind: str = "norm",
    head: str = "tied",
    exits: Sequence[int] = (1, 3),
    *,
    dtype: torch.dtype = torch.float32,
    calm: float = 1.0,
    **changes: Any,
) -> Pair:
    """A random model. `calm` < 1 lets the layers add less, so that exits agree with the final layer more often."""
    source = folder / f"{family}-{calm}-{len(list(folder.iterdir())) if folder.is_dir() else 0}"
    folder.mkdir(parents=True, exist_ok=True)
    write_model(source, family, **{"eos_token_id": EOS, **changes})
    options = {"dtype": dtype, "attn_implementation": "eager" if family in ("gemma2", "vaultgemma") else "sdpa"}
    if calm != 1.0:
        model = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            for layer in model.model.layers[1:]:
                layer.self_attn.o_proj.weight.mul_(calm)
                for name, parameter in layer.mlp.named_parameters():
                    if "down_proj" in name or "c_proj.weight" in name:
                        parameter.mul_(calm)
        model.save_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(source, **options).eval()
    model = untrained_exits(source, spec_of(AutoConfig.from_pretrained(source), exits, kind, head), **options)
    torch.manual_seed(0)
    with torch.no_grad():  # copies of the backbone would hide a head that reads the wrong module
        for parameter in model.exit_heads.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return Pair(base, model)


def prompts(rows: int = 5, width: int = 9, seed: int = 0, vocab: int = EOS - 1) -> dict[str, torch.Tensor]:
    """Left-padded prompts of 1 to `width` tokens, with their mask."""
    ids = torch.randint(3, vocab, (rows, width), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : min(PADDING[row], width - 1)] = 0
    return {"input_ids": ids.where(mask.bool(), torch.tensor(PAD)), "attention_mask": mask}


def one_row(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row alone, without padding."""
    pad = int((inputs["attention_mask"][row] == 0).sum())
    return {name: value[row : row + 1, pad:] for name, value in inputs.items()}


def row_text(output: Any, inputs: dict[str, torch.Tensor], row: int, eos: int | None = EOS) -> list[int]:
    """The new tokens of a row, up to and with its end."""
    ids = getattr(output, "sequences", output)[row, inputs["input_ids"].shape[1] :].tolist()
    return ids[: ids.index(eos) + 1] if eos in ids else ids


@torch.no_grad()
def limits_for(pair: Pair, policy: str, shares: Sequence[float]) -> list[float]:
    """Limits that about these shares of random tokens pass, one per exit."""
    logits = pair.model(torch.randint(3, 119, (4, 24), generator=torch.Generator().manual_seed(5))).exit_logits
    limits = []
    for k, share in zip(pair.model.exit_spec.layers, shares, strict=True):
        scores = _score(policy, logits[k]).flatten()
        limits.append(float(scores.quantile(share if policy == "entropy" else 1 - share)))
    return limits


def _score(policy: str, logits: torch.Tensor) -> torch.Tensor:
    p = logits.float().softmax(-1)
    if policy == "entropy":
        return -torch.special.xlogy(p, p).sum(-1)
    top = p.sort(-1, descending=True).values
    return top[..., 0] - top[..., 1] if policy == "margin" else top[..., 0]


# -- slow references ---------------------------------------------------------------------------------------------------

Rule = Callable[[dict[int, torch.Tensor]], int | None]


def score_rule(name: str, limits: dict[int, float]) -> Rule:
    """The first exit that is sure enough; exits without a limit are never taken. Logits [V] per exit."""

    def sure(logits: torch.Tensor, limit: float) -> bool:
        score = float(_score(name, logits))
        return score <= limit if name == "entropy" else score >= limit

    return lambda exits: next((k for k in sorted(limits) if sure(exits[k], limits[k])), None)


def patience_rule(layers: Sequence[int], patience: int) -> Rule:
    """The exit at which `patience` exits in a row have said the same."""

    def rule(exits: dict[int, torch.Tensor]) -> int | None:
        said = [int(exits[k].argmax()) for k in layers]
        for i in range(patience - 1, len(layers)):
            if len(set(said[i - patience + 1 : i + 1])) == 1:
                return layers[i]
        return None

    return rule


@torch.no_grad()
def slow_exits(model: Any, prompt: torch.Tensor, rule: Rule, new: int) -> tuple[list[int], list[int]]:
    """Greedy decoding of one row [1, S] with a whole forward pass per token; the first token is the final layer's.

    Returns the new tokens and the layer of each.
    """
    ids, tokens, layers = prompt, [], []
    while len(tokens) < new and (not tokens or tokens[-1] != EOS):
        output = model(ids, use_cache=False)
        taken = rule({k: logits[0, -1] for k, logits in output.exit_logits.items()}) if tokens else None
        logits = output.logits if taken is None else output.exit_logits[taken]
        tokens.append(int(logits[0, -1].argmax()))
        layers.append(LAYERS if taken is None else taken)
        ids = torch.cat([ids, torch.tensor([tokens[-1:]])], 1)
    return tokens, layers


# -- drafts ------------------------------------------------------------------------------------------------------------


def script_drafts(monkeypatch: Any, pattern: str, answers: torch.Tensor, share: float = 0.7) -> list[tuple]:
    """Replace what sources draft: `all` says what `answers` [B, T] (whole texts) say, `none` never, `mixed` often.

    Lookups in the text find something in each row then.

    Returns a growing list of (row, column, draft).
    """
    pick, draft_from_text, log = ExitSource.pick, PromptSource.draft, []
    lucky = torch.rand(answers.shape, generator=torch.Generator().manual_seed(1)) < {"all": 2, "mixed": share}.get(
        pattern, -1
    )

    def replaced(self: ExitSource | PromptSource, cycle: Cycle, drafted: int, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.clone()
        for slot, row in enumerate(cycle.rows):
            column = self.sequences.lengths[row] + drafted
            if pattern != "natural":
                right = int(answers[row, column]) if column < answers.shape[1] else 3
                near = column < answers.shape[1] and bool(lucky[row, column])
                tokens[slot] = right if near else (right + 1) % VOCAB
            log.append((row, column, int(tokens[slot])))
        return tokens

    def scripted(self: ExitSource, cycle: Cycle, hidden: Any, block: Any, draft: Draft) -> tuple:
        tokens, scores, q = pick(self, cycle, hidden, block, draft)
        return replaced(self, cycle, len(draft), tokens), scores, q

    def scripted_text(self: PromptSource, cycle: Cycle) -> Draft:
        draft = draft_from_text(self, cycle)
        draft.tokens = [replaced(self, cycle, drafted, tokens) for drafted, tokens in enumerate(draft.tokens)]
        if pattern != "natural":
            draft.counts = [len(draft)] * len(cycle.rows)
        return draft

    if pattern != "natural":
        monkeypatch.setattr(PromptSource, "matches", lambda self, rows: self._texts_of(rows) and [9] * len(rows))
    monkeypatch.setattr(PromptSource, "draft", scripted_text)
    monkeypatch.setattr(ExitSource, "pick", scripted)
    return log


def watch_drafts(monkeypatch: Any) -> list[tuple[int, list[int], int, float | None]]:
    """A growing list of (exit, text of the row and its drafts so far, the next draft, its confidence or None)."""
    pick, seen = ExitSource.pick, []

    def watched(self: ExitSource, cycle: Cycle, hidden: Any, block: Any, draft: Draft) -> tuple:
        answer = pick(self, cycle, hidden, block, draft)
        for slot, row in enumerate(cycle.rows):
            end = self.sequences.lengths[row]
            text = self.sequences.ids[row, end - cycle.starts[slot] - 1 : end].tolist()
            confidence = None if answer[1] is None else float(answer[1][slot])
            seen.append((self.k, [*text, *(int(d[slot]) for d in draft.tokens)], int(answer[0][slot]), confidence))
        return answer

    monkeypatch.setattr(ExitSource, "pick", watched)
    return seen


# -- a look into the loops ---------------------------------------------------------------------------------------------


def after_each_step(monkeypatch: Any, look: Callable[[Any], None]) -> None:
    """Call `look(loop)` after the prompt and after every step of both loops, before finished rows leave."""
    for loop in (EarlyExits, Speculation):

        def stepped(self: Any, step: Callable = loop.step) -> None:
            step(self)
            look(self)

        monkeypatch.setattr(loop, "step", stepped)


def valid_columns(loop: Any, slot: int) -> list[int]:
    """For each decoder layer: how many columns of a slot must be right."""
    if isinstance(loop, Speculation):
        return [loop.next[slot]] * loop.runner.num_layers
    return [
        loop.next[slot] - waiting
        for waiting, first, last in zip(loop.waiting, loop.bounds, loop.bounds[1:], strict=False)
        for _ in range(first, last)
    ]


@torch.no_grad()
def cache_error(loop: Any, base: Any) -> float:
    """Largest difference between the loop's keys and values and those of a fresh pass over the committed text."""
    width, ids, worst = max(loop.next), loop.sequences.ids, 0.0
    # Padded on the right: nothing looks there.
    texts = torch.stack([torch.cat([ids[row, loop.pads[row] :], ids.new_zeros(width)])[:width] for row in loop.rows])
    # A cache without config keeps all of a sliding layer.
    fresh = base.model(texts, use_cache=True, **{CACHE: DynamicCache()})[CACHE]
    counts = [valid_columns(loop, slot) for slot in range(len(loop.rows))]
    for index, layer in enumerate(fresh.layers):
        own = loop.runner.cache.layers[index]
        valid = torch.arange(width) < torch.tensor([row[index] for row in counts])[:, None]
        for mine, theirs in ((own.keys, layer.keys), (own.values, layer.values)):
            error = (mine[: len(theirs), :, :width] - theirs).abs().amax((1, 3))
            worst = max(worst, float(error[valid].max()))
    return worst


def spoil(loop: Any, value: float = 1e4) -> None:
    """Overwrite everything that must not be read: columns behind what is known."""
    runner = loop.runner
    for slot in range(len(loop.rows)):
        counts = valid_columns(loop, slot)
        counts += [runner.exit_lengths[k][slot] if k in runner.exit_lengths else 0 for k in runner.spec.layers]
        for layer, count in zip(runner.cache.layers, counts, strict=True):
            if layer.is_initialized:
                layer.keys[slot, :, count:] = value
                layer.values[slot, :, count:] = value
        for state in runner.states.values():
            if state is not None:
                state[slot, loop.next[slot] :] = value
