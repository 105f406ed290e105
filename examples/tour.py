"""
From text to controlled generation in five minutes on a CPU. Run it as a whole (`make tour`) or cell by cell (`# %%`)
from the root of the repository. It needs the extra `demo`. docs/tour.md explains what it prints.
"""

# %% 1. Text in three styles. Each document has a label that the models never see
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from three_styles.classifier import StyleClassifier
from three_styles.styles import STYLES, read_label, write_corpus

from free_transformer import quiet  # noqa: F401
from free_transformer.data import build_rows, byte_tokenizer
from free_transformer.evaluation import bit_effects, compare, evaluate_likelihood, measure_control
from free_transformer.evaluation.control import contingency
from free_transformer.evaluation.plan_ops import flip_bit
from free_transformer.model.plan import bits_to_codes
from free_transformer.model.plan_text import format_plan
from free_transformer.reporting.plots import plans_by_label
from free_transformer.training import load_settings, train

RUNS, SEQ_LEN, STEPS, TEXTS = Path("runs/tour"), 128, 1200, 150
write_corpus(RUNS)

# %% 2. Train a model with one plan of 8 bits for each window of text, and the same Llama without a plan
overrides = [f"data.train={RUNS}/train.jsonl", f"data.validation={RUNS}/validation.jsonl", "logging.sample_every=0"]
overrides += [f"training.seq_len={SEQ_LEN}", f"training.max_steps={STEPS}", "training.batch_size=16"]
overrides += ["training.eval_every=300", "training.log_every=100"]
runs = [
    train(load_settings("configs/free_transformer.yaml", [*overrides, f"model.kind={kind}", f"run_dir={RUNS}/{kind}"]))
    for kind in ("free", "baseline")
]
free, baseline = (run.load_model() for run in runs)

# %% 3. Held-out windows, the same number of each style
tokenizer = byte_tokenizer()
torch.manual_seed(0)


def windows(split: str, style: str, count: int) -> torch.Tensor:
    rows = build_rows(read_label(RUNS / f"{split}.jsonl", style), tokenizer, SEQ_LEN)
    whole = rows.tokens[(rows.positions == np.arange(SEQ_LEN)).all(1)]  # one document fills the row
    return torch.from_numpy(np.random.default_rng(0).permutation(whole)[:count]).long()


held_out = torch.cat([windows("validation", style, TEXTS) for style in STYLES])
styles = np.arange(len(STYLES)).repeat(TEXTS)
batches = [{"input_ids": part} for part in held_out.split(50)]

# %% 4. Is the plan used, and what does it cost? Only the NLL is comparable with the baseline's
with_plan, without = (evaluate_likelihood(model, batches, num_samples=16) for model in (free, baseline))
compared = compare(with_plan, without)
print(f"NLL {with_plan.nll:.4f} nats per byte, baseline {without.nll:.4f}:", end=" ")
print(f"{compared.difference:+.4f} ± {compared.standard_error:.4f}")
print(f"gap {with_plan.gap:.3f}: nats per byte that a random plan costs compared with the text's own")

# %% 5. What did it learn? The most common plans of each style, and what each bit does
plans = free.infer_plan(held_out) > 0  # (texts, 1, bits)
codes = bits_to_codes(plans[:, 0]).numpy()
most_common_plan = {}
for number, style in enumerate(STYLES):
    ranked = Counter(codes[styles == number]).most_common(3)
    firsts = [plans[codes == code][:1] for code, _ in ranked]
    most_common_plan[style] = firsts[0]
    shown = (f"{format_plan(plan[0])} × {count}" for plan, (_, count) in zip(firsts, ranked, strict=True))
    print(f"{style}:", *shown)
effects = bit_effects(free, batches)
for bit in effects:
    print(f"bit {bit.bit} spends {bit.spent:.2f} bits; flipping it: KL of {bit.effect:.4f} nats per byte")
plans_by_label(contingency(codes, styles)[1], STYLES).savefig(RUNS / "plans.png", dpi=120)

# %% 6. Control: the most common plan of each style, one of them with a flipped bit, and a random plan
strongest = max(effects, key=lambda bit: bit.effect).bit
wanted = {**most_common_plan, f"{STYLES[0]}, bit {strongest} flipped": flip_bit(most_common_plan[STYLES[0]], strongest)}
for title, plan in {**wanted, "a random plan": free.sample_plan(1, 1)}.items():
    start = torch.full((1, 1), tokenizer.bos_token_id)
    generated = free.generate(start, plan=plan, max_new_tokens=100, do_sample=True, temperature=0.7)
    print(f"{format_plan(plan[0])}, {title}: {' '.join(tokenizer.decode(generated[0, 1:]).split())}")

# %% 7. How strong is the control? By an independent classifier, compared with chance and the baseline
training = [windows("train", style, 1000) for style in STYLES]
known = np.repeat(range(len(STYLES)), [len(part) for part in training])
classify = StyleClassifier(tokenizer.batch_decode(torch.cat(training), skip_special_tokens=True), known)
control = measure_control(free, baseline, tokenizer, classify, held_out, styles)
print(f"agreement of texts under one random plan: {control.agreement[0]:.2f}", end=" ")
print(f"(shuffled plans {control.agreement_shuffled[0]:.2f}, baseline {control.agreement_baseline[0]:.2f})")
print(f"transfer from an example: {control.transfer[0]:.2f}", end=" ")
print(f"(shuffled plans {control.transfer_shuffled[0]:.2f})")
print(f"mutual information of plan and style: {control.mutual_information:.2f} of {control.label_entropy:.2f} bits")
