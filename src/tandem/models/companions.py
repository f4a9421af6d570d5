"""The files of a model that are neither weights nor configuration nor tokenizer: a processor's settings, a licence.

transformers saves none of them with a model that was loaded for text, and a server may refuse the model without them.
"""

import shutil
from pathlib import Path

from tandem.errors import first_line
from tandem.log import logger
from tandem.runs import is_of_a_run

_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".ot", ".tflite",
    ".pkl",
}  # fmt: skip
# transformers saves these with the trained model, which may have another tokenizer than the base
_SAVED = {
    "config.json", "generation_config.json", "adapter_config.json", "added_tokens.json", "special_tokens_map.json",
    "merges.txt", "README.md",
}  # fmt: skip
_OF_TOKENIZERS = ("tokenizer", "vocab", "spiece", "sentencepiece", "chat_template", "tekken", "tiktoken")
_OF_THE_HUB = ("*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_LARGEST = 32 << 20  # bytes; a larger file must hold weights, whatever its name


def carry(base: str, revision: str | None, folder: Path) -> list[str]:
    """Copy what a model made of `base` should have beside its weights into `folder`, where it is not there already.

    Args:
        base: a model's folder, or its name on the Hub.
        revision: of a Hub model.

    Returns:
        The names of the files copied. Files that cannot be fetched are named in a warning.
    """
    source = Path(base) if Path(base).is_dir() else _fetched(base, revision)
    carried = []
    for file in sorted(source.iterdir()) if source else ():
        if _belongs(file) and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
            carried.append(file.name)
    if carried:
        logger.info("carried over from %s: %s", base, ", ".join(carried))
    return carried


def _belongs(file: Path) -> bool:
    """Whether a file of a model's folder is one that transformers does not save; its code never is."""
    name = file.name
    return (
        file.is_file()
        and not name.startswith(".")
        and not name.startswith(_OF_TOKENIZERS)
        and not name.endswith((".index.json", ".model", ".py"))
        and file.suffix not in _WEIGHTS
        and name not in _SAVED
        and not is_of_a_run(file)
        and file.stat().st_size <= _LARGEST
    )


def _fetched(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_OF_THE_HUB)))
    except Exception as error:  # the network's, the Hub's and the cache's own, of many kinds
        logger.warning(
            "%s: its processor's settings and licence, if any, were not fetched: %s", name, first_line(error)
        )
        return None
