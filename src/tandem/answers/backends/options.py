"""Options of the engines that draw answers. Light to import."""

import dataclasses
import importlib.util

from tandem.errors import UserError
from tandem.options.parsing import opt
from tandem.servers import checked_url

# Where an option means nothing, giving it is an error
_ENGINES_OF = {
    "dtype": ("transformers", "vllm"),
    "base_url": ("openai",),
    "tensor_parallel_size": ("vllm",),
    "data_parallel_size": ("vllm",),
    "enforce_eager": ("vllm",),
}


@dataclasses.dataclass
class GenerationOptions:
    """Generation engine."""

    engine: str = opt(
        "transformers",
        "what draws the answers; vllm needs the extra vllm, openai any server with chat completions",
        choices=("transformers", "vllm", "openai"),
    )
    batch_size: int | None = opt(
        None, "prompts at a time: in a batch, in vLLM or in requests; unset: 8, and with vllm as many as it takes"
    )
    dtype: str | None = opt(
        None,
        "type of the weights; unset: bfloat16 on a GPU that multiplies it in hardware, else float32",
        choices=("float32", "bfloat16", "float16"),
    )
    base_url: str | None = opt(
        None, "server of --engine openai, as http://127.0.0.1:8000/v1; its key, if any, is read from $OPENAI_API_KEY"
    )
    tensor_parallel_size: int = opt(1, "vllm: GPUs that one copy of the model is spread over")
    data_parallel_size: int = opt(1, "vllm: copies of the model that share the prompts, each on GPUs of its own")
    enforce_eager: bool = opt(False, "vllm: compile nothing; starts much sooner and answers more slowly")

    def __post_init__(self) -> None:
        for name, engines in _ENGINES_OF.items():
            if self.engine not in engines and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"--{name} has no effect with --engine {self.engine}")
        for name in ("batch_size", "tensor_parallel_size", "data_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")
        if self.engine == "openai":
            if self.base_url is None:
                raise UserError("--engine openai needs --base_url: the server, as http://127.0.0.1:8000/v1")
            self.base_url = checked_url(self.base_url)
        if self.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise UserError("--engine vllm needs vLLM: pip install 'tandem[vllm]', or see docs/vllm.md for a CPU")
