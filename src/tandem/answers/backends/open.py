"""Opens the backend that the options name."""

import contextlib
from collections.abc import Collection, Iterator

from tandem.answers.backends.base import Backend
from tandem.answers.backends.options import BACKENDS, GenerationOptions
from tandem.devices import has_mps
from tandem.errors import UserError
from tandem.models.load import check_model
from tandem.models.sampling import SamplingOptions
from tandem.objects import load_object


@contextlib.contextmanager
def open_backend(models: Collection[str], options: GenerationOptions, sampling: SamplingOptions) -> Iterator[Backend]:
    """The backend of `options`, closed after the block.

    Args:
        models: all models that it may be asked to load.

    Raises:
        UserError: one of the models cannot be loaded here, or vLLM is asked for on an Apple GPU, which it cannot use.
    """
    backend = _made(models, options, sampling)
    try:
        yield backend
    finally:
        backend.close()


def _made(models: Collection[str], options: GenerationOptions, sampling: SamplingOptions) -> Backend:
    if options.backend not in BACKENDS:
        own: Backend = load_object(options.backend, "--backend")(options, sampling)
        return own
    if options.backend == "openai":
        from tandem.answers.backends.openai import OpenAIBackend

        return OpenAIBackend(options, sampling)
    if options.backend == "vllm" and has_mps():
        raise UserError("--backend vllm does not run on MPS: use --backend transformers, or a server with openai")
    for model in models:
        check_model(model)
    if options.backend == "vllm":
        from tandem.answers.backends.vllm import VllmBackend

        return VllmBackend(models, options, sampling)
    from tandem.answers.backends.transformers import TransformersBackend

    return TransformersBackend(options, sampling)
