"""What the cost model has to match: a logistic regression on words and pairs of words.

It sees the answers alone. In these pairs each prompt stands once with a safe and once with an unsafe answer, so that a
linear model can learn nothing from the prompt's words.
"""

from collections.abc import Sequence

import numpy as np
from pairs import Pair
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from verdict import correct

FEATURES = {
    "counts": lambda: CountVectorizer(ngram_range=(1, 2)),
    "presence": lambda: CountVectorizer(ngram_range=(1, 2), binary=True),
    "tf-idf": lambda: TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
}
CS = (0.03, 0.1, 0.3, 1.0, 3.0)
FOLDS = 5


def fit_and_score(train: Sequence[Pair], others: Sequence[Pair], features: str, c: float) -> np.ndarray:
    """[P, 2] decision values of the others' safe and unsafe answers, above 0 for unsafe."""
    model = make_pipeline(FEATURES[features](), LogisticRegression(C=c, max_iter=2000))
    model.fit(_answers(train), [0, 1] * len(train))
    return model.decision_function(_answers(others)).reshape(-1, 2)


def choose(train: Sequence[Pair]) -> tuple[str, float, dict[str, float]]:
    """Features and C by cross-validation within the training part (folds by prompt), by the mean of both accuracies;
    and what those accuracies were."""
    folds = list(GroupKFold(min(FOLDS, len({pair.group for pair in train}))).split(train, groups=_groups(train)))
    best = None
    for features in FEATURES:
        for c in CS:
            costs_P2 = np.zeros((len(train), 2))
            for fitted, left_out in folds:
                costs_P2[left_out] = fit_and_score(
                    [train[i] for i in fitted], [train[i] for i in left_out], features, c
                )
            found = {metric: float(right_P.mean()) for metric, right_P in correct(costs_P2).items()}
            if best is None or sum(found.values()) > sum(best[2].values()):
                best = features, c, found
    return best


def _answers(pairs: Sequence[Pair]) -> list[str]:
    return [text for pair in pairs for text in (pair.safe_response, pair.unsafe_response)]


def _groups(pairs: Sequence[Pair]) -> list[str]:
    return [pair.group for pair in pairs]
