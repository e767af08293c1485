"""llama.cpp itself, in this process: the wheel xllamacpp, which has its server and its speculative decoding."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

needs_llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="llama.cpp is not installed: pip install xllamacpp"
)


class LlamaCpp:
    """A model, and a drafter for it: one sequence, one thread, keys and values in fp32."""

    def __init__(self, model: Path, drafter: Path | None = None, drafts: int = 4):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(model), 256, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.warmup, settings.verbosity = False, 0
        if drafter is not None:
            settings.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
            settings.speculative.draft.mparams.path, settings.speculative.draft.n_max = str(drafter), drafts
        self.server = xllamacpp.Server(settings)

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
        request = Request(f"{self.server.listening_address}/{name}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=300) as answer:
            return json.load(answer)
