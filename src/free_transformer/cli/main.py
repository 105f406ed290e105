"""
The command line: thin, so that whatever it does can be done from Python too.

Each command imports what it needs: `--help` waits for nothing, and `serve --onnx` runs where torch is not installed.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.table import Table
from typer.core import TyperCommand

from free_transformer import quiet  # noqa: F401  # before what it quiets
from free_transformer.errors import SettingsError
from free_transformer.files import (
    WRITTEN_BY,
    check_own_file,
    check_own_results,
    check_replaceable,
    own_folder,
    write_json,
)
from free_transformer.model.sampling import Sampling, check_seed
from free_transformer.reporting.console import stderr_console, stdout_console, tolerate_any_encoding

# typer carries click's classes under a name that has changed; this one is theirs in every version
UsageError: Any = typer.BadParameter.__base__
INTERRUPTED = 130
PATH_OPTIONS = ("--out", "--output", "--onnx", "--include-path", "--plan-from")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Train, judge honestly and steer Transformers that draw a plan before they write. "
    "Every command takes --debug, which shows the traceback of an error.",
)
reproduce = typer.Typer(no_args_is_help=True, help="Experiments of the paper, measured in full.")
app.add_typer(reproduce, name="reproduce")
console = stdout_console()

ConfigArgument = Annotated[Path, typer.Argument(help="YAML file of settings", metavar="CONFIG")]
RunArgument = Annotated[Path, typer.Argument(help="folder that train has written", metavar="RUN")]
RunsArgument = Annotated[list[Path], typer.Argument(help="folders that train has written", metavar="RUN...")]
DataOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--data", help="held-out text instead of the run's own; may be given again"),
]
SamplesOption = Annotated[int, typer.Option(min=1, help="plans drawn for each text in the likelihood bound")]
MethodOption = Annotated[
    str,
    typer.Option(
        help="importance (a bound), particle_filter (a tighter one where texts have many plans), or exact (one plan of "
        "up to 10 bits a text)"
    ),
]
PriorOption = Annotated[
    str, typer.Option(help="what plans are drawn from: uniform, or aggregate (the plans that training texts took)")
]
RowsOption = Annotated[int, typer.Option(min=1, help="rows at the most, drawn at random")]
BatchOption = Annotated[int, typer.Option(min=1, help="rows at a time")]
SeedOption = Annotated[
    int, typer.Option(help="seed of the plans and of the text, -2**63 to 2**64 - 1", callback=check_seed)
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace existing files, whoever wrote them")]


class _TrainCommand(TyperCommand):
    """Describes the settings only to those who ask."""

    def format_help(self, *args: Any) -> None:
        from free_transformer.settings import describe_settings

        self.epilog = "Settings, as section.name=value:\n\n" + describe_settings()
        super().format_help(*args)


@app.command(cls=_TrainCommand)
def train(
    config: ConfigArgument,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="changes, as in training.learning_rate=3e-4", metavar="[SECTION.NAME=VALUE]..."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="run a few steps, report parameters, memory, tokens and time, and exit without training"
        ),
    ] = False,
    allow_change: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="setting that may differ from those of the run that is resumed although the run then continues on "
            "other text, such as data.train or training.seed; all for every one; can be repeated",
            metavar="SECTION.NAME",
        ),
    ] = None,
) -> None:
    """
    Train a Free Transformer (model.kind=free) or its baseline, or resume a run that was stopped.

    Examples: `free-transformer train config.yaml`, `free-transformer train config.yaml training.max_steps=2000`
    """
    from free_transformer.training import Run, load_settings
    from free_transformer.training import train as train_run

    settings = load_settings(config, overrides)
    if dry_run:
        _preview(settings)
        return
    check_own_file(Run(settings.run_dir).report_file)
    run = train_run(settings, allow_change=allow_change or ())
    if os.environ.get("RANK", "0") == "0":
        from free_transformer.runs.report import write_run_report

        console.print(f"report: {write_run_report(run.path)}", soft_wrap=True)


@app.command()
def sweep(
    config: ConfigArgument,
    more: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="further settings of the grid", metavar="[SECTION.NAME=VALUE,VALUE]..."),
    ] = None,
    grid: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="settings to vary, as in model.latent_dim=8,16 training.seed=0,1,2; one value is for all runs"
        ),
    ] = None,
) -> None:
    """Train and evaluate every combination of some settings, one after the other; a table of means over seeds."""
    from free_transformer.training.sweep import load_sweep, run_sweep
    from free_transformer.training.sweep_summary import sweep_table

    loaded = load_sweep(config, [*(grid or []), *(more or [])])
    run_sweep(loaded)
    _print_table(*sweep_table(loaded))
    console.print(f"report: {loaded.folder / 'report.html'}", soft_wrap=True)
    if loaded.failed:
        names = ", ".join(run.name for run in loaded.failed)
        raise RuntimeError(f"{len(loaded.failed)} of {len(loaded.runs)} runs failed: {names}; sweep.json says why")


@app.command()
def evaluate(
    run: RunArgument,
    data: DataOption = None,
    num_samples: SamplesOption = 16,
    method: MethodOption = "importance",
    prior: PriorOption = "uniform",
    max_rows: RowsOption = 1000,
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
) -> None:
    """Measure the likelihood of held-out text honestly, and whether the plan is used; writes metrics.json."""
    from free_transformer.reporting.report import likelihood_table, usage_table
    from free_transformer.training import Run

    check_own_results(Run(run).evaluation_file, "nll")
    with _joined() as processes:
        likelihood, bytes_per_token = _evaluate(
            run, data, num_samples, method, prior, max_rows, batch_size, seed, processes
        )
    if not processes.main:
        return
    evaluated = Run(run)
    warning = evaluated.write_evaluation(likelihood, bytes_per_token, data)  # before a terminal may fail to show it
    header, rows = likelihood_table(likelihood, bytes_per_token)
    shown = [0, 1, 2, 4]  # what each number is stands in the report; a terminal is narrow
    _print_table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])
    _print_table(*usage_table(likelihood))
    if warning:
        console.print(f"warning: {warning}", style="yellow")
    console.print(f"{likelihood.documents} texts, {likelihood.tokens} tokens; written to {evaluated.evaluation_file}")


@app.command()
def compare(
    run: RunArgument,
    baseline_run: Annotated[Path, typer.Argument(help="run of the baseline", metavar="BASELINE_RUN")],
    data: DataOption = None,
    num_samples: SamplesOption = 16,
    method: MethodOption = "importance",
    prior: PriorOption = "uniform",
    max_rows: RowsOption = 1000,
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
) -> None:
    """Compare a run with its baseline by what may be compared; writes comparison.json into RUN."""
    from free_transformer.evaluation import compare as compare_likelihoods
    from free_transformer.training import Run

    check_own_results(Run(run).comparison_file, "difference")
    data = data or Run(run).settings.data.validation  # both runs on the same text
    if Run(run).load_tokenizer().get_vocab() != Run(baseline_run).load_tokenizer().get_vocab():
        raise SettingsError(f"{run} and {baseline_run} have different tokenizers: their losses cannot be compared")
    with _joined() as processes:
        (free, bytes_per_token), (baseline, _) = (
            _evaluate(each, data, num_samples, method, prior, max_rows, batch_size, seed, processes)
            for each in (run, baseline_run)
        )
    if not processes.main:
        return
    if free.elbo is None or baseline.elbo is not None:
        raise SettingsError("compare takes a run of kind free, then one of kind baseline")
    result = compare_likelihoods(free, baseline)
    Run(run).write_comparison(result, bytes_per_token)
    rows = [
        ["nll, baseline", f"{result.baseline_nll:.4f}", f"{result.baseline_nll / bytes_per_token:.4f}"],
        ["nll, free", f"{result.nll:.4f}", f"{result.nll / bytes_per_token:.4f}"],
        [
            "difference",
            f"{result.difference:+.4f} ± {result.standard_error:.4f}",
            f"{result.difference / bytes_per_token:+.4f} ± {result.standard_error / bytes_per_token:.4f}",
        ],
        [
            "difference of the elbo",
            f"{result.elbo_difference:+.4f}",
            f"{result.elbo_difference / bytes_per_token:+.4f}",
        ],
    ]
    _print_table(["", "nats per token", "nats per byte"], rows)


@app.command()
def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Option(help="text to go on from; none writes from nothing")] = "",
    plan: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="bits of the plan, bit 0 first, as in 01101001; several plans one after the other"),
    ] = None,
    plan_from: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="text file whose plan to write under"),
    ] = None,
    prompt_plan: Annotated[
        str, typer.Option(help="plan of the prompt: posterior (read by the encoder) or prior")
    ] = "posterior",
    prior: PriorOption = "uniform",
    num_samples: Annotated[int, typer.Option(min=1, help="texts to write")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of a text in tokens")] = 200,
    temperature: Annotated[float, typer.Option(help="0 (the most likely token) to 100")] = 0.8,
    top_k: Annotated[int, typer.Option(help="sample from this many most likely tokens; 0 means all")] = 0,
    top_p: Annotated[
        float, typer.Option(help="sample from the most likely tokens with this much probability, 0 to 1")
    ] = 1.0,
    stream: Annotated[bool, typer.Option(help="show the text while it is written (one sample)")] = False,
    seed: SeedOption = 0,
) -> None:
    """Write text: under plans drawn at random, under given bits, or under the plan of an example."""
    import torch
    from transformers import TextStreamer

    from free_transformer.evaluation.plan_ops import plan_of_text
    from free_transformer.model.plan_text import format_plan, parse_plan
    from free_transformer.runtime.onnx_model import EXPORT_FILE

    if plan is not None and plan_from is not None:
        raise SettingsError("give --plan or --plan-from, not both")
    if stream and num_samples > 1:
        raise SettingsError("--stream shows one text: use --num-samples 1")
    checked = Sampling(temperature, top_k, top_p)
    sampling: dict[str, Any] = {"do_sample": False}  # whatever the generation_config.json of a converted Llama says
    if not checked.greedy:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": checked.top_k, "top_p": top_p}
    if (run / EXPORT_FILE).is_file():
        if stream:
            raise SettingsError("an ONNX export writes without --stream; OnnxFreeTransformer.stream gives the tokens")
        options = {"max_new_tokens": max_new_tokens, "prompt_plan": prompt_plan, "prior": prior, "seed": seed}
        _write_by_onnx(run, prompt, plan, plan_from, num_samples, {**options, **sampling})
        return
    with _joined(tensor=True) as processes:
        model, tokenizer = _load(run)
        _spread(model, processes)
        bits: Any = getattr(model.config, "latent_dim", None)
        if bits is None and (plan is not None or plan_from is not None):
            raise SettingsError(f"{run}: a baseline has no plan")
        arguments: dict[str, Any] = {}
        if plan is not None:
            arguments["plan"] = parse_plan(plan, bits)
        if plan_from is not None:
            arguments["plan"] = plan_of_text(model, tokenizer, _read_text(plan_from))
        torch.manual_seed(seed)
        tokens = _prompt_tokens(tokenizer, prompt).expand(num_samples, -1).to(model.device)
        if bits is not None:
            arguments.update(prompt_plan=prompt_plan, prior=prior)
        arguments.update(sampling)
        if stream and processes.main:
            arguments["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)
        output = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            **arguments,
        )
    if stream or not processes.main:
        return
    plans = output.get("plan")
    for index, text in enumerate(tokenizer.batch_decode(output.sequences, skip_special_tokens=True)):
        title = f"sample {index + 1}" if plans is None else f"sample {index + 1}, plan {format_plan(plans[index])}"
        console.rule(title, align="left")
        console.print(text, soft_wrap=True)


@app.command()
def convert(
    pretrained: Annotated[
        str, typer.Argument(help="folder, or name on the hub, of a Llama, Mistral, Qwen 2 or Qwen 3", metavar="LLAMA")
    ],
    out: Annotated[Path, typer.Argument(help="the folder to write", metavar="OUT")],
    latent_dim: Annotated[int, typer.Option(min=1, help="bits of one plan")] = 8,
    plan_span: Annotated[str, typer.Option(help="tokens that a plan covers: a number, or sequence")] = "sequence",
    code_bits: Annotated[
        int, typer.Option(min=1, help="bits of a group with a table of its own; 1 learns fastest from zero")
    ] = 1,
    check: Annotated[bool, typer.Option(help="compare the logits with LLAMA's")] = True,
    merge_plan: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="the other way: LLAMA is a Free Transformer, OUT the plain model under this plan", metavar="BITS"
        ),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn a pretrained Llama into a Free Transformer with the same logits, whose plan is yet to be trained."""
    from free_transformer.export import convert as conversion

    if merge_plan is not None:
        conversion.merge_plan(Path(pretrained), out, merge_plan, overwrite)
        console.print(f"written to {out}, without a plan", soft_wrap=True)
        return
    span = int(plan_span) if plan_span.isdigit() else plan_span
    settings = {"latent_dim": latent_dim, "plan_span": span, "code_bits": code_bits}
    with console.status(f"reading {pretrained}"):
        done = conversion.convert(pretrained, out, check=check, overwrite=overwrite, **settings)
    _print_table(["new", "parameters", "starts as"], [[p.name, f"{p.parameters:,}", p.start] for p in done.parts])
    if done.difference is not None:
        difference = f"largest difference from the logits of {pretrained}: {done.difference:.2g}"
        console.print(difference, soft_wrap=True)
    console.print(f"written to {out}; train it with model.pretrained={out}", soft_wrap=True)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[
        str,
        typer.Option(
            help="onnx: graphs for onnxruntime and TensorRT; torch: a model folder, with --quantize; aot: packages of "
            "machine code for C++, with --static"
        ),
    ] = "onnx",
    quantize: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="int8-weight (matrices in 8 bits) or int8-dynamic (products of integers)"),
    ] = None,
    static: Annotated[
        Optional[tuple[int, int]],  # noqa: UP045
        typer.Option(help="fix the number of texts and of tokens, for TensorRT", metavar="BATCH LENGTH"),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder to write: new, empty or of an earlier export; default: RUN/TO-QUANTIZE-BATCHxLENGTH"),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a trained model for use elsewhere: ONNX graphs, 8-bit weights, compiled packages; checked against it."""
    if to not in ("onnx", "torch", "aot"):
        raise SettingsError(f"--to {to}: onnx, torch or aot")
    if to == "torch" and (quantize is None or static is not None):
        raise SettingsError("--to torch is for --quantize, and takes no --static")
    if to == "aot" and (static is None or quantize is not None):
        raise SettingsError("--to aot needs --static BATCH LENGTH, and takes no --quantize")
    sizes = "x".join(map(str, static or ()))
    folder = out or run / "-".join(part for part in (to, quantize, sizes) if part)
    check_replaceable(folder, "export", overwrite, [run, run / "model"])
    model, text_tokenizer = _load(run)
    with console.status(f"writing {folder}"):
        differences = _write_export(model, text_tokenizer, to, quantize, static, folder, overwrite)
    _print_table(*_difference_table(differences))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console.print(f"{size / 1e6:.1f} MB, written to {folder}", soft_wrap=True)


@app.command()
def serve(
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="folder of a run, or of a saved model", metavar="RUN"),
    ] = None,
    onnx: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="serve this ONNX export instead, without PyTorch", metavar="FOLDER"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="address to listen on; 0.0.0.0 accepts connections from other machines")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0 chooses a free one")] = 8000,
    token: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            envvar="FREE_TRANSFORMER_TOKEN",
            help="token that requests must send; the variable keeps it out of the process list",
        ),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="name of the model in requests; default: the folder's"),
    ] = None,
    max_batch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="maximum number of texts generated together; default: 32, for an ONNX export 8"),
    ] = None,
    max_length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=2, help="maximum tokens of prompt and answer together; default: the model's, at most 2048"),
    ] = None,
    max_prompt: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="maximum tokens of a prompt; default: what max-length allows"),
    ] = None,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="maximum tokens of an answer; default: what max-length allows"),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="maximum number of texts in the queue; beyond it, requests get status 429")
    ] = 512,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="processor threads per matrix product; default: all cores"),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="seconds that texts in progress have to finish after SIGTERM or Ctrl-C")
    ] = 20,
    keep_alive: Annotated[
        int,
        typer.Option(
            min=1, help="seconds until an idle connection is closed; behind a proxy, set more than the proxy's"
        ),
    ] = 5,
    max_connections: Annotated[int, typer.Option(min=1, help="maximum number of open connections")] = 900,
    allowed_host: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="host name that requests may be sent to, * for any; can be repeated. Default: this machine's names "
            "on a loopback address, any name otherwise"
        ),
    ] = None,
    cors_origin: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="origin of web pages that may call the server, * for any; can be repeated"),
    ] = None,
) -> None:
    """
    Serve a model over HTTP, compatible with OpenAI's completions and chat completions APIs.

    Examples: `free-transformer serve runs/my-run`, `free-transformer serve --onnx runs/my-run/onnx --port 9000`
    """
    try:
        from free_transformer.serving.access import is_loopback, local_hosts
        from free_transformer.serving.app import create_app, listen
        from free_transformer.serving.app import run as run_server
    except ImportError as error:
        raise ImportError(f"a server needs {error.name}: pip install 'free-transformer-lm[serve]'") from error

    folder = onnx or run
    if folder is None or (run is not None and onnx is not None):
        raise SettingsError("name a RUN, or an export with --onnx FOLDER, and not both")
    bound = listen(host, port)
    build = partial(_torch_batch if onnx is None else _onnx_batch, folder, max_batch, max_length, threads)
    name = name or folder.resolve().name
    token = (token or "").strip() or None  # a variable that was read from a file may end with a new line
    address, port = bound.getsockname()[:2]
    hosts = allowed_host
    if is_loopback(address):
        hosts = [*local_hosts(host), *(allowed_host or ())]
    server = create_app(build, name, max_prompt, max_tokens, max_waiting, token, hosts, cors_origin or ())
    batch = server.state.engine.batch
    shown = f"[{address}]" if ":" in address else address
    console.print(
        f"{name} at http://{shown}:{port}/v1, {batch.max_rows} texts at a time of up to {batch.max_length} tokens",
        highlight=False,
        soft_wrap=True,
    )
    if not token and not is_loopback(address):
        console.print("warning: whoever reaches this address may use it; --token asks for one", style="yellow")
    run_server(server, bound, grace, keep_alive, max_connections)


@app.command(name="lm-eval")
def lm_eval(
    run: Annotated[Path, typer.Argument(help="folder that train has written, or of a model", metavar="RUN")],
    tasks: Annotated[
        list[str], typer.Option(help="names, separated by commas, patterns, or YAML files; may be given again")
    ],
    include_path: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder of YAML files with tasks of your own", metavar="FOLDER"),
    ] = None,
    num_plans: Annotated[int, typer.Option(min=1, help="plans that a likelihood is averaged over")] = 16,
    prompt_plan: Annotated[
        str, typer.Option(help="plan of a prompt: posterior (read by the encoder) or prior")
    ] = "posterior",
    prior: PriorOption = "uniform",
    num_fewshot: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="examples before each question, default the task's own"),
    ] = None,
    limit: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="items of each task, or a share of them under 1; default all"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="texts at a time")] = 8,
    gen_kwargs: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="how texts are written, as in temperature=0.8,do_sample=True; default as the task says"),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="prompts in the form of the tokenizer's chat template")
    ] = False,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="the file of results, default RUN/lm_eval.json"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="seed of the plans, the texts and the few-shot examples")
    ] = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Run tasks of lm-evaluation-harness, likelihoods averaged over plans; a baseline by the harness's own hf."""
    try:
        from lm_eval.models.huggingface import HFLM

        from free_transformer.integrations.harness import PlanHarnessLM, result_table, run_tasks
    except ImportError as error:
        raise ImportError(f"tasks need {error.name}: pip install 'free-transformer-lm[lm-eval]'") from error
    from free_transformer.distributed.processes import find_device

    file = output or run / "lm_eval.json"
    check_own_file(file, overwrite)
    model, text_tokenizer = _load(run)
    arguments = {"pretrained": model.to(find_device("auto")), "tokenizer": text_tokenizer, "batch_size": batch_size}
    if hasattr(model, "infer_plan"):
        lm: Any = PlanHarnessLM(**arguments, num_plans=num_plans, prompt_plan=prompt_plan, prior=prior, plan_seed=seed)
    else:
        lm = HFLM(**arguments, backend="causal")
    names = [name.strip() for each in tasks for name in each.split(",") if name.strip()]
    results = run_tasks(lm, names, include_path, num_fewshot, limit, seed, apply_chat_template, gen_kwargs)
    write_json(file, {"written_by": WRITTEN_BY, **results})
    _print_table(*result_table(results))
    meaning = "± nats is over plans, of a request's log-likelihood; " if hasattr(model, "infer_plan") else ""
    console.print(f"{meaning}written to {file}", soft_wrap=True)


@app.command(name="plan")
def what_bits_do(
    run: RunArgument,
    data: DataOption = None,
    plan: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="plan whose bits are flipped in the samples, default a random one"),
    ] = None,
    prompt: Annotated[str, typer.Option(help="text that the samples go on from")] = "",
    max_rows: Annotated[int, typer.Option(min=1, help="rows of held-out text that the effect is measured on")] = 64,
    batch_size: BatchOption = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of a sample in tokens")] = 80,
    temperature: Annotated[float, typer.Option(min=0.0, help="of the samples; 0 takes the likeliest token")] = 0.8,
    seed: SeedOption = 0,
) -> None:
    """What each bit of the plan does: the change of the next token when it is flipped, and a sample of either value."""
    import torch
    from rich.progress import track

    from free_transformer.evaluation import bit_effects
    from free_transformer.evaluation.plan_ops import set_bits
    from free_transformer.model.layout import num_plans
    from free_transformer.model.plan_text import format_plan, parse_plan

    model, tokenizer = _load(run)
    if not hasattr(model.config, "latent_dim"):
        raise SettingsError(f"{run}: a baseline has no plan")
    given = None if plan is None else parse_plan(plan, model.config.latent_dim)
    rows = _held_out(run, tokenizer, data).sample(max_rows, seed)
    batches = track(
        rows.in_order(batch_size), "flipping bits", total=-(-len(rows) // batch_size), console=stderr_console()
    )
    effects = bit_effects(model, batches)
    torch.manual_seed(seed)
    tokens = _prompt_tokens(tokenizer, prompt)
    if given is None:
        given = model.sample_plan(1, num_plans(model.config.plan_span, tokens.shape[1] + max_new_tokens))[0]
    table = [
        [str(each.bit), f"{each.spent:.3f}", f"{each.effect:.4f} ± {each.standard_error:.4f}"]
        for each in sorted(effects, key=lambda each: -each.effect)
    ]
    _print_table(["bit", "bits spent per plan", "nats per token when flipped"], table)
    for each in sorted(effects, key=lambda each: -each.effect):
        for value in (0, 1):
            torch.manual_seed(seed)
            bits = set_bits(given, {each.bit: value})
            text = _write_under(model, tokenizer, tokens, bits, max_new_tokens, temperature)
            console.rule(f"bit {each.bit} = {value}, plan {format_plan(bits)}", align="left")
            console.print(text, soft_wrap=True)


@app.command()
def watch(
    runs: RunsArgument,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between two looks")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="show what is there now, and return")] = False,
) -> None:
    """Curves and figures of runs in the terminal while they train, each with what to do about it."""
    from free_transformer.runs.watch import watch as watch_runs

    watch_runs(runs, every, once)


@app.command()
def report(
    runs: RunsArgument,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="the page, default report.html in RUN, of several runs in the folder that holds them"),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write report.html of a run, also while it trains: what to watch, curves, settings; several runs overlaid."""
    from free_transformer.runs.report import write_run_report

    if out is not None:
        check_own_file(out, overwrite)
    console.print(f"report: {write_run_report(*runs, out=out)}", soft_wrap=True)


@app.command()
def tokenizer(
    arguments: Annotated[
        list[str], typer.Argument(help="text to train on, then the folder to write", metavar="FILES... OUT")
    ],
    vocab_size: Annotated[int, typer.Option(help="tokens, at least 259")] = 4096,
    column: Annotated[str, typer.Option(help="column of the text in .jsonl, .parquet and data sets")] = "text",
    overwrite: OverwriteOption = False,
) -> None:
    """Train a byte-level BPE on a corpus, for data.tokenizer."""
    from free_transformer.data import read_documents, train_tokenizer

    *files, out = arguments
    if not files:
        raise SettingsError("name the text to train on, then the folder to write: tokenizer FILES... OUT")
    check_replaceable(Path(out), "tokenizer", overwrite, map(Path, files))
    trained = train_tokenizer(read_documents(files, column), vocab_size)
    with own_folder(Path(out), "tokenizer", overwrite, map(Path, files)) as folder:
        trained.save_pretrained(folder)
    console.print(f"{len(trained)} tokens, written to {out}; use data.tokenizer={out}", soft_wrap=True)


@reproduce.command()
def letters(
    out: Annotated[Path, typer.Option(help="folder of models, results and report")] = Path("letters"),
    seeds: Annotated[int, typer.Option(min=1, help="runs of each model; 3 for the documentation")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="training steps of each model")] = 900,
    processes: Annotated[int, typer.Option(min=1, help="models at a time, one thread each")] = os.cpu_count() or 1,
    groups: Annotated[int, typer.Option(min=1, help="groups of 16 strings that each model writes")] = 64,
) -> None:
    """The letters task: what plans of 1/64 to 2 bits a token carry, and what they cost; writes OUT/report.html."""
    from free_transformer.reproduce.letters import reproduce_letters
    from free_transformer.reproduce.letters_report import finding_table, write_letters_report

    results = reproduce_letters(out, seeds, steps, processes, groups)
    _print_table(*finding_table(results))
    console.print(f"report: {write_letters_report(results, out)}", soft_wrap=True)


def _preview(settings: Any) -> None:
    from free_transformer.training.preview import preview

    found = preview(settings)
    if found is None:
        return
    for table in (found.parameter_table(), found.stage_table(), found.cost_table()):
        _print_table(*table)
    for group in found.groups:
        console.print(group)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow")


def _load(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a run, or of a folder that save_pretrained or export --to torch has written."""
    from free_transformer.data import load_tokenizer
    from free_transformer.export.quantize import is_quantized, load_quantized
    from free_transformer.runs.load_model import load_pretrained
    from free_transformer.runs.run import Run
    from free_transformer.runtime.arrays import check_vocabulary

    if is_quantized(path) or (path / "config.json").is_file():
        model = load_quantized(path) if is_quantized(path) else load_pretrained(path)
        text_tokenizer = load_tokenizer(str(path))
    else:
        run = Run(path)
        model, text_tokenizer = run.load_model(), run.load_tokenizer()
    check_vocabulary(text_tokenizer, model.config.vocab_size, path)
    return model, text_tokenizer


def _write_export(
    model: Any,
    text_tokenizer: Any,
    to: str,
    quantize: str | None,
    static: tuple[int, int] | None,
    folder: Path,
    overwrite: bool,
) -> list[Any]:
    """Returns the differences from the model that were found, if any were looked for."""
    if to == "torch":
        from free_transformer.export.quantize import quantize as quantize_model

        quantize_model(model, quantize, folder, text_tokenizer, overwrite)
        return []
    if to == "aot":
        from free_transformer.export.aot import export_aot

        assert static is not None
        return export_aot(model, folder, static, text_tokenizer, overwrite).differences
    from free_transformer.export.onnx import export_onnx

    return export_onnx(model, folder, text_tokenizer, static, quantize, overwrite=overwrite).differences


def _difference_table(differences: list[Any]) -> tuple[list[str], list[list[str]]]:
    """How far each graph is from the model, at its worst over the shapes that were tried."""
    found: dict[tuple[str, str], list[Any]] = {}
    for each in differences:
        if not each.output.startswith("present"):
            found.setdefault((each.graph, each.output), []).append(each)
    rows = []
    for place, tried in found.items():
        shapes = ", ".join(dict.fromkeys(f"{each.texts} x {each.tokens}" for each in tried))
        rows.append([*place, f"{max(each.difference for each in tried):.2g}", shapes])
    return ["graph", "output", "largest difference", "texts x tokens, with and without padding"], rows


def _evaluate(
    path: Path,
    data: list[str] | None,
    num_samples: int,
    method: str,
    prior: str,
    max_rows: int,
    batch_size: int,
    seed: int,
    processes: Any,
) -> tuple[Any, float]:
    import torch
    from rich.progress import track

    from free_transformer.evaluation import evaluate_likelihood
    from free_transformer.runtime.arrays import check_vocabulary
    from free_transformer.training import Run

    run = Run(path)
    model, text_tokenizer = run.load_model(), run.load_tokenizer()
    check_vocabulary(text_tokenizer, model.config.vocab_size, path)
    _spread(model, processes)
    rows = run.held_out_rows(text_tokenizer, data).sample(max_rows, seed)
    torch.manual_seed(seed)
    batches = track(
        rows.in_order(batch_size),
        description=f"evaluate {path.name}",
        total=-(-len(rows) // batch_size),
        console=stderr_console(not processes.main),
    )
    group = processes.data_group
    return evaluate_likelihood(model, batches, num_samples, method, prior, group), rows.bytes_per_token


def _joined(tensor: bool = False) -> Any:
    """
    The processes that torchrun has started, if any: they share the texts of an evaluation, each with a shard of the
    model, or with `tensor` every matrix, to write one text together.
    """
    from free_transformer.distributed.processes import join_processes
    from free_transformer.settings import DistributedSettings

    count = int(os.environ.get("WORLD_SIZE", 1))
    return join_processes(DistributedSettings(tensor=count) if tensor else DistributedSettings(fsdp=True))


def _spread(model: Any, processes: Any) -> None:
    """Over the processes that `_joined` has found, or to the one's device."""
    from free_transformer.distributed.parallelize import parallelize

    parallelize(model, processes)
    model.to(processes.device)


def _held_out(path: Path, text_tokenizer: Any, data: list[str] | None) -> Any:
    from free_transformer.training import Run

    return Run(path).held_out_rows(text_tokenizer, data)


def _write_under(
    model: Any, text_tokenizer: Any, tokens: Any, plan: Any, max_new_tokens: int, temperature: float
) -> str:
    """One text under a plan, which holds as far as it goes; later plans come from the prior."""
    import torch

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), plan=plan, max_new_tokens=max_new_tokens, **sampling
    )
    return text_tokenizer.decode(output[0], skip_special_tokens=True)


def _write_by_onnx(
    path: Path, prompt: str, plan: str | None, plan_from: Path | None, num_samples: int, options: dict[str, Any]
) -> None:
    from free_transformer.model.plan_text import parse_bits
    from free_transformer.runtime.onnx_model import OnnxFreeTransformer

    model = OnnxFreeTransformer(path)
    if plan is not None:
        options["plan"] = parse_bits(plan, model.latent_dim)
    if plan_from is not None:
        options["plan"] = model.plan_of_text(_read_text(plan_from))
    for index, text in enumerate(model.write(prompt, num_samples, **options)):
        console.rule(f"sample {index + 1}", align="left")
        console.print(text, soft_wrap=True)


def _torch_batch(path: Path, rows: int | None, length: int | None, threads: int | None) -> Any:
    import torch

    from free_transformer.distributed.processes import find_device
    from free_transformer.serving.torch_batch import TorchBatch

    model, text_tokenizer = _load(path)
    if not hasattr(model.config, "latent_dim"):
        raise SettingsError(f"{path}: a baseline has no plan to steer by; serve takes a Free Transformer")
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchBatch(model.to(find_device("auto")), text_tokenizer, rows or 32, length)


def _onnx_batch(path: Path, rows: int | None, length: int | None, threads: int | None) -> Any:
    from free_transformer.runtime.onnx_model import OnnxFreeTransformer
    from free_transformer.serving.onnx_batch import OnnxBatch

    return OnnxBatch(OnnxFreeTransformer(path, threads=threads), rows or 8, length)


def _prompt_tokens(text_tokenizer: Any, prompt: str) -> Any:
    import torch

    from free_transformer.data import begin_token, encode

    return torch.tensor([[begin_token(text_tokenizer), *encode(text_tokenizer, [prompt])[0]]])


def _read_text(path: Path) -> str:
    from free_transformer.data import read_documents

    return next(iter(read_documents([path])))


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    if not rows:
        return
    table = Table()
    for title, *cells in zip(header, *rows, strict=True):  # a single word is never cut in two or short
        table.add_column(title, no_wrap=not any(" " in text for text in [title, *cells]))
    for row in rows:
        table.add_row(*row)
    console.print(table)


@contextlib.contextmanager
def as_command(debug: bool = False) -> Iterator[None]:
    """
    What commands and scripts have in common: an error is a line on standard error, and `transformers` keeps quiet.

    Exit status: 1 for a failed run, 2 for bad usage; a run that was stopped ends with 128 + the signal's number.
    """
    if sys.modules.get("transformers"):  # whoever imports it later finds what `quiet` has set
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    try:
        yield
    except UsageError as error:
        _fail(f"{error.format_message()} (--help explains)", 2)
    except ValueError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except (RuntimeError, OSError, ImportError) as error:
        if debug:
            raise
        _fail(str(error) or type(error).__name__, 1)


def main() -> None:
    """Entry point: errors are one line, a traceback only with --debug."""
    tolerate_any_encoding(sys.stdout, sys.stderr)
    debug = "--debug" in sys.argv
    arguments = [_with_home(argument) for argument in sys.argv[1:] if argument != "--debug"]
    with as_command(debug):
        status = app(arguments or ["--help"], standalone_mode=False) or 0
        if status == INTERRUPTED:
            _fail("interrupted; the same command resumes a training from its last checkpoint", INTERRUPTED)
        sys.exit(status)


def _with_home(argument: str) -> str:
    """`--out=~/exports` as `--out ~/exports`, whose `~` the shell has expanded."""
    name, equals, value = argument.partition("=")
    if not equals or name not in PATH_OPTIONS:
        return argument
    return f"{name}={os.path.expanduser(value)}"  # noqa: PTH111 - Path raises for users that are not known


def _fail(message: str, status: int) -> None:
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    with contextlib.suppress(OSError):  # of a terminal that is gone
        print(f"free-transformer: error{rank}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
