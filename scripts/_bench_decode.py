"""The ways to decode that `bench_decode.py` compares, how they take turns, and what is counted of each."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _profile import Profile, profile
from rich.progress import track

from ee_scale.evaluation.cost_model import acceptance_of, threshold_speedup
from ee_scale.modeling.calibration import CALIBRATION_KEY
from ee_scale.modeling.costs import Costs, best_draft_length, lossless_speedup
from ee_scale.modeling.policies import score
from ee_scale.modeling.policy_names import DRAFT_SOURCES

REFERENCE = "transformers generate"
NO_DRAFTS, SHUFFLED = "lossless, no drafts", "lossless, exits shuffled"
PROFILED = 8  # new tokens
COPIED = 10  # drafts of transformers' prompt lookup


@dataclass
class Contender:
    """One way to decode, and what was seen of it."""

    name: str
    generate: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    stats: list[dict[str, Any]] = field(default_factory=list)
    early: int = 0
    agreed: int = 0
    audited_tokens: int = 0
    batch: int = 1
    same: int = 0  # new tokens that are the reference's, place by place
    seen: Profile | None = None  # of a short call

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def total(self, key: str) -> float:
        """Sum of a number over the calls."""
        return sum(stats.get(key, 0) for stats in self.stats)

    @property
    def agreement(self) -> float | None:
        """Share of all tokens that are the full model's choice."""
        return 1 - (self.early - self.agreed) / self.audited_tokens if self.audited_tokens else None


@torch.no_grad()
def limits_on_own_text(
    model: Any, prompts: torch.Tensor, mode: dict[str, Any], new: int, bound: float
) -> dict[int, Any]:
    """Per exit, alone: the lowest limit that keeps `bound` agreement on the model's own text, and the share leaving."""
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, **mode)
    start = prompts.shape[1]
    output = model(ids, use_cache=False)
    pad = model.generation_config.pad_token_id
    counts = ids[:, start + 1 :] != (-1 if pad is None else pad)
    final = output.logits[:, start:-1].argmax(-1)[counts]
    found = {}
    for k, logits in output.exit_logits.items():
        scores, tokens = score("threshold", logits[:, start:-1][counts])
        order = scores.argsort(descending=True)
        wrong = (tokens != final)[order].cumsum(0) / len(order)
        fine = (wrong <= 1 - bound).nonzero()
        last = int(fine.max()) if len(fine) else -1
        found[k] = {"limit": float(scores[order[last]]) if last >= 0 else 2.0, "share": (last + 1) / len(order)}
    return found


def contenders(model: Any, stock: Any, batch: int, limits: dict[int, Any], costs: Costs, peers: Sequence[int]) -> list:
    """Everything that runs at this batch size; the reference first."""
    with_exits = model.generate
    layers, depth = model.exit_spec.layers, model.config.num_hidden_layers
    # The exits that the cost model finds the fastest, alone and at the wanted agreement.
    best = max(layers, key=lambda k: threshold_speedup(costs, {k: limits[k]["share"]}))
    everywhere = {k: limits[k]["limit"] for k in layers}
    rows = [
        Contender(REFERENCE, stock.generate),
        Contender("our loop, exits off", with_exits, {"exit_policy": "threshold", "exit_threshold": 2.0}),
        Contender(NO_DRAFTS, with_exits, {"exit_policy": "lossless", "exit_draft_length": 0}),
        Contender(
            SHUFFLED, with_shuffled_exits(model).generate, {"exit_policy": "lossless", "exit_draft_sources": "exits"}
        ),
        Contender("lossless", with_exits, {"exit_policy": "lossless"}),
        Contender("lossless, int8 drafts", with_exits, {"exit_policy": "lossless", "exit_draft_weights": "int8"}),
        *(
            Contender(f"lossless, {name} only", with_exits, {"exit_policy": "lossless", "exit_draft_sources": name})
            for name in DRAFT_SOURCES
        ),
        *(Contender(f"lossless, exit {k}", with_exits, {"exit_policy": "lossless", "exit_layer": k}) for k in layers),
        *(
            Contender(
                f"lossless, exit {layers[0]}, {g} drafts",
                with_exits,
                {"exit_policy": "lossless", "exit_layer": layers[0], "exit_draft_length": g},
            )
            for g in (1, 2, 3)
        ),
        Contender(
            f"threshold, exit {best}",
            with_exits,
            {"exit_policy": "threshold", "exit_threshold": {best: everywhere[best]}},
        ),
    ]
    if len(layers) > 1:
        # Each limit alone keeps the wanted agreement; together they err more.
        rows.append(
            Contender("threshold, all exits", with_exits, {"exit_policy": "threshold", "exit_threshold": everywhere})
        )
    calibration = getattr(model.generation_config, CALIBRATION_KEY, None)
    if calibration:
        rows.append(Contender("threshold, calibrated", with_exits, {"exit_policy": calibration["policy"]}))
    if calibration and calibration.get("shortlist"):
        size = max(1, model.config.vocab_size // 2)
        options = {"exit_policy": "lossless", "exit_shortlist": size}
        rows.append(Contender(f"lossless, shortlist {size}", with_exits, options))
    if model.device.type == "cuda":
        recorded = {"exit_graphs": True}
        off = {"exit_policy": "threshold", "exit_threshold": 2.0}
        rows.append(Contender("our loop, exits off, graphs", with_exits, off | recorded))
        rows.append(Contender("lossless, graphs", with_exits, {"exit_policy": "lossless"} | recorded))
    if batch == 1:
        rows.append(
            Contender(f"prompt_lookup_num_tokens={COPIED}", stock.generate, {"prompt_lookup_num_tokens": COPIED})
        )
        for k in peers:
            if k < depth:
                rows.append(Contender(f"assistant_early_exit={k}", stock.generate, {"assistant_early_exit": k}))
    return rows


@torch.no_grad()
def with_shuffled_exits(model: Any) -> Any:
    """The same model, whose exits have their numbers in another order."""
    view = copy.copy(model)
    heads = copy.deepcopy(model.exit_heads)
    for parameter in heads.parameters():
        order = torch.randperm(parameter.numel(), device=parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    view._modules = {**model._modules, "exit_heads": heads}
    return view


def measure(
    rows: list[Contender], prompts: torch.Tensor, batch: int, mode: dict[str, Any], new: int, rounds: int
) -> None:
    """Let every contender continue every group of prompts, in turns; then count agreement, and look inside."""
    for row in rows:
        row.batch = batch
    groups = [prompts[i : i + batch] for i in range(0, len(prompts) - batch + 1, batch)]
    # The turn before the first warms up. On a GPU every shape has to be seen once: kernels are chosen by shape.
    warm_up = groups if prompts.is_cuda else groups[:1]
    for turn in track(range(-1, rounds), f"batch {batch}", transient=True):
        for group in warm_up if turn < 0 else groups:
            found = {}
            for offset in range(len(rows)):
                row = rows[(turn + offset) % len(rows)]
                torch.manual_seed(turn)
                start = time.perf_counter()
                output = run(row, group, mode, new)
                if turn >= 0:
                    row.seconds += time.perf_counter() - start
                    row.tokens += count_new(output.sequences, group, row)
                    row.stats.append(getattr(output, "exit_stats", None) or {})
                    found[row.name] = output.sequences[:, group.shape[1] :]
            for row in rows if found else ():
                row.same += count_same(found[row.name], found[rows[0].name])
    for row in rows:
        if row.options.get("exit_policy", "lossless") != "lossless":
            count_agreement(row, groups, mode, new)
    for row in rows if prompts.is_cuda else rows[:2]:  # a CPU runs no kernels that could be counted
        row.seen = profile(lambda row=row: run(row, groups[0], mode, PROFILED), prompts.device)


def count_agreement(row: Contender, groups: list[torch.Tensor], mode: dict[str, Any], new: int) -> None:
    """How often what leaves early is the full model's choice, in a pass that is not timed."""
    for group in groups:
        torch.manual_seed(0)
        output = run(row, group, mode, new, exit_audit=1.0)
        row.audited_tokens += count_new(output.sequences, group, row)
        row.early += output.exit_stats.get("audited", 0)
        row.agreed += output.exit_stats.get("agreed", 0)


def count_same(mine: torch.Tensor, reference: torch.Tensor) -> int:
    """Tokens of two answers [B, n] that are the same; what lies behind the shorter one is not."""
    width = min(mine.shape[1], reference.shape[1])
    return int((mine[:, :width] == reference[:, :width]).sum())


def run(row: Contender, group: torch.Tensor, mode: dict[str, Any], new: int, **more: Any) -> Any:
    """One call of generate."""
    mask = torch.ones_like(group)
    given = {"max_new_tokens": new, "return_dict_in_generate": True, **mode, **row.options, **more}
    return row.generate(group, attention_mask=mask, **given)


def count_new(sequences: torch.Tensor, group: torch.Tensor, row: Contender) -> int:
    """New tokens up to each row's end mark."""
    new = sequences[:, group.shape[1] :]
    ends = row.generate.__self__.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    finished = torch.isin(new, torch.tensor(ends, dtype=new.dtype, device=new.device)).long().cumsum(1)
    return int((finished.cumsum(1) <= 1).sum())


def summary(row: Contender, rows: Sequence[Contender], costs: Costs) -> dict[str, Any]:
    """What is printed and stored of one of the contenders, the reference being the first."""
    reference, plain = rows[0], next(other for other in rows if other.name == NO_DRAFTS)
    depth = costs.num_layers
    result = {
        "name": row.name,
        "tokens_per_second": row.rate,
        "ratio": row.rate / reference.rate,
        "of_no_drafts": row.rate / plain.rate if row.options.get("exit_policy") == "lossless" else None,
        "agreement": row.agreement,
        "seconds": row.seconds,
        "tokens": row.tokens,
        "same": row.same / max(1, reference.same),
        **inside(row),
    }
    calls = [sum(per) for per in zip(*(stats["layer_calls"] for stats in row.stats if stats), strict=True)]
    if calls:
        result["layer_calls_per_token"] = sum(calls) / row.tokens
        result["checks_per_token"] = sum(sum(stats["exit_checks"].values()) for stats in row.stats) / row.tokens
    if row.total("cycles"):
        drafted, accepted = row.total("drafted"), row.total("accepted")
        result["sources"] = by_source(row.stats)
        result |= {"drafted_per_cycle": drafted / row.total("slot_cycles"), "accepted": accepted / max(drafted, 1)}
        gamma, k = row.options.get("exit_draft_length"), row.options.get("exit_layer")
        if gamma and drafted:
            alpha = acceptance_of(min(gamma + 1, 1 + accepted / row.total("slot_cycles")), gamma)
            best, limit = best_draft_length(costs, k, alpha)
            result["predicted"] = {
                "acceptance": alpha,
                "speed": lossless_speedup(costs, k, alpha, gamma),
                "best_length": best,
                "best_speed": limit,
            }
    elif (
        row.batch == 1
        and isinstance(row.options.get("exit_threshold"), dict)
        and len(row.options["exit_threshold"]) == 1
    ):
        (k,) = row.options["exit_threshold"]
        share = row.early / max(row.audited_tokens, 1)
        result["predicted"] = {"share": share, "speed": threshold_speedup(costs, {k: share})}
    result["layers"] = depth
    return result


def by_source(stats: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """What became of each source's drafts, over calls."""
    names = dict.fromkeys(name for call in stats for name in call["sources"])
    keys = ("cycles", "drafted", "accepted")
    return {name: {key: sum(call["sources"][name][key] for call in stats) for key in keys} for name in names}


def inside(row: Contender) -> dict[str, Any]:
    """What a short call did: kernels and waits for each new token of all rows, the attention kernels, busy share."""
    if row.seen is None:
        return {}
    tokens = PROFILED * row.batch
    return {
        "busy": row.seen.busy,
        "kernels_per_token": row.seen.kernels / tokens,
        "waits_per_token": row.seen.waits / tokens,
        "attention": row.seen.attention,
        "kernel_ms": row.seen.kernel_ms,
    }
