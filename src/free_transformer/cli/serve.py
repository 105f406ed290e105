"""`free-transformer serve`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from free_transformer.cli import output
from free_transformer.cli.batches import onnx_batch, served_folder, torch_batch
from free_transformer.cli.options import PlanStrengthOption
from free_transformer.cli.packages import optional_packages
from free_transformer.errors import InputError


def serve(
    run: Annotated[
        Path | None,
        typer.Argument(help="Folder of a run or of a saved model.", metavar="RUN"),
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(help="Folder of an ONNX export to serve instead, without PyTorch.", metavar="FOLDER"),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="FREE_TRANSFORMER_TOKEN",
            help="Token that requests must send; the variable hides it from the process list. Default: none.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests. Default: the name of the folder.")
    ] = None,
    plan_strength: PlanStrengthOption = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of texts generated together. Default: 32; 8 for an ONNX export."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Maximum number of tokens that the model sees at a time. Default: the model's, at most 2048."
        ),
    ] = None,
    max_prompt: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of tokens of a prompt. Default: limited by --max-length."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of tokens of a response. Default: 64 times --max-length."),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Maximum number of texts in the queue; further requests get status 429.")
    ] = 512,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Number of CPU threads per matrix product. Default: one per core."),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(min=0, help="Seconds for texts in progress to finish after SIGTERM or Ctrl-C."),
    ] = 20,
    keep_alive: Annotated[
        int,
        typer.Option(
            min=1, help="Seconds until an idle connection is closed; behind a proxy, set more than the proxy's."
        ),
    ] = 5,
    max_connections: Annotated[int, typer.Option(min=1, help="Maximum number of open connections.")] = 900,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name that requests may be sent to, `*` for any; can be repeated. Default: the names of this "
            "machine on a loopback address, any name otherwise."
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of web pages that may call the server, `*` for any; can be repeated. Default: none."),
    ] = None,
) -> None:
    """
    Serve a model over HTTP, compatible with OpenAI's completions and chat completions APIs.

    Examples:

    - `free-transformer serve runs/my-run`
    - `free-transformer serve --onnx runs/my-run/onnx --port 9000`
    """
    with optional_packages("a server needs", "serve"):
        from free_transformer.serving.access import is_loopback, local_hosts
        from free_transformer.serving.app import create_app, listen
        from free_transformer.serving.app import run as run_server

    folder = served_folder(run, onnx)
    bound = listen(host, port)
    if onnx is not None and plan_strength is not None:
        raise InputError(
            "the plan strength of an ONNX export is fixed; set it with `free-transformer export --plan-strength`"
        )
    limits = (folder, max_batch, max_length, threads)
    build = partial(torch_batch, *limits, plan_strength) if onnx is None else partial(onnx_batch, *limits)
    name = name or folder.resolve().name
    token = (token or "").strip() or None  # a variable read from a file may end with a newline
    address, port = bound.getsockname()[:2]
    hosts = [*local_hosts(host), *(allowed_host or ())] if is_loopback(address) else allowed_host
    server = create_app(build, name, max_prompt, max_tokens, max_waiting, token, hosts, cors_origin or ())
    batch = server.state.engine.batch
    shown = f"[{address}]" if ":" in address else address
    output.print_line(
        f"{name} at http://{shown}:{port}/v1, {batch.max_rows} texts at a time of up to {batch.max_length} tokens"
    )
    if not token and not is_loopback(address):
        output.print_warning("anyone who can reach this address can use the server; require a token with --token")
    run_server(server, bound, grace, keep_alive, max_connections)
