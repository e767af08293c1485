"""Bad input of `supernet` and `palette`: one line that names what is wrong, exit code 2, before any rank starts."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ee_scale.cli.main import main


@pytest.fixture
def no_ranks(tmp_path, monkeypatch):
    """An empty working directory, where nothing may start."""
    monkeypatch.chdir(tmp_path)
    for name in ("launching.job.run_ranks", "launching.job.join_grid", "palettes.make.join_grid"):
        monkeypatch.setattr(f"ee_scale.{name}", lambda *_: pytest.fail("a rank was started"))


def refused(arguments: list[str], capsys) -> str:
    """The one line that the command leaves."""
    assert main(arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0].removeprefix("error: ")


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


# -- supernet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=nowhere"], "model.path=nowhere: no such folder"),
        (["data=nothing.txt"], "data.path='nothing.txt': no such file or folder"),
        (["data.valid=nothing.txt"], "data.valid='nothing.txt': no such file or folder"),
        (["task=classify"], "task=classify: 'llama' is trained with task=causal_lm"),
        (["parallel.tp=4"], "parallel.tp=4 does not divide num_key_value_heads=2 of the model"),
        (["parallel.pp=5"], "parallel.pp=5: more stages than the model's 4 layers"),
        (["data.seq_length=65"], "data.seq_length=65 is above the model's max_position_embeddings=64"),
        (["space.heads=0.5"], "space.heads: Invalid value assigned"),
        (["space.hidden=[abc]"], "space.hidden: 'abc' is no number"),
        (["space.hidden=[0.5,2.0]"], "space.hidden: 2.0 is no fraction of the full 128"),
        (["stages=[{name: a}]"], "missing value: stages[0].steps"),
        (["recipe=none"], "recipe=none: no such file or folder, and no option of configs/recipe (mlfs, one_stage"),
        (["exits.layers=[1]"], "unknown key 'exits'; did you mean space.exits?"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9]: two numbers in [0, 1)"),
        (["out=file/run"], "out=file/run: cannot write there (Not a directory)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_supernet_refuses(no_ranks, supernet_arguments, capsys, overrides, message):
    Path("file").write_text("")
    assert refused([*supernet_arguments, "out=run", *overrides], capsys).startswith(message)


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (
            [{"text": "a", "label": 1}, {"text": "b"}],
            [],
            "data.path='odd.jsonl' line 2: no field 'label' (fields: text)",
        ),
        ([{"text": "a", "label": "x"}] * 3, [], "data.path=odd.jsonl: one class (x); a classifier needs two"),
        (
            [{"sentence": "a", "label": 1}],
            [],
            "data.path='odd.jsonl' line 1: no field 'text' (fields: label, sentence)",
        ),
        ([{"text": "a", "label": 0.5}], [], "data.path='odd.jsonl' line 1: field 'label' is not a string"),
        ([{"text": " ", "label": 1}], [], "data.path='odd.jsonl' line 1: field 'text' is empty"),
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": 2}],
            ["data.pair_key=other"],
            "data.path='odd.jsonl' line 1: no field 'other'",
        ),
        (None, ["data=[a.jsonl,b.jsonl]"], "data.path=['a.jsonl', 'b.jsonl']: labelled data is one file"),
        (None, ["data.valid=odd.jsonl"], "data.valid='odd.jsonl': no such file"),
    ],
)
def test_labelled_data_is_checked(no_ranks, classify_arguments, capsys, rows, overrides, message):
    given = [*classify_arguments, "out=run"]
    if rows is not None:
        write_lines(Path("odd.jsonl"), rows)
        given.append("data=odd.jsonl")
    if "data.pair_key=other" in overrides:
        given.append("data.valid=null")
    assert refused([*given, *overrides], capsys).startswith(message)


def test_an_unknown_label_in_the_held_out_data(no_ranks, classify_arguments, capsys):
    write_lines(Path("valid.jsonl"), [{"text": "ship", "label": "lake"}])
    line = refused([*classify_arguments, "out=run", "data.valid=valid.jsonl"], capsys)
    assert "valid.jsonl': label 'lake' is not in the training data (3 classes: hill, sea, town)" in line


def test_other_classes_are_another_run(no_ranks, classify_run, classify_arguments, labelled, capsys):
    shutil.copytree(classify_run, "run")
    path, text = labelled["train"], labelled["train"].read_text()
    given = [*classify_arguments, "out=run", "data.valid=null"]
    try:
        path.write_text(text.replace('"town"', '"city"'))
        line = refused(given, capsys)
    finally:
        path.write_text(text)
    assert "(labels=['hill', 'sea', 'town'] there, ['city', 'hill', 'sea'] here)" in line
    shutil.copyfile(path, "train.jsonl")
    assert "(data.path=" in refused([*given, "data=train.jsonl"], capsys)


def unfinished(supernet_run: Path) -> Path:
    """A copy of the run that has two steps to go."""
    shutil.copytree(supernet_run, "run")
    shutil.rmtree("run/checkpoints/step_00000010")
    return Path("run")


def test_a_damaged_order_or_checkpoint_is_refused_by_name(no_ranks, supernet_run, supernet_arguments, capsys):
    run, given = unfinished(supernet_run), [*supernet_arguments, "out=run"]
    order, whole = run / "order.safetensors", (run / "order.safetensors").read_bytes()
    order.write_bytes(whole[:-9])
    assert refused(given, capsys).startswith("run/order.safetensors: not a whole file of unit orders")
    tensors = load_file(supernet_run / "order.safetensors")
    tensors["ffn"][0, 0] = tensors["ffn"][0, 1]
    save_file(tensors, order)
    assert refused(given, capsys).startswith("run/order.safetensors: 'ffn' is no order of this model's units")
    order.unlink()
    assert refused(given, capsys).startswith("run/order.safetensors: missing; the checkpoints beside it mean nothing")
    order.write_bytes(whole)
    factors = run / "checkpoints" / "step_00000008" / "factors_000.safetensors"
    factors.write_bytes(factors.read_bytes()[:-1] + b"\0")
    assert "step_00000008/factors_000.safetensors: its content does not match its digest" in refused(given, capsys)


# -- palette -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["count=0"], "count=0: must be at least 1"),
        (["trials=0"], "trials=0: must be at least 1"),
        (["samples=-1"], "samples=-1, seconds=2.0: must be at least 0 and above 0"),
        (["step=5"], "step=5: "),
        (
            ["tokens=60", "new_tokens=8"],
            "tokens=60 and new_tokens=8: the model reads at most max_position_embeddings=64",
        ),
        (["data=nothing.txt"], "data='nothing.txt': no such file or folder"),
        (["objective=size"], "objective=size: choose one of params, flops, latency_ms, memory_mb"),
        (["src=nowhere"], "src=nowhere: no run.json in it; give the output folder of ee-scale supernet"),
        (["out=there"], "out=there: exists already; choose another folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_palette_refuses(no_ranks, supernet_run, capsys, overrides, message):
    Path("there").mkdir()
    given = ["palette", f"src={supernet_run}", "out=made", "tokens=16", "new_tokens=2"]
    assert refused([*given, *overrides], capsys).startswith(message)
    assert {path.name for path in Path().iterdir()} == {"there"}


def test_a_run_of_another_kind_or_without_held_out_data(no_ranks, finished_run, supernet_run, capsys):
    given = ["palette", "out=made", "tokens=16", "new_tokens=2"]
    line = refused([*given, f"src={finished_run}"], capsys)
    assert line == f"src={finished_run}: a run of ee-scale tune; one of ee-scale supernet is wanted"
    run = unfinished(supernet_run)
    config = (run / "config.yaml").read_text()
    lines = [line for line in config.splitlines() if not line.strip().startswith("valid:")]
    (run / "config.yaml").write_text("\n".join(lines))
    assert refused([*given, "src=run"], capsys).startswith("data: the run has no data.valid; give data=<held-out file>")
    (run / "config.yaml").write_text(config.replace("kl_weight", "kl_wait"))
    assert refused([*given, "src=run"], capsys).startswith("run/config.yaml: not the config of a supernet run (")
    (run / "config.yaml").unlink()
    assert refused([*given, "src=run"], capsys).startswith("run/config.yaml: not the config of a supernet run (")


def test_a_damaged_run_gives_no_palette(no_ranks, supernet_run, capsys):
    run, given = unfinished(supernet_run), ["palette", "src=run", "out=made", "tokens=16", "new_tokens=2"]
    (run / "order.safetensors").write_bytes(b"torn")
    assert refused(given, capsys).startswith("run/order.safetensors: not a whole file of unit orders")
    factors = run / "checkpoints" / "step_00000008" / "factors_000.safetensors"
    factors.unlink()
    assert refused(given, capsys).endswith("step_00000008/factors_000.safetensors: missing")
    shutil.rmtree(run / "checkpoints")
    assert refused(given, capsys).startswith("src=run: no finished checkpoint in it yet")
    assert not Path("made").exists()


def test_a_changed_base_model_is_refused(no_ranks, supernet_run, model_dir, capsys):
    run = unfinished(supernet_run)
    shutil.copytree(model_dir, "base")
    from ee_scale.reading import read_json, write_json

    identity = read_json(run / "run.json") | {"base_model": str(Path("base").resolve())}
    write_json(run / "run.json", identity)
    weights = Path("base/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    given = ["palette", "src=run", "out=made", "tokens=16", "new_tokens=2"]
    assert "base changed since the supernet was trained" in refused(given, capsys)
    shutil.rmtree("base")
    assert "is not there any more" in refused(given, capsys)
