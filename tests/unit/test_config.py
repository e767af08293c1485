"""Composition, help and the checks that need no model."""

from dataclasses import asdict

import pytest
import yaml

from ee_scale.cli.main import main
from ee_scale.config.checks import check_batch, check_supernet, check_tune
from ee_scale.config.compose import compose_config, config_dir, from_yaml, group_options, known_keys, to_yaml
from ee_scale.config.schema import PREFIXES, VERBS
from ee_scale.errors import UserError

GIVEN = ["model=m", "data=d.txt"]
CHECKS = {"tune": check_tune, "supernet": check_supernet}
OPTIONS = [
    (verb, group, option) for verb in CHECKS for group, options in group_options(verb).items() for option in options
]


@pytest.mark.parametrize(("verb", "group", "option"), OPTIONS)
def test_every_shipped_config_composes_and_passes_the_checks(verb: str, group: str, option: str):
    given = [] if group == "debug" else [item for item in GIVEN if not item.startswith(f"{group}=")]
    if (group, option) in (("model", "hf"), ("data", "text")):
        given.append(f"{group}.path=x")
    override = f"+debug={option}" if group == "debug" else f"{group}={option}"
    config = compose_config(verb, [*given, override])
    CHECKS[verb](config)
    assert to_yaml(config)


def test_no_shipped_config_is_left_out():
    shipped = {(path.parent.name, path.stem) for path in config_dir().rglob("*.yaml") if path.parent != config_dir()}
    assert {(group, option) for _, group, option in OPTIONS} == shipped


def test_help_lists_the_groups_of_the_verb_alone(capsys):
    groups = {verb: group_options(verb) for verb in CHECKS}
    assert {"backbone", "exits", "train"} == set(groups["tune"]) - set(groups["supernet"])
    assert {"space", "recipe"} == set(groups["supernet"]) - set(groups["tune"])
    assert groups["tune"]["debug"] == ["cpu", "single_gpu"]
    assert groups["supernet"]["debug"] == ["supernet_cpu"]
    assert groups["supernet"]["recipe"] == ["mlfs", "one_stage", "paper", "pretrained"]
    for verb, options in groups.items():
        assert main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        lines = shown.partition("Ready-made groups")[2].partition("setting")[0].splitlines()[1:]
        said = [line.strip() for line in lines if line.strip()]
        assert said == [f"{'+' * (name == 'debug')}{name}={' '.join(found)}" for name, found in options.items()]


@pytest.mark.parametrize("path", ["/a b/c", "a=b", "../x(1)", "C:\\x y'z", "~/m", "a,b", "org/name"])
def test_paths_survive_hydras_grammar(path: str):
    config = compose_config("tune", [f"model={path}", f"data={path}", f"out={path}"])
    assert (config.model.path, config.data.path, config.out) == (path, path, path)


def test_a_list_of_data_stays_a_list():
    assert list(compose_config("tune", ["model=m", "data=[a.txt,b.txt]"]).data.path) == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*GIVEN, "exits.layer=[3]"], "unknown key 'exits.layer'; did you mean exits.layers?"),
        ([*GIVEN, "nonsense=3"], "unknown key 'nonsense'; see ee-scale tune --help"),
        (["model=m"], "missing value: data (give key=value)"),
        ([*GIVEN, "parallel.tp=abc"], "parallel.tp: Value 'abc' of type 'str' could not be converted to Integer"),
        ([*GIVEN, "exits.kind=mlpx"], "exits.kind=mlpx: choose one of embedding, norm, mlp, layer"),
        ([*GIVEN, "exits=papers"], "exits=papers: no such file or folder, and no option of configs/exits"),
        ([*GIVEN, "word"], "argument 'word' is not of the form key=value"),
        ([*GIVEN, "exits.layers=[3,6"], "cannot read argument 'exits.layers=[3,6'"),
        ([*GIVEN, "+debug=none"], "debug=none: no such file or folder, and no option of configs/debug"),
    ],
)
def test_bad_overrides_are_one_line_with_exit_code_2(overrides, message, capsys):
    assert main(["tune", *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tp=0", "parallel.tp=0: must be at least 1"),
        ("train.zero=2", "train.zero=2: exits train under ZeRO-1"),
        ("optim.min_lr=1", "optim.min_lr=1.0 is above optim.lr=0.0001"),
        ("optim.warmup_fraction=1", "optim.warmup_fraction=1.0: must be in [0, 1)"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: two numbers in [0, 1)"),
        ("train.micro_batch_size=3", "train.global_batch_size=16 is not a multiple of"),
        ("exits.kl_temperature=0", "exits.kl_temperature=0.0: must be above 0"),
        ("logging.peak_tflops=0", "logging.peak_tflops=0.0: must be above 0"),
        ("parallel.device_memory_gb=-1", "parallel.device_memory_gb=-1.0: must be above 0"),
        ("parallel.timeout_minutes=0", "parallel.timeout_minutes=0.0: must be above 0"),
        ("train.max_skipped=0", "train.max_skipped=0: must be at least 1"),
        ("train.spike_factor=-1", "train.spike_factor=-1.0: must be at least 0"),
        ("backbone.rank=0", "backbone.rank=0: must be at least 1"),
    ],
)
def test_checks_between_fields_name_the_numbers(override, message):
    with pytest.raises(UserError) as error:
        check_tune(compose_config("tune", [*GIVEN, override]))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("verb", "given", "word"), [("tune", GIVEN, "train.zero=1"), ("generate", ["model=m", "prompt=p"], "parallel.dp=1")]
)
def test_settings_of_earlier_versions_with_one_legal_value(verb, given, word):
    """A command line and a stored config that name it mean what they meant; any other value is refused in one line."""
    config = compose_config(verb, given)
    assert compose_config(verb, [*given, word]) == compose_config(verb, [*given, f"+{word}"]) == config
    key = word.removesuffix("=1")
    with pytest.raises(UserError, match=rf"^{key}=2: \w+"):
        compose_config(verb, [*given, f"{key}=2"])
    group, name = key.split(".")
    values = asdict(config)
    for number in (1, 2):
        values[group][name] = number
        if number == 1:
            assert from_yaml(VERBS[verb], yaml.safe_dump(values)) == config
        else:
            with pytest.raises(UserError, match=f"^{key}=2: "):
                from_yaml(VERBS[verb], yaml.safe_dump(values))


def test_micro_batches():
    assert check_batch(16, 2, 4) == 2


def test_every_setting_has_a_help_line_and_shows_it(capsys):
    for verb, schema in VERBS.items():
        assert main([verb, "--help"]) == 0
        shown = "".join(capsys.readouterr().out.split())
        assert "--configFILE" in shown
        for key in known_keys(schema):
            group = schema.__dataclass_fields__.get(key)
            if group is None or "help" in group.metadata:
                assert key in shown, f"{verb}: {key}"


def test_help_and_unknown_command(capsys):
    assert main([]) == 0
    assert "tune" in capsys.readouterr().out
    assert main(["tunes"]) == 2
    assert (
        capsys.readouterr().err == f"error: unknown command 'tunes'; choose one of {', '.join([*VERBS, *PREFIXES])}\n"
    )


def test_cfg_prints_the_resolved_config(capsys):
    assert main(["tune", *GIVEN, "parallel.tp=4", "--cfg", "job"]) == 0
    assert "tp: 4" in capsys.readouterr().out
