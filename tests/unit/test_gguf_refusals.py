"""GGUF files: what is refused, in one line, and the cache that their plain copies lie in."""

import errno
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from helpers.gguf_files import chat_model, write_gguf
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from ee_scale.backbone import model_path
from ee_scale.backbone.fingerprint import fingerprint
from ee_scale.backbone.gguf_file import GGUFFile
from ee_scale.backbone.hub import find_model
from ee_scale.backbone.model_folder import ModelFolder
from ee_scale.backbone.model_path import plain_folder
from ee_scale.errors import UserError
from ee_scale.files import cache_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return chat_model(tmp_path_factory.mktemp("source"), "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def original(source, tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", source, Kind.Q8_0)


@pytest.fixture
def file(original, tmp_path) -> Path:
    return Path(shutil.copy(original, tmp_path / "m.gguf"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EE_SCALE_CACHE", str(folder))
    return folder / "gguf"


def refused(call: Callable[[], object]) -> str:
    """The one line of a `UserError`."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


def folders(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.is_dir()] if cache.is_dir() else []


def test_one_folder_for_the_same_bytes(file: Path, cache: Path):
    folder = plain_folder(file)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert plain_folder(file) == folder
    (file.parent / "folder").mkdir()
    other = Path(shutil.copy(file, file.parent / "folder" / "other name.GGUF"))
    assert plain_folder(other) == folder == find_model(str(file))
    told = fingerprint(folder)
    shutil.rmtree(cache)
    assert plain_folder(other) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert fingerprint(folder) == told
    assert folders(cache) == [folder.name]


def test_another_content_under_the_same_name(file: Path, source: Path, cache: Path):
    first = plain_folder(file)
    write_gguf(file, source, Kind.Q4_0)
    second = plain_folder(file)
    assert first != second
    assert sorted(folders(cache)) == sorted([first.name, second.name])


def test_a_folder_with_one_file(file: Path, source: Path, tmp_path: Path):
    folder = plain_folder(file)
    assert ModelFolder.named(str(tmp_path)).path == folder
    blob = file.rename(tmp_path / "sha256-0123")  # a store of models without endings
    assert plain_folder(blob) == folder
    assert plain_folder(tmp_path) == tmp_path
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(blob, tmp_path / name)
    assert (
        refused(lambda: plain_folder(tmp_path)) == f"{tmp_path}: holds 2 GGUF files (a.gguf, b.gguf); name one of them"
    )
    shutil.copy(source / "config.json", tmp_path)
    assert plain_folder(tmp_path) == tmp_path
    assert refused(lambda: ModelFolder(tmp_path).weight_files).endswith("is read when it is given itself")


def test_names_that_are_none(tmp_path: Path):
    missing, text = tmp_path / "no.gguf", tmp_path / "text"
    text.write_text("GGU")
    assert refused(lambda: find_model(str(missing))) == f"{missing}: no such file"
    assert refused(lambda: ModelFolder.named(str(missing))) == f"{missing}: no such file"
    assert refused(lambda: ModelFolder.named(str(text))) == f"model={text}: no such folder"


def test_a_link_out_of_a_folder(file: Path, tmp_path: Path):
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "m.gguf").symlink_to(file)
    assert "out of its folder" in refused(lambda: plain_folder(folder))
    assert plain_folder(folder / "m.gguf") == plain_folder(file)  # this one a person has named


def test_cut_off_files(file: Path, cache: Path):
    whole = file.read_bytes()
    end = max(int(tensor.data_offset + tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors)  # then padding
    for length in (*range(0, 64, 9), *np.linspace(64, end - 1, 25, dtype=int)):
        file.write_bytes(whole[:length])
        assert refused(lambda: plain_folder(file)).startswith(f"{file}: not a GGUF file that gguf")
    assert folders(cache) == []
    file.write_bytes(whole)
    plain_folder(file)


def test_damaged_headers(file: Path):
    """A header that says anything: the file is read, or refused in one line; nothing loops or fails otherwise."""
    whole, pick = bytearray(file.read_bytes()), random.Random(0)
    end = whole.index(b"tokenizer.ggml.tokens")
    places = [*range(4, 24), *(pick.randrange(24, end) for _ in range(40))]
    places += [
        whole.index(name) + len(name) + pick.randrange(24) for name in (b"output_norm.weight", b"attn_q.weight") * 8
    ]
    lines = []
    for place in places:
        changed = whole.copy()
        changed[place] ^= 1 << pick.randrange(8)
        file.write_bytes(changed)
        try:
            _ = GGUFFile(file).names
        except UserError as error:
            lines.append(str(error))
    assert len(lines) > 30
    assert not [line for line in lines if "\n" in line]


@pytest.mark.parametrize(
    ("kind", "length"), [(0, 1 << 40), (8, 1 << 21), (9, 1 << 21)], ids=["numbers", "texts", "lists of lists"]
)
def test_lists_without_an_end(kind: int, length: int, tmp_path: Path):
    key = b"general.list"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<I", 9)
    (tmp_path / "m.gguf").write_bytes(header + struct.pack("<IQ", kind, length) * 200)
    assert "not a GGUF file" in refused(lambda: plain_folder(tmp_path / "m.gguf"))


def test_types_that_nobody_decodes(source: Path, tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf", source, {"attn_v.weight": Kind.Q8_1})
    line = f"{file}: 'blk.0.attn_v.weight' is stored as Q8_1, which gguf {version('gguf')} does not decode"
    assert refused(lambda: plain_folder(file)) == line
    whole = bytearray(file.read_bytes())
    place = whole.index(b"blk.0.attn_v.weight") + len(b"blk.0.attn_v.weight") + 4 + 16
    assert struct.unpack_from("<I", whole, place) == (Kind.Q8_1,)
    struct.pack_into("<I", whole, place, 77)
    file.write_bytes(whole)
    assert "77) is not a valid GGMLQuantizationType" in refused(lambda: plain_folder(file))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn': transformers reads a GGUF file of this "),
        ({"expert_count": 8}, "llama.expert_count=8: "),
        ({"attention.sliding_window": 4096}, "llama.attention.sliding_window=4096: "),
        ({"attention.key_length": 32}, "llama.attention.key_length=32: "),
        ({"block_count": 7}, "no tensor 'blk.1.attn_q.weight' in it"),
        ({"block_count": 100}, "llama.block_count=100, but it has 12 tensors"),
        ({"block_count": 1_000_000}, "num_hidden_layers=1000000: give a whole number from 1 to 10000"),
        ({"vocab_size": 302}, "'token_embd.weight' has shape [301, 64], but its settings ask for [302, 64]"),
        ({"embedding_length": 1 << 31}, "hidden_size=2147483648: give a whole number from 1 to 1048576"),
    ],
)
def test_settings_that_would_compute_something_else(settings, line, source: Path, tmp_path: Path, cache: Path):
    file = write_gguf(tmp_path / "m.gguf", source, settings=settings)
    assert refused(lambda: plain_folder(file)).startswith(f"{file}: {line}")
    assert folders(cache) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("blk.0.attn_q.bias", "'blk.0.attn_q.bias': no parameter of LlamaForCausalLM takes it"),
        ("rope_freqs.weight", "'rope_freqs.weight' is not the rotary scaling of Llama 3.1"),
    ],
)
def test_tensors_that_would_be_left_out(name: str, line: str, source: Path, tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf", source, extra={name: np.full(8, 3.0, np.float32)})
    assert refused(lambda: plain_folder(file)) == f"{file}: {line}"


def test_an_unknown_setting_is_told(source: Path, tmp_path: Path, caplog):
    file = write_gguf(tmp_path / "m.gguf", source, settings={"new_thing": 1})
    for _ in range(2):  # also of a folder that was there
        caplog.clear()
        model_path._tell.cache_clear()
        plain_folder(file)
        assert "m.gguf: not known here, and left out: llama.new_thing" in caplog.text


def test_numbers_that_are_none(source: Path, tmp_path: Path, cache: Path):
    folder = shutil.copytree(source, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(folder)
    file = write_gguf(tmp_path / "m.gguf", folder)
    assert refused(lambda: plain_folder(file)).startswith(
        f"{file}: 'blk.0.ffn_up.weight' has numbers that are not finite"
    )
    assert folders(cache) == []


@pytest.mark.parametrize(
    ("architecture", "add", "line"),
    [
        ("gpt2", {}, "model.path: architecture 'gpt2' is not supported; supported: llama, mistral, "),
        ("../x", {}, "model.path: architecture '../x' is not supported"),
        ("llama", {"split.count": 3}, "one of 3 parts of a model; join them with llama-gguf-split --merge"),
        ("llama", {}, "no llama.block_count in it"),
    ],
)
def test_other_models(architecture: str, add: dict[str, int], line: str, tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
    for key, value in add.items():
        writer.add_uint16(key, value)
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert line in refused(lambda: plain_folder(tmp_path / "m.gguf"))


def test_an_architecture_that_llama_cpp_has_not(source: Path, tmp_path: Path):
    file = write_gguf(tmp_path / "m.gguf", source, architecture="mistral")
    assert (
        refused(lambda: plain_folder(file)) == f"{file}: general.architecture=mistral: llama.cpp has none of that name"
    )


def test_the_other_byte_order(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "a GGUF file of the other byte order" in refused(lambda: plain_folder(tmp_path / "m.gguf"))


def test_a_disk_that_is_too_small(file: Path, cache: Path, monkeypatch):
    small = shutil._ntuple_diskusage(2 << 20, 1 << 20, 1 << 20)
    monkeypatch.setattr(model_path.shutil, "disk_usage", lambda path: small)
    line = refused(lambda: plain_folder(file))
    assert line.startswith(f"{file}: its plain copy takes 0.0 GB, and {cache} has 0.0 GB left; set EE_SCALE_CACHE ")
    assert folders(cache) == []


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
)
def test_a_disk_that_fills_up(error: Exception, file: Path, cache: Path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(model_path, "save_file", full)
        line = refused(lambda: plain_folder(file))
    assert line.startswith(f"{file}: no plain copy of it in {cache}: ")
    assert "No space left on device" in line
    assert folders(cache) == []
    plain_folder(file)


def test_a_cache_that_nobody_may_write(file: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("EE_SCALE_CACHE", str(tmp_path / "taken"))
    assert refused(lambda: plain_folder(file)).startswith(
        f"{file}: no plain copy of it in {tmp_path / 'taken' / 'gguf'}: "
    )


def test_a_file_that_changes_meanwhile(file: Path, cache: Path, monkeypatch):
    write = model_path._write

    def slow(*args: object) -> None:
        write(*args)
        with file.open("ab") as stream:
            stream.write(b"more")

    monkeypatch.setattr(model_path, "_write", slow)
    assert refused(lambda: plain_folder(file)) == f"{file}: changed while it was read"
    assert folders(cache) == []


def test_what_a_killed_process_left(file: Path, cache: Path):
    folder = plain_folder(file)
    shutil.move(folder, cache / f".{folder.name}.0123")
    assert plain_folder(file) == folder
    assert folders(cache) == [folder.name]


def test_without_the_package(file: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "ee_scale.backbone.gguf_file")
    assert "pip install 'ee-scale[gguf]'" in refused(lambda: plain_folder(file))


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("EE_SCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/ee_scale")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ee")
    assert cache_folder() == Path("/home/ee/.cache/ee_scale")
    monkeypatch.setenv("EE_SCALE_CACHE", "~/big")
    assert cache_folder() == Path("/home/ee/big")
