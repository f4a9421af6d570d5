"""The files of a model's weights: what a folder must not hold."""

from pathlib import Path

from tandem.errors import UserError
from tandem.model_folder import INDEX, indexed_files

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")


def check_weights(folder: Path) -> None:
    """Refuse what a model's folder must not hold; a Hub name is no folder, and passes.

    Raises:
        UserError: its weights are a pickle, or its index names files anywhere else.
    """
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(
            file.name for pattern in _PICKLES for file in folder.glob(pattern) if file.name not in _NO_WEIGHTS
        )
        if pickles:
            raise pickled(str(folder), pickles[0])
    for name in sorted(indexed_files(folder) or ()):
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise UserError(f"{folder / INDEX}: names {name!r}, which is no safetensors file beside it")


def pickled(folder: str, name: str) -> UserError:
    """What is said of weights that are a pickle."""
    return UserError(
        f"{folder}: {name} is a pickle, which can run code when it is loaded; "
        "convert it to safetensors first: SECURITY.md says how"
    )
