"""What a palette holds, for people: a table, a short report in Markdown, and the files that carry it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ee_scale.families.build import AUTO_CLASS
from ee_scale.files import write_text
from ee_scale.palettes.draft_report import draft_markdown
from ee_scale.palettes.intervals import is_seen
from ee_scale.palettes.limits import number
from ee_scale.palettes.manifest import Manifest, Member
from ee_scale.palettes.overlap import LEAST
from ee_scale.palettes.plot import PERCENT, plot_palette

REPORT, PLOT = "report.md", "palette.png"
NEAR, CLOSE = 0.01, 0.03  # relative to the full model's quality
SHARES = {"half": 0.5, "a quarter": 0.25}  # of the full model's parameters

WIDE = "95%"  # intervals, which no terminal has room for

Column = tuple[str, Callable[[Member], str]]


def write_palette_report(folder: Path, manifest: Manifest) -> None:
    """report.md and palette.png."""
    plot_palette(folder / PLOT, manifest)
    write_text(folder / REPORT, palette_markdown(manifest))


def palette_table(manifest: Manifest, title: str) -> Table:
    """The full model and the members, a line each."""
    table = Table(title=title, title_justify="left")
    columns = [column for column in _columns(manifest) if not column[0].endswith(WIDE)]  # those of the report alone
    for name, _ in columns:
        table.add_column(name, justify="left" if name == "subnet" else "right", no_wrap=name == "subnet")
    for member in (manifest.full, *manifest.members):
        table.add_row(*(cell(member) for _, cell in columns), end_section=member is manifest.full)
    return table


def palette_markdown(manifest: Manifest) -> str:
    """A page: what it is, one table, a recommendation per constraint, how to open a member."""
    columns = _columns(manifest)
    rows = [[cell(member) for _, cell in columns] for member in (manifest.full, *manifest.members)]
    lines = [[name for name, _ in columns], ["---", *["---:"] * (len(columns) - 1)], *rows]
    auto = AUTO_CLASS[manifest.task].__name__
    folder = manifest.members[-1].folder
    parts = [
        f"# Palette of {manifest.base_model}",
        " ".join(_introduction(manifest)),
        f"![Quality against parameters and latency]({PLOT})",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        *_statistics_note(manifest),
        *_energy_note(manifest),
        "## Which one to take",
        "\n".join(f"- {line}" for line in recommendations(manifest)),
        *draft_markdown(manifest),
        *_provenance(manifest),
        "## How to open one",
        f"```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("{folder}")\ntokenizer = AutoTokenizer.from_pretrained("{folder}")\n```',
    ]
    return "\n\n".join(parts) + "\n"


def recommendations(manifest: Manifest) -> list[str]:
    """A Markdown sentence per constraint; where nothing qualifies it says so and names the nearest."""
    advices = [_smallest_near(manifest), _fastest_close(manifest)]
    if manifest.limits:
        advices.append(_best_within_limits(manifest))
    advices += [_best_at_share(manifest, words, share) for words, share in SHARES.items()]
    said: list[str] = []
    lines = []
    for advice in advices:
        answer = advice.answer if isinstance(advice.answer, str) else _figures(manifest, advice.answer)
        if answer in said and isinstance(advice.answer, Member):
            answer = f"`{advice.answer.folder}`, as above"
        said.append(answer)
        lines.append(f"**{advice.wanted}:** {answer}{advice.ending}.")
    return lines


def setback(manifest: Manifest, member: Member) -> float:
    """By which share a member's quality is worse than the full model's; negative where it is better."""
    full, own = manifest.quality_of(manifest.full), manifest.quality_of(member)
    return (full - own if manifest.higher_is_better else own - full) / (abs(full) or 1.0)


@dataclass(frozen=True)
class _Advice:
    """A constraint, and the member that meets it best or, in words, why none does."""

    wanted: str
    answer: Member | str
    ending: str = ""


def _smallest_near(manifest: Manifest) -> _Advice:
    wanted = f"Smallest within {NEAR:.0%} of the full model's {manifest.metric}"
    found = [member for member in _smaller(manifest) if setback(manifest, member) <= NEAR]
    return _Advice(wanted, min(found, key=lambda member: member.params) if found else _none(manifest))


def _fastest_close(manifest: Manifest) -> _Advice:
    wanted = f"Fastest within {CLOSE:.0%}"
    found = [member for member in _smaller(manifest) if setback(manifest, member) <= CLOSE]
    if not found:
        return _Advice(wanted, _none(manifest))
    member = min(found, key=manifest.latency_of)
    own, full = manifest.latency_of(member), manifest.latency_of(manifest.full)
    if own < full:
        return _Advice(wanted, member)
    return _Advice(
        wanted,
        f"none is faster than the full model; the fastest, `{member.folder}`, takes {own:.3g} ms against {full:.3g} ms",
    )


def _best_within_limits(manifest: Manifest) -> _Advice:
    """Every member keeps every limit, so that the best of all is the best under each."""
    best = _best(manifest, manifest.members)
    own = {
        "params": best.params,
        "flops": best.flops,
        "latency_ms": manifest.latency_of(best),
        "memory_mb": best.memory_mb,
    }
    taken = " and ".join(f"{own[name] / limit:.0%} of max_{name}" for name, limit in manifest.limits.items())
    return _Advice(f"Best within {_limits(manifest)}", best, f"; it takes {taken}")


def _best_at_share(manifest: Manifest, words: str, share: float) -> _Advice:
    wanted = f"Best with at most {words} of the parameters"
    found = [member for member in manifest.members if member.params <= share * manifest.full.params]
    if found:
        return _Advice(wanted, _best(manifest, found))
    least = min(manifest.members, key=lambda member: member.params)
    of_full = _share(least.params / manifest.full.params)
    return _Advice(wanted, f"none; the smallest, `{least.folder}`, has {of_full} of them")


def _smaller(manifest: Manifest) -> list[Member]:
    return [member for member in manifest.members if member.spec != manifest.full.spec]


def _best(manifest: Manifest, members: list[Member]) -> Member:
    return min(members, key=lambda member: (setback(manifest, member), member.params))


def _none(manifest: Manifest) -> str:
    smaller = _smaller(manifest)
    if not smaller:
        return "only the full model itself, the palette's one member"
    best = _best(manifest, smaller)
    return f"none; the best subnet, `{best.folder}`, is {setback(manifest, best):.1%} worse"


def _figures(manifest: Manifest, member: Member) -> str:
    own = manifest.latency_of(member)
    return (
        f"`{member.folder}`, {manifest.metric} {_quality(manifest.metric, manifest.quality_of(member))} "
        f"({_compared(manifest, member)}), {_share(member.params / manifest.full.params)} of the parameters, "
        f"{own:.3g} ms ({manifest.latency_of(manifest.full) / own:.3g}x the speed)"
    )


def _compared(manifest: Manifest, member: Member) -> str:
    worse = setback(manifest, member)
    return "equal" if abs(worse) < 5e-4 else f"{abs(worse):.1%} {'worse' if worse > 0 else 'better'}"


def _introduction(manifest: Manifest) -> list[str]:
    count, device = len(manifest.members), manifest.device
    threads = f"{device.threads} thread{'s' if device.threads > 1 else ''}"
    held = "1 subnet" if count == 1 else f"{count} subnets"
    return [
        f"{held} of the supernet `{manifest.run}`, {_training(manifest)};",
        "each folder is a plain Hugging Face model.",
        f"Measured on {device.cpu}, {threads}, torch {device.torch};",
        f"limits kept by measurement: {_limits(manifest)}." if manifest.limits else "no limits were set.",
    ]


def _training(manifest: Manifest) -> str:
    if manifest.polish is None:
        return "cut out without further training"
    each, seconds = manifest.polish.steps, manifest.polish.seconds
    return f"each trained {each} steps by itself ({seconds:,.0f} s together) and cut out"


def _limits(manifest: Manifest) -> str:
    return ", ".join(f"max_{name}={number(limit)}" for name, limit in manifest.limits.items())


def _columns(manifest: Manifest) -> list[Column]:
    full = manifest.full
    columns: list[Column] = [
        ("subnet", lambda m: "full model" if m is full else m.folder),
        ("params", lambda m: f"{m.params / 1e6:,.2f}M"),
        ("of full", lambda m: _share(m.params / full.params)),
    ]
    columns += [(name, lambda m, name=name: _quality(name, m.quality.get(name))) for name in full.quality]
    if manifest.polish is not None:
        columns.append(("before polish", lambda m: _quality(manifest.metric, m.before.get(manifest.metric))))
    if full.interval is not None:
        columns.append(("95%", lambda m: _span(manifest, m.interval)))
    columns.append(("vs full", lambda m: "-" if m is full else _compared(manifest, m)))
    if full.interval is not None:
        columns.append(("difference, 95%", lambda m: _span(manifest, m.difference, signed=True)))
    for name, title in (("prefill_ms", "prefill ms"), ("token_ms", "ms / token")):
        if getattr(full, name) is not None:
            columns.append((title, lambda m, name=name: f"{getattr(m, name):.3g}"))
            if name == manifest.latency:
                columns.append(("est.", lambda m: "-" if m.estimated_ms is None else f"{m.estimated_ms:.3g}"))
    columns += [
        ("speed", lambda m: f"{manifest.latency_of(full) / manifest.latency_of(m):.3g}x"),
        ("memory MB", lambda m: f"{m.memory_mb:,.0f}"),
        ("file MB", lambda m: f"{m.file_mb:,.1f}"),
    ]
    everyone = (full, *manifest.members)
    if any(not isinstance(m.joules_per_token, str) for m in everyone):
        columns.append(("mJ per token", lambda m: _millijoules(m.joules_per_token)))
    for kind in dict.fromkeys(kind for m in everyone for kind in m.onnx):
        columns.append((f"ONNX {kind} MB / ms", lambda m, kind=kind: _onnx(m, kind)))
    return columns


def _span(manifest: Manifest, span: tuple[float, float] | None, *, signed: bool = False) -> str:
    """An interval of the metric that decides; differences of shares in points."""
    if span is None:
        return "-"
    scale, digits = (100, 1) if manifest.metric in PERCENT else (1, 3)
    low, high = (f"{scale * end:{'+' if signed else ''}.{digits}f}" for end in span)
    return f"{low} to {high}"


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def _quality(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if metric in PERCENT else f"{value:.3f}" if abs(value) < 10 else f"{value:,.2f}"


def _millijoules(value: float | str) -> str:
    return "-" if isinstance(value, str) else f"{1e3 * value:.3g}"


def _onnx(member: Member, kind: str) -> str:
    found = member.onnx.get(kind)
    return f"{found['file_mb']:,.1f} / {found['latency_ms']:.3g}" if found else "-"


def _statistics_note(manifest: Manifest) -> list[str]:
    """What the intervals are, and which sizes cannot be told from the full model."""
    if manifest.full.interval is None:
        return []
    found = [m.folder for m in manifest.members if m.difference is not None and not is_seen(*m.difference)]
    same = f"Not to be told from the full model: {', '.join(f'`{name}`' for name in found)}." if found else ""
    unit = " (in points)" if manifest.metric in PERCENT else ""
    return [
        f"Quality on {manifest.texts:,} held-out texts with its 95% interval; differences{unit} are taken on the same "
        f"texts, and mean nothing where their interval holds 0. {same}".strip()
    ]


def _provenance(manifest: Manifest) -> list[str]:
    """Sources of the training text, and what was found of it."""
    if not manifest.sources:
        return []
    found = ["## What it was trained on", "\n".join(f"- {source.words}" for source in manifest.sources)]
    if manifest.audit:
        rows = [
            f"| {name} | {o.found} of {o.texts} | {o.longest} | {o.share:.1%} |" for name, o in manifest.audit.items()
        ]
        head = ["| writer | texts with a passage | longest, characters | share of what was written |"]
        found += [
            f"Passages of {LEAST} characters and more that stand verbatim in the training text, written behind the "
            "beginnings of its documents:",
            "\n".join([*head, "| --- | ---: | ---: | ---: |", *rows]),
        ]
    return found


def _energy_note(manifest: Manifest) -> list[str]:
    """Why there is no energy, once."""
    reasons = [m.joules_per_token for m in manifest.members if isinstance(m.joules_per_token, str)]
    return [f"Energy per token: {reason}." for reason in dict.fromkeys(reasons)]
