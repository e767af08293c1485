"""A batch that stays full against one batch after another: prompts whose answers differ much in length.

python scripts/bench_queue.py --model my-model --data heldout.txt --prompts 32 --batch 8 --shortest 8 --longest 128

Every way gives every prompt the same number of new tokens (no end of text). In turns, best of `--rounds`.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer

from ee_scale.inference.model import open_model
from ee_scale.modeling.packing import packed_linears
from ee_scale.modeling.row_queue import QueuedRow, RowQueue

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with exits")
    parser.add_argument("--data", type=Path, required=True, help="text that prompts are cut from")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shortest", type=int, default=8, help="new tokens")
    parser.add_argument("--longest", type=int, default=128, help="new tokens; lengths between are drawn evenly")
    parser.add_argument("--policy", nargs="*", default=["off", "threshold", "lossless"])
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Time the ways, and print a table."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    model = open_model(arguments.model, dtype=TYPES[arguments.dtype]).eval()
    plain = open_model(arguments.model, dtype=TYPES[arguments.dtype], pack_weights=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with packed_linears(model):
        pass  # not in the time of the first way
    ids = tokenizer(arguments.data.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    width, draw = arguments.prompt_tokens, random.Random(0)
    step = max(1, (len(ids) - width) // arguments.prompts)
    prompts = [ids[i * step : i * step + width] for i in range(arguments.prompts)]
    lengths = [draw.randint(arguments.shortest, arguments.longest) for _ in prompts]

    def batches(policy: str) -> None:
        """Each batch goes on until its longest row is done: what the others get meanwhile is thrown away."""
        for first in range(0, len(prompts), arguments.batch):
            rows = torch.tensor(prompts[first : first + arguments.batch])
            new = max(lengths[first : first + arguments.batch])
            policies = {} if policy == "transformers" else {"exit_policy": policy}
            owner = plain if policy == "transformers" else model
            if policy == "off":  # our loop, exits not looked at
                policies = {"exit_policy": "threshold", "exit_threshold": 1.01}
            settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, **policies}
            owner.generate(rows, attention_mask=torch.ones_like(rows), pad_token_id=0, **settings)

    def queue(policy: str) -> None:
        common = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        options, longest = {"exit_policy": policy}, width + max(lengths)
        with packed_linears(model), RowQueue(model, options, arguments.batch, longest, common) as rows:
            for prompt, new in zip(prompts, lengths, strict=True):
                rows.add(QueuedRow(prompt, {"max_new_tokens": new}))
            while rows.busy:
                rows.step()

    ways: list[tuple[str, Callable[[str], None], str]] = [("transformers, batches", batches, "transformers")]
    for policy in arguments.policy:
        ways += [(f"{policy}, batches", batches, policy), (f"{policy}, queue", queue, policy)]
    best = dict.fromkeys((name for name, *_ in ways), float("inf"))
    for _ in range(arguments.rounds):
        for name, way, policy in ways:
            start = time.perf_counter()
            way(policy)
            best[name] = min(best[name], time.perf_counter() - start)
    reference = best["transformers, batches"]
    out = Console(width=120, highlight=False)
    out.print(f"{sum(lengths)} tokens wanted, of {len(prompts)} prompts, {min(lengths)} to {max(lengths)} each")
    for name, seconds in best.items():
        out.print(f"{name:24} {sum(lengths) / seconds:8.1f} tokens/s   {reference / seconds:.2f}x")


if __name__ == "__main__":
    main()
