"""The cache has the installed transformers' name, both names work, and exported folders work with every version."""

import inspect
import json
import os
import subprocess
import sys
import warnings
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.decoding import Pair, make_pair, prompts
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from ee_scale.modeling.kinds import KINDS
from ee_scale.modeling.versions import CACHE, CACHE_NAMES, NEWEST, OLDEST, cache_name, check_transformers

pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning")
NEW = 8
POLICIES = [{"exit_policy": "lossless"}, {"exit_policy": "threshold", "exit_threshold": 0.03}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("cache"), "llama", "mlp", calm=0.3, eos_token_id=None)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_generation_takes_a_cache(tmp_path, kind, name):
    pair, inputs = make_pair(tmp_path, "llama", kind, "full", eos_token_id=None), prompts(3)
    cache = DynamicCache(config=pair.model.config)
    got = pair.model.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **{name: cache}
    )
    assert torch.equal(got.sequences, pair.reference(inputs, max_new_tokens=NEW))
    assert got[CACHE] is cache
    assert cache.get_seq_length() == 9 + NEW - 1
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], 1)
    again = pair.model.generate(got.sequences, attention_mask=mask, max_new_tokens=4, do_sample=False, **{name: cache})
    assert torch.equal(again, pair.reference(inputs, max_new_tokens=NEW + 4))


@torch.no_grad()
@pytest.mark.parametrize("name", [*CACHE_NAMES, "fourth argument"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_with_a_filled_cache(tmp_path, kind, name):
    model, ids = make_pair(tmp_path, "llama", kind, "full").model, prompts(1, seed=3)["input_ids"]
    whole, cache = model(ids), DynamicCache(config=model.config)
    first = model(ids[:, :5], None, None, cache) if name == "fourth argument" else model(ids[:, :5], **{name: cache})
    assert first[CACHE] is cache
    torch.testing.assert_close(first.exit_logits[3], whole.exit_logits[3][:, :5])
    given = (None, None, cache), {}
    if name in CACHE_NAMES:
        given = (), {name: cache}
    if kind == "layer":
        with pytest.raises(ValueError, match="need the whole sequence: pass no filled cache"):
            model(ids[:, 5:], *given[0], **given[1])
        return
    rest = model(ids[:, 5:], *given[0], **given[1])
    torch.testing.assert_close(rest.logits, whole.logits[:, 5:])
    for k, logits in rest.exit_logits.items():
        torch.testing.assert_close(logits, whole.exit_logits[k][:, 5:])


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 2, torch.tensor([1, 4]), torch.tensor([[1, 4]])])
def test_exits_keep_the_positions_of_the_final_layer(pair, kept):
    ids = prompts(1)["input_ids"]
    want = pair.base(ids, logits_to_keep=kept).logits
    if want.dim() != 3:
        pytest.skip("this transformers takes no table of positions")
    got, whole = pair.model(ids, logits_to_keep=kept), pair.model(ids)
    torch.testing.assert_close(got.logits, want)
    for k, logits in got.exit_logits.items():
        index = slice(-kept, None) if isinstance(kept, int) else kept.flatten()
        torch.testing.assert_close(logits, whole.exit_logits[k][:, index])


@pytest.mark.parametrize("options", POLICIES)
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_other_caches_are_refused(pair, options, name):
    offloaded = DynamicCache()
    offloaded.offloading = True  # its constructor opens a CUDA stream with torch 2.11
    for cache in (StaticCache(config=pair.model.config, max_cache_len=32), offloaded):
        with pytest.raises(ValueError, match=rf"exit_policy.*{type(cache).__name__}"):
            pair.model.generate(**prompts(2), max_new_tokens=4, **{name: cache}, **options)


@pytest.mark.parametrize("options", POLICIES)
@pytest.mark.parametrize("kind", ["static", "offloaded_static", "offloaded", "quantized", "paged", "hybrid"])
def test_other_kinds_of_cache_are_refused(pair, options, kind):
    for given in ({"cache_implementation": kind}, {"generation_config": _config(pair, cache_implementation=kind)}):
        with pytest.raises(ValueError, match=f"exit_policy: cache_implementation='{kind}'"):
            pair.model.generate(**prompts(2), max_new_tokens=4, **given, **options)


def test_the_folder_may_prefer_another_cache(pair, monkeypatch):
    want = pair.reference(prompts(2), max_new_tokens=NEW)
    monkeypatch.setattr(pair.model.generation_config, "cache_implementation", "static")
    got = pair.generate(prompts(2), "lossless", max_new_tokens=NEW)
    assert torch.equal(got.sequences, want)
    assert type(got[CACHE]) is DynamicCache


def test_two_caches_are_refused(pair):
    both = {name: DynamicCache(config=pair.model.config) for name in CACHE_NAMES}
    for options in ({}, *POLICIES):
        with pytest.raises(ValueError, match="two names of one argument"):
            pair.model.generate(**prompts(2), max_new_tokens=2, **both, **options)


def test_modes_without_exits(pair):
    """Beams, assistants, prompt lookup, chunks and caches of other kinds are transformers' own business."""
    inputs, one = prompts(3), prompts(1)
    for options in (
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
    ):
        options = {"max_new_tokens": NEW, "do_sample": False, **options}
        assert torch.equal(pair.model.generate(**inputs, **options), pair.reference(inputs, **options)), options
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": pair.model}):
        options = {"max_new_tokens": NEW, "do_sample": False, **options}
        want = pair.reference(one, max_new_tokens=NEW)
        assert torch.equal(pair.base.generate(**one, **options), want)
        if "assistant_model" in options:
            options["assistant_model"] = pair.base
        assert torch.equal(pair.model.generate(**one, **options), want)


# -- exported folders --------------------------------------------------------------------------------------------------

# transformers of a later version: the old name raises wherever this one only warns.
LATER = """
import sys
from functools import wraps
import transformers.utils.deprecation as deprecation
import transformers.utils.generic as generic

def deprecate_kwarg(old_name, version, new_name=None, **options):
    def wrapper(function):
        @wraps(function)
        def wrapped(*args, **kwargs):
            if old_name == "past_key_values" and old_name in kwargs and not version.startswith("6."):
                raise TypeError(f"{function.__qualname__} got an unexpected keyword argument {old_name}")
            if old_name in kwargs:
                kwargs[new_name] = kwargs.pop(old_name)
            return function(*args, **kwargs)
        return wrapped
    return wrapper

deprecation.deprecate_kwarg = deprecate_kwarg
if hasattr(generic.ModelOutput, "past_key_values"):
    del generic.ModelOutput.past_key_values
    generic.ModelOutput._replace_old_cache_name = lambda self, name: name
"""
ALONE = """
import json, sys, warnings
sys.modules["ee_scale"] = None  # any import of it fails
warnings.simplefilter("error", FutureWarning)
import torch
from transformers import AutoModelForCausalLM, DynamicCache
folder, ids, mask = sys.argv[1], *(torch.tensor(json.loads(text)) for text in sys.argv[2:4])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
names, texts = ("cache", "past_key_values"), []
never = {"exit_policy": "threshold", "exit_threshold": 2.0}  # no exit is sure enough
for options in ({}, {"exit_policy": "lossless"}, never, {"num_beams": 2}):
    for name in (None, *names):
        own = {} if name is None or "num_beams" in options else {name: DynamicCache(config=model.config)}
        found = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False,
                               return_dict_in_generate=True, **own, **options)
        cache = found["cache" if "cache" in found else "past_key_values"]
        assert cache.get_seq_length() == ids.shape[1] + 7, options
        assert not own or cache is own[name]
        texts.append((str(options), found.sequences.tolist()))
    model(ids, **own)
print(json.dumps(texts))
"""
OPEN = ALONE.partition("names, texts")[0]


def _open_alone(folder: Path, tmp_path: Path, script: str, inputs: dict) -> subprocess.CompletedProcess:
    texts = [json.dumps(inputs[name].tolist()) for name in ("input_ids", "attention_mask")]
    return subprocess.run(
        [sys.executable, "-c", script, folder, *texts],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("later", [False, True], ids=["installed", "without the old name"])
def test_a_folder_on_its_own(pair, tmp_path, later):
    inputs = prompts(3)
    pair.model.save_pretrained(tmp_path / "exported")
    answer = _open_alone(tmp_path / "exported", tmp_path, LATER * later + ALONE, inputs)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "deprecated" not in answer.stderr
    want = pair.reference(inputs, max_new_tokens=NEW).tolist()
    beams = pair.reference(inputs, max_new_tokens=NEW, num_beams=2).tolist()
    for options, text in json.loads(answer.stdout.splitlines()[-1]):
        assert text == (beams if "num_beams" in options else want), options


@pytest.mark.parametrize(("oldest", "newest", "code"), [("98.7", "99.1", 1), ("1.2", "3.4", 0)])
def test_a_folder_says_which_versions_it_knows(pair, tmp_path, oldest, newest, code):
    """As if the folder had been made for versions that are all later, or all earlier, than the one installed."""
    pair.model.save_pretrained(tmp_path / "exported")
    file = tmp_path / "exported" / "versions.py"
    range_of_it = f'OLDEST, NEWEST = "{OLDEST}", "{NEWEST}"'
    assert range_of_it in file.read_text()
    file.write_text(file.read_text().replace(range_of_it, f'OLDEST, NEWEST = "{oldest}", "{newest}"'))
    answer = _open_alone(tmp_path / "exported", tmp_path, OPEN, prompts(2))
    assert answer.returncode == code, answer.stderr[-3000:]
    said = [line for line in answer.stderr.splitlines() if oldest in line and transformers.__version__ in line]
    assert len(said) == 1, answer.stderr
    if code:
        assert answer.stderr.splitlines()[-1] == said[0]
        assert said[0].startswith(f"ImportError: early exits need transformers {oldest} or newer")
    else:
        assert f"tested with transformers {oldest} to {newest}" in said[0]


def test_the_range_of_versions(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (f"{OLDEST}.0", f"{OLDEST}.3", f"{NEWEST}.0", f"{NEWEST}.9", transformers.__version__):
            check_transformers(fine)
    for old in ("4.57.3", "5.0.0rc3", "5.9"):
        with pytest.raises(ImportError, match=rf"transformers {OLDEST} or newer .*but {old} is installed"):
            check_transformers(old)
    for new in ("5.40.0", "6.0.0.dev0", "10.1"):
        with pytest.warns(UserWarning, match=rf"tested with transformers {OLDEST} to {NEWEST}, but {new}"):
            check_transformers(new)
        with monkeypatch.context() as environment, warnings.catch_warnings():  # of all ranks the first says it
            environment.setenv("RANK", "1")
            warnings.simplefilter("error")
            check_transformers(new)


def test_the_name_is_looked_up():
    for name in CACHE_NAMES:
        assert cache_name(make_dataclass("Output", ["logits", name])) == name
    assert CACHE in inspect.signature(LlamaForCausalLM.forward).parameters


def _config(pair: Pair, **changes: Any) -> Any:
    config = transformers.GenerationConfig.from_dict(pair.model.generation_config.to_dict())
    for name, value in changes.items():
        setattr(config, name, value)
    return config
