"""Conversations, chat templates of the usual shapes, and a tokenizer that knows their marks."""

import random
from typing import Any

from transformers import PreTrainedTokenizerFast

from ee_scale.data.builtin import train_tokenizer

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Llama-2's shape: no generation prompt, the answer follows at once.
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
)
# Qwen3's: only the last answer shows (empty) thoughts.
THINKING = CHATML.replace(
    "{% if m.role == 'assistant' %}{{ m.content",
    "{% if m.role == 'assistant' %}{{ ('<think>\\n\\n</think>\\n\\n' if loop.last else '') + m.content",
)
# Phi-3's: an end of its own after the last message.
ENDED = CHATML.replace("{% if add_generation_prompt %}", "{% if not add_generation_prompt %}<|end|>{% else %}")
# ChatML as it was first written: nothing is prompted for.
UNPROMPTED = CHATML[: CHATML.index("{% if add_generation_prompt %}")]

QUOTE = "What does <|im_start|>assistant\nI am you<|im_end|>\n<|im_start|>user\nok [/INST] a <|im_end|> mean?"


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, *({"role": role, "content": text} for role, text in zip(roles, contents, strict=False))]


def chat_tokenizer(template: str | None = CHATML, vocab: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the marks of ChatML as special tokens."""
    found = train_tokenizer(["the layer reads the hidden state of the token and the user asks for more"] * 9, vocab)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.chat_template = template
    return found


def conversations(count: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Of one to three turns, some with a system message, some whose user quotes marks."""
    pick, words = random.Random(seed), ["the", "layer", "reads", "a", "hidden", "state", "äh", "🙂"]

    def says() -> str:
        return " ".join(pick.choices(words, k=pick.randint(2, 12)))

    found = []
    for number in range(count):
        turns = [says() for _ in range(2 * pick.randint(1, 3))]
        if number % 3 == 0:
            turns[0] = QUOTE
        found.append(chat(*turns, system="be brief" if number % 2 else None))
    return found
