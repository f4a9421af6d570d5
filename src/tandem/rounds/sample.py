"""Draws several answers of each model to each prompt, and keeps each as it comes."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tandem import ranks
from tandem.answers.backends.base import Answer, Draw
from tandem.answers.backends.options import GenerationOptions
from tandem.answers.generate import refuse_others, source_of
from tandem.data.adapt import day_of_models
from tandem.data.messages import extras_of
from tandem.errors import UserError
from tandem.models.sampling import SamplingOptions, draw_seed
from tandem.options.model import check_models
from tandem.rounds.names import DATA, PROMPTS, SAMPLES
from tandem.rounds.options import SampleOptions
from tandem.rounds.prompts import Prompt
from tandem.rounds.records import Record, write_records
from tandem.runs import append_jsonl, locked, read_jsonl

Drawn = dict[tuple[str, int], Record]  # by prompt id and number of the draw


def sample(
    options: SampleOptions, backend: GenerationOptions, sampling: SamplingOptions, prompts: Sequence[Prompt]
) -> Path:
    """Have every model answer the prompts of this part `num_samples` times; returns the path of `samples.jsonl`.

    Each draw is written to draws_<label>.jsonl as it comes, so that a run after a kill draws only what is missing.
    `samples.jsonl`, with all draws ordered by model, prompt and number, is written last.

    Raises:
        UserError: a file holds draws of another model or of other sampling, or the backend cannot answer.
    """
    if sampling.greedy and options.num_samples > 1:
        raise UserError(f"--greedy gives one answer to a prompt, not {options.num_samples}: set --num_samples 1")
    if backend.backend == "openai" and sampling.max_prompt_length != SamplingOptions.max_prompt_length:
        raise UserError("--max_prompt_length has no effect with --backend openai: the server has the tokenizer")
    if backend.backend != "transformers":
        ranks.refuse_several(f"--backend {backend.backend}")
    prompts = options.own_part(prompts)[: sampling.max_prompts]
    folder = Path(options.output_dir)
    if backend.backend in ("transformers", "vllm"):
        check_models(
            model for label, model in options.by_label.items() if not (folder / f"draws_{label}.jsonl").exists()
        )
    with ranks.joined(), locked(folder) if ranks.is_first() else contextlib.nullcontext():
        sources = {label: source_of(model, sampling, backend) for label, model in options.by_label.items()}
        files = {label: folder / f"draws_{label}.jsonl" for label in sources}
        done = {label: _drawn(files[label], sources[label]) for label in sources}
        missing = {label: _missing(prompts, options.num_samples, done[label]) for label in sources}
        unfinished = {label: options.by_label[label] for label in sources if missing[label]}
        if unfinished:
            backend.day = day_of_models(unfinished.values())
            from tandem.answers.backends.open import open_backend

            with open_backend(unfinished.values(), backend, sampling) as drawer:
                # Models with the same base follow each other, so that a backend can keep the base in memory
                for label in sorted(unfinished, key=lambda label: sources[label]["model"]):
                    drawer.load(unfinished[label])
                    _draw(drawer, label, prompts, options.num_samples, missing[label], sources[label], files[label])
        if ranks.is_first():
            _finish(folder, options, prompts, sources, files)
    return folder / SAMPLES


def _missing(prompts: Sequence[Prompt], count: int, done: Collection[tuple[str, int]]) -> set[Draw]:
    return {
        (index, number)
        for index, prompt in enumerate(prompts)
        for number in range(count)
        if (prompt.prompt_id, number) not in done
    }


def _draw(
    backend: Any,
    label: str,
    prompts: Sequence[Prompt],
    count: int,
    wanted: set[Draw],
    source: Mapping[str, Any],
    file: Path,
) -> None:
    from tqdm import tqdm

    total, tokens, writes = len(prompts) * count, 0, ranks.is_first()
    messages = [prompt.messages for prompt in prompts]
    with tqdm(
        total=total, initial=total - len(wanted), desc=f"draws of {label}", unit="draw", disable=not writes
    ) as bar:
        answer: Answer
        for (index, number), answer in backend.draws(messages, count, wanted):
            if not writes:
                continue
            key = prompts[index].prompt_id
            own = {"prompt_id": key, "draw": number, "draw_seed": draw_seed(source["seed"], key, number)}
            append_jsonl(file, {**own, **asdict(answer), **source})
            tokens += answer.n_tokens or 0
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)
            bar.update()


def _drawn(file: Path, source: Mapping[str, Any]) -> Drawn:
    """The draws that `file` holds.

    Raises:
        UserError: the file is damaged, or for the reasons of `refuse_others`.
    """
    try:
        records = read_jsonl(file)
        drawn = {(record["prompt_id"], record["draw"]): record for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error!r}); move it away, or restore it") from error
    refuse_others(file, "draws", records, source)
    return drawn


def _finish(
    folder: Path,
    options: SampleOptions,
    prompts: Sequence[Prompt],
    sources: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Path],
) -> None:
    drawn = {label: _drawn(files[label], sources[label]) for label in sources}
    records: list[Record] = [
        {
            "messages": prompt.messages,
            **extras_of(prompt.messages),
            "label": label,
            "held_out": options.held_out,
            **drawn[label][prompt.prompt_id, number],
        }
        for label in sources
        for prompt in prompts
        for number in range(options.num_samples)
    ]
    if options.with_chosen:
        records += [
            {
                "messages": prompt.messages,
                **extras_of(prompt.messages),
                "label": DATA,
                "prompt_id": prompt.prompt_id,
                "draw": 0,
                "text": prompt.chosen,
            }
            for prompt in prompts
            if prompt.chosen is not None
        ]
    rows = ({"prompt_id": prompt.prompt_id, "messages": prompt.messages, "row": prompt.row} for prompt in prompts)
    write_records(folder / PROMPTS, rows)
    write_records(folder / SAMPLES, records)
