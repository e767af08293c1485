"""An exit that is exported as a stock model says exactly what it says as an exit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.clutter import check_copy, clutter
from helpers.convert import convert
from helpers.models import FAMILIES, VOCAB, spec_of, write_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ee_scale.artifact import submodel
from ee_scale.artifact.checkpoint import STATE
from ee_scale.artifact.export import EXITS_SHARD, export_early_exit
from ee_scale.artifact.run_folder import CHECKPOINTS, IDENTITY
from ee_scale.artifact.submodel import export_submodel
from ee_scale.backbone.fingerprint import fingerprint
from ee_scale.backbone.loading import TensorFolder
from ee_scale.errors import UserError
from ee_scale.files import file_digest
from ee_scale.inference.model import EarlyExitForCausalLM, untrained_exits
from ee_scale.modeling.modeling_early_exit import AUTO_MAP, PREFIX, code_files
from ee_scale.reading import write_json

EXITS = (2, 5)  # the second one behind the last layer
IDS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))  # longer than a sliding window
SLIDING, FULL = "sliding_attention", "full_attention"
CASES = [("norm", "tied"), ("norm", "full"), ("mlp", "tied"), ("mlp", "low_rank"), ("layer", "low_rank")]


def write_run(folder: Path, base: Path, model: Any, steps: tuple[int, ...] = (1,)) -> Path:
    """What `ee-scale tune` leaves, with the exits of `model`; a later step has larger norms."""
    identity = {
        "run_id": "0",
        "base_model": str(base.resolve()),
        "base_fingerprint": fingerprint(base),
        "settings": {},
        "early_exit": model.exit_spec.to_dict(),
    }
    folder.mkdir(parents=True)
    write_json(folder / IDENTITY, identity)
    for step in steps:
        checkpoint = folder / CHECKPOINTS / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        for k, head in model.exit_heads.items():
            values = {f"{PREFIX}{k}.{name}": value.detach().float() * step for name, value in head.named_parameters()}
            save_file(values, checkpoint / f"exits_{int(k):03d}.safetensors")
        digests = {path.name: file_digest(path) for path in sorted(checkpoint.iterdir())}
        write_json(checkpoint / STATE, {"step": step, "files": digests})
    return folder


def with_exits(base: Path, kind: str, head: str, exits: tuple[int, ...] = EXITS) -> Any:
    """The base model with exits that are no copies of it."""
    model = untrained_exits(base, spec_of(AutoConfig.from_pretrained(base), exits, kind, head))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        # The last layer's type is not the first one's, nor what the next one's would be.
        types = [SLIDING, FULL, SLIDING, FULL, FULL] if family == "gemma2" else None
        write_model(folder / family, family, **({"layer_types": types} if types else {}))
    write_model(folder / "tied", "llama", tie_word_embeddings=True)
    return folder


@pytest.fixture
def run(bases, tmp_path) -> Path:
    return write_run(tmp_path / "run", bases / "llama", with_exits(bases / "llama", "mlp", "low_rank"), (1, 2))


@pytest.mark.parametrize(("kind", "head"), CASES)
@pytest.mark.parametrize("family", [*FAMILIES, "tied"])
def test_logits_are_the_exits(bases, tmp_path, family, kind, head):
    model = with_exits(bases / family, kind, head)
    run = write_run(tmp_path / "run", bases / family, model)
    with torch.no_grad():
        expected = model(IDS).exit_logits
        for k in EXITS:
            export_submodel(run, tmp_path / f"exit{k}", k)
            stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / f"exit{k}", output_loading_info=True)
            assert not any(info.values()), info
            assert type(stock).__module__.startswith("transformers.models.")
            assert stock.config.num_hidden_layers == len(stock.model.layers) == k + (kind == "layer")
            assert expected[k].std() > 0.1
            torch.testing.assert_close(stock(IDS).logits, expected[k], atol=1e-5, rtol=0)


def test_it_generates_with_its_cache(bases, tmp_path):
    model = with_exits(bases / "gemma2", "layer", "full")
    export_submodel(write_run(tmp_path / "run", bases / "gemma2", model), tmp_path / "out", 2)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    text = stock.generate(IDS[:1, :12], max_new_tokens=8, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(model(text[:, :-1]).exit_logits[2].argmax(-1)[:, 11:], text[:, 12:])


@pytest.mark.parametrize(("head", "tied"), [("tied", True), ("low_rank", False), ("full", False)])
def test_embeddings_stay_tied_only_if_the_head_is(bases, tmp_path, head, tied):
    model = with_exits(bases / "tied", "norm", head)
    export_submodel(write_run(tmp_path / "run", bases / "tied", model), tmp_path / "out", 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not tied


def test_number_type_and_other_layers_are_the_base_models(bases, tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(bases / "qwen3", dtype=torch.bfloat16).save_pretrained(base)
    export_submodel(write_run(tmp_path / "run", base, with_exits(base, "mlp", "low_rank")), tmp_path / "out", 2)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    replaced = {name for name, value in after.items() if not torch.equal(value, before[name])}
    mlp = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert replaced == {"model.norm.weight", "lm_head.weight", *mlp}


def test_large_models_are_written_in_several_files(bases, run, tmp_path, monkeypatch):
    export_submodel(run, tmp_path / "one", 5)
    monkeypatch.setattr(submodel, "SHARD_BYTES", 100_000)
    export_submodel(run, tmp_path / "many", 5)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert all(path.stat().st_size < 110_000 for path in files)
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert all(torch.equal(many.state_dict()[name], value) for name, value in one.state_dict().items())


def test_step_and_small_files(bases, run, tmp_path):
    for name in ("tokenizer.json", "LICENSE", "notes.bin"):
        (bases / "llama" / name).write_text("{}")
    export_submodel(run, tmp_path / "first", 2, step=1)
    export_submodel(run, tmp_path / "last", 2)
    norms = [load_file(tmp_path / name / "model.safetensors")["model.norm.weight"] for name in ("first", "last")]
    assert torch.equal(2 * norms[0], norms[1])
    names = {path.name for path in (tmp_path / "last").iterdir()}
    assert {"tokenizer.json", "LICENSE", "config.json", "generation_config.json", "README.md"} <= names
    assert "notes.bin" not in names
    assert "early exit of `llama` after layer 2" in (tmp_path / "last" / "README.md").read_text()


def test_what_cannot_be_exported(bases, run, tmp_path):
    with pytest.raises(UserError, match=r"exit=3: .* has exits at layers 2, 5"):
        export_submodel(run, tmp_path / "out", 3)
    with pytest.raises(UserError, match=r"step=7: .* has checkpoints of steps 1, 2"):
        export_submodel(run, tmp_path / "out", 2, step=7)
    raw = write_run(tmp_path / "raw", bases / "llama", with_exits(bases / "llama", "embedding", "full"))
    with pytest.raises(UserError, match="'embedding', whose head reads the hidden state without a norm"):
        export_submodel(raw, tmp_path / "out", 2)
    few = write_run(tmp_path / "few", bases / "llama", with_exits(bases / "llama", "norm", "shortlist"))
    with pytest.raises(UserError, match="heads of kind 'shortlist', which score 37 tokens; a stock model scores all"):
        export_submodel(few, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_changed_or_went_is_refused(bases, tmp_path):
    base = write_model(tmp_path / "base", "llama")
    run = write_run(tmp_path / "run", base, with_exits(base, "norm", "tied"))
    write_model(base, "llama", seed=1)
    with pytest.raises(UserError, match="changed since the exits were trained"):
        export_submodel(run, tmp_path / "out", 2)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not there any more"):
        export_submodel(run, tmp_path / "out", 2)


def test_what_is_copied_is_true_in_the_copy(bases, tmp_path):
    """Digests, results, code and a calibration of other exits stay behind; a tokenizer comes whole."""
    base = clutter(Path(shutil.copytree(bases / "llama", tmp_path / "base")))
    run = write_run(tmp_path / "run", base, with_exits(base, "norm", "tied"))
    export_submodel(run, tmp_path / "submodel", 2)
    check_copy(tmp_path / "submodel", base, {"model.safetensors", "README.md"})
    export_early_exit(run, tmp_path / "whole", None)
    shards = {"model-00001-of-00001.safetensors", EXITS_SHARD, "model.safetensors.index.json"}
    check_copy(tmp_path / "whole", base, {*shards, *(path.name for path in code_files()), "README.md"})
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("one_file", [True, False])
def test_exits_of_the_base_stay_behind(bases, tmp_path, one_file):
    """A model with exits that is tuned again, with other exits: its own are neither copied nor named by the index."""
    first = write_run(tmp_path / "first", bases / "llama", with_exits(bases / "llama", "norm", "full", (1, 3)))
    export_early_exit(first, tmp_path / "exported", None)
    base = convert(tmp_path / "exported", tmp_path / "one", "hf") if one_file else tmp_path / "exported"
    model = with_exits(base, "norm", "tied")
    export_early_exit(write_run(tmp_path / "second", base, model), tmp_path / "out", None)
    with torch.no_grad():
        found, expected = EarlyExitForCausalLM.from_pretrained(tmp_path / "out")(IDS), model(IDS)
    assert sorted(found.exit_logits) == list(EXITS)
    for k in EXITS:
        assert torch.equal(found.exit_logits[k], expected.exit_logits[k])
    assert torch.equal(found.logits, expected.logits)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: path.name for name, path in TensorFolder(tmp_path / "out").files.items()} == index


def test_exits_that_the_base_models_type_cannot_hold(bases, tmp_path):
    """Trained in fp32, beyond fp16: refused by name, and nothing is written."""
    AutoModelForCausalLM.from_pretrained(bases / "llama", dtype=torch.float16).save_pretrained(tmp_path / "base")
    run = write_run(tmp_path / "run", tmp_path / "base", with_exits(tmp_path / "base", "norm", "full"), (10**6,))
    exports = {
        "submodel": lambda out: export_submodel(run, out, 2),
        "whole": lambda out: export_early_exit(run, out, None),
    }
    for name, export in exports.items():
        with pytest.raises(UserError, match=r"'.*weight' holds .*, and the largest number of fp16 is 65504"):
            export(tmp_path / name)
        assert not (tmp_path / name).exists()
