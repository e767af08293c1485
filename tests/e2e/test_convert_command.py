"""`ee-scale convert` as a person meets it: there and back, plan, verify, and one clear line for what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_scale.cli.main import main
from ee_scale.conversion import convert


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that the command leaves."""
    assert main(["convert", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in captured.err
    return errors[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def megatron(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the other tests for tp=2, pp=2, written by a process of its own."""
    folder = tmp_path_factory.mktemp("megatron")
    command = ["convert", f"src={model_dir}", "to=megatron_core", "tp=2", "pp=2", "out=core", "verify=true"]
    finished = run_cli(command, folder)
    assert finished.code == 0, finished.output
    assert "verified: 6 points on 48 random tokens" in finished.output
    assert "same top token 100.0%" in finished.output
    assert "hf: llama, 4 layers, 38 stored tensors -> " in finished.output
    assert "pass them to Megatron-LM: --norm-epsilon 1e-06" in finished.output
    assert "wrote core" in finished.output
    return folder / "core"


def test_there_and_back(model_dir, megatron, tmp_path, monkeypatch):
    names = {str(path.relative_to(megatron)) for path in megatron.rglob("*") if path.is_file()}
    shards = {f"release/__{rank}_0.distcp" for rank in range(4)}
    marks = {"release/metadata.json", "release/.metadata", "release/common.pt", "latest_checkpointed_iteration.txt"}
    assert shards | marks | {"huggingface/config.json", "huggingface/tokenizer.json", "conversion.json"} <= names
    assert not [name for name in names if name.endswith("journal.json") or ".tmp" in name]
    monkeypatch.chdir(tmp_path)
    assert main(["convert", f"src={megatron}", "to=hf", "verify=true", "out=again"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", model_dir))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "again", model_dir))
    ids = AutoTokenizer.from_pretrained(tmp_path / "again")("an exit says", return_tensors="pt").input_ids
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_plan_lists_every_tensor_and_writes_nothing(model_dir, tmp_path, capsys):
    command = ["convert", f"src={model_dir}", "to=megatron_legacy", "tp=2", f"out={tmp_path / 'new' / 'out'}"]
    assert main([*command, "plan=true"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not list(tmp_path.iterdir())
    assert lines[0].startswith("hf: llama, 4 layers, 38 stored tensors -> 52 in 2 files, 0.0")
    rank = lines[lines.index(next(line for line in lines if line.startswith("release/mp_rank_01/"))) :]
    assert (
        "  decoder.layers.3.self_attention.linear_qkv.weight  [128, 128] float32  <- "
        "model.layers.3.self_attn.q_proj.weight[64:128] + model.layers.3.self_attn.k_proj.weight[32:64] + "
        "model.layers.3.self_attn.v_proj.weight[32:64]"
    ) in rank
    assert any(
        line.startswith("  decoder.layers.0.mlp.linear_fc2.weight  [128, ")
        and "model.layers.0.mlp.down_proj.weight[:, " in line
        for line in rank
    )
    assert sum(line.startswith("  ") for line in lines) == 52
    assert lines[-1].startswith("--use-checkpoint-args does not restore these")


def test_verify_names_the_first_layer_that_departs(model_dir, megatron, tmp_path, capsys, monkeypatch):
    """What was written is damaged before it is compared; nothing gets its name, and the next run mends it."""
    out = tmp_path / "again"
    original = convert.open_result

    def damaged(settings: object, folder: Path) -> object:
        path = folder / "model.safetensors"
        tensor = load_file(path)["model.layers.2.mlp.down_proj.weight"]
        data = path.read_bytes()
        at = data.index(tensor.numpy().tobytes()[:64])
        path.write_bytes(data[:at] + (tensor.flatten()[:128] + 1).numpy().tobytes() + data[at + 512 :])
        return original(settings, folder)

    monkeypatch.setattr(convert, "open_result", damaged)
    command = [f"src={megatron}", "to=hf", "verify=true", f"out={out}"]
    message = refused(command, capsys)
    assert message.startswith("verify: layer 3 departs first: largest difference ")
    assert "all before it agree within " in message
    assert not out.exists()
    monkeypatch.setattr(convert, "open_result", original)
    assert main(["convert", *command]) == 0
    assert load_file(out / "model.safetensors").keys() == load_file(model_dir / "model.safetensors").keys()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("rotary_base", 500000), ("norm_epsilon", 0.3), ("window_size", (3, 0)), ("use_rope_scaling", True)],
)
def test_verify_finds_a_wrong_argument(model_dir, tmp_path, capsys, monkeypatch, name: str, value: object):
    """The tensors are all right; Megatron would compute something else with these arguments."""
    original = convert.open_result

    def changed(*given: object) -> object:
        found = original(*given)
        setattr(found.args, name, value)
        return found

    monkeypatch.setattr(convert, "open_result", changed)
    command = [f"src={model_dir}", "to=megatron_legacy", "verify=true", f"out={tmp_path / 'out'}"]
    assert refused(command, capsys).startswith("verify: layer 1 departs first")


def test_verify_allows_the_rounding_of_a_coarser_type(model_dir, megatron, tmp_path):
    for name, src, to in (("core", model_dir, "megatron_core"), ("hf", megatron, "hf")):
        command = ["convert", f"src={src}", f"to={to}", "dtype=bf16", "verify=true", f"out={tmp_path / name}"]
        assert main(command) == 0
    assert load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"].dtype is torch.bfloat16
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("out=here", "out=here: exists already; choose another folder"),
        ("out=here plan=true", "out=here: exists already; choose another folder"),
        ("src=nowhere", "src=nowhere: no such folder"),
        ("src=nowhere from=hf", "src=nowhere: no such folder"),
        ("src=here", "src=here: neither config.json (Hugging Face) nor metadata.json (Megatron-Core) nor mp_rank_*"),
        ("from=megatron_core", "from=megatron_core: MODEL is of format hf"),
        ("from=megatron_legacy", "from=megatron_legacy: MODEL is of format hf"),
        ("from=sidecar", "from=sidecar: MODEL is of format hf"),
        ("src=CORE from=hf", "from=hf: CORE is of format megatron_core"),
        ("src=CORE from=megatron_legacy", "from=megatron_legacy: CORE is of format megatron_core"),
        ("src=CORE iteration=7", "iteration=7: CORE has none"),
        ("from=gguf", "from=gguf: choose one of auto, hf, sidecar, megatron_core, megatron_legacy, deepspeed"),
        ("to=gguf", "to=gguf: choose one of hf, megatron_core, megatron_legacy, sidecar"),
        ("dtype=int8", "dtype=int8: choose one of auto, fp32, fp16, bf16"),
        ("tp=3", "tp=3: does not divide num_attention_heads=4"),
        ("tp=8", "tp=8: does not divide num_attention_heads=4"),
        ("pp=3", "pp=3: does not divide num_hidden_layers=4"),
        ("to=megatron_legacy pp=8", "pp=8: does not divide num_hidden_layers=4"),
        ("to=megatron_legacy classes=legacy tp=4", "tp=4: classes=legacy needs tp to divide num_key_value_heads=2"),
        ("tp=0", "tp=0: must be at least 1"),
        ("pp=-1", "pp=-1: must be at least 1"),
        ("vocab_divisor=0", "vocab_divisor=0: must be at least 1"),
        ("workers=0", "workers=0: must be at least 1"),
        ("to=hf shard_gb=0", "shard_gb=0.0: must be above 0"),
        ("to=sidecar", "to=sidecar: MODEL has no exits"),
        ("tp=two", "tp: "),
        ("shards=2", "unknown key 'shards'; did you mean shard_gb?"),
        ("out=file/out", "out=file/out: cannot write there"),
    ],
)
def test_one_line_for_what_is_wrong(model_dir, megatron, tmp_path, capsys, monkeypatch, arguments: str, message: str):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("file").write_text("")
    told = lambda text: text.replace("MODEL", str(model_dir)).replace("CORE", str(megatron))  # noqa: E731
    given = [f"src={model_dir}", "to=megatron_core", "out=out", *told(arguments).split(" ")]
    assert refused(given, capsys).startswith(told(message))
    assert {path.name for path in tmp_path.iterdir()} == {"here", "file"}


def test_settings_that_are_needed(capsys):
    assert refused([], capsys) == "missing value: out, src, to (give key=value)"


def test_a_missing_tokenizer_is_said(model_dir, megatron, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(megatron, "bare")
    for path in Path("bare/huggingface").glob("tokenizer*"):
        path.unlink()
    assert main(["convert", "src=bare", "to=hf", "out=none"]) == 0
    note = "no tokenizer came with bare: give model=<Hugging Face folder of the same model> to copy it"
    assert note in capsys.readouterr().err.replace("\n", " ")
    assert main(["convert", "src=bare", f"model={model_dir}", "to=hf", "out=some"]) == 0
    assert "no tokenizer" not in capsys.readouterr().err
    assert (tmp_path / "some" / "tokenizer.json").is_file()


def test_help_and_config(model_dir, tmp_path, capsys):
    assert main(["convert", "--help"]) == 0
    text = capsys.readouterr().out
    words = {line.split(" ")[0] for line in text.splitlines()}
    settings = "src out to from tp pp ep dtype classes spec model adapter iteration shard_gb vocab_divisor workers"
    settings += " plan verify trust"
    assert set(settings.split(" ")) <= words
    assert "source" not in words
    assert "ee-scale convert src=" in text
    assert main(["convert", f"src={model_dir}", "to=hf", "from=hf", f"out={tmp_path / 'out'}", "--cfg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"to: hf", "source: hf", "tp: 1", "plan: false", "iteration: null"} <= set(lines)
    assert not (tmp_path / "out").exists()
