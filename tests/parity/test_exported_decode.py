"""An exported folder decodes with exits where this package is not installed."""

import json
import os
import subprocess
import sys

import torch
from helpers.decoding import make_pair, prompts

ALONE = """
import json, sys
sys.modules["ee_scale"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
folder, ids, mask = sys.argv[1], *(torch.tensor(json.loads(text)) for text in sys.argv[2:4])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
packing = sys.modules[type(model).generate.__module__.replace("modeling_early_exit", "packing")]
packing.SMALLEST = 1  # the model's own matrices are small
ran = {"off": model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)}
for policy, options in json.loads(sys.argv[4]).items():
    ran[policy] = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
try:
    model.generate(ids, attention_mask=mask, exit_policy="speed")
except ValueError as error:
    ran["error"] = torch.tensor([len(str(error).splitlines())])
packed = [layer for layer in model.modules() if isinstance(layer, packing.PackedLinear)]
assert bool(packed) == packing.packs(torch.float32)
assert not [name for name in sys.modules if name.startswith("ee_scale.")]
print(json.dumps({name: tokens.tolist() for name, tokens in ran.items()}))
"""


def test_without_the_package(tmp_path):
    pair, inputs = make_pair(tmp_path / "base", "llama", "mlp", "low_rank", calm=0.3), prompts(3)
    pair.model.save_pretrained(tmp_path / "exported")
    policies = {
        "lossless": {"exit_policy": "lossless", "exit_log": str(tmp_path / "log.jsonl")},
        "fixed": {"exit_policy": "fixed", "exit_layer": 1},
        "threshold": {"exit_policy": "threshold", "exit_threshold": [0.02, 0.03]},
    }
    texts = [json.dumps(inputs[name].tolist()) for name in ("input_ids", "attention_mask")]
    answer = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "exported", *texts, json.dumps(policies)],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
    said = {name: torch.tensor(tokens) for name, tokens in json.loads(answer.stdout.splitlines()[-1]).items()}
    want = pair.reference(inputs, max_new_tokens=8)
    assert torch.equal(said["off"], want)
    assert torch.equal(said["lossless"], want)
    assert said["error"].tolist() == [1]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1 + 3 * 8
    for policy in ("fixed", "threshold"):
        options = {name: value for name, value in policies[policy].items() if name != "exit_policy"}
        assert torch.equal(said[policy], pair.generate(inputs, policy, max_new_tokens=8, **options).sequences)
