"""The server of `free-transformer explore`: the API of `serve` together with the page."""

import os
from collections.abc import Callable, Collection

from fastapi import FastAPI

from free_transformer.explorer.explored import Explored
from free_transformer.explorer.sources import Opened, survey
from free_transformer.serving.access import is_loopback, local_hosts
from free_transformer.serving.app import create_app, listen, run
from free_transformer.serving.engine import Engine
from free_transformer.serving.metrics import Metrics

MAX_WAITING = 1024
SURVEY_SECONDS = 20.0


def create_explorer(
    opened: Opened, allowed_hosts: Collection[str] | None = None, progress: Callable[[int], None] = lambda read: None
) -> FastAPI:
    """
    Loads a model and its baseline, and creates the application. `app.state.explored` is the `Explored`.

    Args:
        allowed_hosts: as for `serving.app.create_app`.
        progress: called with the number of held-out passages whose plans have been inferred.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; the page calls no other host
    import gradio as gr

    from free_transformer.explorer.page import build_page, style

    app = create_app(opened.build, opened.name, max_waiting=MAX_WAITING, allowed_hosts=allowed_hosts)
    engine: Engine = app.state.engine
    baseline = None if opened.baseline is None else Engine(opened.build_baseline, MAX_WAITING, Metrics())
    found = engine.call(lambda batch: survey(opened, batch, SURVEY_SECONDS, progress)).result()
    explored = app.state.explored = Explored(opened.name, str(opened.folder), engine, baseline, found)
    return gr.mount_gradio_app(
        app,
        build_page(explored),
        path="/",
        footer_links=[],
        max_file_size="1kb",  # the page accepts no files
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        css=style(),
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def serve_explorer(
    opened: Opened,
    host: str,
    port: int,
    progress: Callable[[int], None] = lambda read: None,
    on_ready: Callable[[str], None] = print,
) -> None:
    """
    Shows the page until Ctrl-C.

    Args:
        host: address to listen on; port: 0 chooses a free port.
        progress: as for `create_explorer`.
        on_ready: called with the page's address.
    """
    bound = listen(host, port)
    address, port = bound.getsockname()[:2]
    app = create_explorer(opened, local_hosts(host) if is_loopback(address) else None, progress)
    on_ready(f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}")
    run(app, bound, grace=0)
