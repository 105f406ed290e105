"""
Plans for `lm-evaluation-harness`.

The plans of a prompt are read from it by the encoder, or sampled from the prior. The plans of the tokens that follow
come from the prior. This is the rule of `generate` (`model/plan_source.py`), with one random stream per prompt, so that
the plans of a request do not depend on the batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from free_transformer.model.layout import num_plans, plan_layout
from free_transformer.model.modeling import FreeTransformer
from free_transformer.model.outputs import LowerOutput
from free_transformer.model.plan import PlanPrior


class PlanSampler:
    """
    Samples the plans of texts.

    Args:
        prompt_plan: `"posterior"` or `"prior"`, where the plans of prompts come from.
        prior: `"uniform"` or `"aggregate"`, where all other plans come from.
        seed: together with a text's key, it determines the text's plans.
        begin_token: a prompt of nothing but this token is empty, so its plans come from the prior.
    """

    def __init__(self, model: FreeTransformer, prompt_plan: str, prior: str, seed: int, begin_token: int):
        self.model, self.prompt_plan, self.seed, self.begin_token = model, prompt_plan, seed, begin_token
        self.prior = model.plan_prior.checked(prior)
        self.plan_has_effect = bool(model.plan_table.weight.any())
        # Plans are sampled on the CPU: there, the first of many samples from a seed equal those of fewer samples.
        self._plan_prior = PlanPrior(model.config.latent_dim)
        self._plan_prior.load_state_dict(model.plan_prior.state_dict())

    def sample(
        self,
        lower: LowerOutput,
        tokens: Tensor,
        ends: Sequence[int],
        keys: Sequence[Sequence[int]],
        count: int,
        samples: int,
    ) -> tuple[Tensor, Tensor]:
        """
        Samples `count` plans, P, for each text, `samples` times, S.

        Args:
            lower: output of the lower layers for the texts.
            tokens: (B, T), the texts, padded on the right.
            ends: number of tokens of each text that the encoder may read.
            keys: tokens that determine the random stream of each text.

        Returns:
            plans, (S, B, P, H) bool, and `log p(z) - log q(z)` of the plans read from the text, (S, B), in nats.
        """
        span = self.model.config.plan_span
        is_read = self._is_read(tokens, ends)
        logits = self._posterior(lower, ends).cpu() if any(is_read) else None
        plans, log_ratios = [], []
        for row, (end, key) in enumerate(zip(ends, keys, strict=True)):
            stream = torch.Generator().manual_seed(_stream_seed(self.seed, key))
            read = torch.empty(0, samples, self.model.config.latent_dim, dtype=torch.bool)  # plans first, then samples
            log_ratio = torch.zeros(samples, dtype=torch.float64)
            if logits is not None and is_read[row]:
                row_logits = logits[row, : num_plans(span, end), None].expand(-1, samples, -1)
                read = self.model.plan_mapper(row_logits, stream)
                log_posterior = F.logsigmoid(torch.where(read, row_logits, -row_logits)).sum(-1)
                log_ratio = (self._plan_prior.log_prob(read, self.prior) - log_posterior).sum(0)
            if len(read) < count:
                from_prior = self._plan_prior.sample(count - len(read), samples, self.prior, stream)
                read = torch.cat([read, from_prior])
            plans.append(read.transpose(0, 1))
            log_ratios.append(log_ratio)
        return torch.stack(plans, 1).to(tokens.device), torch.stack(log_ratios, 1).to(tokens.device)

    def _is_read(self, tokens: Tensor, ends: Sequence[int]) -> list[bool]:
        """Whether the encoder reads each text. It reads neither empty prompts nor texts whose plan has no effect."""
        if self.prompt_plan == "prior" or not self.plan_has_effect:
            return [False] * len(ends)
        return [bool((row[:end] != self.begin_token).any()) for row, end in zip(tokens, ends, strict=True)]

    def _posterior(self, lower: LowerOutput, ends: Sequence[int]) -> Tensor:
        """Logits of the plans of the first `ends` tokens of each text, (B, P, H), in float64."""
        assert lower.layout is not None
        positions = lower.layout.position_ids
        device = positions.device
        seen = torch.arange(positions.shape[1], device=device) < torch.tensor(ends, device=device)[:, None]
        layout = plan_layout(self.model.config.plan_span, positions, seen, packed=False)
        return self.model.encode(replace(lower, layout=layout)).double()


def _stream_seed(seed: int, tokens: Sequence[int]) -> int:
    digest = hashlib.blake2b(repr((seed, list(tokens))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
