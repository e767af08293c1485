"""Benchmark of llama.cpp with a drafter: tokens per second against the model alone, and its n-gram drafts beside it.

    python scripts/bench_llama_cpp.py --model target.gguf --drafter drafter.gguf --data heldout.txt --json llama.json

Every way continues the same prompts greedily, in turns, prompt by prompt; ratios are to the model alone in the same
turn, so that whatever slows the machine slows both. `--drafts` are tried one by one. Whether the tokens are those of
the model alone is counted: passes over several rows round otherwise, so a near tie may go another way. The engine is
llama.cpp's own server in the wheel xllamacpp, which is built for any x86-64 and is slower than a build for one machine.
"""

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

from rich.console import Console
from rich.table import Table

SEPARATOR = "<|endoftext|>"
ALONE = "alone"


class LlamaCpp:
    """A model in this process, and what drafts for it: one sequence at a time."""

    def __init__(
        self,
        model: Path,
        drafter: Path | None = None,
        drafts: int = 4,
        *,
        threads: int = 1,
        context: int = 256,
        ngrams: bool = False,
        exact_cache: bool = False,
    ):
        """exact_cache: keys and values in fp32, not fp16; ngrams: drafts from the text itself."""
        import xllamacpp

        settings, kinds = xllamacpp.CommonParams(), xllamacpp.common_speculative_type
        settings.model.path, settings.n_ctx, settings.n_parallel = str(model), context, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.warmup, settings.verbosity = False, 0
        if exact_cache:
            settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        types = []
        if ngrams:
            types.append(kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE)
            settings.speculative.ngram_simple.size_n, settings.speculative.ngram_simple.size_m = 3, drafts
        if drafter is not None:
            types.append(kinds.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE)
            settings.speculative.draft.mparams.path, settings.speculative.draft.n_max = str(drafter), drafts
            settings.speculative.draft.cpuparams.n_threads = threads
            settings.speculative.draft.cpuparams_batch.n_threads = threads
        if types:
            settings.speculative.types = types
        self._server = xllamacpp.Server(settings)

    def greedy(self, ids: Sequence[int], new: int, **more: Any) -> dict[str, Any]:
        """What the server says of `new` tokens behind a prompt; 'tokens' are their ids."""
        asked = {"prompt": list(ids), "n_predict": new, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self._post("completion", asked | more)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text; special: with what a text gets by itself."""
        return self._post("tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation."""
        return self._post("apply-template", {"messages": messages})["prompt"]

    def _post(self, name: str, body: dict[str, Any]) -> Any:
        request = Request(f"{self._server.listening_address}/{name}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=600) as answer:
            return json.load(answer)


def measure(engines: dict[str, LlamaCpp], prompts: list[list[int]], new: int, rounds: int) -> list[dict[str, Any]]:
    """One row per way: median ratio to the model alone, tokens/s, drafts accepted, share of prompts with its tokens."""
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.greedy(prompts[0], new)  # a warm-up
    for prompt in prompts * rounds:
        for name, engine in engines.items():
            said[name].append(engine.greedy(prompt, new, ignore_eos=True))
    speeds = {name: [one["timings"]["predicted_per_second"] for one in found] for name, found in said.items()}
    rows = []
    for name, found in said.items():
        ratios = [speed / alone for speed, alone in zip(speeds[name], speeds[ALONE], strict=True)]
        drafted, accepted = (
            sum(one["timings"].get(key, 0) for one in found) for key in ("draft_n", "draft_n_accepted")
        )
        same = [one["tokens"] == alone["tokens"] for one, alone in zip(found, said[ALONE], strict=True)]
        row = {"name": name, "ratio": median(ratios), "low": min(ratios), "high": max(ratios)}
        row |= {"tokens_per_second": median(speeds[name]), "same": sum(same) / len(same)}
        rows.append(row | {"accepted": accepted / drafted if drafted else None})
    return rows


def read_prompts(engine: LlamaCpp, path: Path, length: int, count: int) -> list[list[int]]:
    """The first `length` tokens of up to `count` documents that have as many."""
    texts = path.read_text(encoding="utf-8").split(SEPARATOR)
    found = [ids[:length] for text in texts if len(ids := engine.tokenize(text[: 12 * length], special=True)) >= length]
    if not found:
        raise SystemExit(f"--data {path}: no document of {length} tokens; documents are parted by {SEPARATOR}")
    return found[:count]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--drafter", type=Path, required=True, help="GGUF file")
    parser.add_argument("--data", type=Path, required=True, help=f"text; documents are parted by {SEPARATOR}")
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8], help="tokens per cycle")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    settings = {"threads": given.threads, "context": given.prompt_tokens + given.new_tokens + 64}
    engines = {ALONE: LlamaCpp(given.model, **settings)}
    prompts = read_prompts(engines[ALONE], given.data, given.prompt_tokens, given.prompts)
    for drafts in given.drafts:
        engines[f"drafter, {drafts}"] = LlamaCpp(given.model, given.drafter, drafts, **settings)
    most = max(given.drafts)
    engines[f"n-grams, {most}"] = LlamaCpp(given.model, None, most, ngrams=True, **settings)
    engines[f"n-grams, then drafter, {most}"] = LlamaCpp(given.model, given.drafter, most, ngrams=True, **settings)
    rows = measure(engines, prompts, given.new_tokens, given.rounds)
    show(rows)
    if given.json:
        facts = {name: str(value) for name, value in vars(given).items()} | {"xllamacpp": version("xllamacpp")}
        given.json.write_text(json.dumps({"settings": facts, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="llama.cpp, greedy, batch 1", title_justify="left")
    for column in ("way", "speed", "from", "to", "tokens/s", "accepted", "same tokens"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        speeds = (f"{row[key]:.2f}x" for key in ("ratio", "low", "high"))
        accepted = "-" if row["accepted"] is None else f"{row['accepted']:.0%}"
        table.add_row(row["name"], *speeds, f"{row['tokens_per_second']:.1f}", accepted, f"{row['same']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
