"""Tokenizers, fingerprints, and long texts tokenized in chunks."""

import re
from itertools import chain

import pytest
from data_cases import BEGIN, END, PADDING, STRANGE, TOKENIZER, Counting, pieces_of, prose, tokenizers_of_many_kinds
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from free_transformer.data import (
    build_rows,
    byte_tokenizer,
    encode,
    fingerprint,
    load_tokenizer,
    packing,
    streamed_batches,
    train_tokenizer,
    vocabulary_size,
)
from free_transformer.data import tokenizer as tokenizer_module
from free_transformer.data.tokenizer import begin_token


@pytest.mark.parametrize("text", STRANGE)
def test_bytes_are_their_own_tokens(text):
    assert TOKENIZER(text, add_special_tokens=False)["input_ids"] == list(text.encode())
    assert TOKENIZER.decode(list(text.encode())) == text


@given(st.text())
def test_any_text_comes_back_from_its_bytes(text):
    assert TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == list(text.encode())
    assert TOKENIZER.decode(list(text.encode())) == text


def test_a_text_begins_with_the_begin_token_and_special_ones_follow_the_bytes():
    assert TOKENIZER("é")["input_ids"] == [BEGIN, *"é".encode()]
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (BEGIN, END, PADDING)
    assert len(TOKENIZER) == 259
    assert begin_token(TOKENIZER) == BEGIN
    assert TOKENIZER.decode([BEGIN, 104, 105, END, PADDING], skip_special_tokens=True) == "hi"


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["abc", "a"], padding=True)
    assert batch["input_ids"] == [[BEGIN, 97, 98, 99], [PADDING, PADDING, BEGIN, 97]]
    assert batch["attention_mask"] == [[1, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("text", STRANGE)
def test_a_saved_tokenizer_comes_back_the_same(tmp_path, text, trained):
    tokenizer = train_tokenizer(["a b don't é " * 9], 265) if trained else TOKENIZER
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
        assert loaded.all_special_ids == tokenizer.all_special_ids


def test_load_tokenizer_knows_bytes():
    assert load_tokenizer("bytes")("hi")["input_ids"] == TOKENIZER("hi")["input_ids"]


@pytest.mark.parametrize("vocab_size", [259, 260, 280])
def test_a_trained_tokenizer_has_the_size_asked_for_and_takes_any_text(vocab_size):
    tokenizer = train_tokenizer(
        ["the cat sat on the mat with the other cat. " * 20, "häuser und mäuse " * 20], vocab_size
    )
    assert len(tokenizer) == vocab_size
    for text in STRANGE:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    shorter = len(tokenizer("the cat")["input_ids"]) < len(TOKENIZER("the cat")["input_ids"])
    assert shorter == (vocab_size > 259)
    assert tokenizer("x")["input_ids"][0] == begin_token(tokenizer)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=258: must be at least 259"):
        train_tokenizer(["text"], 258)


@pytest.mark.parametrize("name", ["nowhere/folder", "nobody-has-this-name"])
def test_a_tokenizer_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"tokenizer '{name}': no such folder or name on the hub") as error:
        load_tokenizer(name)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hi")
    with pytest.raises(ValueError, match="this folder has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_damaged_tokenizer_is_named(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{ half")
    with pytest.raises(ValueError, match="tokenizer '"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_with_no_token_to_begin_with_is_refused(tmp_path):
    plain = byte_tokenizer()
    plain.bos_token = plain.eos_token = None
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a begin-of-text nor an end-of-text"):
        load_tokenizer(str(tmp_path))


def fast(model, **parts) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


@pytest.mark.parametrize(("ids", "size"), [((0, 1, 2, 3), 4), ((0, 1, 50, 100), 101), ((9, 8, 7, 6), 10)])
def test_vocabulary_size_reaches_the_largest_id(ids, size):
    vocabulary = dict(zip(["<unk>", "<end>", "a", "b"], ids, strict=True))
    assert vocabulary_size(fast(models.WordLevel(vocabulary, unk_token="<unk>"))) == size


def test_vocabulary_size_of_bytes_is_their_number():
    assert vocabulary_size(TOKENIZER) == len(TOKENIZER) == 259


@given(st.text(max_size=9), st.characters(categories=["Cs"]), st.text(max_size=9))
def test_text_that_is_not_unicode_is_refused_with_its_place(before, surrogate, after):
    message = rf"^the text is not valid UTF-8: character {len(before)} is the lone surrogate '\\u"
    text = before + surrogate + after
    for use in (lambda: encode(TOKENIZER, ["fine", text]), lambda: build_rows([text], TOKENIZER, 8)):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("trained", [False, True])
def test_fingerprint_stays_the_same_in_use_and_when_saved(tmp_path, trained):
    tokenizer = train_tokenizer(["a b don't é " * 9], 275) if trained else byte_tokenizer()
    found = fingerprint(tokenizer)
    assert re.fullmatch("[0-9a-f]{32}", found)
    tokenizer(["abc", "a"], padding=True, truncation=True, max_length=2)
    assert fingerprint(tokenizer) == found
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == found
    assert fingerprint(load_tokenizer(str(tmp_path))) == found


def test_fingerprints_differ_where_tokens_may():
    def bpe(vocabulary, merges, **parts):
        return fast(models.BPE(vocabulary, merges), **parts)

    vocabulary = {"<unk>": 0, "<end>": 1, "a": 2, "b": 3, "c": 4, "ab": 5, "bc": 6}
    swapped = {**vocabulary, "a": 3, "b": 2}
    one, other = ("a", "b"), ("b", "c")
    without_end = bpe(vocabulary, [one, other])
    without_end.eos_token = None
    tokenizers = [
        bpe(vocabulary, [one, other]),
        bpe(vocabulary, [other, one]),
        bpe(swapped, [one, other]),
        bpe(vocabulary, [one, other], normalizer=normalizers.Lowercase()),
        bpe(vocabulary, [one, other], pre_tokenizer=pre_tokenizers.Whitespace()),
        without_end,
        train_tokenizer(["the cat"], 261),
        train_tokenizer(["a dog"], 261),
        byte_tokenizer(),
    ]
    assert len(set(map(fingerprint, tokenizers))) == len(tokenizers)


KINDS = [
    "bytes",
    "BPE",
    "Unigram",
    "Unigram across words",
    "Unigram with a mark before each text",
    "BPE across words",
    "BPE that strips",
    "WordPiece",
]


CUT = {"bytes", "BPE", "Unigram", "WordPiece", "BPE across words"}  # the others may or must keep long texts whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 50, 333, 2000])
def test_a_long_text_has_the_tokens_of_encoding_it_whole(monkeypatch, kind, chunk):
    tokenizer = tokenizers_of_many_kinds()[kind]
    monkeypatch.setattr(tokenizer_module, "CHUNK", chunk)
    for seed in range(3):
        text = prose(seed, 1200 if chunk > 1 else 60)
        chunks = list(tokenizer_module.encode_in_chunks(tokenizer, text))
        assert list(chain.from_iterable(chunks)) == encode(tokenizer, [text])[0]
        if kind in CUT and chunk > 1:
            assert len(chunks) > len(text) / chunk / 4


@pytest.mark.parametrize("kind", ["bytes", "BPE"])
@given(text=st.text(st.sampled_from("ab \n\té日🙂"), max_size=300), chunk=st.integers(1, 40))
def test_any_text_has_the_tokens_of_encoding_it_whole(kind, text, chunk):
    tokenizer = tokenizers_of_many_kinds()[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "CHUNK", chunk)
        patch.setattr(packing, "CHUNK", chunk)
        chunks = tokenizer_module.encode_in_chunks(tokenizer, text)
        assert list(chain.from_iterable(chunks)) == encode(tokenizer, [text])[0]
        documents = ["x", text, "", "y" * 30, text]
        chunked = build_rows(documents, tokenizer, 7)
    whole = build_rows(documents, tokenizer, 7)
    assert chunked.tokens.tolist() == whole.tokens.tolist()
    assert chunked.positions.tolist() == whole.positions.tolist()
    assert chunked.digest == whole.digest


@pytest.mark.parametrize("unit", ["the cat sat on the mat. ", "ACGT", "日本語", "line\n"])
def test_a_large_document_is_tokenized_in_parts_as_it_is_read(unit):
    tokenizer = Counting(TOKENIZER)
    text = unit * (600_000 // len(unit))
    next(streamed_batches([[text]], [1.0], tokenizer, 64, 2, 4, seed=0))
    assert max(tokenizer.sizes) < 70_000
    assert sum(tokenizer.sizes) < 150_000
    rows = build_rows([text], tokenizer, 1024)
    assert max(tokenizer.sizes) < 70_000
    assert sum(map(len, pieces_of(rows))) - len(rows) == len(text.encode()) + 1


def test_few_characters_are_tokenized_at_once():
    tokenizer = Counting(TOKENIZER)
    rows = build_rows(["x" * 60_000] * 20, tokenizer, 1000)
    assert max(tokenizer.sizes) <= packing.CHARACTERS_AT_ONCE
    assert rows.predicted_tokens == 20 * 60_001
