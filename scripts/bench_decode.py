"""Benchmark of decoding with exits: tokens per second against transformers' own generate, in one run.

    python scripts/bench_decode.py --model my-model --data heldout.txt --json bench.json

Every way to decode continues the same prompts (first tokens of different documents) in turns, greedily and at a
temperature; ratios are to transformers' `generate` of the base model at the same batch size. Greedy text of a small
model loops, which flatters every drafting method: both are shown. Peer: transformers' `assistant_early_exit` (batch 1
only). Agreement: share of all new tokens that are the full model's choice given the text before them, counted in a
separate pass that is not timed; limits are chosen on the model's own text after other prompts. "Exits shuffled" say
nothing: its speed "of no drafts", in the same loop, is what trying costs (wanted: 0.98x). The last column is what
the cost model says for the acceptance or share and the part times of this run, relative to a step of all layers and the
head; at a batch it leaves out that a group waits for its slowest row, and in threshold mode it is for batch 1.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from ee_scale import EarlyExitForCausalLM
from ee_scale.evaluation.cost_model import acceptance_of, threshold_speedup
from ee_scale.evaluation.timing import measure_parts
from ee_scale.modeling.costs import Costs, best_draft_length, lossless_speedup
from ee_scale.modeling.policies import CALIBRATION_KEY, score

REFERENCE = "transformers generate"
NO_DRAFTS, SHUFFLED = "lossless, no drafts", "lossless, exits shuffled"
SEPARATOR = "<|endoftext|>"


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


def read_prompts(tokenizer: Any, path: Path, length: int, count: int, least: int) -> torch.Tensor:
    """The first `length` tokens of up to `count` documents, `least` at least: [documents, length]."""
    rows = []
    for text in path.read_text(encoding="utf-8").split(SEPARATOR):
        ids = tokenizer(text[: 12 * length], add_special_tokens=False).input_ids
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            break
    if len(rows) < least:
        raise SystemExit(f"--data {path}: {len(rows)} documents of at least {length} tokens, {least} are needed")
    return torch.tensor(rows)


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
        Contender(SHUFFLED, with_shuffled_exits(model).generate, {"exit_policy": "lossless"}),
        Contender("lossless", with_exits, {"exit_policy": "lossless"}),
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
    if batch == 1:
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
    """Let every contender continue every group of prompts, in turns; then count agreement."""
    for row in rows:
        row.batch = batch
    groups = [prompts[i : i + batch] for i in range(0, len(prompts) - batch + 1, batch)]
    for turn in track(range(-1, rounds), f"batch {batch}", transient=True):
        for group in groups[: 1 if turn < 0 else None]:  # the turn before the first warms up
            for offset in range(len(rows)):
                row = rows[(turn + offset) % len(rows)]
                torch.manual_seed(turn)
                start = time.perf_counter()
                output = run(row, group, mode, new)
                if turn >= 0:
                    row.seconds += time.perf_counter() - start
                    row.tokens += count_new(output.sequences, group, row)
                    row.stats.append(getattr(output, "exit_stats", None) or {})
    for row in rows:
        if row.options.get("exit_policy", "lossless") == "lossless":
            continue
        for group in groups:
            torch.manual_seed(0)
            output = run(row, group, mode, new, exit_audit=1.0)
            row.audited_tokens += count_new(output.sequences, group, row)
            row.early += output.exit_stats.get("audited", 0)
            row.agreed += output.exit_stats.get("agreed", 0)


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
    }
    calls = [sum(per) for per in zip(*(stats["layer_calls"] for stats in row.stats if stats), strict=True)]
    if calls:
        result["layer_calls_per_token"] = sum(calls) / row.tokens
        result["checks_per_token"] = sum(sum(stats["exit_checks"].values()) for stats in row.stats) / row.tokens
    if row.total("cycles"):
        drafted, accepted = row.total("drafted"), row.total("accepted")
        by_exit: dict[int, int] = {}
        for stats in row.stats:
            for k, count in stats["cycles_by_exit"].items():
                by_exit[k] = by_exit.get(k, 0) + count
        result |= {"drafted_per_cycle": drafted / row.total("slot_cycles"), "accepted": accepted / max(drafted, 1)}
        result["cycles_by_exit"] = by_exit
        gamma = row.options.get("exit_draft_length")
        k = max(by_exit, key=by_exit.get)
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


def print_table(out: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """One line per contender."""
    table = Table(title=title, title_justify="left")
    names = ("", "tokens/s", "ratio", "of no drafts", "agreement", "layer calls/token", "accepted", "drafts/cycle")
    for name in (*names, "cost model"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in rows:
        predicted = row.get("predicted")
        table.add_row(
            row["name"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio']:.2f}x",
            "" if row["of_no_drafts"] is None else f"{row['of_no_drafts']:.2f}x",
            "" if row["agreement"] is None else f"{row['agreement']:.2%}",
            f"{row['layer_calls_per_token']:.2f}" if "layer_calls_per_token" in row else "",
            f"{row['accepted']:.1%}" if "accepted" in row else "",
            f"{row['drafted_per_cycle']:.2f}" if "drafted_per_cycle" in row else "",
            f"{predicted['speed']:.2f}x" if predicted else "",
        )
    out.print(table)


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder written by `ee-scale export`")
    parser.add_argument("--data", required=True, type=Path, help=f"held-out text, documents parted by {SEPARATOR}")
    parser.add_argument("--prompts", type=int, default=32, help="documents to continue")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--agreement", type=float, default=0.98, help="wanted in threshold mode")
    parser.add_argument(
        "--margin", type=float, default=0.003, help="added to it when limits are chosen on other prompts"
    )
    parser.add_argument("--peers", type=int, nargs="+", default=[2, 4], help="layers of assistant_early_exit")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; auto: as stored")
    parser.add_argument("--plain-weights", action="store_true", help="on a CPU: do not pack linear layers")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out = Console(width=150)
    model = EarlyExitForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    model.pack_weights = not args.plain_weights
    stock = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = read_prompts(tokenizer, args.data, args.prompt_tokens, 4 * args.prompts, 2 * args.prompts).to(args.device)
    prompts, others = found[: args.prompts], found[args.prompts :]  # limits are chosen on the others
    context = args.prompt_tokens + args.new_tokens // 2
    costs_of = {
        batch: measure_parts(model, context, 10, rows=(1, 2, 3, 4, 5, 8, 13), batch=batch).costs
        for batch in args.batches
    }
    costs = costs_of[args.batches[0]]
    times = f"layer {costs.layers(1) * 1e3:.3f} ms, final head {costs.head_layers:.2f} layers, "
    times += ", ".join(f"exit {k}: {check / costs.layers(1):.2f} layers" for k, check in costs.checks.items())
    times += f"; 4 positions cost {costs.layers(1, 4) / costs.layers(1):.2f} times as much per layer"
    out.print(f"batch {args.batches[0]}: {times}")
    modes = {"greedy": {"do_sample": False}}
    modes[f"temperature {args.temperature}"] = {"do_sample": True, "temperature": args.temperature, "top_k": 0}
    result = {"settings": {k: str(v) for k, v in vars(args).items()}, "machine": machine(args.device), "tables": {}}
    result["seconds"] = {
        batch: {"layer": dict(part.layer), "head": dict(part.head), "checks": dict(part.checks)}
        for batch, part in costs_of.items()
    }
    for label, mode in modes.items():
        limits = limits_on_own_text(model, others, mode, args.new_tokens, args.agreement + args.margin)
        for batch in args.batches:
            rows = contenders(model, stock, batch, limits, costs_of[batch], args.peers)
            measure(rows, prompts, batch, mode, args.new_tokens, args.rounds)
            table = [summary(row, rows, costs_of[batch]) for row in rows]
            print_table(out, f"{label}, batch {batch}", table)
            result["tables"][f"{label}, batch {batch}"] = table
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def machine(device: str) -> dict[str, str]:
    """What ran it."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "transformers": version("transformers")}


if __name__ == "__main__":
    main()
