import pytest
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from free_transformer import FreeTransformer, FreeTransformerConfig, build_baseline

ALIASES = {
    "hidden_dim": ("hidden_size", 24),
    "num_layers": ("num_hidden_layers", 3),
    "num_heads": ("num_attention_heads", 4),
    "num_kv_heads": ("num_key_value_heads", 2),
    "ffn_hidden_dim": ("intermediate_size", 40),
    "max_seq_len": ("max_position_embeddings", 48),
    "tie_embeddings": ("tie_word_embeddings", True),
    "dropout": ("attention_dropout", 0.25),
}


def settings(config: LlamaConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


@pytest.mark.parametrize("alias", ALIASES)
def test_short_name_and_transformers_name_set_and_read_the_same_value(alias):
    name, value = ALIASES[alias]
    sizes = {"hidden_size": 16, "num_attention_heads": 4}
    for given in (alias, name):
        kept = {key: size for key, size in sizes.items() if key != name}
        config = FreeTransformerConfig(**kept, **{given: value})
        assert getattr(config, alias) == getattr(config, name) == value


def test_rope_theta_reaches_the_rotary_parameters():
    config = FreeTransformerConfig(rope_theta=500.0)
    assert config.rope_parameters["rope_theta"] == 500.0
    assert config.to_llama().rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("latent_dims", "latent_dim"), ("plan_spam", "plan_span"), ("hiden_dim", "hidden_dim"), ("n_heads", "num_heads")],
)
def test_unknown_name_is_refused_with_the_nearest_known_one(wrong, right):
    with pytest.raises(ValueError, match=f"unknown setting '{wrong}': did you mean '{right}'"):
        FreeTransformerConfig(**{wrong: 4})


def test_every_unknown_name_is_listed():
    with pytest.raises(ValueError, match=r"'free_bit'.*'latent_dims'"):
        FreeTransformerConfig(latent_dims=4, free_bit=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 0}, "latent_dim=0: at least 1 bit"),
        ({"latent_dim": -3}, "latent_dim=-3: at least 1 bit"),
        ({"plan_span": "doc"}, "plan_span='doc': a number of tokens, at least 1, or 'sequence'"),
        ({"plan_span": 0}, "plan_span=0: a number of tokens"),
        ({"plan_span": True}, "plan_span"),
        ({"code_bits": 0}, "code_bits=0: 1 to 20"),
        ({"code_bits": 99}, "code_bits=99: 1 to 20"),
        ({"injection_layers": [1]}, r"injection_layers=\[1\]: layers from 2 to 3"),
        ({"injection_layers": [2, 4]}, r"injection_layers=\[2, 4\]: layers from 2 to 3"),
        ({"injection_layers": []}, r"injection_layers=\[\]: layers from 2 to 3"),
        ({"free_bits": -0.5}, "free_bits=-0.5: at least 0 bits"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0: at least 0"),
        ({"min_bits": 2.0, "free_bits": 1.0}, "min_bits=2.0: 0 to free_bits=1.0"),
        ({"aggregate_weight": -1.0}, "aggregate_weight=-1.0: at least 0"),
        ({"plan_gradient": "biased"}, "plan_gradient='biased': one of"),
        ({"table_init": "ones"}, "table_init='ones': one of"),
        ({"hidden_dim": 6}, "heads of 3: rotary positions need an even size"),
        ({"hidden_dim": 20, "num_heads": 3}, "not a multiple"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 is not a multiple of"),
        ({"num_layers": 0}, "num_layers=0.*at least 1"),
        ({"vocab_size": 0}, "vocab_size=0.*at least 1"),
    ],
)
def test_value_out_of_range_is_one_clear_error(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("latent_dim", "code_bits", "groups"),
    [
        (1, None, [1]),
        (16, None, [16]),
        (17, None, [8, 8, 1]),
        (20, None, [8, 8, 4]),
        (64, None, [8] * 8),
        (5, 2, [2, 2, 1]),
        (3, 1, [1, 1, 1]),
        (3, 8, [3]),
    ],
)
def test_bits_are_cut_into_groups_that_fill_the_plan(latent_dim, code_bits, groups):
    assert FreeTransformerConfig(latent_dim=latent_dim, code_bits=code_bits).group_bits == groups


@pytest.mark.parametrize(
    ("settings", "gradient"),
    [
        ({"latent_dim": 10}, "exact"),
        ({"latent_dim": 11}, "sampled"),
        ({"latent_dim": 20}, "exact"),
        ({"latent_dim": 16, "code_bits": 4}, "exact"),
        ({"latent_dim": 16, "plan_gradient": "exact"}, "exact"),
        ({"latent_dim": 4, "plan_gradient": "sampled"}, "sampled"),
    ],
)
def test_automatic_plan_gradient_is_resolved_by_the_size_of_a_table(settings, gradient):
    assert FreeTransformerConfig(**settings).plan_gradient == gradient


@pytest.mark.parametrize(("num_layers", "layer"), [(1, 0), (3, 1), (4, 2)])
def test_plan_enters_at_half_depth_by_default(tiny_config, num_layers, layer):
    config = tiny_config(num_layers=num_layers)
    assert config.plan_layer == layer
    assert config.injection_layers == [layer]


@pytest.mark.parametrize("loader", [FreeTransformerConfig, AutoConfig])
def test_saved_configuration_comes_back_equal(tiny_config, tmp_path, loader):
    config = tiny_config(plan_span="sequence", code_bits=3, injection_layers=[2, 3], free_bits=2, rope_theta=500.0)
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is FreeTransformerConfig
    assert settings(loaded) == settings(config)
    loaded.save_pretrained(tmp_path / "again")
    assert settings(loader.from_pretrained(tmp_path / "again")) == settings(config)


def test_to_llama_is_the_same_model_without_the_plan(tiny_config):
    config = tiny_config(rope_theta=500.0, tie_embeddings=True, dropout=0.1)
    llama = config.to_llama()
    assert type(llama) is LlamaConfig
    assert llama.model_type == "llama"
    ours, theirs = settings(config), settings(llama)
    assert theirs.pop("model_type") == "llama"
    assert {name: ours[name] for name in theirs} == theirs
    assert set(ours) - set(theirs) >= {"latent_dim", "plan_span", "free_bits", "injection_layers", "table_init"}


def test_baseline_has_the_parameters_of_the_free_transformer_but_the_plan(tiny_config):
    def shapes(model):
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    baseline = build_baseline(tiny_config())
    assert isinstance(baseline, LlamaForCausalLM)
    free = {k: v for k, v in shapes(FreeTransformer(tiny_config())).items() if "plan" not in k and "encoder" not in k}
    assert shapes(baseline) == free


def test_the_plan_enters_all_layers_from_the_middle_on_where_asked(tiny_config):
    assert tiny_config(num_layers=5, injection_layers="all").injection_layers == [2, 3, 4]
    with pytest.raises(ValueError, match=r"injection_layers=every: layers from 2 to 3, or 'all'"):
        tiny_config(injection_layers="every")


def test_a_configuration_is_made_of_its_own_dictionary(tiny_model):
    config = tiny_model(latent_dim=3, plan_strength=1.5).config
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()
