"""Runs from a pretrained model: learning rates, frozen layers, adapters, and saved files."""

import pytest
import torch
import yaml
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from free_transformer import FreeTransformer
from free_transformer.data import byte_tokenizer
from free_transformer.distributed.processes import Processes
from free_transformer.settings import SettingsError, parse_settings
from free_transformer.training import Run, load_settings, train
from free_transformer.training.state import new_state

PLAN = {"latent_dim": 3, "plan_span": "sequence", "free_bits": 1.0}


@pytest.fixture
def llama(tmp_path):
    """The folder of a pretrained byte-level Llama."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=259, num_key_value_heads=1, max_position_embeddings=64, **shape)
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def settings_of(llama, tmp_path):
    (tmp_path / "text.txt").write_text("a plan for a model that already writes. " * 40)

    def build(model=PLAN, run="run", **training):
        values = {"max_steps": 3, "batch_size": 4, "seq_len": 16, "warmup_steps": 0, "eval_every": 0, **training}
        return parse_settings(
            {
                "run_dir": str(tmp_path / run),
                "model": {"pretrained": str(llama), **model},
                "training": values,
                "data": {"train": [str(tmp_path / "text.txt")]},
                "logging": {"tensorboard": False, "sample_every": 0},
            }
        )

    return build


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("kind", ["free", "baseline"])
def test_everything_learns_or_all_but_the_first_half(settings_of, llama, kind):
    model = {"kind": kind, **PLAN}
    start = weights_of(llama)
    whole = weights_of(train(settings_of(model, run="whole"), quiet=True).model_folder)
    assert changed(start, whole) == start.keys()
    half = weights_of(train(settings_of(model, run="half", freeze_first_half=True), quiet=True).model_folder)
    frozen = {name for name in start if name.startswith(("model.layers.0.", "model.layers.1.", "model.embed"))}
    assert changed(start, half) == start.keys() - frozen
    if kind == "free":
        assert half["plan_table.weight"].any()  # it has left zero
        assert (half.keys() - start.keys()) == {name for name in half if name.startswith(("plan_", "encoder."))}


def test_the_run_saves_the_shape_it_found_and_resumes_from_it(settings_of, llama):
    run = train(settings_of(save_every=2), quiet=True)
    written = yaml.safe_load(run.config_file.read_text())
    assert (written["model"]["hidden_dim"], written["model"]["num_layers"]) == (16, 4)
    assert written["data"]["tokenizer"] == written["model"]["pretrained"] == str(llama)
    written["training"]["max_steps"] = 5
    longer = train(parse_settings(written), quiet=True)
    assert [line["step"] for line in longer.read_metrics() if line["split"] == "train"][-1] == 5
    model = run.load_model()
    assert (model.config.latent_dim, model.config.plan_span, model.config.free_bits) == (3, "sequence", 1.0)
    assert model.config.max_position_embeddings == 64
    llama.rename(llama.with_name("gone"))
    assert Run(run.path).settings.model.hidden_dim == 16  # a run can be read without its pretrained model
    with pytest.raises(SettingsError, match=r"model.pretrained=.*llama"):
        load_settings(run.config_file)


def test_new_parts_learn_faster_and_the_table_at_the_scale_of_the_stream(settings_of):
    def rates(**training):
        settings = settings_of(learning_rate=1e-4, **training)
        state = new_state(settings, byte_tokenizer(), Processes(torch.device("cpu")))
        names = {parameter: name for name, parameter in state.model.named_parameters()}
        found = {names[p]: g["lr"] for o in state.optimizers for g in o.param_groups for p in g["params"]}
        assert found.keys() == {name for name, p in state.model.named_parameters() if p.requires_grad}
        scale = state.model.config.stream_scale
        return (
            found["model.layers.3.mlp.up_proj.weight"],
            found["encoder.readout.weight"],
            (found["plan_table.weight"] / scale),
        )

    assert rates() == pytest.approx((1e-4, 1e-3, 1e-2))
    assert rates(plan_learning_rate=0.5) == pytest.approx((1e-4, 0.5, 5.0))


def test_a_trained_free_transformer_is_a_start_too_with_the_plan_it_has(settings_of, llama):
    first = train(settings_of(), quiet=True)
    settings = settings_of({"pretrained": str(first.model_folder)}, run="second")
    assert (settings.model.latent_dim, settings.model.free_bits) == (3, 1.0)
    other = settings_of({"pretrained": str(first.model_folder), "free_bits": 2.0}, run="second", max_steps=1)
    assert train(other, quiet=True).load_model().config.free_bits == 2.0
    with pytest.raises(SettingsError, match=r"model.latent_dim=4: .* has 3; remove this setting"):
        settings_of({"pretrained": str(first.model_folder), "latent_dim": 4})


@pytest.mark.parametrize("freeze", [False, True])
def test_adapters_learn_are_saved_for_peft_and_merged(settings_of, llama, freeze):
    settings = settings_of(lora_rank=2, freeze_first_half=freeze)
    run = train(settings, quiet=True)
    merged, start = run.load_model(), weights_of(llama)
    moved = changed(start, merged.state_dict())
    layers = range(2 if freeze else 0, 4)
    assert moved == {n for n in start if "_proj" in n and any(n.startswith(f"model.layers.{i}.") for i in layers)}
    torch.manual_seed(1)
    base = FreeTransformer.from_pretrained(llama, **PLAN)
    loaded = PeftModel.from_pretrained(base, run.adapter_folder).eval()
    tokens = torch.randint(3, 250, (2, 12))
    plan = torch.rand(2, 1, 3) < 0.5
    with torch.no_grad():
        assert_close(loaded(input_ids=tokens, plan=plan).logits, merged(tokens, plan=plan).logits)
        assert_close(loaded.get_base_model().infer_plan(tokens), merged.infer_plan(tokens))
        again = loaded.merge_and_unload()
        assert_close(again(tokens, plan=plan).logits, merged(tokens, plan=plan).logits)


def test_adapters_of_a_baseline(settings_of, llama):
    run = train(settings_of({"kind": "baseline"}, lora_rank=2), quiet=True)
    assert all("_proj" in name for name in changed(weights_of(llama), weights_of(run.model_folder)))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), run.adapter_folder)
    tokens = torch.randint(3, 250, (2, 12))
    with torch.no_grad():
        assert_close(loaded(input_ids=tokens).logits, run.load_model()(tokens).logits)


@pytest.mark.parametrize("training", [{}, {"lora_rank": 2}, {"freeze_first_half": True}])
def test_a_stopped_run_resumes_as_if_uninterrupted(settings_of, training):
    whole = train(settings_of(run="whole", max_steps=4, **training), quiet=True)
    settings = settings_of(run="parts", max_steps=4, **training)
    train(settings_of(run="parts", max_steps=4, save_every=2, **training), quiet=True)
    last = settings.run_dir / "checkpoints" / "step-4"
    last.rename(last.with_name("gone"))
    parts = train(settings, quiet=True)
    assert_close(weights_of(parts.model_folder), weights_of(whole.model_folder), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("model", "training", "message"),
    [
        ({"hidden_dim": 32}, {}, r"model.hidden_dim=32: .*llama has 16; remove this setting"),
        ({"rope_theta": 5.0}, {}, r"model.rope_theta"),
        ({"pretrained": "nowhere"}, {}, "model.pretrained=nowhere"),
        ({"pretrained": None}, {"freeze_first_half": True}, "freeze_first_half=True: needs model.pretrained"),
        ({"pretrained": None}, {"lora_rank": 2}, "lora_rank=2: needs model.pretrained"),
    ],
)
def test_bad_settings_are_named(settings_of, model, training, message):
    with pytest.raises(SettingsError, match=message):
        settings_of(model, **training)


def test_what_a_pretrained_model_cannot_do_is_named(settings_of, llama, tmp_path):
    with pytest.raises(SettingsError, match=r"seq_len=128 is longer than model.max_seq_len=64"):
        train(settings_of(seq_len=128), quiet=True)
    run = train(settings_of(), quiet=True)
    with pytest.raises(SettingsError, match="a baseline needs a model without a plan"):
        train(settings_of({"kind": "baseline", "pretrained": str(run.model_folder)}, run="other"), quiet=True)
    (llama / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(SettingsError, match="cannot be read"):
        train(settings_of(run="other"), quiet=True)
