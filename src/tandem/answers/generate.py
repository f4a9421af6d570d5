"""Has models answer held-out prompts: a file of lines for each model, which a killed run goes on with."""

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tandem import ranks
from tandem.answers.backends.options import BACKENDS, GenerationOptions
from tandem.data.formats import Message, prompt_id
from tandem.data.messages import extras_of
from tandem.data.non_answers import non_answer
from tandem.digests import model_digest
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions
from tandem.objects import version_of
from tandem.options.fields import REQUIRED, opt
from tandem.options.model import check_models, is_adapter
from tandem.options.rules import Options
from tandem.runs import append_jsonl, locked, read_jsonl, sha256_json

MANY = 0.05  # answers that are none (empty, cut off) are told if they are more than this share
_LABEL = re.compile(r"\w[\w.-]*")


@dataclass
class GenerateOptions(Options):
    """Generate."""

    models: list[str] = opt(
        REQUIRED, "label=MODEL for each: a model's or adapter's folder, or Hub name, or name served; base=MODEL dpo=out"
    )
    output_dir: str = opt(REQUIRED, "folder for a generations_<label>.jsonl of each")

    def conflicts(self) -> Iterator[str]:
        for given in self.models:
            label, _, model = given.partition("=")
            if not _LABEL.fullmatch(label) or not model:
                yield f"--models {given}: must be label=MODEL, as base=MODEL or dpo=out"
        if len(self.by_label) < len(self.models):
            yield f"--models {' '.join(self.models)}: a label is there twice"

    @property
    def by_label(self) -> dict[str, str]:
        """The models by label."""
        return {label: model for label, _, model in (given.partition("=") for given in self.models)}


def generate(
    models: Mapping[str, str],
    prompts: Sequence[list[Message]],
    sampling: SamplingOptions,
    options: GenerationOptions,
    folder: Path,
) -> dict[str, Path]:
    """Have every model, by label, answer the same prompts with the same sampling; returns their files by label.

    Answers that `folder`/generations_<label>.jsonl holds already are kept, so that a killed run goes on where it was.
    If none is missing, no model is loaded.

    Raises:
        UserError: a file holds answers of another model, of other weights of the same model or of other sampling,
            another process writes into the folder, or the backend cannot answer.
    """
    if options.backend == "openai" and sampling.max_prompt_length != SamplingOptions.max_prompt_length:
        raise UserError("--max_prompt_length has no effect with --backend openai: the server has the tokenizer")
    if options.backend != "transformers":
        ranks.refuse_several(f"--backend {options.backend}")
    files = {label: folder / f"generations_{label}.jsonl" for label in models}
    if options.backend in ("transformers", "vllm"):
        check_models(model for label, model in models.items() if not files[label].exists())
    with ranks.joined(), locked(folder) if ranks.is_first() else contextlib.nullcontext():
        sources = {label: source_of(model, sampling, options) for label, model in models.items()}
        done = {label: _answered(files[label], sources[label]) for label in models}
        wanted = {
            label: {index for index, messages in enumerate(prompts) if prompt_id(messages) not in done[label]}
            for label in models
        }
        unfinished = {label: models[label] for label in models if wanted[label]}
        if unfinished:
            from tandem.data.adapt import day_of_models

            options.day = day_of_models(models.values())
            from tandem.answers.backends.open import open_backend

            with open_backend(unfinished.values(), options, sampling) as backend:
                # Models with the same base follow each other, so that a backend can keep the base in memory
                for label in sorted(unfinished, key=lambda label: sources[label]["model"]):
                    backend.load(models[label])
                    _write_answers(backend, label, prompts, wanted[label], sources[label], files[label])
        if ranks.is_first():
            for label, file in files.items():
                _warn_of_non_answers(label, file, {prompt_id(messages) for messages in prompts})
    return files


def _warn_of_non_answers(label: str, file: Path, asked: Collection[str]) -> None:
    from tqdm import tqdm

    records = [record for record in read_jsonl(file) if record["prompt_id"] in asked]
    reasons = Counter(why for record in records if (why := non_answer(record)))
    if reasons.total() > MANY * len(records):
        told = ", ".join(f"{count} {why}" for why, count in reasons.most_common())
        tqdm.write(f"{file}: {reasons.total()} of {len(records)} answers of {label} are none ({told})", file=sys.stderr)


def _write_answers(
    backend: Any, label: str, prompts: Sequence[list[Message]], wanted: set[int], source: dict[str, Any], file: Path
) -> None:
    from tqdm import tqdm

    done, tokens = len(prompts) - len(wanted), 0
    description, writes = f"answers of {label}", ranks.is_first()
    with tqdm(total=len(prompts), initial=done, desc=description, unit="prompt", disable=not writes) as bar:
        for index, answer in backend.answers(prompts, wanted):
            if not writes:
                continue
            asked = prompts[index]
            identity = {"prompt_id": prompt_id(asked), "messages": asked, **extras_of(asked)}
            append_jsonl(file, identity | source | asdict(answer))
            tokens += answer.n_tokens or 0
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)
            bar.update()


def source_of(model: str, sampling: SamplingOptions, options: GenerationOptions) -> dict[str, Any]:
    """The fields of a line that say what the answer was drawn with."""
    base, adapter, max_prompt_length, weights = model, None, None, None
    drawn = asdict(sampling.sampling)
    if options.backend != "openai":  # with a server, `model` is only a name: its weights and template are not known
        max_prompt_length = sampling.max_prompt_length
        if not options.is_own:
            drawn["template"] = [options.chat_template, options.chat_template_kwargs, options.system_prompt]
        if is_adapter(model):
            from tandem.models.configuration import base_of_adapter

            base, adapter = base_of_adapter(model), model
        digests = [model_digest(name) for name in (base, adapter) if name is not None]
        weights = sha256_json(digests) if any(digests) else None
    return {
        "model": base,
        "adapter": adapter,
        "weights": weights,
        "engine": options.backend,
        **_setting(options),
        "sampling": drawn | {"max_prompt_length": max_prompt_length},
        "seed": sampling.seed,
    }


def _setting(options: GenerationOptions) -> dict[str, Any]:
    """What an answer depends on besides the model and the sampling; None for what does not matter to the backend."""
    if options.backend == "openai":
        return {"base_url": options.base_url, "dtype": None}
    from tandem.answers.backends.base import weights_dtype

    code = {} if options.backend in BACKENDS else {"code": version_of(options.backend)}
    return {"base_url": None, "dtype": weights_dtype(options), **code}


_SETTINGS = {"code": "another version of --backend", "base_url": "another server", "dtype": "another --dtype"}


def refuse_others(file: Path, kind: str, records: Sequence[Mapping[str, Any]], source: Mapping[str, Any]) -> None:
    """Refuse a file with lines that were drawn with something other than `source` says.

    The backend may be another, and so may the place of a model whose weights are known to be the same.

    Args:
        kind: what a line is, for the message: answers, draws.

    Raises:
        UserError: there is such a line.
    """
    model = source["adapter"] or source["model"]
    for record in records:
        named = all(record.get(name) == source[name] for name in ("model", "adapter"))
        # Older lines have no digest of the weights, and neither have models of the Hub or of servers
        known = record.get("weights") and source["weights"]
        same = record["weights"] == source["weights"] if known else named
        if named and not same:
            raise UserError(f"{file}: holds {kind} of {model} with other weights than it has now; move it away")
        if not same or any(record.get(name) != source[name] for name in ("sampling", "seed")):
            raise UserError(f"{file}: holds {kind} of another model than {model} or of other sampling; move it away")
        for name, words in _SETTINGS.items():  # older lines lack these fields
            was, now = record.get(name), source.get(name)
            if None not in (was, now) and was != now:
                raise UserError(f"{file}: holds {kind} of {words} ({was}, now {now}); move it away")


def _say_server_may_have_changed(file: Path, count: int, model: str) -> None:
    from tqdm import tqdm

    date = datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    tqdm.write(
        f"{file}: {count} answers from up to {date} are used as they are; if another model is served as {model} since, "
        "move the file away",
        file=sys.stderr,
    )


def _answered(file: Path, source: Mapping[str, Any]) -> set[str]:
    """The ids of the prompts that `file` holds answers to.

    Raises:
        UserError: see `refuse_others`.
    """
    records = read_jsonl(file)
    refuse_others(file, "answers", records, source)
    if records and source["base_url"] is not None:
        _say_server_may_have_changed(file, len(records), source["model"])
    return {record["prompt_id"] for record in records}
