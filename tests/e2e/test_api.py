"""The commands as functions: the same files and numbers as those of the command line, as objects."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file

import ee_scale
from ee_scale.cli.main import main
from ee_scale.config.compose import compose_config
from ee_scale.config.convert import ConvertConfig
from ee_scale.config.groups import DataConfig, ModelConfig
from ee_scale.config.schema import CalibrateConfig, DecodeParallelConfig, EvaluateConfig, ExportConfig, GenerateConfig
from ee_scale.config.supernet import PaletteConfig
from ee_scale.config.tune import ExitsConfig, TuneConfig
from ee_scale.errors import UserError
from ee_scale.palettes.manifest import read_manifest

LAUNCHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"}  # of a launcher, to us and to other libraries


@pytest.fixture(scope="module")
def model(finished_run, tmp_path_factory) -> Path:
    """The run of the command line, exported by the function."""
    out = tmp_path_factory.mktemp("api") / "model"
    assert ee_scale.export(ExportConfig(src=str(finished_run), out=str(out))).folder == out
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint, or of an exported folder."""
    return {f"{path.name}/{k}": v for path in folder.rglob("*.safetensors") for k, v in load_file(path).items()}


def same(one: Path, other: Path) -> bool:
    found, expected = weights(one), weights(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_tune_in_this_process_and_in_ranks(tune_arguments, finished_run, tmp_path, capfd):
    config = compose_config("tune", tune_arguments[1:])
    config.out = tmp_path / "here"
    run = ee_scale.tune(config)
    assert not LAUNCHERS & os.environ.keys()
    last = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (run.folder, run.step, run.losses) == (tmp_path / "here", 8, last["loss"])
    assert same(run.folder / "checkpoints", finished_run / "checkpoints")
    config.out, config.parallel.pp = tmp_path / "ranks", 2
    run = ee_scale.tune(config)
    assert same(run.folder / "checkpoints", finished_run / "checkpoints")
    assert capfd.readouterr().out == ""


def test_tune_outside_the_main_thread(tune_arguments, finished_run, tmp_path):
    """Python tells no other thread of signals: one rank trains without, several are refused before they start."""
    config = compose_config("tune", tune_arguments[1:])
    config.out = tmp_path / "here"
    with ThreadPoolExecutor() as pool:
        run = pool.submit(ee_scale.tune, config).result()
        assert same(run.folder / "checkpoints", finished_run / "checkpoints")
        config.out, config.parallel.pp = tmp_path / "ranks", 2
        with pytest.raises(UserError, match=r"^2 ranks: .* main thread"):
            pool.submit(ee_scale.tune, config).result()


def test_supernet_and_palette(supernet_arguments, supernet_run, tmp_path):
    config = compose_config("supernet", supernet_arguments[1:])
    config.out = str(tmp_path / "run")
    run = ee_scale.supernet(config)
    assert (run.folder, run.step) == (tmp_path / "run", 10)
    assert same(run.folder / "checkpoints", supernet_run / "checkpoints")
    sizes = {"count": 1, "trials": 2, "seconds": 0.02, "tokens": 8, "new_tokens": 2, "device": "cpu"}
    manifest = ee_scale.palette(PaletteConfig(src=str(run.folder), out=str(tmp_path / "palette"), **sizes))
    assert not LAUNCHERS & os.environ.keys()
    assert not parallel_state.is_initialized()  # another call may want another grid
    assert manifest == read_manifest(tmp_path / "palette")
    assert (tmp_path / "palette" / manifest.members[0].folder / "config.json").is_file()


def test_export(model, finished_run, tmp_path):
    assert main(["export", f"src={finished_run}", f"out={tmp_path / 'model'}"]) == 0
    assert same(model, tmp_path / "model")


def test_convert(model_dir, tmp_path):
    config = ConvertConfig(src=str(model_dir), out=str(tmp_path / "core"), to="megatron_core", verify=True)
    done, told = ee_scale.convert(config), []
    assert (done.folder, done.agreement.same_tokens) == (tmp_path / "core", 1.0)
    back = ConvertConfig(src=str(done.folder), out=str(tmp_path / "hf"), to="hf")
    assert ee_scale.convert(back, told.append).lines == told != []
    assert same(tmp_path / "hf", model_dir)
    back.out, back.plan = str(tmp_path / "nothing"), True
    assert ee_scale.convert(back).folder is None
    assert not (tmp_path / "nothing").exists()


def test_evaluate(model, corpus, tmp_path):
    settings = {"model": str(model), "data": str(corpus), "seq_length": 32, "max_tokens": 512, "device": "cpu"}
    settings["cache_dir"] = str(tmp_path)
    found = ee_scale.evaluate(EvaluateConfig(**settings))
    assert main(["evaluate", *(f"{key}={value}" for key, value in settings.items()), f"out={tmp_path / 'out'}"]) == 0
    stored = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    assert [row.to_json() for row in found.exits] == stored["exits"]
    assert found.tokens == stored["tokens"]


def test_calibrate(model, corpus, tmp_path):
    settings = {"model": str(model), "data": str(corpus), "seq_length": 16, "agreement": 0.5, "device": "cpu"}
    settings |= {"cache_dir": str(tmp_path), "max_tokens": 4096, "out": str(tmp_path / "out")}
    found = ee_scale.calibrate(CalibrateConfig(**settings))
    assert found.layers == (1, 3)
    assert json.loads((tmp_path / "out" / "calibrate.json").read_text()) == json.loads(json.dumps(found.stored))
    assert "exit_calibration" in (model / "generation_config.json").read_text()


def test_generate_here_and_on_a_grid(model, tmp_path, capfd):
    prompts = ["one token reads", "an exit says"]
    config = GenerateConfig(model=str(model), prompt=prompts, policy="fixed", layer=3, max_new_tokens=6, device="cpu")
    found = ee_scale.generate(config)
    assert capfd.readouterr().out == ""
    assert [answer.prompt for answer in found] == prompts
    command = ["generate", f"model={model}", f"prompt={prompts}", "policy=fixed", "layer=3", "max_new_tokens=6"]
    assert main([*command, "device=cpu"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(a.text, a.tokens, a.layers) for a in found] == [(r["text"], r["tokens"], r["exit_layers"]) for r in lines]
    config.parallel = DecodeParallelConfig(pp=2)
    assert ee_scale.generate(config) == found
    assert capfd.readouterr().out == ""


def test_configs_keep_the_rules_of_the_command_line():
    made = {"model": ModelConfig("nowhere"), "data": DataConfig("x.txt")}
    for config, message in (
        (TuneConfig(), "missing value: data, model"),
        (TuneConfig(**made, exits=ExitsConfig(rank=0)), "exits.rank=0: must be at least 1"),
        (TuneConfig(**made, exits=ExitsConfig(rank="many")), "exits.rank: Value 'many'"),
        (TuneConfig(**made, exits=ExitsConfig(kind="none")), "exits.kind=none: choose one of"),
        (TuneConfig(**made), "model.path=nowhere: no such folder"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            ee_scale.tune(config)


def test_a_stored_config_stands_alone(tmp_path, capsys):
    assert main(["tune", "model=a", "data=b", "--cfg"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(text)
    assert main(["tune", "--config", str(tmp_path / "config.yaml"), "--cfg"]) == 0
    assert capsys.readouterr().out == text
    assert main(["tune", "--config", str(tmp_path / "config.yaml"), "out=c"]) == 2
    assert main(["tune", "--config", str(tmp_path / "nothing.yaml")]) == 2
    assert capsys.readouterr().err.count("error: --config") == 2


def test_importing_is_quick():
    """Neither the package nor its functions' settings load torch."""
    code = "import sys, ee_scale, ee_scale.config.tune; ee_scale.tune; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(autouse=True)
def _few_threads():
    torch.set_num_threads(1)
