"""Which size may draft for which, for people: a table, the best pair in a sentence, and how to run it."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from ee_scale.files import write_text
from ee_scale.palettes.draft_commands import Drafted, engine_sections, transformers_code
from ee_scale.palettes.drafts import Drafting, DraftPair, Drafts
from ee_scale.palettes.intervals import Interval
from ee_scale.palettes.manifest import Manifest, Member

SOURCE = "[arXiv 2211.17192](https://arxiv.org/abs/2211.17192)"
CARD = "## As a draft model"
GREEDY, SAMPLING = "greedy", "sampling"


def draft_table(manifest: Manifest) -> Table:
    """The pairs, the fastest first; intervals are the report's alone."""
    table = Table(title="Small sizes as draft models of larger ones", title_justify="left")
    rows = _rows(manifest)
    columns = [name for name in (rows[0] if rows else []) if "95%" not in name]
    for name in columns:
        table.add_column(name, justify="left" if name in ("target", "drafter") else "right")
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    return table


def draft_sentences(manifest: Manifest) -> list[str]:
    """Markdown: the best pair, or plainly that there is none; and the full model's, if that is another."""
    drafts = manifest.drafts
    if drafts is None or not drafts.pairs:
        return ["**Best drafter:** none; no size is smaller than another."]
    best, way = _best(drafts.pairs)
    if not _drafting(best, way).pays:
        return [f"**Best drafter:** no pair is worth it. {_why_not(drafts, best)}"]
    said = [f"**Best drafter:** {_praise(manifest, best)}"]
    if best.target != drafts.full:
        own, way = _best([pair for pair in drafts.pairs if pair.target == drafts.full])
        pays = _drafting(own, way).pays
        said.append(f"**Of the full model:** {_praise(manifest, own) if pays else 'none. ' + _why_not(drafts, own)}")
    return said


def draft_markdown(manifest: Manifest) -> list[str]:
    """Paragraphs of the report: what was found, on what, and the commands of the best pair."""
    drafts = manifest.drafts
    if drafts is None:
        return []
    found = ["## Small sizes as draft models", "\n".join(f"- {line}" for line in draft_sentences(manifest))]
    if not drafts.pairs:
        return found
    rows = _rows(manifest)
    names = list(rows[0])
    lines = [names, ["---", "---", *["---:"] * (len(names) - 2)], *(list(row.values()) for row in rows)]
    best, way = _best(drafts.pairs)
    return [
        *found,
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        f"Each target wrote {drafts.texts} texts of up to {drafts.tokens} tokens behind beginnings of held-out ones, "
        "greedily and sampled at temperature 1. Accepted: the share of positions where both would write the same token "
        "(greedy), or the mean of sum min(p, q) (sampling). Speed-up: N(g) T(1) / (g t + T(g + 1)) at batch 1, with g "
        "drafts per cycle, the measured times t of the drafter for a token and T(n) of the target for n rows "
        f"({SOURCE}), and N(g) the tokens of a cycle, counted on the texts. Intervals (95%) are of the texts; times "
        "have an error of their own.",
        "Commands, in the palette's folder; other engines may want other numbers of drafts:",
        *engine_sections(_drafted(best, way)),
    ]


def draft_command(pair: DraftPair, way: str) -> str:
    """Python that runs a pair on stock transformers."""
    return transformers_code(_drafted(pair, way))


def _drafted(pair: DraftPair, way: str) -> Drafted:
    return Drafted(pair.target, pair.drafter, _drafting(pair, way).drafts, sampled=way == SAMPLING)


def add_to_cards(folder: Path, manifest: Manifest) -> None:
    """Model cards of members say for which larger sizes they may draft."""
    for member in manifest.members if manifest.drafts is not None else []:
        if lines := list(_card(manifest, member)):
            path = folder / member.folder / "README.md"
            write_text(path, "\n".join([path.read_text(encoding="utf-8").rstrip(), "", CARD, "", *lines]) + "\n")


def _card(manifest: Manifest, member: Member) -> Iterator[str]:
    drafts = manifest.drafts
    pairs = [] if drafts is None else [pair for pair in drafts.pairs if pair.drafter == member.folder]
    if drafts is None or not pairs:
        return
    yield f"Vocabulary and tokenizer are those of larger sizes, whose text it may draft ({SOURCE}), one text at a time:"
    yield ""
    for pair in pairs:
        name, worth = _named(drafts, pair.target), any(_drafting(pair, way).pays for way in (GREEDY, SAMPLING))
        yield f"- for {name}: {pair_words(pair)}" if worth else f"- not for {name}: {pair_words(pair)}"
    best, way = _best(pairs)
    if _drafting(best, way).pays:
        yield from ("", "```python", draft_command(best, way), "```")


def _best(pairs: list[DraftPair]) -> tuple[DraftPair, str]:
    """(pair, way of decoding) with the highest speed-up: a greedy one that pays, else a sampled one that does."""
    greedy = max(pairs, key=lambda pair: (pair.greedy.pays, pair.greedy.speedup))
    sampled = max(pairs, key=lambda pair: (pair.sampled.pays, pair.sampled.speedup))
    return (sampled, SAMPLING) if sampled.sampled.pays and not greedy.greedy.pays else (greedy, GREEDY)


def _drafting(pair: DraftPair, way: str) -> Drafting:
    return pair.sampled if way == SAMPLING else pair.greedy


def _praise(manifest: Manifest, pair: DraftPair) -> str:
    drafter = _member(manifest, pair.drafter)
    name = pair.target if manifest.drafts is None else _named(manifest.drafts, pair.target)
    return f"`{pair.drafter}` for {name}: {pair_words(pair)}; {drafter.memory_mb:,.0f} MB more."


def _why_not(drafts: Drafts, pair: DraftPair) -> str:
    return (
        f"`{pair.drafter}` for {_named(drafts, pair.target)} comes nearest: {pair_words(pair)}; each draft takes "
        f"{pair.cost:.0%} of the target's time for a token."
    )


def pair_words(pair: DraftPair) -> str:
    """Speed, acceptance and drafts per cycle, greedy and sampled."""
    parts = []
    for way in (GREEDY, SAMPLING):
        found = _drafting(pair, way)
        drafts = f"{found.drafts} draft{'s' if found.drafts > 1 else ''}"
        parts.append(f"{way} {found.speedup:.2f}x the speed ({found.acceptance:.0%} accepted, {drafts} per cycle)")
    return ", ".join(parts)


def _rows(manifest: Manifest) -> list[dict[str, str]]:
    """Column -> cell, of each pair."""
    drafts, found = manifest.drafts, []
    for pair in [] if drafts is None else drafts.pairs:
        full = drafts is not None and pair.target == drafts.full
        row = {"target": f"{pair.target} (full)" if full else pair.target, "drafter": pair.drafter}
        row["a draft's cost"] = f"{pair.cost:.0%}"
        for way in (GREEDY, SAMPLING):
            told = _drafting(pair, way)
            row |= {
                f"{way}: accepted": f"{told.acceptance:.1%}",
                f"{way}: accepted, 95%": _span(told.acceptance_interval, 100, 1),
                f"{way}: drafts": str(told.drafts),
                f"{way}: speed-up": f"{told.speedup:.2f}x",
                f"{way}: speed-up, 95%": _span(told.speedup_interval, 1, 2),
            }
        found.append(row)
    return found


def _named(drafts: Drafts, folder: str) -> str:
    return f"the full model (`{folder}`)" if folder == drafts.full else f"`{folder}`"


def _member(manifest: Manifest, folder: str) -> Member:
    return next(member for member in manifest.members if member.folder == folder)


def _span(span: Interval | None, scale: float, digits: int) -> str:
    return "-" if span is None else " to ".join(f"{scale * end:.{digits}f}" for end in span)
