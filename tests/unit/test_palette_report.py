"""A palette's manifest, table, report and plot, from hand-made figures."""

import json
import re
from dataclasses import replace
from io import StringIO
from math import exp
from pathlib import Path

import pytest
import transformers
from matplotlib.axes import Axes
from matplotlib.image import imread
from rich.console import Console

from ee_scale.elastic.subnet import SubnetSpec
from ee_scale.errors import UserError
from ee_scale.palettes import plot
from ee_scale.palettes.manifest import MANIFEST, Device, Manifest, Member, Tried, read_manifest, write_manifest
from ee_scale.palettes.recommend import (
    PLOT,
    REPORT,
    palette_markdown,
    palette_table,
    recommendations,
    setback,
    write_palette_report,
)
from ee_scale.reading import write_json

FULL = SubnetSpec(64, 4, 256, (0, 1, 2, 3))


def member(name: str, params: int, value: float, ms: float, metric: str = "accuracy", **changes) -> Member:
    spec = FULL if name == "full" else SubnetSpec(params // 100_000, 2, 128, (0, 3))
    quality = {"accuracy": value} if metric == "accuracy" else {"loss": value, "perplexity": exp(value)}
    figures = Member(
        folder=name,
        spec=spec,
        params=params,
        layer_params=params // 2,
        flops=4 * params,
        prefill_ms=ms,
        token_ms=None if metric == "accuracy" else ms / 8,
        memory_mb=100 + params / 1e5,
        file_mb=params * 4e-6,
        joules_per_token="not measured: no energy counters",
        quality=quality,
        estimated_ms=0.9 * ms,
    )
    return replace(figures, **changes)


def palette(members: list[Member], metric: str = "accuracy", full: Member | None = None, **changes) -> Manifest:
    full = full or member("full", 10_000_000, 0.9 if metric == "accuracy" else 3.0, 8.0, metric)
    manifest = Manifest(
        base_model="some/base",
        base_fingerprint="f00d",
        run="runs/s",
        task="classify" if metric == "accuracy" else "causal_lm",
        device=Device("Some CPU", 2, "2.13.0"),
        limits={},
        objective="params",
        latency="prefill_ms" if metric == "accuracy" else "token_ms",
        metric=metric,
        full=full,
        members=members,
    )
    return replace(manifest, **changes)


@pytest.fixture
def manifest() -> Manifest:
    members = [member("s", 2_000_000, 0.8, 2.0), member("m", 4_000_000, 0.88, 5.0), member("l", 8_000_000, 0.895, 6.0)]
    tried = [Tried(one.spec, {"accuracy": 0.5}, {"params": one.params, "latency_ms": 3.0}) for one in members]
    limits = {"params": 8_500_000, "latency_ms": 7.5, "memory_mb": 200, "flops": 4e7}
    return palette(members, tried=tried, limits=limits)


def cells(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


# --- manifest


def test_round_trip(tmp_path: Path, manifest: Manifest) -> None:
    manifest.members[0].onnx["int8"] = {"file_mb": 2.0, "latency_ms": 1.1}
    manifest = replace(manifest, full=replace(manifest.full, joules_per_token=0.25))
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    stored = json.loads((tmp_path / MANIFEST).read_text())
    assert stored["members"][1]["spec"] == manifest.members[1].spec.to_dict()
    assert stored["version"] == 1


def test_damage(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json in it; give the output folder of ee-scale palette"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, manifest)
    path = tmp_path / MANIFEST
    text = path.read_text()
    path.write_text(text.replace("4000000", "4000001", 1))
    with pytest.raises(UserError, match="does not match its digest"):
        read_manifest(tmp_path)
    path.write_text(text[:200])
    with pytest.raises(UserError, match="not a whole file of ours"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda values: values.update(version=2), "version 2 of the manifest; this ee-scale reads 1"),
        (lambda values: values.pop("version"), "version None of the manifest"),
        (lambda values: values.pop("device"), r"manifest.json: device: field required"),
        (lambda values: values.update(colour=3), r"colour=3: unexpected"),
        (lambda values: values["members"][0].pop("file_mb"), r"members.0.file_mb: field required"),
        (lambda values: values["full"]["spec"].pop("ffn"), r"full.spec.ffn: field required"),
    ],
)
def test_other_versions_and_fields(tmp_path: Path, manifest: Manifest, change, text: str) -> None:
    values = manifest.to_dict()
    change(values)
    write_json(tmp_path / MANIFEST, values)
    with pytest.raises(UserError, match=text):
        read_manifest(tmp_path)


def test_this_device() -> None:
    device = Device.here(3)
    assert device.threads == 3
    assert device.cpu
    assert Device.here().threads >= 1


# --- words


def test_setback_is_relative_and_knows_its_direction(manifest: Manifest) -> None:
    assert [setback(manifest, one) for one in manifest.members] == pytest.approx([1 / 9, 0.02 / 0.9, 0.005 / 0.9])
    lossy = palette([member("a", 10, 3.3, 1.0, "loss"), member("b", 10, 2.7, 1.0, "loss")], "loss")
    assert [setback(lossy, one) for one in lossy.members] == pytest.approx([0.1, -0.1])


def test_recommendations(manifest: Manifest) -> None:
    assert recommendations(manifest) == [
        "**Smallest within 1% of the full model's accuracy:** `l`, accuracy 89.5% (0.6% worse), 80% of the parameters, "
        "6 ms (1.33x the speed).",
        "**Fastest within 3%:** `m`, accuracy 88.0% (2.2% worse), 40% of the parameters, 5 ms (1.6x the speed).",
        "**Best within max_params=8,500,000, max_latency_ms=7.5, max_memory_mb=200, max_flops=40,000,000:** `l`, "
        "as above; it takes 94% of max_params and 80% of max_latency_ms and 90% of max_memory_mb and 80% of max_flops.",
        "**Best with at most half of the parameters:** `m`, as above.",
        "**Best with at most a quarter of the parameters:** `s`, accuracy 80.0% (11.1% worse), 20% of the parameters, "
        "2 ms (4x the speed).",
    ]


def test_recommendations_by_loss() -> None:
    members = [
        member("tiny", 500_000, 3.5, 0.8, "loss"),
        member("small", 5_000_000, 3.02, 4.0, "loss"),
        member("better", 9_000_000, 2.99, 7.0, "loss"),
    ]
    lines = recommendations(palette(members, "loss"))
    assert lines[0] == (
        "**Smallest within 1% of the full model's loss:** `small`, loss 3.020 (0.7% worse), 50% of the parameters, "
        "0.5 ms (2x the speed)."
    )
    assert lines[2] == "**Best with at most half of the parameters:** `small`, as above."
    assert "`tiny`, loss 3.500 (16.7% worse), 5.0% of the parameters, 0.1 ms (10x the speed)." in lines[3]
    assert len(lines) == 4


def test_where_nothing_qualifies_it_says_so() -> None:
    poor = recommendations(palette([member("s", 6_000_000, 0.7, 5.0), member("m", 7_000_000, 0.81, 6.0)]))
    assert poor == [
        "**Smallest within 1% of the full model's accuracy:** none; the best subnet, `m`, is 10.0% worse.",
        "**Fastest within 3%:** none; the best subnet, `m`, is 10.0% worse.",
        "**Best with at most half of the parameters:** none; the smallest, `s`, has 60% of them.",
        "**Best with at most a quarter of the parameters:** none; the smallest, `s`, has 60% of them.",
    ]
    slow = recommendations(palette([member("s", 6_000_000, 0.9, 8.5)]))
    assert slow[0].endswith("`s`, accuracy 90.0% (equal), 60% of the parameters, 8.5 ms (0.941x the speed).")
    assert slow[1] == (
        "**Fastest within 3%:** none is faster than the full model; the fastest, `s`, takes 8.5 ms against 8 ms."
    )
    alone = recommendations(palette([member("full", 10_000_000, 0.9, 8.0)]))
    assert alone[0].endswith("only the full model itself, the palette's one member.")


def test_markdown(manifest: Manifest) -> None:
    text = palette_markdown(manifest)
    assert text.startswith("# Palette of some/base\n\n3 subnets of the supernet `runs/s`")
    assert "Measured on Some CPU, 2 threads, torch 2.13.0; limits kept by measurement: max_params=8,500,000," in text
    header, rule, full, *rows = cells(text)
    assert header == [
        "subnet",
        "params",
        "of full",
        "accuracy",
        "vs full",
        "prefill ms",
        "est.",
        "speed",
        "memory MB",
        "file MB",
    ]
    assert len(rule) == len(header)
    assert full == ["full model", "10.00M", "100%", "90.0%", "-", "8", "7.2", "1x", "200", "40.0"]
    assert rows[1] == ["m", "4.00M", "40%", "88.0%", "2.2% worse", "5", "4.5", "1.6x", "140", "16.0"]
    assert [row[0] for row in rows] == ["s", "m", "l"]
    assert text.count("Energy per token: not measured: no energy counters.") == 1
    assert len(text.splitlines()) < 40
    assert "3 subnets" not in palette_markdown(replace(manifest, members=manifest.members[:1], limits={}))
    assert "no limits were set." in palette_markdown(replace(manifest, limits={}))


def test_columns_of_a_language_model() -> None:
    members = [
        member("a", 500_000, 3.5, 0.8, "loss", joules_per_token=0.0125),
        member("b", 900_000, 3.2, 1.6, "loss", onnx={"int8": {"file_mb": 1.25, "latency_ms": 0.75}}, estimated_ms=None),
    ]
    header, _, full, first, second = cells(palette_markdown(palette(members, "loss")))
    assert header[3:8] == ["loss", "perplexity", "vs full", "prefill ms", "ms / token"]
    assert header[-2:] == ["mJ per token", "ONNX int8 MB / ms"]
    assert first[-2:] == ["12.5", "-"]
    assert second[-2:] == ["-", "1.2 / 0.75"]
    by_name = dict(zip(header, second, strict=True))
    assert (by_name["perplexity"], by_name["ms / token"], by_name["est."]) == ("24.53", "0.2", "-")
    assert full[3:5] == ["3.000", "20.09"]


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_code_block_names_a_stock_class_and_a_member(metric: str) -> None:
    made = palette([member("h64-g2", 500_000, 0.8, 0.8, metric)], metric)
    code = re.search(r"```python\n(.*?)```", palette_markdown(made), flags=re.S)[1]
    compile(code, "block", "exec")
    name = re.search(r"model = (\w+)\.from_pretrained\(\"h64-g2\"\)", code)[1]
    assert hasattr(transformers, name)
    assert name == {"accuracy": "AutoModelForSequenceClassification", "loss": "AutoModelForCausalLM"}[metric]


def test_table_has_the_same_figures(manifest: Manifest) -> None:
    out = StringIO()
    Console(file=out, width=140).print(palette_table(manifest, "Palette"))
    for row in cells(palette_markdown(manifest))[2:]:
        line = next(line for line in out.getvalue().splitlines() if line.startswith(f"│ {row[0]} "))
        assert [cell.strip() for cell in line.strip("│").split("│")] == row


# --- plot


def crowd(count: int, step: float) -> Manifest:
    members = [
        member(f"h{64 + i}-g12-f1536-l{i}", 5_000_000 + 400_000 * i, 0.86 + step * i, 4 + (7 * i % count) / 3)
        for i in range(count)
    ]
    return palette(members, limits={"params": 9_500_000})


def test_report_files(tmp_path: Path, manifest: Manifest) -> None:
    write_palette_report(tmp_path, manifest)
    assert (tmp_path / REPORT).read_text() == palette_markdown(manifest)
    assert f"]({PLOT})" in palette_markdown(manifest)
    image = imread(tmp_path / PLOT)
    assert image.shape[1] > 2 * image.shape[0] > 800
    assert image[..., :3].std() > 0.1


@pytest.mark.parametrize("step", [0.004, 0.0004])
def test_labels_cover_neither_each_other_nor_a_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    found = []
    real = plot._name_points

    def watch(canvas, axis: Axes, names, panel, heights):
        places = real(canvas, axis, names, panel, heights)
        spots = axis.transData.transform(list(zip(panel.costs, heights.values, strict=True)))
        found.append((axis, places, spots, {text.get_text() for text in axis.texts}))
        return places

    monkeypatch.setattr(plot, "_name_points", watch)
    made = crowd(9, step)
    plot.plot_palette(tmp_path / "plot.png", made)
    assert len(found) == 2
    for axis, places, spots, texts in found:
        assert texts == {one.folder for one in made.members}
        for index, place in enumerate(places):
            assert place.count_overlaps([*places[:index], *places[index + 1 :]]) == 0
            assert place.count_contains(spots) == 0
            assert axis.bbox.x0 < place.x0 < place.x1 < axis.bbox.x1
            assert axis.bbox.y0 < place.y0 < place.y1 < axis.bbox.y1


def drawn(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [(x, round(y, 6)) for x, y in zip(*line.get_data(), strict=True)] for line in axis.lines}


def test_what_a_panel_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    axes: list[Axes] = []
    monkeypatch.setattr(plot, "_name_points", lambda canvas, axis, *rest: axes.append(axis))
    odd = member("odd", 9_000_000, 0.85, 4.0)  # beaten at its size, not at its speed
    unknown = Tried(FULL, {"loss": 1.0}, {"params": 5.0, "latency_ms": 3.0})
    made = replace(manifest, members=[*manifest.members, odd], tried=[*manifest.tried, unknown])
    plot.plot_palette(tmp_path / "plot.png", made)
    sizes, latencies = map(drawn, axes)
    assert sizes["full model"] == [(10_000_000, 90.0)]
    assert sizes["palette"] == [(2e6, 80.0), (4e6, 88.0), (8e6, 89.5), (9e6, 85.0)]
    assert latencies["palette"] == [(2, 80.0), (5, 88.0), (6, 89.5), (4, 85.0)]
    assert latencies["tried (estimated cost)"] == [(3.0, 50.0)] * 3
    assert sizes["limit"][0][0] == 8_500_000
    assert latencies["limit"][0][0] == 7.5
    assert [(2e6, 80.0), (4e6, 88.0), (8e6, 89.5)] in sizes.values()  # the lines
    assert [(2, 80.0), (4, 85.0), (5, 88.0), (6, 89.5)] in latencies.values()
    assert axes[0].get_ylabel() == "accuracy (%, higher is better)"
    assert axes[1].get_xlabel() == "ms per forward pass"


def test_plot_of_the_full_model_alone_and_of_losses(tmp_path: Path) -> None:
    plot.plot_palette(tmp_path / "one.png", palette([member("full", 10_000_000, 0.9, 8.0)]))
    members = [member("a", 500_000, 3.5, 0.8, "loss"), member("b", 900_000, 3.2, 1.6, "loss")]
    plot.plot_palette(tmp_path / "two.png", palette(members, "loss", limits={"latency_ms": 100.0}))
    assert (tmp_path / "one.png").stat().st_size > 5000
    assert (tmp_path / "two.png").stat().st_size > 5000


def test_intervals_say_what_means_anything() -> None:
    full = member("full", 10_000_000, 0.9, 8.0, interval=(0.88, 0.92))
    same = member("same", 5_000_000, 0.895, 5.0, interval=(0.87, 0.91), difference=(-0.012, 0.002))
    worse = member("worse", 2_000_000, 0.85, 3.0, interval=(0.82, 0.88), difference=(-0.071, -0.029))
    text = palette_markdown(palette([worse, same], full=full, texts=1234))
    assert "on 1,234 held-out texts" in text
    assert "Not to be told from the full model: `same`." in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "| 88.0 to 92.0 | - | - |" in rows["full model"]
    assert "| 82.0 to 88.0 |" in rows["worse"]
    assert "| -7.1 to -2.9 |" in rows["worse"]
    assert "| -1.2 to +0.2 |" in rows["same"]
    old = palette_markdown(palette([member("a", 5_000_000, 0.8, 5.0)]))
    assert "95%" not in old


def test_losses_have_intervals_too(tmp_path: Path) -> None:
    full = member("full", 10_000_000, 3.0, 8.0, "loss", interval=(2.95, 3.05))
    small = member("a", 5_000_000, 3.2, 5.0, "loss", interval=(3.1, 3.3), difference=(0.15, 0.25))
    made = palette([small], "loss", full=full, texts=9)
    assert "| +0.150 to +0.250 |" in palette_markdown(made)
    assert "Not to be told" not in palette_markdown(made)
    write_manifest(tmp_path, made)
    assert read_manifest(tmp_path) == made
