"""Which way of training a drafting exit pays: short runs that differ in one setting each, and what each one drafts.

    python scripts/ablate_drafter.py --model path/to/model --data corpus.txt --held code=held.txt --work runs/ablation
    python scripts/ablate_drafter.py ... --tokens 300000 --arms depth,kind,loss --parts bench.json

Every run is `exits=drafter` with one thing changed, for the same number of tokens. An exit is measured as lossless
decoding uses it: how often its greedy token is the model's on held-out text and on the model's own greedy
continuations of held-out prompts, and sum(min(p, q)) at the temperature on sampled ones. The speed is the cost model's
best (`modeling.costs`), on a device that waits for weights (V = 1) and, with `--parts` (the JSON of
`scripts/bench_decode.py`), on the machine that file is from. What is there already is not run again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

BATCH = 2  # sequences of a step, as exits=drafter has it
SMALL_STEPS = 500
TEMPERATURE, ROWS = 0.8, 8
Parts = dict[str, Any]


def arms(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> settings that differ from `exits=drafter`; the names of one question share their first word.

    Runs that learn from the final layer share what exits read of the backbone (`data.cache_taps`). The ones of depth,
    kind, own text, batch and rate are compared with 'loss labels': they learn from the labels, which is cheaper.
    """
    count = steps(options) * BATCH
    here, taps = "exits.layers=[0.1667]", ["data.cache_taps=true", f"data.sequences={count}"]
    taught, labels = [here, *taps], [here, "exits.kl_weight=0"]
    depths = "exits.layers=[0.034,0.1,0.1667,0.2667,0.3334,0.5,0.6667]"
    found = {
        "recipe": taught,
        "loss both": [*taught, "exits.kl_weight=1"],
        "loss soft": [*taught, "exits.kl_temperature=2"],
        "loss labels": labels,
        "epochs 4": [*taught, f"train.steps={4 * steps(options)}"],
        "shortlist 1/24": [*taught, "exits.shortlist=0.0417"],
        "shortlist 1/6": [*taught, "exits.shortlist=0.1667"],
        "shortlist 1/3": [*taught, "exits.shortlist=0.3333"],
        "depth": [depths, "exits.kl_weight=0"],
        "kind mlp": [*labels, "exits.kind=mlp"],
        "own text": [*labels, "data.own_text=0.5"],
        "batch 2048 tokens": [*labels, "train.global_batch_size=8", f"train.steps={steps(options) // 4}"],
        "rate 0.0003": [*labels, "optim.lr=3e-4"],
        "rate 0.001": [*labels, "optim.lr=1e-3"],
        "rate 0.006": [*labels, "optim.lr=6e-3"],
    }
    if options.small:
        text, held_out = options.small
        found |= small_arms(text, held_out)
    return found


def small_arms(text: str, held_out: str) -> dict[str, list[str]]:
    """The same for a small text: SMALL_STEPS steps over it again and again, and what may keep that from hurting."""
    base = [f"data.path=[{text}]", "data.weights=null", "data.cache_taps=true", "data.sequences=248"]
    base += ["exits.layers=[0.1]", f"train.steps={SMALL_STEPS}"]
    stop = [f"train.held_out={held_out}", "train.early_stop=3", f"train.save_every={SMALL_STEPS // 10}"]
    short, own = ["exits.shortlist=0.0417"], ["data.own_text=0.5", "data.own_text_tokens=32000"]
    return {
        "small": base,
        "small stops": [*base, *stop],
        "small stops, short head": [*base, *stop, *short],
        "small stops, short head, own text": [*base, *stop, *short, *own],
    }


def steps(options: argparse.Namespace) -> int:
    """Optimizer steps of the budget."""
    return max(4, options.tokens // (options.seq_length * BATCH))


def train(options: argparse.Namespace, name: str, settings: list[str]) -> dict[str, Any]:
    """One run in a process of its own; seconds of it. Raises SystemExit if it fails."""
    out, work = options.work / name, options.work
    words = [
        f"model={options.model}",
        f"data.path=[{','.join(options.data)}]",
        *([f"data.weights=[{options.weights}]"] if options.weights else []),
        f"data.seq_length={options.seq_length}",
        f"data.cache_dir={options.cache or work / 'data'}",
        f"train.steps={steps(options)}",
        "exits=drafter",
        *settings,
        f"out={out}",
    ]
    start = time.monotonic()
    with (work / f"{name}.log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "ee_scale", "tune", *words]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise SystemExit(f"{name}: the run failed, see {work / f'{name}.log'}")
    return {"settings": settings, "seconds": time.monotonic() - start}


def passages(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Held-out text of each name, and the model's continuations of prompts from it; written once."""
    from ee_scale.config.schema import ProbeConfig
    from ee_scale.data.inputs import load_tokenizer
    from ee_scale.data.loader import windows
    from ee_scale.evaluation.evaluate import read_prefixes
    from ee_scale.evaluation.probe import own_text
    from ee_scale.inference.model import open_model

    path = options.work / "passages.pt"
    if path.exists():
        return torch.load(path, weights_only=False)
    model, tokenizer, found = open_model(options.model).eval(), load_tokenizer(options.model, "model"), {}
    for name, text in (pair.split("=", 1) for pair in options.held):
        config = ProbeConfig(model=str(options.model), data=text, cache_dir=str(options.cache or options.work / "data"))
        pieces = list(windows(read_prefixes(config, model, tokenizer, options.model), options.seq_length, 1))
        chosen = [pieces[i * len(pieces) // options.prompts] for i in range(options.prompts)]
        ids, learned = (torch.cat([piece[part] for piece in chosen]) for part in (0, 1))
        found[name] = {"text": (ids, learned)}
        for kind, temperature in (("greedy", None), ("sampled", TEMPERATURE)):
            said = own_text(model, ids[:, : options.prompt_tokens], options.new_tokens, temperature, 0, tokenizer)
            found[name][kind] = (said.ids, said.kept)
            Console().print(f"the model has continued {len(ids)} prompts of {name} ({kind})", highlight=False)
    torch.save(found, path)
    return found


def read(options: argparse.Namespace, folder: Path, texts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What each exit of a run drafts: agreement on text and greedy text, sum(min(p, q)) on sampled text; its costs."""
    from ee_scale.api import export
    from ee_scale.config.schema import ExportConfig
    from ee_scale.evaluation.probe import Passage, read_exits
    from ee_scale.inference.model import open_model

    exits = folder.with_name(f"{folder.name}-exits")
    if not exits.exists():
        export(ExportConfig(src=str(folder), out=str(exits), kind="sidecar"))
    model = open_model(exits).eval()
    rows = [{"exit": k, "agreement": {}} for k in model.exit_spec.layers]
    for name, kinds in texts.items():
        for kind, (ids, kept) in kinds.items():
            parts = (Passage(*part) for part in zip(ids.split(ROWS), kept.split(ROWS), strict=True))
            for row, reading in zip(rows, read_exits(model, parts, TEMPERATURE, 0.98), strict=True):
                share = reading.acceptance if kind == "sampled" else reading.agreement
                row["agreement"][f"{name}, {kind}"] = share
    for row in rows:
        row["speed"] = speeds(model, row, options.parts)
    return rows


def speeds(model: Any, row: dict[str, Any], parts: Parts | None) -> dict[str, Any]:
    """Device -> draft cost c, and text -> (draft length, speed) that the cost model gives."""
    from ee_scale.modeling.costs import best_draft_length

    k, found = row["exit"], {}
    for device, costs in costs_of(model, k, parts):
        best = {name: best_draft_length(costs, k, share) for name, share in row["agreement"].items()}
        found[device] = {"cost": costs.draft_cost(k), "best": best}
    return found


def costs_of(model: Any, k: int, parts: Parts | None) -> Iterator[tuple[str, Any]]:
    """Costs in layers where a part's time is its share of the weights, and in the seconds of `parts`.

    In those an exit is timed with the modules that it had there: the check of this one is that time, less its layer and
    head, plus those of this one.
    """
    from ee_scale.modeling.costs import Costs

    def size(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    count, spec = model.config.num_hidden_layers, model.exit_spec
    layer, head = size(model.base_model.layers[0]), model.get_output_embeddings().weight.numel()
    own, body = model.exit_heads[str(k)], model.exit_heads[str(k)].body
    read_by = size(own) + (head if spec.reads_lm_head else 0)
    yield "weights", Costs(count, {1: 1.0}, {1: head / layer}, {k: read_by / layer})
    if parts is not None:
        rows, heads = ({int(n): t for n, t in parts[part].items()} for part in ("layer", "head"))
        check = parts["rest"] + (size(body) / layer if body is not None else 0) * rows[1]
        scored = (read_by - (size(body) if body is not None else 0)) / head
        yield "cpu", Costs(count, rows, heads, {k: check + scored * heads[1]})


def timed(path: Path | None, shortlist_share: float) -> Parts | None:
    """Seconds of layer and head by rows of a benchmark, and what its checks took beside a layer and a short head."""
    if path is None:
        return None
    found = json.loads(path.read_text(encoding="utf-8"))["seconds"]["1"]
    checks = list(found["checks"].values())
    rest = sum(checks) / len(checks) - found["layer"]["1"] - shortlist_share * found["head"]["1"]
    return {**found, "rest": max(0.0, rest)}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(results: dict[str, Any], names: list[str]) -> Table:
    """A row per exit of each run; agreements and speeds are means over the held-out texts."""
    found = Table(title="drafting exits, same tokens")
    devices = sorted({device for result in results.values() for row in result["exits"] for device in row["speed"]})
    heads = ["run", "exit", "text", "greedy", "sampled"]
    heads += [f"{what}, {device}" for device in devices for what in ("c", "greedy", "sampled")]
    for head in heads:
        found.add_column(head, justify="left" if head == "run" else "right")
    for name, result in results.items():
        for row in result["exits"]:
            kinds = {kind: mean([row["agreement"][f"{text}, {kind}"] for text in names]) for kind in heads[2:5]}
            cells = [name, str(row["exit"]), *(f"{share:.1%}" for share in kinds.values())]
            for device in devices:
                speed = row["speed"][device]
                cells.append(f"{speed['cost']:.3f}")
                cells += [
                    f"{mean([speed['best'][f'{text}, {kind}'][1] for text in names]):.3f}x"
                    for kind in ("greedy", "sampled")
                ]
            found.add_row(*cells)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Train what is missing, measure it, print the table and write the JSON after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True, help="training text, as data.path")
    parser.add_argument("--weights", help="their weights, as 0.3,0.7")
    parser.add_argument("--held", nargs="+", required=True, metavar="NAME=TEXT", help="held-out text")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs, ablation.json and their logs")
    parser.add_argument("--cache", type=Path, help="tokenised data; default: in --work")
    parser.add_argument("--tokens", type=int, default=150_000, help="budget of each run")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--small", nargs=2, metavar=("TEXT", "HELD"), help="a small text, and more of it to stop by")
    parser.add_argument("--arms", help="first words of the runs wanted, as depth,kind; default: all")
    parser.add_argument("--prompts", type=int, default=16, help="windows and prompts of each held-out text")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--parts", type=Path, help="JSON of scripts/bench_decode.py: seconds of this machine's parts")
    parser.add_argument("--shortlist-share", type=float, default=1 / 6, help="of the vocabulary, in --parts")
    options = parser.parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.work.mkdir(parents=True, exist_ok=True)
    options.parts = timed(options.parts, options.shortlist_share)
    path = options.work / "ablation.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    texts = passages(options)
    for name, settings in arms(options).items():
        if options.arms and name.split()[0] not in options.arms.split(","):
            continue
        if name not in results:
            Console().print(f"{name}: {' '.join(settings)}", highlight=False, markup=False)
            folder = re.sub(r"[^a-z0-9.]+", "-", name)
            made = train(options, folder, settings)
            results[name] = {**made, "exits": read(options, options.work / folder, texts)}
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    Console().print(table(results, list(texts)))


if __name__ == "__main__":
    main()
