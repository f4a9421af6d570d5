"""Options of the backends that draw answers. Nothing heavy is imported here."""

import dataclasses
import importlib.util
from collections.abc import Iterator

from tandem import contract
from tandem.errors import UserError
from tandem.options.fields import opt
from tandem.options.migration import Counterpart
from tandem.options.model import TemplateOptions
from tandem.servers.address import checked_url, default_url

FORMER = {"engine": Counterpart(to="backend")}  # what an option was called before
BACKENDS = ("transformers", "vllm", "openai")
_NOT_VLLM = "backend=transformers|openai"


@dataclasses.dataclass
class GenerationOptions(TemplateOptions):
    """Backend of generation."""

    backend: str = opt(
        "transformers",
        "what draws the answers: transformers, vllm (the extra vllm), openai (any server with OpenAI's interface), or "
        "one of your own as module:class or file.py:class (docs/extending.md)",
    )
    batch_size: int | None = opt(
        None,
        "prompts at a time; unset, with transformers: as many as memory allows, up to 32 on a CPU and 64 elsewhere (8 "
        "on Gaudi); with vllm: its own choice; with openai: 8 requests",
        low=1,
    )
    dtype: str | None = opt(
        None,
        "type of the weights; unset: bfloat16 on a GPU that multiplies it in hardware, else float32",
        choices=("float32", "bfloat16", "float16"),
        unless="backend=openai",
    )
    base_url: str | None = opt(
        None,
        "server of --backend openai, as http://127.0.0.1:8000/v1; its key, if any, is read from $OPENAI_API_KEY; "
        "unset: $OPENAI_BASE_URL",
        unless="backend=transformers|vllm",
    )
    tensor_parallel_size: int = opt(1, "vllm: GPUs that one copy of the model is spread over", low=1, unless=_NOT_VLLM)
    data_parallel_size: int = opt(
        1,
        "vllm: copies of the model that share the prompts, each on GPUs of its own",
        low=1,
        unless=_NOT_VLLM,
    )
    gpu_memory_utilization: float = opt(
        0.9, "vllm: share of a GPU's memory that it takes", above=0, high=1, unless=_NOT_VLLM
    )
    enforce_eager: bool = opt(
        False, "vllm: compile nothing: it starts much sooner and answers more slowly", unless=_NOT_VLLM
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backend == "openai" and (url := self._given_url) is not None:
            self.base_url = checked_url(url)

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.backend not in BACKENDS and ":" not in self.backend:
            known = f"one of {', '.join(BACKENDS)}, or module:class"
            yield f"--backend must be {known}, not {self.backend}"
        if self.backend == "openai" and not self.is_own:
            yield "--chat_template and its like have no effect with --backend openai: the server has the template"
        if self.backend == "openai" and self._given_url is None:
            yield "--backend openai needs --base_url or $OPENAI_BASE_URL: the server, as http://127.0.0.1:8000/v1"
        if self.backend == "openai" and (url := self._given_url) is not None:
            try:
                checked_url(url)
            except UserError as problem:
                yield str(problem)
        if self.backend == "vllm" and importlib.util.find_spec("vllm") is None:
            yield f"--backend vllm needs vLLM: {contract.extra('vllm')}, or see docs/vllm.md for a CPU"

    @property
    def _given_url(self) -> str | None:
        return self.base_url or default_url()
