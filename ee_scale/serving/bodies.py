"""What the body of a request may hold. A field that would change the answer and is not known here is refused."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from ee_scale.modeling.costs import MAX_DRAFT
from ee_scale.modeling.policy_names import POLICIES
from ee_scale.reading import shown
from ee_scale.serving.errors import ApiError

# What this server cannot do, and the values that ask for nothing.
CANNOT: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tool_calls": ([],),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
MOST_STOPS, LONGEST_STOP, MOST_RANKED, MOST_CHOICES = 16, 256, 20, 128
COLDEST = 0.01  # below, logits divided by it overflow
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Lists = Annotated[list[Tokens], Field(min_length=1)]
T = TypeVar("T")


class Strict(BaseModel):
    """Of these fields and types alone; what is null is not there."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _asked_for(cls, values: T) -> T | dict[object, object]:
        if not isinstance(values, dict):
            return values
        return {
            key: value
            for key, value in values.items()
            if value is not None and not any(_same(value, no) for no in CANNOT.get(key, ()))
        }


class StreamOptions(Strict):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Body(Strict):
    """What both kinds of requests have."""

    model: str = Field(description="the name of the model that is served (GET /v1/models)")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(None, description='an object such as {"include_usage": true}')
    max_tokens: int | None = Field(None, ge=1, description="a whole number from 1 on")
    temperature: float = Field(1.0, ge=0, le=2, description=f"0, or a number from {COLDEST} to 2")
    top_p: float | None = Field(None, gt=0, le=1, description="a number above 0, at most 1")
    top_k: int | None = Field(None, ge=1, description="a whole number from 1 on")
    n: int = Field(1, ge=1, le=MOST_CHOICES, description=f"a whole number from 1 to {MOST_CHOICES}")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="a whole number of 64 bits")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = Field(
        None, description=f"text, or at most {MOST_STOPS} texts, of 1 to {LONGEST_STOP} characters"
    )
    exit_policy: Literal[POLICIES] | None = Field(None, description=f"one of {', '.join(POLICIES)}")  # type: ignore[valid-type]
    exit_threshold: float | list[float] | dict[str, float] | None = Field(
        None, description="a number, a list of one per exit, or an object of numbers by layer"
    )
    exit_layer: int | None = Field(None, ge=1, description="the layer of an exit")
    exit_min_layer: int | None = Field(None, ge=1, description="a layer")
    exit_patience: int | None = Field(None, ge=1, description="a whole number from 1 on")
    exit_draft_length: int | None = Field(None, ge=0, le=MAX_DRAFT, description=f"a whole number from 0 to {MAX_DRAFT}")
    exit_tag: Text | None = Field(None, max_length=128, description="text of 1 to 128 characters")
    # These change no answer.
    user: str | None = Field(None, description="text")
    metadata: dict[str, JsonValue] | None = Field(None, description="an object")
    store: bool | None = Field(None, description="true or false")
    service_tier: str | None = Field(None, description="text")
    safety_identifier: str | None = Field(None, description="text")
    prompt_cache_key: str | None = Field(None, description="text")
    parallel_tool_calls: bool | None = Field(None, description="true or false")

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def ranked(self) -> int | None:
        """How many of the most likely tokens are told with each; None: nothing of the kind."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """Of an answer."""
        return self.max_tokens


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Text | Tokens | Texts | Lists = Field(
        description="text, a list of texts, token ids, or a list of those, none of them empty"
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_RANKED, description=f"a whole number from 0 to {MOST_RANKED}")

    @property
    def ranked(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One by one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return [prompt] if isinstance(prompt[0], int) else prompt  # type: ignore[list-item,return-value]


class Part(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] = Field(description="text, or a list of parts of type text")
    name: str | None = None


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, description="a list of messages")
    max_completion_tokens: int | None = Field(None, ge=1, description="a whole number from 1 on")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int | None = Field(None, ge=0, le=MOST_RANKED, description=f"a whole number from 0 to {MOST_RANKED}")

    @property
    def ranked(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def turns(self) -> list[dict[str, str]]:
        """As chat templates take them."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content
                if isinstance(message.content, str)
                else "\n".join(part.text for part in message.content),
                **({} if message.name is None else {"name": message.name}),
            }
            for message in self.messages
        ]


def error_of(errors: Sequence[Mapping[str, object]]) -> ApiError:
    """The first of pydantic's errors about a body, in one line."""
    error = errors[0]
    place = [str(part) for part in _tuple(error["loc"])][1:]  # behind 'body'
    if error["type"] == "json_invalid":
        return ApiError(400, "the body is no JSON")
    if not place:
        return ApiError(400, "the body is no JSON object (with the header Content-Type: application/json)")
    field, path = place[0], shown(".".join(place))[1:-1]
    if error["type"] == "extra_forbidden":
        name = place[-1]
        why = "this server cannot do it; leave it out" if name in CANNOT else "no such field here; leave it out"
        return ApiError(400, f"{path}: {why}", shown(field)[1:-1])
    if error["type"] == "missing":
        return ApiError(400, f"{path}: is missing", field)
    for body in (ChatBody, CompletionBody):
        known = body.model_fields.get(field)
        if known is not None and (len(place) == 1 or field != "messages"):
            value = f"={shown(error['input'])}" if len(place) == 1 else ""
            return ApiError(400, f"{field}{value}: give {known.description}", field)
    return ApiError(400, f"{path}={shown(error['input'])}: {error['msg']}", field)


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()
