"""Answers of a model to held-out prompts, a line a prompt, resumable."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem.config import REQUIRED, opt
from tandem.data.formats import Message, Row, as_messages, prompt_id
from tandem.errors import UserError
from tandem.runs import append_jsonl, read_jsonl
from tandem.sampling import SamplingOptions


@dataclass
class GenerateOptions:
    """Generate."""

    model_name_or_path: str = opt(REQUIRED, "model or adapter folder, or Hub name")
    label: str = opt(REQUIRED, "name of the model in later stages: base, sft, dpo")
    output_dir: str = opt(REQUIRED, "folder for generations_<label>.jsonl")


def held_out_prompts(pairs: Sequence[Row], limit: int | None) -> list[list[Message]]:
    """Distinct prompts of `pairs` as messages, in their order."""
    prompts: dict[str, list[Message]] = {}
    for pair in pairs:
        messages = as_messages(pair["prompt"])
        prompts.setdefault(prompt_id(messages), messages)
    return list(prompts.values())[:limit]


def generate(model: str, label: str, prompts: Sequence[list[Message]], options: SamplingOptions, folder: Path) -> Path:
    """Write `folder`/generations_<label>.jsonl; what a killed run has written is kept.

    The batches are fixed by the prompts alone, and each has a seed of its own, so that a resumed run draws what an
    undisturbed one would have.

    Raises:
        UserError: the file holds answers drawn from another model or with other settings.
    """
    path = folder / f"generations_{label}.jsonl"
    sampling = asdict(options.sampling)
    done = {record["prompt_id"] for record in _checked(path, model, sampling, options.seed)}
    missing = [messages for messages in prompts if prompt_id(messages) not in done]
    if not missing:
        return path

    from tqdm import tqdm

    from tandem.data.texts import prompt_ids, trim_prompt
    from tandem.models import load_model, load_tokenizer
    from tandem.options import ModelOptions, is_adapter
    from tandem.scoring import Scorer

    source = ModelOptions(model_name_or_path=model)
    tokenizer = load_tokenizer(source)
    scorer = Scorer(load_model(source), tokenizer, batch_size=options.batch_size)
    ids = [prompt_ids(trim_prompt(list(m), tokenizer, options.max_prompt_length), tokenizer) for m in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(ids[index]))
    with tqdm(total=len(prompts), initial=len(done), desc=f"answers of {label}", unit="prompt") as bar:
        tokens = 0
        for start in range(0, len(order), options.batch_size):
            batch = order[start : start + options.batch_size]
            if all(prompt_id(prompts[index]) in done for index in batch):
                continue
            answers = scorer.sample([ids[index] for index in batch], options.sampling, options.seed + start)
            for index, answer in zip(batch, answers, strict=True):
                if prompt_id(prompts[index]) in done:
                    continue
                ended = answer[-1] in scorer.ends
                tokens += len(answer)
                append_jsonl(
                    path,
                    {
                        "prompt_id": prompt_id(prompts[index]),
                        "messages": prompts[index],
                        "model": model,
                        "adapter": model if is_adapter(model) else None,
                        "engine": "transformers",
                        "sampling": sampling,
                        "seed": options.seed,
                        "text": tokenizer.decode(answer, skip_special_tokens=True).strip(),
                        "n_tokens": len(answer),
                        "finish_reason": "stop" if ended else "length",
                    },
                )
                bar.update()
            bar.set_postfix({"tokens/s": f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f}"})
    return path


def _checked(path: Path, model: str, sampling: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    records = read_jsonl(path)
    for record in records:
        if (record["model"], record["sampling"], record["seed"]) != (model, sampling, seed):
            raise UserError(f"{path}: holds answers of {record['model']} or of other sampling; move the file away")
    return records
