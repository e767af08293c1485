"""llama.cpp itself, where it is installed: the wheel xllamacpp has its server and its speculative decoding."""

from importlib.util import find_spec
from pathlib import Path

import bench_llama_cpp
import pytest

needs_llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="llama.cpp is not installed: pip install xllamacpp"
)


class LlamaCpp(bench_llama_cpp.LlamaCpp):
    """As near to transformers as it comes: keys and values in fp32."""

    def __init__(self, model: Path, drafter: Path | None = None):
        super().__init__(model, drafter, exact_cache=True)
