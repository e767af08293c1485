"""Properties of all readers of pickles: nothing runs, nothing outgrows its file, one line says why not."""

import io
import os
import pickle
import pickletools
import shutil
import struct
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.convert import convert
from helpers.hostile import ODD, damaged, examples, refused
from helpers.models import write_model
from hypothesis import example, given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from ee_scale.backbone.loading import TensorFolder
from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion.archive import Part, walk
from ee_scale.conversion.folders import iteration_folder
from ee_scale.conversion.formats import deepspeed, mp_rank_reader, torch_dist_reader
from ee_scale.conversion.model import Opened
from ee_scale.conversion.plan import make_conversion
from ee_scale.conversion.target_files import tensor_extent
from ee_scale.conversion.unpickle import load_index, load_safely

VALUE = {
    "w": torch.arange(6.0).reshape(2, 3),
    "n": 3,
    "args": Namespace(a=1, b="x", c=[1, 2]),
    "half": torch.ones(4).half(),
}


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


FILE = saved(VALUE)
with zipfile.ZipFile(io.BytesIO(FILE)) as _archive:
    ENTRIES = {name: _archive.read(name) for name in _archive.namelist()}
PICKLE_NAME = next(name for name in ENTRIES if name.endswith("data.pkl"))
PICKLE, ROOT = ENTRIES[PICKLE_NAME], PICKLE_NAME.split("/")[0]


def archive(changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The file with other entries, whose checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in {**ENTRIES, **changes}.items():
            file.writestr(name, content)
    return buffer.getvalue()


def with_pickle(data: bytes) -> bytes:
    return archive({PICKLE_NAME: data})


OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
ARGUMENTS = (
    b"",
    b"\x00",
    b"\x01",
    b"\x05",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    struct.pack("<Q", 1 << 40),
    b"1\n",
)
PLANTED = (
    b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"ctorch\nFloatStorage\n",
    b"cbuiltins\nbytearray\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"c_codecs\nencode\n", b"ctorch\nTensor\n",
    b"cnumpy._core.multiarray\n_reconstruct\n", b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n",
    b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"ctorch\nSize\n", b"cnumpy\nndarray\n",
)  # fmt: skip
streams = st.lists(st.sampled_from(OPCODES) | st.sampled_from(ARGUMENTS) | st.sampled_from(PLANTED), max_size=30).map(
    lambda parts: b"\x80\x02" + b"".join(parts) + b"."
)
COMMAND = b"X\x10\x00\x00\x00touch planted.no"


def _call(name: bytes, argument: bytes) -> bytes:
    return b"\x80\x02" + name + argument + b"\x85R."


def _hash_bomb(levels: int) -> bytes:
    mentions = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(levels))
    return b"\x80\x02K\x01q\x00" + mentions + b"}h%cK\x01s." % levels


def _hex_bomb(levels: int) -> bytes:
    text = b"X\x10\x00\x00\x00" + b"x" * 16
    for _ in range(levels):
        text = b"c_codecs\nencode\n" + text + b"X\x03\x00\x00\x00hex\x86R"
    return b"\x80\x02" + text + b"."


BOMBS = (
    _hash_bomb(60),
    _hex_bomb(40),
    _call(b"cbuiltins\nbytearray\n", b"J\xff\xff\xff\x7f"),
    _call(b"ctorch\nFloatTensor\n", b"J\xff\xff\xff\x7f"),
    _call(b"ctorch.storage\nUntypedStorage\n", b"J\xff\xff\xff\x7f"),
    _call(b"cnumpy\nndarray\n", b"J\xff\xff\xff\x7f"),
    b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01b\x87R.",
    b"\x80\x02" + b"(" * 5000 + b"t" * 5000 + b".",
    b"\x80\x02]" + b"]a" * 3 + b".",
    b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
    b"\x80\x02Nr\xff\xff\xff\x0f.",
    b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b".",
    b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".",
    b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
    b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
    b"\x80\x02I" + b"9" * 10_000 + b"\n.",
    b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    b"\x80\x02" + b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b".",
    b"\x80\x02.",
    b"\x80\x02(Q.",
    b"\x80\x02t.",
    b"\x80\x02h\x05.",
    b"\x80\x02}]K\x01s.",
    b"\x80\x02ctorch\nSize\nN}X\x01\x00\x00\x00xK\x01s\x86b.",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pickles")


@pytest.fixture(autouse=True)
def nothing_runs(folder, monkeypatch) -> Any:
    monkeypatch.chdir(folder)
    ran: list[Any] = []
    monkeypatch.setattr(os, "system", ran.append)
    yield
    assert not ran
    assert not list(folder.glob("planted*"))


def _check(path: Path) -> Any:
    """Both ways to load: tensors left where they are, and read."""
    with FakeTensorMode():
        found = refused(lambda: (load_safely(path, path),), megabytes=60)
    read = refused(lambda: (load_safely(path, path),), megabytes=60)
    content = path.read_bytes()
    if found is None:
        return None
    for number, tensor in enumerate(walk(found[0])):
        extent = refused(lambda one=tensor: tensor_extent(path, one))
        if extent is not None and extent.nbytes:
            assert extent.offset + extent.nbytes <= len(content)
            raw = content[extent.offset : extent.offset + extent.nbytes]
            if read is not None:
                assert list(walk(read[0]))[number].reshape(-1).view(torch.uint8).numpy().tobytes() == raw
    return found


@given(
    st.one_of(
        damaged(FILE),
        damaged(PICKLE).map(with_pickle),
        streams.map(with_pickle),
        st.sampled_from(BOMBS).map(with_pickle),
        st.sampled_from(sorted(ENTRIES)).flatmap(
            lambda name: damaged(ENTRIES[name]).map(lambda new: archive({name: new}))
        ),
        st.binary(max_size=64),
    )
)
@example(archive({}, zipfile.ZIP_DEFLATED))
@example(archive({f"{ROOT}/byteorder": b"big"}))
@example(archive({f"{ROOT}/.storage_alignment": b"0"}))
@example(archive({f"{ROOT}/.storage_alignment": b"999999999999"}))
@example(archive({f"{ROOT}/data/0": b""}))
@example(with_pickle(PICKLE.replace(b"K\x06", b"J\xff\xff\xff\x7f", 1)))
@example(with_pickle(PICKLE.replace(b"K\x06", b"K\x04", 1)))
@example(with_pickle(b"\x80\x02cos\nsystem\n" + COMMAND + b"\x85R."))
@example(b"\x80\x02cos\nsystem\n" + COMMAND + b"\x85R.")
@examples(150)
def test_files_of_torch_save(folder, content) -> None:
    path = folder / "file.pt"
    path.write_bytes(content)
    _check(path)


@pytest.mark.parametrize("number", range(len(BOMBS)))
def test_bombs(folder, number) -> None:
    path = folder / "bomb"
    path.write_bytes(with_pickle(BOMBS[number]))
    refused(lambda: load_safely(path, path), megabytes=60)
    path.write_bytes(BOMBS[number])  # as in the format before torch 1.6
    assert refused(lambda: load_safely(path, path), megabytes=60) is None
    assert refused(lambda: load_index(path), megabytes=60) is None


def test_a_zip_bomb(folder) -> None:
    """Many megabytes of zeros in one: refused by what the archive says of itself."""
    path, size = folder / "zip", 1 << 27
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open(PICKLE_NAME, "w", force_zip64=True) as entry,
    ):
        for _ in range(64):
            entry.write(bytes(size // 64))
    assert refused(lambda: load_safely(path, path), megabytes=60) is None


@given(st.integers(-5, 40), st.integers(-5, 40))
@examples(60)
def test_parts_of_files(offset, length) -> None:
    data = bytes(range(32))
    try:
        part = io.BufferedReader(Part(io.BytesIO(data), offset, length))
    except ValueError:
        assert offset < 0 or length < 0 or offset + length > 32
    else:
        assert part.read() == data[offset : offset + length]
        part.seek(-min(3, length), io.SEEK_END)
        assert part.read() == data[offset : offset + length][length - min(3, length) :]


@given(
    st.dictionaries(
        st.text("abc.", max_size=4),
        st.integers() | st.floats(allow_nan=False) | st.lists(st.integers(), max_size=3),
        max_size=4,
    )
)
@examples(30)
def test_what_torch_saves_comes_back(folder, values) -> None:
    path = folder / "own.pt"
    value = {**values, "args": Namespace(**{"x": 1}), "w": torch.arange(3)}
    path.write_bytes(saved(value))
    found = load_safely(path, path)
    assert {key: found[key] for key in values} == values
    assert (found["args"], found["w"].tolist()) == (Namespace(x=1), [0, 1, 2])


# --- whole checkpoints


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    changes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
        "num_attention_heads": 4,
    }
    return write_model(tmp_path_factory.mktemp("hf") / "model", "llama", **changes)


@pytest.fixture(scope="module")
def dist(hf, tmp_path_factory) -> Path:
    return convert(hf, tmp_path_factory.mktemp("dist") / "out", "megatron_core", tp=2, pp=1)


@pytest.fixture(scope="module")
def ranks(hf, tmp_path_factory) -> Path:
    return convert(hf, tmp_path_factory.mktemp("ranks") / "out", "megatron_legacy", tp=1, pp=1)


@pytest.fixture(scope="module")
def zero(hf, tmp_path_factory) -> Path:
    """A save of DeepSpeed without ZeRO, made by hand."""
    root = tmp_path_factory.mktemp("zero")
    (root / "tag").mkdir()
    (root / "latest").write_text("tag")
    tensors = TensorFolder(hf)
    module = {name: tensors.read(name) for name in tensors.files}
    torch.save(
        {"module": module, "param_shapes": None, "dp_world_size": 1}, root / "tag" / "mp_rank_00_model_states.pt"
    )
    return root


def _check_opened(opened: Opened | None) -> None:
    for stored in opened.stored if opened else ():
        extent = stored.extent
        assert extent.offset >= 0
        assert extent.offset + extent.nbytes <= extent.path.stat().st_size


def _mutate(draw: Any, value: Any, depth: int = 0) -> Any:
    """A copy of nested objects with a change somewhere."""
    if depth and draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(ODD))
    if isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value, key=str)))
        kind = draw(st.sampled_from(("change", "change", "change", "drop", "move")))
        changed = dict(value)
        if kind == "drop":
            del changed[key]
        elif kind == "move":
            changed[draw(st.sampled_from(("x", 5, None, "decoder.layers.9.x")))] = changed.pop(key)
        else:
            changed[key] = _mutate(draw, value[key], depth + 1)
        return changed
    if isinstance(value, list | tuple) and value and not isinstance(value, torch.Size):
        at = draw(st.integers(0, len(value) - 1))
        changed = [*value[:at], _mutate(draw, value[at], depth + 1), *value[at + 1 :]]
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, torch.Size) and value:
        at = draw(st.integers(0, len(value) - 1))
        size = draw(st.sampled_from((0, 1, -1, 7, 1 << 40, 1 << 62)))
        return torch.Size([*value[:at], size, *value[at + 1 :]]) if draw(st.booleans()) else torch.Size(value[1:])
    if hasattr(value, "__dict__") and vars(value) and not isinstance(value, torch.Tensor | type):
        copy = object.__new__(type(value))
        changed = _mutate(draw, dict(vars(value)))
        copy.__dict__.update({key: one for key, one in changed.items() if isinstance(key, str)})
        return copy
    return draw(st.sampled_from(ODD))


@given(st.data())
@examples(50)
def test_indexes_of_torch_dist(dist, tmp_path_factory, data) -> None:
    iteration = iteration_folder(dist, None)
    with (iteration / ".metadata").open("rb") as file:
        index = pickle.load(file)
    content = (iteration / ".metadata").read_bytes()
    kind = data.draw(st.sampled_from(("object", "object", "object", "bytes", "stream")))
    if kind == "object":
        new = pickle.dumps(_mutate(data.draw, index))
    else:
        new = data.draw(damaged(content) if kind == "bytes" else streams)
    folder = tmp_path_factory.getbasetemp() / "dist-copy"
    if not folder.exists():
        shutil.copytree(dist, folder, copy_function=os.link)
        (iteration_folder(folder, None) / ".metadata").unlink()
    (iteration_folder(folder, None) / ".metadata").write_bytes(new)
    _check_opened(
        refused(
            lambda: torch_dist_reader.open_folder(folder, iteration_folder(folder, None), None, False), megabytes=60
        )
    )


@given(st.data(), st.booleans())
@examples(50)
def test_rank_files(ranks, tmp_path_factory, data, own_config) -> None:
    """With the Hugging Face config that came along, and with one made of `args`."""
    folder = tmp_path_factory.getbasetemp() / f"ranks-copy-{own_config}"
    if not folder.exists():
        shutil.copytree(ranks, folder)
        if own_config:
            shutil.rmtree(folder / "huggingface")
    iteration = iteration_folder(folder, None)
    path = iteration / "mp_rank_00" / "model_optim_rng.pt"
    original = next(ranks.rglob("model_optim_rng.pt"))
    if data.draw(st.integers(0, 3)) == 0:
        path.write_bytes(data.draw(damaged(original.read_bytes())))
    else:
        value = load_safely(original, original)
        part = data.draw(st.sampled_from(("args", "args", "args", "all", "model")))
        if part == "args":
            arguments = dict(vars(value["args"]))
            key = data.draw(st.sampled_from(sorted(arguments)))
            arguments[key] = data.draw(st.sampled_from(ODD))
            value["args"] = Namespace(**arguments)
        elif part == "model":
            value["model"] = _mutate(data.draw, value["model"])
        else:
            value = _mutate(data.draw, value)
        torch.save(value, path)
    _check_opened(refused(lambda: mp_rank_reader.open_folder(folder, iteration, None, False), megabytes=60))


@given(st.data())
@examples(30)
def test_saves_of_deepspeed(zero, hf, tmp_path_factory, data) -> None:
    folder = tmp_path_factory.getbasetemp() / "zero-copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(zero, folder)
    original, path = (one / "tag" / "mp_rank_00_model_states.pt" for one in (zero, folder))
    kind = data.draw(st.sampled_from(("bytes", "object", "object", "latest")))
    if kind == "bytes":
        path.write_bytes(data.draw(damaged(original.read_bytes())))
    elif kind == "latest":
        (folder / "latest").write_bytes(data.draw(damaged(b"tag")))
    else:
        torch.save(_mutate(data.draw, load_safely(original, original)), path)
    _check_opened(
        refused(lambda: deepspeed.open_folder(folder, folder / ".staging", model_folder=hf, dtype=None), megabytes=60)
    )


SHARD = {
    "optimizer_state_dict": {
        "zero_stage": 1,
        "partition_count": [1],
        "single_partition_of_fp32_groups": [torch.zeros(4)],
        "base_optimizer_state": {},
    },
    "ds_version": "0.19",
}
SHAPES = [{"model.embed_tokens.weight": torch.Size([131, 32])}]


@given(st.data())
@examples(30)
def test_zero_files_of_deepspeed(zero, hf, tmp_path_factory, data) -> None:
    folder = tmp_path_factory.getbasetemp() / "zero-copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(zero, folder)
    path = folder / "tag" / "mp_rank_00_model_states.pt"
    model = {**load_safely(path, path), "param_shapes": SHAPES, "shared_params": {}, "buffer_names": []}
    if data.draw(st.booleans()):
        shard = _mutate(data.draw, SHARD)
    else:
        shard, model = SHARD, _mutate(data.draw, {**model, "frozen_param_shapes": {"x": torch.Size([3])}})
    torch.save(model, path)
    torch.save(shard, folder / "tag" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    opened = refused(
        lambda: deepspeed.open_folder(folder, folder / ".staging", model_folder=hf, dtype=None), megabytes=60
    )
    assert opened is None or opened.model is not None


def test_unchanged_checkpoints_open(dist, ranks, zero, hf) -> None:
    for src, changes in ((dist, {}), (ranks, {}), (zero, {"model": hf})):
        assert make_conversion(ConvertConfig(src=src, out=src.with_name("never"), to="hf", **changes)).files
