"""What a folder costs: counts that can be checked, times that are medians, energy from counters made here."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.models import load_whole, write_model
from transformers import AutoConfig, BertConfig, BertForSequenceClassification

from ee_scale.elastic.architecture import ElasticMap
from ee_scale.errors import UserError
from ee_scale.palettes import edge
from ee_scale.palettes.edge import Timings, measure_edge, time_forward
from ee_scale.palettes.energy import EnergyMeter, find_meter


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """21 MB in fp32, tied."""
    changes = {"vocab_size": 8000, "hidden_size": 320, "intermediate_size": 640, "num_hidden_layers": 3}
    return write_model(tmp_path_factory.mktemp("decoder"), "llama", tie_word_embeddings=True, **changes)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=128, max_position_embeddings=40, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_decoder_in_a_process_of_its_own(decoder):
    measure = measure_edge(decoder, "causal_lm", tokens=32, new_tokens=4, seconds=0.2, threads=1, verify=(2, 3))
    known = ElasticMap(AutoConfig.from_pretrained(decoder), "causal_lm")
    assert measure.parameters == known.parameters(known.shape.full)
    assert measure.weights_mb == (decoder / "model.safetensors").stat().st_size / 1e6
    assert measure.parameters * 4e-6 < measure.weights_mb < measure.parameters * 4.1e-6
    assert 0 < measure.prefill_ms <= measure.prefill_p90_ms
    assert 0 < measure.token_ms < 8 * measure.prefill_ms
    assert measure.memory_mb > measure.weights_mb
    if _peak_can_be_reset():  # else it holds what the whole process needed
        assert measure.memory_mb < measure.weights_mb + 20
    assert (measure.tokens, measure.device, measure.threads) == (32, "cpu", 1)
    assert [(type(rows), rows) for rows, _ in measure.verify_ms] == [(int, 2), (int, 3)]


def test_an_encoder_decodes_nothing(encoder):
    measure = measure_edge(encoder, "classify", tokens=40, seconds=0.1, threads=1)
    known = ElasticMap(AutoConfig.from_pretrained(encoder), "classify")
    assert measure.parameters == known.parameters(known.shape.full)
    assert measure.token_ms is None
    assert measure.prefill_ms > 0


def test_what_the_process_says_last_is_the_error(encoder):
    with pytest.raises(UserError, match=r"cannot be measured \(tokens: 41 .* the model reads at most 40\)$") as error:
        measure_edge(encoder, "classify", tokens=41)
    assert "\n" not in str(error.value)


def _peak_can_be_reset() -> bool:
    try:
        edge.CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def test_peak_memory_sees_what_was_freed_again():
    if not _peak_can_be_reset():
        pytest.skip("this kernel cannot reset the peak of a process")
    torch.ones(30_000_000).sum()  # a peak from before, which must not count
    memory = edge.PeakMemory("cpu")
    torch.ones(10_000_000).sum()
    assert 38e6 < memory.grown() < 60e6


def test_tokens_are_those_of_greedy_generation(decoder):
    model = load_whole(decoder)
    ids = torch.randint(3, 8000, (1, 9), generator=torch.Generator().manual_seed(0))
    seen, timings = [], Timings()
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        edge._round(model, ids, 4, timings)
    assert (len(timings.prefill), len(timings.token)) == (1, 4)
    assert [x.shape[1] for x in seen] == [9, 1, 1, 1, 1]  # a cache keeps the rest
    text = torch.cat(seen, 1)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(text, load_whole(decoder).generate(ids, **settings))


def test_rows_are_read_one_behind_another_after_the_prompt(decoder):
    model, ids = load_whole(decoder), torch.ones(1, 9, dtype=torch.long)
    seen, behind = [], []

    def watch(module, args, kwargs, output):
        seen.append(args[0].shape[1])
        behind.append(output[edge.CACHE].get_seq_length())

    model.register_forward_hook(watch, with_kwargs=True)
    with torch.no_grad():
        found = edge._verify(model, ids, (2, 4), 0.0)
    assert [rows for rows, _ in found] == [2, 4]
    assert min(ms for _, ms in found) > 0
    assert seen == [9, 2, 4] * (1 + edge.MIN_ROUNDS)
    assert behind == [9, 11, 15] * (1 + edge.MIN_ROUNDS)


def test_time_is_a_median_after_a_warm_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(edge, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def take(seconds: float) -> None:
        clock[0] += seconds

    spent = iter([0.1, 0.002, 0.1, 0.002, 0.1, 0.002])
    assert time_forward(lambda: take(next(spent)), 0.0) == pytest.approx(2)
    calls = []
    assert time_forward(lambda: calls.append(take(1 / 1024)), 0.125) == pytest.approx(1000 / 1024)
    assert len(calls) == 1 + 128


def test_energy_per_token_is_shared_by_all_tokens_of_the_timed_runs(decoder, monkeypatch):
    counts = itertools.count(0, 3_000_000)  # 3 J between two readings
    meter = EnergyMeter("made up", 1e-6, (lambda: next(counts),), (None,))
    monkeypatch.setattr(edge, "find_meter", lambda device: (meter, meter.name))
    measure = edge._measure(str(decoder), "causal_lm", 16, 4, 0.0, "cpu", None)
    assert measure.joules_per_token == pytest.approx(3 / (edge.MIN_ROUNDS * (16 + 4)))
    assert measure.energy == "made up"


# -- energy ------------------------------------------------------------------------------------------------------------


def write_domain(root: Path, domain: str, name: str, count: int, top: int = 1000) -> Path:
    folder = root / domain
    folder.mkdir()
    for file, value in (("name", name), ("energy_uj", count), ("max_energy_range_uj", top)):
        (folder / file).write_text(f"{value}\n")
    return folder


def test_packages_are_counted_once_and_behind_their_range(tmp_path):
    first = write_domain(tmp_path, "intel-rapl:0", "package-0", 900)
    second = write_domain(tmp_path, "intel-rapl:1", "package-1", 100)
    others = [("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")]
    others = [write_domain(tmp_path, domain, name, 0) for domain, name in others]
    meter, name = find_meter("cpu", tmp_path)
    before = meter.read()
    assert (before, name) == ((900, 100), "RAPL packages")
    (first / "energy_uj").write_text("50")  # 100 to the end of the range and 50 behind it
    (second / "energy_uj").write_text("130")
    for other in others:
        (other / "energy_uj").write_text("999")
    assert meter.joules(before, meter.read()) == pytest.approx(180e-6)


def test_without_a_counter_the_reason_is_said(tmp_path, monkeypatch):
    assert find_meter("cpu", tmp_path / "none") == (None, "not measured: no readable RAPL counter")
    broken = write_domain(tmp_path, "intel-rapl:0", "package-0", 0)
    (broken / "energy_uj").write_text("")
    assert find_meter("cpu", tmp_path) == (None, "not measured: no readable RAPL counter")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as if it were not installed
    assert find_meter("cuda") == (None, "not measured: no readable NVML counter")


def test_the_gpu_is_found_by_its_identity(monkeypatch):
    counts = {"GPU-abc": iter([5, 5000, 7500])}
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: counts[uuid],
        nvmlDeviceGetTotalEnergyConsumption=next,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
    meter, name = find_meter("cuda")
    assert name == "NVML"
    assert meter.joules(meter.read(), meter.read()) == pytest.approx(2.5)  # millijoules
