"""The order in which rows are read: epochs, shuffling, workers and streaming."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from data_cases import TOKENIZER, numbered, rows_of
from hypothesis import given
from hypothesis import strategies as st

from free_transformer.data import build_rows, streamed_batches
from free_transformer.data.rows import EpochOrder


@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 3), st.integers(0, 200))
def test_the_order_of_rows_is_a_permutation_in_each_epoch(count, seed, index, start):
    expected = np.concatenate(
        [np.random.default_rng([seed, index, epoch]).permutation(count) for epoch in range(start // count + 4)]
    )
    order = EpochOrder(count, [seed, index])
    stop = start + 2 * count + 1
    assert order.take(start, stop).tolist() == expected[start:stop].tolist()
    assert order.take(stop, stop).tolist() == []


@pytest.mark.parametrize("rows", [255, 256, 70_000])
def test_an_order_takes_few_bytes_and_is_sampled_once_per_epoch(monkeypatch, rows):
    drawn, original = [], np.random.default_rng

    def default_rng(seed):
        drawn.append(seed)
        return original(seed)

    monkeypatch.setattr(np.random, "default_rng", default_rng)
    order = EpochOrder(rows, [7])
    for start in range(0, rows * 2, 85):
        order.take(start, min(start + 85, rows * 2))
    assert len(drawn) <= 4  # a place in both epochs may go back and forth once
    assert drawn[0] == [7, 0]
    assert order.permutation.itemsize <= 4
    assert sorted(order.permutation.tolist()) == list(range(rows))


def test_an_epoch_holds_every_row_once_and_each_has_an_order_of_its_own():
    rows = build_rows(numbered(12), TOKENIZER, 9)
    assert len(rows) == 12
    batches = list(islice(rows.shuffled(4, seed=0), 9))
    epochs = [rows_of(batches[start : start + 3]) for start in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(map(tuple, rows.tokens.tolist()))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_no_row_is_dropped_where_batches_do_not_fill_an_epoch():
    rows = build_rows(numbered(11), TOKENIZER, 9)
    read = Counter(rows_of(islice(rows.shuffled(3, seed=5), 11)))
    assert read == Counter({tuple(row): 3 for row in rows.tokens.tolist()})


@given(st.integers(0, 60), st.integers(1, 11), st.integers(1, 11))
def test_a_run_may_resume_at_any_row_with_another_batch_size(start, first_size, second_size):
    """Which rows are read does not depend on the size of the batches that they are read in."""
    rows = build_rows(numbered(11), TOKENIZER, 9)
    order = EpochOrder(len(rows), [5]).take(0, 200)
    expected = [tuple(row) for row in rows.tokens[order].tolist()]
    batches = list(islice(rows.shuffled(first_size, 5), start // first_size))
    at = len(batches) * first_size
    batches += islice(rows.shuffled(second_size, 5, at), 3)
    assert Counter(rows_of(batches)) == Counter(expected[: at + 3 * second_size])


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 9))
def test_workers_take_turns_and_processes_share(start, workers, batch_size):
    rows = build_rows(numbered(11), TOKENIZER, 9)
    whole = [rows_of([batch]) for batch in islice(rows.shuffled(batch_size, 5, start), 2 * workers)]
    half = batch_size // 2
    for worker in range(workers):
        own = rows.shuffled(batch_size, 5, start, worker, workers)
        assert [rows_of([batch]) for batch in islice(own, 2)] == whole[worker::workers]
        left, right = (
            rows_of([next(rows.shuffled(batch_size, 5, start, worker, workers, share))])
            for share in (slice(0, half), slice(half, batch_size))
        )
        assert left + right == whole[worker]


def test_order_follows_the_seed():
    rows = build_rows(numbered(20), TOKENIZER, 9)
    one, same, other = (rows_of(islice(rows.shuffled(5, seed), 4)) for seed in (0, 0, 1))
    assert one == same != other


def test_rows_that_fill_no_batch_are_refused_with_what_to_do():
    rows = build_rows(numbered(3), TOKENIZER, 9)
    with pytest.raises(ValueError, match=r"fills 3 rows of 9 tokens, fewer than batch_size=4.*smaller batch_size"):
        next(rows.shuffled(4, seed=0))


def test_rows_in_order_are_each_row_once():
    rows = build_rows(numbered(7), TOKENIZER, 9)
    batches = list(rows.in_order(3))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    assert rows_of(batches) == [tuple(row) for row in rows.tokens.tolist()]


@pytest.mark.parametrize("buffer_rows", [1, 4, 1000])
def test_streaming_gives_the_rows_of_an_epoch_then_of_the_next(buffer_rows):
    documents = [*numbered(13), "a" * 30, "b", "cc"]
    rows = build_rows(documents, TOKENIZER, 9)
    assert len(rows) % 2 == 0
    batches = streamed_batches([documents], [1.0], TOKENIZER, 9, 2, buffer_rows, seed=0)
    for _ in range(2):
        epoch = rows_of(islice(batches, len(rows) // 2))
        assert sorted(epoch) == sorted(map(tuple, rows.tokens.tolist()))


@pytest.mark.parametrize("start", [0, 1, 6, 13, 41])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_streaming_from_a_row_is_skipping_those_before(start, batch_size):
    whole = rows_of(islice(streamed_batches([numbered(20)], [1.0], TOKENIZER, 9, 5, 5, seed=2), 20))
    later = streamed_batches([numbered(20)], [1.0], TOKENIZER, 9, batch_size, 5, seed=2, start=start)
    assert rows_of(islice(later, 5)) == whole[start : start + 5 * batch_size]


def test_streaming_shuffles_by_its_seed_and_each_epoch_anew():
    one, same, other = (
        rows_of(islice(streamed_batches([numbered(20)], [1.0], TOKENIZER, 9, 5, 8, seed), 8)) for seed in (0, 0, 1)
    )
    assert one == same != other
    assert one[:20] != one[20:]
    assert one[:20] != sorted(one[:20])


def test_streamed_batches_have_the_labels_of_rows():
    documents = ["ab", "c" * 20]
    streamed = next(streamed_batches([documents], [1.0], TOKENIZER, 9, 4, 1, seed=0))
    whole = build_rows(documents, TOKENIZER, 9).take(slice(None))

    def labels_by_row(batch):
        return dict(zip(map(tuple, batch["input_ids"].tolist()), batch["labels"].tolist(), strict=True))

    assert labels_by_row(streamed) == labels_by_row(whole)
