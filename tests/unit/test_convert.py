"""The converters on bad days: torn and foreign files, full disks, interruptions; number types, shards, configs."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.clutter import check_copy, clutter
from helpers.convert import convert
from helpers.models import SLIDING_WINDOW, VOCAB, load_whole, tiny_config, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ee_scale.backbone.loading import TensorFolder
from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion import copying, execute, writing
from ee_scale.conversion.check.verify import verify
from ee_scale.conversion.execute import run
from ee_scale.conversion.plan import make_conversion, open_result
from ee_scale.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FORMATS = {
    "hf": {"to": "hf"},
    "torch_dist": {"to": "megatron_core", "tp": 2, "pp": 2},
    "core": {"to": "megatron_legacy", "tp": 2, "pp": 2},
    "legacy": {"to": "megatron_legacy", "classes": "legacy", "tp": 2, "pp": 2},
}


def refused(src: Path, message: str, to: str = "hf", **changes: Any) -> None:
    """One line that names the file, before anything is written."""
    out = src.with_name("never")
    with pytest.raises(UserError, match=message) as caught:
        make_conversion(ConvertConfig(src=src, out=out, to=to, **changes))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not out.with_name(".never.partial").exists()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = TensorFolder(folder)
    return {name: found.read(name) for name in found.files}


def same(folder: Path, other: Path) -> None:
    """The same tensors of the same types, bit for bit."""
    found, expected = tensors_of(folder), tensors_of(other)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Llama with their own output matrix."""
    return write_model(tmp_path_factory.mktemp("hf") / "model", "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def formats(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in every format; the Hugging Face folder in several shards."""
    folder = tmp_path_factory.mktemp("formats")
    found = {name: convert(hf, folder / name, **settings) for name, settings in FORMATS.items() if name != "hf"}
    return found | {"hf": convert(hf, folder / "hf", "hf", shard_gb=1e-4)}


@pytest.fixture
def copy(formats: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the model in one format, to be broken."""
    return lambda name: Path(shutil.copytree(formats[name], tmp_path / name))


# -- torn files --------------------------------------------------------------------------------------------------------

TORN = [
    ("hf", "model-00002-of-*.safetensors"),
    ("hf", "model.safetensors.index.json"),
    ("hf", "config.json"),
    ("torch_dist", "release/__1_0.distcp"),
    ("torch_dist", "release/.metadata"),
    ("torch_dist", "release/common.pt"),
    ("torch_dist", "huggingface/config.json"),
    ("torch_dist", "latest_checkpointed_iteration.txt"),
    ("core", "release/mp_rank_01_001/model_optim_rng.pt"),
    ("legacy", "release/mp_rank_00_000/model_optim_rng.pt"),
]


@pytest.mark.parametrize(("name", "pattern"), TORN, ids=[f"{name}-{pattern}" for name, pattern in TORN])
@pytest.mark.parametrize("share", [0, 0.5, 0.97], ids=["empty", "half", "end"])
def test_a_torn_file_is_named(copy, name: str, pattern: str, share: float):
    src = copy(name)
    path = next(iter(src.glob(pattern)))
    data = path.read_bytes()
    path.write_bytes(data[: min(int(len(data) * share), len(data) - 2)])
    refused(src, path.name if "config" not in path.name else "config.json")


@pytest.mark.parametrize("name", ["hf", "torch_dist", "core"])
def test_garbage_is_not_a_checkpoint(copy, name: str):
    src = copy(name)
    pattern = {"hf": "model-00001*", "torch_dist": "release/common.pt", "core": "release/mp_rank_00_000/*.pt"}[name]
    path = next(iter(src.glob(pattern)))
    path.write_bytes(b"<html>not found</html>\n" * 100)
    refused(src, path.name)


# -- missing, unknown and misshapen ------------------------------------------------------------------------------------


def test_a_missing_shard(copy):
    src = copy("hf")
    path = sorted(src.glob("model-*.safetensors"))[1]
    path.unlink()
    refused(src, f"model.safetensors.index.json names {path.name}, which is not there")


def test_a_folder_of_ranks_by_another_name(copy):
    src = copy("core")
    for path in (src / "release").glob("mp_rank_*"):
        path.rename(path.with_name(f"{path.name}_old"))
    refused(src, "no folder called mp_rank_00 or mp_rank_00_000 in it")


def test_an_index_that_lost_a_place(copy):
    src = copy("torch_dist")
    path = src / "release" / ".metadata"
    index = pickle.loads(path.read_bytes())
    index.storage_data.pop(next(entry for entry in index.storage_data if entry.fqn.endswith("linear_fc2.weight")))
    path.write_bytes(pickle.dumps(index))
    refused(src, "does not say where 'decoder.layers.mlp.linear_fc2.weight' at")


def test_missing_rank_folders(copy, tmp_path: Path):
    src = copy("core")
    shutil.move(src / "release" / "mp_rank_00_001", tmp_path / "away")
    refused(src, "release: mp_rank_00_001 is missing of tp=2 x pp=2")
    shutil.move(src / "release" / "mp_rank_01_001", tmp_path / "too")
    refused(src, "args say pipeline_model_parallel_size=2, but files for 1 are there")
    shutil.move(tmp_path / "away", src / "release" / "mp_rank_00_001")
    shutil.move(tmp_path / "too", src / "release" / "mp_rank_01_001")
    (src / "release" / "mp_rank_01_000" / "model_optim_rng.pt").unlink()
    refused(src, "mp_rank_01_000/model_optim_rng.pt: missing")


def test_missing_files_of_a_distributed_checkpoint(copy, tmp_path: Path):
    src = copy("torch_dist")
    (src / "release" / "__2_0.distcp").unlink()
    refused(src, "__2_0.distcp: named by the index, but not there")
    (src / "release" / "common.pt").unlink()
    (src / "release" / "metadata.json").unlink()
    refused(src, "release: no metadata.json in it; its save was never finished")
    (src / "release" / ".metadata").unlink()
    refused(src, "neither config.json .* nor metadata.json .* nor mp_rank_")


def test_common_pt_is_needed_only_where_no_config_came_along(copy, hf: Path, tmp_path: Path):
    src = copy("torch_dist")
    (src / "release" / "common.pt").unlink()
    same(convert(src, tmp_path / "first", "hf"), hf)
    shutil.rmtree(src / "huggingface")
    refused(src, "no 'args' in it; give model=<Hugging Face folder with config.json>")
    same(convert(src, tmp_path / "second", "hf", model=hf), hf)


def edit_hf(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_rank(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


NORM, FC2 = "model.layers.1.input_layernorm.weight", "decoder.layers.0.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(NORM), f"1 tensor missing: {NORM}"),
        (lambda found: [found.pop(name) for name in list(found) if "layers.1" in name], "9 tensors missing: .* [.]{3}"),
        (lambda found: found.pop("lm_head.weight"), "1 tensor missing: lm_head.weight"),
        (lambda found: found.update(extra=torch.zeros(1)), "1 tensor not known: extra"),
        (lambda found: found.update({NORM: torch.zeros(63)}), r"shape \[63\], but the config asks for \[64\]"),
        (lambda found: found.update({NORM: torch.zeros(1, 64)}), r"shape \[1, 64\], but the config asks for \[64\]"),
        (lambda found: found.update({NORM: torch.zeros(64, dtype=torch.uint16)}), "is of type U16; known: F64, F32"),
    ],
)
def test_tensors_that_do_not_fit_the_config(hf: Path, tmp_path: Path, change: Any, message: str):
    src = Path(shutil.copytree(hf, tmp_path / "src"))
    edit_hf(src, change)
    refused(src, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["model"].pop(FC2), f"mp_rank_01_001.*: 1 tensor missing: {FC2}"),
        (lambda found: found["model"].update(other=torch.zeros(1)), "1 tensor not known: other"),
        (lambda found: found["model"].update({FC2: torch.zeros(64, 32)}), r"shape \[64, 32\], but the model asks for"),
        (lambda found: found["model"].update({FC2: torch.zeros(64, 64).T}), "is not stored in order; save it contig"),
        (lambda found: found.pop("model"), "no 'model' in it"),
        (lambda found: found.pop("args"), "no dict with 'args' in it; not a checkpoint of Megatron-LM"),
    ],
)
def test_tensors_that_do_not_fit_the_rank(copy, change: Any, message: str):
    src = copy("core")
    edit_rank(src, change)
    refused(src, message)


def test_an_index_that_does_not_fit_the_config(copy, tmp_path: Path):
    src = copy("torch_dist")
    path = src / "release" / ".metadata"
    index = pickle.loads(path.read_bytes())
    entry = index.state_dict_metadata.pop("decoder.layers.mlp.linear_fc2.weight")
    path.write_bytes(pickle.dumps(index))
    refused(src, "2 tensors missing: decoder.layers.0.mlp.linear_fc2.weight, decoder.layers.1.mlp.linear_fc2.weight")
    index.state_dict_metadata["decoder.layers.mlp.linear_fc3.weight"] = entry
    path.write_bytes(pickle.dumps(index))
    refused(src, "tensors? missing|not known")


@pytest.mark.parametrize(
    ("early_exit", "message"),
    [
        ({"layers": [1], "kind": "deep"}, "src: early_exit: .*kind='deep'"),
        ({"layers": [1], "colour": 1}, "src: early_exit: .*colour"),
        ({"kind": "norm"}, "src: early_exit: 'layers'"),
        ({"layers": [3], "kind": "norm", "head": "tied"}, "src: early_exit: exits.layers: 3 is not in 1..2"),
        (
            {"layers": [1, 1], "kind": "norm", "head": "tied"},
            r"early_exit: exits.layers=\[1, 1\]: layer 1 is named",
        ),
        (
            {"layers": [2, 1], "kind": "norm", "head": "tied"},
            r"early_exit: exits.layers=\[2, 1\]: name the exits",
        ),
        ({"layers": [1], "kind": "norm", "head": "tied"}, "1 tensor missing: exit_heads.1.norm.weight"),
    ],
)
def test_exits_in_a_config_that_mean_nothing(hf: Path, tmp_path: Path, early_exit: dict, message: str):
    src = Path(shutil.copytree(hf, tmp_path / "src"))
    edit_config(src, early_exit=early_exit)
    refused(src, message)


def edit_config(folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "config.attention_bias=true"),
        ({"mlp_bias": True}, "config.mlp_bias=true"),
        ({"hidden_act": "gelu"}, "config.hidden_act=gelu: only silu"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
            "rope_type=yarn: Megatron",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4 + 0.5}}, "rope_theta=10000.5: .*an integer"),
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not supported"),
    ],
)
def test_configs_that_megatron_cannot_compute(hf: Path, tmp_path: Path, changes: dict, message: str):
    src = Path(shutil.copytree(hf, tmp_path / "src"))
    edit_config(src, **changes)
    refused(src, message, "megatron_core")


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_families_without_a_map(tmp_path: Path, family: str):
    refused(write_model(tmp_path / "src", family, num_hidden_layers=2), family, "megatron_core")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {}, "qwen3 has self_attention.q_layernorm.weight, which those classes lack; use classes=core"),
        ("mistral", {}, "sliding_window=8: they have none"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta=500000: their base is"),
    ],
)
def test_what_the_old_classes_lack(tmp_path: Path, family: str, changes: dict, message: str):
    src = write_model(tmp_path / "src", family, num_hidden_layers=2, **changes)
    refused(src, message, "megatron_legacy", classes="legacy")
    make_conversion(ConvertConfig(src=src, out=tmp_path / "out", to="megatron_legacy"))


def test_a_base_that_the_old_classes_ignore(copy):
    """Another converter may have written one; what trains on such a file does not look at it."""
    src = copy("legacy")
    shutil.rmtree(src / "huggingface")
    assert not make_conversion(ConvertConfig(src=src, out=src.with_name("out"), to="hf")).opened.notes
    path = src / "release" / "mp_rank_00_000" / "model_optim_rng.pt"  # the args of rank 0 count
    content = torch.load(path, weights_only=False)
    content["args"].rotary_base = 500000
    torch.save(content, path)
    notes = make_conversion(ConvertConfig(src=src, out=src.with_name("out"), to="hf")).opened.notes
    assert notes == ["args.rotary_base=500000: the old classes ignore it and compute with 10000"]


# -- foreign code ------------------------------------------------------------------------------------------------------


class Planted:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_an_index_is_not_run(copy, tmp_path: Path):
    src, proof = copy("torch_dist"), tmp_path / "proof"
    path = src / "release" / ".metadata"
    index = pickle.loads(path.read_bytes())
    index.planner_data = Planted(proof)
    path.write_bytes(pickle.dumps(index))
    for trust in (False, True):  # an index never needs more than the list
        refused(src, r"\.metadata: it asks for 'posix.mkdir'", trust=trust)
    path.write_bytes(pickle.dumps(Planted(proof)))
    refused(src, r"\.metadata: it asks for 'posix.mkdir'")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(src, r"\.metadata: holds a dict")
    assert not proof.exists()


@pytest.mark.parametrize("name", ["core", "legacy"])
def test_code_in_a_rank_is_run_only_when_trusted(copy, hf: Path, tmp_path: Path, name: str):
    src, proof = copy(name), tmp_path / "proof"
    edit_rank(src, lambda content: content.update(opt_param_scheduler=Planted(proof)))
    refused(src, "mp_rank_01_001/model_optim_rng.pt: asks for posix.mkdir, .*; trust=true runs the code")
    assert not proof.exists()
    same(convert(src, tmp_path / "back", "hf", trust=True), hf)
    assert proof.is_dir()


def test_code_in_the_files_of_a_distributed_checkpoint(copy, hf: Path, tmp_path: Path):
    src, proof = copy("torch_dist"), tmp_path / "proof"
    common = src / "release" / "common.pt"
    content = torch.load(common, weights_only=False)
    torch.save(content | {"rerun_state_machine": Planted(proof)}, common)
    refused(src, "common.pt: asks for posix.mkdir, .*; trust=true runs the code")
    assert not proof.exists()
    same(convert(src, tmp_path / "back", "hf", trust=True), hf)
    proof.rmdir()
    torch.save(content, common)
    data = src / "release" / "__0_0.distcp"
    index = pickle.loads((src / "release" / ".metadata").read_bytes())
    place = next(info for info in index.storage_data.values() if info.relative_path == data.name and info.length > 2000)
    torch.save({"x": Planted(proof)}, tmp_path / "planted")
    planted = (tmp_path / "planted").read_bytes()
    data.write_bytes(planted + data.read_bytes()[len(planted) :])
    index.storage_data = {
        key: type(info)(info.relative_path, 0, len(planted)) if info is place else info
        for key, info in index.storage_data.items()
    }
    (src / "release" / ".metadata").write_bytes(pickle.dumps(index))
    refused(src, "__0_0.distcp: ")
    assert not proof.exists()


def test_an_index_cannot_name_files_elsewhere(copy, tmp_path: Path):
    src = copy("torch_dist")
    shutil.move(src / "release" / "__0_0.distcp", tmp_path / "elsewhere.distcp")
    path = src / "release" / ".metadata"
    index = pickle.loads(path.read_bytes())
    for info in index.storage_data.values():
        if info.relative_path == "__0_0.distcp":
            info.relative_path = str(tmp_path / "elsewhere.distcp")
    path.write_bytes(pickle.dumps(index))
    refused(src, "elsewhere.distcp', which is no name of a file beside it")


# -- full disks and interruptions --------------------------------------------------------------------------------------


def shards(hf: Path, out: Path, **changes: Any) -> execute.Conversion:
    """Into six files and more."""
    return make_conversion(ConvertConfig(src=hf, out=out, to="hf", shard_gb=4e-5, **changes))


def test_too_little_space_is_met_before_anything_is_written(hf: Path, tmp_path: Path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"out=.*/out: needs 0.07 GB of disk, 0.00 GB are free there"):
        run(shards(hf, tmp_path / "out"), 2, lambda size: None)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def full_after(calls: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """A system call that fails from then on as on a full disk."""
    count = iter(range(10**9))

    def call(*arguments: Any) -> Any:
        if next(count) >= calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments)

    return call


@pytest.mark.parametrize(("name", "calls"), [("posix_fallocate", 3), ("pwrite", 9), ("fsync", 8)])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_disk_that_fills_up(hf: Path, tmp_path: Path, monkeypatch, name: str, calls: int, workers: int):
    """Finished files stay, unfinished ones give their space back, and the same command writes only what is missing."""
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with monkeypatch.context() as patched:
        patched.setattr(os, name, full_after(calls, getattr(os, name)))
        with pytest.raises(UserError, match=r"cannot write [(]No space left on device[)]; finished files are kept in"):
            run(shards(hf, out), workers, lambda size: None)
    assert not out.exists()
    finished = set(json.loads((partial / "journal.json").read_text())["files"])
    kept = {path.name: path.stat() for path in partial.glob("*.safetensors")}
    assert set(kept) >= finished
    assert workers > 1 or finished
    assert not list(partial.glob(".model*.tmp"))
    told: list[int] = []
    run(shards(hf, out), workers, told.append)
    for file in finished:
        now = (out / file).stat()
        assert (now.st_ino, now.st_mtime_ns) == (kept[file].st_ino, kept[file].st_mtime_ns)
    assert sum(told) == shards(hf, tmp_path / "x").nbytes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "journal.json").exists()
    same(out, hf)


def test_a_disk_that_fails_while_blocks_are_under_way(hf: Path, tmp_path: Path, monkeypatch):
    """It tells that once: whoever asked it to write has to pass it on."""
    monkeypatch.setattr(writing, "FLUSH", 1)
    monkeypatch.setattr(os, "fdatasync", full_after(0, os.fdatasync))
    with pytest.raises(UserError, match=r"cannot write [(]No space left on device[)]"):
        run(make_conversion(ConvertConfig(src=hf, out=tmp_path / "out", to="hf")), 1, lambda size: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["megatron_core", "megatron_legacy"])
def test_a_disk_that_fills_up_under_an_archive(hf: Path, tmp_path: Path, monkeypatch, to: str):
    """torch's writer of archives says RuntimeError for it."""
    with monkeypatch.context() as patched:

        def save(*_: Any, **__: Any) -> None:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nframe #0")

        patched.setattr(torch, "save", save)
        with pytest.raises(UserError, match=r"cannot write [(]torch.save: .enforce fail .* finished files are kept in"):
            convert(hf, tmp_path / "out", to, tp=2)
    assert not (tmp_path / "out").exists()
    same(convert(convert(hf, tmp_path / "out", to, tp=2), tmp_path / "back", "hf"), hf)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS)
def test_an_interrupted_run_is_taken_up(hf: Path, tmp_path: Path, error: type[BaseException], settings: dict):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    planned = lambda: make_conversion(ConvertConfig(src=hf, out=out, shard_gb=1e-4, **settings))  # noqa: E731
    left = iter([planned().nbytes * 2 // 3])
    budget = next(left)

    def moved(size: int) -> None:
        nonlocal budget
        budget -= size
        if budget < 0:
            raise error

    with pytest.raises(error):
        run(planned(), 1, moved)
    assert not out.exists()
    assert not list(partial.rglob(".*.tmp"))
    finished = json.loads((partial / "journal.json").read_text())["files"]
    assert 0 < len(finished) < len(planned().files)
    told: list[int] = []
    run(planned(), 2, told.append)
    done = sum(sum(piece.nbytes for piece in file.pieces) for file in planned().files if file.name in finished)
    assert told[0] == done > 0
    assert sum(told) == planned().nbytes
    assert not partial.exists()
    same(convert(out, tmp_path / "back", "hf"), hf)


def interrupted(conversion: execute.Conversion) -> Path:
    """The folder that a run leaves which stopped behind some files."""
    seen = 0

    def moved(size: int) -> None:
        nonlocal seen
        seen += size
        if seen > conversion.nbytes * 2 // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(conversion, 1, moved)
    return conversion.partial


def test_a_source_or_plan_that_changed_is_not_mixed(hf: Path, tmp_path: Path):
    src, out = Path(shutil.copytree(hf, tmp_path / "src")), tmp_path / "out"
    partial = interrupted(shards(src, out))
    message = "left by another conversion to the same folder .or its source changed.; delete it first"
    with pytest.raises(UserError, match=message):
        run(shards(src, out, dtype="bf16"), 1, lambda size: None)
    with pytest.raises(UserError, match=message):
        convert(src, out, "megatron_core")
    edit_config(src, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(UserError, match=message):
        run(shards(src, out), 1, lambda size: None)
    shutil.copyfile(hf / "config.json", src / "config.json")
    edit_hf(src, lambda found: found["model.norm.weight"].add_(1))
    with pytest.raises(UserError, match=message):
        run(shards(src, out), 1, lambda size: None)
    assert not out.exists()
    shutil.rmtree(partial)
    run(shards(src, out), 1, lambda size: None)
    same(out, src)


@pytest.mark.parametrize("damage", ["edited", "cut", "deleted"])
def test_a_finished_file_that_was_damaged_is_written_again(hf: Path, tmp_path: Path, damage: str):
    partial = interrupted(shards(hf, tmp_path / "out"))
    path = sorted(partial.glob("*.safetensors"))[0]
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\0\0\0\1" if damage == "edited" else data[:-4])
    if damage == "deleted":
        path.unlink()
    run(shards(hf, tmp_path / "out"), 2, lambda size: None)
    same(tmp_path / "out", hf)


def test_what_a_killed_run_left_is_swept_away(hf: Path, tmp_path: Path):
    """A process that was killed had no time to delete its unfinished file."""
    partial = interrupted(shards(hf, tmp_path / "out"))
    (partial / ".model-00001-of-00009.safetensors.tmp").write_bytes(b"\0" * 100)
    run(shards(hf, tmp_path / "out"), 2, lambda size: None)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_torn_journal_is_said(hf: Path, tmp_path: Path):
    partial = interrupted(shards(hf, tmp_path / "out"))
    (partial / "journal.json").write_text("{")
    with pytest.raises(UserError, match=r"journal.json: not a whole file of ours"):
        run(shards(hf, tmp_path / "out"), 1, lambda size: None)


def test_the_record_holds_the_digest_of_every_file(formats: dict[str, Path]):
    for folder in formats.values():
        record = json.loads((folder / "conversion.json").read_text())["files"]
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert set(record) == names - {"conversion.json"}
        for name, digest in record.items():
            assert execute.file_digest(folder / name) == digest


# -- number types, shards, blocks --------------------------------------------------------------------------------------


@pytest.fixture
def mixed(hf: Path, tmp_path: Path) -> Path:
    """Matrices in bf16, norms in fp32, the output matrix in fp16."""
    src = Path(shutil.copytree(hf, tmp_path / "mixed"))

    def change(found: dict[str, torch.Tensor]) -> None:
        for name, tensor in found.items():
            found[name] = tensor if tensor.ndim == 1 else tensor.to(torch.bfloat16)
        found["lm_head.weight"] = found["lm_head.weight"].to(torch.float16)

    edit_hf(src, change)
    return src


@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS)
def test_every_tensor_keeps_its_own_type(mixed: Path, tmp_path: Path, settings: dict):
    there = convert(mixed, tmp_path / "there", **settings)
    same(convert(there, tmp_path / "back", "hf"), mixed)


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp32"])
def test_verify_knows_which_types_are_coarser(mixed: Path, tmp_path: Path, dtype: str):
    """The embedding is in bf16 already; the norms are rounded with dtype=bf16 alone."""
    settings = ConvertConfig(src=mixed, out=tmp_path / "out", to="megatron_core", dtype=dtype)
    conversion = make_conversion(settings)
    found: list[Any] = []
    run(conversion, 2, lambda size: None, lambda at: found.append(verify(conversion.opened, open_result(settings, at))))
    assert found[0].steps == 4
    assert found[0].hidden < (1e-1 if dtype == "bf16" else 1e-5)
    assert (found[0].hidden > 1e-4) == (dtype == "bf16")


def test_parts_of_one_megatron_tensor_get_the_finer_type(hf: Path, tmp_path: Path):
    """q in bf16, k and v in fp32 lie in one matrix: nothing is rounded."""
    src = Path(shutil.copytree(hf, tmp_path / "src"))
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    edit_hf(src, lambda found: found.update({name: found[name].to(torch.bfloat16) for name in names}))
    back = tensors_of(convert(convert(src, tmp_path / "there", "megatron_core", tp=2), tmp_path / "back", "hf"))
    for name, tensor in tensors_of(src).items():
        assert back[name].dtype is torch.float32
        assert torch.equal(back[name], tensor.float())


@pytest.mark.parametrize("settings", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_chosen_type(hf: Path, tmp_path: Path, settings: dict, dtype: str):
    """Every number is rounded once, as torch does it, and coming back to fp32 changes none."""
    coarse = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    there = convert(hf, tmp_path / "there", dtype=dtype, **settings)
    back = convert(there, tmp_path / "back", "hf")
    again = convert(there, tmp_path / "again", "hf", dtype="fp32")
    for name, tensor in tensors_of(hf).items():
        assert torch.equal(tensors_of(back)[name], tensor.to(coarse)), name
        assert torch.equal(tensors_of(again)[name], tensor.to(coarse).float()), name
    for folder, expected in ((back, coarse), (again, torch.float32)):
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == str(expected).removeprefix("torch.")
        assert {tensor.dtype for tensor in tensors_of(folder).values()} == {expected}


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_shards_are_no_larger_than_asked_for(hf: Path, tmp_path: Path, dtype: str):
    limit = 60_000
    out = convert(hf, tmp_path / "out", "hf", shard_gb=limit / 1e9, dtype=dtype)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files
    total = 0
    for file in files:
        found = load_file(out / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(found)
        size = sum(tensor.nbytes for tensor in found.values())
        assert size <= limit or len(found) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    assert len(files) >= total // limit
    ids = torch.randint(VOCAB, (1, 9))
    if dtype == "auto":
        assert torch.equal(load_whole(out)(ids).logits, load_whole(hf)(ids).logits)
    assert [path.name for path in convert(out, tmp_path / "one", "hf").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("block", [1, 1000, 4096])
def test_many_small_blocks_give_the_same_bits(hf: Path, tmp_path: Path, monkeypatch, block: int):
    """A row at a time, a few rows that do not divide the heights, rows and parts of rows: slices in both directions."""
    monkeypatch.setattr(copying, "BLOCK", block)
    at = hf
    for number, settings in enumerate([*FORMATS.values(), {"to": "megatron_core", "tp": 4}]):
        at = convert(at, tmp_path / str(number), **settings)
    same(convert(at, tmp_path / "back", "hf"), hf)


def test_the_source_is_not_changed(formats: dict[str, Path], tmp_path: Path):
    for name, folder in formats.items():
        before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
        convert(folder, tmp_path / name, "megatron_core", tp=2)
        assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")} == before


# -- configs -----------------------------------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1000000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": LLAMA3,
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("spelling", ["new", "old"])
@pytest.mark.parametrize("to", ["hf", "megatron_core", "megatron_legacy"])
def test_the_config_comes_back_and_both_versions_of_transformers_read_it(
    hf: Path, tmp_path: Path, rope: str, spelling: str, to: str
):
    """Transformers 5 reads `rope_parameters`; 4 reads `rope_theta` and `rope_scaling` and ignores the other key."""
    src, wanted = Path(shutil.copytree(hf, tmp_path / "src")), ROPES[rope]
    scaling = {name: value for name, value in wanted.items() if name != "rope_theta"}
    old = {"rope_theta": wanted["rope_theta"], "rope_scaling": None if rope == "default" else scaling}
    changes = {"rope_parameters": wanted} if spelling == "new" else {"rope_parameters": ..., **old}
    before = edit_config(src, **changes, some_tool={"kept": [1, 2]}, transformers_version="4.46.0")
    back = convert(convert(src, tmp_path / "there", to), tmp_path / "back", "hf")
    after = json.loads((back / "config.json").read_text())
    assert {name: after[name] for name in before if before[name] is not ...} == {
        name: value for name, value in before.items() if value is not ...
    }
    theta, found = after.get("rope_theta", 10000.0), after.get("rope_scaling")  # as transformers 4 does
    assert theta == wanted["rope_theta"]
    assert (found or {"rope_type": "default"}) == scaling
    assert AutoConfig.from_pretrained(back).rope_parameters == AutoConfig.from_pretrained(src).rope_parameters
    assert AutoConfig.from_pretrained(back).rope_parameters == wanted
    assert set(after) - set(before) <= {"rope_parameters", "rope_theta", "rope_scaling", "dtype", "torch_dtype"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["torch_dist", "core"])
def test_a_config_from_arguments_alone(tmp_path: Path, family: str, tied: bool, name: str):
    """Without the folder `huggingface` beside it: the same model, and its vocabulary without the padding."""
    rope = {"rope_parameters": LLAMA3} if family == "llama" else {}
    src = write_model(
        tmp_path / "src",
        family,
        num_hidden_layers=2,
        tie_word_embeddings=tied,
        rms_norm_eps=3e-6,
        initializer_range=0.03,
        attention_dropout=0.25,
        **rope,
    )
    there = convert(src, tmp_path / "there", **FORMATS[name])
    shutil.rmtree(there / "huggingface")
    back = convert(there, tmp_path / "back", "hf")
    same(back, src)
    found, expected = (AutoConfig.from_pretrained(folder) for folder in (back, src))
    other = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_name_or_path"}
    theirs, ours = ({n: v for n, v in c.to_dict().items() if n not in other} for c in (expected, found))
    assert ours == theirs
    assert found.vocab_size == VOCAB
    assert getattr(found, "sliding_window", None) == (SLIDING_WINDOW if family == "mistral" else None)
    ids = torch.randint(VOCAB, (1, 20))
    assert torch.equal(load_whole(back)(ids).logits, load_whole(src)(ids).logits)


def test_a_window_that_every_layer_has(tmp_path: Path):
    """Qwen2 with `max_window_layers=0` can be told to Megatron; with two kinds of layers it cannot."""
    changes = {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 2}
    src = write_model(tmp_path / "src", "qwen2", max_window_layers=0, **changes)
    there = convert(src, tmp_path / "there", "megatron_core")
    shutil.rmtree(there / "huggingface")
    back = convert(there, tmp_path / "back", "hf")
    ids = torch.randint(VOCAB, (1, 20))
    assert torch.equal(load_whole(back)(ids).logits, load_whole(src)(ids).logits)
    config = tiny_config("qwen2", max_window_layers=1, **changes)
    config.save_pretrained(src)
    refused(src, "config.layer_types: full_attention and sliding_attention in one model", "megatron_core")


def test_small_files_come_along(hf: Path, tmp_path: Path):
    src = Path(shutil.copytree(hf, tmp_path / "src"))
    (clutter(src) / "exits.json").unlink()  # which makes a folder a sidecar
    there = convert(src, tmp_path / "there", "megatron_core")
    check_copy(there / "huggingface", src, set())
    check_copy(convert(there, tmp_path / "back", "hf"), src, {"model.safetensors", "conversion.json"})
    digests = json.loads((tmp_path / "back" / "conversion.json").read_text())["files"]
    assert all((tmp_path / "back" / name).is_file() for name in digests)


def test_two_conversions_to_the_same_folder(hf: Path, tmp_path: Path):
    """The second is refused while the first is at work, and does no harm."""
    settings = ConvertConfig(src=hf, out=tmp_path / "out", to="megatron_core")

    def second(_: Path) -> None:
        with pytest.raises(UserError, match=r"out=.*out: another conversion is writing it"):
            run(make_conversion(settings), 1, lambda size: None)

    run(make_conversion(settings), 1, lambda size: None, second)
    assert (tmp_path / "out").is_dir()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# -- rows of words -----------------------------------------------------------------------------------------------------


def megatron(hf: Path, tmp_path: Path, to: str, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """The model at tp=2 with 160 rows, changed: the args of both formats, or the rank files."""
    out = convert(hf, tmp_path / "out", to, tp=2, vocab_divisor=80)
    for path in [*out.rglob("common.pt"), *out.rglob("model_optim_rng.pt")]:
        content = torch.load(path, weights_only=False)
        if change:
            change(content)
        torch.save(content, path)
    return out


@pytest.mark.parametrize("to", ["megatron_core", "megatron_legacy"])
@pytest.mark.parametrize(
    ("config", "args", "message"),
    [
        (
            200,
            None,
            r"vocab_size=200 in the config, but '.*word_embeddings.weight' has 160 rows, padding included; "
            r"give model=<.*> with the number of words, at most 160, in its config.json",
        ),
        (200, 131, r"vocab_size=200 in the config, but .* has 160 rows, .* with vocab_size=131, as args say, in its "),
        (131, 133, r"vocab_size=131 in the config, but args say 133 of the 160 rows are words; give model=<.*> with "),
    ],
)
def test_rows_that_are_not_the_configs(hf: Path, tmp_path: Path, to: str, config: int, args: int | None, message: str):
    out = megatron(hf, tmp_path, to, lambda content: setattr(content["args"], "vocab_size", args))
    edit_config(out / "huggingface", vocab_size=config)
    refused(out, message)
    edit_config(out / "huggingface", vocab_size=args or VOCAB)  # the way out
    back = convert(out, tmp_path / "back", "hf")
    expected = TensorFolder(hf).read("lm_head.weight")
    assert torch.equal(TensorFolder(back).read("lm_head.weight")[:VOCAB], expected)


@pytest.mark.parametrize("to", ["megatron_core", "megatron_legacy"])
def test_more_words_in_args_than_rows(hf: Path, tmp_path: Path, to: str):
    """No config came along: that of args asks for more than there is."""
    out = megatron(hf, tmp_path, to, lambda content: setattr(content["args"], "vocab_size", 161))
    shutil.rmtree(out / "huggingface")
    refused(out, "vocab_size=161 in the config, but 'embedding.word_embeddings.weight' has 160 rows, padding included")


def test_rows_that_differ(hf: Path, tmp_path: Path):
    """Between embedding and output matrix; between tensor ranks."""

    def cut(content: dict[str, Any]) -> None:
        content["model"]["output_layer.weight"] = content["model"]["output_layer.weight"][:-8].clone()

    out = megatron(hf, tmp_path, "megatron_legacy", cut)
    refused(out, r"'output_layer.weight' has 144 rows, but 'embedding.word_embeddings.weight' has 160")
    path = out / "release" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    cut(content)
    torch.save(content, path)
    refused(out, r"'output_layer.weight' has 72, 64 rows on its tensor ranks; all have the same number")


FIRST_TO_ENTER = """
import sys, threading
import torch
threads = []
torch._C._ensureCUDADeviceGuardSet = lambda: threads.append(threading.current_thread())
from helpers.convert import convert
convert(*map(__import__("pathlib").Path, sys.argv[1:]), "megatron_legacy", tp=2)
assert threads[0] is threading.main_thread(), threads[0]
assert set(threads[1:]) - {threading.main_thread()}  # in writing there are others
"""


def test_threads_do_not_set_torchs_guard(tmp_path: Path) -> None:
    """Several at once end in a segmentation fault where torch is built for CUDA and there is no GPU (a login node)."""
    source = write_model(tmp_path / "model", "llama")
    done = subprocess.run(
        [sys.executable, "-c", FIRST_TO_ENTER, source, tmp_path / "out"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
