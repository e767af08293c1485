"""Answers in OpenAI's JSON: whole, or in the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ee_scale.serving.bodies import Body, ChatBody
from ee_scale.serving.call import Call, Piece

LEAST = -9999.0  # of a token that cannot be: JSON has no infinity
Json = dict[str, object]


class Form:
    """Of /v1/completions. One object for each response."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, body: Body, call: Call, tokenizer: PreTrainedTokenizerBase):
        self.call, self.tokenizer = call, tokenizer
        self.ranked, self.shows_layers = body.ranked, call.options["exit_policy"] != "off"
        self.counts_usage = body.stream_options is not None and body.stream_options.include_usage
        self.head: Json = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        self.offsets = [0] * len(call.rows)
        self.elsewhere = False
        self.their_usage: Json | None = None

    def whole(self, pieces: Sequence[Piece]) -> Json:
        """The response that is not streamed, of all pieces."""
        choices = [
            self.choice(_joined([piece for piece in pieces if piece.row == row.index])) for row in self.call.rows
        ]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def chunk(self, piece: Piece) -> str:
        """An event of the stream."""
        usage: Json = {"usage": None} if self.counts_usage else {}
        return event({**self.head, "object": self.chunk_kind, "choices": [self.part(piece)], **usage})

    def last(self) -> str:
        """The end of a stream."""
        done = "data: [DONE]\n\n"
        if not self.counts_usage:
            return done
        return event({**self.head, "object": self.chunk_kind, "choices": [], "usage": self.usage()}) + done

    def hand_over(self, model: str, usage: Json | None) -> None:
        """The answer is another model's, of which no layer is known; usage: what that says of it, if anything."""
        self.head["model"], self.shows_layers, self.elsewhere, self.their_usage = model, False, True, usage

    def usage(self) -> Json | None:
        """Tokens that were read and written, by the model that answers; None: it does not say."""
        if self.elsewhere:
            return self.their_usage
        prompt, new = self.call.prompt_tokens, sum(row.count for row in self.call.rows)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def choice(self, piece: Piece) -> Json:
        """A whole answer."""
        return self.part(piece)

    def part(self, piece: Piece) -> Json:
        """What a piece adds to an answer."""
        return {"index": piece.row, "text": piece.text, **self._common(piece)}

    def _common(self, piece: Piece) -> Json:
        layers: Json = {"exit_layers": piece.layers} if self.shows_layers else {}
        return {"finish_reason": piece.finish, "logprobs": self.logprobs(piece), **layers}

    def logprobs(self, piece: Piece) -> Json | None:
        """Of the tokens of a piece."""
        if self.ranked is None:
            return None
        texts = [self._text(token) for token in piece.tokens]
        offsets = []
        for text in texts:
            offsets.append(self.offsets[piece.row])
            self.offsets[piece.row] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_number(ranking.logprob) for ranking in piece.rankings],
            "top_logprobs": [
                {self._text(token): _number(logprob) for token, logprob in reversed(ranking.best)}
                for ranking in piece.rankings
            ],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


class ChatForm(Form):
    """Of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, body: Body, call: Call, tokenizer: PreTrainedTokenizerBase):
        super().__init__(body, call, tokenizer)
        self.begun: set[int] = set()

    def choice(self, piece: Piece) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.row, "message": message, **self._common(piece)}

    def part(self, piece: Piece) -> Json:
        role = {} if piece.row in self.begun else {"role": "assistant"}
        self.begun.add(piece.row)
        return {"index": piece.row, "delta": {**role, "content": piece.text}, **self._common(piece)}

    def logprobs(self, piece: Piece) -> Json | None:
        if self.ranked is None:
            return None
        entries = [
            {**self._entry(token, ranking.logprob), "top_logprobs": [self._entry(*best) for best in ranking.best]}
            for token, ranking in zip(piece.tokens, piece.rankings, strict=True)
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> Json:
        text = self._text(token)
        # Of a token that holds a part of a character alone, the text does not tell the bytes.
        return {
            "token": text,
            "logprob": _number(logprob),
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }


def form_of(body: Body, call: Call, tokenizer: PreTrainedTokenizerBase) -> Form:
    """That of the endpoint which the body is for."""
    return (ChatForm if isinstance(body, ChatBody) else Form)(body, call, tokenizer)


def event(values: Json) -> str:
    """As a server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False, allow_nan=False)}\n\n"


def _joined(pieces: Sequence[Piece]) -> Piece:
    """All of one answer."""
    whole = Piece(pieces[0].row, "".join(piece.text for piece in pieces), finish=pieces[-1].finish)
    for piece in pieces:
        whole.tokens += piece.tokens
        whole.layers += piece.layers
        whole.rankings += piece.rankings
    return whole


def _number(logprob: float) -> float:
    return max(LEAST, logprob)  # of no number too
