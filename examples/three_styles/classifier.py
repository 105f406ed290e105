"""An independent classifier of styles: logistic regression on character n-grams, without access to plans."""

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression


class StyleClassifier:
    """Learns the styles from labeled training text."""

    def __init__(self, texts: list[str], labels: np.ndarray):
        self.vectorizer = HashingVectorizer(analyzer="char", ngram_range=(1, 4), n_features=2**18)
        self.classifier = LogisticRegression(max_iter=200, C=10).fit(self.vectorizer.transform(texts), labels)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """The style of each text, (N,) integers."""
        return self.classifier.predict(self.vectorizer.transform(texts))

    def accuracy(self, texts: list[str], labels: np.ndarray) -> float:
        return float((self(texts) == labels).mean())
