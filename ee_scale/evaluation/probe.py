"""How readable a model's layers are: whether an exit says what the final layer says, on given text and on its own."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ee_scale.errors import UserError
from ee_scale.evaluation.states import exit_states
from ee_scale.inference.settings import check_settings, end_marks, new_lengths, stop_criterion
from ee_scale.modeling.policies import score

CHUNK_LOGITS = 1 << 24  # logits of one exit that exist at the same time (64 MiB in fp32)


@dataclass(frozen=True)
class Reading:
    """One exit against the final layer, over the tokens of one text.

    Attributes:
        agreement: share of tokens whose most likely token is the final layer's: the acceptance of greedy drafts.
        acceptance: mean of sum(min(p, q)) at the temperature: the acceptance of sampled drafts (arXiv 2211.17192).
        leaving: largest share of tokens that may leave here when all others stay and the wanted share of all tokens
            remains the final layer's; the surest tokens leave first.
        limit: the max probability above which they leave (None: no token may).
    """

    layer: int
    tokens: int
    agreement: float
    acceptance: float
    leaving: float
    limit: float | None


@dataclass(frozen=True)
class Passage:
    """Token ids [B, S] and which of them are read: bool [B, S-1], True where the next token counts."""

    ids: torch.Tensor
    kept: torch.Tensor


def given_text(windows: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterable[Passage]:
    """Windows [B, S] of a text and which predictions in them count, bool [B, S-1]."""
    for ids, learned in windows:
        yield Passage(ids, learned)


@torch.no_grad()
def own_text(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    new_tokens: int,
    temperature: float | None,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    advance: Callable[[float], None] = lambda share: None,
) -> Passage:
    """The model's continuation of prompts [B, P] by its final layer (None: greedy), each up to its end.

    Ends and everything else are those of its generation config; stop strings need the `tokenizer`. `advance` is told
    the share of `new_tokens` that is written.
    """
    device = next(model.parameters()).device
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    settings = model.generation_config
    check_settings(settings, own_loop=True)
    ends, stop = end_marks(settings), stop_criterion(settings, tokenizer)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = model.generate(
            prompts.to(device),
            attention_mask=torch.ones_like(prompts, device=device),
            max_new_tokens=new_tokens,
            use_cache=True,
            pad_token_id=ends[0] if ends else 0,
            tokenizer=tokenizer,
            stopping_criteria=StoppingCriteriaList([_Told(advance, prompts.shape[1], new_tokens)]),
            **(greedy if temperature is None else sampling),
        )
    kept = torch.ones(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
    kept[:, : prompts.shape[1] - 1] = False
    for row, count in enumerate(new_lengths(ids, prompts.shape[1], settings, stop)):
        kept[row, prompts.shape[1] + count - 1 :] = False
    return Passage(ids.cpu(), kept)


class _Told(StoppingCriteria):
    """Never stops; tells how far the text is."""

    def __init__(self, advance: Callable[[float], None], start: int, new_tokens: int):
        self.advance, self.start, self.new_tokens = advance, start, new_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.advance((input_ids.shape[1] - self.start) / self.new_tokens)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def repeated_share(passage: Passage, length: int = 8) -> float:
    """Share of the runs of `length` tokens read that came before in the same row: text that loops flatters drafts."""
    runs = repeats = 0
    for row, kept in zip(passage.ids[:, 1:].tolist(), passage.kept.tolist(), strict=True):
        tokens = [token for token, keep in zip(row, kept, strict=True) if keep]
        seen = set()
        for i in range(len(tokens) - length + 1):
            run = tuple(tokens[i : i + length])
            runs += 1
            repeats += run in seen
            seen.add(run)
    return repeats / runs if runs else 0.0


@torch.no_grad()
def read_exits(model: PreTrainedModel, passages: Iterable[Passage], temperature: float, bound: float) -> list[Reading]:
    """Compare every exit with the final layer; `bound` is the share of tokens that must stay the final layer's.

    Raises `UserError` if there is no token to read.
    """
    layers = model.exit_spec.layers
    sums = {k: {"agreed": [], "accepted": [], "scores": []} for k in layers}
    for passage in passages:
        states = exit_states(model, passage.ids[:, :-1].to(next(model.parameters()).device))
        kept = passage.kept.to(states[0].device)
        for final, exits in _logits(model, {k: hidden[kept] for k, hidden in states.items()}):
            best, wanted = final.argmax(-1), (final / temperature).softmax(-1)
            for k, logits in exits:
                scores, tokens = score("threshold", logits)
                sums[k]["agreed"].append((tokens == best).cpu())
                sums[k]["scores"].append(scores.cpu())
                shared = torch.minimum(wanted, (logits / temperature).softmax(-1)).sum(-1)
                sums[k]["accepted"].append(shared.cpu())
    if not sums[layers[0]]["agreed"]:
        raise UserError("data: no tokens to read")
    return [_reading(k, {name: torch.cat(values) for name, values in sums[k].items()}, bound) for k in layers]


def _logits(model: PreTrainedModel, states: dict[int, torch.Tensor]) -> Iterable[tuple[torch.Tensor, Iterable]]:
    """Chunks of positions [n, D]: the final layer's logits fp32 [n, V], and (exit, logits) one exit at a time."""
    lm_head, heads = model.get_output_embeddings(), model.exit_heads
    capped = next(iter(heads.values())).spec.capped
    size = max(1, CHUNK_LOGITS // lm_head.weight.shape[0])
    for start in range(0, len(states[0]), size):
        part = {k: hidden[start : start + size] for k, hidden in states.items()}
        exits = ((k, heads[str(k)].logits(part[k], lm_head).float()) for k in model.exit_spec.layers)
        yield capped(lm_head(part[0])).float(), exits


def _reading(k: int, values: dict[str, torch.Tensor], bound: float) -> Reading:
    agreed, scores = values["agreed"], values["scores"]
    order = scores.argsort(descending=True, stable=True)
    wrong = (~agreed[order]).cumsum(0)
    # Tokens of one score leave together: a limit cannot tell them apart.
    ordered = scores[order]
    last = torch.cat([ordered[1:] < ordered[:-1], torch.tensor([True])])
    allowed = (last & (wrong <= (1 - bound) * len(agreed))).nonzero()
    count = int(allowed.max()) + 1 if len(allowed) else 0
    return Reading(
        layer=k,
        tokens=len(agreed),
        agreement=float(agreed.double().mean()),
        acceptance=float(values["accepted"].double().mean()),
        leaving=count / len(agreed),
        limit=float(ordered[count - 1]) if count else None,
    )
