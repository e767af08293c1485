"""Tables and the picture of `bench_tune.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

Result = dict[str, Any]


def print_part(console: Console, result: Result) -> None:
    """One table and what its columns mean."""
    title, table, note = TABLES[result["part"]](result)
    size = ", ".join(f"{key} {value}" for key, value in result["size"].items())
    console.rule(f"({result['part']}) {title} [{result['device']}]".replace("[", "\\["), align="left")
    console.print(table)
    console.print(f"{note}\n{size}; took {result['took']:.0f} s\n", highlight=False, style="dim")


def _columns(*names: str) -> Table:
    table = Table(show_edge=False)
    for name in names:
        table.add_column(name, justify="right")
    return table


def _steps(result: Result) -> tuple[str, Table, str]:
    table = _columns("ms", *(f"head {row['head']}" for row in result["rows"]))
    names = {
        "ours": "ours",
        "ideal": "ideal",
        "ideal_forward": "  frozen forward",
        "ideal_exits": "  exits alone",
        "naive": "naive loop",
    }
    for name, text in names.items():
        table.add_row(text, *(f"{row['seconds'][name] * 1000:.0f}" for row in result["rows"]))
    ratios = {"over_ideal": "ours / ideal", "over_naive": "ours / naive"}
    for name, text in ratios.items():
        cells = [f"{row[name]:.3f} ({row[name + '_fastest']:.3f})" for row in result["rows"]]
        table.add_row(text, *cells, style="bold")
    table.add_row("our tokens/s", *(f"{row['tokens_per_second']:.0f}" for row in result["rows"]))
    note = (
        "One optimizer step, medians; ratios: median over rounds in which all take turns (in brackets: of the fastest "
        "rounds). ideal: frozen forward to the deepest exit under no_grad + the exits alone on recorded inputs, plain "
        "torch, no clipping. naive loop: all layers with output_hidden_states, sum of the exits' losses, one backward, "
        "plain torch, no clipping."
    )
    return "step time", table, note


def _idle(result: Result) -> tuple[str, Table, str]:
    names = {"compute": "compute", "idle": "idle", "optimizer": "(opt.)"}
    table = _columns("stage", *names.values(), "|", *names.values())
    table.add_row("", *("flushed",) * 3, "|", *("run-ahead",) * 3, style="dim")
    for row in result["rows"]:
        cells = [[f"{row[mode][name]:.1%}" for name in names] for mode in ("flushed", "run_ahead")]
        table.add_row(str(row["stage"]), *cells[0], "|", *cells[1])
    compute = f"a timed wait of {result['wait'] * 1000:.0f} ms" if result["wait"] else "real"
    note = (
        "Shares of the wall time over whole batches, after the pipeline has filled. compute: the stage's own forward "
        "passes and exits; idle: all the rest (waiting for other stages, messages, loading, and the optimizer step, "
        "given in brackets: reduction over replicas, clipping, AdamW). 4 stages, 2 micro-batches; forward pass of a "
        f"stage: {compute}. "
        f"By formula a flushed pipeline idles (P-1)/(M+P-1) = {result['formula']:.0%}."
    )
    return "idle share per stage", table, note


def _memory(result: Result) -> tuple[str, Table, str]:
    table = _columns("MiB for exits", "peak", "heads' state", "the rest", "state: bytes/parameter")
    for row in result["rows"]:
        name = f"{row['exits']}{' (naive loop)' if row['naive'] else ''}"
        numbers = [f"{row[n]:.0f}" for n in ("peak", "state", "rest", "bytes_per_parameter")]
        table.add_row(name, *numbers)
    size = result["size"]
    width = 4 if result["device"] == "cpu" else 2
    read = 2 * size["micro_batch"] * size["sequence"] * size["hidden"] * width / 2**20
    kind = "resident memory" if result["device"] == "cpu" else "allocated GPU memory"
    note = (
        f"Peak {kind} of a process of its own, from start to the third step. heads' state, counted at the optimizer's "
        "step: parameters, ZeRO-1's copy of them, gradients, two moments (naive loop: no copy). the rest: libraries, "
        "frozen backbone, logits, activations; of these, what an exit reads is kept until its turn comes: "
        f"2 x tokens x hidden of one micro-batch, here {read:.1f} MiB for each exit."
    )
    return "peak memory", table, note


def _taps(result: Result) -> tuple[str, Table, str]:
    table = _columns("ms", *(f"head {row['head']}" for row in result["rows"]))
    names = {"computed": "computed", "kept": "kept (first epoch)", "read": "read (later epochs, other runs)"}
    for name, text in names.items():
        table.add_row(text, *(f"{row['seconds'][name] * 1000:.0f}" for row in result["rows"]))
    for name in ("kept", "read"):
        cells = [f"{row['seconds'][name] / row['seconds']['computed']:.3f}" for row in result["rows"]]
        table.add_row(f"{name} / computed", *cells, style="bold")
    table.add_row("MiB on disk", *(f"{row['mib']:.0f}" for row in result["rows"]))
    note = (
        "An epoch of six optimizer steps, medians over rounds in which all take turns. computed: without "
        "data.cache_taps; kept: computed and written; read: the frozen layers do not run."
    )
    return "kept taps", table, note


TABLES: dict[str, Callable[[Result], tuple[str, Table, str]]] = {
    "a": _steps,
    "b": _idle,
    "c": _memory,
    "d": _taps,
}


def print_checks(console: Console, results: list[Result]) -> None:
    """What was wanted and what was measured, misses included."""
    console.rule("wanted and got", align="left")
    for result in results:
        for item in result["checks"]:
            form = (lambda x: f"{x:.1%}") if item["percent"] else (lambda x: f"{x:.3f}")
            mark = "[green]ok  [/green]" if item["ok"] else "[bold red]MISS[/bold red]"
            numbers = f"wanted <= {form(item['wanted'])}, got {form(item['got'])}"
            console.print(f"{mark} ({result['part']}, {result['device']}) {item['what']}: {numbers}", highlight=False)


OURS, OTHER, GREY = "#1f6f8b", "#d98032", "#b8c4c9"


def plot(results: list[Result], path: Path) -> None:
    """One row per device, one panel per part."""
    panels = {"a": _plot_steps, "b": _plot_idle, "c": _plot_memory}
    results = [result for result in results if result["part"] in panels]
    devices = list(dict.fromkeys(result["device"] for result in results))
    parts = list(dict.fromkeys(result["part"] for result in results))
    figure, axes = plt.subplots(
        len(devices), len(parts), figsize=(5.2 * len(parts), 4.2 * len(devices)), squeeze=False, layout="constrained"
    )
    for ax in axes.flat:
        ax.set_visible(False)
    for result in results:
        ax = axes[devices.index(result["device"])][parts.index(result["part"])]
        ax.set_visible(True)
        ax.spines[["top", "right"]].set_visible(False)
        panels[result["part"]](ax, result)
    figure.savefig(path, dpi=150)


def _plot_steps(ax: Axes, result: Result) -> None:
    names = {"ours": OURS, "ideal": GREY, "naive": OTHER}
    for i, (name, color) in enumerate(names.items()):
        heights = [row["seconds"][name] * 1000 for row in result["rows"]]
        bars = ax.bar([x + 0.27 * (i - 1) for x in range(len(heights))], heights, 0.25, label=name, color=color)
        ax.bar_label(bars, fmt="%.0f", fontsize=8)
    ax.set_xticks(range(len(result["rows"])), [f"head {row['head']}" for row in result["rows"]])
    ax.set(title=f"(a) step time, {result['device']}", ylabel="ms")
    ax.margins(y=0.18)
    ax.legend(frameon=False, ncols=3, loc="upper left")


def _plot_idle(ax: Axes, result: Result) -> None:
    for i, (mode, text, color) in enumerate([("flushed", "flushed", OTHER), ("run_ahead", "run-ahead", OURS)]):
        heights = [row[mode]["idle"] * 100 for row in result["rows"]]
        bars = ax.bar([x + 0.4 * (i - 0.5) for x in range(len(heights))], heights, 0.37, label=text, color=color)
        ax.bar_label(bars, fmt="%.0f", fontsize=8)
    ax.axhline(result["formula"] * 100, color=OTHER, lw=1, ls="--", label="flushed, by formula")
    ax.axhline(10, color=OURS, lw=1, ls="--", label="wanted, run-ahead")
    ax.set_xticks(range(len(result["rows"])), [f"stage {row['stage']}" for row in result["rows"]])
    ax.set(title=f"(b) idle share, 4 stages, 2 micro-batches, {result['device']}", ylabel="% of time", ylim=(0, 100))
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _plot_memory(ax: Axes, result: Result) -> None:
    rows = result["rows"]
    rest = ax.bar(range(len(rows)), [row["rest"] for row in rows], 0.6, label="the rest", color=GREY)
    state = [row["state"] for row in rows]
    bars = ax.bar(range(len(rows)), state, 0.6, bottom=[row["rest"] for row in rows], label="heads' state", color=OURS)
    ax.bar_label(rest, fmt="%.0f", label_type="center", fontsize=8)
    ax.bar_label(bars, labels=[f"{row['peak']:.0f}" for row in rows], fontsize=8)
    ax.set_xticks(range(len(rows)), [f"{row['exits']}{chr(10) + 'naive' if row['naive'] else ''}" for row in rows])
    ax.set(title=f"(c) peak memory, {result['device']}", ylabel="MiB", xlabel="exits")
    ax.legend(frameon=False, loc="upper left")
