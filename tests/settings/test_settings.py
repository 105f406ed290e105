import os
import re
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from free_transformer import FreeTransformerConfig
from free_transformer.settings import (
    ModelSettings,
    Settings,
    SettingsError,
    StageSettings,
    common_settings,
    describe_settings,
    load_settings,
    parse_settings,
    settings_warnings,
)
from free_transformer.settings.yaml_text import YamlError, dump_yaml, load_yaml, split_yaml_list

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SECTIONS = ["model", "training", "data", "logging", "distributed"]
LOOKS_LIKE_ANOTHER_TYPE = [
    *(
        "0100",
        "1e3",
        "1e-3",
        "yes",
        "no",
        "on",
        "y",
        "null",
        "~",
        "true",
        "1:30",
        "2026-11-27",
        "0x1f",
        "1_000",
        ".inf",
    ),
    *(
        "",
        " ",
        "[a",
        "{a",
        "- a",
        "a: b",
        "#a",
        "a #b",
        "&a",
        "*a",
        "!a",
        "%a",
        "@a",
        "'",
        '"',
        "=",
        "<<",
        "---",
        "...",
    ),
    *("é", "計画", "\x85", "\u2028", "\ufeff", "a\nb", "a\n", "\t", "😀", "\udc80", "x" * 200, "x " * 200),
]
# surrogates beyond those of undecodable file names cannot be written to a file
TEXT = st.sampled_from(LOOKS_LIKE_ANOTHER_TYPE) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(SCALARS, lambda each: st.lists(each, max_size=3) | st.dictionaries(TEXT, each, max_size=3))


@pytest.fixture
def load(tmp_path):
    """Settings of a file with this text, `load("training: {max_steps: 3}", "model.latent_dim=4", ...)`."""

    def build(text: str, *overrides: str) -> Settings:
        (tmp_path / "config.yaml").write_text(text)
        return load_settings(tmp_path / "config.yaml", list(overrides))

    return build


def refused(message: str):
    return pytest.raises(SettingsError, match=message)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_file_of_settings_loads(path):
    settings = load_settings(path)
    assert settings.data.train
    settings.model.build(vocab_size=259)


def test_there_are_shipped_files_of_settings():
    assert {"free_transformer.yaml", "baseline.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("training.learning_rat", "learning_rate"),
        ("training.max_step", "max_steps"),
        ("data.tokeniser", "tokenizer"),
        ("logging.tensorbord", "tensorboard"),
        ("distributed.fdsp", "fsdp"),
        ("model.latent_dims", "latent_dim"),
        ("model.rms_norm_epsilon", "rms_norm_eps"),
        ("trainning", "training"),
        ("run_dirs", "run_dir"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(load, name, near):
    last = name.rpartition(".")[2]
    for text, overrides in (("run_dir: x", [f"{name}=1"]), (yaml.safe_dump(nested(name, 1)), [])):
        with refused(f"unknown setting '(.*\\.)?{last}': did you mean '{near}'") as error:
            load(text, *overrides)
        assert "\n" not in str(error.value)


def nested(name: str, value: object) -> dict:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("name", ["training.interval", "interval", "function", "logging.literal", "data.int"])
def test_an_unknown_name_that_looks_like_a_type_is_refused_by_its_name(load, name):
    with refused(f"unknown setting '{name}'"):
        load(f"run_dir: x\n{yaml.safe_dump(nested(name, 3))}")


def test_an_unknown_name_like_no_other_is_refused_with_all_that_are_known(load):
    known = "tensorboard, wandb, trackio, project, sample_every, sample_tokens"
    with refused(f"unknown setting 'logging.xyzzy': known settings are {known}"):
        load("logging: {xyzzy: 1}")


@pytest.mark.parametrize(
    "override",
    [
        "training.max_steps=many",
        "training.max_steps=2.5",
        "training.batch_size=many",
        "training.max_steps=[1]",
        "training.learning_rate=fast",
        "training.compile=perhaps",
        "optimizer.name=sgd",
        "training.precision=int8",
        "training.resume=perhaps",
        "model.kind=llama",
        "model.plan_span=word",
        "model.sliding_window=2.5",
        "model.sliding_window=true",
        "data.train=[1]",
        "data.train={a: fast}",
        "data.column=3",
        "logging.sample_every=often",
        "training=5",
        "run_dir=[a]",
    ],
)
def test_a_wrong_type_is_refused_with_its_name_and_value(load, override):
    name, _, value = override.partition("=")
    with refused(rf"config\.yaml: {name}(\.0|\.a)?=") as error:
        load("run_dir: x", override)
    assert value.strip("[]{}").split(": ")[-1] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("training.max_steps=0", "greater than or equal to 1"),
        ("training.batch_size=-1", "greater than or equal to 1"),
        ("training.seq_len=1", "greater than or equal to 2"),
        ("training.learning_rate=0", "greater than 0"),
        ("optimizer.min_lr_ratio=1.5", "less than or equal to 1"),
        ("training.kl_weight=-0.5", "greater than or equal to 0"),
        ("checkpoint.save_total=0", "greater than or equal to 1"),
        ("training.seed=-1", "training.seed=-1: must be greater than or equal to 0 and less than or equal to 92233720"),
        ("training.seed=9223372036854775808", "training.seed=9223372036854775808: must be"),
        ("training.batch_size=0", "batch_size=0: must be greater than or equal to 1 or 'auto'; the default is 32"),
        ("data.max_bad_rows=-1", "max_bad_rows=-1: must be greater than or equal to 0; the default is 100"),
        ("data.train={a: 0}", "data.train.a=0: must be greater than 0"),
        ("model.latent_dim=0", "greater than or equal to 1"),
        ("model.free_bits=-1", "greater than or equal to 0"),
        ("model.plan_span=0", "plan_span=0: a number of tokens, at least 1, or 'sequence'"),
        ("model.sliding_window=0", "sliding_window=0: must be greater than or equal to 1"),
        ("model.hidden_dim=30", "hidden_dim=30 is not a multiple of num_heads=4"),
        ("model.num_heads=256", "even size"),
        ("model.code_bits=21", "code_bits=21: 1 to 20"),
        ("model.injection_layers=[0]", r"injection_layers=\[0\]: layers from 3 to 5"),
        ("distributed.data=0", "greater than or equal to 1"),
        ("distributed.data=all", "data='all': must be an integer or 'auto'"),
        ("distributed.tensor=0", "greater than or equal to 1"),
        ("distributed.timeout=0", "greater than 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_allowed(load, override, allowed):
    with refused(allowed) as error:
        load("run_dir: x", override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("override", "other"), [("kl_weight=0.5", "kl_weight"), ("vocab_size=9", "tokenizer")])
def test_what_another_setting_decides_is_refused_by_its_name(load, override, other):
    with refused(rf"model.{override}: determined by \S*{other}"):
        load("run_dir: x", f"model.{override}")


@pytest.mark.parametrize("rate", [".nan", ".inf"])
def test_a_rate_that_is_no_number_is_refused(load, rate):
    with refused("training.learning_rate"):
        load("run_dir: x", f"training.learning_rate={rate}")


def test_a_precision_of_another_name_is_refused_with_those_there_are(load):
    with refused(r"training\.precision='float16': must be 'fp32', 'bf16', 'fp16' or 'auto'; the default"):
        load("run_dir: x", "training.precision=float16")


def test_all_that_is_wrong_is_named_at_once(load):
    with refused(r"training\.max_steps.*; .*data\.colum"):
        load("training: {max_steps: many}\ndata: {colum: a}")


def test_overrides_are_yaml_values_over_those_of_the_file(load):
    settings = load(
        "training: {max_steps: 3, batch_size: 7}",
        "training.max_steps=5",
        "training.learning_rate=1e-3",
        "training.gradient_checkpointing=true",
        "model.plan_span=16",
        "model.rope_theta=500.0",
        "data.train=[a.txt, b.txt]",
        "data.validation=c.txt",
        "run_dir=runs/x",
    )
    training = settings.training
    assert (training.max_steps, training.batch_size, training.learning_rate) == (5, 7, 1e-3)
    assert training.gradient_checkpointing is True
    assert settings.model.plan_span == 16
    assert (settings.data.train, settings.data.validation) == (["a.txt", "b.txt"], ["c.txt"])
    assert settings.run_dir == Path("runs/x")
    assert load("run_dir: x", "model.plan_span=sequence").model.plan_span == "sequence"
    assert load("run_dir: x", "model.sliding_window=64").model.build().sliding_window == 64


@pytest.mark.parametrize("name", ["rms_norm_eps", "free_bits", "dropout", "initializer_range"])
@pytest.mark.parametrize("value", ["1e-3", "1.0e-3", "0.001"])
def test_a_number_with_an_exponent_is_a_number_for_every_setting_of_the_model(load, name, value):
    """YAML 1.1 takes 1e-3 for a word."""
    settings = load("run_dir: x", f"model.{name}={value}")
    assert getattr(settings.model.build(), name) == 0.001


def test_an_override_reaches_below_a_section_that_is_nested_or_missing_or_empty(load):
    parameters = load("run_dir: x", "model.rope_parameters.rope_type=linear", "model.rope_parameters.factor=2.0").model
    assert parameters.model_extra["rope_parameters"] == {"rope_type": "linear", "factor": 2.0}
    assert load("training:\nrun_dir: x", "training.max_steps=3").training.max_steps == 3


def test_an_override_that_holds_an_equals_sign_keeps_it(load):
    assert load("run_dir: x", "data.column=a=b").data.column == "a=b"


@pytest.mark.parametrize("override", ["training.max_steps", "=3", "nonsense", "training.=3", ".seed=3"])
def test_what_is_no_override_is_refused(load, override):
    with refused(r"an override needs the form section\.name=value"):
        load("run_dir: x", override)


def test_an_override_whose_value_is_no_yaml_is_refused(load):
    with refused(r"'data.train=\[a': not YAML: line 1, column 3: expected ',' or '\]'"):
        load("run_dir: x", "data.train=[a")


def test_an_override_below_a_setting_is_refused(load):
    with refused("'max_steps' is a setting, not a section"):
        load("training: {max_steps: 3}", "training.max_steps.a=3")


@pytest.mark.parametrize("text", ["just words", "- a\n- b", "3"])
def test_a_file_without_sections_is_refused(load, text):
    with refused(r"config\.yaml: not a settings file; give a YAML file with sections of settings"):
        load(text)


@pytest.mark.parametrize("text", ["model: [", "a: b: c", "\tx: 1"])
def test_a_file_that_is_no_yaml_is_refused_in_one_line(load, text):
    with refused(r"config\.yaml: not YAML") as error:
        load(text)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    with refused(r"nowhere\.yaml: no such file"):
        load_settings(tmp_path / "nowhere.yaml")
    with refused("a folder, not a file; give a YAML file with sections of settings"):
        load_settings(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with refused(r"binary\.yaml: cannot be read as text .*; give a YAML file with sections of settings"):
        load_settings(tmp_path / "binary.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_settings_written_down_come_back_the_same(load, path):
    settings = load_settings(path, ["model.rope_theta=500.0", "training.learning_rate=1e-5", "model.plan_span=3"])
    assert load(settings.to_yaml()) == settings
    assert load(Settings().to_yaml()) == Settings()


def test_the_defaults_describe_a_model():
    config = Settings().model.build()
    assert (config.hidden_size, config.num_hidden_layers, config.latent_dim) == (256, 6, 8)
    assert config.plan_span == "sequence"
    assert (config.free_bits, config.min_bits, config.aggregate_weight) == (2.5, 2.0, 1.0)
    assert config.to_dict() == FreeTransformerConfig(vocab_size=config.vocab_size).to_dict()


def test_the_preset_of_the_paper_is_that_of_python():
    config = parse_settings({"model": {"preset": "paper"}}).model.build()
    assert config.to_dict() == FreeTransformerConfig.paper(vocab_size=config.vocab_size).to_dict()
    assert (config.latent_dim, config.plan_span, config.min_bits, config.aggregate_weight) == (16, 1, 0, 0)
    assert parse_settings({"model": {"preset": "paper", "latent_dim": 12}}).model.latent_dim == 12


@pytest.mark.parametrize("model", [{"plan_span": 4}, {"free_bits": 0.5}, {"latent_dim": 1}, {"plan_span": "sequence"}])
def test_defaults_of_the_objective_fit_the_plan(model):
    settings = parse_settings({"model": model}).model
    config = FreeTransformerConfig(**model)
    for name in ("free_bits", "min_bits", "aggregate_weight"):
        assert getattr(settings, name) == getattr(config, name)
    assert config.min_bits <= min(config.free_bits, config.latent_dim)
    assert (config.aggregate_weight == 1) == (config.plan_span == "sequence")


def test_changing_a_setting_in_python_is_checked_too():
    settings = parse_settings({})
    with pytest.raises(ValueError):
        settings.training.max_steps = "many"
    with pytest.raises(ValueError):
        settings.training.batch_size = 0


def test_settings_of_one_run_are_not_those_of_another():
    one, other = parse_settings({}), parse_settings({})
    one.data.train.append("a")
    one.training.max_steps = 7
    assert other.data.train == Settings().data.train == []
    assert other.training.max_steps == Settings().training.max_steps == 1000


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_described_with_its_default(section):
    fields = Settings.model_fields[section].annotation.model_fields
    described = {each.name: each for each in describe_settings()[section]}
    for name, field in fields.items():
        found = described[f"{section}.{name}"]
        assert found.text and found.text == field.description
        default = field.get_default(call_default_factory=True)
        read_back = load_yaml(found.default) if not isinstance(default, str) else found.default
        assert read_back == (default if isinstance(default, str | int | float | None) else load_yaml(str(default)))


def test_the_folder_of_the_run_is_described():
    (found,) = describe_settings()["run"]
    assert (found.name, found.default, found.text) == ("run_dir", "runs/free-transformer", "Folder of the run.")


def test_ten_settings_are_common():
    assert len(common_settings()) == len({each.name for each in common_settings()}) == 10


@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_dumped_yaml_loads_to_equal_values_in_equal_order(values):
    text = dump_yaml(values)
    assert load_yaml(text) == values
    assert list(load_yaml(text)) == list(values)


@pytest.mark.parametrize("text", LOOKS_LIKE_ANOTHER_TYPE)
def test_dumped_text_is_read_as_text_by_yaml_1_1_too(text):
    if text not in ("\x85", "\udc80"):  # PyYAML refuses these characters
        assert yaml.safe_load(dump_yaml({"a": text, "b": 1e-5})) == {"a": text, "b": 1e-5}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0100", 100), ("-0100", -100), ("08", 8), ("0o17", 15), ("0x1f", 31), ("1_000", 1000), ("1e-3", 0.001)),
        *((".5", 0.5), ("1E3", 1000.0), ("true", True), ("yes", "yes"), ("1:30", "1:30"), ("~", None), ("", None)),
        *(("2026-11-27", "2026-11-27"), ("2026-11-27T10:00:00Z", "2026-11-27T10:00:00Z"), ("!!str 5", "5")),
        *(("{a: &x [1], b: *x}", {"a": [1], "b": [1]}), ("{a: &x 1, b: &x 2, c: *x}", {"a": 1, "b": 2, "c": 2})),
        ("{<<: [{a: 1}, {a: 2, b: 3}], c: 4}", {"a": 1, "b": 3, "c": 4}),
        ("{<<: {a: 1}, a: 5}", {"a": 5}),
    ],
)
def test_values_are_those_of_yaml_1_2(text, value):
    assert load_yaml(text) == value
    assert type(load_yaml(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "^line 3: a is set twice; keep one$"),
        ("{a: 1, a: 1}", "^line 1: a is set twice; keep one$"),
        ("a:\n- b: {c: 1,\n   c: 2}", "^line 3: c is set twice"),
        ("1: a\n0x1: b", "^line 2: 1 is set twice"),
        ("<<: {a: 1}\n<<: {b: 1}", "^line 2: a key is set twice"),
        ("a: b: c", "^not YAML: line 1, column 5: mapping values are not allowed here; put text with special"),
        ("a:\n\tb: 1", "^not YAML: line 2, column 1: "),
        ("a: 'b", "^not YAML: line 1, column 6: "),
        ("a: [*b]", "^not YAML: line 1, column 5: found undefined alias 'b'"),
        ("a: 1\n---\nb: 2", "^not YAML: line 2, column 1: but found another document"),
        ("a: 1\nb: \x01", "^not YAML: unacceptable character #x0001"),
        ("a: !new 1", "^not YAML: line 1, .* tag '!new'"),
        ("a: !!python/object:os.system x", "^not YAML: line 1, .*python/object:os.system"),
        ("a: !!timestamp [b]", "^not YAML: line 1, .*expected a scalar"),
        ("a: !!int b", "^not YAML: invalid literal for int.*'b'"),
        ("a: " + "9" * 5000, "^not YAML: Exceeds the limit"),
        ("%YAML 1.1\n---\na: 010", "^%YAML: settings are read as YAML 1.2; remove this line$"),
        ("[" * 5000, "^not YAML: lists or mappings are nested too deeply$"),
    ],
)
def test_text_that_is_not_yaml_is_refused_in_one_line(text, message):
    with pytest.raises(YamlError, match=message) as error:
        load_yaml(text)
    assert "\n" not in str(error.value) and "http" not in str(error.value) and len(str(error.value)) < 200


@given(st.lists(st.from_regex(r"[a-z0-9]+|'[a-z,\]]*'|\[[0-9],[0-9]\]", fullmatch=True)))
def test_items_of_a_list_stay_as_they_are_written(items):
    assert split_yaml_list(", ".join(items)) == items


@pytest.mark.parametrize("text", ["8,,9", ",8", "[a", "'a", "1],[2", "1] #", "a]"])
def test_list_that_cannot_be_split_is_refused(text):
    with pytest.raises(YamlError, match=r"^not YAML: "):
        split_yaml_list(text)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("training: {max_steps: 10, max_steps: 20}", [], r"config\.yaml: line 1: max_steps is set twice"),
        (
            "training: {max_steps: 10}\ntraining: {seed: 3}",
            [],
            "line 2: training is set twice; keep one",
        ),
        ("run_dir: x", ["training={seed: 1, seed: 2}"], "'training=.*': line 1: seed is set twice"),
        (
            "run_dir: x",
            ["training.seed=1", "training.seed=2"],
            "training.seed=1 and training.seed=2: training.seed is given twice",
        ),
        (
            "run_dir: x",
            ["run_dir=a", "training.seed=1", "run_dir=b"],
            "run_dir=a and run_dir=b: run_dir is given twice",
        ),
        ("run_dir: x", ["training.seed=1", "training.seed=true"], "training.seed is given twice"),
        ("run_dir: x", ["training={seed: 1}", "training.seed=2"], "training.seed is given twice"),
        (
            "training: {keep_checkpoints: 3, save_total: 4}",
            [],
            "save_total are two names of one setting",
        ),
        (
            "run_dir: x",
            ["checkpoint.save_total=3", "training.keep_checkpoints=3"],
            "checkpoint.save_total is given twice",
        ),
        ("model: {num_hidden_layers: 3, num_layers: 3}", [], "model: num_hidden_layers and num_layers are two names"),
        ("model: {num_kv_heads: 2, num_key_value_heads: 2}", [], "num_kv_heads and num_key_value_heads are two names"),
        ("run_dir: x", ["model.hidden_dim=32", "model.hidden_size=64"], "model.hidden_dim is given twice"),
        ("run_dir: x", ["data.column='a\n\nb'", "data.column=c"], "data.column is given twice"),
        ("run_dir: x", ["model={hidden_dim: 32, hidden_size: 64}"], "hidden_dim and hidden_size are two names"),
    ],
)
def test_setting_given_twice_is_refused(load, text, overrides, message):
    with refused(message) as error:
        load(text, *overrides)
    assert "\n" not in str(error.value)


def test_same_override_with_the_same_value_is_accepted(load):
    assert load("run_dir: x", "training.seed=1", "training.seed=1").training.seed == 1
    assert load("run_dir: x", "training={max_steps: 3}", "training.seed=4").training.seed == 4
    assert load("run_dir: x", "training.seed=4", "training={max_steps: 3}").training.seed == 4
    assert load("run_dir: x", "training={max_steps: 3}", "training.max_steps=3").training.max_steps == 3


def test_two_names_of_one_setting_mean_the_same(load):
    settings = load("training: {keep_checkpoints: 3}\nmodel: {num_hidden_layers: 8, num_key_value_heads: 2}")
    assert (settings.checkpoint.save_total, settings.model.num_layers) == (3, 8)
    config = settings.model.build()
    assert (config.num_hidden_layers, config.num_key_value_heads) == (8, 2)
    assert load(settings.to_yaml()) == settings


def test_override_by_another_name_wins_over_the_file(load):
    text = "training: {keep_checkpoints: 3}\nmodel: {num_hidden_layers: 8, ffn_hidden_dim: 64}"
    settings = load(text, "checkpoint.save_total=5", "model.num_layers=4", "model.intermediate_size=32")
    assert (settings.checkpoint.save_total, settings.model.num_layers) == (5, 4)
    assert settings.model.build().intermediate_size == 32


def test_override_leaves_the_other_uses_of_an_alias_alone(load):
    settings = load(
        "model: {rope_parameters: &rope {rope_type: linear, factor: 2.0}, rope_scaling: *rope}",
        "model.rope_parameters.factor=4.0",
    )
    assert settings.model.model_extra["rope_parameters"]["factor"] == 4.0
    assert settings.model.model_extra["rope_scaling"]["factor"] == 2.0


@pytest.mark.parametrize("text", ["", "# nothing", "---", *(f"{section}:\n  # a: 1" for section in SECTIONS)])
def test_empty_file_or_section_has_its_defaults(load, text):
    assert load(text) == Settings()


def test_empty_stage_has_the_settings_of_the_run(load):
    settings = load("training: {max_steps: 4, stages: [{steps: 2}, null]}")
    assert settings.curriculum.stages == [StageSettings(steps=2), StageSettings()]


@pytest.mark.parametrize("name", ["training.max_steps", "data.train", "run_dir", "logging.project", "model.latent_dim"])
def test_empty_value_of_a_setting_is_refused_by_its_name(load, name):
    for text, overrides in ((yaml.safe_dump(nested(name, None)), []), ("run_dir: x", [f"{name}="])):
        with refused(rf"config\.yaml: {name}: is empty; give it a value, or remove it") as error:
            load(text, *overrides)
        assert "\n" not in str(error.value)


def test_null_is_a_value_of_a_setting_that_may_be_none(load):
    assert load("model: {pretrained: null}\ntraining: {plan_learning_rate: null}") == Settings()


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("training.max_steps", "an integer"),
        ("training.seed", "an integer"),
        ("training.batch_size", "an integer or 'auto'"),
        ("training.learning_rate", "a number"),
        ("optimizer.plan_learning_rate", "a number or null"),
        ("training.precision", "'fp32', 'bf16', 'fp16' or 'auto'"),
        ("model.plan_span", "an integer or 'sequence'"),
        ("model.num_hidden_layers", "an integer"),
        ("model.rms_norm_eps", "a float such as 1.0"),
        ("model.code_bits", "an integer"),
        ("model.rope_theta", "a number"),
        ("model.rope_parameters.factor", "a number"),
        ("data.train", "text, a list or a mapping; put it in quotes"),
        ("data.train.0", "text; put it in quotes"),
        ("data.train.a", "a number"),
        ("data.tokenizer", "text; put it in quotes"),
        ("logging.project", "text; put it in quotes"),
        ("run_dir", "a path; put it in quotes"),
        ("distributed.data", "an integer or 'auto'"),
        ("curriculum.stages.0.steps", "an integer"),
    ],
)
def test_boolean_is_no_number_and_no_text(load, name, allowed, value):
    override = f"{name}={value}"
    if name.startswith("curriculum.stages"):
        override = f"curriculum.stages=[{{steps: {value}}}]"
    elif name == "data.train.0":
        override = f"data.train=[{value}]"
    elif name == "data.train.a":
        override = f"data.train={{a: {value}}}"
    with refused(f"{name.replace('num_hidden_', 'num_')}={value}: must be {allowed}"):
        load("run_dir: x", override)


@pytest.mark.parametrize("name", ["logging.project", "run_dir", "data.tokenizer", "data.column", "model.pretrained"])
@pytest.mark.parametrize("value", ["123", "1.5"])
def test_number_for_text_is_refused_with_the_quotes_to_write(load, name, value):
    last = name.rpartition(".")[2]
    hint = f"{name}={value}: must be .*; put it in quotes, as in {last}: '{value}' .in a shell \"{name}='{value}'\""
    for text, overrides in ((yaml.safe_dump(nested(name, load_yaml(value))), []), ("{}", [f"{name}={value}"])):
        with refused(hint):
            load(text, *overrides)
    if name != "model.pretrained":
        settings = load("run_dir: x", f"{name}='{value}'")
        found = settings if name == "run_dir" else getattr(settings, name.partition(".")[0])
        assert str(getattr(found, last)) == value


@pytest.mark.parametrize("override", ["data.train=[2026]", "data.train={2026: 3}", "data.validation=[1.5]"])
def test_number_as_a_source_is_refused_with_a_hint(load, override):
    with refused("must be text; put it in quotes"):
        load("run_dir: x", override)


@pytest.mark.parametrize("text", ["1: 2", "training: {1: 2}", "model: {1: 2}", "training: {~: 2}"])
def test_name_that_is_no_text_is_refused(load, text):
    with refused("the name of a setting must be text"):
        load(text)


def test_dotted_name_in_a_file_is_refused_with_its_section(load):
    with refused("unknown setting 'training.max_steps': in a file, write training: {max_steps: ...}"):
        load("training.max_steps: 3")


@pytest.fixture
def places(monkeypatch, tmp_path):
    """A home folder and two variables; NOWHERE is not set."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", "/data/$x")
    monkeypatch.setenv("FIRST", "~one")
    monkeypatch.delenv("NOWHERE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/runs/a", "{home}/runs/a"),
        ("'~'", "{home}"),
        ("~root/a", f"{os.path.expanduser('~root')}/a"),  # noqa: PTH111
        ("$HOME/a", "{home}/a"),
        ("${DATA}_b/a", "/data/$x_b/a"),
        ("$DATA/$FIRST", "/data/$x/~one"),
        ("a~/b", "a~/b"),
        ("cost$5", "cost$5"),
        ("cost$$HOME", "cost$HOME"),
        ("a$", "a$"),
    ],
)
def test_home_folder_and_variables_are_expanded_in_every_path(load, places, written, meant):
    meant = meant.format(home=places / "home")
    settings = load(
        "model: {}",
        *(f"run_dir={written}", f"data.train={written}", f"data.tokenizer={written}"),
        *(f"data.validation=['a.txt', {written if '{' not in written else repr(written)}]",),
        f'curriculum.stages=[{{data: {{"{written.strip(chr(39))}": 3}}}}]',
    )
    assert settings.run_dir == Path(meant)
    assert settings.data.train == [meant] and settings.data.validation == ["a.txt", meant]
    assert settings.data.tokenizer == meant
    assert settings.curriculum.stages[0].data == {meant: 3}
    assert ModelSettings(pretrained=written.strip("'")).pretrained == meant
    assert load(settings.to_yaml()) == settings
    assert parse_settings(settings.model_dump()) == parse_settings(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize("name", ["run_dir", "data.train", "data.validation", "data.tokenizer", "model.pretrained"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("$NOWHERE/a", "the environment variable NOWHERE is not set; set it, or use"),
        ("a/${NOWHERE}", "the environment variable NOWHERE is not set"),
        ("${NOWHERE:-a}", "the environment variable NOWHERE:-a is not set"),
        ("~nobody-here/a", "the home folder ~nobody-here is unknown; give the full path"),
        ("''", "is empty; give a file or folder"),
    ],
)
def test_path_that_cannot_be_expanded_is_refused(load, places, name, value, message):
    with refused(rf"{name}='.*': {message}") as error:
        load("{}", f"{name}={value}")
    assert "\n" not in str(error.value)


def test_sources_of_a_mixture_must_differ(load, places):
    with refused(r"data.train: ~/a and \$HOME/a are the same source; give it a single share"):
        load("data: {train: {~/a: 1, $HOME/a: 2}}")
    with refused("data.train: a.txt and ./a.txt are the same source; give it a single share"):
        load("data: {train: {a.txt: 1, ./a.txt: 2}}")
    with refused("curriculum.stages.0.data: a.txt and ./a.txt are the same source"):
        load("training: {stages: [{data: {a.txt: 1, ./a.txt: 2}}]}")


def test_paths_set_in_python_are_taken_as_they_are(places):
    settings = Settings(run_dir=Path("~/$x"))
    assert settings.run_dir == Path("~/$x")
    settings.run_dir = Path("$DATA") / "b"
    assert settings.run_dir == Path("$DATA/b")
    assert Settings(run_dir="~/x").run_dir == places / "home" / "x"


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_path_is_written_so_that_it_is_read_back(path):
    settings = Settings(run_dir=Path(path))
    assert Settings.model_validate(load_yaml(settings.to_yaml())).run_dir == settings.run_dir


def test_absolute_paths_hold_from_every_folder(load, monkeypatch, tmp_path):
    work = tmp_path / "$work"
    for folder in ("tokens", "model", "texts", "bytes"):
        (work / folder).mkdir(parents=True)
    monkeypatch.chdir(work)
    sources = {"a.jsonl": 3, "texts": 1, "letters:40:1": 2, "name": 1, "name:config": 1, "name[test]": 1, "hub:a.b": 1}
    settings = parse_settings(
        {
            "run_dir": "runs/a",
            "data": {"train": sources, "validation": ["./b.txt", "name"], "tokenizer": "tokens"},
            "training": {"stages": [{"data": "c.txt", "steps": 500}, {}]},
        }
    )
    before = settings.model_copy(deep=True)
    found = settings.with_absolute_paths()
    assert settings == before
    assert found.run_dir == work / "runs/a"
    assert found.data.train == {f"{work}/a.jsonl": 3, f"{work}/texts": 1, **dict(list(sources.items())[2:])}
    assert found.data.validation == [f"{work}/b.txt", "name"]
    assert found.data.tokenizer == f"{work}/tokens"
    assert [stage.data for stage in found.curriculum.stages] == [[f"{work}/c.txt"], None]
    assert found.with_absolute_paths() == load(found.to_yaml()) == found
    assert parse_settings({}).with_absolute_paths().data.tokenizer == "bytes"
    other = parse_settings({"model": {"pretrained": "model"}, "data": {"tokenizer": "some/name"}}, to_train=False)
    assert other.with_absolute_paths().model.pretrained == f"{work}/model"
    assert other.with_absolute_paths().data.tokenizer == "some/name"


SOURCES = st.text(string.ascii_letters + "$~:é.[]{}", min_size=1, max_size=8)
TRAINING = {
    "max_steps": st.integers(1, 10**6),
    "learning_rate": st.floats(1e-300, 1e300),
    "seed": st.integers(0, 2**63 - 1),
    "compile": st.booleans(),
    "batch_size": st.just("auto") | st.integers(1, 100),
}


@given(
    st.fixed_dictionaries({}, optional=TRAINING), TEXT, st.lists(SOURCES) | st.dictionaries(SOURCES, st.integers(1, 9))
)
def test_any_settings_written_down_come_back_the_same(training, project, sources):
    def escaped(name: str) -> str:
        return "./" * name.startswith("~") + name.replace("$", "$$")

    sources = (
        {escaped(name): share for name, share in sources.items()}
        if isinstance(sources, dict)
        else list(map(escaped, sources))
    )
    settings = Settings.model_validate(
        {"training": training, "logging": {"project": project}, "data": {"train": sources}}
    )
    assert Settings.model_validate(load_yaml(settings.to_yaml())) == settings


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (5, 0), (20, 2), (600, 60), (1000, 100), (50_000, 100)])
def test_default_warmup_fits_the_run(load, steps, warmup):
    settings = load(f"training: {{max_steps: {steps}}}")
    assert settings.training.warmup_steps == warmup
    assert not settings_warnings(settings)
    assert f"warmup_steps: {warmup}\n" in settings.to_yaml()
    assert load(settings.to_yaml(), "training.max_steps=70000").training.warmup_steps == warmup
    assert load(f"training: {{max_steps: {steps}, warmup_steps: 7}}").training.warmup_steps == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.warmup_steps=1000"],
            r"training.warmup_steps=1000: the warm-up is not shorter than .*max_steps=1000",
        ),
        (
            ["curriculum.kl_schedule=linear", "curriculum.anneal_steps=1001"],
            "curriculum.anneal_steps=1001: the schedules end",
        ),
        (
            ["curriculum.kl_weight_start=0.5"],
            "curriculum.kl_weight_start=0.5: no effect, because curriculum.kl_schedule is",
        ),
        (
            ["curriculum.free_bits_start=1"],
            "curriculum.free_bits_start=1.0: no effect, because curriculum.free_bits_schedule",
        ),
        (["curriculum.anneal_steps=5"], "curriculum.anneal_steps=5: no effect, because both schedules are constant"),
        (
            ["curriculum.kl_schedule=cosine", "curriculum.anneal_cycles=2"],
            "anneal_cycles=2: no effect, because no schedule",
        ),
        (
            ["optimizer.muon_learning_rate=0.1", "optimizer.name=adamw"],
            "muon_learning_rate=0.1: no effect, because optimizer.name is not muon",
        ),
        (["data.shuffle_buffer=5"], "data.shuffle_buffer=5: no effect, because data.streaming is false"),
        (["evaluation.early_stopping=5", "data.validation=a"], "early_stopping=5: the run has only 5 evaluations"),
        (["training.max_skipped=3"], "training.max_skipped=3: no effect, because training.nonfinite is stop"),
    ],
)
def test_settings_that_are_surely_not_meant_are_named_in_one_line(load, overrides, message):
    settings = load("run_dir: x", *overrides)
    (warning,) = settings_warnings(settings)
    assert re.search(message, warning) and "\n" not in warning
    assert settings_warnings(load(settings.to_yaml())) == [warning]  # a recorded default is no wish


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.warmup_steps=999"],
        [
            "curriculum.kl_schedule=cyclical",
            "curriculum.kl_weight_start=0.5",
            "curriculum.anneal_steps=9",
            "curriculum.anneal_cycles=2",
        ],
        [
            "model.min_bits=0",
            "curriculum.free_bits_schedule=linear",
            "curriculum.free_bits_start=1",
            "curriculum.anneal_steps=1000",
        ],
        ["optimizer.name=muon", "optimizer.muon_learning_rate=0.1"],
        ["data.streaming=true", "data.shuffle_buffer=5"],
        ["data.validation=a", "evaluation.rows=5", "training.eval_every=5", "evaluation.early_stopping=5"],
        ["training.nonfinite=skip", "training.max_skipped=3"],
        ["training.eval_every=0", "logging.sample_every=0"],
        ["model.latent_dim=8", "evaluation.prior_rows=0"],
    ],
)
def test_settings_that_have_an_effect_are_not_warned_of(load, overrides):
    assert settings_warnings(load("run_dir: x", *overrides)) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_files_of_settings_have_no_warnings(path):
    assert settings_warnings(load_settings(path)) == []


def test_descriptions_are_sentences():
    for name in SECTIONS:
        for key, field in {**Settings.model_fields[name].annotation.model_fields, **StageSettings.model_fields}.items():
            assert field.description[0].isupper() or field.description[0] == "`", key
            assert field.description.endswith("."), key
