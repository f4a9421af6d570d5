"""The engine that the options name."""

import contextlib
from collections.abc import Collection, Iterator

from tandem.answers.backends.base import Engine
from tandem.answers.backends.options import GenerationOptions
from tandem.devices import has_mps
from tandem.errors import UserError
from tandem.models.load import check_model
from tandem.models.sampling import SamplingOptions


@contextlib.contextmanager
def open_engine(models: Collection[str], options: GenerationOptions, sampling: SamplingOptions) -> Iterator[Engine]:
    """The engine of `options`, which will be asked to load some of `models`.

    Raises:
        UserError: one of the models cannot be loaded here; or vLLM where there is an Apple GPU, which it does not know.
    """
    engine: Engine
    if options.engine == "vllm" and has_mps():
        raise UserError("--engine vllm does not run on MPS: use --engine transformers, or a server with openai")
    if options.engine != "openai":
        for model in models:
            check_model(model)
    if options.engine == "vllm":
        from tandem.answers.backends.vllm import VllmEngine

        engine = VllmEngine(models, options, sampling)
    elif options.engine == "openai":
        from tandem.answers.backends.openai import OpenAIEngine

        engine = OpenAIEngine(options, sampling)
    else:
        from tandem.answers.backends.transformers import TransformersEngine

        engine = TransformersEngine(options, sampling)
    try:
        yield engine
    finally:
        engine.close()
