"""Methods for plans: inference by the encoder, sampling from the prior, and gathering the aggregate prior."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .configuration import FreeTransformerConfig
from .outputs import LowerOutput
from .plan import PlanPrior
from .sampling import PLANS, check_choice, check_token_ids


class PlanMethods:
    config: FreeTransformerConfig
    plan_prior: PlanPrior

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def lower_layers(self, *args: Any, **kwargs: Any) -> LowerOutput:
        raise NotImplementedError

    def encode(self, lower: LowerOutput) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def infer_plan(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """
        Returns the posterior's logits, (B, P, H), of the plans of these texts; `> 0` is the most likely plan.

        Raises:
            ValueError: for token ids outside the vocabulary.
        """
        if not torch.compiler.is_compiling() and input_ids.numel():
            check_token_ids(int(input_ids.min()), int(input_ids.max()), self.config.vocab_size)
        return self.encode(self.lower_layers(input_ids, attention_mask, position_ids))

    def sample_plan(
        self,
        batch_size: int,
        num_plans: int = 1,
        generator: torch.Generator | None = None,
        prior: str = "uniform",
        method: str = "independent",
    ) -> Tensor:
        """
        Samples plans from the prior, (B, P, H) bool.

        Args:
            prior: `"uniform"`, or `"aggregate"`, the plans of training texts.
            method: `"independent"`, or `"stratified"`: at each of the P positions, the B plans together cover the
                prior (see `stratified.py`), while each one is distributed like an independent sample.

        Raises:
            ValueError: for an unknown `prior` or `method`, and for an aggregate prior that was never gathered.
        """
        check_choice("method", method, PLANS)
        texts = batch_size if method == "stratified" else 1
        return self.plan_prior.sample(batch_size, num_plans, prior, generator, samples_per_set=max(1, texts))

    @torch.no_grad()
    def gather_prior(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """
        Gathers the aggregate prior, the average posterior of these texts. It is saved with the model.

        Args:
            batches: training texts, dicts with `input_ids` and optional `attention_mask` and `position_ids`.
        """

        def plan_logits() -> Iterator[Tensor]:
            for batch in batches:
                inputs: dict[str, Tensor] = {
                    name: each.to(self.device) for name, each in batch.items() if name != "labels"
                }
                lower = self.lower_layers(**inputs)
                assert lower.layout is not None
                yield self.encode(lower)[lower.layout.plan_mask]

        self.plan_prior.gather(plan_logits())
