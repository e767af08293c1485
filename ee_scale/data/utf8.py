"""Bytes to text: what is no UTF-8, and NUL, is refused with its place, or replaced."""

import codecs
from dataclasses import dataclass

from ee_scale.errors import UserError

BOM = "\ufeff"
NUL, REPLACEMENT = "\0", "\ufffd"


@dataclass(frozen=True)
class BadBytes:
    """What is done about bytes that are no text.

    Attributes:
        replace: U+FFFD stands for them; else they are refused.
        setting: what a person calls the setting that chooses (None: there is none).
    """

    replace: bool = False
    setting: str | None = None

    @property
    def hint(self) -> str:
        """How to read on, for the end of an error."""
        return f"; {self.setting}=replace reads U+FFFD there" if self.setting else ""

    def without_nul(self, text: str, here: str) -> str:
        """A text that was decoded. Raises `UserError` naming the first NUL in it."""
        if NUL not in text:
            return text
        if not self.replace:
            raise UserError(f"{here}: character {text.index(NUL)} is NUL{self.hint}")
        return text.replace(NUL, REPLACEMENT)


STRICT = BadBytes()


class Decoder:
    """A file's UTF-8 in chunks, without a mark at its start; line ends stay as they are."""

    def __init__(self, here: str, bad: BadBytes):
        """`here` names the file in errors."""
        self.here, self.bad = here, bad
        self.line, self.position = 1, 0  # of the next byte: lines count from 1, bytes from 0
        self._started = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace" if bad.replace else "strict")

    def decode(self, chunk: bytes, final: bool = False) -> str:
        """The text of the next bytes. Raises `UserError` naming line and byte of the first one that is no text."""
        waiting = len(self._decoder.getstate()[0])  # bytes of a character that the chunk before has cut
        try:
            text = self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            at = error.start - waiting
            words = f"{bad_bytes(error)}, at byte {self.position + at}"
            raise UserError(f"{self._place(chunk, at)}: {words}{self.bad.hint}") from error
        if NUL in text and not self.bad.replace:
            at = chunk.index(b"\0")
            here, byte = self._place(chunk, at), self.position + at
            raise UserError(f"{here}: byte {byte} is NUL, so this is no text{self.bad.hint}")
        self.position += len(chunk)
        self.line += chunk.count(b"\n")
        if text and not self._started:
            text, self._started = text.removeprefix(BOM), True
        return text.replace(NUL, REPLACEMENT)

    def _place(self, chunk: bytes, at: int) -> str:
        lines = chunk.count(b"\n", 0, max(at, 0))
        return f"{self.here} line {self.line + lines}"


def bad_bytes(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no UTF-8."""
    return f"not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason})"
