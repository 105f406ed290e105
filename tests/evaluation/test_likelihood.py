import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from enumeration import SIZES
from free_transformer import FreeTransformer, FreeTransformerConfig, build_baseline, codes_to_bits
from free_transformer.evaluation import (
    Likelihood,
    agreement,
    compare,
    evaluate_likelihood,
    mutual_information,
    plan_usage,
    share_in_class,
    usage_warning,
)
from free_transformer.evaluation.control import contingency, mutual_information_bias
from free_transformer.evaluation.likelihood import ratio_standard_error
from free_transformer.model.layout import num_plans
from free_transformer.model.losses import LossWeights, kl_bits

LN2 = math.log(2)
SPANS = ["sequence", 2]
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture
def model():
    """All plans can be enumerated, and they matter: the head and the posterior are far from flat."""

    def build(**changes) -> FreeTransformer:
        model = FreeTransformer(FreeTransformerConfig(**{**SIZES, **changes})).eval()
        with torch.no_grad():
            model.lm_head.weight.mul_(3)
            model.plan_table.weight.mul_(2)
            model.encoder.readout.weight.mul_(10)
            model.encoder.readout.bias.uniform_(-1, 1)
        return model

    return build


@pytest.fixture
def llama():
    model = LlamaForCausalLM(FreeTransformerConfig(**SIZES).to_llama()).eval()
    model.lm_head.weight.data.normal_()
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], shape)


def nats(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of each row, (B,)."""
    losses = F.cross_entropy(logits[:, :-1].double().transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.sum(1)


@torch.no_grad()
def enumerated(model: FreeTransformer, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`-log p(x)` and the expected reconstruction under the posterior of each row, over all plans, (B,)."""
    bits, plans = model.config.latent_dim, num_plans(model.config.plan_span, tokens.shape[1])
    everything = codes_to_bits(torch.arange(2 ** (bits * plans)), bits * plans).view(-1, plans, bits)
    losses = torch.stack([nats(model(tokens, plan=plan).logits, tokens) for plan in everything])  # (plans, B)
    p = model.infer_plan(tokens).double().sigmoid()  # (B, P, H)
    posterior = torch.where(everything[:, None], p, 1 - p).prod(-1).prod(-1)
    return -((-losses).logsumexp(0) - bits * plans * LN2), (posterior * losses).sum(0)


def batch_of(tokens: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": tokens, **more}


def packed_row(documents: list[torch.Tensor], length: int, labels: bool = True) -> dict[str, torch.Tensor]:
    """Documents one behind the other in a row, padding behind them."""
    tokens, positions = torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.long)
    filled = torch.cat(documents)
    tokens[: len(filled)] = filled
    positions[: len(filled)] = torch.cat([torch.arange(len(document)) for document in documents])
    real = torch.arange(length) < len(filled)
    batch = {"input_ids": tokens, "position_ids": positions, "attention_mask": real.long()}
    if labels:
        batch["labels"] = tokens.masked_fill(~real | (positions == 0), -100)
    return {name: values[None] for name, values in batch.items()}


def padded(tokens: torch.Tensor, length: int, side: str) -> dict[str, torch.Tensor]:
    missing = length - tokens.shape[1]
    space = (missing, 0) if side == "left" else (0, missing)
    return {"input_ids": F.pad(tokens, space), "attention_mask": F.pad(torch.ones_like(tokens), space)}


def result(**changes) -> Likelihood:
    """A likelihood of 100 plans, 10 tokens each, that gain 0.5 nats per token, as numbers."""
    values = {"reconstruction": 1.0, "kl": 3.0, "kl_per_token": 0.3, "prior": 1.5, "gap": 0.5}
    values.update(
        standard_errors={"gap": 0.01}, tokens=1000, documents=100, method="importance", num_samples=4, nll=1.2
    )
    return Likelihood(**{**values, **changes})


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("length", [4, 5])
def test_nll_falls_to_the_enumerated_one_from_above_as_plans_are_added(model, span, length):
    model, tokens = model(plan_span=span), random_tokens(3, length)
    truth = float(enumerated(model, tokens)[0].sum()) / (3 * (length - 1))
    copies = 200  # independent estimates of the same three rows
    batches = [batch_of(tokens.repeat(copies, 1))]
    means, errors = [], []
    for samples in (1, 4, 32, 256):
        totals = evaluate_likelihood(model, batches, samples).per_document["nll"].reshape(copies, 3).sum(1)
        means.append((totals / (3 * (length - 1))).mean())
        errors.append((totals / (3 * (length - 1))).std(ddof=1) / copies**0.5)
    assert means[0] - truth > 0.02  # plans matter, so that one plan is a loose bound
    assert all(mean > truth - 4 * error for mean, error in zip(means, errors, strict=True))
    assert means[0] > means[1] > means[2] > means[3] - 3 * errors[3]
    assert abs(means[3] - truth) < 0.02 * (means[0] - truth) + 4 * errors[3]


@pytest.mark.parametrize("span", SPANS)
def test_elbo_is_reconstruction_and_kl_and_lies_above_the_nll(model, span):
    model, tokens = model(plan_span=span), random_tokens(4, 6)
    value = evaluate_likelihood(model, [batch_of(tokens)] * 20, 64)
    truth, reconstruction = (float(each.mean()) / 5 for each in enumerated(model, tokens))
    kl = float(kl_bits(model.infer_plan(tokens)).sum(-1).mean()) / 5
    assert_close(value.elbo, value.reconstruction + LN2 * value.kl_per_token)
    assert_close(value.kl_per_token, kl, **CLOSE)
    assert_close(value.kl, kl * 5 / num_plans(span, 6), **CLOSE)
    assert_close(value.reconstruction, reconstruction, atol=0.02, rtol=0)
    assert truth < value.nll + 0.01 < value.elbo


def test_prior_is_the_loss_under_an_independent_plan(model):
    model, tokens = model(plan_span="sequence"), random_tokens(2, 6)
    with torch.no_grad():
        plans = codes_to_bits(torch.arange(4), 2)[:, None]
        expected = torch.stack([nats(model(tokens, plan=plan).logits, tokens) for plan in plans]).mean() / 5
    value = evaluate_likelihood(model, [batch_of(tokens)] * 400, 1)
    assert_close(value.prior, float(expected), atol=4 * value.standard_errors["prior"], rtol=0)
    assert_close(value.gap, value.prior - value.reconstruction)


@pytest.mark.parametrize("latent_dim", [1, 3])
def test_exact_is_the_enumerated_nll(model, latent_dim):
    model, tokens = model(plan_span="sequence", latent_dim=latent_dim), random_tokens(3, 7)
    value = evaluate_likelihood(model, [batch_of(tokens[:2]), batch_of(tokens[2:])], 1, method="exact")
    truth = enumerated(model, tokens)[0]
    assert_close(torch.from_numpy(value.per_document["nll"]), truth, **CLOSE)
    assert_close(value.nll, float(truth.sum()) / 18, **CLOSE)
    assert (value.method, value.tokens, value.documents) == ("exact", 18, 3)


def test_exact_serves_a_text_of_one_plan_whatever_the_span(model):
    model, tokens = model(plan_span=8), random_tokens(2, 8)
    value = evaluate_likelihood(model, [batch_of(tokens)], 1, method="exact")
    assert_close(torch.from_numpy(value.per_document["nll"]), enumerated(model, tokens)[0], **CLOSE)


@pytest.mark.parametrize("changes", [{"plan_span": 2}, {"plan_span": 1}, {"plan_span": "sequence", "latent_dim": 11}])
def test_exact_is_refused_where_there_are_too_many_plans(model, changes):
    with pytest.raises(ValueError, match="use method='importance'"):
        evaluate_likelihood(model(**changes), [batch_of(random_tokens(1, 6))], method="exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"method": "guess"}, "method='guess': one of"), ({"num_samples": 0}, "num_samples=0: must be at least 1")],
)
def test_unknown_method_and_no_samples_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_likelihood(model(), [batch_of(random_tokens(1, 4))], **arguments)


def test_nothing_to_predict_is_refused(model):
    tokens = random_tokens(2, 4)
    for batches in ([], [batch_of(tokens, labels=torch.full_like(tokens, -100))], [batch_of(tokens[:, :1])]):
        with pytest.raises(ValueError, match="no tokens to predict"):
            evaluate_likelihood(model(), batches)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_runs_without_dropout_and_leaves_the_mode_as_it_was(model, training):
    model, tokens = model(plan_span="sequence", dropout=0.9), random_tokens(2, 6)
    truth = enumerated(model.eval(), tokens)[0]
    model.train(training)
    value = evaluate_likelihood(model, [batch_of(tokens)], 1, method="exact")
    assert model.training is training
    assert_close(torch.from_numpy(value.per_document["nll"]), truth, **CLOSE)
    with pytest.raises(ValueError):
        evaluate_likelihood(model, [])
    assert model.training is training


@pytest.mark.parametrize("kind", ["free", "baseline"])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("length", [13, 16])
def test_documents_in_a_packed_row_are_evaluated_as_alone(model, llama, kind, length, labels):
    documents = [random_tokens(size) for size in (5, 2, 6)]
    each = model(plan_span="sequence") if kind == "free" else llama
    value = evaluate_likelihood(each, [packed_row(documents, length, labels)], 1, method="exact")
    alone = [evaluate_likelihood(each, [batch_of(document[None])], 1, method="exact") for document in documents]
    assert (value.documents, value.tokens) == (3, 10)
    for name in ("nll", "tokens"):
        assert_close(value.per_document[name], np.concatenate([a.per_document[name] for a in alone]), **CLOSE)


@pytest.mark.parametrize("span", [2, 3, "sequence"])
def test_kl_of_packed_documents_is_that_of_each_alone(model, span):
    model, documents = model(plan_span=span), [random_tokens(size) for size in (5, 2, 7)]
    value = evaluate_likelihood(model, [packed_row(documents, 17)], 1)
    alone = [evaluate_likelihood(model, [batch_of(document[None])], 1) for document in documents]
    for name in ("kl_bits", "plans", "tokens"):
        assert_close(value.per_document[name], np.concatenate([each.per_document[name] for each in alone]), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, llama, side):
    tokens = random_tokens(2, 6)
    for each in (model(plan_span="sequence"), llama):
        alone = evaluate_likelihood(each, [batch_of(tokens)], 1, method="exact")
        value = evaluate_likelihood(each, [padded(tokens, 9, side)], 1, method="exact")
        assert value.tokens == alone.tokens == 10
        assert_close(value.per_document["nll"], alone.per_document["nll"], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths_count_by_their_tokens(model, llama, side):
    short, long = random_tokens(1, 4), random_tokens(1, 9)
    rows = [padded(short, 9, side), padded(long, 9, side)]
    batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    for each in (model(plan_span="sequence"), llama):
        value = evaluate_likelihood(each, [batch], 1, method="exact")
        alone = [evaluate_likelihood(each, [batch_of(t)], 1, method="exact") for t in (short, long)]
        assert_close(value.nll, sum(a.nll * a.tokens for a in alone) / 11, **CLOSE)


def test_a_batch_without_labels_predicts_every_token_but_the_first(model):
    model, tokens = model(plan_span="sequence"), random_tokens(2, 6)
    own = evaluate_likelihood(model, [batch_of(tokens)], 1, method="exact")
    labeled = evaluate_likelihood(model, [batch_of(tokens, labels=tokens)], 1, method="exact")
    assert own.tokens == labeled.tokens == 10
    assert_close(own.nll, labeled.nll)


def test_labels_say_what_counts(model):
    model, tokens = model(plan_span="sequence"), random_tokens(2, 6)
    labels = tokens.clone()
    labels[0], labels[1, :4] = -100, -100
    value = evaluate_likelihood(model, [batch_of(tokens, labels=labels)], 2)
    assert (value.tokens, value.documents) == (2, 1)


def test_how_rows_are_cut_into_batches_changes_no_exact_number(model):
    model, tokens = model(plan_span="sequence"), random_tokens(5, 6)
    whole, parts = (evaluate_likelihood(model, map(batch_of, tokens.split(n)), 1, method="exact") for n in (5, 2))
    assert_close(whole.nll, parts.nll, **CLOSE)
    assert_close(whole.standard_errors["nll"], parts.standard_errors["nll"], **CLOSE)


def test_nll_of_a_baseline_is_its_own_loss_and_there_is_nothing_else(llama):
    tokens = random_tokens(3, 8)
    with torch.no_grad():
        expected = float(llama(tokens, labels=tokens).loss)
    value = evaluate_likelihood(llama, [batch_of(tokens)])
    assert_close(value.nll, expected, **CLOSE)
    for name in ("reconstruction", "kl", "kl_per_token", "elbo", "prior", "gap", "usage"):
        assert getattr(value, name) is None
    assert value.standard_errors.keys() == {"nll"}
    assert usage_warning(value) is None


def test_half_precision_weights_are_evaluated_in_full_precision_losses(model):
    model, tokens = model(plan_span="sequence"), random_tokens(4, 8)
    full = evaluate_likelihood(model, [batch_of(tokens)], 1, method="exact")
    half = evaluate_likelihood(model.bfloat16(), [batch_of(tokens)], 1, method="exact")
    assert_close(half.nll, full.nll, atol=0.05, rtol=0.02)
    assert all(math.isfinite(error) for error in half.standard_errors.values())


def test_standard_error_of_documents_of_one_size_is_that_of_their_mean():
    totals = np.random.default_rng(0).normal(5, 2, 50)
    assert_close(ratio_standard_error(totals, np.full(50, 4.0)), totals.std(ddof=1) / 50**0.5 / 4)


def test_standard_error_is_that_of_a_bootstrap_over_documents():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 50, 300).astype(float)
    totals = sizes * (2 + rng.normal(0, 0.5, 300)) + rng.normal(0, 3, 300)
    drawn = rng.integers(300, size=(4000, 300))
    bootstrap = (totals[drawn].sum(1) / sizes[drawn].sum(1)).std()
    assert_close(ratio_standard_error(totals, sizes), bootstrap, atol=0, rtol=0.08)


def test_one_document_has_no_standard_error():
    assert math.isnan(ratio_standard_error(np.ones(1), np.ones(1)))


def test_every_number_comes_with_its_standard_error(model):
    value = evaluate_likelihood(model(plan_span=2), [batch_of(random_tokens(6, 5))], 2)
    assert value.standard_errors.keys() == {"nll", "reconstruction", "elbo", "prior", "gap", "kl", "kl_per_token"}
    assert all(error > 0 for error in value.standard_errors.values())
    for name in ("nll", "reconstruction", "elbo", "prior"):
        assert_close(getattr(value, name), value.per_document[name].sum() / value.per_document["tokens"].sum())


def test_usage_counts_bits_by_position_live_ones_and_plans_at_the_floor():
    logits = torch.tensor([[80.0, 0.0, 0.1], [-80.0, 0.0, 0.0], [80.0, 80.0, 0.0], [80.0, 0.0, 0.0]])
    usage = plan_usage(logits, free_bits=1.0)
    assert_close(usage.bits_per_position, [1.0, 0.25, 0.0], atol=1e-3, rtol=0)
    assert_close(usage.bits_used, 1.25, atol=1e-3, rtol=0)
    assert usage.live_bits == 2
    assert usage.share_at_floor == 0.75
    assert plan_usage(logits, free_bits=0.5).share_at_floor == 0.0


def test_bits_that_all_texts_share_are_no_information():
    sure = torch.tensor([[80.0, 80.0, 80.0, 0.0], [80.0, 80.0, -80.0, 0.0]])  # two shared bits, one informative bit
    usage = plan_usage(sure.repeat(8, 1), free_bits=4.0)
    assert_close(usage.bits_used, 3.0, atol=1e-4, rtol=0)
    assert_close(usage.information, 1.0, atol=1e-4, rtol=0)
    assert_close(plan_usage(torch.randn(4, 1).expand(4, 9).T.repeat(5, 1), 1.0).information, 0.0, atol=1e-5, rtol=0)


def test_the_information_of_a_bit_is_that_of_bit_and_text():
    logits = torch.randn(50, 3)
    p = logits.double().sigmoid().numpy()
    joint = np.stack([p, 1 - p]) / len(p)  # of a random bit and text, (2, texts, bits)
    independent = joint.sum(1, keepdims=True) / len(p)
    expected = (joint * np.log2(joint / independent)).sum()
    assert_close(plan_usage(logits, 1.0).information, expected, atol=1e-5, rtol=0)


def test_usage_leaves_out_plans_of_padding(model):
    model, tokens = model(plan_span=2), random_tokens(1, 4)
    alone, more = (evaluate_likelihood(model, [b], 1) for b in (batch_of(tokens), padded(tokens, 10, "right")))
    assert_close(more.usage.bits_per_position, alone.usage.bits_per_position, **CLOSE)
    assert_close(more.kl, alone.kl, **CLOSE)


def test_a_plan_that_the_decoder_ignores_gives_a_warning_whatever_its_kl(model):
    model = model(plan_span="sequence")
    with torch.no_grad():
        model.plan_table.weight.zero_()
        model.encoder.readout.bias.fill_(20)
        model.encoder.readout.weight.zero_()
    value = evaluate_likelihood(model, [batch_of(random_tokens(32, 6))], 4)
    assert value.kl > 1.9
    assert abs(value.gap) < 1e-5
    warning = usage_warning(value)
    assert "the plan is not used" in warning
    assert "2.00 bits" in warning
    assert "Try" not in warning  # what to change depends on the settings of the run
    assert "latent_dim" not in warning


def test_a_plan_that_all_texts_share_gives_a_warning_whatever_its_gap(model):
    """The decoder depends on a single plan: any other disturbs it, although the plan carries no information."""
    model = model(plan_span="sequence")
    with torch.no_grad():
        model.encoder.readout.bias.fill_(20)
        model.encoder.readout.weight.zero_()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "encoder" not in n], lr=1e-2)
    tokens = random_tokens(32, 6)
    for _ in range(60):
        model(tokens, labels=tokens, loss_weights=LossWeights.of(model.config, kl_weight=0.0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    value = evaluate_likelihood(model, [batch_of(tokens)], 4)
    assert value.kl > 1.9
    assert value.gap * 5 > 0.1 and value.gap > 2 * value.standard_errors["gap"]
    assert (
        "the plan carries no information: all texts have the same plan; only 0.000 of its 2.00 bits"
        in usage_warning(value)
    )


def test_a_plan_that_carries_the_text_gives_no_warning():
    """The plan's one bit says which of two letters fills the text, and the posterior reads it."""
    config = FreeTransformerConfig(**{**SIZES, "latent_dim": 1, "free_bits": 1.0, "plan_span": "sequence"})
    model = FreeTransformer(config)
    tokens = torch.cat([torch.ones(16, 1, dtype=torch.long), (torch.arange(16) % 2 + 5)[:, None].expand(-1, 4)], 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    value = evaluate_likelihood(model, [batch_of(tokens)], 4)
    assert value.gap > 0.1
    assert value.usage.live_bits == 1
    assert usage_warning(value) is None


def test_the_warning_follows_the_gap_and_its_error():
    assert usage_warning(result()) is None
    assert "not used" in usage_warning(result(gap=0.0))
    assert "not used" in usage_warning(result(gap=-0.5))
    assert "not used" in usage_warning(result(gap=0.5, standard_errors={"gap": 0.4}))
    assert "not used" in usage_warning(result(gap=0.001, standard_errors={"gap": 0.0001}))  # 0.014 bits a plan


def test_the_warning_needs_no_kl_to_be_given():
    assert "not used" in usage_warning(result(kl=0.0, kl_per_token=0.0, gap=0.0))


def test_one_document_whose_plan_matters_gives_no_warning():
    assert usage_warning(result(documents=1, standard_errors={"gap": math.nan})) is None


def test_comparison_pairs_the_documents(model, llama):
    free, tokens = model(plan_span="sequence"), random_tokens(40, 6)
    ours = evaluate_likelihood(free, [batch_of(tokens)], 4, method="exact")
    theirs = evaluate_likelihood(llama, [batch_of(tokens)])
    comparison = compare(ours, theirs)
    differences = (ours.per_document["nll"] - theirs.per_document["nll"]) / 5
    assert_close(comparison.difference, ours.nll - theirs.nll)
    assert_close(comparison.elbo_difference, ours.elbo - theirs.nll)
    assert_close(comparison.standard_error, differences.std(ddof=1) / 40**0.5)
    assert (comparison.nll, comparison.baseline_nll) == (ours.nll, theirs.nll)


def test_a_model_without_use_of_its_plan_differs_by_nothing_from_its_llama():
    config = FreeTransformerConfig(**{**SIZES, "plan_span": "sequence", "table_init": "zero"})
    free, baseline = FreeTransformer(config).eval(), build_baseline(config).eval()
    baseline.load_state_dict({k: v for k, v in free.state_dict().items() if "plan" not in k and "encoder" not in k})
    batches = [batch_of(random_tokens(8, 6))]
    comparison = compare(evaluate_likelihood(free, batches, method="exact"), evaluate_likelihood(baseline, batches))
    assert_close(comparison.difference, 0.0, atol=1e-5, rtol=0)
    assert_close(comparison.standard_error, 0.0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("other", [(8, 7), (7, 6), (8, 6)])
def test_comparison_of_different_text_is_refused(model, llama, other):
    free = evaluate_likelihood(model(plan_span="sequence"), [batch_of(random_tokens(8, 6))], 1)
    with pytest.raises(ValueError, match="different text"):
        compare(free, evaluate_likelihood(llama, [batch_of(random_tokens(*other))]))


def test_contingency_counts_pairs_of_codes_that_occur():
    seen, table = contingency(np.array([7, 3, 7, 7]), np.array([0, 2, 1, 0]))
    assert seen.tolist() == [3, 7]
    assert table.tolist() == [[0, 0, 1], [2, 1, 0]]


@pytest.mark.parametrize("kinds", [2, 3, 8])
def test_mutual_information_of_identical_labels_is_their_entropy(kinds):
    labels = np.arange(kinds).repeat(10)
    assert_close(mutual_information(labels * 5 + 1, labels), math.log2(kinds))
    assert_close(mutual_information(np.zeros_like(labels), labels), 0.0)


def test_mutual_information_of_independent_labels_is_their_bias():
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(16, size=5000), rng.integers(3, size=5000)) for _ in range(30)]
    found = np.mean([mutual_information(*pair) for pair in pairs])
    assert_close(found, mutual_information_bias(*pairs[0]), atol=0, rtol=0.15)
    assert_close(mutual_information_bias(*pairs[0]), 15 * 2 / (2 * 5000 * LN2))


def test_mutual_information_by_hand():
    codes, labels = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    entropy = 1.0 - (0.75 * (-2 / 3 * math.log2(2 / 3) - 1 / 3 * math.log2(1 / 3)))
    assert_close(mutual_information(codes, labels), entropy)


def test_agreement_is_the_share_of_the_most_common_label_of_each_plan():
    share, error = agreement(np.array([[0, 0, 0, 0], [1, 2, 1, 0], [2, 1, 1, 1]]))
    assert_close(share, (1 + 0.5 + 0.75) / 3)
    assert_close(error, 0.25 / 3**0.5)
    assert math.isnan(agreement(np.array([[0, 1]]))[1])


def test_share_in_class_is_that_of_texts_with_the_label_wanted_of_them():
    share, error = share_in_class(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 0]))
    assert share == 0.75
    assert_close(error, (0.75 * 0.25 / 4) ** 0.5)
