"""How answers are drawn from a model."""

from dataclasses import dataclass

from tandem.options.fields import opt
from tandem.options.rules import Options
from tandem.runs import sha256_json


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy decoding."""

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.95


@dataclass
class SamplingOptions(Options):
    """Sampling."""

    max_new_tokens: int = opt(128, "longest answer in tokens", low=1)
    temperature: float = opt(0.7, "softmax temperature", above=0, hint="use --greedy for none")
    top_p: float = opt(0.95, "nucleus: draw from the most likely tokens that hold this probability", above=0, high=1)
    greedy: bool = opt(False, "always take the most likely token")
    seed: int = opt(42, "seed of the draws")
    max_prompts: int | None = opt(None, "answer the first N distinct prompts", low=1)
    max_prompt_length: int = opt(512, "longest prompt in tokens; its oldest turns are dropped first", low=1)

    @property
    def sampling(self) -> Sampling:
        """The draw these options ask for."""
        if self.greedy:
            return Sampling(self.max_new_tokens, temperature=0.0, top_p=1.0)
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)


def prompt_seed(seed: int, prompt_id: str) -> int:
    """31 bits: the seed of one prompt's draw, so that it depends neither on other prompts nor on their order."""
    return int(sha256_json([seed, prompt_id])[:8], 16) >> 1


def draw_seed(seed: int, prompt_id: str, number: int) -> int:
    """The seed of one of a prompt's draws, counted from 0. vLLM would give all n draws of a request the same seed."""
    return prompt_seed(seed, prompt_id) + number
