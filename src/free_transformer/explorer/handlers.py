"""Event handlers of the page, which return the new values of its components."""

import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr

from free_transformer.errors import InputError, RunError
from free_transformer.explorer import markup
from free_transformer.explorer.choices import Choices
from free_transformer.explorer.explored import Explored
from free_transformer.model.plan_text import format_bits, parse_bits

Update = dict[str, Any]  # new values by the name of the component


@dataclass(frozen=True)
class Form:
    """
    The values passed to handlers, in the order of the components in `layout.FORM`.

    Attributes:
        known: the model's own plan names.
        names: this visitor's plan names: name -> bits.
        before: the plan before its last change.
        place: index of the plan that the switches show.
        map_plan: the plan chosen on the map; pasted_plan: the plan of the pasted text, once inferred.
        opened: whether the page shows the choices of its link yet; before, it has arbitrary values.
    """

    known: dict[str, str]
    prompt: str
    plan: str
    bits: str
    words: int | None
    others: int
    temperature: float
    length: int
    tab: str
    names: dict[str, str] | None
    before: str
    place: int
    shuffled: bool
    pasted: str
    pasted_plan: str
    change: int
    map_plan: str
    name: str
    named: str | None
    opened: bool

    @property
    def all_names(self) -> dict[str, str]:
        return {**self.known, **(self.names or {})}


class Handlers:
    """Methods take a `Form` and return the components that change. No visitor state is stored."""

    def __init__(self, explored: Explored):
        self.explored, self.batch = explored, explored.batch

    def form(self, *values: Any) -> Form:
        return Form(self.explored.plan_names, *values)

    def choices(self, form: Form) -> Choices:
        """Returns the checked choices. Raises `InputError` for an invalid plan."""
        plan = form.all_names.get(form.plan.strip(), form.plan)
        words = form.words or 0
        found = Choices(form.prompt or "", plan, words, form.others, form.temperature, form.length, form.tab)
        return found.checked(self.batch)

    async def show_tab(self, form: Form, origin: str) -> AsyncIterator[Update]:
        """Generates the content of the open tab."""
        choices, explored = self.choices(form), self.explored
        yield {
            "link": choices.link(origin, explored.name),
            "curl": choices.curl(origin, explored.name),
            "python": choices.python(explored.folder),
        }
        if choices.tab == "grid":
            async for grid in explored.grid(choices, form.shuffled, form.all_names):
                yield {"grid": grid}
        elif choices.tab == "flip":
            async for pair, tokens in explored.flip(choices, form.before, form.all_names):
                yield {"pair": pair, "tokens": tokens}
        elif choices.tab == "lane":
            plans = format_bits(choices.bits(self.batch)[: self.batch.num_plans(choices.length + 1)]).split()
            yield {"lane": markup.lane(plans, form.place, int(self.batch.plan_span))}
            async for text in explored.lane(choices):
                yield {"laned": text}

    def open_link(self, query: dict[str, str]) -> Update:
        """Applies the choices of a link, or the initial ones."""
        start = self.explored.start()
        try:
            choices = Choices.from_query(query, start).checked(self.batch)
            if query.get("model", self.explored.name) != self.explored.name:
                gr.Warning(f"The link is of the model {query['model']!r}; this page shows {self.explored.name!r}.")
        except ValueError as error:
            gr.Warning(f"The link cannot be used: {error}")
            choices = start
        bits = choices.plan.split()[0]
        return {**vars(choices), "bits": bits, "before": choices.plan, "tabs": choices.tab, "opened": True}

    def new_plan(self, form: Form) -> Update:
        before = self._plan_or_start(form)
        drawn = self.explored.with_new_plan(Choices(others=form.others, plan=before, length=form.length))
        return {**self._plan(drawn.plan, before, form.place), "others": drawn.others}

    def new_words(self, form: Form) -> Update:
        return {"words": random.randrange(10**6)}

    def flip(self, form: Form) -> Update:
        """Updates the plan after a change of the switches."""
        plans = self._plan_or_start(form).split()
        before = " ".join(plans)
        plans += plans[-1:] * (form.place + 1 - len(plans))
        plans[form.place] = form.bits
        return self._plan(" ".join(plans), before, form.place)

    def type_plan(self, form: Form) -> Update:
        plan = self.choices(form).plan
        return self._plan(plan, plan, form.place)

    def use_read_plan(self, form: Form) -> Update:
        if not form.pasted_plan:
            raise InputError("paste a text and read its plan first")
        return self._plan(form.pasted_plan, self._plan_or_start(form), 0)

    def use_map_plan(self, form: Form) -> Update:
        return self._plan(form.map_plan, self._plan_or_start(form), 0)

    def use_name(self, form: Form) -> Update:
        before = self._plan_or_start(form)
        return self._plan(form.all_names.get(form.named or "", before), before, 0)

    def save_name(self, form: Form) -> Update:
        name = form.name.strip()
        if not set(name) - set("01 ,"):
            raise InputError("name: give a word that is not made of 0 and 1")
        names = {**(form.names or {}), name: self.choices(form).plan}
        listed = sorted(form.known.keys() | names.keys())
        return {"names": names, "named": gr.Dropdown(listed, value=name), "name": ""}

    def choose_place(self, form: Form, choice: str) -> Update:
        plans = self._plan_or_start(form).split()
        place = max(0, int(choice))
        return {"place": place, "bits": plans[min(place, len(plans) - 1)]}

    def choose_on_map(self, form: Form, choice: str) -> Update:
        survey = self.explored.survey
        assert survey is not None  # otherwise there is no map
        plan = format_bits(parse_bits(choice, self.batch.latent_dim))
        shown = markup.plan_map(survey, self.batch.latent_dim, plan)
        return {"map_plan": plan, "map": shown, "details": markup.plan_details(survey, plan)}

    async def show_map_plan(self, form: Form) -> AsyncIterator[Update]:
        async for texts in self.explored.under_plan(self.choices(form), form.map_plan):
            yield {"under_plan": texts}

    async def read(self, form: Form) -> Update:
        if not form.pasted.strip():
            raise InputError("paste a text first")
        plan, certainty = await self.explored.read(form.pasted)
        return {"pasted_plan": plan, "certainty": certainty}

    async def go_on(self, form: Form) -> AsyncIterator[Update]:
        """Continues the pasted text."""
        change, names = form.change or None, form.all_names
        async for text in self.explored.continuation(self.choices(form), form.pasted, form.pasted_plan, change, names):
            yield {"continued": text}

    def _plan(self, plan: str, before: str, place: int) -> Update:
        plans = plan.split()
        return {"plan": plan, "bits": plans[min(place, len(plans) - 1)], "before": before}

    def _plan_or_start(self, form: Form) -> str:
        """Returns the plan as bits, or the initial plan if the typed one is invalid."""
        try:
            return self.choices(form).plan
        except ValueError:
            return self.explored.start().plan


@contextmanager
def messages() -> Iterator[None]:
    """Shows errors that the visitor can fix as messages on the page. Other exceptions are bugs."""
    try:
        yield
    except (InputError, RunError) as error:
        raise gr.Error(str(error), duration=8) from error
