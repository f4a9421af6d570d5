"""Shortcuts: how well length or words tell chosen from rejected, which a model could learn instead of the task."""

from collections.abc import Sequence

import numpy as np

from tandem.data.formats import Row, prompt_id
from tandem.data.messages import answer_text
from tandem.intervals import Estimate, wilson

FEWEST = 100  # pairs from which a classifier is worth fitting
_MOST = 10_000  # pairs it is fitted on: the accuracy is then known to 1%
_FOLDS = 5
_WORDS_SHOWN = 8


def pick_longer(sizes: np.ndarray) -> Estimate:
    """Accuracy of naming the longer answer, ½ where they are equal.

    Args:
        sizes: (pairs, 2) of chosen and rejected, in any unit
    """
    return _accuracy((np.sign(sizes[:, 0] - sizes[:, 1]) + 1) / 2)


def _accuracy(right: np.ndarray) -> Estimate:
    return wilson(float(right.sum()), len(right), "there are no pairs")


def bag_of_words(pairs: Sequence[Row], seed: int = 0) -> Estimate | None:
    """Held-out accuracy of a logistic regression on which words are in which answer; None for too few pairs.

    Cross-validated with whole prompts held out. The features are word counts of chosen less those of rejected, cut to
    −1, 0 and 1; half of the pairs are turned round, so that there is something to predict. `chosen_words` and
    `rejected_words` speak most for either side.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    noise = np.random.default_rng(seed)
    if len(pairs) > _MOST:
        pairs = [pairs[index] for index in np.sort(noise.choice(len(pairs), _MOST, replace=False))]
    groups = [prompt_id(pair["prompt"]) for pair in pairs]
    if len(pairs) < FEWEST or len(set(groups)) < _FOLDS:
        return None
    answers = [answer_text(pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    vectorizer = CountVectorizer(binary=True, min_df=2, max_features=20_000, token_pattern=r"(?u)\b\w+\b")
    try:
        words = vectorizer.fit_transform(answers).astype(np.float64)
    except ValueError:  # no word is in two answers
        return None
    sides = noise.permutation(np.arange(len(pairs)) % 2 * 2 - 1)
    features = (words[: len(pairs)] - words[len(pairs) :]).multiply(sides[:, None]).tocsr()
    model = LogisticRegression(fit_intercept=False, C=0.1, max_iter=200)
    predicted = cross_val_predict(model, features, sides, groups=groups, cv=GroupKFold(_FOLDS))
    weights = model.fit(features, sides).coef_[0]
    names, order = vectorizer.get_feature_names_out(), np.argsort(weights)
    return _accuracy(predicted == sides) | {
        "chosen_words": [str(names[index]) for index in order[::-1][:_WORDS_SHOWN]],
        "rejected_words": [str(names[index]) for index in order[:_WORDS_SHOWN]],
    }
