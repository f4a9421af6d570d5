"""How answers are drawn from a model."""

from dataclasses import dataclass
from typing import Any

from tandem.errors import UserError
from tandem.options.parsing import opt
from tandem.runs import sha256_json


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy decoding."""

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.95

    def keywords(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


@dataclass
class SamplingOptions:
    """Sampling."""

    max_new_tokens: int = opt(128, "longest answer in tokens")
    temperature: float = opt(0.7, "softmax temperature")
    top_p: float = opt(0.95, "nucleus: draw from the most likely tokens that hold this probability")
    greedy: bool = opt(False, "always take the most likely token")
    seed: int = opt(42, "seed of the draws")
    max_prompts: int | None = opt(None, "answer the first N distinct held-out prompts")
    max_prompt_length: int = opt(512, "longest prompt in tokens; its oldest turns are dropped first")

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"--temperature must be above 0, not {self.temperature}; use --greedy for none")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        for name in ("max_new_tokens", "max_prompts", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")

    @property
    def sampling(self) -> Sampling:
        """The draw these options ask for."""
        if self.greedy:
            return Sampling(self.max_new_tokens, temperature=0.0, top_p=1.0)
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)


def prompt_seed(seed: int, prompt_id: str) -> int:
    """31 bits: the seed of one prompt's draw, so that it depends neither on other prompts nor on their order."""
    return int(sha256_json([seed, prompt_id])[:8], 16) >> 1
