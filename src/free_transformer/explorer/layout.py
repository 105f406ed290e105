"""The components of the page, by name."""

from typing import Any

import gradio as gr

from free_transformer.explorer import components, markup
from free_transformer.explorer.choices import MAX_LENGTH, MAX_PROMPT, TEMPERATURES
from free_transformer.explorer.explored import Explored

GRID = "Rows are plans, columns are random numbers for the words. Texts of a row share their plan."
FLIP = "Flip a bit above: both texts use the same random numbers. Point at a token below for what the plan does to it."
MAP = "Each circle is a plan that held-out texts take, as large as their number. Neighbors differ by one bit."
NO_MAP = "There is no held-out text to draw a map from: name some with `--data`."
FORM = (
    *("prompt", "plan", "bits", "words", "others", "temperature", "length", "tab", "names", "before", "place"),
    *("shuffled", "pasted", "pasted_plan", "change", "map_plan", "name", "named", "opened"),
)


class Layout:
    """Builds the components inside a `gr.Blocks`, and stores them by name in `components`."""

    def __init__(self, explored: Explored):
        self.explored, self.batch = explored, explored.batch
        self.one_plan = self.batch.plan_span == "sequence"
        self.start = explored.start()
        self.components: dict[str, Any] = {}
        gr.HTML(self._title(), elem_id="title")
        self._controls()
        self._states()
        with gr.Tabs(elem_id="tabs") as tabs:
            self._grid()
            self._flip()
            self._read()
            self._map()
            self._lane()
        self.components["tabs"] = tabs
        self._share()

    @property
    def form(self) -> list[Any]:
        """The components whose values make a `handlers.Form`."""
        return [self.components[name] for name in FORM]

    def _add(self, **components: Any) -> None:
        self.components |= components

    def _title(self) -> str:
        survey = self.explored.survey
        span = "one plan per text" if self.one_plan else f"one plan per {self.batch.plan_span} tokens"
        facts = [f"plans of {self.batch.latent_dim} bits", span]
        if survey is not None and survey.bits:
            facts.append(f"{sum(bit.dead is None for bit in survey.bits)} live bits")
            facts.append(f"{len(survey.counts)} plans found in {survey.passages} held-out texts")
        return f"<h1>{markup.escape(self.explored.name)}</h1><p class=ft-note>{' · '.join(facts)}</p>"

    def _controls(self) -> None:
        start = self.start
        with gr.Row():
            self._add(
                prompt=gr.Textbox(
                    start.prompt,
                    label="Prompt",
                    placeholder="empty: start from nothing",
                    scale=3,
                    max_length=MAX_PROMPT,
                    elem_id="prompt",
                ),
                plan=gr.Textbox(start.plan, label="Plan: bits, or a name", scale=2, elem_id="plan"),
            )
        self._add(bits=components.switches(start.plan.split()[0], self.explored.dead))
        with gr.Row():
            self._add(
                new_plan=gr.Button("New plan", elem_id="new-plan"),
                new_words=gr.Button("New words", elem_id="new-words"),
                generate=gr.Button("Generate", variant="primary", elem_id="generate"),
            )
        with gr.Row():  # not in an accordion: Gradio loses changes to sliders in one that is closed
            self._add(
                words=gr.Number(start.words, label="Seed of the words", precision=0, minimum=0, elem_id="words"),
                temperature=gr.Slider(*TEMPERATURES, value=start.temperature, step=0.05, label="Temperature"),
                length=gr.Slider(1, MAX_LENGTH, value=start.length, step=1, label="New tokens", elem_id="length"),
            )

    def _states(self) -> None:
        start = self.start
        states = {"others": start.others, "tab": "grid", "before": start.plan, "place": 0}
        self._add(**{name: gr.State(value) for name, value in states.items()})
        self._add(opened=gr.Checkbox(False, visible="hidden"))  # in the browser, unlike a `gr.State`
        self._add(pasted_plan=gr.State(""), map_plan=gr.State(start.plan))
        key = f"names of plans of {self.explored.name}"
        self._add(names=gr.BrowserState({}, storage_key=key, secret=key))  # readable after a restart of the server

    def _grid(self) -> None:
        with gr.Tab("Grid", id="grid"):
            gr.Markdown(GRID)
            self._add(
                shuffled=gr.Checkbox(label="Shuffle the plans of each column", elem_id="shuffle", container=False),
                grid=gr.HTML(elem_id="grid"),
            )

    def _flip(self) -> None:
        with gr.Tab("Flip a bit", id="flip"):
            gr.Markdown(FLIP)
            self._add(pair=gr.HTML(elem_id="pair"), tokens=gr.HTML(elem_id="tokens"))

    def _read(self) -> None:
        with gr.Tab("Read a text", id="read"), gr.Row():
            with gr.Column():
                self._add(
                    pasted=gr.Textbox(label="A text", lines=8, max_lines=16, max_length=MAX_PROMPT, elem_id="pasted"),
                    read=gr.Button("Read its plan", elem_id="read"),
                    certainty=gr.HTML(elem_id="certainty"),
                )
            with gr.Column():
                self._add(
                    change=gr.Slider(
                        *(0, MAX_LENGTH, 0),
                        step=1,
                        label="New tokens before it changes to the plan at the top; 0: it does not",
                        visible=self.one_plan,
                        elem_id="change",
                    ),
                    go_on=gr.Button("Continue like this", variant="primary", elem_id="continue"),
                    use_read=gr.Button("Use its plan", elem_id="use-read"),
                    continued=gr.HTML(elem_id="continued"),
                )

    def _map(self) -> None:
        survey, chosen = self.explored.survey, self.start.plan
        known = survey is not None and bool(survey.counts)
        shown = details = ""
        if survey is not None and known:
            shown = markup.plan_map(survey, self.batch.latent_dim, chosen)
            details = markup.plan_details(survey, chosen)
        with gr.Tab("Map", id="map"):
            gr.Markdown(MAP if known else NO_MAP)
            with gr.Row():
                with gr.Column(scale=3):
                    self._add(map=components.choices(shown, elem_id="map"))
                with gr.Column(scale=2):
                    self._add(
                        details=gr.HTML(details, elem_id="details"),
                        use_map=gr.Button("Use this plan", elem_id="use-map", visible=known),
                        under_plan=gr.HTML(elem_id="under-plan"),
                    )

    def _lane(self) -> None:
        with gr.Tab("Plans along a text", id="lane", visible=not self.one_plan):
            gr.Markdown(f"One plan per {self.batch.plan_span} tokens. Choose one here and flip its bits above.")
            self._add(lane=components.choices(elem_id="lane"), laned=gr.HTML(elem_id="laned"))

    def _share(self) -> None:
        with gr.Accordion("Share: link, curl, Python, names", open=False):
            self._add(
                link=gr.Textbox(
                    label="Link to this prompt, plan and words", buttons=["copy"], interactive=False, elem_id="link"
                ),
                curl=gr.Code(
                    label="The same text from this page's server (the first of a row)",
                    language="shell",
                    interactive=False,
                    lines=2,
                    wrap_lines=True,
                    elem_id="curl",
                ),
                python=gr.Code(
                    label="Python, under the same plan", language="python", interactive=False, elem_id="python"
                ),
            )
            with gr.Row():
                self._add(
                    name=gr.Textbox(
                        label="Name for this plan, kept in this browser", max_length=60, elem_id="plan-name"
                    ),
                    save_name=gr.Button("Save the name", elem_id="save-name"),
                    named=gr.Dropdown(
                        sorted(self.explored.plan_names), value=None, label="Named plans", elem_id="named"
                    ),
                )
