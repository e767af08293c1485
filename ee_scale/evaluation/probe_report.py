"""What a probe found, joined with the cost model: a table, a verdict in words, JSON and a plot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from ee_scale.evaluation.cost_model import ideal_stop_speedup, needed_acceptance, threshold_speedup, upper_bound
from ee_scale.evaluation.probe import Reading
from ee_scale.evaluation.timing import PartTimes
from ee_scale.files import write_text
from ee_scale.log import titled_table
from ee_scale.modeling.costs import Costs, best_draft_length

TEXTS = ("text", "greedy", "sampled")
WORTH_IT, SMALL_GAIN = 1.3, 1.1
DEAR_HEAD = 2.0  # layers
GOAL = 1.5
# Measured on a 12-layer code model before and after a short tuning run, exits at 3, 6 and 9, sampled own text.
UNTRAINED = (
    "These exits are untrained (the logit lens), so this is a lower bound: 400 steps of tuning on a small code model "
    "raised the accepted share by 15 to 19 points."
)


@dataclass(frozen=True)
class Outlook:
    """One exit used alone, batch 1; speeds are relative to one ordinary token at a time.

    Attributes:
        readings: of the given text, the model's greedy text, its sampled text.
        cost: c, a draft token as a share of an ordinary one; bound: 1 / c.
        greedy, sampled: (best draft length, speed) of lossless decoding, with the acceptance on the model's own text.
        stop_rule: speed of sampled lossless decoding if drafting always stopped at the right token.
        threshold: speed of leaving here at the limit of the sampled text.
        shortlisted: speed of sampled lossless decoding if the draft head read the shortlist and nothing were missed.
        needed: acceptance for a speed of GOAL (None: out of reach).
    """

    layer: int
    readings: dict[str, Reading]
    cost: float
    bound: float
    greedy: tuple[int, float]
    sampled: tuple[int, float]
    stop_rule: float
    threshold: float
    shortlisted: float
    needed: float | None


def outlook(parts: PartTimes, readings: Mapping[str, Sequence[Reading]]) -> list[Outlook]:
    """Join costs and readings (TEXTS -> one reading per exit), exit by exit."""
    rows = []
    for index, reading in enumerate(readings["sampled"]):
        costs, k = parts.costs, reading.layer
        rows.append(
            Outlook(
                layer=k,
                readings={name: readings[name][index] for name in TEXTS},
                cost=costs.draft_cost(k),
                bound=upper_bound(costs, k),
                greedy=best_draft_length(costs, k, readings["greedy"][index].agreement),
                sampled=best_draft_length(costs, k, reading.acceptance),
                stop_rule=ideal_stop_speedup(costs, k, reading.acceptance),
                threshold=threshold_speedup(costs, {k: reading.leaving}),
                shortlisted=best_draft_length(parts.with_shortlist, k, reading.acceptance)[1],
                needed=needed_acceptance(costs, k, GOAL),
            )
        )
    return rows


def outlook_table(rows: Sequence[Outlook], title: str) -> Table:
    """One line per exit."""
    columns = ("exit", "agrees: text", "greedy", "sampled", "accepted", "may leave", "cost c", "lossless: greedy")
    table = titled_table(title, (*columns, "sampled", "threshold", "at most"))
    for row in rows:
        sampled = row.readings["sampled"]
        table.add_row(
            str(row.layer),
            *(f"{row.readings[name].agreement:.1%}" for name in TEXTS),
            f"{sampled.acceptance:.1%}",
            f"{sampled.leaving:.1%}",
            f"{row.cost:.3f}",
            *(f"{speed:.2f}x @{gamma}" for gamma, speed in (row.greedy, row.sampled)),
            f"{row.threshold:.2f}x",
            f"{row.bound:.2f}x",
        )
    return table


def cost_lines(parts: PartTimes) -> list[str]:
    """The measured times, in words."""
    costs = parts.costs
    unit = costs.layers(1)
    several = ", ".join(f"{n} rows {costs.layers(1, n) / unit:.2f}" for n in sorted(costs.layer) if n > 1)
    return [
        f"a layer on 1 row {unit * 1e3:.3f} ms ({several} times that), final head {costs.head_layers:.1f} layers",
        f"an ordinary token {costs.step * 1e3:.2f} ms, in transformers' generate {parts.generate * 1e3:.2f} ms",
    ]


def verdict(rows: Sequence[Outlook], parts: PartTimes, untrained: bool, repeated: float, bound: float) -> list[str]:
    """Sentences: is it worth it, with which exit; what the numbers leave out."""
    lossless = max(rows, key=lambda row: row.sampled[1])
    leaving = max(rows, key=lambda row: row.threshold)
    best = max(lossless.sampled[1], leaving.threshold)
    gain = "Worth it" if best >= WORTH_IT else "A small gain" if best >= SMALL_GAIN else "Not worth it"
    said = [
        f"{gain} on this machine{' as it is' if untrained else ''}: {_lossless(lossless)}; {_leaving(leaving, bound)}."
    ]
    if untrained:
        said.append(UNTRAINED)
        said += _aim(rows)
    short = max(rows, key=lambda row: row.shortlisted)
    whole = parts.with_shortlist != parts.costs  # the exits' own heads have no shortlist yet
    if whole and (parts.costs.head_layers >= DEAR_HEAD or short.shortlisted > 1.05 * lossless.sampled[1]):
        said.append(
            f"The full head costs {parts.costs.head_layers:.1f} layers. With a shortlist of {parts.shortlist:,} tokens "
            f"c falls from {short.cost:.3f} to {parts.with_shortlist.draft_cost(short.layer):.3f} at layer "
            f"{short.layer}, and lossless decoding reaches {short.shortlisted:.2f}x if the shortlist misses nothing."
        )
    if repeated > 0.2:
        said.append(f"{repeated:.0%} of the greedy text repeats itself, which flatters the greedy figures.")
    return said


def _lossless(row: Outlook) -> str:
    if max(row.sampled[1], row.greedy[1]) <= 1:
        return "no exit makes lossless decoding faster"
    return (
        f"lossless decoding reaches {row.sampled[1]:.2f}x with drafts of {row.sampled[0]} from layer {row.layer} "
        f"(greedy {row.greedy[1]:.2f}x, with an ideal stop rule {row.stop_rule:.2f}x)"
    )


def _leaving(row: Outlook, bound: float) -> str:
    if row.threshold <= 1:
        return f"no exit alone is faster at a threshold that keeps {bound:.0%} of the tokens"
    return f"a threshold that keeps {bound:.0%} of the tokens reaches {row.threshold:.2f}x at layer {row.layer}"


def _aim(rows: Sequence[Outlook]) -> list[str]:
    """How far the exits are from a speed of GOAL, if they are."""
    if all(row.needed is None for row in rows):
        return [f"No acceptance would bring lossless decoding to {GOAL}x: the exits cost too much here."]
    reachable = [row for row in rows if row.needed is not None]
    if any(row.needed <= row.readings["sampled"].acceptance for row in reachable):
        return []
    # The exit whose rejections would have to shrink least.
    row = max(reachable, key=lambda row: (1 - row.needed) / (1 - row.readings["sampled"].acceptance))
    return [
        f"For a lossless {GOAL}x layer {row.layer} is nearest: {row.needed:.0%} of its drafts would have to be "
        f"accepted, {row.readings['sampled'].acceptance:.0%} are."
    ]


def write_probe(folder: Path, rows: Sequence[Outlook], parts: PartTimes, facts: dict[str, Any]) -> None:
    """probe.json and probe.png."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        **facts,
        "seconds": {
            "layer": _by_rows(parts.costs.layer),
            "head": _by_rows(parts.costs.head),
            "checks": _by_rows(parts.costs.checks),
            "checks_with_shortlist": _by_rows(parts.with_shortlist.checks),
            "ordinary_token": parts.costs.step,
            "generate_token": parts.generate,
        },
        "head_layers": parts.costs.head_layers,
        "shortlist": parts.shortlist,
        "exits": [asdict(row) for row in rows],
    }
    write_text(folder / "probe.json", json.dumps(values, indent=1) + "\n")
    plot_outlook(folder / "probe.png", rows, parts.costs)


def plot_outlook(path: Path, rows: Sequence[Outlook], costs: Costs) -> None:
    """Readability and predicted speed over the depth of the exit."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    layers = [row.layer for row in rows]
    for name in TEXTS:
        left.plot(layers, [100 * row.readings[name].agreement for row in rows], "o-", label=f"agrees, {name}")
    left.plot(layers, [100 * row.readings["sampled"].acceptance for row in rows], "s--", label="accepted, sampled")
    left.plot(layers, [100 * row.readings["sampled"].leaving for row in rows], "^:", label="may leave")
    left.set(ylabel="% of tokens", title="What the exit says", ylim=(0, 102))
    right.plot(layers, [row.greedy[1] for row in rows], "o-", label="lossless, greedy")
    right.plot(layers, [row.sampled[1] for row in rows], "s--", label="lossless, sampled")
    right.plot(layers, [row.threshold for row in rows], "^:", label="threshold")
    right.axhline(1, color="grey", linewidth=1)
    right.set(ylabel="speed (ordinary decoding = 1)", title="Predicted speed, batch 1")
    right.set_ylim(0, max(1.5, 1.1 * max(max(row.greedy[1], row.sampled[1], row.threshold) for row in rows)))
    for axis in (left, right):
        axis.set(xlabel="exit after layer", xlim=(0, costs.num_layers))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def _by_rows(times: Mapping[int, float]) -> dict[str, float]:
    return {str(key): times[key] for key in sorted(times)}
