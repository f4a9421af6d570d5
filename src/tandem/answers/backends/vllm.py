"""Answers drawn by vLLM 0.30. A model and its adapters share one vLLM engine, on one GPU, on several, or on a CPU."""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tandem.answers.backends.base import Answer, Draw, encode, read_answer, weights_dtype
from tandem.answers.backends.options import GenerationOptions
from tandem.data.formats import Message, prompt_id
from tandem.devices import fix_segments
from tandem.errors import UserError, first_line
from tandem.model_folder import adapter_config
from tandem.models.configuration import base_of_adapter, read_config, revision_of_base
from tandem.models.ends import end_ids
from tandem.models.load import commit_of, load_tokenizer
from tandem.models.sampling import SamplingOptions, draw_seed
from tandem.options.model import ModelOptions, is_adapter

STOP_TIMEOUT = 5.0  # seconds

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM


class VllmBackend:
    """A `Backend` over vLLM's asynchronous engine: only that one spreads prompts over data-parallel copies by itself.

    Each prompt has a seed of its own, so that a draw does not depend on the other prompts or on a resume, except for
    rounding in batches of other sizes.
    """

    def __init__(self, models: Collection[str], options: GenerationOptions, sampling: SamplingOptions) -> None:
        self._adapters = [model for model in models if is_adapter(model)]
        self._options = options
        self._sampling = sampling
        self._loop = asyncio.new_event_loop()
        self._base: tuple[str, str | None] | None = None
        self._llm: AsyncLLM | None = None
        self._lora: LoRARequest | None = None
        self._tokenizer: Any = None
        self._ends: set[int] = set()

    def load(self, model: str) -> None:
        """See `Backend`. Nothing is loaded anew where the model and the one before it share their base."""
        from vllm.lora.request import LoRARequest

        self._tokenizer = load_tokenizer(ModelOptions(model_name_or_path=model), self._options)
        base, revision, self._lora = model, None, None
        if is_adapter(model):
            base, revision = base_of_adapter(model), revision_of_base(model)
            number = self._adapters.index(model) + 1  # vLLM's ids of adapters begin at 1
            self._lora = LoRARequest(f"adapter{number}", number, model)
        place = _place(base, revision)
        if place != self._base:
            self._stop()
            self._llm, self._base = self._start(base, revision), place
        self._ends = end_ids(_configured_ends(base, revision), self._tokenizer)

    def _start(self, base: str, revision: str | None) -> "AsyncLLM":
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        options, keywords = self._options, {}
        if options.tensor_parallel_size > 1:  # its processes share GPU memory: vLLM's issue 42609
            fix_segments()
        place = _place(base, revision)
        alike = [name for name in self._adapters if _place(base_of_adapter(name), revision_of_base(name)) == place]
        if ranks := [_rank(adapter) for adapter in alike]:
            keywords = {"enable_lora": True, "max_loras": len(ranks), "max_lora_rank": _allowed_rank(max(ranks))}
        if options.batch_size is not None:
            keywords["max_num_seqs"] = options.batch_size
        arguments = AsyncEngineArgs(
            model=base,
            revision=revision,
            dtype=weights_dtype(options),
            max_model_len=self._sampling.max_prompt_length + self._sampling.max_new_tokens,
            tensor_parallel_size=options.tensor_parallel_size,
            data_parallel_size=options.data_parallel_size,
            gpu_memory_utilization=options.gpu_memory_utilization,
            enforce_eager=options.enforce_eager,
            seed=self._sampling.seed,
            generation_config="vllm",  # not the model's own, whose top_k and such would change the distribution
            disable_log_stats=True,
            **keywords,
        )
        try:
            return AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{base}: vLLM cannot serve it: {first_line(error)}") from error

    def answers(self, prompts: Sequence[list[Message]], wanted: Collection[int]) -> Iterator[tuple[int, Answer]]:
        """See `Backend`."""
        for (index, _), answer in self.draws(prompts, 1, [(index, 0) for index in wanted]):
            yield index, answer

    def draws(
        self, prompts: Sequence[list[Message]], count: int, wanted: Collection[Draw]
    ) -> Iterator[tuple[Draw, Answer]]:
        """See `Backend`. Where all draws of a prompt are wanted, they are one request to vLLM."""
        missing: dict[int, list[int]] = {}
        for index, number in sorted(wanted):
            missing.setdefault(index, []).append(number)
        asks = [
            ask
            for index, numbers in missing.items()
            for ask in ([(index, 0, count)] if len(numbers) == count else [(index, one, 1) for one in numbers])
        ]
        stream = self._stream(prompts, asks)
        while (item := self._loop.run_until_complete(anext(stream, None))) is not None:
            yield item

    async def _stream(
        self, prompts: Sequence[list[Message]], asks: Sequence[tuple[int, int, int]]
    ) -> AsyncIterator[tuple[Draw, Answer]]:
        """Answers to `asks`: each is the index of a prompt, the number of its first draw, and how many draws."""
        encoded = encode([prompts[index] for index, _, _ in asks], self._tokenizer, self._sampling.max_prompt_length)
        asked = [
            asyncio.ensure_future(self._ask(index, first, count, tokens, prompts[index]))
            for (index, first, count), tokens in zip(asks, encoded, strict=True)
        ]
        try:
            for ready in asyncio.as_completed(asked):
                for item in await ready:
                    yield item
        finally:
            for task in asked:
                task.cancel()

    async def _ask(
        self, index: int, first: int, count: int, ids: list[int], messages: list[Message]
    ) -> list[tuple[Draw, Answer]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        assert self._llm is not None
        draw, key = self._sampling.sampling, prompt_id(messages)
        parameters = SamplingParams(
            n=count,
            max_tokens=draw.max_new_tokens,
            temperature=draw.temperature,
            top_p=draw.top_p,
            seed=draw_seed(self._sampling.seed, key, first),  # vLLM adds 0, 1, … to it for the n draws
            stop_token_ids=sorted(self._ends),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=ids)
        drawn: dict[int, Sequence[int]] = {}
        try:
            async for output in self._llm.generate(prompt, parameters, f"{key}-{first}", lora_request=self._lora):
                drawn |= {first + one.index: one.token_ids for one in output.outputs}
        except EngineDeadError:
            base = self._base[0] if self._base else "?"
            raise UserError(
                f"{base}: vLLM's engine has died, see above; answers so far are kept, the same command goes on"
            ) from None
        return [
            ((index, number), read_answer(drawn.get(number, ()), self._tokenizer, self._ends))
            for number in range(first, first + count)
        ]

    def _stop(self) -> None:
        if self._llm is None:
            return
        self._llm.shutdown()
        self._llm = None
        # vLLM's own tasks still wait for output, and would complain when the loop is closed
        if left := asyncio.all_tasks(self._loop):
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(left, timeout=STOP_TIMEOUT))

    def close(self) -> None:
        """See `Backend`."""
        self._stop()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


def _place(model: str, revision: str | None) -> tuple[str, str | None]:
    """What tells models apart: a folder's absolute path, or a Hub model's name and commit."""
    return (str(Path(model).resolve()), None) if Path(model).is_dir() else (model, commit_of(model, revision))


def _rank(adapter: str) -> int:
    """The rank of an adapter's LoRA.

    Raises:
        UserError: vLLM cannot serve the adapter: it is no LoRA, or has fully trained modules, DoRA or another adapter
            below it.
    """
    config = adapter_config(adapter)
    more = config.get("modules_to_save") or config.get("use_dora") or is_adapter(base_of_adapter(adapter))
    if config.get("peft_type") != "LORA" or more:
        raise UserError(f"{adapter}: vLLM takes plain LoRA on a model only; merge it first (scripts/merge_lora.py)")
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def _allowed_rank(rank: int) -> int:
    from vllm.config.lora import MaxLoRARanks

    allowed = [size for size in get_args(MaxLoRARanks) if size >= rank]
    if not allowed:
        raise UserError(f"a LoRA of rank {rank} is more than vLLM takes; merge it first (scripts/merge_lora.py)")
    return min(allowed)


def _configured_ends(base: str, revision: str | None) -> int | list[int] | None:
    from transformers import GenerationConfig

    try:
        configured: int | list[int] | None = GenerationConfig.from_pretrained(base, revision=revision).eos_token_id
    except OSError:  # the model has no generation_config.json
        configured = read_config(base, revision).eos_token_id
    return configured
