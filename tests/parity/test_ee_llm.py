"""EE-LLM's checkpoints: read bit for bit, written as its own code writes them, and computing what it computes."""

import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ee_llm import EELLM, Tensors, ee_config, random_tensors
from helpers.models import load_whole, spec_of, tiny_config, write_model
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import ee_scale
from ee_scale.backbone.loading import TensorFolder
from ee_scale.config.convert import ConvertConfig
from ee_scale.conversion.check.verify import verify
from ee_scale.conversion.copying import Source, differing_copies
from ee_scale.conversion.execute import run
from ee_scale.conversion.plan import make_conversion, open_checkpoint, open_result
from ee_scale.errors import UserError
from ee_scale.exits.placement import exit_spec
from ee_scale.inference.model import open_model, untrained_exits

KINDS = ("embedding", "norm", "mlp", "layer")
GRIDS = tuple(product((1, 2), (1, 2, 4)))
IDS = torch.randint(131, (2, 24), generator=torch.Generator().manual_seed(1))


def convert(src: Path, out: Path, to: str, *, compare: bool = True, **changes: Any) -> Path:
    settings = ConvertConfig(src=src, out=out, to=to, **changes)
    conversion = make_conversion(settings)
    check = lambda folder: verify(conversion.opened, open_result(settings, folder)) if compare else None  # noqa: E731
    run(conversion, 2, lambda size: None, check)
    return out


def same(folder: Path, expected: Tensors) -> None:
    """The folder holds these tensors and no other, bit for bit."""
    found = TensorFolder(folder)
    assert set(found.files) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.read(name), tensor), name


def built(saved: EELLM, folder: Path, **args: Any) -> tuple[Path, Tensors]:
    tensors = random_tensors(saved.config, saved.exits, saved.kind, saved.untied_exits)
    return saved.write(folder, tensors, **args), tensors


def files_of(folder: Path) -> dict[str, Path]:
    """Rank folder -> its file."""
    return {path.parent.name: path for path in folder.glob("iter_*/mp_rank_*/model_optim_rng.pt")}


def model_of(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)["model"]


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Nested keys joined by slashes: keys have points of their own."""
    for key, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        else:
            yield from leaves(value, f"{prefix}{key}/")


def same_files(written: Path, saved: EELLM, tensors: Tensors) -> None:
    """What our writer made is what EE-LLM would have saved of these tensors: files, nesting, names, values."""
    files = files_of(written)
    assert len(files) == saved.tp * saved.pp
    for rank, stage in product(range(saved.tp), range(saved.pp)):
        place = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if saved.pp > 1 else "")
        found, expected = dict(leaves(model_of(files[place]))), dict(leaves(saved.model(tensors, rank, stage)))
        assert set(found) == set(expected), place
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (place, name)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_every_tensor_arrives(tmp_path: Path, kind: str, tp: int, pp: int):
    """Three exits, of which two share a stage at pp=2 and the last sits at the last layer."""
    saved = EELLM(ee_config(), (1, 2, 4), kind, tp=tp, pp=pp, flat=pp == 2)
    src, tensors = built(saved, tmp_path / "ee")
    out = convert(src, tmp_path / "hf", "hf", compare=False)
    same(out, tensors)
    assert open_checkpoint(ConvertConfig(src=out, out=out, to="hf")).model.exits.layers == (1, 2, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("untied_exits", [False, True], ids=["shared", "own"])
def test_tied_embeddings(tmp_path: Path, kind: str, tp: int, pp: int, untied_exits: bool):
    """With shared heads every stage that hosts an exit has a copy of the embedding; with own heads too."""
    saved = EELLM(ee_config(tie_word_embeddings=True), (1, 3), kind, untied_exits=untied_exits, tp=tp, pp=pp)
    src, tensors = built(saved, tmp_path / "ee")
    copies = ["word_embeddings_for_head" in model_of(path) for _, path in sorted(files_of(src).items())]
    assert sum(copies) == {1: 0, 2: tp, 4: 2}[pp]
    out = convert(src, tmp_path / "hf", "hf")
    same(out, tensors)
    check_logits(saved, tensors, out)


def test_a_stale_copy_of_the_embedding_is_not_used(tmp_path: Path):
    saved = EELLM(ee_config(tie_word_embeddings=True), (3,), untied_exits=False, pp=2)
    src, tensors = built(saved, tmp_path / "ee")
    path = files_of(src)["mp_rank_00_001"]
    content = torch.load(path, weights_only=False)
    content["model"]["word_embeddings_for_head"]["weight"].zero_()
    torch.save(content, path)
    same(convert(src, tmp_path / "hf", "hf"), tensors)
    opened = open_checkpoint(ConvertConfig(src=src, out=tmp_path / "hf", to="hf"))
    found = differing_copies(opened.stored, Source(opened.stored))
    assert [item.piece.key for item in found] == ["word_embeddings_for_head.weight"]


def test_copies_that_are_the_same(tmp_path: Path):
    saved = EELLM(ee_config(tie_word_embeddings=True), (3,), untied_exits=False, tp=2, pp=2)
    src, _ = built(saved, tmp_path / "ee")
    opened = open_checkpoint(ConvertConfig(src=src, out=tmp_path / "hf", to="hf"))
    assert any(stored.piece.copy for stored in opened.stored)
    assert differing_copies(opened.stored, Source(opened.stored)) == []


@pytest.mark.parametrize("kind", ["embedding", "norm", "layer"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (1, 4)])
def test_exits_in_front_of_a_layer(tmp_path: Path, kind: str, tp: int, pp: int):
    """pre 3 reads what post 2 reads, but lies with layer 3: at pp=2 on another stage."""
    saved = EELLM(ee_config(), (2, 3), kind, pre=True, tp=tp, pp=pp)
    src, tensors = built(saved, tmp_path / "ee")
    assert "exit_heads.1.head.weight" in tensors
    out = convert(src, tmp_path / "hf", "hf")
    same(out, tensors)
    check_logits(saved, tensors, out)


@pytest.mark.parametrize(("pp", "pre"), [(1, False), (2, False), (2, True)])
def test_output_matrices_are_counted_in_the_order_of_the_arguments(tmp_path: Path, pp: int, pre: bool):
    saved = EELLM(ee_config(), (4, 2, 3), pre=pre, pp=pp)
    src, tensors = built(saved, tmp_path / "ee")
    out = convert(src, tmp_path / "hf", "hf")
    same(out, tensors)
    check_logits(saved, tensors, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_logits_are_those_of_ee_llm(tmp_path: Path, kind: str, tp: int, pp: int):
    saved = EELLM(ee_config(), (1, 3, 4), kind, tp=tp, pp=pp)
    src, tensors = built(saved, tmp_path / "ee")
    check_logits(saved, tensors, convert(src, tmp_path / "hf", "hf"))


def check_logits(saved: EELLM, tensors: Tensors, folder: Path) -> None:
    """Stock transformers: the base model's logits exactly; with exits: as computed by hand."""
    base, expected = by_hand(saved, tensors)
    stock = load_whole(folder)
    assert type(stock).__module__.startswith("transformers.models.")
    with torch.no_grad():
        logits = stock(IDS).logits
        model = ee_scale.EarlyExitForCausalLM.from_pretrained(folder)
        output = model(IDS)
    assert torch.equal(output.logits, logits)
    torch.testing.assert_close(logits, base, atol=2e-5, rtol=1e-5)
    assert set(output.exit_logits) == set(expected)
    for k, value in expected.items():
        torch.testing.assert_close(output.exit_logits[k], value, atol=2e-5, rtol=1e-5)
        assert value.std() > 0.05


@torch.no_grad()
def by_hand(saved: EELLM, tensors: Tensors) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """(final logits, exit layer -> logits): a branch beside the layer's MLP, or a block; norm; output matrix."""
    config = tiny_config("llama", **{**saved.config.to_diff_dict(), "attn_implementation": "eager"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(base_of(tensors), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    length = IDS.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    hidden = model.model.embed_tokens(IDS)
    rotation = model.model.rotary_emb(hidden, torch.arange(length)[None])

    def attend(layer: LlamaDecoderLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotation, attention_mask=mask)[0]
        return x + mixed, layer.post_attention_layernorm(x + mixed)

    def part(name: str, module: torch.nn.Module) -> torch.nn.Module:
        module.load_state_dict({key.removeprefix(name): value for key, value in tensors.items() if name in key})
        return module

    logits = {}
    for number, layer in enumerate(model.model.layers, 1):
        before = hidden
        residual, normed = attend(layer, hidden)
        hidden = residual + layer.mlp(normed)
        if number not in saved.numbers:
            continue
        k = number - saved.pre
        read = before if saved.pre else hidden
        if saved.kind == "mlp":
            read = residual + part(f"exit_heads.{k}.mlp.", LlamaMLP(config))(normed)
        if saved.kind == "layer":
            block = part(f"exit_heads.{k}.layer.", LlamaDecoderLayer(config, 0))
            inside, normed = attend(block, read)
            read = inside + block.mlp(normed)
        if saved.kind != "embedding":
            scale = read.pow(2).mean(-1, keepdim=True).add(config.rms_norm_eps).rsqrt()
            read = read * scale * tensors[f"exit_heads.{k}.norm.weight"]
        name = f"exit_heads.{k}.head.weight" if saved.untied_exits else "model.embed_tokens.weight"
        logits[k] = functional.linear(read, tensors[name])
    return model.lm_head(model.model.norm(hidden)), logits


def base_of(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith("exit_heads.")}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_a_file_of_plain_megatron(tmp_path: Path, tp: int, pp: int):
    """No argument of EE-LLM in it, and the config comes from the arguments alone."""
    saved = EELLM(ee_config(), tp=tp, pp=pp)
    src, tensors = built(saved, tmp_path / "legacy")
    out = convert(src, tmp_path / "hf", "hf")
    same(out, tensors)
    found = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(found(IDS).logits, by_hand(saved, tensors)[0], atol=2e-5, rtol=1e-5)
    assert getattr(found.config, "early_exit", None) is None
    assert not list(out.glob("*.py"))


def test_a_folder_with_a_tokenizer_completes_what_the_arguments_lack(tmp_path: Path):
    """Megatron knows the padded vocabulary only: how many rows are words is told by the model's own folder."""
    saved = EELLM(ee_config(), (2,))
    src, tensors = built(saved, tmp_path / "ee", vocab_size=None)
    with pytest.raises(UserError, match=r"vocab_size: the checkpoint has padded .* give model="):
        make_conversion(ConvertConfig(src=src, out=tmp_path / "hf", to="hf"))
    base = write_model(tmp_path / "base", "llama", num_hidden_layers=4, rms_norm_eps=1e-5)
    (base / "tokenizer.json").write_text("{}")
    out = convert(src, tmp_path / "hf", "hf", model=base)
    same(out, tensors)
    assert (out / "tokenizer.json").read_text() == "{}"


def test_an_iteration_is_chosen(tmp_path: Path):
    """By number, by the tracker, or by its folder; the check of the result does not look for that number there."""
    first, second = (random_tensors(ee_config(), (2,)) for _ in range(2))
    second["model.norm.weight"] = second["model.norm.weight"] * 2
    saved = EELLM(ee_config(), (2,))
    src = saved.write(tmp_path / "ee", second)
    saved.write(tmp_path / "other", first)
    shutil.move(tmp_path / "other" / "iter_0020000", src / "iter_0010000")
    same(convert(src, tmp_path / "latest", "hf"), second)
    same(convert(src, tmp_path / "chosen", "hf", iteration=10000), first)
    same(convert(src / "iter_0010000", tmp_path / "folder", "hf"), first)
    again = convert(src, tmp_path / "again", "megatron_legacy", iteration=10000, vocab_divisor=8)
    same(convert(again, tmp_path / "back", "hf"), first)
    with pytest.raises(UserError, match=r"iteration=3: .* has 10000, 20000"):
        make_conversion(ConvertConfig(src=src, out=tmp_path / "x", to="hf", iteration=3))
    (src / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(UserError, match=r"has 10000, 20000 and no latest_.*; choose one"):
        make_conversion(ConvertConfig(src=src, out=tmp_path / "x", to="hf"))
    same(convert(src, tmp_path / "without", "hf", iteration=10000), first)


@pytest.mark.parametrize(
    ("saved", "args", "message"),
    [
        (EELLM(ee_config(), (2,), "mlp"), {"use_exit_block": True}, "use_exit_mlp=True, use_exit_block=True"),
        (EELLM(ee_config(), (2,), "mlp"), {"use_exit_norm": False}, "use_exit_norm=False: exits here are one of"),
        (EELLM(ee_config(), (2,), "layer"), {"use_exit_norm": False}, "use_exit_norm=False: exits here are one of"),
        (EELLM(ee_config(), (2,), "mlp"), {"pre_exit": True}, "pre_exit with use_exit_mlp"),
        (EELLM(ee_config(), (2, 1)), {"pre_exit": True}, "pre_exit with exit_layer_nums=1"),
        (EELLM(ee_config(), (2, 3)), {"exit_layer_nums": [2, 3, 2]}, r"exit_layer_nums=\[2, 3, 2\]: 2 twice"),
        (EELLM(ee_config(), (2, 3)), {"exit_layer_nums": [2, 5]}, "5 is not in 1..4"),
        (EELLM(ee_config(), (2,)), {"exit_layer_nums": [5], "pre_exit": True}, "5 is not in 1..4"),
        (EELLM(ee_config(), (2,)), {"untie_exit_output_weights": False}, "no output matrix for such exits"),
        (EELLM(ee_config(), (2,)), {"exit_layer_nums": [3]}, "missing: .*layers.2.exit_norm.weight"),
        (EELLM(ee_config(), (2, 3)), {"exit_layer_nums": [2]}, "not known: .*layers.2.exit_norm.weight"),
        (EELLM(ee_config(), (2,), pp=2), {"pipeline_model_parallel_size": 4}, "pipeline_model_parallel_size=4, but"),
        (EELLM(ee_config(), (2,), tp=2), {"tensor_model_parallel_size": 1}, "tensor_model_parallel_size=1, but"),
        (EELLM(ee_config(), (2,)), {"normalization": "LayerNorm"}, "args.normalization=LayerNorm: only RMSNorm"),
        (EELLM(ee_config(), (2,)), {"add_bias_linear": True}, "args.add_bias_linear=True"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, saved: EELLM, args: dict[str, Any], message: str):
    src, _ = built(saved, tmp_path / "ee", **args)
    with pytest.raises(UserError, match=message) as caught:
        make_conversion(ConvertConfig(src=src, out=tmp_path / "hf", to="hf"))
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"ee"}


# -- writing -----------------------------------------------------------------------------------------------------------


def exit_folder(folder: Path, kind: str, head: str, layers: tuple[int, ...] = (1, 2, 4), **changes: Any) -> Path:
    """An early-exit folder as `save_pretrained` writes it, its exits random."""
    base = write_model(folder.with_name(f"{folder.name}-base"), "llama", num_hidden_layers=4, **changes)
    config = load_whole(base).config
    spec = exit_spec(config, layers, "norm" if kind == "embedding" else kind, head, rank=3)
    if kind == "embedding":
        spec = type(spec)(**{**spec.to_dict(), "layers": layers, "kind": kind})
    model = untrained_exits(base, spec)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def logits_of(folder: Path) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    with torch.no_grad():
        output = open_model(folder)(IDS)
    return output.logits, output.exit_logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["tied", "low_rank", "full"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_written_as_ee_llm_saves_and_read_again(tmp_path: Path, kind: str, head: str, tied: bool):
    src = exit_folder(tmp_path / "src", kind, head, tie_word_embeddings=tied)
    base, exits = logits_of(src)
    config = load_whole(src).config
    own = not (tied and head == "tied")
    for tp, pp in ((2, 2), (1, 4)):
        written = convert(src, tmp_path / f"ee-{tp}-{pp}", "megatron_legacy", tp=tp, pp=pp, vocab_divisor=8)
        back = convert(written, tmp_path / f"back-{tp}-{pp}", "hf", compare=False)
        tensors = {name: TensorFolder(back).read(name) for name in TensorFolder(back).files}
        saved = EELLM(config, (1, 2, 4), kind, untied_exits=own, tp=tp, pp=pp, noisy_padding=False)
        assert set(tensors) == set(random_tensors(config, saved.exits, kind, own))
        same_files(written, saved, tensors)
        check_args(written, saved)
        found_base, found = logits_of(back)
        assert torch.equal(found_base, base)
        for k, value in exits.items():
            torch.testing.assert_close(found[k], value, atol=2e-5 if head == "low_rank" else 0, rtol=0)
    if head == "low_rank":
        check_merged(src, tensors, "model.embed_tokens.weight" if tied else "lm_head.weight")


def check_args(written: Path, saved: EELLM) -> None:
    """EE-LLM would be told the same by both files, and needs nothing but a Namespace to read ours."""
    assert (written / "latest_checkpointed_iteration.txt").read_text() == "1"  # it cannot load "release"
    ours, theirs = None, vars(saved.args())
    for path in files_of(written).values():
        with torch.serialization.safe_globals([type(saved.args())]):
            ours = vars(torch.load(path, weights_only=True)["args"])
    names = set(theirs) - {"model_type", "iteration", "data_path", "exit_layer_weight_init", "norm_epsilon"}
    names -= {"tune_exit_pipeline_parallel_size", "use_dynamic_exit_layer_weight"}  # of training, with defaults
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert ours["norm_epsilon"] == saved.config.rms_norm_eps


def check_merged(src: Path, tensors: Tensors, matrix: str) -> None:
    found = TensorFolder(src)
    for k in (1, 2, 4):
        up, down = (found.read(f"exit_heads.{k}.head.{name}.weight") for name in ("up", "down"))
        merged = found.read(matrix) + up @ down
        torch.testing.assert_close(tensors[f"exit_heads.{k}.head.weight"], merged, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_low_rank_head_is_merged_in_fp32_and_rounded_once(tmp_path: Path, dtype: str):
    """Model and exits in the coarse type: the merged matrix is the only one that is rounded, and verify allows it."""
    coarse = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    src = exit_folder(tmp_path / "src", "norm", "low_rank")
    model = ee_scale.EarlyExitForCausalLM.from_pretrained(src, dtype=coarse)
    model.save_pretrained(tmp_path / "coarse")
    written = convert(tmp_path / "coarse", tmp_path / "ee", "megatron_legacy", tp=2)
    back = TensorFolder(convert(written, tmp_path / "back", "hf"))
    found = TensorFolder(tmp_path / "coarse")
    for k in (1, 2, 4):
        up, down = (found.read(f"exit_heads.{k}.head.{name}.weight").float() for name in ("up", "down"))
        merged = (found.read("lm_head.weight").float() + up @ down).to(coarse)
        assert torch.equal(back.read(f"exit_heads.{k}.head.weight"), merged)


@pytest.mark.parametrize("kind", ["mlp", "layer"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resharding_keeps_the_exits(tmp_path: Path, kind: str, tied: bool):
    """1 x 4 -> 2 x 1 -> 1 x 2, with exits in another order and in front of layers: written in order, behind them."""
    saved = EELLM(ee_config(tie_word_embeddings=tied), (4, 2), kind, pre=kind == "layer", pp=4, untied_exits=not tied)
    src, tensors = built(saved, tmp_path / "ee")
    at = src
    for tp, pp in ((2, 1), (1, 2)):
        at = convert(at, tmp_path / f"ee-{tp}-{pp}", "megatron_legacy", tp=tp, pp=pp, vocab_divisor=8)
        numbers = (2, 4) if kind == "mlp" else (1, 3)
        expected = EELLM(saved.config, numbers, kind, False, not tied, tp, pp, noisy_padding=False)
        same_files(at, expected, tensors)
    same(convert(at, tmp_path / "hf", "hf"), tensors)


@pytest.mark.parametrize("source", ["early_exit", "ee_llm"])
def test_a_sidecar_in_and_out(tmp_path: Path, source: str):
    if source == "early_exit":
        src = exit_folder(tmp_path / "src", "mlp", "low_rank")
        base = tmp_path / "src-base"
        whole = src
    else:
        saved = EELLM(ee_config(), (2, 3), "mlp")
        src, tensors = built(saved, tmp_path / "src")
        base = convert(EELLM(ee_config()).write(tmp_path / "plain", base_of(tensors)), tmp_path / "base", "hf")
        whole = convert(src, tmp_path / "whole", "hf")
    logits, exits = logits_of(whole)
    sidecar = convert(src, tmp_path / "sidecar", "sidecar", model=base)
    assert {path.name for path in sidecar.iterdir()} == {"exits.json", "exits.safetensors", "conversion.json"}
    again = convert(sidecar, tmp_path / "again", "hf")
    for folder in (sidecar, again):
        found, found_exits = logits_of(folder)
        assert torch.equal(found, logits)
        for k, value in exits.items():
            assert torch.equal(found_exits[k], value)
    written = convert(sidecar, tmp_path / "ee", "megatron_legacy", tp=2, pp=2)
    found = logits_of(convert(written, tmp_path / "last", "hf"))[1]
    for k, value in exits.items():
        torch.testing.assert_close(found[k], value, atol=2e-5, rtol=0)
    matrices = load_file(base / "model.safetensors")
    matrices["model.norm.weight"] = matrices["model.norm.weight"] + 1
    save_file(matrices, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="changed since the exits were trained"):
        make_conversion(ConvertConfig(src=sidecar, out=tmp_path / "x", to="hf"))


def test_a_sidecar_needs_exits_and_their_own_base(tmp_path: Path):
    src, other, third = exit_folder(tmp_path / "src", "mlp", "full"), tmp_path / "other", tmp_path / "third"
    for settings, message in (
        ({"src": src}, "to=sidecar: give model=<Hugging Face folder of the base model>"),
        ({"src": tmp_path / "src-base", "model": tmp_path / "src-base"}, "to=sidecar: .*src-base has no exits"),
        ({"src": src, "model": tmp_path / "nowhere"}, "nowhere: no config.json"),
        (
            {"src": src, "model": write_model(other, "llama", num_hidden_layers=3)},
            "other: its tensors have other names",
        ),
        ({"src": src, "model": write_model(third, "llama", 5, num_hidden_layers=4)}, "third: 'model.*' differs from"),
    ):
        with pytest.raises(UserError, match=message):
            make_conversion(ConvertConfig(out=tmp_path / "out", to="sidecar", **settings))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta=500000"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            "rope_type=llama3, factor=8.0: they know linear",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
            "rope_type=linear, factor=2.5: they know linear by a whole factor",
        ),
        ("qwen2", {}, "model_type=qwen2: EE-LLM has Llama's layers"),
        ("qwen3", {}, "model_type=qwen3: EE-LLM has Llama's layers"),
        ("mistral", {}, "sliding_window=8: they have none"),
    ],
)
def test_what_ee_llm_would_compute_otherwise_is_refused(tmp_path: Path, family: str, changes: dict, message: str):
    src = random_exits(tmp_path / "src", family, **changes)
    with pytest.raises(UserError, match=rf"classes=legacy \(also EE-LLM's\): {message}"):
        make_conversion(ConvertConfig(src=src, out=tmp_path / "out", to="megatron_legacy"))
    plain = make_conversion(ConvertConfig(src=src, out=tmp_path / "out", to="hf"))
    assert plain.opened.model.exits.layers == (2,)


def test_shortlist_heads_stay_with_hugging_face(tmp_path: Path):
    """EE-LLM's exits score every token; another folder of the same model has the same exits, verified."""
    src = random_exits(tmp_path / "src", "llama", head="shortlist")
    refused = r"classes=legacy: EE-LLM has no heads of kind 'shortlist' \(shortlist=37 of vocab_size=131\)"
    with pytest.raises(UserError, match=refused):
        make_conversion(ConvertConfig(src=src, out=tmp_path / "out", to="megatron_legacy"))
    again = convert(src, tmp_path / "again", "hf")
    assert open_model(again).exit_spec == open_model(src).exit_spec
    same(again, {name: TensorFolder(src).read(name) for name in TensorFolder(src).files})
    sidecar = convert(src, tmp_path / "sidecar", "sidecar", model=tmp_path / "base")
    assert torch.equal(logits_of(sidecar)[1][2], logits_of(src)[1][2])


def random_exits(folder: Path, family: str, head: str = "full", **changes: Any) -> Path:
    base = write_model(folder.with_name("base"), family, num_hidden_layers=2, **changes)
    untrained_exits(base, spec_of(load_whole(base).config, (2,), "norm", head)).save_pretrained(folder)
    return folder


def test_linear_rope_and_a_mistral_without_a_window_are_written(tmp_path: Path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    for number, (family, changes) in enumerate(
        (("llama", {"rope_parameters": rope}), ("mistral", {"sliding_window": None}))
    ):
        (tmp_path / str(number)).mkdir()
        src = random_exits(tmp_path / str(number) / "src", family, **changes)
        written = convert(src, tmp_path / str(number) / "ee", "megatron_legacy")
        args = torch.load(next(iter(files_of(written).values())), weights_only=False)["args"]
        assert args.rotary_seq_len_interpolation_factor == (2 if family == "llama" else None)
        logits, exits = logits_of(src)
        again, again_exits = logits_of(convert(written, tmp_path / str(number) / "hf", "hf"))
        assert torch.equal(again, logits)
        assert torch.equal(again_exits[2], exits[2])


def test_other_targets_have_no_place_for_exits(tmp_path: Path):
    src, _ = built(EELLM(ee_config(), (2,)), tmp_path / "ee")
    for changes, message in (
        ({"to": "megatron_core"}, "to=megatron_core: Megatron-Core has no exits; use to=megatron_legacy"),
        ({"to": "megatron_legacy", "classes": "core"}, "classes=core: Megatron-Core has no exits"),
        ({"to": "megatron_legacy", "pp": 3}, "pp=3: does not divide num_hidden_layers=4"),
        ({"to": "megatron_legacy", "tp": 8}, "tp=8: classes=legacy needs tp to divide num_key_value_heads=4"),
    ):
        with pytest.raises(UserError, match=message):
            make_conversion(ConvertConfig(src=src, out=tmp_path / "out", **changes))
