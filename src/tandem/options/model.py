"""Options of the stages that load a model: which model, how it is adapted, how text becomes its tokens."""

import dataclasses
from pathlib import Path

from tandem.errors import UserError
from tandem.options.parsing import REQUIRED, changed, flags, opt, refuse


@dataclasses.dataclass
class ModelOptions:
    """Model."""

    model_name_or_path: str = opt(REQUIRED, "model folder or Hub name; an adapter's folder goes on training it")
    model_revision: str | None = opt(None, "branch, tag or commit of a Hub model")
    tokenizer_name_or_path: str | None = opt(None, "tokenizer folder or Hub name, where it is not the model's")
    dtype: str = opt("float32", "type of the weights held", choices=("float32", "bfloat16", "float16", "auto"))
    attn_implementation: str | None = opt(None, "attention of transformers used outside the pair engine")
    trust_remote_code: bool = opt(False, "run code that the model's repository ships")


@dataclasses.dataclass
class LoraOptions:
    """LoRA."""

    use_peft: bool = opt(False, "train a LoRA adapter instead of all weights")
    lora_r: int = opt(16, "rank")
    lora_alpha: int = opt(32, "scale: the update is multiplied by alpha / r")
    lora_dropout: float = opt(0.0, "dropout before the adapter; DPO turns it off unless --disable_dropout false")
    lora_target_modules: list[str] = opt(["all-linear"], "modules to adapt")
    load_in_4bit: bool = opt(False, "QLoRA: hold the base model in 4 bits (CUDA, extra: quantization)")

    def __post_init__(self) -> None:
        problems = []
        if self.lora_r < 1:
            problems.append(f"--lora_r must be at least 1, not {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"--lora_dropout must be at least 0 and below 1, not {self.lora_dropout}")
        if self.load_in_4bit and not self.use_peft:
            problems.append("--load_in_4bit needs --use_peft true: weights in 4 bits cannot be trained themselves")
        without_effect = [name for name in changed(self) if name not in ("use_peft", "load_in_4bit")]
        if without_effect and not self.use_peft:
            problems.append(f"{flags(without_effect)} no effect without --use_peft true")
        refuse(problems)


@dataclasses.dataclass
class TextOptions:
    """Text to tokens."""

    use_chat_template: bool = opt(True, "render conversations with the tokenizer's chat template, else as transcripts")
    max_length: int = opt(1024, "longest sequence in tokens; the answer's end is cut")
    max_prompt_length: int | None = opt(None, "longest prompt in tokens; its oldest turns are dropped first")

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"--max_length must be at least 2, not {self.max_length}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise UserError(
                f"--max_prompt_length must be at least 1 and below --max_length {self.max_length}, "
                f"not {self.max_prompt_length}"
            )


def is_adapter(name: str) -> bool:
    """Whether `name` is a local folder that holds a PEFT adapter."""
    return (Path(name) / "adapter_config.json").is_file()
