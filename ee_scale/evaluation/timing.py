"""What the parts of decoding cost on the machine at hand."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ee_scale.modeling.attention import without_cudnn
from ee_scale.modeling.costs import Costs
from ee_scale.modeling.heads import layer_type, rotary_by_type
from ee_scale.modeling.kinds import Tap
from ee_scale.modeling.packing import pack_linears
from ee_scale.modeling.policies import score
from ee_scale.modeling.versions import CACHE

ROWS = (1, 2, 4, 8, 16)
SHORTLIST = 16_384  # tokens; FR-Spec (arXiv 2502.14856) keeps a quarter of a vocabulary of 128k
GENERATED = 24  # tokens of transformers' own generate that are timed


@dataclass(frozen=True)
class PartTimes:
    """Seconds.

    Attributes:
        costs: of the whole heads.
        shortlist: tokens of a draft head that reads only a part of the vocabulary.
        with_shortlist: costs if exits read that part only.
        generate: transformers' own greedy `generate`, per token, batch 1.
    """

    costs: Costs
    shortlist: int
    with_shortlist: Costs
    generate: float


class FilledCache:
    """Keys and values of `length` earlier positions; every pass writes after them and forgets the pass before.

    Has the one method that attention layers of transformers call.
    """

    def __init__(self, length: int, most_rows: int):
        self.length, self.most_rows = length, most_rows
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: object, **__: object) -> tuple:
        """[B, H, n, D] of the new positions -> [B, H, length + n, D]."""
        end = self.length + keys.shape[2]
        if layer_idx not in self.layers:
            shape = (*keys.shape[:2], self.length + self.most_rows, keys.shape[3])
            self.layers[layer_idx] = (keys.new_empty(shape).normal_(), values.new_empty(shape).normal_())
        for buffer, new in zip(self.layers[layer_idx], (keys, values), strict=True):
            buffer[:, :, self.length : end] = new
        return tuple(buffer[:, :, :end] for buffer in self.layers[layer_idx])


@torch.no_grad()
@without_cudnn()
def measure_parts(
    model: PreTrainedModel,
    context: int,
    seconds: float,
    rows: Sequence[int] = ROWS,
    advance: Callable[[float], None] = bool,
    batch: int = 1,
) -> PartTimes:
    """Time layers, final head and exits of an early-exit model with `context` positions in the cache.

    The parts are timed in turns for `seconds`, so that other work on the machine slows all of them; `advance` hears
    the share that is done. `rows` are positions of each of `batch` sequences that pass together. Weights are packed as
    `generate` packs them.
    """
    base, lm_head, weight = model.base_model, model.get_output_embeddings(), model.get_input_embeddings().weight
    cache = FilledCache(context, max(rows))
    size = model.exit_spec.shortlist or min(SHORTLIST, max(1, lm_head.out_features // 8))
    hidden = torch.randn(batch, max(rows), lm_head.in_features, device=weight.device, dtype=weight.dtype)
    one = hidden[:, :1]
    short = nn.Linear(lm_head.in_features, size, bias=False, device=weight.device, dtype=weight.dtype).eval()
    if model.pack_weights:
        for part in (model, short):
            pack_linears(part)
    parts: dict[Any, Callable[[], Any]] = {("layers", n): layer_pass(base, cache, hidden[:, :n]) for n in rows}
    parts |= {("head", n): lambda n=n: lm_head(base.norm(hidden[:, :n])).argmax(-1).tolist() for n in rows}
    parts |= {("exit", k): _exit_check(model, k, one, cache) for k in model.exit_spec.layers}
    parts["all tokens"] = lambda: lm_head(one)
    parts["shortlist"] = lambda: short(one)
    found = _in_turns(parts, seconds, weight.device, advance)
    count = len(base.layers)
    costs = Costs(
        num_layers=count,
        layer={n: found["layers", n] / count for n in rows},
        head={n: found["head", n] for n in rows},
        checks={k: found["exit", k] for k in model.exit_spec.layers},
    )
    saved = 0.0 if model.exit_spec.shortlist else found["all tokens"] - found["shortlist"]  # whose checks have it
    checks = {k: max(check - saved, 0.0) for k, check in costs.checks.items()}
    return PartTimes(
        costs, size, Costs(count, costs.layer, costs.head, checks), _generate_time(model, context, weight.device)
    )


def layer_pass(
    base: nn.Module, cache: FilledCache, hidden: torch.Tensor, layers: Sequence[Any] | None = None
) -> Callable[[], Any]:
    """A pass of [B, n, D] through layers; by default all, so that each finds its weights as far away as in decoding."""
    n, start = hidden.shape[1], cache.length
    positions = torch.arange(start, start + n, device=hidden.device)[None]
    by_type = rotary_by_type(base.rotary_emb)
    kinds = sorted(set(base.config.layer_types)) if by_type else [""]
    rotary = {kind: base.rotary_emb(hidden, positions, *([kind] if by_type else [])) for kind in kinds}
    mask = None
    if n > 1:
        columns = torch.arange(start + n, device=hidden.device)
        mask = (columns <= positions[0, :, None])[None, None]
        if base.config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)

    def run() -> torch.Tensor:
        states = hidden
        for layer in base.layers if layers is None else layers:
            states = layer(
                states,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                position_embeddings=rotary[layer_type(layer) if by_type else ""],
                **{CACHE: cache},
            )
        return states

    return run


def _exit_check(model: PreTrainedModel, k: int, one: torch.Tensor, cache: FilledCache) -> Callable[[], Any]:
    """What decoding does at an exit: its modules, its head, the score and the token, both brought to the CPU."""
    spec, head, base = model.exit_spec, model.exit_heads[str(k)], model.base_model
    norm = spec.output_norm(base.layers[k - 1])
    tap = Tap(one, one)
    own_layer = layer_pass(base, cache, one, [head.body]) if spec.exit_kind.attends else None

    def run() -> None:
        states = head.hidden(tap, norm, lambda layer, x: own_layer())
        logits = head.scored_logits(states, model.get_output_embeddings())
        torch.stack(score("threshold", logits)).tolist()

    return run


def _in_turns(
    parts: dict[Any, Callable[[], Any]], seconds: float, device: torch.device, advance: Callable[[float], None]
) -> dict[Any, float]:
    """Seconds per call of each part: the tenth percentile, as what disturbs only ever adds."""
    times: dict[Any, list[float]] = {name: [] for name in parts}
    others = parts["layers", 1]
    begun, rounds = time.perf_counter(), 0
    while rounds < 4 or time.perf_counter() - begun < seconds:
        for name, part in parts.items():
            others()  # as in decoding, where every layer has passed through the processor's caches since the last time
            _finish(device)
            start = time.perf_counter()
            part()
            _finish(device)
            times[name].append(time.perf_counter() - start)
        rounds += 1
        advance(min(1.0, rounds / 4, (time.perf_counter() - begun) / seconds))
    # The first round is a warm-up.
    return {name: sorted(values[1:])[(len(values) - 1) // 10] for name, values in times.items()}


def _generate_time(model: PreTrainedModel, context: int, device: torch.device) -> float:
    """Seconds per token of greedy `generate` after a prompt; the prompt's own pass is taken out."""
    prompt = torch.randint(model.config.vocab_size, (1, max(1, context - GENERATED)), device=device)
    times = {}
    for count in (1, GENERATED + 1):
        given = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "use_cache": True}
        given |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
        # What the model's own config may add to plain greedy decoding.
        given |= {"stop_strings": None, "max_time": None, "num_beams": 1, "num_return_sequences": 1}
        tries = []
        for _ in range(4):
            start = time.perf_counter()
            model.generate(prompt, **given)
            _finish(device)
            tries.append(time.perf_counter() - start)
        times[count] = min(tries)
    return (times[GENERATED + 1] - times[1]) / GENERATED


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
