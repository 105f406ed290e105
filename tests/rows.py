"""Texts that come and go in the rows of a server's batch."""

import numpy as np

from free_transformer.model.sampling import Sampling
from free_transformer.serving.batch import Batch, TextRequest


def greedy(batch: Batch, logits) -> list[int]:
    return batch.sample(logits, [Sampling(temperature=0)] * len(logits), np.zeros(len(logits)))


def write_in_rows(
    batch: Batch, prompts: list[list[int]], plans: list[np.ndarray], counts: list[int]
) -> list[list[int]]:
    """The most likely tokens after each prompt, `counts` of them; a text begins as soon as a row is free."""
    written: list[list[int]] = [[] for _ in prompts]
    rows: list[int] = []
    left = list(range(len(prompts)))
    while left or rows:
        while left and len(rows) < batch.max_rows:
            number = left.pop(0)
            rows.append(number)
            request = TextRequest(prompts[number], counts[number], plan=plans[number])
            written[number] += greedy(batch, batch.add(request).logits)
        chosen = greedy(batch, batch.step([written[number][-1] for number in rows]))
        for row in reversed(range(len(rows))):
            number = rows[row]
            written[number].append(chosen[row])
            if len(written[number]) >= counts[number]:
                batch.remove(row)
                last = rows.pop()
                if row < len(rows):
                    rows[row] = last
    return [text[:count] for text, count in zip(written, counts, strict=True)]
