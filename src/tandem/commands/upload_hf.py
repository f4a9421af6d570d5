"""Push a trained model to the Hugging Face Hub, with a model card that carries its numbers."""

from tandem.options.parsing import parse
from tandem.report.upload import UploadOptions, upload


def main(argv: list[str]) -> None:
    (options,) = parse(argv, (UploadOptions,), prog="upload_hf.py", description=__doc__)
    print(upload(options))
