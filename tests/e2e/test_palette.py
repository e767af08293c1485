"""`ee-scale palette` through its command line: members that stock transformers opens, and figures that are theirs."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.assisted import Cycles
from helpers.cli import Finished, run_cli
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from ee_scale.artifact.checkpoint import checkpoints
from ee_scale.palettes.manifest import Manifest, Member, read_manifest

COMMON = ["seconds=0.02", "tokens=16", "new_tokens=2", "device=cpu"]
REPORT = {"manifest.json", "report.md", "palette.png"}
DRAFTS = ["drafts=true", "drafts_samples=4"]
COSTS = {"params": "params", "flops": "flops", "latency_ms": "prefill_ms", "memory_mb": "memory_mb"}


def palette(folder: Path, run: Path, *arguments: str, **options: bool) -> Finished:
    """Run the command; what it measures is measured in its own process unless told otherwise."""
    command = ["palette", f"src={run}", *COMMON, "out=palette", *arguments]
    return run_cli(command, folder, **{"measure_here": True, **options})


def made(folder: Path, run: Path, *arguments: str, **options: bool) -> Manifest:
    """The manifest of a palette that was written."""
    finished = palette(folder, run, *arguments, **options)
    assert finished.code == 0, finished.output
    return read_manifest(folder / "palette")


def refused(folder: Path, run: Path, *arguments: str) -> str:
    """The one line of a palette that was not written; nothing is left of it."""
    before = set(os.listdir(folder))
    finished = palette(folder, run, *arguments)
    assert finished.code == 2, finished.output
    (line,) = (line for line in finished.output.splitlines() if line.startswith("error: "))
    assert set(os.listdir(folder)) - before <= {".output_0"}
    return line.removeprefix("error: ")


def non_dominated(manifest: Manifest) -> bool:
    """By the members' own figures: every further one costs more and is better."""
    costs = [getattr(member, COSTS[manifest.objective]) for member in manifest.members]
    quality = [manifest.quality_of(member) for member in manifest.members]
    quality = [-value for value in quality] if manifest.higher_is_better else quality
    return costs == sorted(set(costs)) and quality == sorted(set(quality), reverse=True)


# -- the whole result, measured as people do ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(classify_run, tmp_path_factory) -> Path:
    """Two sizes of the classifier."""
    folder = tmp_path_factory.mktemp("classes")
    made(folder, classify_run, "count=2", "method=grid", "samples=0", measure_here=False)
    return folder / "palette"


@pytest.fixture(scope="module")
def texts(supernet_run, tmp_path_factory) -> Path:
    """Nine sizes of the decoder, which are more than its front has."""
    folder = tmp_path_factory.mktemp("texts")
    made(folder, supernet_run, "count=9", "method=grid", "samples=12", "audit=true", "audit_samples=3", *DRAFTS)
    return folder / "palette"


@pytest.fixture
def both(classes, texts) -> list[Path]:
    return [classes, texts]


def test_the_folder_holds_what_the_manifest_names_and_nothing_else(both, classify_run, bert_dir):
    for folder in both:
        manifest = read_manifest(folder)
        names = [member.folder for member in manifest.members]
        tried_on = [] if manifest.drafts is None else [manifest.drafts.full]  # drafters', on the front or not
        assert {path.name for path in folder.iterdir()} == {*REPORT, *names, *tried_on}
        assert len(set(names)) == len(names) >= 2
        assert non_dominated(manifest)
        assert (folder / "palette.png").read_bytes().startswith(b"\x89PNG")
        assert all(name in (folder / "report.md").read_text() for name in names)
    manifest = read_manifest(both[0])
    assert (manifest.task, manifest.metric, manifest.objective, manifest.limits) == (
        "classify",
        "accuracy",
        "params",
        {},
    )
    assert (manifest.base_model, manifest.run) == (str(bert_dir), str(classify_run))
    assert len(manifest.tried) == 8  # 2 widths x 2 MLPs x 2 depths, all of them
    assert len({tried.spec for tried in manifest.tried}) == 8


def test_figures_are_measured_ones(both):
    for folder in both:
        manifest = read_manifest(folder)
        for member in (*manifest.members, manifest.full):
            assert min(member.params, member.flops, member.prefill_ms, member.file_mb, member.estimated_ms) > 0
            assert 0 < member.layer_params < member.params
            assert (member.token_ms is None) == (manifest.task == "classify")
        for member in manifest.members:
            weights = load_file(folder / member.folder / "model.safetensors")
            assert sum(tensor.numel() for tensor in weights.values()) == member.params
            assert (folder / member.folder / "model.safetensors").stat().st_size / 1e6 == pytest.approx(member.file_mb)
        # What the search counted is what was cut out, tied or not.
        counted = {tried.spec: tried.estimates["params"] for tried in manifest.tried}
        assert all(counted[member.spec] == member.params for member in manifest.members)
        assert counted[manifest.full.spec] == manifest.full.params
    assert all(member.memory_mb > 0 for member in read_manifest(both[0]).members)


def test_it_says_how_sure_it_is(both):
    for folder in both:
        manifest = read_manifest(folder)
        assert manifest.texts == (12 if manifest.task == "causal_lm" else 90)
        for member in (manifest.full, *manifest.members):
            low, high = member.interval
            assert low < manifest.quality_of(member) < high
            assert (member.difference is None) == (member.spec == manifest.full.spec)
            if member.difference is not None:
                middle = manifest.quality_of(member) - manifest.quality_of(manifest.full)
                assert sum(member.difference) / 2 == pytest.approx(middle, abs=1e-6)
        assert f"Quality on {manifest.texts} held-out texts" in (folder / "report.md").read_text()


def test_it_says_what_it_was_trained_on_and_nothing_of_the_text(both, supernet_run, classify_run):
    for folder, run in zip(both, (classify_run, supernet_run), strict=True):
        manifest, identity = read_manifest(folder), json.loads((run / "run.json").read_text())
        (source,) = manifest.sources
        assert [source.digest] == identity["data"]["tokens"]
        assert min(source.documents, source.tokens) > 0
        assert source.license is None
        assert manifest.base_fingerprint == identity["base_fingerprint"]
        assert manifest.teacher.startswith(f"{identity['base_fingerprint']}+")  # its first stage trained
        card = (folder / manifest.members[0].folder / "README.md").read_text()
        for fact in (source.path, source.digest, f"{source.tokens:,} tokens", "licence not said", manifest.teacher):
            assert fact in card
    (source,) = read_manifest(both[0]).sources
    text = Path(source.path).read_text()
    assert source.documents == len(text.splitlines())
    words = json.loads(text.splitlines()[0])["text"]
    for folder in both:
        for path in (folder / "manifest.json", folder / "report.md"):
            assert words not in path.read_text()


def test_what_comes_back_of_the_training_text(texts):
    manifest = read_manifest(texts)
    assert list(manifest.audit) == ["teacher", *(member.folder for member in manifest.members)]
    for overlap in manifest.audit.values():
        assert overlap.texts == 3
        assert (overlap.found == 0) == (overlap.longest == 0) == (overlap.share == 0)
    assert "| teacher | " in (texts / "report.md").read_text()


STOCK = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "ee_scale":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
autos = {"causal_lm": AutoModelForCausalLM, "classify": AutoModelForSequenceClassification}
for task, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    auto = autos[task]
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    batch = AutoTokenizer.from_pretrained(folder)("the hidden state", return_tensors="pt")
    assert model(**batch).logits.isfinite().all()
    print(type(model).__name__)
"""


def test_members_are_stock_models(both):
    arguments, names = [], []
    for folder, name in zip(both, ("BertForSequenceClassification", "LlamaForCausalLM"), strict=True):
        manifest = read_manifest(folder)
        for member in manifest.members:
            arguments += [manifest.task, str(folder / member.folder)]
            names.append(name)
    command = [sys.executable, "-c", STOCK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == names


@torch.no_grad()
def stock_classifier(folder: Path, valid: Path) -> dict[str, float]:
    """Accuracy and loss of transformers' own model, an example at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, losses, right = AutoTokenizer.from_pretrained(folder), [], 0
    for line in valid.read_text().splitlines():
        example = json.loads(line)
        label = model.config.label2id[example["label"]]
        logits = model(**tokenizer(example["text"], return_tensors="pt")).logits[0]
        losses.append(float(F.cross_entropy(logits, torch.tensor(label))))
        right += int(logits.argmax()) == label
    return {"accuracy": right / len(losses), "loss": sum(losses) / len(losses)}


def test_quality_is_that_of_the_members(classes, labelled):
    manifest = read_manifest(classes)
    assert max(member.quality["accuracy"] for member in manifest.members) > 0.6
    for member in manifest.members:
        assert stock_classifier(classes / member.folder, labelled["valid"]) == pytest.approx(member.quality, abs=1e-4)


@torch.no_grad()
def test_quality_of_text_is_that_of_the_members(texts, supernet_arguments):
    valid = next(Path(text.partition("=")[2]) for text in supernet_arguments if text.startswith("data.valid="))
    for member in read_manifest(texts).members:
        model = AutoModelForCausalLM.from_pretrained(texts / member.folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(texts / member.folder)
        ids = torch.tensor(tokenizer(valid.read_text())["input_ids"])[: 12 * 17].view(12, 17)
        logits = model(ids[:, :-1]).logits
        loss = float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        assert member.quality["loss"] == pytest.approx(loss, abs=1e-4)
        assert member.quality["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_an_audit_needs_the_text_of_the_run(classify_run, supernet_run, tmp_path):
    assert refused(tmp_path, classify_run, "audit=true") == "audit=true: a classifier writes no text"
    run = tmp_path / "run"
    shutil.copytree(supernet_run, run)
    config, other = OmegaConf.load(run / "config.yaml"), tmp_path / "other.txt"
    other.write_text("other text " * 400)
    config.data.path = str(other)
    OmegaConf.save(config, run / "config.yaml")
    assert refused(tmp_path, run, "audit=true").endswith(f"data.path={other}: the run was trained on other text")


# -- draft models ------------------------------------------------------------------------------------------------------


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def prompts(folder: Path, member: str, arguments: list[str]) -> torch.Tensor:
    """Beginnings of four of the twelve texts that `samples=12` reads."""
    valid = next(Path(text.partition("=")[2]) for text in arguments if text.startswith("data.valid="))
    tokenizer = AutoTokenizer.from_pretrained(folder / member)
    return torch.tensor(tokenizer(valid.read_text())["input_ids"])[: 12 * 17].view(12, 17)[[0, 3, 7, 11], :16]


def test_every_smaller_size_is_tried_as_a_drafter(texts):
    manifest = read_manifest(texts)
    everyone = {**{member.folder: member for member in manifest.members}, manifest.drafts.full: manifest.full}
    pairs = [(pair.target, pair.drafter) for pair in manifest.drafts.pairs]
    smaller = [(a, b) for a in everyone for b in everyone if everyone[b].params < everyone[a].params]
    assert sorted(pairs) == sorted(smaller)
    assert (manifest.drafts.texts, manifest.drafts.tokens) == (4, 48)
    for pair in manifest.drafts.pairs:
        assert pair.cost > 0
        for found in (pair.greedy, pair.sampled):
            low, high = found.acceptance_interval
            assert 0 <= low <= found.acceptance <= high <= 1
            assert found.speedup <= found.tokens / found.drafts / pair.cost
            assert 1 <= found.drafts <= 12
            assert 1 <= found.tokens <= found.drafts + 1
    assert [rows for rows, _ in everyone[pairs[0][0]].verify_ms] == [2, 4, 8, 13]
    speedups = [pair.greedy.speedup for pair in manifest.drafts.pairs]
    assert speedups == sorted(speedups, reverse=True)
    assert (texts / manifest.drafts.full / "model.safetensors").is_file()
    assert "## Small sizes as draft models" in (texts / "report.md").read_text()
    assert "## As a draft model" in (texts / manifest.members[0].folder / "README.md").read_text()


def test_stock_transformers_drafts_as_foretold(texts, supernet_arguments):
    """Greedy: the same text as without a drafter, and exactly the tokens per cycle that the manifest says."""
    drafts = read_manifest(texts).drafts
    for pair in (drafts.pairs[0], min(drafts.pairs, key=lambda pair: pair.greedy.acceptance)):
        target, drafter, found = opened(texts / pair.target), opened(texts / pair.drafter), pair.greedy
        settings = {"num_assistant_tokens": found.drafts, "num_assistant_tokens_schedule": "constant"}
        drafter.generation_config.update(**settings, assistant_confidence_threshold=0)
        counted: list[int] = []
        for prompt in prompts(texts, pair.drafter, supernet_arguments):
            ids, cycles = prompt[None], Cycles()
            options = {"max_new_tokens": drafts.tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            alone = target.generate(ids, **options)
            assert torch.equal(target.generate(ids, assistant_model=drafter, streamer=cycles, **options), alone)
            counted += cycles.whole(alone.shape[1] - ids.shape[1], found.drafts)
        assert sum(counted) / len(counted) == pytest.approx(found.tokens)


def test_a_classifier_drafts_nothing(classify_run, tmp_path):
    assert refused(tmp_path, classify_run, "drafts=true") == "drafts=true: a classifier writes no text"


def test_drafts_need_room_behind_the_prompt(supernet_run, tmp_path):
    assert refused(tmp_path, supernet_run, "drafts=true", "tokens=40") == (
        "tokens=40 and 27 that are verified behind them (drafts=true): "
        "the model reads at most max_position_embeddings=64 tokens"
    )


# -- polish ------------------------------------------------------------------------------------------------------------


def test_each_size_is_polished_by_itself(classes, classify_run, labelled, tmp_path):
    polished = made(tmp_path, classify_run, "count=2", "method=grid", "samples=0", "polish=6")
    plain = read_manifest(classes)
    assert polished.polish.steps == 6
    assert polished.polish.seconds > 0
    assert (polished.full.quality, polished.full.before, plain.polish) == (plain.full.quality, {}, None)
    for member, unpolished in zip(polished.members, plain.members, strict=True):
        assert member.before == unpolished.quality
        assert member.quality["loss"] != pytest.approx(member.before["loss"], rel=1e-6)
        folder = tmp_path / "palette" / member.folder
        assert stock_classifier(folder, labelled["valid"]) == pytest.approx(member.quality, abs=1e-4)
        assert "6 more steps trained this size alone" in (folder / "README.md").read_text()
    assert "| before polish |" in (tmp_path / "palette" / "report.md").read_text()
    (tmp_path / "one").mkdir()
    (alone,) = made(tmp_path / "one", classify_run, "count=1", "method=grid", "samples=0", "polish=6").members
    assert alone.quality == pytest.approx(polished.members[-1].quality)  # whatever was polished before it


def test_decoders_are_polished_too(texts, supernet_run, tmp_path):
    polished = made(tmp_path, supernet_run, "count=2", "method=grid", "samples=12", "polish=4")
    plain = {member.folder: member for member in read_manifest(texts).members}
    for member in polished.members:
        assert member.before == pytest.approx(plain[member.folder].quality)
        assert member.quality["loss"] != pytest.approx(member.before["loss"], rel=1e-6)


def test_polish_needs_a_teacher(supernet_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(supernet_run, run)
    config = OmegaConf.load(run / "config.yaml")
    config.distill.teacher = "live"
    OmegaConf.save(config, run / "config.yaml")
    assert refused(tmp_path, run, "polish=2") == "polish=2: the run has no frozen teacher (distill.teacher=live)"
    assert refused(tmp_path, supernet_run, "polish=2", "step=4").startswith(
        "polish=2: the checkpoint is of stage 2 of 3"
    )


# -- a full net that never trains --------------------------------------------------------------------------------------

TAUGHT = ["recipe=mlfs", "space.palette=[{}, {ffn: 0.5}]"]


def test_the_full_model_of_a_palette_is_the_teacher_where_it_never_trained(supernet_arguments, model_dir, tmp_path):
    """Here the base model itself teaches; what the sizes trained is no part of it, polished or not."""
    given = [word for word in supernet_arguments if not word.startswith(("stages=", "recipe="))]
    stages = "stages=[{name: sizes, axes: [ffn], steps: 6, rank: 2, lr: 2.0}]"  # it only gets worse
    finished = run_cli([*given, *TAUGHT, stages, "parallel.pp=1", "out=run"], tmp_path)
    assert finished.code == 0, finished.output
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [set(line["loss"]) for line in lines if "loss" in line] == [{"random"}] * 6
    manifest = made(tmp_path, tmp_path / "run", "samples=12", "polish=2")
    whole, half = sorted(manifest.members, key=lambda member: -member.params)
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "palette" / whole.folder)
    assert model.config.intermediate_size == base.config.intermediate_size
    assert bool(whole.before) < bool(half.before)
    own = model.state_dict()
    for name, tensor in base.state_dict().items():
        assert sorted(own[name].flatten().tolist()) == sorted(tensor.flatten().tolist()), name  # units are reordered
    ids = torch.arange(12).view(1, -1)
    torch.testing.assert_close(model(ids).logits, base(ids).logits)
    assert manifest.full.quality == whole.quality


# -- limits ------------------------------------------------------------------------------------------------------------


def figure(manifest: Manifest, member: Member, limit: str) -> float:
    return getattr(member, COSTS[limit])


def test_limits_are_kept_by_the_measured_values(texts, supernet_run, tmp_path):
    whole = read_manifest(texts)
    # Two sizes share each number of parameters that a limit in the middle lets through.
    params = (whole.members[0].params + whole.full.params) // 2
    flops = int(0.8 * whole.full.flops)
    limits = {"params": params, "flops": flops, "latency_ms": 60_000.0}
    given = [f"max_{name}={value}" for name, value in limits.items()]
    manifest = made(tmp_path, supernet_run, "count=2", "samples=12", *given)
    assert manifest.limits == limits
    assert manifest.members
    for member in manifest.members:
        assert all(figure(manifest, member, name) <= value for name, value in limits.items())
    assert all(tried.estimates["params"] <= params for tried in manifest.tried)
    assert manifest.full.params > params  # measured all the same, to compare with


def test_limits_hold_for_measured_values_where_estimates_are_lower(texts, supernet_run, tmp_path):
    # Memory is estimated as the weights alone; what `run_cli` measures is twice that.
    weights = min(tried.estimates["params"] for tried in read_manifest(texts).tried) * 4 / 1e6
    limit = 2.2 * weights
    manifest = made(tmp_path, supernet_run, f"max_memory_mb={limit}", "count=3", "samples=12")
    assert max(tried.estimates["memory_mb"] for tried in manifest.tried) > 0.7 * limit
    assert manifest.members
    assert all(member.memory_mb <= limit for member in manifest.members)
    line = refused(tmp_path, supernet_run, f"max_memory_mb={1.1 * weights}", "count=3", "samples=12", "out=none")
    assert line.startswith("max_memory_mb=")
    assert "no subnet is that lean; the leanest, h64-g2-f160-l2, needs" in line
    assert "measured ones kept to it, and none does" in line


def test_an_impossible_limit_names_the_nearest_miss(supernet_run, tmp_path):
    line = refused(tmp_path, supernet_run, "max_params=1000", "samples=4")
    assert line.startswith("max_params=1,000: no subnet is that small; the smallest, h64-g2-f160-l2, has ")
    assert "times the limit" in line


# -- how it searches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "nsga2"])
def test_searches_within_their_trials(classify_run, tmp_path, method):
    manifest = made(tmp_path, classify_run, f"method={method}", "trials=4", "samples=20", "count=2")
    assert len(manifest.tried) == 4
    assert 1 <= len(manifest.members) <= 2
    assert non_dominated(manifest)


def test_a_grid_that_does_not_fit_its_trials_is_refused(classify_run, tmp_path):
    assert refused(tmp_path, classify_run, "method=grid", "trials=4").startswith("method=grid: 8 subnets to evaluate")


@pytest.mark.parametrize("objective", ["latency_ms", "flops", "memory_mb"])
def test_objectives(supernet_run, tmp_path, objective):
    manifest = made(tmp_path, supernet_run, f"objective={objective}", "samples=4", "count=3")
    assert manifest.objective == objective
    assert objective in manifest.tried[0].estimates
    assert non_dominated(manifest)


def test_a_larger_count_than_the_front_gives_the_front(texts):
    manifest = read_manifest(texts)
    assert 2 <= len(manifest.members) < 9
    # No subnet that was tried beats a member in quality at its number of parameters.
    for member in manifest.members:
        for tried in manifest.tried:
            if tried.estimates["params"] <= member.params:
                assert tried.quality["loss"] >= member.quality["loss"]


def test_early_exits_are_members(texts, supernet_run, tmp_path):
    tried = {tried.spec.layers: tried for tried in read_manifest(texts).tried if tried.spec.depth == 1}
    assert list(tried) == [(0,)]  # space.exits=[1]
    manifest = made(tmp_path, supernet_run, "samples=12", f"max_params={tried[0,].estimates['params']}", "count=9")
    (member,) = (member for member in manifest.members if member.spec.layers == (0,))
    assert member.folder.endswith("-l1-exit")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "palette" / member.folder).config.num_hidden_layers == 1


def test_a_checkpoint_of_the_middle_and_other_data(supernet_run, texts, corpus, tmp_path):
    (tmp_path / "early").mkdir()
    early = made(tmp_path / "early", supernet_run, "step=3", "samples=12", "count=1")
    assert len(checkpoints(supernet_run / "checkpoints")) == 6
    assert early.full.quality["loss"] > read_manifest(texts).full.quality["loss"] + 0.02
    other = made(tmp_path, supernet_run, f"data={corpus}", "samples=12", "count=1")
    assert other.full.quality["loss"] != read_manifest(texts).full.quality["loss"]
    assert "exists already" in palette(tmp_path, supernet_run, f"data={corpus}").output


def test_onnx(classify_run, tmp_path):
    pytest.importorskip("onnxruntime")
    manifest = made(tmp_path, classify_run, "onnx=true", "count=1", "trials=2", "method=random", "samples=8")
    (member,) = manifest.members
    assert set(member.onnx) == {"fp32", "int8"}
    for variant, facts in member.onnx.items():
        files = list((tmp_path / "palette" / member.folder / f"onnx-{variant}").glob("*.onnx*"))
        assert sum(path.stat().st_size for path in files) / 1e6 == pytest.approx(facts["file_mb"])
        assert facts["latency_ms"] > 0
    assert member.onnx["fp32"]["agreement"] == 1
    assert member.onnx["int8"]["file_mb"] < member.onnx["fp32"]["file_mb"]
    assert manifest.full.onnx == {}
