"""The picture of a trace: a lane per stage, a bar per instruction, white where a stage has nothing to do."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ee_scale.engine.timeline import Event, StageTimeline

COLOURS = {
    "teacher": "#92c6ff",
    "forward": "#4878cf",
    "backward": "#6acc65",
    "exits": "#e8873a",
    "wait": "#eeeeee",
    "reduce": "#956cb4",
    "optimizer": "#c44e52",
    "other": "#8c8c8c",
}
NUMBERED = 0.012  # share of the width from which a bar has room for the number of its micro-batch
HEIGHT = 0.8  # of a lane


def plot_timeline(path: Path, timelines: Sequence[StageTimeline]) -> None:
    """Write a PNG. Time runs from the first stage's first step, in ms; the number in a bar is its micro-batch."""
    origin = min(timeline.steps[0].start for timeline in timelines)
    width = max(timeline.steps[-1].end for timeline in timelines) - origin
    figure = Figure(figsize=(14, 1.8 + 0.7 * len(timelines)), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for timeline in timelines:
        _lane(axis, timeline, origin, width)
    axis.set_yticks(
        [timeline.stage for timeline in timelines],
        [f"stage {timeline.stage}\n{timeline.idle:.0%} idle" for timeline in timelines],
    )
    axis.set_ylim(max(timeline.stage for timeline in timelines) + 0.55, -0.75)  # room for the names of the steps
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(0, width / 1e6)
    axis.set_xlabel("ms")
    idle = ", ".join(f"{timeline.stage}: {timeline.idle:.0%}" for timeline in timelines)
    axis.set_title(f"waiting for other stages, by stage: {idle}", loc="left", fontsize="medium")
    kinds = {event.kind for timeline in timelines for event in timeline.events}
    handles = [Patch(facecolor=COLOURS[kind], edgecolor="#999999", label=kind) for kind in COLOURS if kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path)


def _lane(axis: Axes, timeline: StageTimeline, origin: int, width: int) -> None:
    low = timeline.stage - HEIGHT / 2
    for depth in sorted({event.depth for event in timeline.events}):  # what lies inside is drawn over it
        for kind, colour in COLOURS.items():
            events = [event for event in timeline.events if (event.kind, event.depth) == (kind, depth)]
            bars = [((event.start - origin) / 1e6, (event.end - event.start) / 1e6) for event in events]
            axis.broken_barh(bars, (low, HEIGHT), facecolor=colour, edgecolor="white", linewidth=0.3, zorder=2 + depth)
            for event in events:
                _number(axis, event, timeline.stage, origin, width)
    for step in timeline.steps:
        axis.vlines((step.start - origin) / 1e6, low - 0.08, low + HEIGHT + 0.08, color="black", linewidth=1, zorder=9)
        if timeline.stage == 0:
            place = ((step.start - origin) / 1e6, low - 0.1)
            axis.text(*place, f" step {step.step}", fontsize="small", va="bottom", zorder=9)


def _number(axis: Axes, event: Event, stage: int, origin: int, width: int) -> None:
    if event.micro_batch is None or event.kind == "wait" or event.end - event.start < NUMBERED * width:
        return
    middle = ((event.start + event.end) / 2 - origin) / 1e6
    axis.text(middle, stage, str(event.micro_batch), ha="center", va="center", fontsize="x-small", zorder=8)
