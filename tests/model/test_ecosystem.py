"""
The model inside the software it lives in: PyTorch, transformers, accelerate, PEFT, TRL.

Each section is a kind of fault that users of neighboring projects have reported, and the right behavior. The table in
`docs/contributing.md` lists them.
"""

import copy
import inspect
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from accelerate import Accelerator, cpu_offload, disk_offload
from huggingface_hub import save_torch_model
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

from free_transformer import FreeTransformer, FreeTransformerConfig
from free_transformer.data import byte_tokenizer
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.model.cache import PlanCache

GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def model(tiny_model) -> FreeTransformer:
    return tiny_model(torch.float32, plan_span="sequence")


@pytest.fixture
def tokens(tokens_like) -> Tensor:
    return tokens_like(2, 8)


@pytest.fixture
def plan(model) -> Tensor:
    return model.sample_plan(2, 1)


def identities(model: nn.Module) -> list[tuple]:
    """Names that other software uses for a parameter."""
    return [
        (
            *(name, id(parameter), parameter.data_ptr(), parameter.untyped_storage().data_ptr()),
            *(parameter.stride(), parameter.storage_offset(), parameter._version),
            *(parameter.requires_grad, parameter.is_inference(), parameter.is_leaf, parameter.is_shared()),
        )
        for name, parameter in model.named_parameters()
    ]


# 1. Reading a model does not change it


def test_generation_and_evaluation_leave_every_parameter_as_it_was(model, tokens, plan):
    model.share_memory()
    before, values = identities(model), copy.deepcopy(model.state_dict())
    model.generate(tokens, **GREEDY)
    with torch.inference_mode():
        model.generate(tokens, plan=plan, **GREEDY)
        evaluate_likelihood(model, [{"input_ids": tokens}], num_samples=2)
    model.infer_plan(tokens)
    evaluate_likelihood(model, [{"input_ids": tokens}], num_samples=2, method="exact")
    assert identities(model) == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    model(tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(model.parameters()).step()


def _save_state(model: nn.Module, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(folder))


@pytest.mark.parametrize(
    "save",
    [
        lambda model, folder: save_model(model, str(folder / "model.safetensors")),
        lambda model, folder: Accelerator(cpu=True).save_model(model, str(folder)),
        _save_state,
        lambda model, folder: save_torch_model(model, str(folder)),
        lambda model, folder: model.save_pretrained(folder),
    ],
    ids=["safetensors", "accelerate", "accelerate-state", "hub", "transformers"],
)
def test_a_checkpoint_saved_after_generation_is_whole(tmp_path, model, tokens, plan, save):
    expected = model(tokens, plan=plan).logits
    model.generate(tokens, plan=plan, **GREEDY)
    save(model, tmp_path)
    stored = {name: value for file in tmp_path.rglob("*.safetensors") for name, value in load_file(file).items()}
    assert set(stored) == set(model.state_dict())
    other = FreeTransformer(model.config).eval()
    other.load_state_dict(stored)
    assert torch.equal(other(tokens, plan=plan).logits, expected)


# 2. No shortcut past modules


def _on_linears(change):
    def apply(model: nn.Module) -> None:
        for name, module in list(model.named_modules()):
            if name.endswith(("q_proj", "gate_proj", "down_proj", "lm_head", "readout")):
                change(module)

    return apply


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: torch.nn.utils.prune.l1_unstructured(linear, "weight", 0.5),
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
    ],
    ids=["prune", "new-spectral-norm", "new-weight-norm", "spectral-norm", "weight-norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pruned_and_parametrized_layers_generate_what_they_compute(model, tokens, plan, change):
    _on_linears(change)(model)
    model.eval()
    text = model.generate(tokens, plan=plan, **GREEDY)
    assert torch.equal(text[:, 8:], model(text[:, :-1], plan=plan).logits[:, 7:].argmax(-1))
    model(tokens, labels=tokens, skip_logits=True).loss.backward()


def _watch_every_module(model: nn.Module) -> list[tuple[str, tuple]]:
    seen: list[tuple[str, tuple]] = []
    for name, module in model.named_modules():

        def hook(_module, _inputs, output, name=name):
            if isinstance(output, Tensor):
                seen.append((name, tuple(output.shape)))

        module.register_forward_hook(hook)
    return seen


@pytest.mark.parametrize("logits_to_keep", [0, 1])
def test_hooks_see_the_same_calls_with_and_without_gradients(model, tokens, plan, logits_to_keep):
    seen = _watch_every_module(model)
    found = []
    for grads in (True, False):
        seen.clear()
        with torch.set_grad_enabled(grads):
            model(tokens, plan=plan, logits_to_keep=logits_to_keep)
        found.append(list(seen))
    assert found[0] == found[1]
    assert ("model.layers.3", (2, 8, 16)) in found[0]
    assert {name for name, _ in found[0]} >= {"plan_table", "lm_head", "model.layers.1.mlp.act_fn", "model.norm"}


def test_global_hooks_and_replaced_forwards_are_called_in_generation(model, tokens, plan):
    kinds: set[type] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: kinds.add(type(module)))
    try:
        model.generate(tokens, plan=plan, **GREEDY)
    finally:
        handle.remove()
    assert nn.Linear in kinds
    called = []
    for name in ("plan_table", "lm_head", "model.layers.3.self_attn.o_proj", "model.layers.0.mlp.up_proj"):
        module = model.get_submodule(name)
        module.forward = lambda *inputs, run=module.forward, name=name, **options: (
            called.append(name),
            run(*inputs, **options),
        )[1]
    model.generate(tokens, plan=plan, **GREEDY)
    assert set(called) == {"plan_table", "lm_head", "model.layers.3.self_attn.o_proj", "model.layers.0.mlp.up_proj"}


def test_a_hook_on_the_head_gets_logits_though_they_are_skipped(tiny_model, tokens_like):
    model, tokens, seen = tiny_model(vocab_size=8192), tokens_like(1, 400), []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(tuple(output.shape)))
    assert model(tokens, labels=tokens, skip_logits=True).logits is None
    assert seen == [(1, 400, 8192)]


def test_another_activation_in_the_place_of_llama_s_is_used_in_training(model, tokens, plan):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()
    with torch.no_grad():
        expected = model(tokens, plan=plan).logits
    assert torch.equal(model(tokens, plan=plan).logits, expected)


@pytest.mark.parametrize(
    "offload",
    [
        lambda model, _folder: cpu_offload(model, execution_device=torch.device("cpu")),
        lambda model, _folder: cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True),
        lambda model, folder: disk_offload(model, str(folder), execution_device=torch.device("cpu")),
    ],
    ids=["cpu", "buffers", "disk"],
)
def test_offloaded_models_give_the_same_logits_text_and_likelihood(tmp_path, model, tokens, plan, offload):
    def results() -> list:
        found: list = [model(tokens, plan=plan).logits, model.infer_plan(tokens)]
        for options in ({"plan": plan}, {"prompt_plan": "prior"}, {"prior": "aggregate"}):
            torch.manual_seed(0)
            found.append(model.generate(tokens, **options, **GREEDY))
        found.append(torch.tensor(evaluate_likelihood(model, [{"input_ids": tokens}], num_samples=2).nll))
        return found

    model.gather_prior([{"input_ids": tokens}])
    with torch.no_grad():
        expected = results()
        model = offload(model, tmp_path)
        assert model.device == torch.device("cpu")
        for found, value in zip(results(), expected, strict=True):
            assert torch.equal(found, value)


def test_lora_on_the_codebook_trains_and_generates(model, tokens, plan):
    config = LoraConfig(r=2, target_modules=[], target_parameters=["plan_table.weight"], lora_dropout=0.0)
    adapted = get_peft_model(model, config)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in adapted.named_parameters() if "lora_" in n)
    before = adapted(input_ids=tokens, plan=plan).logits
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    text = adapted.generate(input_ids=tokens, plan=plan, **GREEDY)
    logits = adapted(input_ids=text[:, :-1], plan=plan).logits
    assert torch.equal(text[:, 8:], logits[:, 7:].argmax(-1))
    assert not torch.allclose(logits[:, :8], before)


# Derivatives


@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivatives_are_those_of_finite_differences(tiny_model, tokens, frozen):
    model = tiny_model(plan_span="sequence", attn_implementation="eager").requires_grad_(not frozen)
    embeddings, plan = model.get_input_embeddings()(tokens[:1]).detach(), model.sample_plan(1, 1)
    direction = torch.randn_like(embeddings)

    def slope(shift: float, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        at = torch.tensor(shift, dtype=torch.double, requires_grad=True)
        logit = model(inputs_embeds=embeddings + at * direction, plan=plan).logits[0, -1, 5]
        return torch.autograd.grad(logit, at, create_graph=create_graph)[0], at

    first, at = slope(0.0, create_graph=True)
    second = torch.autograd.grad(first, at)[0]
    assert_close(second, (slope(1e-4)[0] - slope(-1e-4)[0]) / 2e-4, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"skip_logits": True}])
def test_second_derivatives_of_the_plan_s_gradient_are_refused(tiny_model, tokens_like, options):
    """With a plan from the encoder, or a loss without logits, autograd does not see all that a gradient depends on."""
    model = tiny_model(vocab_size=8192, attn_implementation="eager", free_bits=0.0)
    tokens = tokens_like(1, 400)
    plan = {"plan": model.sample_plan(1, 400)} if options else {}
    loss = model(tokens, labels=tokens, **plan, **options).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again here"):
        sum(each.square().sum() for each in gradients if each is not None).backward()


@pytest.mark.parametrize("training", [False, True])
def test_functional_gradients_are_those_of_backward(model, tokens, plan, training):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    options = {} if training else {"plan": plan}

    def loss(parameters, tokens=tokens, options=options):
        return functional_call(model, parameters, (tokens,), {"labels": tokens, **options}).loss

    torch.manual_seed(1)
    found = grad(loss)(parameters)
    torch.manual_seed(1)
    model(tokens, labels=tokens, **options).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_gradients_of_single_examples_and_along_a_direction(model, tokens, plan):
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, row, bits):
        return functional_call(model, parameters, (row[None],), {"labels": row[None], "plan": bits[None]}).loss

    single = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, tokens, plan)
    for row in range(2):
        alone = grad(loss)(parameters, tokens[row], plan[row])
        for name in parameters:
            assert_close(single[name][row], alone[name], atol=1e-6, rtol=1e-4)
    model.set_attn_implementation("eager")
    tangent = {name: torch.randn_like(value) for name, value in parameters.items()}
    _, slope = jvp(lambda p: loss(p, tokens[0], plan[0]), (parameters,), (tangent,))
    expected = sum(
        (alone[name] * tangent[name]).sum()
        for name in parameters
        for alone in [grad(loss)(parameters, tokens[0], plan[0])]
    )
    assert_close(slope, expected, atol=1e-4, rtol=1e-3)


# 3. Which plan generates which token: tests/model/test_layout.py; and custom masks


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["boolean", "additive", "integer"])
def test_masks_of_four_dimensions_are_followed(tiny_config, tokens, attention, kind):
    model = FreeTransformer(tiny_config(plan_span=2, table_init="zero", attn_implementation=attention)).eval()
    llama = LlamaForCausalLM(model.config.to_llama()).eval()
    llama.load_state_dict({n: t for n, t in model.state_dict().items() if n in llama.state_dict()})
    llama.set_attn_implementation(attention)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    for allowed in (causal, causal & ~causal.tril(-2), torch.ones_like(causal)):
        additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        mask = {"boolean": allowed, "additive": additive, "integer": allowed.long()}[kind]
        found = model(tokens, attention_mask=mask, plan=model.sample_plan(2, 4)).logits
        assert_close(found, llama(tokens, attention_mask=additive).logits, atol=1e-5, rtol=1e-5)


def test_a_mask_of_four_dimensions_tells_padding_like_one_of_two(tiny_model, tokens):
    model = tiny_model(plan_span=2)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    square = torch.ones(8, 8, dtype=torch.bool).tril() & mask.bool()[:, None, :]
    plan = model.sample_plan(2, 4)
    real = mask.bool()
    options = {"plan": plan, "use_cache": False}
    two, four = (model(tokens, attention_mask=each, **options).logits for each in (mask, square[:, None]))
    assert_close(four[real], two[real])
    read = [model.infer_plan(tokens, attention_mask=each) for each in (mask, square[:, None])]
    assert_close(read[1][1], read[0][1])
    assert_close(read[1][0, :3], read[0][0, :3])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 7), r"attention_mask of shape \(2, 7\): expected \(2, 8\), a column for each token"),
        (torch.ones(2, 8, 8), r"attention_mask of shape \(2, 8, 8\): expected 2 or 4 dimensions"),
    ],
)
def test_masks_that_fit_no_tokens_are_refused(model, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        model(tokens, attention_mask=mask)


def test_a_mask_without_the_cached_tokens_is_refused(model, tokens):
    cache = model(tokens).cache
    with pytest.raises(ValueError, match=r"expected \(2, 9\), a column for each token \(8 of them in the cache\)"):
        model(tokens[:, :1], attention_mask=torch.ones(2, 1), cache=cache)


# 4. Loops by hand: the plan travels with the cache


@pytest.mark.parametrize("span", [1, 2, "sequence"])
def test_a_loop_by_hand_stays_under_one_plan(tiny_model, tokens_like, span):
    model, tokens = tiny_model(plan_span=span, latent_dim=8), tokens_like(2, 12)
    output = model(tokens[:, :6])
    reported = [output.plan]
    logits = [output.logits]
    for place in range(6, 12):
        output = model(tokens[:, place : place + 1], past_key_values=output.past_key_values)
        reported.append(output.plan)
        logits.append(output.logits)
    for plan in reported:
        assert torch.equal(plan, reported[-1][:, : plan.shape[1]])
    whole = model(tokens, plan=reported[-1]).logits
    assert_close(torch.cat(logits, 1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_operations_on_the_rows_of_a_cache_apply_to_its_plans(tiny_model, tokens_like):
    model, tokens = tiny_model(plan_span="sequence", latent_dim=16), tokens_like(3, 6)
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: None, [0, 1, 2]),
    ):
        output = model(tokens)
        cache = copy.deepcopy(output.cache)
        change(cache)
        after = model(tokens[rows][:, :1], cache=cache)
        assert torch.equal(after.plan, output.plan[rows])
        whole = model(torch.cat([tokens, tokens[:, :1]], 1)[rows], plan=output.plan[rows]).logits[:, -1:]
        assert_close(after.logits, whole, atol=1e-5, rtol=1e-5)


def test_the_plan_of_a_cache_can_be_changed_half_way(model, tokens, plan):
    cache = model(tokens, plan=plan).cache
    after = model(tokens[:, :1], plan=~plan, cache=cache)
    assert torch.equal(after.plan, ~plan)
    assert torch.equal(model(tokens[:, :1], cache=cache).plan, ~plan)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_of_others_needs_the_plan(model, tokens, plan, name):
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=16)):
        model(tokens, plan=plan, **{name: cache})
        with pytest.raises(ValueError, match="it holds tokens but not their plan"):
            model(tokens[:, :1], **{name: cache})
        assert torch.equal(model(tokens[:, :1], plan=plan, **{name: cache}).plan, plan)
    with pytest.raises(ValueError, match="Pass that plan too, plan="):
        model.generate(tokens, **{name: cache}, **GREEDY)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("span", [2, "sequence"])
def test_a_generated_text_continues_from_its_cache_by_either_name(tiny_model, tokens, span, name):
    model = tiny_model(plan_span=span, latent_dim=8)
    options = {"do_sample": False, "return_dict_in_generate": True}
    begun = model.generate(tokens, max_new_tokens=4, **options)
    assert getattr(begun, name) is begun[name]
    options["attention_mask"] = torch.ones_like(begun.sequences)
    more = model.generate(begun.sequences, max_new_tokens=4, **{name: begun[name]}, **options)
    assert torch.equal(more.plan[:, : begun.plan.shape[1]], begun.plan)
    assert torch.equal(model.generate(tokens, plan=more.plan, do_sample=False, max_new_tokens=8), more.sequences)


def test_both_names_of_the_cache_at_once_are_refused(model, tokens):
    caches = {"cache": PlanCache(model.config), "past_key_values": PlanCache(model.config)}
    for call in (model, lambda tokens, **caches: model.generate(tokens, **caches, **GREEDY)):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(tokens, **caches)


def test_both_names_read_the_cache_of_an_output(model, tokens):
    output = model(tokens)
    assert output.cache is output.past_key_values is output["cache"] is output["past_key_values"]
    assert "cache" in output
    assert output.get("cache") is output.cache
    assert isinstance(output.cache, PlanCache)


def test_the_configuration_decides_whether_a_cache_is_returned(model, tokens):
    assert model(tokens).cache is not None
    assert model(tokens, labels=tokens).cache is None
    assert model(tokens, labels=tokens, use_cache=True).cache is not None
    assert model(tokens, use_cache=False).cache is None
    model.config.use_cache = False
    assert model(tokens).cache is None
    assert model(tokens, use_cache=True).cache is not None


def test_gradient_checkpointing_takes_no_cache(model, tokens):
    cache = model(tokens).cache
    model.train().gradient_checkpointing_enable()
    assert model(tokens).cache is None
    with pytest.raises(ValueError, match="gradient checkpointing runs layers twice"):
        model(tokens[:, :1], cache=cache)


def test_guidance_is_refused(model, tokens):
    config = GenerationConfig(guidance_scale=1.5, max_new_tokens=3)
    for options in ({"guidance_scale": 2.0, **GREEDY}, {"generation_config": config}):
        with pytest.raises(ValueError, match=r"guidance_scale=.*has no plan"):
            model.generate(tokens, **options)
    model.generate(tokens, guidance_scale=1.0, **GREEDY)


# 5. Losses


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_a_step_without_labels_changes_nothing(tiny_model, tokens, items, skip_logits):
    model = tiny_model(free_bits=0.0)
    labels = torch.full_like(tokens, -100)
    output = model(tokens, labels=labels, num_items_in_batch=items, skip_logits=skip_logits)
    output.loss.backward()
    assert output.loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("columns", [16, 600])
@pytest.mark.parametrize("label", [-1, -99, 8192])
def test_labels_that_are_no_tokens_raise_in_short_and_long_batches(tiny_model, tokens_like, columns, label):
    model, tokens = tiny_model(torch.float32, vocab_size=8192), tokens_like(1, columns)
    labels = tokens.clone()
    labels[:, columns // 2] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        model(tokens, labels=labels, plan=model.sample_plan(1, columns), skip_logits=True)


@pytest.fixture
def trainer_of(tmp_path):
    def build(model, rows, **options) -> Trainer:
        arguments = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
        arguments |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 1, **options}
        return Trainer(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=rows)

    return build


def test_a_trainer_step_without_labels_leaves_weights_finite(tiny_model, tokens, trainer_of):
    model = tiny_model(torch.float32, free_bits=0.0)
    rows = [{"input_ids": row, "labels": torch.full_like(row, -100)} for row in tokens]
    trainer_of(model, rows).train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_trainers_that_keep_the_labels_from_the_model_are_refused(model, tokens, trainer_of, how):
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = trainer_of(model, rows, **({how: 0.1} if how == "label_smoothing_factor" else {}))
    if how == "compute_loss_func":
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()
    with pytest.raises(ValueError, match=rf"{how}.*encoder would not be trained"):
        trainer.train()


def test_a_loop_that_leaves_the_encoder_without_a_gradient_is_told(model, tokens, plan, recwarn):
    with torch.no_grad():
        model.train()(tokens)
    for options in ({"mode": "inference"}, {"plan": plan}, {"labels": tokens}, {"mode": "training"}):
        model(tokens, **options)
    model.eval()(tokens)
    assert not [each for each in recwarn if "encoder gets no gradient" in str(each.message)]
    with pytest.warns(UserWarning, match="the encoder gets no gradient. Pass labels or mode='training'"):
        model.train()(tokens)


@pytest.mark.parametrize("span", [2, "sequence"])
def test_predictions_of_a_trainer_are_only_logits(tiny_model, tokens_like, trainer_of, span):
    rows = [{"input_ids": row, "labels": row} for row in tokens_like(5, 8)]
    found = trainer_of(tiny_model(torch.float32, plan_span=span), rows).predict(rows).predictions
    assert isinstance(found, np.ndarray)
    assert found.shape == (5, 8, 32)


# 6. The surface that others expect


def test_hidden_states_and_attentions(tiny_model, tokens):
    model = tiny_model(attn_implementation="eager")
    plan = model.sample_plan(2, 8)
    output = model(tokens, plan=plan, output_hidden_states=True, output_attentions=True, logits_to_keep=1)
    assert [tuple(each.shape) for each in output.hidden_states] == [(2, 8, 16)] * 5
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(tokens))
    assert torch.equal(output.hidden_states[2], model.lower_layers(tokens).hidden_states)
    assert torch.equal(model.lm_head(output.hidden_states[-1][:, -1:]), output.logits)
    assert [tuple(each.shape) for each in output.attentions] == [(2, 2, 8, 8)] * 4
    for weights in output.attentions:
        assert_close(weights.sum(-1), torch.ones(2, 2, 8).double())
        assert (weights.triu(1) == 0).all()
    model.config.output_hidden_states = True
    assert len(model(tokens, plan=plan).hidden_states) == 5


def test_hidden_states_and_attentions_while_generating(tiny_model, tokens):
    model = tiny_model(attn_implementation="eager")
    options = {"output_hidden_states": True, "output_attentions": True, "return_dict_in_generate": True}
    output = model.generate(tokens, **options, **GREEDY)
    assert [each[-1].shape[1] for each in output.hidden_states] == [8, 1, 1, 1, 1, 1]
    assert [each[-1].shape[-1] for each in output.attentions] == [8, 9, 10, 11, 12, 13]


def test_attentions_that_a_backend_does_not_compute_are_refused(tiny_model, tokens):
    with pytest.raises(ValueError, match=r"output_attentions=True: attn_implementation='sdpa' computes no"):
        tiny_model(attn_implementation="sdpa")(tokens, output_attentions=True)


def test_a_tuple_is_returned_where_one_is_asked_for(model, tokens, plan):
    expected = model(tokens, plan=plan, labels=tokens)
    loss, logits, *_ = model(tokens, plan=plan, labels=tokens, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    model.config.return_dict = False
    assert isinstance(model(tokens, plan=plan), tuple)


@pytest.mark.parametrize("span", [2, "sequence"])
def test_prompt_tuning_trains_and_generates(tiny_model, tokens, span):
    model = tiny_model(torch.float32, plan_span=span)
    tuned = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    mask = torch.ones_like(tokens)
    tuned(tokens, attention_mask=mask, labels=tokens).loss.backward()
    assert tuned.generate(input_ids=tokens, attention_mask=mask, **GREEDY).shape == (2, 14)


def test_prefix_tuning_is_refused(model, tokens):
    tuned = get_peft_model(model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3))
    mask = torch.ones_like(tokens)
    for call in (
        lambda: tuned(tokens, attention_mask=mask, labels=tokens),
        lambda: tuned.generate(input_ids=tokens, attention_mask=mask, **GREEDY),
    ):
        with pytest.raises(ValueError, match=r"PEFT prefix tuning is not supported.*use LoRA"):
            call()


def test_continuous_batching_is_refused(model, tokens):
    for call in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(NotImplementedError, match="generate_batch: the continuous batching of transformers"):
            call(tokens.tolist())


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_padding_breaks_no_graph_of_a_compiler(model, tokens, mode):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for padding in (None, mask):
        found = []
        for call in (model, compiled):
            torch.manual_seed(0)
            options = {"labels": tokens} if mode == "training" else {}
            output = call(tokens, attention_mask=padding, **options)
            found.append(output.logits if mode == "inference" else output.loss)
        if mode == "inference" and padding is not None:
            found = [each[mask.bool()] for each in found]
        assert_close(*found)


@pytest.mark.parametrize("span", [2, "sequence"])
def test_plans_are_taken_as_text(tiny_model, tokens, span):
    model = tiny_model(plan_span=span)
    count = 4 if span == 2 else 1
    text, other = "1010" * count, "0110" * count
    bits = torch.tensor([[[True, False, True, False]] * count, [[False, True, True, False]] * count])
    assert torch.equal(model(tokens, plan=text).logits[0], model(tokens, plan=bits).logits[0])
    assert torch.equal(model(tokens, plan=[text, other]).logits, model(tokens, plan=bits).logits)
    assert torch.equal(
        model.generate(tokens, plan=[text, other], **GREEDY)[:, :9], model.generate(tokens, plan=bits, **GREEDY)[:, :9]
    )
    for wrong in ("10", "12ab", "", ["1010" * count, "1010" * count * 2], {"bits": 1}):
        with pytest.raises(ValueError, match="plan"):
            model(tokens, plan=wrong)


def test_a_pipeline_generates():
    model = FreeTransformer(FreeTransformerConfig(hidden_dim=32, num_layers=2, latent_dim=4, plan_span="sequence"))
    generate = pipeline("text-generation", model=model.eval(), tokenizer=byte_tokenizer())
    texts = generate(["one", "another"], max_new_tokens=5, batch_size=2)
    assert [text[0]["generated_text"][:3] for text in texts] == ["one", "ano"]


# 7. Defaults and precision


def test_default_special_tokens_are_those_of_the_default_vocabulary():
    tokenizer, config = byte_tokenizer(), FreeTransformerConfig()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name)
        assert getattr(FreeTransformerConfig(vocab_size=512), name) is None
        assert getattr(FreeTransformerConfig(**{name: None}), name) is None
        assert getattr(FreeTransformerConfig(vocab_size=512, **{name: 7}), name) == 7
        again = FreeTransformerConfig.from_dict(FreeTransformerConfig(vocab_size=512).to_diff_dict())
        assert getattr(again, name) is None


@pytest.mark.parametrize("latent_dim", [4, 14])
def test_the_aggregate_prior_stays_in_single_precision(tmp_path, tiny_model, tokens, latent_dim):
    model = tiny_model(torch.float32, latent_dim=latent_dim)
    model.gather_prior([{"input_ids": tokens}])
    exact = model.plan_prior.log_aggregate.clone()
    model.save_pretrained(tmp_path)
    cast = [copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model).half(), copy.deepcopy(model).bfloat16()]
    cast += [FreeTransformer.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    cast[0].save_pretrained(tmp_path / "again")
    cast.append(FreeTransformer.from_pretrained(tmp_path / "again"))
    for each in cast:
        assert each.dtype.itemsize == 2
        assert torch.equal(each.plan_prior.log_aggregate, exact)
    assert copy.deepcopy(model).double().plan_prior.log_aggregate.dtype == torch.float64
    assert copy.deepcopy(model).double().float().plan_prior.log_aggregate.dtype == torch.float32
    with _default_dtype(torch.bfloat16):
        assert tiny_model(torch.bfloat16).plan_prior.log_aggregate.dtype == torch.float32


class _default_dtype(nullcontext):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __enter__(self):
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)


# The two ends of the range of `transformers`


def test_arguments_that_transformers_looks_for_are_named():
    """`generate` and `Trainer` read the signature of `forward`."""
    names = set(inspect.signature(FreeTransformer.forward).parameters)
    assert names >= {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "inputs_embeds"}
    assert names >= {"labels", "use_cache", "logits_to_keep", "plan", "num_items_in_batch"}
