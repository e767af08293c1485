"""Benchmark of decoding with exits: tokens per second against transformers' own generate, in one run.

    python scripts/bench_decode.py --model my-model --data heldout.txt --json bench.json

Every way to decode continues the same prompts (first tokens of different documents) in turns, greedily and at a
temperature; ratios are to transformers' `generate` of the base model at the same batch size. Greedy text of a small
model loops, which flatters every drafting method: both are shown. Peers: transformers'
`assistant_early_exit` and `prompt_lookup_num_tokens` (batch 1 only). Agreement: share of all new tokens that are the
full model's choice given the text before them, counted in a separate pass that is not timed; limits are chosen on the
model's own text after other prompts. "Exits shuffled" say nothing: its speed "of no drafts", in the same loop, is what
trying costs (wanted: 0.98x). The last column is what the cost model says for the acceptance or share and the part times
of this run, relative to a step of all layers and the head; at a batch it leaves out that a group waits for its slowest
row, and in threshold mode it is for batch 1. `--edit`: prompts that ask for a copy of a file.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _bench_decode import contenders, limits_on_own_text, measure, summary
from _bench_models import llama, write_exits, write_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from ee_scale import EarlyExitForCausalLM
from ee_scale.evaluation.timing import measure_parts
from ee_scale.files import write_text
from ee_scale.modeling.costs import Costs

SEPARATOR = "<|endoftext|>"
MODES: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "temperature": {"do_sample": True, "top_k": 0}}


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


def edit_prompts(tokenizer: Any, path: Path, length: int, count: int, least: int) -> torch.Tensor:
    """A document's first tokens, a request, and the first of them again: the answer is a copy. [documents, length].

    In the words of a chat where the tokenizer has a template for one; else behind a line that parts the two.
    """
    request, there = "Repeat this file. Change the name of its first function to first_function.", "[[the file]]"
    asked = f"{there}\n\n# {request}\n\n"
    if tokenizer.chat_template:
        talk = [{"role": "user", "content": f"{request}\n\n{there}"}]
        asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in asked.split(there))
    size = (length - len(before) - len(after)) * 8 // 9
    begun = length - len(before) - len(after) - size
    if begun < 1:
        raise SystemExit(f"--prompt-tokens {length}: the request alone has {len(before) + len(after)} tokens")
    files = read_prompts(tokenizer, path, size, count, least)
    ends = [torch.tensor(part, dtype=torch.long).expand(len(files), -1) for part in (before, after)]
    return torch.cat([ends[0], files, ends[1], files[:, :begun]], 1)


def random_model(folder: Path, arguments: argparse.Namespace) -> Path:
    """A random model with exits at a quarter and at half of its depth. Raises SystemExit for a size that is none."""
    try:
        layers, hidden = map(int, arguments.random.split("x"))
        config = llama(layers, hidden, arguments.vocab)
    except ValueError:
        raise SystemExit(f"--random {arguments.random}: give LAYERSxHIDDEN, as 16x2048") from None
    exits = sorted({max(1, layers // 4), max(1, layers // 2)})
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    write_model(folder / "plain", config, arguments.device, dtype)
    found = write_exits(folder / "exits", folder / "plain", exits, arguments.random_agreement, arguments.device)
    told = ", ".join(f"exit {k}: {share:.0%}" for k, share in found.items())
    Console(width=150).print(f"random model {arguments.random}; agreement with the final layer: {told}")
    return folder / "exits"


def print_table(out: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """One line per contender; what only a GPU has, only there."""
    gpu = any(row.get("busy") is not None for row in rows)
    table = Table(title=title, title_justify="left")
    columns = ["", "tokens/s", "ratio", "of no drafts", "agreement", "layer calls/token", "accepted", "drafts/cycle"]
    columns.append("cost model")
    for name in columns + ["same", "busy", "kernels/token", "waits/token"] * gpu:
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in rows:
        predicted = row.get("predicted")
        cells = [
            row["name"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio']:.2f}x",
            "" if row["of_no_drafts"] is None else f"{row['of_no_drafts']:.2f}x",
            "" if row["agreement"] is None else f"{row['agreement']:.2%}",
            f"{row['layer_calls_per_token']:.2f}" if "layer_calls_per_token" in row else "",
            f"{row['accepted']:.1%}" if "accepted" in row else "",
            f"{row['drafted_per_cycle']:.2f}" if "drafted_per_cycle" in row else "",
            f"{predicted['speed']:.2f}x" if predicted else "",
        ]
        if gpu:
            counts = (f"{row[name]:.1f}" for name in ("kernels_per_token", "waits_per_token"))
            cells += [f"{row['same']:.0%}", f"{row['busy']:.0%}", *counts]
        table.add_row(*cells)
    out.print(table)
    kernels = sorted({name for row in rows for name in row.get("attention", ())})
    if kernels:
        out.print(f"attention kernels: {', '.join(kernels)}", highlight=False)


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder written by `ee-scale export`")
    parser.add_argument("--data", type=Path, help=f"held-out text, documents parted by {SEPARATOR}")
    parser.add_argument("--random", metavar="LAYERSxHIDDEN", help="instead of both: a random model, and random prompts")
    parser.add_argument("--vocab", type=int, default=128256, help="of a random model")
    parser.add_argument(
        "--random-agreement", type=float, default=0.75, help="share of tokens on which its first exit is right"
    )
    parser.add_argument("--prompts", type=int, default=32, help="documents to continue")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--edit", action="store_true", help="prompts that ask for a copy with a small change")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--agreement", type=float, default=0.98, help="wanted in threshold mode")
    parser.add_argument(
        "--margin", type=float, default=0.003, help="added to it when limits are chosen on other prompts"
    )
    parser.add_argument("--peers", nargs="+", default=["2", "4"], help="layers of assistant_early_exit, or none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="for timing the parts at each batch size")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of every contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; auto: as stored")
    parser.add_argument("--plain-weights", action="store_true", help="on a CPU: do not pack linear layers")
    parser.add_argument("--json", type=Path, help="file for all numbers, written after every table")
    arguments = parser.parse_args(words)
    if arguments.random is None and (arguments.model is None or arguments.data is None):
        parser.error("give --model and --data, or --random")
    try:
        arguments.peers = [] if arguments.peers == ["none"] else [int(k) for k in arguments.peers]
    except ValueError:
        parser.error(f"--peers {' '.join(arguments.peers)}: give layers, or none")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Run everything and print the tables."""
    arguments = parse_arguments(words)
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out = Console(width=170)
    result = {"settings": {k: str(v) for k, v in vars(arguments).items()}, "machine": machine(arguments.device)}
    result["seconds"], result["tables"] = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        where = arguments.model if arguments.random is None else str(random_model(Path(folder), arguments))
        for _ in run_tables(arguments, where, out, result):
            if arguments.json:
                write_text(arguments.json, json.dumps(result, indent=1) + "\n")


def run_tables(arguments: argparse.Namespace, where: str, out: Console, result: dict[str, Any]) -> Iterator[None]:
    """Measure the model in the folder `where`; `result` is whole whenever this yields, after each table."""
    device, batches = arguments.device, arguments.batches
    model = EarlyExitForCausalLM.from_pretrained(where, dtype=arguments.dtype).to(device).eval()
    model.pack_weights = not arguments.plain_weights
    stock = AutoModelForCausalLM.from_pretrained(where, dtype=arguments.dtype).to(device).eval()
    prompts, others = some_prompts(arguments, where, model.config.vocab_size)
    context = arguments.prompt_tokens + arguments.new_tokens // 2
    rows = (1, 2, 3, 4, 5, 8, 13)
    costs_of = {b: measure_parts(model, context, arguments.seconds, rows=rows, batch=b).costs for b in batches}
    out.print(f"batch {batches[0]}: {part_times(costs_of[batches[0]])}")
    for batch, part in costs_of.items():
        result["seconds"][batch] = {"layer": dict(part.layer), "head": dict(part.head), "checks": dict(part.checks)}
    yield
    bound = arguments.agreement + arguments.margin
    for name in arguments.modes:
        mode = MODES[name]
        label = name
        if name == "temperature":
            mode, label = {**mode, "temperature": arguments.temperature}, f"temperature {arguments.temperature}"
        limits = limits_on_own_text(model, others, mode, arguments.new_tokens, bound)
        for batch in batches:
            ways = contenders(model, stock, batch, limits, costs_of[batch], arguments.peers)
            measure(ways, prompts, batch, mode, arguments.new_tokens, arguments.rounds)
            table = [summary(way, ways, costs_of[batch]) for way in ways]
            print_table(out, f"{label}, batch {batch}", table)
            result["tables"][f"{label}, batch {batch}"] = table
            yield


def some_prompts(arguments: argparse.Namespace, where: str, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts to continue, and others that limits are chosen on: token ids [documents, length] on the device."""
    length, count = arguments.prompt_tokens, arguments.prompts
    if arguments.random is None:
        read = edit_prompts if arguments.edit else read_prompts
        found = read(AutoTokenizer.from_pretrained(where), arguments.data, length, 4 * count, 2 * count)
    else:
        found = torch.randint(1, vocab, (2 * count, length), generator=torch.Generator().manual_seed(0))
    found = found.to(arguments.device)
    return found[:count], found[count:]


def part_times(costs: Costs) -> str:
    """What the parts cost, in a line."""
    layer = costs.layers(1)
    exits = ", ".join(f"exit {k}: {check / layer:.2f} layers" for k, check in costs.checks.items())
    times = f"layer {layer * 1e3:.3f} ms, final head {costs.head_layers:.2f} layers, {exits}"
    return f"{times}; 4 positions cost {costs.layers(1, 4) / layer:.2f} times as much per layer"


def machine(device: str) -> dict[str, str]:
    """What ran it."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "transformers": version("transformers")}


if __name__ == "__main__":
    main()
