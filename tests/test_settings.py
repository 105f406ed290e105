from pathlib import Path

import pytest
import yaml

from free_transformer.training.settings import (
    Settings,
    SettingsError,
    describe_settings,
    load_settings,
    parse_settings,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SECTIONS = ["model", "training", "data", "logging", "distributed"]


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
    with refused(f"unknown setting 'logging.xyzzy': known are {known}"):
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
        "training.optimizer=sgd",
        "training.precision=int8",
        "training.resume=perhaps",
        "model.kind=llama",
        "model.plan_span=word",
        "model.latent_dim=null",
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
    assert value.strip("[]{}").split(": ")[-1].replace("null", "None") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("training.max_steps=0", "greater than or equal to 1"),
        ("training.batch_size=-1", "greater than or equal to 1"),
        ("training.seq_len=1", "greater than or equal to 2"),
        ("training.learning_rate=0", "greater than 0"),
        ("training.min_lr_ratio=1.5", "less than or equal to 1"),
        ("training.kl_weight=-0.5", "greater than or equal to 0"),
        ("training.save_total=0", "greater than or equal to 1"),
        ("model.latent_dim=0", "greater than or equal to 1"),
        ("model.free_bits=-1", "greater than or equal to 0"),
        ("model.plan_span=0", "plan_span=0: a number of tokens from 1, or 'sequence'"),
        ("model.hidden_dim=30", "hidden_dim=30 is not a multiple of num_heads=4"),
        ("model.num_heads=256", "even size"),
        ("model.code_bits=21", "code_bits=21: 1 to 20"),
        ("model.injection_layers=[0]", r"injection_layers=\[0\]: layers from 3 to 5"),
        ("distributed.data=0", "greater than or equal to 1"),
        ("distributed.data=all", "unable to parse|valid integer|'auto'"),
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
    with refused(rf"model.{override}: \S*{other} decides it"):
        load("run_dir: x", f"model.{override}")


@pytest.mark.parametrize("rate", [".nan", ".inf"])
def test_a_rate_that_is_no_number_is_refused(load, rate):
    with refused("training.learning_rate"):
        load("run_dir: x", f"training.learning_rate={rate}")


def test_a_precision_of_another_name_is_refused_with_those_there_are(load):
    with refused(r"training\.precision='float16': input should be 'fp32', 'bf16', 'fp16' or 'auto'"):
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


@pytest.mark.parametrize("override", ["training.max_steps", "=3", "nonsense"])
def test_what_is_no_override_is_refused(load, override):
    with refused(r"an override is section\.name=value"):
        load("run_dir: x", override)


def test_an_override_whose_value_is_no_yaml_is_refused(load):
    with refused("the value is not YAML"):
        load("run_dir: x", "data.train=[a")


def test_an_override_below_a_setting_is_refused(load):
    with refused("'max_steps' is a setting, not a section"):
        load("training: {max_steps: 3}", "training.max_steps.a=3")


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "3"])
def test_a_file_without_sections_is_refused(load, text):
    with refused(r"config\.yaml: sections of settings are needed"):
        load(text)


@pytest.mark.parametrize("text", ["model: [", "a: b: c", "\tx: 1"])
def test_a_file_that_is_no_yaml_is_refused_in_one_line(load, text):
    with refused(r"config\.yaml: not YAML") as error:
        load(text)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    with refused(r"nowhere\.yaml: no such file"):
        load_settings(tmp_path / "nowhere.yaml")
    with refused("cannot be read as text"):
        load_settings(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with refused(r"binary\.yaml: cannot be read as text"):
        load_settings(tmp_path / "binary.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_settings_written_down_come_back_the_same(load, path):
    settings = load_settings(path, ["model.rope_theta=500.0", "training.learning_rate=1e-5", "model.plan_span=3"])
    assert load(settings.to_yaml()) == settings
    assert load(Settings().to_yaml()) == Settings()


def test_the_defaults_describe_a_model():
    config = Settings().model.build()
    assert (config.hidden_size, config.num_hidden_layers, config.latent_dim) == (256, 6, 16)
    assert config.plan_span == "sequence"


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
    lines = describe_settings().split("\n\n")
    for name, field in fields.items():
        (line,) = [line for line in lines if line.startswith(f"{section}.{name} = ")]
        assert field.description
        assert line.endswith(field.description)
        assert repr(field.get_default(call_default_factory=True)) in line


def test_the_folder_of_the_run_is_described():
    assert "run_dir = runs/free-transformer  folder of the run" in describe_settings()
