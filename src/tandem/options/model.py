"""Options of stages that load a model: which model, how LoRA adapts it, and how text becomes tokens."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.model_folder import ADAPTER_CONFIG
from tandem.options.fields import REQUIRED, opt, refuse
from tandem.options.rules import Options

HALF_PRECISION = ("bfloat16", "float16")
"""Names of the types in which updates of weights are lost in rounding."""


@dataclasses.dataclass(kw_only=True)
class TemplateOptions(Options):
    """Chat template.

    The base of the options of every stage that loads a tokenizer.
    """

    chat_template: str | None = opt(
        None, "Jinja file to use in place of the tokenizer's chat template", unless="use_chat_template=false"
    )
    chat_template_kwargs: str | None = opt(
        None,
        'variables for the template, as a JSON object: {"enable_thinking": false}; those in a row\'s own column win',
        unless="use_chat_template=false",
    )
    system_prompt: str = opt(
        "keep",
        "what becomes of system messages: keep; fold into the first user turn; drop",
        choices=("keep", "fold", "drop"),
        unless="use_chat_template=false",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.day: str | None = None  # the date for templates that print today's, as YYYY-MM-DD; unset: today

    def conflicts(self) -> Iterator[str]:
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            yield f"--chat_template {self.chat_template}: no such file"
        if self.chat_template_kwargs is not None and not isinstance(self.keywords, dict):
            yield f"--chat_template_kwargs must be a JSON object, not {self.chat_template_kwargs}"

    @property
    def is_own(self) -> bool:
        """Whether the tokenizer's own template is used unchanged."""
        return (self.chat_template, self.chat_template_kwargs, self.system_prompt) == (None, None, "keep")

    @property
    def keywords(self) -> Any:
        """`chat_template_kwargs` as the value that its JSON stands for; None where it is not JSON."""
        try:
            return json.loads(self.chat_template_kwargs or "{}")
        except ValueError:
            return None


@dataclasses.dataclass
class ModelOptions(TemplateOptions):
    """Model."""

    model_name_or_path: str = opt(REQUIRED, "model folder or Hub name; an adapter's folder goes on training it")
    model_revision: str | None = opt(None, "branch, tag or commit of a Hub model")
    tokenizer_name_or_path: str | None = opt(None, "tokenizer folder or Hub name; unset: the model's")
    dtype: str = opt("float32", "type that weights are held in", choices=("float32", "bfloat16", "float16", "auto"))
    attn_implementation: str | None = opt(None, "attention of transformers used outside the pair engine")
    trust_remote_code: bool = opt(False, "run code that the model's repository ships")


@dataclasses.dataclass
class LoraOptions(Options):
    """LoRA."""

    use_peft: bool = opt(False, "train a LoRA adapter instead of all weights")
    lora_r: int = opt(16, "rank", low=1, needs="use_peft")
    lora_alpha: int = opt(32, "scale: the update is multiplied by alpha / r", needs="use_peft")
    lora_dropout: float = opt(
        0.0,
        "dropout before the adapter; DPO turns it off unless --disable_dropout false",
        low=0,
        below=1,
        needs=("use_peft", "disable_dropout=false"),
    )
    lora_target_modules: list[str] = opt(
        ["all-linear"],
        "modules to adapt, by the ends of their names; a single value is taken for a regular expression",
        needs="use_peft",
    )
    lora_exclude_modules: list[str] = opt([], "modules not to adapt, named in the same way", needs="use_peft")
    lora_target_parameters: list[str] = opt(
        [],
        "parameters to adapt that are not a linear module's weight, as mlp.experts.gate_up_proj",
        needs="use_peft",
    )
    lora_modules_to_save: list[str] = opt(
        [],
        "modules to train fully and save with the adapter, as lm_head and embed_tokens for new tokens",
        needs="use_peft",
    )
    lora_layers_to_transform: list[int] = opt([], "layers to adapt, counted from 0; unset: all", needs="use_peft")
    lora_layers_pattern: list[str] = opt(
        [], "name of the list of layers in the model, where PEFT does not find it", needs="use_peft"
    )
    lora_rank_pattern: dict[str, Any] | None = opt(
        None, 'ranks of some modules, as {"q_proj": 32}; the others have --lora_r', needs="use_peft"
    )
    lora_alpha_pattern: dict[str, Any] | None = opt(
        None, "alphas of some modules; the others have --lora_alpha", needs="use_peft"
    )
    lora_bias: bool = opt(False, "a bias in the adapter's second matrix", needs="use_peft")
    use_rslora: bool = opt(False, "scale by alpha / √r: Kalajdzievski 2023", needs="use_peft")
    use_dora: bool = opt(False, "learn magnitude and direction of weights apart: Liu et al. 2024", needs="use_peft")
    init_lora_weights: str = opt(
        "true",
        "initial values of the adapter: true and gaussian set its second matrix to zero, orthogonal its product; pissa "
        "and olora move the base's main directions into it",
        choices=("true", "gaussian", "orthogonal", "pissa", "olora"),
        needs="use_peft",
    )
    load_in_4bit: bool = opt(False, "QLoRA: hold the base model in 4 bits (CUDA, extra: quantization)")

    def conflicts(self) -> Iterator[str]:
        if self.load_in_4bit and self.init_lora_weights in ("pissa", "olora"):
            yield f"--init_lora_weights {self.init_lora_weights} changes the base, which --load_in_4bit holds in 4 bits"
        if self.init_lora_weights == "orthogonal" and self.lora_r % 2:
            yield f"--init_lora_weights orthogonal needs an even --lora_r, not {self.lora_r}"
        if self.lora_layers_pattern and not self.lora_layers_to_transform:
            yield "--lora_layers_pattern has no effect without --lora_layers_to_transform"
        for name, value in (self.lora_rank_pattern or {}).items():
            if not isinstance(value, int) or value < 1:
                yield f"--lora_rank_pattern {name} must be a whole number of at least 1, not {value!r}"
        for name, value in (self.lora_alpha_pattern or {}).items():
            if not isinstance(value, int | float):
                yield f"--lora_alpha_pattern {name} must be a number, not {value!r}"


@dataclasses.dataclass
class TextOptions(Options):
    """Text to tokens."""

    use_chat_template: bool = opt(True, "render conversations with the tokenizer's chat template, else as transcripts")
    max_length: int | None = opt(1024, "longest sequence in tokens; the answer's end is cut; none: no limit", low=2)
    max_prompt_length: int | None = opt(None, "longest prompt in tokens; its oldest turns are dropped first", low=1)

    def conflicts(self) -> Iterator[str]:
        if self.max_prompt_length is not None and self.max_prompt_length >= self.limit > 1:
            yield f"--max_prompt_length must be below --max_length {self.max_length}, not {self.max_prompt_length}"

    @property
    def limit(self) -> int:
        """`max_length` as a number; where there is no limit, one that is larger than any length."""
        return sys.maxsize if self.max_length is None else self.max_length


@dataclasses.dataclass(kw_only=True)
class PreparationOptions(Options):
    """Preparation of data: the base of the options of every stage that makes token ids of it."""

    dataset_num_proc: int | None = opt(
        None, "processes that tokenize; unset: as many as there are cores, or one for few rows", low=1
    )
    token_cache: str | None = opt(
        None, "folder where token ids are kept for later runs; unset: in the user's cache folder"
    )
    token_cache_gib: float = opt(
        50.0, "beyond this size of the folder the token ids that were unused for the longest time are removed", low=0
    )


def check_folder(name: str, needed: str = "config.json") -> None:
    """Refuse what cannot be a model: a path that is no folder, or a folder without the file `needed`.

    A Hub name passes. Nothing heavy is imported, so that a wrong name is told before torch is.

    Raises:
        UserError: naming the path, and the file that it lacks.
    """
    path = Path(name)
    if path.is_dir() and not (path / needed).is_file():
        raise UserError(f"{name}: not a model folder: it has no {needed}")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{name}: no such model folder")


def check_models(names: Iterable[str]) -> None:
    """`check_folder` of each name that is no adapter.

    Raises:
        UserError: naming all that are wrong.
    """
    problems = []
    for name in dict.fromkeys(names):
        if not is_adapter(name):
            try:
                check_folder(name)
            except UserError as problem:
                problems.append(str(problem))
    refuse(problems)


def is_adapter(name: str) -> bool:
    """Whether `name` is a local folder that holds a PEFT adapter."""
    return (Path(name) / ADAPTER_CONFIG).is_file()
