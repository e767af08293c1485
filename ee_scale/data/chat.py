"""Conversations: records to messages, messages to token ids by the tokenizer's chat template, and what is learned."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ee_scale.data.readers import Number, text_of, whole_characters
from ee_scale.data.utf8 import STRICT, BadBytes
from ee_scale.errors import UserError, one_line
from ee_scale.reading import shown

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
ASSISTANT = "assistant"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them; the assistant's from number `learned_from` on are learned."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    learned_from: int
    here: str
    num_bytes: int

    @property
    def blank(self) -> bool:
        """Whether nobody says anything."""
        return not any(message.get("content", "").strip() or "tool_calls" in message for message in self.messages)


@dataclass(frozen=True)
class Rendered:
    """Token ids [N] int64 of a conversation, and which are learned: bool [N]."""

    ids: np.ndarray
    learned: np.ndarray


def has_document(record: dict[str, Any], text_key: str) -> bool:
    """Whether there is something that `document_of` may read."""
    if text_key in record:
        return isinstance(record[text_key], str | list)
    return isinstance(record.get(MESSAGES), list) or {PROMPT, COMPLETION} <= record.keys()


def document_of(
    record: dict[str, Any], text_key: str, here: str, setting: str, bad: BadBytes = STRICT, num_bytes: int = 0
) -> str | Conversation:
    """The text, or the conversation, in the field `text_key`; without that field, the conversation in `messages`, or in
    `prompt` and `completion`.

    Raises `UserError` that names what is missing or no text.
    """
    key = MESSAGES if text_key not in record and MESSAGES in record else text_key
    if isinstance(record.get(key), list):
        messages, learned_from = _messages(record[key], key, here, bad), 0
    elif key not in record and {PROMPT, COMPLETION} <= record.keys():
        prompt = _turn(record, PROMPT, "user", here, bad)
        messages, learned_from = prompt + _turn(record, COMPLETION, ASSISTANT, here, bad), len(prompt)
    elif key == MESSAGES != text_key:
        raise UserError(f"{here}: field '{key}' is no list of messages but {type(record[key]).__name__}")
    else:
        return text_of(record, text_key, here, setting, bad)
    tools = record.get("tools") or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{here}: field 'tools' is no list of objects but {shown(tools)}")
    return Conversation(messages, tools, learned_from, here, num_bytes)


def _turn(record: dict[str, Any], key: str, role: str, here: str, bad: BadBytes) -> list[dict[str, Any]]:
    """A text, which is one message of `role`, or a list of messages."""
    value = record[key]
    if isinstance(value, str) and not isinstance(value, Number):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise UserError(f"{here}: field '{key}' is neither text nor a list of messages but {type(value).__name__}")
    return _messages(value, key, here, bad)


def _messages(values: list[Any], key: str, here: str, bad: BadBytes) -> list[dict[str, Any]]:
    """Messages that have a role and text. What is null counts as absent: rows of columns have every key."""
    found = []
    for number, value in enumerate(values, 1):
        place = f"{here}: message {number} of '{key}'"
        if not isinstance(value, dict):
            raise UserError(f"{place} is no object with 'role' and 'content' but {type(value).__name__}")
        message = {name: part for name, part in value.items() if part is not None}
        for name in ("role", "content"):
            if name == "content" and name not in message and message.get("tool_calls"):
                continue
            if name not in message:
                raise UserError(f"{place} has no '{name}' (fields: {', '.join(sorted(message))})")
            if not isinstance(message[name], str):
                raise UserError(f"{place}: '{name}' is not text but {type(message[name]).__name__}")
            message[name] = whole_characters(bad.without_nul(message[name], f"{place}: '{name}'"))
        found.append(message)
    return found


class ChatEncoder:
    """Conversations to the ids that `apply_chat_template` gives, and to the mask of the assistant's tokens.

    A template that marks them itself (`{% generation %}`) is asked: transformers' `return_assistant_tokens_mask`. Of
    others an answer is what the template adds to the rendering of all before it (which ends in the generation prompt):
    the text and its end mark. What stands in the messages decides nothing, so a user may quote any mark.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.num_cut = 0  # conversations that became a document per answer

    def encode(self, conversation: Conversation) -> list[Rendered]:
        """One document; or one per answer, where the template writes earlier answers in another way than the last.

        Such a document is the conversation up to an answer, and that answer alone is learned. Raises `UserError` where
        there is no template, where it refuses the messages, and where it cannot be told which tokens are the answer's.
        """
        here, marked = conversation.here, GENERATION.search(self._template(conversation))
        answers = [
            number
            for number, message in enumerate(conversation.messages)
            if message["role"] == ASSISTANT and number >= conversation.learned_from
        ]
        if not answers:
            roles = ", ".join(sorted({message["role"] for message in conversation.messages}))
            raise UserError(f"{here}: no message of the role '{ASSISTANT}', so nothing is learned (roles: {roles})")
        if marked:
            return [self._marked(conversation)]
        text = self._render(conversation, len(conversation.messages))
        spans = [self._span(conversation, number) for number in answers]
        if all(text.startswith(document) for document, _, _ in spans):
            return [self._encoded(text, [(start, end) for _, start, end in spans])]
        self.num_cut += 1
        return [self._encoded(document, [(start, end)]) for document, start, end in spans]

    @property
    def name(self) -> str:
        """What errors call the tokenizer's model."""
        return self.tokenizer.name_or_path or "the model"

    def _template(self, conversation: Conversation) -> str:
        here = f"{conversation.here}: a conversation, and the tokenizer of {self.name}"
        if not self.tokenizer.chat_template:
            raise UserError(f"{here} has no chat template to write it with")
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{here} does not say which characters its tokens stand for ({type(self.tokenizer).__name__}); "
                "it needs a tokenizer.json"
            )
        try:
            return self.tokenizer.get_chat_template(tools=conversation.tools)
        except ValueError as error:  # several templates, and none of them is the default
            raise UserError(f"{here}: {one_line(error)}") from error

    def _marked(self, conversation: Conversation) -> Rendered:
        """What a template with `{% generation %}` says itself."""
        count, quiet = len(conversation.messages), {"verbose": False}
        found = self._apply(conversation, count, return_assistant_tokens_mask=True, tokenizer_kwargs=quiet)
        learned = np.array(found["assistant_masks"], bool)
        if any(message["role"] == ASSISTANT for message in conversation.messages[: conversation.learned_from]):
            prompt = self._render(conversation, conversation.learned_from, prompt=True)
            if not self._render(conversation, count).startswith(prompt):
                raise self._unclear(conversation, conversation.learned_from)
            learned &= np.array([end > len(prompt) for _, end in found.encodings[0].offsets])
        if not learned.any():
            raise UserError(f"{conversation.here}: the chat template of {self.name} marks no token as the assistant's")
        return Rendered(np.array(found["input_ids"], np.int64), learned)

    def _span(self, conversation: Conversation, number: int) -> tuple[str, int, int]:
        """(the conversation up to answer `number`, first character of the answer, end of it)."""
        text = self._render(conversation, number + 1)
        if number == 0:
            raise self._unclear(conversation, number)
        prompt = self._render(conversation, number, prompt=True)
        answer = text[len(prompt) :]
        if not text.startswith(prompt) or not answer.strip():
            raise self._unclear(conversation, number)
        if prompt == self._render(conversation, number):
            # No generation prompt: the answer follows at once, or what announces it would be taken for a part of it.
            content = conversation.messages[number].get("content", "").strip()
            if not content or not answer.lstrip().startswith(content):
                raise self._unclear(conversation, number)
        return text, len(prompt), len(prompt) + len(answer.rstrip())

    def _encoded(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        """Every token that holds a character of a span is learned, as transformers' own mask has it."""
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)
        starts, ends = np.array(found.encodings[0].offsets, np.int64).reshape(-1, 2).T
        learned = np.zeros(len(starts), bool)
        for start, end in spans:
            learned |= (ends > start) & (starts < end)
        return Rendered(np.array(found["input_ids"], np.int64), learned)

    def _render(self, conversation: Conversation, count: int, prompt: bool = False) -> str:
        """The text of the first messages, with the prompt for an answer."""
        return self._apply(conversation, count, tokenize=False, add_generation_prompt=prompt)

    def _apply(self, conversation: Conversation, count: int, **options: bool | dict[str, bool]) -> Any:
        try:
            messages = conversation.messages[:count]
            return self.tokenizer.apply_chat_template(messages, tools=conversation.tools, **options)
        except Exception as error:  # jinja2 missing, or whatever a template does
            words = f"the chat template of {self.name} refuses the first {count} messages"
            raise UserError(f"{conversation.here}: {words} ({one_line(error)})") from error

    def _unclear(self, conversation: Conversation, number: int) -> UserError:
        return UserError(
            f"{conversation.here}: which tokens are the answer in message {number + 1} cannot be told from the chat "
            f"template of {self.name}; mark them in it with {{% generation %}} ... {{% endgeneration %}}"
        )
