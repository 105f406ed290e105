"""Pretrained models that grow a plan: same logits before training, and every kind that the documentation names."""

import json
import re
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.cli import main as cli
from free_transformer.data import byte_tokenizer
from free_transformer.settings import ModelSettings

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DONORS = {
    "llama": LlamaConfig(**SHAPE),
    "llama 3's rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA_3_ROPE),
    "yarn": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "yarn", "rope_theta": 1e3, "factor": 2.0}),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "a key for each query": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "heads of their own size": LlamaConfig(**SHAPE, head_dim=16),
    "gelu": LlamaConfig(**SHAPE, hidden_act="gelu"),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral with a window": MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2 with a window": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=0),
    "qwen2 with a window in no layer": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3 with a window": Qwen3Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=0),
}


@pytest.fixture
def donor(tmp_path):
    """A model of random weights, biases and norms among them, and the folder that it was saved in."""

    def build(config, dtype=torch.float32, **saving):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / "donor", **saving)
        return model, tmp_path / "donor"

    return build


@pytest.fixture
def tokens():
    return torch.randint(3, SHAPE["vocab_size"], (3, 20))


@pytest.mark.parametrize("name", DONORS)
def test_logits_are_those_of_the_pretrained_model(donor, tokens, name):
    pretrained, folder = donor(DONORS[name])
    model = FreeTransformer.from_pretrained(folder, latent_dim=4, plan_span="sequence")
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    with torch.no_grad():
        for given in (None, mask):
            expected = pretrained(tokens, attention_mask=given).logits
            for mode in ("inference", "training"):
                found = model(tokens, attention_mask=given, mode=mode).logits
                assert_close(found[given.bool()] if given is not None else found, _kept(expected, given))
        written = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(tokens, **written), pretrained.generate(tokens, **written))


def _kept(logits, mask):
    return logits if mask is None else logits[mask.bool()]


@pytest.mark.parametrize("name", DONORS)
def test_what_was_adopted_comes_back_when_saved_and_in_the_baseline(donor, tokens, tmp_path, name):
    pretrained, folder = donor(DONORS[name])
    model = FreeTransformer.from_pretrained(folder, latent_dim=4)
    model.save_pretrained(tmp_path / "free")
    again = FreeTransformer.from_pretrained(tmp_path / "free")
    assert again.config.stream_scale == model.config.stream_scale > 0
    plain = AutoModelForCausalLM.from_config(model.config.to_llama()).eval()
    plain.load_state_dict(pretrained.state_dict())  # the same names
    with torch.no_grad():
        assert torch.equal(again(tokens, mode="training").logits, model(tokens, mode="training").logits)
        assert_close(plain(tokens).logits, pretrained(tokens).logits)


def test_bfloat16_in_shards_with_an_index(donor, tokens):
    pretrained, folder = donor(DONORS["llama 3's rope"], torch.bfloat16, max_shard_size="20KB")
    assert len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    model = FreeTransformer.from_pretrained(folder, latent_dim=4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert_close(model(tokens).logits, pretrained(tokens).logits, atol=0.05, rtol=0.05)
        as_float = FreeTransformer.from_pretrained(folder, latent_dim=4, dtype=torch.float32)
        assert_close(
            as_float(tokens).logits, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        )


def test_a_window_is_kept_and_can_be_changed(donor, tokens):
    _, folder = donor(DONORS["mistral with a window"])
    config = FreeTransformer.from_pretrained(folder, latent_dim=4).config
    assert (config.sliding_window, config.max_position_embeddings) == (7, 64)
    assert FreeTransformer.from_pretrained(folder, latent_dim=4, sliding_window=9).config.sliding_window == 9
    settings = ModelSettings(pretrained=str(folder))
    settings.adopt()
    assert (settings.sliding_window, settings.build().sliding_window) == (7, 7)
    settings = ModelSettings(pretrained=str(folder), sliding_window=None)
    settings.adopt()
    assert settings.build().sliding_window is None
    with pytest.raises(ValueError, match=r"sliding_window=9: .* has 7; remove this setting"):
        ModelSettings(pretrained=str(folder), sliding_window=9, kind="baseline").adopt()


def test_a_window_that_a_llama_does_not_use_is_not_adopted(donor, tokens):
    pretrained, folder = donor(LlamaConfig(**SHAPE, sliding_window=3))
    model = FreeTransformer.from_pretrained(folder, latent_dim=4)
    assert model.config.sliding_window is None
    with torch.no_grad():
        assert_close(model(tokens).logits, pretrained(tokens, use_cache=False).logits)


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=2),
        Qwen3Config(**SHAPE, layer_types=["full_attention", "sliding_attention"] * 2, sliding_window=7),
    ],
)
def test_windows_in_some_layers_only_are_refused(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer_types: the layers of this qwen. differ \(full_att") as told:
        FreeTransformerConfig.from_pretrained(tmp_path)
    assert "\n" not in str(told.value)


def test_another_kind_of_model_is_refused_by_name(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type='gpt2'.*llama, mistral, qwen2, qwen3"):
        FreeTransformer.from_pretrained(tmp_path)


def test_settings_of_the_plan_follow_from_each_other(donor):
    _, folder = donor(DONORS["llama"])
    config = FreeTransformer.from_pretrained(folder, latent_dim=32).config
    assert (config.group_bits, config.plan_gradient, config.table_init) == ([1] * 32, "exact", "zero")
    config = FreeTransformer.from_pretrained(folder, latent_dim=18, code_bits=12).config
    assert (config.group_bits, config.plan_gradient) == ([12, 6], "sampled")
    with pytest.raises(ValueError, match="free_bits=-1"):
        FreeTransformer.from_pretrained(folder, free_bits=-1)


def test_the_encoder_starts_as_the_layer_that_receives_the_plan(donor):
    _, folder = donor(DONORS["qwen3"])
    model = FreeTransformer.from_pretrained(folder, latent_dim=4)
    layer = model.model.layers[2]
    assert_close(model.encoder.attention.state_dict(), layer.self_attn.state_dict(), atol=0, rtol=0)
    assert_close(model.encoder.mlp.state_dict(), layer.mlp.state_dict(), atol=0, rtol=0)
    assert not model.plan_table.weight.any()
    for _ in range(2):  # new parts are started, not left as memory was
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        model = FreeTransformer.from_pretrained(folder, latent_dim=4)


def test_the_scale_of_the_stream_is_that_of_a_typical_token(donor, tokens):
    _, folder = donor(DONORS["llama"])
    model = FreeTransformer.from_pretrained(folder, latent_dim=4)
    states = model.lower_layers(tokens).hidden_states
    assert_close(model.config.stream_scale, states.square().mean(-1).sqrt().median().item(), atol=0, rtol=0.3)


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command line; its status and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["free-transformer", *map(str, arguments)])
        capsys.readouterr()  # earlier output
        with pytest.raises(SystemExit) as ending:
            cli.main()
        return ending.value.code, capsys.readouterr()

    return run


def test_the_command_converts_and_lists_what_is_new(donor, tokens, tmp_path, command):
    pretrained, folder = donor(DONORS["tied"])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=[2, 3]).save_pretrained(folder)
    status, shown = command("convert", folder, tmp_path / "free", "--latent-dim", 5, "--plan-span", 7)
    assert status == 0, shown.err
    model = FreeTransformer.from_pretrained(tmp_path / "free")
    assert (model.config.latent_dim, model.config.plan_span) == (5, 7)
    with torch.no_grad():
        assert_close(model(tokens).logits, pretrained(tokens).logits)
    fresh = {"encoder", "encoder.query", "encoder.readout", "plan_table"}
    parameters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in pretrained.parameters())
    listed = dict(re.findall(r"│ (\S+) +│ ([\d,]+) +│", shown.out))
    assert listed.keys() == fresh
    assert sum(int(count.replace(",", "")) for count in listed.values()) == parameters
    assert re.search(r"largest difference from the logits of \S+: 0\n", shown.out)
    again = AutoTokenizer.from_pretrained(tmp_path / "free")
    assert (again.chat_template, again.get_vocab()) == (tokenizer.chat_template, tokenizer.get_vocab())
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.3, [2, 3])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere", "out"], 2, "nowhere: cannot be read as a model"),
        (["donor", "donor"], 2, "exists already"),
        (["donor", "out", "--latent-dim", "0"], 2, "Invalid value for '--latent-dim'"),
        (["donor", "out", "--plan-span", "long"], 2, "plan_span='long'"),
    ],
)
def test_bad_usage_of_convert_is_one_line(donor, tmp_path, command, monkeypatch, arguments, status, message):
    donor(DONORS["llama"])
    monkeypatch.chdir(tmp_path)
    found, shown = command("convert", *arguments)
    assert (found, len(shown.err.splitlines())) == (status, 1), shown.err
    assert message in shown.err
