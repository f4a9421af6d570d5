"""The engine that the options name."""

import contextlib
from collections.abc import Collection, Iterator

from tandem.generation.engine import Engine
from tandem.generation.options import GenerationOptions
from tandem.sampling import SamplingOptions


@contextlib.contextmanager
def open_engine(models: Collection[str], options: GenerationOptions, sampling: SamplingOptions) -> Iterator[Engine]:
    """The engine of `options`, which will be asked to load some of `models`."""
    engine: Engine
    if options.engine == "vllm":
        from tandem.generation.vllm import VllmEngine

        engine = VllmEngine(models, options, sampling)
    elif options.engine == "openai":
        from tandem.generation.openai import OpenAIEngine

        engine = OpenAIEngine(options, sampling)
    else:
        from tandem.generation.transformers import TransformersEngine

        engine = TransformersEngine(options, sampling)
    try:
        yield engine
    finally:
        engine.close()
