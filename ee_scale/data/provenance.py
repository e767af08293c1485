"""What a run was trained on, for those who get what it makes: names and counts, and nothing of the text itself."""

from collections.abc import Sequence
from dataclasses import dataclass

from ee_scale.data.corpora import num_tokens, open_tokens
from ee_scale.errors import UserError
from ee_scale.reading import whole

SOURCES = "sources"  # of what a run says its data is


@whole
@dataclass(frozen=True)
class TextSource:
    """One source of text.

    Attributes:
        path: as the config gives it.
        digest: SHA-256 of its tokens.
        documents, tokens: in it, whether the run came to all of them or not.
        license: as the config gives it; None: it says nothing.
    """

    path: str
    digest: str
    documents: int
    tokens: int
    license: str | None = None

    @property
    def words(self) -> str:
        """For a model card."""
        said = "licence not said" if self.license is None else f"licence {self.license}"
        return f"`{self.path}`, {said}: {self.documents:,} documents, {self.tokens:,} tokens, SHA-256 `{self.digest}`"


def text_sources(
    names: Sequence[str], prefixes: Sequence[str], digests: Sequence[str], licenses: Sequence[str | None]
) -> list[TextSource]:
    """Of tokenised text."""
    found = []
    for name, prefix, digest, license_ in zip(names, prefixes, digests, licenses, strict=True):
        dataset = open_tokens(prefix)
        found.append(TextSource(name, digest, len(dataset.document_indices) - 1, num_tokens(dataset), license_))
    return found


def licenses_of(names: Sequence[str], given: Sequence[str]) -> list[str | None]:
    """One for each source, or nothing of any. Raises `UserError`."""
    if given and len(given) != len(names):
        raise UserError(
            f"data.licenses={list(given)}: {len(given)} for the {len(names)} sources of data.path; one each"
        )
    return list(given) or [None] * len(names)
