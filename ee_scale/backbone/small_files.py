"""Which small files of a model folder go where its weights go: tokenizer, processor, generation settings, terms.

An allow-list, because a copy holds other weights: whatever else lies there (a trainer's state, digests, results, an
adapter's config, loading code) speaks of the folder it lies in.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATES = "additional_chat_templates"
# Names that tokenizers of transformers declare (`vocab_files_names`), and what other libraries read beside them.
VOCABULARIES = (
    *("tokenizer*.json", "tokenizer.model*", "*.model", "*.model.v[0-9]*", "*.tokenizer", "*.tiktoken", "tekken*.json"),
    *("vocab", "*vocab*.json", "*vocab*.txt", "merges*.txt", "dict*.txt", "*.bpe", "*.codes", "*.spm"),
    *("normalizer.json", "byte_maps.json", "emoji.json", "word_*.json"),
)
TOKENS = ("special_tokens_map.json", "added_tokens.json")  # beside a vocabulary
TEMPLATES = ("*.jinja", "chat_template*.json", f"{CHAT_TEMPLATES}/*.jinja")
PROCESSORS = ("*processor_config.json", "audio_tokenizer_config.json")
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "COPYRIGHT*", "USE_POLICY*")
SMALL_FILES = (
    *VOCABULARIES,
    *TOKENS,
    *TEMPLATES,
    *PROCESSORS,
    GENERATION_CONFIG,
    *TERMS,
    *(name.lower() for name in TERMS),
)


def has_vocabulary(folder: Path) -> bool:
    """Whether a tokenizer lies in a folder, of whatever kind."""
    return any(any(fnmatchcase(name.name, pattern) for pattern in VOCABULARIES) for name in small_files(folder))


def small_files(folder: Path) -> Iterator[Path]:
    """Those of a folder, relative to it."""
    for path in sorted([*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATES}/*")]):
        name = path.relative_to(folder)
        if path.is_file() and any(fnmatchcase(name.as_posix(), pattern) for pattern in SMALL_FILES):
            yield name
