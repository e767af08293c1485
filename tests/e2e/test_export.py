"""What export writes opens in transformers: as the stock model, and as the model with exits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import ee_scale
from ee_scale.cli.main import main

SHARD = "model-exit-heads.safetensors"


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    assert main(["export", f"src={finished_run}", f"out={folder / 'model'}"]) == 0
    assert main(["export", f"src={finished_run}", f"out={folder / 'sidecar'}", "kind=sidecar"]) == 0
    return folder


@pytest.fixture(scope="module")
def ids(model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return tokenizer("one token reads what comes next", return_tensors="pt").input_ids


def test_plain_transformers_opens_the_stock_model(exported, model_dir, ids):
    plain, base = (AutoModelForCausalLM.from_pretrained(path) for path in (exported / "model", model_dir))
    assert type(plain) is type(base)
    assert torch.equal(plain(ids).logits, base(ids).logits)


def test_all_three_ways_to_open_the_exits_agree(exported, model_dir, ids, finished_run):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    models = [
        AutoModelForCausalLM.from_pretrained(exported / "model", trust_remote_code=True),
        ee_scale.EarlyExitForCausalLM.from_pretrained(exported / "model"),
        ee_scale.EarlyExitForCausalLM.from_pretrained(exported / "sidecar"),
    ]
    outputs = [model(ids) for model in models]
    trained = load_file(finished_run / "checkpoints" / "step_00000008" / "exits_003.safetensors")
    for model, output in zip(models, outputs, strict=True):
        assert torch.equal(output.logits, base(ids).logits)
        assert set(output.exit_logits) == {1, 3}
        assert torch.equal(model.state_dict()["exit_heads.3.head.up.weight"], trained["exit_heads.3.head.up.weight"])
        for k in (1, 3):
            assert torch.equal(output.exit_logits[k], outputs[0].exit_logits[k])
    assert not torch.equal(outputs[0].exit_logits[1], outputs[0].exit_logits[3])


def test_generate_is_the_base_models(exported, model_dir, ids):
    model = ee_scale.EarlyExitForCausalLM.from_pretrained(exported / "model")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), base.generate(ids, **settings))


def test_save_pretrained_round_trip(exported, ids, tmp_path):
    model = ee_scale.EarlyExitForCausalLM.from_pretrained(exported / "model")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(ids).exit_logits[3], model(ids).exit_logits[3])


def test_nothing_of_transformers_is_patched(exported):
    stock = AutoModelForCausalLM.from_pretrained(exported / "model")
    assert type(stock).__module__.startswith("transformers.models.")
    assert not hasattr(stock, "exit_heads")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_missing_or_extra_exit_heads_are_an_error(exported, tmp_path, change):
    shutil.copytree(exported / "model", tmp_path / "broken")
    config_path = tmp_path / "broken" / "config.json"
    config = json.loads(config_path.read_text())
    config["early_exit"]["layers"] = [1, 2, 3] if change == "missing" else [1]
    config_path.write_text(json.dumps(config))
    expected = f"{'missing' if change == 'missing' else 'unexpected'} exit heads: exit_heads"
    with pytest.raises(ValueError, match=expected):
        ee_scale.EarlyExitForCausalLM.from_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=expected):
        AutoModelForCausalLM.from_pretrained(tmp_path / "broken", trust_remote_code=True)


def test_a_sidecar_is_refused_on_another_base_or_when_edited(exported, model_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ee_scale.UserError, match="not the base model that these exits were trained on"):
        ee_scale.EarlyExitForCausalLM.from_pretrained(exported / "sidecar", base_model=other)
    edited = tmp_path / "edited"
    shutil.copytree(exported / "sidecar", edited)
    path = edited / "exits.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ee_scale.UserError, match="does not match its digest"):
        ee_scale.EarlyExitForCausalLM.from_pretrained(edited)


def test_a_base_model_that_changed_is_not_exported(finished_run, model_dir, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    identity = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(identity | {"base_fingerprint": "0"}))
    assert main(["export", f"src={run}", f"out={tmp_path / 'x'}"]) == 2
    assert "run.json: its content does not match its digest" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("k", [1, 3])
def test_an_exit_as_a_stock_model(exported, finished_run, ids, tmp_path, k):
    assert main(["export", f"src={finished_run}", "kind=submodel", f"exit={k}", f"out={tmp_path / 'small'}"]) == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert stock.config.num_hidden_layers == k
    assert type(stock).__module__.startswith("transformers.models.")
    expected = ee_scale.EarlyExitForCausalLM.from_pretrained(exported / "model")(ids).exit_logits[k]
    torch.testing.assert_close(stock(ids).logits, expected, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("one token").input_ids


def test_a_stock_model_as_an_onnx_file(finished_run, tmp_path, capsys):
    pytest.importorskip("onnxscript", reason="not installed: pip install 'ee-scale[edge]'")
    assert main(["export", f"src={finished_run}", "kind=submodel", "exit=1", f"out={tmp_path / 'small'}"]) == 0
    assert main(["export", f"src={tmp_path / 'small'}", "format=onnx", "int8=true", f"out={tmp_path / 'onnx'}"]) == 0
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= names
    said = capsys.readouterr().out
    assert said.startswith("int8 ")
    assert said.count("\n") <= 2
    assert "onnxruntime" in said


def write_config(folder, **values):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["src={run}", "kind=submodel"], "error: exit: missing; choose one of "),
        (["src={run}", "kind=submodel", "exit=2"], "exit=2: {run} has exits at layers 1, 3"),
        (["src={run}", "exit=3"], "exit=3: goes with kind=submodel"),
        (["src={run}", "int8=true"], "int8=true: goes with format=onnx"),
        (["src={run}", "format=onnx"], "src={run}: a tune run; make a stock model of it first"),
        (["src={model}", "kind=submodel", "exit=1"], "src={model}: no run.json in it"),
        (["src={model}", "format=onnx", "exit=1"], "exit=1: goes with format=hf"),
        (["src={model}", "format=onnx", "kind=submodel"], "kind=submodel: goes with format=hf"),
        (["src={model}", "format=onnx", "step=8"], "step=8: goes with format=hf"),
        (["src={run}", "format=gguf"], "make a stock model of it first (kind=submodel exit=<layer> out=<folder>)"),
        (["src={exits}", "format=gguf"], "src={exits}: a model with exits, which GGUF would leave out"),
        (["src={model}", "type=q8_0"], "type=q8_0: goes with format=gguf"),
        (["src={model}", "format=gguf", "type=q4_k"], "type=q4_k: choose one of f32, f16, bf16, q8_0"),
        (["src={model}", "format=tflite"], "format=tflite: choose one of hf, onnx"),
        (["src={exits}", "format=onnx"], "src={exits}: a model with exits, which ONNX would leave out"),
        (["src={other}", "format=onnx"], "config.architectures=['BertModel']; format=onnx knows ...ForCausalLM and"),
        (["src={out}", "format=onnx"], "no readable config.json in it"),
    ],
)
def test_bad_input_is_one_line(exported, finished_run, model_dir, tmp_path, capsys, arguments, text):
    folders = {"run": finished_run, "model": model_dir, "exits": exported / "model", "out": tmp_path / "out"}
    folders["other"] = write_config(tmp_path / "other", architectures=["BertModel"])
    capsys.readouterr()
    given = [argument.format(**folders) for argument in arguments]
    assert main(["export", f"out={tmp_path / 'out'}", *given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert text.format(**folders) in said
    assert not (tmp_path / "out").exists()
