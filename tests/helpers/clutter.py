"""Files that lie in real model folders: those that go with the weights, and those that speak of one folder only."""

import json
from pathlib import Path

from ee_scale.modeling.calibration import CALIBRATION_KEY

TEMPLATE = "additional_chat_templates/tool_use.jinja"
BELONG = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.json"),
    *("merges.txt", "vocab", "vocab.bpe", "bpe.codes", "qwen.tiktoken", "source.spm", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", TEMPLATE, "preprocessor_config.json"),
    *("processor_config.json", "generation_config.json", "LICENSE", "license.txt", "NOTICE.md", "USE_POLICY.md"),
)
STALE = (
    *("conversion.json", "exits.json", "manifest.json", "run.json", "trainer_state.json", "training_args.bin"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "all_results.json", "eval_results.json", "params.json"),
    *("pytorch_model.bin.index.json", "README.md", "modelcard.json"),
    *("model.safetensors.index.fp8.json", "consolidated.safetensors.index.json", "modeling_strange.py", "notes.txt"),
    *("original/params.json", "onnx/config.json", "model.gguf", "flax_model.msgpack", "openvino_model.xml"),
)
GENERATION = {"temperature": 0.3, "eos_token_id": [1, 5], "do_sample": True}


def clutter(folder: Path) -> Path:
    """Put all of them into a model's folder, with a calibration, and a config that names code and a place."""
    for name in (*BELONG, *STALE):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f'{{"name": "{name}"}}')
    about_exits = {CALIBRATION_KEY: {"exits": [1]}, "exit_policy": "threshold", "exit_threshold": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(GENERATION | about_exits))
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling_strange.Strange"}, "_name_or_path": "org/base"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check_copy(folder: Path, base: Path, own: set[str]) -> None:
    """`own`: what the copy has of itself beside config.json; the rest is what belongs, as it was."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {"config.json", *BELONG} | own
    for name in set(BELONG) - {"generation_config.json"}:
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name
    assert json.loads((folder / "generation_config.json").read_text()) == GENERATION
    config = json.loads((folder / "config.json").read_text())
    assert "_name_or_path" not in config
    assert "Strange" not in json.dumps(config)
