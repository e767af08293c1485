"""`ee-scale serve` in a process of its own, on a free port, and a model for it."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path

import httpx
import openai
import torch
from transformers import AutoConfig, LlamaForCausalLM

from ee_scale.data.builtin import llama_config
from ee_scale.exits.placement import exit_spec
from ee_scale.inference.model import untrained_exits
from helpers.chats import chat_tokenizer
from helpers.cli import running_cli

EXITS, LAYERS, CONTEXT = (1, 3), 4, 512
EASY, HARD = 20, 200  # tokens of the two kinds of text that a drifting model writes


def write_served_model(folder: Path) -> Path:
    """A random model of 4 layers with exits at 1 and 3 that now and then agree with it, which hardly ever ends a text;
    with a chat template."""
    tokenizer = chat_tokenizer()
    config = llama_config(tokenizer, layers=LAYERS, hidden=64, max_positions=CONTEXT)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.0 if "down_proj" in name or "o_proj" in name else 3.0)
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder / "base")
    found = untrained_exits(
        folder / "base", exit_spec(AutoConfig.from_pretrained(folder / "base"), EXITS, "mlp", "full", 4)
    )
    found.save_pretrained(folder / "model")
    for name in ("base", "model"):
        tokenizer.save_pretrained(folder / name)
    return folder / "model"


def write_drifting_model(folder: Path) -> Path:
    """A model of 2 layers, each token of which names the next, and its exit at 1, which is always sure. Behind an EASY
    token both say the same for ever; behind a HARD one the last layer says the token HARD, and the exit another one.
    """
    tokenizer = chat_tokenizer()
    config = llama_config(tokenizer, layers=2, hidden=64, max_positions=CONTEXT)
    config.vocab_size, config.tie_word_embeddings = len(tokenizer), False
    torch.manual_seed(0)
    model, easy, hard = LlamaForCausalLM(config), torch.arange(10, 150), torch.arange(150, 290)
    words = torch.nn.functional.normalize(torch.randn(config.vocab_size, 64), dim=1)
    words[:, :2] = 0  # of the stream: what marks a hard token, and what the last layer makes of the mark
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        last, head = model.model.layers[1].mlp, model.lm_head.weight.zero_()
        model.model.embed_tokens.weight.copy_(words)
        for group in (easy, hard):
            head[group.roll(-1)] = 4 * words[group]
        model.model.embed_tokens.weight[hard, 0] = 1
        for projection in (last.gate_proj, last.up_proj):
            projection.weight[0] = torch.eye(64)[0]
        last.down_proj.weight[1, 0] = 0.1
        head[HARD, 1] = 4
    model.save_pretrained(folder / "base")
    spec = exit_spec(AutoConfig.from_pretrained(folder / "base"), (1,), "norm", "full", 4)
    untrained_exits(folder / "base", spec).save_pretrained(folder / "model")
    for name in ("base", "model"):
        tokenizer.save_pretrained(folder / name)
    return folder / "model"


@dataclass
class Server:
    """One that answers.

    Attributes:
        folder: its working directory.
    """

    process: Process
    folder: Path
    url: str

    @property
    def output(self) -> str:
        """What it has said so far."""
        return (self.folder / ".output_0").read_text()

    def client(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's own, which takes the first answer."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=None)

    def raw(self) -> httpx.Client:
        """One that sends anything."""
        return httpx.Client(base_url=self.url, timeout=None)

    def metric(self, name: str, **labels: str) -> float:
        """A value of /metrics."""
        with self.raw() as client:
            lines = client.get("/metrics").text.splitlines()
        for line in lines:
            if line.startswith(f"ee_scale:{name}{{") and all(
                f'{key}="{value}"' in line for key, value in labels.items()
            ):
                return float(line.split()[-1])
        return 0.0


@contextmanager
def serving(model: Path, folder: Path, *settings: str, inject: object = None, waits: bool = True) -> Iterator[Server]:
    """A server of a model, with `folder` as working directory; `waits`: until the model is there."""
    words = ["serve", f"model={model}", "port=0", "device=cpu", "dtype=fp32", *settings]
    with running_cli(words, folder, inject) as process:  # type: ignore[arg-type]
        word = "serving .* on" if waits else "loading .*;"
        while not (found := re.search(rf"{word} (http://\S+?)(/health)? ", _read(folder))):
            assert process.is_alive(), _read(folder)
            time.sleep(0.02)
        yield Server(process, folder, found[1])


def hold_steps(rank: int) -> None:
    """In the server: no step of decoding as long as there is a file `hold`; loading waits for `hold_loading`."""
    from ee_scale.modeling.row_queue import RowQueue
    from ee_scale.serving.served import Served

    step, opened = RowQueue.step, Served.open

    def held(queue: RowQueue) -> list:
        while os.path.exists("hold"):
            time.sleep(0.01)
        return step(queue)

    def slow(served: Served, device: torch.device) -> object:
        while os.path.exists("hold_loading"):
            time.sleep(0.01)
        return opened(served, device)

    RowQueue.step, Served.open = held, slow  # type: ignore[method-assign,assignment]


def _read(folder: Path) -> str:
    path = folder / ".output_0"
    return path.read_text() if path.exists() else ""
