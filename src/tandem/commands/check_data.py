"""Look at preference pairs before training on them."""

from pathlib import Path

from tandem.data.balance import Balance
from tandem.data.options import CheckOptions, DataOptions
from tandem.data.sources import load_splits
from tandem.options.model import ModelOptions, TextOptions, check_folder, is_adapter
from tandem.options.parsing import parse, save


def main(argv: list[str]) -> None:
    options, text, data = parse(
        argv, (CheckOptions, TextOptions, DataOptions), prog="check_data.py", description=__doc__
    )
    if (name := options.tokenizer_name_or_path) and not is_adapter(name):
        check_folder(name, "tokenizer_config.json")
    skipped: list[str] = []
    balances: list[Balance] = []
    train, held_out = load_splits(data, skipped, balances)
    from tandem.data.check import run_check  # its libraries take a second to import

    tokenizer = None
    if options.tokenizer_name_or_path:
        from tandem.models.load import load_tokenizer

        tokenizer = load_tokenizer(ModelOptions(model_name_or_path=options.tokenizer_name_or_path), options)
    splits = {"train": train, **({"held-out": held_out} if held_out else {})}
    run_check(options, text, splits, skipped, tokenizer, balances)
    if options.report:
        save(Path(options.report).with_suffix(".yaml"), options, text, data)
