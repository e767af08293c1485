"""GGUF files that export writes: what lies in them, and that llama.cpp computes and reads what transformers does."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from helpers.gguf_files import CHAT, TEXT, chat_model, parameter_value, stored_value
from helpers.llama_cpp import LlamaCpp, needs_llama_cpp
from helpers.models import load_whole
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ee_scale.artifact import gguf_export
from ee_scale.artifact.gguf_export import export_gguf
from ee_scale.artifact.gguf_tokens import MARK
from ee_scale.backbone.gguf_file import GGUFFile
from ee_scale.backbone.model_path import plain_folder
from ee_scale.cli.main import main
from ee_scale.errors import UserError
from ee_scale.families.llama_cpp import LLAMA3, QWEN2

SIZE = 320  # more than the tokenizer has
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"num_hidden_layers": 2, "max_position_embeddings": 256, "vocab_size": SIZE},
}
NARROW, TIED = {"head_dim": 16}, {"tie_word_embeddings": True}
WINDOWS = {"query_pre_attn_scalar": 32, "sliding_window": 16}
NO_ROPE = {"no_rope_layers": [1, 1, 1, 0, 1], "no_rope_layer_interval": 4, "num_hidden_layers": 5}
LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "factor": 8.0}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": TIED,
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA31}},
    "llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "mistral": {"sliding_window": 256},
    "qwen2": NARROW | TIED,
    "qwen3": {"head_dim": 128},
    "gemma": TIED,
    "gemma2": TIED | WINDOWS | {"num_hidden_layers": 4},
    "gemma3_text": WINDOWS
    | {"final_logit_softcapping": None, "attn_logit_softcapping": None, "num_hidden_layers": 7}
    | {"layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]},
    "olmo2": NARROW,
    "smollm3": NARROW | NO_ROPE | {"sliding_window": None, "layer_types": ["full_attention"] * 5},
    "granite": {
        **{"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
        "logits_scaling": 0.25,
    },
}
READABLE = ("llama", "llama tied", "mistral", "qwen2", "qwen3")  # by transformers too


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: chat_model(root / name, name.split()[0], **{**SIZES, **changes}) for name, changes in CASES.items()}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("EE_SCALE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def prompt() -> torch.Tensor:
    return torch.randint(3, 290, (1, 40), generator=torch.Generator().manual_seed(1))


def stored_names(model: torch.nn.Module, reader: gguf.GGUFReader) -> list[tuple[str, str]]:
    """(parameter, tensor), of all that a file has."""
    arch = reader.get_field("general.architecture").contents()
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names, tied = gguf.get_tensor_name_map(key, 10), model.get_expanded_tied_weights_keys(all_submodels=True)
    return [(name, names.get_name(name, (".weight", ".bias"))) for name in model.state_dict() if name not in tied]


def stored_model(folder: Path, file: Path) -> torch.nn.Module:
    """transformers' model with the numbers that a file holds."""
    model, reader = load_whole(folder), gguf.GGUFReader(file)
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for name, there in stored_names(model, reader):
        model.get_parameter(name).copy_(parameter_value(name, found[there], model.config))
    return model


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_the_models(case: str, folders, tmp_path: Path):
    file = tmp_path / "m.gguf"
    report = export_gguf(folders[case], file, None)  # fp32, as the weights are
    model = load_whole(folders[case])
    reader = gguf.GGUFReader(file)
    assert report.nbytes == file.stat().st_size
    assert report.kinds == {"F32": len(reader.tensors)}
    state = model.state_dict()
    wanted = {there: stored_value(name, state[name], model.config) for name, there in stored_names(model, reader)}
    found = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name != "rope_freqs.weight"}
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("case", READABLE)
def test_our_own_reader_and_transformers_read_it(case: str, folders, tmp_path: Path):
    file = tmp_path / "m.gguf"
    export_gguf(folders[case], file, "f32")
    model, folder = load_whole(folders[case]), plain_folder(file)
    read, state = AutoModelForCausalLM.from_pretrained(folder).eval(), model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in read.state_dict().items() if "norm" not in name)
    torch.testing.assert_close(read(prompt()).logits, model(prompt()).logits, atol=1e-5, rtol=1e-5)
    ours, source = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folders[case])
    for text in (TEXT, "<|im_start|>x<think>y<|end|>", "  two\n\n\tspaces é 漢"):
        assert ours(text).input_ids == source(text).input_ids
    assert ours.chat_template == CHAT
    assert (ours.bos_token_id, ours.eos_token_id) == (source.bos_token_id, source.eos_token_id)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_types(kind: str, folders, tmp_path: Path):
    """Vectors stay fp32, short rows f16, embedding and head get 8 bits at least; numbers are those of the type."""
    source = chat_model(tmp_path / "odd", "llama", **{**SIZES, "intermediate_size": 80})
    file = tmp_path / "m.gguf"
    report = export_gguf(source, file, kind)
    read, state = GGUFFile(file), load_whole(source).state_dict()
    chosen = Kind[kind.upper()]
    for name, value in state.items():
        stored = read.tensors[read.names[name]].tensor_type
        big = kind.startswith("q") and ("embed" in name or "lm_head" in name)
        odd = kind.startswith("q") and "down_proj" in name
        assert stored == (Kind.F32 if value.ndim == 1 else Kind.Q8_0 if big else Kind.F16 if odd else chosen), name
        off = (read.read(name) - value).abs().max() / value.abs().max()
        assert off <= (0 if stored == Kind.F32 else 2**-8 if "F" in stored.name else 0.005 if big else 0.13), name
    assert sum(report.kinds.values()) == len(read.tensors)
    with pytest.raises(UserError, match="exists already; choose another name"):
        export_gguf(source, file, kind)


def assert_greedy(model: torch.nn.Module, tokens: list[int], most: float) -> None:
    """Each token is the model's own choice, or one whose logit is as high but for rounding."""
    assert len(tokens) > 4  # some end early
    with torch.no_grad():
        logits = model(torch.cat([prompt(), torch.tensor([tokens])], 1)).logits[0, prompt().shape[1] - 1 : -1]
    lost = logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    assert lost.max() <= most
    assert (lost > 0).sum() <= 2


@needs_llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_model(case: str, folders, tmp_path: Path):
    """Every log probability of the vocabulary, behind a text longer than a window, and a text of its own."""
    export_gguf(folders[case], tmp_path / "m.gguf", None)
    model = load_whole(folders[case])
    expected = model(prompt()).logits[0, -1].log_softmax(-1)
    said = LlamaCpp(tmp_path / "m.gguf").greedy(prompt()[0].tolist(), 24, n_probs=SIZE, ignore_eos=False)
    found = {top["id"]: top["logprob"] for top in said["completion_probabilities"][0]["top_logprobs"]}
    assert len(found) == SIZE
    off = max(abs(expected[index].item() - value) for index, value in found.items())
    assert off < 0.01 * expected.std()
    assert_greedy(model, said["tokens"], 1e-3)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma2"])
def test_llama_cpp_computes_with_the_stored_weights(case: str, kind: str, folders, tmp_path: Path):
    """It rounds activations as well, to the same types."""
    export_gguf(folders[case], tmp_path / "m.gguf", kind)
    model = stored_model(folders[case], tmp_path / "m.gguf")
    assert_greedy(model, LlamaCpp(tmp_path / "m.gguf").greedy(prompt()[0].tolist(), 24)["tokens"], 0.05)


NASTY = (
    *("", " ", "  a\n\n b \t", "I'LL don't we've 3 33 33333 3.14", "é ü 漢字 かな नमस्ते", "🦙🚀👨‍👩‍👧", "x\r\ny\u00a0z"),
    *(
        "def f(x):\n    return x**2  # ok\n",
        "...!?--==<<>>",
        "straße ¼½² \u017f\u0391\u0392",
        "one<think> two <|im_end|>\nthree<|end|>",
    ),
)
SPLITS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated")],
    "smaug-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
}


def words_tokenizer(rule: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits by a rule which llama.cpp has a name for."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    named = rule not in ("gpt-2", "smollm")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not named)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*SPLITS[rule], last]) if SPLITS[rule] else last
    tokenizer.normalizer = normalizers.NFC() if rule == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [*NASTY, TEXT] * 3,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    return finished(tokenizer)


def pieces_tokenizer(rule: str) -> PreTrainedTokenizerFast:
    """Pieces with bytes for all other text, as those of sentencepiece's models are in tokenizer.json."""
    marks = normalizers.Replace(" ", MARK)
    trained = Tokenizer(models.BPE())
    trained.normalizer = marks
    words = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "<|end|>"], show_progress=False)
    trained.train_from_iterator([TEXT, "don't 33 33333"] * 3, words)
    found = json.loads(trained.to_str())["model"]
    vocab = found["vocab"] | {f"<0x{byte:02X}>": len(found["vocab"]) + byte for byte in range(256)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab, [tuple(pair) for pair in found["merges"]], byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    if rule == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = (
            marks if rule == "no prefix" else normalizers.Sequence([normalizers.Prepend(MARK), marks])
        )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "<|end|>"])
    return finished(tokenizer, bos_token="<s>", unk_token="<unk>")


def finished(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", **special)
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A model without a tokenizer."""
    folder = chat_model(tmp_path_factory.mktemp("plain") / "model", "llama", **{**SIZES, "vocab_size": 512})
    for path in (*folder.glob("tokenizer*"), *folder.glob("*.jinja")):
        path.unlink()
    return folder


def with_tokenizer(tokenizer: PreTrainedTokenizerFast, plain: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in plain.iterdir():
        shutil.copyfile(path, folder / path.name)
    tokenizer.save_pretrained(folder)
    return folder


@needs_llama_cpp
@pytest.mark.parametrize("rule", [*SPLITS, "no prefix", "prefix", "metaspace"])
def test_llama_cpp_reads_texts_as_the_tokenizer_does(rule: str, plain, tmp_path: Path):
    made = words_tokenizer(rule) if rule in SPLITS else pieces_tokenizer(rule)
    source = with_tokenizer(made, plain, tmp_path / "model")
    export_gguf(source, tmp_path / "m.gguf", "f16")
    tokenizer, engine = AutoTokenizer.from_pretrained(source), LlamaCpp(tmp_path / "m.gguf")
    for text in NASTY:
        if rule == "metaspace" and (text.startswith(" ") or "<" in text):
            continue  # which is told, see below
        for special in (True, False):
            expected = tokenizer(text, add_special_tokens=special).input_ids
            assert engine.tokenize(text, special=special) == expected, text
    turns = [{"role": "user", "content": "one <think> token"}]
    assert engine.chat(turns) == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def test_pieces_have_their_kinds_and_what_differs_is_told(plain, tmp_path: Path, caplog):
    source = with_tokenizer(pieces_tokenizer("metaspace"), plain, tmp_path / "model")
    export_gguf(source, tmp_path / "m.gguf", "f16")
    assert "llama.cpp puts a space in front of a text that begins with one too" in caplog.text
    kinds = gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.token_type").contents()
    assert [kinds.count(kind) for kind in (gguf.TokenType.UNKNOWN, gguf.TokenType.BYTE)] == [1, 256]
    assert kinds.count(gguf.TokenType.CONTROL) == 3


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        ("starcoder2", {"head_dim": None}, "config.model_type=starcoder2: format=gguf knows llama, mistral, qwen2,"),
        ("llama", {"hidden_act": "gelu"}, "config.hidden_act='gelu': llama.cpp computes with 'silu'"),
        (
            "mistral",
            {"sliding_window": 16},
            "config.sliding_window=16: llama.cpp has no window, and the model reads 256",
        ),
        ("qwen2", {"head_dim": 32}, "config.head_dim=32: llama.cpp takes hidden_size / num_attention_heads, 16"),
        (
            "gemma2",
            CASES["gemma2"] | {"tie_word_embeddings": False},
            "config.tie_word_embeddings=False: llama.cpp takes",
        ),
        ("gemma2", CASES["gemma2"] | {"query_pre_attn_scalar": 8}, "config.query_pre_attn_scalar=8: llama.cpp scales"),
        (
            "gemma2",
            CASES["gemma2"] | {"layer_types": ["full_attention"] * 4},
            "has a window in all layers but each 2th",
        ),
        ("smollm3", CASES["smollm3"] | {"no_rope_layers": [1] * 5}, "llama.cpp leaves positions out of each 4th layer"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "config.rope_parameters.rope_type='dynamic': llama.cpp is told default, linear and llama3 here",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(family: str, changes, text: str, tmp_path: Path, capsys):
    source = chat_model(tmp_path / "model", family, **{**SIZES, **changes})
    capsys.readouterr()
    assert main(["export", "format=gguf", f"src={source}", f"out={tmp_path / 'm.gguf'}"]) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unknown_tokenizers_are_refused(plain, tmp_path: Path):
    made = words_tokenizer("gpt-2")
    changes = {
        "normalizer Lowercase": ("normalizer", normalizers.Lowercase()),
        "pre-tokenizer Whitespace": ("pre_tokenizer", pre_tokenizers.Whitespace()),
        r"pre-tokenizer Punctuation \+ ByteLevel": (
            "pre_tokenizer",
            pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        ),
    }
    for number, (text, (name, value)) in enumerate(changes.items()):
        backend = Tokenizer.from_str(made.backend_tokenizer.to_str())
        setattr(backend, name, value)
        source = with_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), plain, tmp_path / str(number))
        with pytest.raises(UserError, match=f"{text}.*is none that ee_scale knows llama.cpp's name of"):
            export_gguf(source, tmp_path / "m.gguf", "f16")
    made.add_tokens([AddedToken("<greedy>", rstrip=True)])
    with pytest.raises(UserError, match="its token '<greedy>' takes spaces beside it"):
        export_gguf(with_tokenizer(made, plain, tmp_path / "greedy"), tmp_path / "m.gguf", "f16")
    small = chat_model(tmp_path / "small", "llama", vocab_size=290)
    with pytest.raises(UserError, match=r"has a token 300, but config\.vocab_size=290"):
        export_gguf(small, tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.glob("*m.gguf*"))


def test_a_file_that_reads_back_wrong_is_not_kept(folders, tmp_path: Path, monkeypatch):
    model = load_whole(folders["llama"])
    model.lm_head.weight[5, 5] = 1e6
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(folders["llama"]).save_pretrained(tmp_path / "large")
    with pytest.raises(UserError, match=r"'output\.weight' reads back with numbers that are off by inf, more than F16"):
        export_gguf(tmp_path / "large", tmp_path / "m.gguf", "f16")
    quantize = gguf.quantize
    monkeypatch.setattr(gguf_export.gguf, "quantize", lambda values, kind: quantize(np.roll(values, 1, 0), kind))
    with pytest.raises(UserError, match=r"'token_embd\.weight' reads back with numbers that are off by .*; not kept"):
        export_gguf(folders["llama"], tmp_path / "m.gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_the_command(folders, tmp_path: Path, capsys):
    out = tmp_path / "new" / "m.gguf"
    assert main(["export", f"src={folders['llama']}", "format=gguf", "type=q8_0", f"out={out}"]) == 0
    told = capsys.readouterr()
    assert "tensors: 16 q8_0, 5 f32   read back" in told.out
    assert told.err.endswith(f"wrote {out}\n")
