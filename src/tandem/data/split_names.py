"""Names of splits: what the name of a file or folder says, and which split stands in for one that is missing."""

import itertools
import re
from collections.abc import Iterable
from pathlib import PurePath

TRAIN, TEST, VALIDATION = "train", "test", "validation"

# Words in a name, as the Hub reads them, and what people write besides
_WORDS = {
    TRAIN: {"train", "training", "trainset", "trainingset", "traindata", "trainingdata"},
    TEST: {"test", "testing", "tests", "testset", "testdata", "eval", "evals", "evaluation", "evalset"}
    | {"heldout", "holdout"},
    VALIDATION: {"validation", "valid", "validate", "val", "valset", "dev", "devset", "validationset"},
}
_TWO_WORDS = (("held", "out"), ("hold", "out"))
_OF_STAGES = {"prefs", "pref", "preferences", "sft", "gen", "rm", "dpo", "kto", "ppo", "rl"}
_SHARD = re.compile(r"(?P<split>\w[\w.-]*?)-\d{5}-of-\d{5}\b")


def split_of(path: PurePath) -> str | None:
    """The split that a file's path, relative to its data set's folder, names; None if it names none.

    `SPLIT-00000-of-00001…` is of that very split, as on the Hub, and so is `train_sft.jsonl` among files for several
    stages of training. Else a word of a folder or of the file's name tells, the outermost first.

    Raises:
        ValueError: the path names training and held-out data.
    """
    name = path.name
    if (shard := _SHARD.match(name)) and "." not in shard["split"]:
        return shard["split"]
    stem = name.split(".")[0]
    kinds = [kind for part in (*path.parts[:-1], stem) if (kind := _kind_of_words(_words(part)))]
    if len({kind == TRAIN for kind in kinds}) > 1:
        raise ValueError(f"{path} names training and held-out data")
    if not kinds:
        return None
    of_stage = re.fullmatch(r"([a-z]+)_([a-z]+)", stem)
    if of_stage and of_stage[2] in _OF_STAGES and _kind_of_words([of_stage[1]]):
        return stem
    return kinds[0]


def is_training(split: str) -> bool:
    """Whether a split's name says that it is to be trained on."""
    return _kind(split) == TRAIN


def is_held_out(split: str) -> bool:
    """Whether a split's name says that it is held out."""
    return _kind(split) in (TEST, VALIDATION)


def _kind(split: str) -> str | None:
    try:
        return _kind_of_words(_words(split))
    except ValueError:
        return None


def _words(name: str) -> list[str]:
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return re.findall(r"[a-z]+", parted)


def _kind_of_words(words: list[str]) -> str | None:
    """The kind of split that words name.

    Raises:
        ValueError: they name training and held-out data.
    """
    found = {kind for kind, known in _WORDS.items() if known.intersection(words)}
    if any(pair in itertools.pairwise(words) for pair in _TWO_WORDS):
        found.add(TEST)
    if TRAIN in found and len(found) > 1:
        raise ValueError(f"{' '.join(words)} names training and held-out data")
    return min(found, default=None)  # of test and validation, test


def training_split(names: Iterable[str]) -> str | None:
    """The only split to train on where none is called `train`; None where there is none, or several."""
    found = [name for name in names if is_training(name)]
    return found[0] if len(found) == 1 else None


def held_out_split(names: Iterable[str], train: str) -> str | None:
    """The held-out split that goes with `train` where none is called `test`: of the same stage, or else the only one.

    `test_prefs` goes with `train_prefs`, and of a test and a validation split the test split is meant.
    """
    found = [name for name in names if is_held_out(name)]
    stage = train.partition("_")[2]
    if stage or any(name.partition("_")[2] for name in found):
        found = [name for name in found if name.partition("_")[2] == stage]
    tests = [name for name in found if _kind(name) == TEST] or found
    return tests[0] if len(tests) == 1 else None


def named(names: Iterable[str], wanted: str) -> str | None:
    """The split that is called `wanted`, or by another word for it: `dev` is `validation`."""
    names = list(names)
    if wanted in names:
        return wanted
    words = _words(wanted)
    return next((kind for kind in names if kind in _WORDS and len(words) == 1 and words[0] in _WORDS[kind]), None)
