"""Saves of real DeepSpeed, every ZeRO stage, converted and compared with the live model, bit for bit."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils import safe_get_full_fp32_param
from helpers.cli import run_cli
from helpers.models import tiny_config, write_model
from helpers.spawn import spawn
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion import execute
from ee_scale.conversion.execute import run
from ee_scale.conversion.plan import make_conversion
from ee_scale.conversion.unpickle import TRUST
from ee_scale.errors import UserError

TAG, RANKS, LAYERS = "step2", 2, 2
ALL = ("fp32-0", "bf16-0", "fp32-1", "bf16-1", "fp32-2", "bf16-2", "fp32-3", "bf16-3")


@dataclass(frozen=True)
class Case:
    """What is trained: number type, ZeRO stage, tied head, name part of what is frozen, modules around the model."""

    bf16: bool
    stage: int
    tied: bool = False
    frozen: str = "layers.0."
    wrappers: tuple[str, ...] = ()
    fp32_sums: bool = False


CASES = {
    **{name: Case(name.startswith("bf16"), int(name[-1])) for name in ALL},
    "tied-0": Case(True, 0, tied=True),
    "tied-1": Case(True, 1, tied=True, frozen="embed_tokens"),
    "tied-2": Case(True, 2, tied=True),
    "tied-3": Case(False, 3, tied=True, frozen="embed_tokens"),
    "wrapped-1": Case(False, 1, wrappers=("_orig_mod", "module")),
    "wrapped-3": Case(True, 3, wrappers=("module",)),
    "bf16-optimizer": Case(True, 1, fp32_sums=True),
}


class Wrapper(nn.Module):
    """Puts a name before all names, as DistributedDataParallel and torch.compile do."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        setattr(self, name, model)
        self.forward = model.forward


def train_all(rank: int, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every case's weights as they live in the model when it is saved: masters where there are any."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a compiler
    live = {name: train(rank, case, folder / name) for name, case in CASES.items()}
    save_pipeline(folder / "pipeline")
    return live if rank == 0 else {}


def train(rank: int, case: Case, folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = tiny_config("llama", num_hidden_layers=LAYERS, tie_word_embeddings=case.tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.frozen not in name)
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    vectors, matrices = ([p for p in model.parameters() if p.requires_grad and (p.ndim == 1) == one] for one in (1, 0))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.bf16},
        "data_types": {"grad_accum_dtype": "fp32"} if case.fp32_sums else {},
    }
    outer = model
    for name in case.wrappers:
        outer = Wrapper(outer, name)
    engine, *_ = deepspeed.initialize(model=outer, optimizer=optimizer, config=settings, dist_init_required=False)
    for step in range(2):
        ids = torch.randint(config.vocab_size, (1, 8), generator=torch.Generator().manual_seed(10 * step + rank))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(folder), tag=TAG)
    return {name: whole(parameter, case) for name, parameter in model.named_parameters()}


def whole(parameter: nn.Parameter, case: Case) -> torch.Tensor:
    if case.stage and not case.fp32_sums and parameter.requires_grad:
        return safe_get_full_fp32_param(parameter).clone()
    with deepspeed.zero.GatheredParameters([parameter], enabled=case.stage == 3):
        return parameter.detach().clone()


def save_pipeline(folder: Path) -> None:
    model = PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=RANKS, loss_fn=nn.functional.mse_loss)
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    engine.train_batch(iter([(torch.ones(1, 4), torch.ones(1, 4))]))
    engine.save_checkpoint(str(folder), tag=TAG)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """(folder of a save per case, live weights by case)."""
    folder = tmp_path_factory.mktemp("saves")
    live = spawn(train_all, RANKS, folder)[0]
    for name, tied in (("config", False), ("config-tied", True)):
        write_model(folder / name, "llama", num_hidden_layers=LAYERS, tie_word_embeddings=tied)
        (folder / name / "model.safetensors").unlink()
    return folder, live


@pytest.fixture
def copy(saves: Any, tmp_path: Path) -> Any:
    """Copies a case's save, to be broken."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(saves[0] / name, tmp_path / f"copy-{name}"))

    return make


def settings(src: Path, out: Path, model: Path | None, **changes: Any) -> ConvertConfig:
    return ConvertConfig(src=src, out=out, model=model, **({"to": "hf"} | changes))


def convert(src: Path, out: Path, model: Path | None, **changes: Any) -> Path:
    run(make_conversion(settings(src, out, model, **changes)), 2, lambda size: None)
    assert {path.name for path in out.parent.glob(".*")} == set()  # neither parts nor gathered weights stay
    return out


def config_of(folder: Path, case: str) -> Path:
    return folder / ("config-tied" if CASES[case].tied else "config")


def assert_same(out: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """What stock transformers opens is `expected`; in `dtype`, or in the widest type of a weight."""
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = dict(model.named_parameters())
    assert set(found) == set(expected)
    dtype = dtype or (torch.float32 if torch.float32 in {t.dtype for t in expected.values()} else torch.bfloat16)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype, name
        assert torch.equal(found[name], tensor.to(dtype)), name


@contextmanager
def refused(*words: str) -> Iterator[None]:
    with pytest.raises(UserError) as caught:
        yield
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_same_as_the_live_model(saves: Any, tmp_path: Path, case: str):
    folder, live = saves
    assert_same(convert(folder / case, tmp_path / "out", config_of(folder, case)), live[case])


def test_masters_are_not_the_weights_the_model_computes_with(saves: Any):
    """Or else the comparison above would not tell them apart."""
    for case in ("bf16-1", "bf16-2", "bf16-3"):
        masters = [tensor for tensor in saves[1][case].values() if tensor.dtype == torch.float32]
        assert masters
        assert all(not torch.equal(tensor.bfloat16().float(), tensor) for tensor in masters)


@pytest.mark.parametrize("case", ["bf16-2", "fp32-3"])
def test_another_number_type(saves: Any, tmp_path: Path, case: str):
    """Gathered in that type, to take half the disk; rounded once."""
    folder, live = saves
    conversion = make_conversion(settings(folder / case, tmp_path / "out", folder / "config", dtype="bf16"))
    assert {extent.dtype for extent in conversion.opened.staging.extents.values()} == {torch.bfloat16}
    out = convert(folder / case, tmp_path / "out", folder / "config", dtype="bf16")
    assert_same(out, live[case], torch.bfloat16)


@pytest.mark.parametrize("case", ["bf16-0", "tied-2", "wrapped-3"])
def test_without_a_config(saves: Any, tmp_path: Path, case: str):
    folder, live = saves
    conversion = make_conversion(settings(folder / case, tmp_path / "out", None, shard_gb=1e-4))
    assert "without config" in conversion.notes[-1]
    run(conversion, 2, lambda size: None)
    out = tmp_path / "out"
    assert not (out / "config.json").exists()
    assert (out / "model.safetensors.index.json").is_file()
    found = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    expected = dict(live[case])
    if CASES[case].tied:  # nothing says that the head need not be there
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    assert set(found) == set(expected)
    dtype = torch.float32 if CASES[case].stage else torch.bfloat16
    assert all(found[name].dtype == dtype and torch.equal(found[name], expected[name].to(dtype)) for name in expected)
    with refused("model=<"):
        make_conversion(settings(folder / case, tmp_path / "megatron", None, to="megatron_core"))


def test_buffers_without_a_config(copy: Any, tmp_path: Path):
    """Whole numbers stay whole; a scalar is left out."""
    src = copy("bf16-0")
    path = src / TAG / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    content["module"] |= {"ids": torch.arange(3), "scalar": torch.tensor(1.0)}
    torch.save(content, path)
    found = load_file(convert(src, tmp_path / "parent" / "out", None, dtype="fp16") / "model.safetensors")
    assert torch.equal(found.pop("ids"), torch.arange(3))
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert "scalar" not in found


def test_a_tied_head_for_an_untied_config(saves: Any, tmp_path: Path):
    folder, live = saves
    expected = live["tied-2"] | {"lm_head.weight": live["tied-2"]["model.embed_tokens.weight"]}
    assert_same(convert(folder / "tied-2", tmp_path / "out", folder / "config"), expected)


def test_command(saves: Any, tmp_path: Path):
    """To Megatron-Core and back, found without from=; source and result compute the same; a plan writes nothing."""
    folder, live = saves
    src, there, back = folder / "bf16-2", tmp_path / "there", tmp_path / "back"
    there_command = ["convert", f"src={src}", f"out={there}", "to=megatron_core", f"model={folder / 'config'}", "tp=2"]
    planned = run_cli([*there_command, "plan=true"], tmp_path)
    assert planned.code == 0, planned.output
    assert "linear_qkv.weight" in planned.output
    assert {path.name for path in tmp_path.iterdir()} == {".output_0"}
    done = run_cli([*there_command, "verify=true"], tmp_path)
    assert done.code == 0, done.output
    assert "verified" in done.output
    assert "ZeRO 2, 2 ranks: fp32 masters" in done.output
    assert "Loading checkpoint shards" not in done.output
    assert_same(convert(there, back / "out", None), live["bf16-2"])
    bare = run_cli(
        ["convert", f"src={src}", "from=deepspeed", f"out={tmp_path / 'bare'}", "to=hf", "verify=true"], tmp_path
    )
    assert bare.code == 2
    assert "verify=true" in bare.output
    assert {path.name for path in tmp_path.iterdir()} == {".output_0", "there", "back"}


def test_tag_folder_and_config_beside_it(saves: Any, copy: Any, tmp_path: Path):
    """One tag as src; and the folder of transformers' Trainer, which has the config but not always the weights."""
    folder, live = saves
    src = copy("fp32-2")
    (src / "latest").unlink()
    for path in (folder / "config").iterdir():
        shutil.copyfile(path, src / path.name)
    assert_same(convert(src / TAG, tmp_path / "out" / "tag", None, source="deepspeed"), live["fp32-2"])
    (src / "latest").write_text(TAG)
    assert_same(convert(src, tmp_path / "out" / "trainer", None), live["fp32-2"])
    save_file({"other": torch.zeros(1)}, src / "model.safetensors")
    assert_same(convert(src, tmp_path / "out" / "told", None, source="deepspeed"), live["fp32-2"])
    with refused("all files have"):  # the weights beside it come first
        make_conversion(settings(src, tmp_path / "out" / "weights", None))


def test_which_tag(copy: Any, saves: Any, tmp_path: Path):
    src, model = copy("fp32-2"), saves[0] / "config"
    out = tmp_path / "out"
    with refused("iteration=3", "tag"):
        make_conversion(settings(src, out, model, iteration=3))
    (src / "latest").write_text("step9")
    with refused("'step9'", f"there: {TAG}"):
        make_conversion(settings(src, out, model))
    (src / "latest").unlink()
    with refused("'latest'", f"there: {TAG}"):
        make_conversion(settings(src, out, model))
    with refused("no such folder"):
        make_conversion(settings(tmp_path / "nowhere", out, model, source="deepspeed"))


def optimizer_file(src: Path, rank: int) -> Path:
    return next((src / TAG).glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))


@pytest.mark.parametrize("case", ["bf16-1", "fp32-3"])
def test_files_missing_or_too_many(copy: Any, saves: Any, tmp_path: Path, case: str):
    src, model = copy(case), saves[0] / "config"
    out = tmp_path / "out"
    second = optimizer_file(src, 1)
    shutil.copyfile(second, second.with_name(second.name.replace("rank_1", "rank_2")))
    with refused("saved by 2 ranks", "3 such files"):  # left by an earlier save on more ranks
        make_conversion(settings(src, out, model))
    optimizer_file(src, 2).unlink()
    second.rename(tmp_path / "aside")
    with refused("saved by 2 ranks; 1 optimizer files missing: zero_pp_rank 1"):
        make_conversion(settings(src, out, model))
    optimizer_file(src, 0).unlink()
    with refused("no *_optim_states.pt"):
        make_conversion(settings(src, out, model))


def test_model_file_of_a_rank_missing(copy: Any, saves: Any, tmp_path: Path):
    """DeepSpeed's tool would take what is there, and make frozen weights of it."""
    src = copy("fp32-3")
    (src / TAG / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with refused("saved by 2 ranks; 1 model files missing: zero_pp_rank 1"):
        make_conversion(settings(src, tmp_path / "out", saves[0] / "config"))
    (src / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    with refused("no mp_rank_00_model_states.pt"):
        make_conversion(settings(src, tmp_path / "out", saves[0] / "config"))


def test_other_kinds_of_parallelism(copy: Any, saves: Any, tmp_path: Path):
    model, out = saves[0] / "config", tmp_path / "out"
    with refused("2 files of single layers (layer_00-model_states.pt)", "ds_to_universal"):
        make_conversion(settings(saves[0] / "pipeline", out, model))
    src = copy("bf16-2")
    first = src / TAG / "mp_rank_00_model_states.pt"
    shutil.copyfile(first, first.with_name("mp_rank_01_model_states.pt"))
    with refused("2 tensor ranks (mp_rank_00 to 01)", "ds_to_universal"):
        make_conversion(settings(src, out, model))
    first.with_name("mp_rank_01_model_states.pt").rename(src / TAG / "expp_rank_0_mp_rank_00_optim_states.pt")
    with refused("expp_rank_0_mp_rank_00_optim_states.pt", "experts"):
        make_conversion(settings(src, out, model))


@pytest.mark.parametrize("case", ["fp32-0", "bf16-1", "bf16-3"])
def test_cut_off_files(copy: Any, saves: Any, tmp_path: Path, case: str):
    for index in range(len(list((saves[0] / case / TAG).glob("*_states.pt")))):
        src = copy(case)
        path = sorted((src / TAG).glob("*_states.pt"))[index]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with refused(path.name, "not a whole file"):
            make_conversion(settings(src, tmp_path / "out", saves[0] / "config"))
        shutil.rmtree(src)


PROJECTION = "model.layers.1.self_attn.q_proj"
PEFT = "base_model.model."
ADAPTERS = {  # what peft 0.21 calls weights in a model that it wrapped; the rest has the prefix alone
    "lora": {f"{PROJECTION}.base_layer.weight": None, f"{PROJECTION}.lora_A.default.weight": (8, 64)},
    "lora-saved": {f"{PROJECTION}.weight": None, f"{PROJECTION}.lora_B.weight": (64, 8)},
    "dora": {f"{PROJECTION}.weight": None, f"{PROJECTION}.lora_magnitude_vector.default.weight": (64,)},
    "embedding": {f"{PROJECTION}.weight": None, "model.embed_tokens.lora_embedding_A.default": (8, 131)},
    "whole modules": {f"{PROJECTION}.weight": None, "lm_head.modules_to_save.default.weight": (131, 64)},
    "ia3": {f"{PROJECTION}.weight": None, "model.layers.0.self_attn.k_proj.ia3_l.default": (64, 1)},
    "nemo": {f"{PROJECTION}.to_wrap.weight": None, f"{PROJECTION}.adapter.linear_in.weight": (8, 64)},
}


def rename_weights(src: Path, rename: Callable[[str], str], more: dict[str, torch.Tensor]) -> None:
    path = src / TAG / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    content["module"] = {rename(name): tensor for name, tensor in content["module"].items()} | more
    torch.save(content, path)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_in_a_save(copy: Any, saves: Any, tmp_path: Path, kind: str):
    """Its update is part of the model: said so, with the way out; without a config the tensors are written as such."""
    src = copy("fp32-0")
    (own, _), (name, shape) = ADAPTERS[kind].items()
    change = lambda each: PEFT + (own if each == f"{PROJECTION}.weight" else each)  # noqa: E731
    rename_weights(src, change, {PEFT + name: torch.ones(shape)})
    model = config_of(saves[0], "fp32-0")
    with refused("of an adapter (LoRA or its like)", " first; merge it (peft: ", "merge_and_unload()"):
        make_conversion(settings(src, tmp_path / "out", model))
    conversion = make_conversion(settings(src, tmp_path / "out", None))
    assert any(note.endswith("keep their names") for note in conversion.notes)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"{PEFT}{name}",
        lambda name: f"_orig_mod.module.{PEFT}{name}",
        lambda name: f"_forward_module.{name}",
        lambda name: "_fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda name: f"module.{name}".replace("layers.0.", "layers.0._orig_mod."),
    ],
)
def test_names_of_wrappers(copy: Any, saves: Any, tmp_path: Path, rename: Callable[[str], str]):
    src = copy("fp32-0")
    rename_weights(src, rename, {})
    assert_same(convert(src, tmp_path / "p" / "out", config_of(saves[0], "fp32-0")), saves[1]["fp32-0"])


def test_the_folder_of_an_adapter(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with refused("an adapter of peft, without the model it belongs to; give src=<base model> adapter="):
        make_conversion(settings(tmp_path, tmp_path / "out", None, source="auto"))


@pytest.mark.parametrize("case", ["fp32-0", "fp32-1", "fp32-3"])
def test_another_model_than_the_config(saves: Any, tmp_path: Path, case: str):
    """Seen before anything is gathered."""
    folder, out = saves[0], tmp_path / "out"
    for changes, words in (
        ({"num_hidden_layers": 3}, ("9 tensors missing", "model.layers.2.input_layernorm.weight")),
        ({"num_hidden_layers": 1}, ("9 tensors not known", "model.layers.1.input_layernorm.weight")),
        ({"intermediate_size": 96}, (".mlp.", "[128, 64]", "[96, 64]")),
        ({"tie_word_embeddings": True}, ("'lm_head.weight' is not tied",)),
    ):
        model = tmp_path / f"model-{next(iter(changes))}-{next(iter(changes.values()))}"
        tiny_config("llama", **({"num_hidden_layers": LAYERS} | changes)).save_pretrained(model)
        with refused(*words):
            make_conversion(settings(folder / case, out, model))


class Foreign:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.path), 0o777, True)


def plant(path: Path, mark: Path) -> None:
    content = torch.load(path, weights_only=False)
    torch.save(content | {"client": Foreign(mark)}, path)


@pytest.mark.parametrize(
    "name",
    ["mp_rank_00_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"],
)
def test_nothing_of_a_file_is_run(copy: Any, saves: Any, tmp_path: Path, name: str):
    src, mark, model = copy("bf16-2"), tmp_path / "mark", saves[0] / "config"
    plant(src / TAG / name, mark)
    with refused(name, "os.makedirs", TRUST):
        make_conversion(settings(src, tmp_path / "out", model))
    assert not mark.exists()
    assert_same(convert(src, tmp_path / "parent" / "out", model, trust=True), saves[1]["bf16-2"])
    assert mark.exists()


def test_nothing_is_run_by_the_tool_either(copy: Any, saves: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that changed since it was looked at; whatever the environment says."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    src, mark = copy("bf16-2"), tmp_path / "mark"
    conversion = make_conversion(settings(src, tmp_path / "out", saves[0] / "config"))
    plant(optimizer_file(src, 1), mark)
    with refused("DeepSpeed cannot put it together", "UnpicklingError"):
        run(conversion, 1, lambda size: None)
    assert not mark.exists()
    assert {path.name for path in tmp_path.iterdir()} == {src.name}


def test_scale_of_the_loss_in_fp16(copy: Any, saves: Any, tmp_path: Path):
    """What fp16 puts into the files; it does not train on a CPU."""
    src = copy("fp32-2")
    for rank in range(RANKS):
        content = torch.load(optimizer_file(src, rank), weights_only=False)
        content["optimizer_state_dict"]["loss_scaler"] = DynamicLossScaler(2**16, 1000, 1.0, 2, False)
        torch.save(content, optimizer_file(src, rank))
    assert_same(convert(src, tmp_path / "parent" / "out", saves[0] / "config"), saves[1]["fp32-2"])


def test_no_room(saves: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    conversion = make_conversion(settings(saves[0] / "bf16-2", tmp_path / "out", saves[0] / "config"))
    usage = shutil.disk_usage(tmp_path)._replace(free=execute.SLACK + conversion.nbytes + 1000)
    with monkeypatch.context() as patch, refused("GB of disk", "put the parts of ZeRO together", f"out={tmp_path}/out"):
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        run(conversion, 1, lambda size: None)
    assert not list(tmp_path.iterdir())

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, refused("No space left", f"out={tmp_path}/out"):
        patch.setattr(os, "posix_fallocate", full)
        run(conversion, 1, lambda size: None)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_goes_on(copy: Any, saves: Any, tmp_path: Path):
    """Gathered anew, and only for what is missing; not with another source."""
    src, folder = copy("bf16-2"), tmp_path / "parent"

    def conversion() -> execute.Conversion:
        return make_conversion(settings(src, folder / "out", saves[0] / "config", shard_gb=1e-4))

    def stop(folder: Path) -> None:
        raise KeyboardInterrupt

    first = conversion()
    first.finish = stop
    with pytest.raises(KeyboardInterrupt):
        run(first, 2, lambda size: None)
    assert {path.name for path in folder.iterdir()} == {".out.partial"}
    ages = {path.name: path.stat().st_mtime_ns for path in (folder / ".out.partial").glob("*.safetensors")}
    run(conversion(), 2, lambda size: None)
    assert ages == {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.safetensors")}
    assert_same(folder / "out", saves[1]["bf16-2"])

    shutil.rmtree(folder)
    first = conversion()
    first.finish = stop
    with pytest.raises(KeyboardInterrupt):
        run(first, 2, lambda size: None)
    optimizer_file(src, 1).touch()
    with refused(".out.partial", "its source changed"):
        run(conversion(), 2, lambda size: None)
