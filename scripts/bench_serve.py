"""Load on a running `ee-scale serve`: latency, speed, and whether anything grows or stays behind.

ee-scale serve model=my-model name=m policy=lossless rows=8
python scripts/bench_serve.py --url http://127.0.0.1:8000 --model m --data heldout.txt --clients 8 --seconds 600
python scripts/bench_queue.py --model my-model --data heldout.txt --batch 8 --policy lossless   # the plain loop

Each client streams one answer after another; one in ten leaves in the middle. With --pid, memory of the server's
process and its threads are looked at too, at the start (after a tenth of the time) and at the end.
"""

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import httpx
import openai
import psutil
from rich.console import Console

LEAVES = 0.1  # share of answers


@dataclass
class Load:
    """What clients have seen: seconds, and tokens."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: int = 0
    left: int = 0


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True, help="the name that the server gives it")
    parser.add_argument("--data", type=Path, required=True, help="text that prompts are cut from")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--prompt-chars", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--policy", help="exit policy of the requests; left out: the server's")
    parser.add_argument("--key", default="none")
    parser.add_argument("--pid", type=int, help="of the server")
    return parser.parse_args()


async def client(arguments: argparse.Namespace, text: str, number: int, end: float, load: Load) -> None:
    """One answer after another, until the time is over."""
    draw, extra = random.Random(number), {"exit_policy": arguments.policy} if arguments.policy else {}
    server = openai.AsyncOpenAI(base_url=f"{arguments.url}/v1", api_key=arguments.key, max_retries=0, timeout=None)
    async with server:
        while time.monotonic() < end:
            start = draw.randrange(max(1, len(text) - arguments.prompt_chars))
            leaves = draw.randrange(1, 20) if draw.random() < LEAVES else 0
            asked = last = time.monotonic()
            stream = await server.completions.create(
                model=arguments.model,
                prompt=text[start : start + arguments.prompt_chars],
                max_tokens=arguments.new_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            )
            pieces = 0
            async for chunk in stream:
                now = time.monotonic()
                if chunk.usage is not None:
                    load.tokens += chunk.usage.completion_tokens
                    load.answers += 1
                    continue
                (load.between if pieces else load.first).append(now - (last if pieces else asked))
                pieces, last = pieces + 1, now
                if pieces == leaves:
                    load.left += 1
                    break
            await stream.close()


async def run(arguments: argparse.Namespace, load: Load) -> list[str]:
    """All clients; what the server's process was like meanwhile."""
    text, end = arguments.data.read_text(encoding="utf-8"), time.monotonic() + arguments.seconds
    process, lines = psutil.Process(arguments.pid) if arguments.pid else None, []
    tasks = [asyncio.create_task(client(arguments, text, i, end, load)) for i in range(arguments.clients)]
    if process is not None:
        await asyncio.sleep(arguments.seconds / 10)
        lines.append(f"start: {process.memory_info().rss / 2**20:.0f} MiB, {process.num_threads()} threads")
    await asyncio.gather(*tasks)
    if process is not None:
        lines.append(f"end:   {process.memory_info().rss / 2**20:.0f} MiB, {process.num_threads()} threads")
    return lines


def main() -> None:
    """Load, then numbers."""
    arguments, load, out = read_arguments(), Load(), Console(width=120, highlight=False)
    start = time.monotonic()
    lines = asyncio.run(run(arguments, load))
    seconds = time.monotonic() - start
    out.print(f"{load.answers} answers, {load.left} left by their client, {load.tokens / seconds:.1f} tokens/s")
    for name, values in (("first token", load.first), ("between pieces", load.between)):
        cuts = quantiles(values, n=20)
        out.print(f"{name:14} p50 {1000 * cuts[9]:8.1f} ms   p95 {1000 * cuts[18]:8.1f} ms")
    out.print("\n".join(lines))
    headers = {"authorization": f"Bearer {arguments.key}"}
    while True:  # those that were left end within a step
        text = httpx.get(f"{arguments.url}/metrics", headers=headers).text
        busy = [line for line in text.splitlines() if line.startswith("ee_scale:num_requests_")]
        if all(line.endswith(" 0.0") for line in busy) or time.monotonic() > start + seconds + 10:
            break
    out.print("\n".join(busy))


if __name__ == "__main__":
    main()
