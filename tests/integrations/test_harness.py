import importlib
import json
import math
import os
import subprocess
import sys
from itertools import pairwise, product

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from enumeration import all_plans
from free_transformer import FreeTransformer
from free_transformer.cli.main import main
from free_transformer.data import byte_tokenizer
from free_transformer.errors import SettingsError
from free_transformer.evaluation import evaluate_likelihood
from free_transformer.model.initialization import build_baseline

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from free_transformer.integrations.harness import PlanHarnessLM, Row, find_tasks, log_mean_exp, result_table, run_tasks

BYTES = {"vocab_size": 259, "max_seq_len": 96, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
TOKENIZER = byte_tokenizer()
QUESTIONS = [
    {"q": "The cat", "choices": ["sat", "ran home", "slept"], "gold": 0},
    {"q": "A dog and a cat", "choices": ["ran", "sat on a mat", "hid"], "gold": 1},
    {"q": "Who is there?", "choices": ["A", "B", "C"], "gold": 2},
    {"q": "", "choices": ["a", "the mat", "z"], "gold": 0},
]
DOCUMENTS = ["a dog", "the cat sat on a mat. " * 8, "a dog ran home again and again"]
TASKS = {
    "pick": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: gold\n",
    "finish": "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{choices[gold]}}'\n"
    "metric_list: [{metric: acc}]\n",
    "read": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "write": "output_type: generate_until\ndoc_to_text: '{{q}} '\ndoc_to_target: '{{choices[gold]}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 8}\n",
}


@pytest.fixture
def free(tiny_model):
    """A model over bytes whose plan matters, in float64."""

    def build(**changes) -> FreeTransformer:
        model = tiny_model(**{**BYTES, "plan_span": "sequence", **changes})
        with torch.no_grad():
            model.plan_table.weight *= 2
        return model

    return build


@pytest.fixture
def task_folder(tmp_path, monkeypatch):
    """YAML files of tasks with JSONL data."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, body in TASKS.items():
        rows = [{"text": text} for text in DOCUMENTS] if name == "read" else QUESTIONS
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{body}")
    return folder


@pytest.fixture
def llama_folder(tiny_config, tmp_path):
    folder = tmp_path / "llama"
    build_baseline(tiny_config(**BYTES)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["free-transformer", "lm-eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


def adapter(model: FreeTransformer, **arguments) -> PlanHarnessLM:
    return PlanHarnessLM(model, tokenizer=TOKENIZER, **{"batch_size": 4, **arguments})


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, index, (kind, index, 1)) for index, each in enumerate(arguments)]


def scores(lm: HFLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def documents(lm: HFLM, *texts: str) -> list[float]:
    return lm.loglikelihood_rolling(requests("loglikelihood_rolling", *[(text,) for text in texts]), disable_tqdm=True)


def texts_of(lm: HFLM, *prompts: str, **kwargs) -> list[str]:
    options = {"until": ["."], "max_gen_toks": 8, **kwargs}
    return lm.generate_until(requests("generate_until", *[(prompt, options) for prompt in prompts]), disable_tqdm=True)


def pairs_of_questions() -> list[tuple[str, str]]:
    return [(each["q"], " " + choice) for each in QUESTIONS for choice in each["choices"]]


@torch.no_grad()
def under_each_plan(model: FreeTransformer, tokens: list[int], start: int, plans: torch.Tensor) -> torch.Tensor:
    """Logarithms of the next token's probabilities from `start` on, (plans, N, V), each by a separate call."""
    row = torch.tensor([tokens])
    logits = torch.cat(
        [model(row, mode="inference", plan=plan.view(-1, model.config.latent_dim)).logits for plan in plans]
    )
    return logits[:, start - 1 :].log_softmax(-1)


@torch.no_grad()
def chances(model: FreeTransformer, prompt: list[int], plans: torch.Tensor) -> torch.Tensor:
    """Probability of each plan of a prompt by the encoder, from its logits: (2^H, P, H) -> (2^H,)."""
    p = model.infer_plan(torch.tensor([prompt])).sigmoid()[0]
    return torch.where(plans, p, 1 - p).flatten(1).prod(1)


def test_the_mean_of_equal_values_is_that_value():
    values = torch.randn(20, dtype=torch.float64) * 100
    for draws in (1, 3, 16, 1000):
        means, errors = log_mean_exp(values.expand(draws, -1))
        assert (means == values).all()
        assert errors.isnan().all() if draws == 1 else (errors == 0).all()


def test_the_mean_is_that_of_probabilities_however_small():
    values = torch.randn(7, 5, dtype=torch.float64)
    means, _ = log_mean_exp(values - 5000)
    torch.testing.assert_close(means + 5000, values.exp().mean(0).log(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("prompt_plan", ["posterior", "prior"])
def test_a_continuation_has_the_mean_likelihood_over_plans(free, prompt_plan):
    model, pairs = free(), pairs_of_questions()
    lm = adapter(model, num_plans=300, prompt_plan=prompt_plan, batch_size=16)
    found = scores(lm, *pairs)
    errors = lm.standard_errors["loglikelihood"]
    assert min(errors) > 1e-3  # the plan matters
    plans = all_plans(4)[:, None]
    for (question, continuation), (value, greedy), error in zip(pairs, found, errors, strict=True):
        prompt = TOKENIZER(question)["input_ids"]
        wanted = list(continuation.encode())
        log_probs = under_each_plan(model, prompt + wanted[:-1], len(prompt), plans)
        weights = torch.full((16,), 1 / 16).double()
        if prompt_plan == "posterior" and question:  # an empty prompt has nothing to read
            weights = chances(model, prompt, plans)
        of_tokens = log_probs[:, range(len(wanted)), wanted]
        exact = (of_tokens.sum(1).exp() * weights).sum().log()
        assert abs(value - exact) < 4 * error
        assert not greedy


def test_a_plan_a_token_follows_the_prior_behind_the_prompt(free):
    model = free(plan_span=1, latent_dim=1)
    lm = adapter(model, num_plans=400)
    pairs = [("a", "bcd"), ("a", "bz"), ("ab", "yz")]
    found = scores(lm, *pairs)
    for (question, continuation), (value, _), error in zip(
        pairs, found, lm.standard_errors["loglikelihood"], strict=True
    ):
        prompt, wanted = TOKENIZER(question)["input_ids"], list(continuation.encode())
        tokens = prompt + wanted[:-1]
        plans = torch.tensor(list(product([False, True], repeat=len(tokens))))[..., None]  # (2^T, T, 1)
        weights = chances(model, prompt, plans[:, : len(prompt)]) * 0.5 ** (len(tokens) - len(prompt))
        assert weights.sum().item() == pytest.approx(1)
        log_probs = under_each_plan(model, tokens, len(prompt), plans)
        exact = (log_probs[:, range(len(wanted)), wanted].sum(1).exp() * weights).sum().log()
        assert 0 < error < 0.1
        assert abs(value - exact) < 4 * error


def test_greedy_is_the_most_likely_token_of_the_mean_over_plans(free):
    model = free()
    lm = adapter(model, num_plans=400, prompt_plan="prior")
    plans, prompt, written = all_plans(4)[:, None], TOKENIZER("The c")["input_ids"], []
    for _ in range(3):  # weights of plans by the text so far, in float64
        log_probs = under_each_plan(model, prompt + written, len(prompt), plans)
        past = log_probs[:, range(len(written)), written].sum(1)
        written.append(int((log_probs[:, -1] + past[:, None]).logsumexp(0).argmax()))
    singles = {
        tuple(each.argmax(-1).tolist()) for each in under_each_plan(model, prompt + written[:-1], len(prompt), plans)
    }
    assert singles != {tuple(written)}  # not what every plan would generate by itself
    made = [(("", ""), prompt, written), (("", ""), prompt, [*written[:-1], (written[-1] + 1) % 256])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(made, disable_tqdm=True)] == [True, False]


def test_plans_weigh_by_what_they_have_said_before():
    """On tables of random probabilities: the greedy continuation, and one with another last token."""
    unweighted = 0
    for _ in range(30):
        tables = (4 * torch.randn(6, 4, 5)).log_softmax(-1)  # plans, tokens, vocabulary
        past, wanted = torch.zeros(6).double(), []
        for table in tables.double().unbind(1):
            wanted.append(int((table + past[:, None]).exp().sum(0).argmax()))
            past = past + table[:, wanted[-1]]
        other = [*wanted[:-1], (wanted[-1] + 1) % 5]
        row = Row([0], [0, *wanted], torch.tensor([wanted, other]), whole=False, values=[])
        for table in tables:
            row.add(table, torch.tensor(0.0).double())
        (value, greedy, _), (_, greedy_other, _) = row.answers()
        assert (greedy, greedy_other) == (True, False)
        assert value == pytest.approx(past.exp().mean().log().item(), abs=1e-5)
        unweighted += tables.exp().mean(0).argmax(-1).tolist() == wanted
    assert unweighted < 25  # the weights matter


@pytest.mark.parametrize("prompt_plan", ["posterior", "prior"])
def test_a_document_has_the_likelihood_of_all_plans(free, prompt_plan):
    model, texts = free(), ["a dog", "the cat"]
    lm = adapter(model, num_plans=300, prompt_plan=prompt_plan)
    found = documents(lm, *texts)
    for text, value, error in zip(texts, found, lm.standard_errors["loglikelihood_rolling"], strict=True):
        tokens = torch.tensor([[256, *TOKENIZER(text)["input_ids"]]])  # the harness begins with a token of its own
        exact = evaluate_likelihood(model, [{"input_ids": tokens}], method="exact")
        assert 0 < error < 0.5
        assert abs(value + exact.nll * exact.tokens) < 4 * error


def test_windows_of_a_document_add_up(free):
    model = free(max_seq_len=16)
    lm = adapter(model, num_plans=8)
    text = "the cat sat on a mat and ran"
    value = documents(lm, text)[0]
    tokens = TOKENIZER(text)["input_ids"]
    windows = [([256], tokens[:16]), (tokens[len(tokens) - 17 : 16], tokens[16:])]
    parts = lm._loglikelihood_tokens([(None, *window) for window in windows], disable_tqdm=True)
    assert value == pytest.approx(sum(part for part, _ in parts), abs=1e-9)
    assert lm.standard_errors["loglikelihood_rolling"] == pytest.approx([math.hypot(*lm._errors[-2:])])


def test_the_standard_error_is_that_of_other_seeds(free):
    model, values, errors = free(), [], []
    for seed in range(40):
        lm = adapter(model, num_plans=32, plan_seed=seed)
        values.append(scores(lm, ("The cat", " sat on a mat"))[0][0])
        errors += lm.standard_errors["loglikelihood"]
    assert torch.tensor(values).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.35)


def test_the_encoder_reads_only_prompts(free, tiny_config):
    class Spy(nn.Module):
        def forward(self, hidden_states, mask):
            seen.append((mask[:, 0] * torch.arange(1, mask.shape[2] + 1)).amax(1).tolist())
            return hidden_states.new_zeros(*mask.shape[:2], 4)

    seen: list[list[int]] = []
    model = FreeTransformer(tiny_config(**BYTES, plan_span="sequence"), encoder=Spy()).double()
    scores(adapter(model, num_plans=2), ("The cat", " sat"), ("A dog", " ran home again"), ("A dog", " r"))
    assert sorted(seen[0]) == [6, 6, 8]  # begin-of-text and the prompt


@pytest.mark.parametrize("end", ["xy", "zz", " and a long end"])
def test_the_plan_does_not_depend_on_the_continuation(free, end):
    """Under one plan it can be told which it was."""
    model, prompt = free(), TOKENIZER("The cat")["input_ids"]

    def plan_of(continuation: str) -> int:
        value = scores(adapter(model, num_plans=1), ("The cat", continuation))[0][0]
        wanted = list(continuation.encode())
        log_probs = under_each_plan(model, prompt + wanted[:-1], len(prompt), all_plans(4)[:, None])
        distance = (log_probs[:, range(len(wanted)), wanted].sum(1) - value).abs()
        assert distance.min() < 1e-9 < distance.topk(2, largest=False).values[1]
        return int(distance.argmin())

    assert plan_of("a") == plan_of("a" + end)


@pytest.mark.parametrize("span", ["sequence", 1, 3])
def test_neither_the_batch_nor_the_order_changes_anything(free, span):
    model, pairs = free(plan_span=span), pairs_of_questions()
    model.plan_prior.gather([torch.randn(50, 4) * 3])
    found = []
    for batch_size, order in ((1, 1), (5, 1), (16, -1)):
        lm = adapter(model, num_plans=3, batch_size=batch_size, prior="aggregate")
        values = scores(lm, *pairs[::order])[::order]
        prompts = [each["q"] for each in QUESTIONS]
        found.append([*values, *documents(lm, *DOCUMENTS[::order])[::order], texts_of(lm, *prompts[::order])[::order]])
    for one, other in pairwise(found):
        assert one[-1] == other[-1]
        for a, b in zip(one[:-1], other[:-1], strict=True):
            assert a == pytest.approx(b, abs=1e-9)


def test_texts_are_written_under_the_plan_that_was_read(free):
    model = free()
    bits = torch.tensor([[True, False, False, True]])
    with torch.no_grad():
        model.encoder.readout.weight.zero_()
        model.encoder.readout.bias.copy_(torch.where(bits[0], 60.0, -60.0))
    prompts = ["The cat", "A dog and", "Wh"]
    tokens = [torch.tensor([TOKENIZER(prompt)["input_ids"]]) for prompt in prompts]
    expected = [
        model.generate(each, plan=bits, max_new_tokens=8, do_sample=False)[0, each.shape[1] :] for each in tokens
    ]
    found = texts_of(adapter(model), *prompts, until=[])
    assert found == [TOKENIZER.decode(each, skip_special_tokens=True) for each in expected]


def test_the_batch_can_be_found(free):
    model = free()
    lm = adapter(model, num_plans=2, batch_size="auto", max_batch_size=4)
    found = scores(lm, *pairs_of_questions())
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in scores(adapter(model, num_plans=2), *pairs_of_questions())]
    )
    assert documents(lm, *DOCUMENTS) == pytest.approx(documents(adapter(model, num_plans=2), *DOCUMENTS))


def test_a_long_prompt_is_cut_on_the_left(free):
    model = free(max_seq_len=16)
    long, continuation = "the cat sat on a mat", " and"
    value = scores(adapter(model, num_plans=2, prompt_plan="prior"), (long, continuation))[0][0]
    tokens = (TOKENIZER(long)["input_ids"] + list(continuation.encode()))[-17:]
    log_probs = under_each_plan(model, tokens[:-1], 13, all_plans(4)[:, None])[:, range(4), tokens[13:]].sum(1)
    means = torch.logaddexp(log_probs[:, None], log_probs) - math.log(2)  # of each pair of plans
    assert (means - value).abs().min() < 1e-9
    with pytest.raises(ValueError, match="a continuation of 20 tokens: this model reads at most 16"):
        scores(adapter(model), ("a", "the cat sat on a mat"))


@pytest.mark.parametrize("span", ["sequence", 2])
def test_a_prompt_that_comes_again_gets_another_plan(free, span, monkeypatch):
    model, given = free(plan_span=span, latent_dim=16, code_bits=4), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **kwargs: given.append(kwargs["plan"]) or generate(**kwargs))
    for _ in range(2):
        texts_of(adapter(model, prompt_plan="prior"), "The", "The", "The")
    first, again = given
    assert (first == again).all()
    assert len(first.flatten(1).unique(dim=0)) == 3


# Not in double precision: Llama computes its norms in single precision then, a Free Transformer does not.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_effect_of_the_plan_all_is_as_by_hf(llama_folder, dtype):
    llama = LlamaForCausalLM.from_pretrained(llama_folder, dtype=dtype)
    model = FreeTransformer.from_pretrained(llama_folder, dtype=dtype).eval()
    for batch_size in (1, 4):
        theirs = HFLM(pretrained=llama, tokenizer=TOKENIZER, batch_size=batch_size)
        ours = adapter(model, num_plans=3, batch_size=batch_size)
        assert scores(ours, *pairs_of_questions()) == scores(theirs, *pairs_of_questions())
        assert documents(ours, *DOCUMENTS) == documents(theirs, *DOCUMENTS)
        prompts = [each["q"] for each in QUESTIONS]
        assert texts_of(ours, *prompts) == texts_of(theirs, *prompts)
        assert set(ours.standard_errors["loglikelihood"]) == {0.0}


def test_results_of_tasks_are_as_by_hf(llama_folder, task_folder):
    found = []
    for lm in (
        HFLM(pretrained=str(llama_folder), device="cpu", batch_size=4),
        PlanHarnessLM(pretrained=llama_folder, num_plans=2, batch_size=4),
    ):
        results = run_tasks(lm, list(TASKS), task_folder)
        found.append([results[name] for name in ("results", "n-samples", "n-shot", "versions")])
    assert found[0] == found[1]
    assert all(value is not None for values in found[0][0].values() for value in values.values())


def test_zero_plan_vectors_give_the_logits_of_llama_bit_for_bit(llama_folder, tokens_like):
    llama = LlamaForCausalLM.from_pretrained(llama_folder).eval()
    model = FreeTransformer.from_pretrained(llama_folder).eval()
    tokens = tokens_like(3, 40)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(model(tokens, mode="inference").logits, llama(tokens).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_plans": 0}, "num_plans=0: must be at least 1"),
        ({"prompt_plan": "both"}, r"prompt_plan='both': one of \('posterior', 'prior'\)"),
        ({"prior": "aggregate"}, "this model has no aggregate prior"),
    ],
)
def test_values_that_cannot_be_are_told(free, arguments, message):
    with pytest.raises(ValueError, match=message):
        adapter(free(), **arguments)


def test_a_model_without_a_plan_is_told(llama_folder):
    with pytest.raises(ValueError, match="pretrained is a LlamaForCausalLM: a FreeTransformer or a folder"):
        PlanHarnessLM(LlamaForCausalLM.from_pretrained(llama_folder), tokenizer=TOKENIZER)


def test_a_task_of_another_name_is_told(task_folder):
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    assert find_tasks(manager, ["pi*", "pick", str(task_folder / "read.yaml")]) == [
        "pick",
        str(task_folder / "read.yaml"),
    ]
    with pytest.raises(SettingsError, match="task 'pik': there is no task of this name; did you mean pick"):
        find_tasks(manager, ["pik"])
    with pytest.raises(SettingsError, match="no such file"):
        find_tasks(manager, ["pick.yaml"])
    with pytest.raises(SettingsError, match="no tasks: name some"):
        find_tasks(manager, [])


def test_the_command_writes_results_with_their_plans(free, task_folder, tmp_path, command):
    model = free().float()
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    status, out, _ = command(
        folder, "--tasks", "pick,read", "--tasks", "write", "--include-path", task_folder, "--num-plans", 3,
        "--prompt-plan", "prior", "--limit", 3, "--seed", 5,
    )  # fmt: skip
    assert status == 0
    results = json.loads((folder / "lm_eval.json").read_text())
    config = results["config"]
    assert (config["num_plans"], config["prompt_plan"], config["plan_seed"]) == (3, "prior", 5)
    assert set(config["plan_standard_errors"]) == {"pick", "read"}
    table = result_table(results)
    header, rows = table.header, table.rows
    assert header == ["task", "items", "metric", "value", "plans", "± nats"]
    assert [row[0] for row in rows] == ["pick", "pick", "read", "read", "write"]
    assert [row[4] for row in rows] == ["3", "3", "3", "3", "1"]
    assert all(cell in out for row in rows for cell in row)


def test_the_command_runs_a_baseline_by_hf(llama_folder, task_folder, tmp_path, command):
    file = tmp_path / "results.json"
    status, out, _ = command(llama_folder, "--tasks", "pick", "--include-path", task_folder, "--output", file)
    assert status == 0 and "nats" not in out
    assert "num_plans" not in json.loads(file.read_text())["config"]


def test_what_is_wrong_is_one_line(llama_folder, task_folder, command, monkeypatch):
    status, _, err = command(llama_folder, "--tasks", "pick", "--include-path", task_folder / "none")
    assert status == 2 and "not a folder" in err
    status, _, err = command(
        llama_folder, "--tasks", "write", "--include-path", task_folder, "--gen-kwargs", "max_gen_toks=500"
    )
    assert status == 2 and err.splitlines()[-1].endswith("maximum sequence length (96).)")
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    status, _, err = command(llama_folder, "--tasks", "pick")
    assert status == 1 and err.splitlines()[-1].endswith("pip install 'free-transformer-lm[lm-eval]'")
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_command_line_of_lm_eval_knows_the_model(free, task_folder, tmp_path):
    """In a separate process, on the folder of a run."""
    model = free().float()
    model.save_pretrained(tmp_path / "run" / "model")
    TOKENIZER.save_pretrained(tmp_path / "run" / "model")
    arguments = f"pretrained={tmp_path / 'run'},num_plans=4,prompt_plan=posterior"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "free_transformer.integrations.lm_eval", "--model", "free-transformer"),
            *("--model_args", arguments, "--tasks", "pick,read", "--include_path", str(task_folder)),
            *("--batch_size", "4", "--output_path", str(tmp_path / "out.json")),
        ],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(next(tmp_path.glob("out*.json")).read_text())
    ours = run_tasks(adapter(model, num_plans=4), ["pick", "read"], task_folder)
    assert theirs["config"]["num_plans"] == 4
    for task in ("pick", "read"):
        for name, value in ours["results"][task].items():
            expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert theirs["results"][task][name] == expected


def test_a_run_is_found_by_its_folder(tmp_path, monkeypatch):
    harness = importlib.import_module("free_transformer.integrations.harness")
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert harness.model_folder(tmp_path / "run") == str(tmp_path / "run" / "model")
    assert harness.model_folder(tmp_path / "run" / "model") == str(tmp_path / "run" / "model")
    assert harness.model_folder(harness.Path("run")) == str(tmp_path / "run" / "model")
    assert harness.model_folder(harness.Path("owner/name")) == "owner/name"
