"""The model that the page shows, and the texts that its tabs display."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from free_transformer.explorer import markup
from free_transformer.explorer.choices import Choices
from free_transformer.explorer.generation import GrowingText, generate, read_plan, request, token_effects
from free_transformer.explorer.survey import PlanSurvey
from free_transformer.model.plan_text import format_bits, parse_bits
from free_transformer.runtime.plan_source import sample_stratified_prior
from free_transformer.serving.batch import TextRequest
from free_transformer.serving.engine import Engine

ROWS = COLUMNS = 4


@dataclass
class Explored:
    """
    A model with its baseline and a survey of its plans.

    Attributes:
        folder: folder of the model, for code that users copy.
        baseline: generates with the model's baseline; None without one.
        survey: plans of held-out text; None without held-out text.
    """

    name: str
    folder: str
    engine: Engine
    baseline: Engine | None = None
    survey: PlanSurvey | None = None
    plan_names: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.batch = self.engine.batch
        self.plan_names = dict(self.batch.plan_names or {})

    @property
    def dead(self) -> list[str | None]:
        """For each bit, the reason why flipping it has no effect; None for a live one."""
        if self.survey is None or not self.survey.bits:
            return [None] * self.batch.latent_dim
        return [bit.dead for bit in self.survey.bits]

    def start(self) -> Choices:
        """Initial choices of the page: the most common plan of held-out texts, if known."""
        choices = Choices(plan="0" * self.batch.latent_dim)
        if self.batch.plan_span != "sequence":
            return self.with_new_plan(choices)
        if self.survey is not None and self.survey.counts:
            counts = self.survey.counts
            choices = replace(choices, plan=max(counts, key=lambda plan: sum(counts[plan].values())))
        return choices.checked(self.batch)

    def with_new_plan(self, choices: Choices) -> Choices:
        """Returns these choices with another plan from the prior, and other plans in the rest of the grid."""
        choices = replace(choices, others=choices.others + 1)
        plan = self.sampled_plans(choices, ROWS)[0]
        return replace(choices, plan=format_bits(plan)).checked(self.batch)

    def sampled_plans(self, choices: Choices, count: int, beside: str = "") -> np.ndarray:
        """
        Samples plans for `count` texts, (count, P, H).

        They are plans of held-out texts, sampled in proportion to their frequency. The first ones differ from each
        other, and from the plan `beside`, in the source of these texts and in live bits. If too few plans are known, or
        a text has several, they are stratified samples from the prior, the aggregate one if available.
        """
        rng = np.random.default_rng(choices.others)
        if self.batch.plan_span == "sequence" and self.survey is not None and len(self.survey.counts) > count:
            counts = self.survey.counts
            totals = np.array([sum(each.values()) for each in counts.values()])
            drawn = rng.choice([*counts], len(counts), replace=False, p=totals / totals.sum()).tolist()
            varied = self._varied(self.survey, drawn, count, beside)
            return np.stack([parse_bits(plan, self.batch.latent_dim) for plan in varied])
        try:
            log_prior = self.batch.prior("aggregate")
        except ValueError:
            log_prior = None
        shape = (count, self.batch.num_plans(choices.length + 1))
        return sample_stratified_prior(shape, self.batch.latent_dim, log_prior, rng, count)

    def _varied(self, survey: PlanSurvey, plans: list[str], count: int, beside: str) -> list[str]:
        """Chooses `count` plans in this order, except that plans of another source or with other live bits go first."""
        live = [place for place, reason in enumerate(self.dead) if reason is None]
        rest, found = [plan for plan in plans if plan != beside], [beside] if beside else []
        source = {plan: survey.source(plan) for plan in [*found, *rest]}
        bits = {plan: "".join(plan[place] for place in live) for plan in source}
        for _ in range(min(count, len(rest))):
            sources, kinds = {source[plan] for plan in found}, {bits[plan] for plan in found}
            found.append(min(rest, key=lambda plan: (source[plan] in sources, bits[plan] in kinds)))
            rest.remove(found[-1])
        return found[-count:]

    def title(self, plan: np.ndarray, names: Mapping[str, str]) -> str:
        """Returns markup that shows a plan, (P, H), or the first ones of several plans."""
        text = format_bits(plan[:4])
        by_bits = {bits: name for name, bits in {**self.plan_names, **names}.items()}
        return markup.plan_title(text, self.survey, by_bits.get(text))

    async def grid(self, choices: Choices, shuffled: bool, names: Mapping[str, str]) -> AsyncIterator[str]:
        """Yields a grid in which rows are plans and columns are seeds; `shuffled` mixes the plans of each column."""
        own = self._bits(choices, choices.plan)
        others = [plan for plan in self.sampled_plans(choices, ROWS, choices.plan) if not np.array_equal(plan, own)]
        plans = [own, *others][:ROWS]
        rows = np.arange(ROWS)[:, None].repeat(COLUMNS, 1)
        if shuffled:
            rows = np.random.default_rng((choices.others, choices.words)).permuted(rows, axis=0)
        seeds = [choices.words + place for place in range(COLUMNS)]
        asked = [self._request(choices, plans[row], seed) for row, seed in zip(rows.flat, seeds * ROWS, strict=True)]
        streams = [generate(self.engine, asked)]
        if self.baseline is not None:
            batch = self.baseline.batch
            zeros = np.zeros((1, batch.latent_dim), dtype=bool)
            streams.append(
                generate(self.baseline, [self._request(choices, zeros, seed, self.baseline) for seed in seeds])
            )
        async for texts in together(streams):
            yield markup.grid(self._rows(texts, plans, rows if shuffled else None, names), seeds)

    def _rows(
        self,
        texts: Sequence[Sequence[GrowingText]],
        plans: Sequence[np.ndarray],
        shuffled: np.ndarray | None,
        names: Mapping[str, str],
    ) -> list[markup.GridRow]:
        found, own = [], texts[0]
        for row in range(ROWS):
            part = own[row * COLUMNS : (row + 1) * COLUMNS]
            order = [row] * COLUMNS if shuffled is None else shuffled[row]
            colors = [markup.plan_color(format_bits(plans[each][:4]), self.survey) for each in order]
            if shuffled is None:
                found.append(markup.GridRow(self.title(plans[row], names), part, colors=colors))
            else:
                mixed = [format_bits(plans[each][:1]) for each in order]
                found.append(markup.GridRow("<small>plans shuffled</small>", part, mixed, colors))
        if len(texts) > 1:
            found.append(markup.GridRow("<b>baseline</b><small>no plan</small>", texts[1]))
        return found

    async def flip(self, choices: Choices, before: str, names: Mapping[str, str]) -> AsyncIterator[tuple[str, str]]:
        """
        Yields texts with the same random numbers under the previous and the current plan, then the effect on tokens.

        If the plan has not changed, it is compared with the plan whose first live bit is flipped.
        """
        words = ("before", "now")
        if before == choices.plan and self.batch.plan_span == "sequence":
            bit = next((place for place, reason in enumerate(self.dead) if reason is None), 0)
            before = choices.plan[:bit] + "10"[int(choices.plan[bit])] + choices.plan[bit + 1 :]
            words = (f"with bit {bit} flipped", "this plan")
        plans = [self._bits(choices, before), self._bits(choices, choices.plan)]
        titles = (f"{words[0]} {self.title(plans[0], names)}", f"{words[1]} {self.title(plans[1], names)}")
        asked = [replace(self._request(choices, plan, choices.words), logprobs=0) for plan in plans]
        texts: list[GrowingText] = [GrowingText(), GrowingText()]
        async for texts in generate(self.engine, asked):
            yield markup.difference(texts[0], texts[1], titles), ""
        if texts[1].tokens and self.batch.plan_span == "sequence":
            effects = await token_effects(self.engine, [*asked[1].tokens, *texts[1].tokens], plans[::-1])
            shown = markup.tokens(effects, ["under this plan", "under the other plan"])
            yield markup.difference(texts[0], texts[1], titles), shown

    async def continuation(
        self, choices: Choices, text: str, plan: str, change: int | None, names: Mapping[str, str]
    ) -> AsyncIterator[str]:
        """Continues `text` under its plan and, after `change` new tokens, under the chosen plan."""
        own, other = self._bits(choices, plan), self._bits(choices, choices.plan)
        changes = {} if change is None else {change: other}
        asked = [self._request(replace(choices, prompt=text), own, choices.words, changes=changes)]
        async for (continued,) in generate(self.engine, asked):
            yield markup.changed_text(continued, self.title(own, names), self.title(other, names))

    async def under_plan(self, choices: Choices, plan: str) -> AsyncIterator[str]:
        """Generates two short texts under a plan of the map."""
        bits = self._bits(choices, plan)
        asked = [self._request(choices, bits, choices.words + place) for place in range(2)]
        async for texts in generate(self.engine, asked):
            yield "".join(map(markup.cell, texts))

    async def lane(self, choices: Choices) -> AsyncIterator[str]:
        """Generates one text under a sequence of plans."""
        asked = [self._request(choices, self._bits(choices, choices.plan), choices.words)]
        async for (text,) in generate(self.engine, asked):
            yield markup.cell(text)

    async def read(self, text: str) -> tuple[str, str]:
        """Returns the most likely plan of a text, and markup that shows how certain each bit is."""
        ones = await read_plan(self.engine, text)
        return format_bits(ones > 0.5), markup.certainty(ones.mean(0).tolist(), self.dead)

    def _bits(self, choices: Choices, plan: str) -> np.ndarray:
        return replace(choices, plan=plan).bits(self.batch)

    def _request(
        self,
        choices: Choices,
        plan: np.ndarray,
        seed: int,
        engine: Engine | None = None,
        changes: Mapping[int, np.ndarray] | None = None,
    ) -> TextRequest:
        batch = (engine or self.engine).batch
        return request(batch, choices.prompt, plan, seed, choices.temperature, choices.length, changes)


async def together(
    streams: Sequence[AsyncIterator[list[GrowingText]]],
) -> AsyncIterator[list[list[GrowingText]]]:
    """Yields the latest item of each stream whenever one of them has a new item."""
    latest: list[list[GrowingText]] = [[] for _ in streams]
    waiting = {asyncio.ensure_future(anext(stream)): place for place, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = waiting.pop(task)
                try:
                    latest[place] = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[place]))] = place
            if all(latest):
                yield latest
    finally:
        for task in waiting:
            task.cancel()
