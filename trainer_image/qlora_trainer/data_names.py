"""Says by a file's name whether it holds data and how it is read; changes with the kinds of data file."""

from collections.abc import Collection

from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.core.paths import some_names

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DATA_ENDINGS = ".jsonl, .json or .csv, each also with .gz, .bz2, .xz or .zst behind it, or .parquet"
MAX_FILES = 10_000


def data_kind(name: str) -> str | None:
    """The ending that says how a file is read, without that of its compression; None if it is no data file."""
    if name.endswith(".parquet"):
        return ".parquet"
    plain = next((name.removesuffix(ending) for ending in COMPRESSIONS if name.endswith(ending)), name)
    return next((kind for kind in (".jsonl", ".json", ".csv") if plain.endswith(kind)), None)


def require_one_kind(names: Collection[str], inside: Collection[str], uri: str) -> None:
    """Raise StepFailure BAD_DATASET unless the names are of one kind of data file, and not too many.

    `inside`: all names there, for the message.
    """
    if not names:
        raise bad_dataset(f"{uri} has no data file; it has {some_names(inside)}; allowed are {DATA_ENDINGS}")
    kinds = sorted({data_kind(name) or "" for name in names})
    if len(kinds) > 1:
        raise bad_dataset(
            f"{uri} has files of several kinds, {' and '.join(kinds)}: name one file, or a folder with one kind; "
            f"it has {some_names(names)}"
        )
    if len(names) > MAX_FILES:
        raise bad_dataset(f"{uri} has {len(names)} data files, at most {MAX_FILES} are read: put them together")
