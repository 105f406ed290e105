"""The page of `free-transformer explore`: its components and their event handlers."""

import inspect
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import Any

import gradio as gr

from free_transformer.explorer.explored import Explored
from free_transformer.explorer.handlers import Handlers, Update, messages
from free_transformer.explorer.layout import Layout


def build_page(explored: Explored) -> gr.Blocks:
    """Builds the page, which the server's application mounts."""
    with gr.Blocks(title=f"{explored.name}: plans", analytics_enabled=False) as page:
        layout = Layout(explored)
        _connect(page, layout, Handlers(explored))
    return page.queue(default_concurrency_limit=None)


def style() -> str:
    """Returns the style sheet."""
    return files("free_transformer.explorer").joinpath("page.css").read_text(encoding="utf-8")


def _connect(page: gr.Blocks, layout: Layout, handlers: Handlers) -> None:
    made = layout.components
    events = _Events(layout, handlers)

    latest: dict[str | None, object] = {}  # by visitor, the latest request

    async def show_tab(request: gr.Request, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        form = handlers.form(*values)
        if not form.opened:  # Gradio selects a tab before the choices of the link have arrived
            return
        origin = request.headers.get("origin") or f"http://{request.headers.get('host', 'localhost')}"
        own = latest[request.session_hash] = object()
        with messages():
            async for update in handlers.show_tab(form, origin):
                if latest.get(request.session_hash) is not own:  # superseded by a newer request
                    return
                yield events.by_component(update)

    def forget(request: gr.Request) -> None:
        latest.pop(request.session_hash, None)

    def open_link(request: gr.Request) -> dict[Any, Any]:
        found = handlers.open_link(dict(request.query_params))
        return events.by_component({**found, "tabs": gr.Tabs(selected=found["tabs"])})

    shown = [made[name] for name in ("link", "curl", "python", "grid", "pair", "tokens", "lane", "laned")]

    def then_show(event: Any) -> None:
        event.then(show_tab, layout.form, shown, api_visibility="private", show_progress="hidden")

    opened = [*layout.form[:8], made["before"], made["tabs"], made["opened"]]
    page.unload(forget)
    then_show(page.load(open_link, None, opened, api_visibility="private", show_progress="hidden"))
    for tab in made["tabs"].children:
        then_show(tab.select(lambda name=tab.id: name, None, made["tab"], api_visibility="private"))
    for listener in (made["prompt"].submit, made["generate"].click, made["shuffled"].input):
        then_show(listener(lambda: None, None, None, api_visibility="private"))
    plan = ["plan", "bits", "before", "others"]
    then_show(events.on(made["bits"].input, handlers.flip, plan))
    then_show(events.on(made["plan"].submit, handlers.type_plan, plan))
    then_show(events.on(made["new_plan"].click, handlers.new_plan, plan))
    then_show(events.on(made["new_words"].click, handlers.new_words, ["words"]))
    then_show(events.on(made["use_read"].click, handlers.use_read_plan, plan))
    then_show(events.on(made["use_map"].click, handlers.use_map_plan, plan))
    then_show(events.on(made["named"].input, handlers.use_name, plan))
    then_show(events.on_choice(made["lane"].select, handlers.choose_place, ["place", "bits"]))
    events.on(made["save_name"].click, handlers.save_name, ["names", "named", "name"])
    events.on(made["read"].click, handlers.read, ["pasted_plan", "certainty"])
    read = events.on(made["go_on"].click, handlers.read, ["pasted_plan", "certainty"])
    events.on(read.success, handlers.go_on, ["continued"])
    chosen = events.on_choice(made["map"].select, handlers.choose_on_map, ["map_plan", "map", "details"])
    events.on(chosen.then, handlers.show_map_plan, ["under_plan"])


class _Events:
    """Connects handlers of a `Form` to events of components."""

    def __init__(self, layout: Layout, handlers: Handlers):
        self.layout, self.handlers = layout, handlers

    def by_component(self, update: Update) -> dict[Any, Any]:
        return {self.layout.components[name]: value for name, value in update.items()}

    def on(self, listener: Callable[..., Any], handler: Callable[..., Any], changes: list[str]) -> Any:
        """
        Args:
            handler: a method of `Handlers` that takes a form.
            changes: names of the components that it may change.
        """

        async def once(*values: Any) -> dict[Any, Any]:
            with messages():
                found = handler(self.handlers.form(*values))
                return self.by_component(await found if inspect.isawaitable(found) else found)

        async def growing(*values: Any) -> AsyncIterator[dict[Any, Any]]:
            with messages():
                async for update in handler(self.handlers.form(*values)):
                    yield self.by_component(update)

        return self._listen(listener, growing if inspect.isasyncgenfunction(handler) else once, changes)

    def on_choice(self, listener: Callable[..., Any], handler: Callable[..., Update], changes: list[str]) -> Any:
        """Same as `on`, for a handler that also takes the chosen item."""

        async def once(event: gr.EventData, *values: Any) -> dict[Any, Any]:
            with messages():
                return self.by_component(handler(self.handlers.form(*values), str(event.choice)))

        return self._listen(listener, once, changes)

    def _listen(self, listener: Callable[..., Any], function: Callable[..., Any], changes: list[str]) -> Any:
        outputs = [self.layout.components[name] for name in changes]
        return listener(function, self.layout.form, outputs, api_visibility="private", show_progress="hidden")
