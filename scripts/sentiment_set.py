"""A set that people labelled, without a download site: sentiment of film and product reviews, and of tweets.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d sdist
    python scripts/sentiment_set.py sdist/vaderSentiment-3.3.2.tar.gz sets/sentiment

Writes train.jsonl and test.jsonl (fields text, label) of review snippets, and tweets.jsonl: another domain, to test on
alone. Twenty people rated each text from -4 to 4; those whose mean is beyond +-1 are kept, as positive or negative. A
quarter of the reviews, chosen by a hash of the name, is the test file: the sentences of a product review stay together,
and so do 20 film snippets in their order. A text that comes again is left out. The texts are those of C.J. Hutto and
E. Gilbert, ICWSM 2014.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from english_set import held_out, sentences
from rich.console import Console

from ee_scale.files import published

REVIEWS, TWEETS = ("movieReviewSnippets", "amazonReviewSnippets"), ("tweets",)
LEAST = 1.0  # of the mean rating, either way


def labelled(rows: Iterable[tuple[str, float, str]]) -> list[tuple[str, str, str]]:
    """(document, text, label) of the rows that people agree on, each text once."""
    found: dict[str, tuple[str, str, str]] = {}
    for document, rating, text in rows:
        if abs(rating) > LEAST:
            label = "positive" if rating > 0 else "negative"
            found.setdefault(" ".join(text.lower().split()), (document, text, label))
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path, help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("out", type=Path, help="folder that is written")
    args = parser.parse_args()
    console, reviews = Console(), labelled(sentences(args.sdist, REVIEWS))
    files = {
        "train": [row for row in reviews if not held_out(row[0])],
        "test": [row for row in reviews if held_out(row[0])],
        "tweets": labelled(sentences(args.sdist, TWEETS)),
    }
    with published(args.out) as temporary:
        for name, rows in files.items():
            lines = [json.dumps({"text": text, "label": label}) for _, text, label in rows]
            (temporary / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            counts = Counter(label for *_, label in rows)
            told = f"{len(rows):,} texts, {counts['positive']:,} positive and {counts['negative']:,} negative"
            console.print(f"{args.out}/{name}.jsonl: {told}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
