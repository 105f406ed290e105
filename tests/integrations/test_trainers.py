import math
import re
import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainingArguments

from free_transformer import FreeTransformer, build_baseline
from free_transformer.data import build_rows, byte_tokenizer
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.model.plan import BinaryMapper

datasets, peft, trl = (pytest.importorskip(name) for name in ("datasets", "peft", "trl"))
PlanTrainer = pytest.importorskip("free_transformer.integrations.trainer").PlanTrainer

LENGTH = 12
OF_DECODER = r"model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"  # the encoder has projections of the same names
OF_THE_PLAN = ["encoder", "plan_table"]
IN_EVALUATION = {"loss", "nll", "reconstruction", "kl", "prior", "gap"}


class PlanSFTTrainer(PlanTrainer, trl.SFTTrainer):
    pass


@pytest.fixture
def model(tiny_config):
    """fp32, three plans to a row of `LENGTH` tokens, its start always the same."""

    def build(**changes) -> FreeTransformer:
        torch.manual_seed(0)
        return FreeTransformer(tiny_config(**{"plan_span": 4, "free_bits": 0.25, **changes}))

    return build


@pytest.fixture
def arguments(tmp_path):
    """Of two steps of eight rows, a line of log each."""

    def build(kind=TrainingArguments, **changes) -> TrainingArguments:
        values = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1}
        values |= {"lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        return kind(tmp_path / "trainer", **{**values, "use_cpu": True, "bf16": False, **changes})

    return build


@pytest.fixture
def texts(model):
    """Sentences of different lengths for TRL, with a model and a tokenizer that read bytes."""
    lines = ["the cat sat on the mat", "a dog ran home", "all work and no play", "rain in spain falls mainly"]
    dataset = datasets.Dataset.from_dict({"text": [lines[i % 4][: 26 - i % 5] for i in range(32)]})
    sizes = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return {"model": model(**sizes), "train_dataset": dataset, "processing_class": byte_tokenizer()}


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(3, 32, (count, LENGTH), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in tokens]


def batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def certain_plans(monkeypatch) -> None:
    """The most likely plan instead of a sample, so that batches cut differently see the same plans."""
    monkeypatch.setattr(BinaryMapper, "forward", lambda self, plan_logits, generator=None: plan_logits > 0)


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_rows_of_the_library_are_a_data_set(model, arguments):
    text = ["the cat sat on the mat and saw", "a dog", "ran home", "all work and no play"] * 4  # whole, packed, padded
    packed = build_rows(text, byte_tokenizer(), LENGTH)
    sizes = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    trainer = PlanTrainer(model(**sizes), arguments(), train_dataset=packed, eval_dataset=packed, num_samples=2)
    trainer.train()
    given = batch([packed[index] for index in range(len(packed))])
    assert all(torch.equal(given[name], value) for name, value in packed.take(slice(None)).items())
    assert {"attention_mask", "position_ids"} <= packed.take(slice(None)).keys()
    torch.manual_seed(0)
    ours = evaluate_likelihood(trainer.model, packed.in_order(8), num_samples=64)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ours.elbo, abs=0.05)


def lines_with(trainer: Trainer, name: str) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if name in line]


def test_accumulating_four_batches_of_two_in_the_trainer_is_one_of_eight(model, arguments, monkeypatch):
    certain_plans(monkeypatch)
    one, other = model(free_bits=0.0), model(free_bits=0.0)
    before = copied(one)
    plain = {"optim": "sgd", "learning_rate": 0.5}  # Adam would make as much of rounding as of the gradient
    Trainer(one, arguments(**plain), train_dataset=rows()).train()
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    Trainer(other, arguments(**plain, **cut), train_dataset=rows()).train()
    assert changed(before, one) == set(dict(one.named_parameters()))
    assert_close(one.state_dict(), other.state_dict(), atol=1e-6, rtol=1e-5)


def test_the_trainer_divides_by_the_predicted_tokens(model, arguments, monkeypatch):
    certain_plans(monkeypatch)
    free = model()
    expected = free(**batch(rows(8))).loss.item()
    trainer = Trainer(free, arguments(max_steps=1), train_dataset=rows(8))
    trainer.train()
    assert_close(lines_with(trainer, "loss")[0]["loss"], expected, atol=1e-5, rtol=1e-5)


def test_what_the_trainer_saves_is_read_again(model, arguments, tmp_path):
    trainer = Trainer(model(), arguments(), train_dataset=rows())
    trainer.train()
    trainer.save_model(tmp_path / "model")
    tokens, plan = rows(2)[0]["input_ids"][None], torch.rand(1, 3, 4) < 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, FreeTransformer)
    assert_close(loaded(tokens, plan=plan).logits, trainer.model.eval()(tokens, plan=plan).logits, atol=0, rtol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_training_logs_the_parts_of_the_loss(model, arguments, accumulation, every):
    settings = arguments(max_steps=4, gradient_accumulation_steps=accumulation, logging_steps=every)
    trainer = PlanTrainer(model(kl_weight=0.7), settings, train_dataset=rows())
    trainer.train()
    lines = lines_with(trainer, "loss")
    assert len(lines) == 4 // every
    for line in lines:
        hinge = line["hinge"] * math.log(2) * 3 / (LENGTH - 1)  # three plans a row, in nats per predicted token
        assert_close(line["loss"], line["reconstruction"] + 0.7 * hinge, atol=1e-5, rtol=1e-5)
        assert 0 < line["kl"] - line["hinge"] < 0.251  # the free bits
    assert "kl" not in lines_with(trainer, "train_loss")[0]


def test_parts_of_the_loss_are_the_same_however_a_step_is_cut(model, arguments, monkeypatch):
    certain_plans(monkeypatch)
    logged = []
    for cut in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        trainer = PlanTrainer(model(), arguments(max_steps=4, logging_steps=2, **cut), train_dataset=rows())
        trainer.train()
        logged.append([[line[name] for name in ("loss", "reconstruction", "kl")] for line in lines_with(trainer, "kl")])
    assert len(logged[0]) == 2
    assert_close(*logged, atol=1e-4, rtol=1e-4)


def test_eval_loss_is_the_elbo(model, arguments):
    free, held_out = model(), rows(12)
    trainer = PlanTrainer(free, arguments(per_device_eval_batch_size=8, seed=3), eval_dataset=held_out, num_samples=5)
    metrics = trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]
    parts = []
    for number, part in enumerate((held_out[:8], held_out[8:])):
        torch.manual_seed(3 + number)
        parts.append(evaluate_likelihood(free, [batch(part)], num_samples=5))
    for name in IN_EVALUATION:
        first, last = (getattr(part, "elbo" if name == "loss" else name) for part in parts)
        assert_close(metrics[f"eval_{name}"], (8 * first + 4 * last) / 12, atol=1e-6, rtol=1e-6)
    again = trainer.evaluate()
    assert all(again[f"eval_{name}"] == metrics[f"eval_{name}"] for name in IN_EVALUATION)


def test_metrics_are_computed_from_logits_that_have_not_read_the_answer(model, arguments):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    free = model()
    settings = arguments(per_device_eval_batch_size=4)
    trainer = PlanTrainer(free, settings, eval_dataset=rows(8), compute_metrics=compute_metrics)
    before = trainer.evaluate()
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == before["eval_loss"]
    trainer.compute_metrics = compute_metrics
    with torch.no_grad():
        free.encoder.readout.weight.mul_(0.1)
    after = trainer.evaluate()
    assert seen[0].predictions.shape == (8, LENGTH, 32)
    assert_close(seen[0].label_ids, batch(rows(8))["labels"].numpy())
    assert_close(seen[0].predictions, seen[1].predictions, atol=0, rtol=0)
    assert after["eval_accuracy"] == before["eval_accuracy"]
    assert after["eval_kl"] < 0.1 * before["eval_kl"]


def test_rows_without_labels_are_predicted_and_not_evaluated(model, arguments):
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows(4)]
    output = PlanTrainer(model(), arguments()).predict(unlabelled)
    assert output.predictions.shape == (4, LENGTH, 32)
    assert "test_loss" not in output.metrics


def test_evaluating_between_steps_changes_nothing_of_training(model, arguments):
    weights = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = PlanTrainer(
            model(attention_dropout=0.1),
            arguments(max_steps=4, **evaluation),
            train_dataset=rows(),
            eval_dataset=rows(4),
        )
        trainer.train()
        weights.append(copied(trainer.model))
    assert len(lines_with(trainer, "eval_loss")) == 4
    assert_close(*weights, atol=0, rtol=0)


def test_the_best_checkpoint_and_early_stopping_go_by_the_elbo(model, arguments):
    settings = arguments(
        max_steps=8,
        learning_rate=3.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    callbacks = [EarlyStoppingCallback(early_stopping_patience=2)]
    trainer = PlanTrainer(model(), settings, train_dataset=rows(), eval_dataset=rows(8), callbacks=callbacks)
    trainer.train()
    losses = [line["eval_loss"] for line in lines_with(trainer, "eval_loss")]
    assert len(losses) < 8
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == min(losses)


def test_another_model_is_trained_and_evaluated_as_ever(tiny_config, arguments):
    histories = []
    for kind in (Trainer, PlanTrainer):
        torch.manual_seed(0)
        trainer = kind(
            build_baseline(tiny_config()), arguments(eval_strategy="epoch"), train_dataset=rows(), eval_dataset=rows(4)
        )
        trainer.train()
        names = ("loss", "eval_loss", "grad_norm")
        histories.append([{n: line[n] for n in names if n in line} for line in trainer.state.log_history])
        assert all(not {"kl", "eval_kl"} & line.keys() for line in trainer.state.log_history)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("changes", [{"label_smoothing_factor": 0.1}, {"kind": trl.SFTConfig, "loss_type": "dft"}])
def test_losses_that_know_no_kl_are_refused(texts, arguments, changes):
    kind = PlanSFTTrainer if "kind" in changes else PlanTrainer
    with pytest.raises(ValueError, match="without the KL"):
        kind(args=arguments(**changes), **texts)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trains_the_plan_and_evaluates_it(texts, arguments, packing):
    settings = arguments(
        trl.SFTConfig,
        max_steps=30,
        max_length=64,
        packing=packing,
        per_device_train_batch_size=2 if packing else 8,
        eval_strategy="steps",
        eval_steps=15,
    )
    before = copied(texts["model"])
    trainer = PlanSFTTrainer(args=settings, eval_dataset=texts["train_dataset"].select(range(8)), **texts)
    text = trainer.train_dataset[0]["input_ids"]
    assert (text[0], text[-1]) == (256, 257)  # begin and end of a text
    trainer.train()
    lines = lines_with(trainer, "loss")
    assert lines[-1]["reconstruction"] < 0.7 * lines[0]["reconstruction"]
    assert all(math.isfinite(line["kl"]) for line in lines)
    first, last = lines_with(trainer, "eval_loss")
    assert last["eval_loss"] < first["eval_loss"]
    assert {f"eval_{name}" for name in IN_EVALUATION} <= last.keys()
    assert changed(before, texts["model"]) == set(dict(texts["model"].named_parameters()))


def test_documents_that_sft_packs_into_a_row_do_not_see_each_other(texts, arguments):
    held_out = texts["train_dataset"].select(range(8))
    losses = []
    for packing in (False, True):
        settings = arguments(trl.SFTConfig, max_length=64, packing=packing, per_device_eval_batch_size=8)
        trainer = PlanSFTTrainer(args=settings, eval_dataset=held_out, num_samples=64, **texts)
        losses.append(trainer.evaluate())
    assert len(trainer.eval_dataset) < len(held_out)
    assert_close(losses[0]["eval_kl"], losses[1]["eval_kl"], atol=1e-5, rtol=1e-5)  # no random numbers in it
    assert_close(losses[0]["eval_loss"], losses[1]["eval_loss"], atol=0.02, rtol=0)


def test_plain_sft_never_trains_the_llama_without_its_plan(texts, arguments):
    """TRL computes its loss from the decoder, which refuses, or (as TRL 1.0) leaves it to the model."""
    trainer = trl.SFTTrainer(args=arguments(trl.SFTConfig), **texts)
    before = trainer.model.encoder.readout.weight.detach().clone()
    try:
        trainer.train()
    except ValueError as error:
        assert re.search(r"has no plan.*PlanTrainer: class PlanSFTTrainer", str(error))
    else:
        assert not torch.equal(trainer.model.encoder.readout.weight, before)


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_trainers_on_preferences_or_rewards_are_refused(model, tmp_path, kind):
    model(vocab_size=259).save_pretrained(tmp_path / "model")
    loaded = FreeTransformer.from_pretrained(tmp_path / "model")  # TRL loads its reference from there
    options = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False, "max_steps": 1}
    options |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "save_strategy": "no"}
    rows, more = {"prompt": ["a"] * 4, "chosen": [" b"] * 4, "rejected": [" c"] * 4}, {}
    if kind == "GRPO":
        options |= {"num_generations": 2, "max_completion_length": 3}
        more["reward_funcs"] = lambda completions, **_: [float(len(each)) for each in completions]
    base, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")(**options)
    texts = {"train_dataset": datasets.Dataset.from_dict(rows), "processing_class": byte_tokenizer(), **more}
    message = r"(?i)trainers on preferences or rewards"
    with pytest.raises(ValueError, match=message):
        type("PlanFirst", (PlanTrainer, base), {})(loaded, args=config, **texts).train()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:  # as TRL computes its loss: from the decoder, which refuses, or from logits without labels, with a warning
            base(loaded, args=config, **texts).train()
        except ValueError as error:
            assert re.search(message, str(error))
        else:
            assert [each for each in said if re.search(message, str(each.message))]


@pytest.fixture
def adapted(model, arguments):
    """A trainer of a model whose plan is trained in full and whose decoder by adapters, and the weights before it."""

    def build(target_modules=OF_DECODER):
        lora = peft.LoraConfig(r=2, target_modules=target_modules, modules_to_save=OF_THE_PLAN, task_type="CAUSAL_LM")
        peft_model = peft.get_peft_model(model(), lora)
        before = copied(peft_model)
        trainer = PlanTrainer(peft_model, arguments(max_steps=4), train_dataset=rows(), eval_dataset=rows(8))
        trainer.train()
        return trainer, before

    return build


def test_adapters_and_the_plan_change_and_nothing_else(adapted):
    trainer, before = adapted()
    names = changed(before, trainer.model)
    assert names == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    for part in ("encoder.modules_to_save", "plan_table.modules_to_save", "layers.0.self_attn.q_proj.lora_A"):
        assert any(part in name for name in names)
    assert all("lora_" in name or ".modules_to_save." in name for name in names)
    assert not any("encoder" in name and "lora_" in name for name in names)
    assert lines_with(trainer, "kl")


def test_adapters_are_evaluated_saved_merged_and_read_again(adapted, model, tmp_path):
    trainer, _ = adapted()
    peft_model, plan, tokens = trainer.model.eval(), torch.rand(8, 3, 4) < 0.5, batch(rows(8))["input_ids"]
    metrics = trainer.evaluate()
    expected = peft_model(input_ids=tokens, plan=plan).logits
    peft_model.save_pretrained(tmp_path / "adapters")
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "adapters")
    assert_close(loaded(input_ids=tokens, plan=plan).logits, expected, atol=0, rtol=0)
    assert_close(loaded.get_base_model().infer_plan(tokens), peft_model.get_base_model().infer_plan(tokens))
    written = loaded.generate(input_ids=tokens, plan=plan, max_new_tokens=1, do_sample=False)
    assert torch.equal(written[:, -1], expected[:, -1].argmax(-1))
    merged = loaded.merge_and_unload()
    assert isinstance(merged, FreeTransformer)
    assert_close(merged(tokens, plan=plan).logits, expected, atol=1e-5, rtol=1e-5)
    torch.manual_seed(trainer.args.seed)
    likelihood = evaluate_likelihood(merged, [batch(rows(8))], trainer.num_samples)
    assert_close(metrics["eval_loss"], likelihood.elbo, atol=1e-5, rtol=1e-5)


def test_adapters_by_the_names_of_llama_leave_a_plan_trained_in_full_alone(adapted):
    trainer, _ = adapted(target_modules=["q_proj", "v_proj"])
    assert not any("encoder" in name and "lora_" in name for name in trainer.model.state_dict())


def test_sft_with_adapters(texts, arguments):
    lora = peft.LoraConfig(r=2, target_modules=OF_DECODER, modules_to_save=OF_THE_PLAN, task_type="CAUSAL_LM")
    trainer = PlanSFTTrainer(
        args=arguments(trl.SFTConfig), peft_config=lora, eval_dataset=texts["train_dataset"], **texts
    )
    trainer.train()
    assert lines_with(trainer, "kl")
    assert {f"eval_{name}" for name in IN_EVALUATION} <= trainer.evaluate().keys()


def test_what_a_pretrained_model_does_not_bring_learns_at_rates_of_its_own(tiny_config, arguments, tmp_path):
    build_baseline(tiny_config()).save_pretrained(tmp_path / "llama")
    model = FreeTransformer.from_pretrained(tmp_path / "llama", latent_dim=4)
    before = copied(model)
    settings = arguments(max_steps=2, learning_rate=1e-4, lr_scheduler_type="constant", weight_decay=0.1)
    trainer = PlanTrainer(model, settings, train_dataset=rows())
    trainer.train()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    rates = {names[p]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert rates.keys() == changed(before, trainer.model) == before.keys() - {"plan_prior.log_aggregate"}
    for name, rate in rates.items():
        scale = model.config.stream_scale
        expected = 1e-2 * scale if "plan_table" in name else 1e-3 if name.startswith("encoder") else 1e-4
        assert rate == pytest.approx(expected), name
    again = PlanTrainer(model, settings, train_dataset=rows(), plan_learning_rate=0.5)
    assert 0.5 in {group["lr"] for group in again.create_optimizer().param_groups}


@pytest.mark.parametrize(("changes", "by_row"), [({}, True), ({"optim": "sgd"}, False)])
def test_of_a_large_codebook_only_rows_of_sampled_plans_are_updated(model, arguments, monkeypatch, changes, by_row):
    certain_plans(monkeypatch)
    net = model(latent_dim=13)
    with torch.no_grad():
        plan_logits = net(batch(rows())["input_ids"], mode="training").plan_logits
    before = copied(net)
    trainer = PlanTrainer(net, arguments(max_steps=1, weight_decay=0.5, **changes), train_dataset=rows())
    trainer.train()
    (group,) = [g for g in trainer.optimizer.param_groups if any(p is net.plan_table.weight for p in g["params"])]
    assert group.get("by_row", False) == by_row
    moved = (net.plan_table.weight != before["plan_table.weight"]).any(1)
    if by_row:
        sampled = net.plan_table.group_codes(plan_logits > 0).flatten().tolist()
        assert group["weight_decay"] == 0
        assert moved.any() and {*moved.nonzero().flatten().tolist()} <= {*sampled}
        state = trainer.optimizer.state_dict()
        again = PlanTrainer(net, arguments(max_steps=1), train_dataset=rows()).create_optimizer()
        again.load_state_dict(state)
        assert any(each.get("by_row") for each in again.param_groups)
