"""Chooses the files of a hub data set that are its configuration and split.

The layouts are those of https://huggingface.co/docs/hub/datasets-data-files-configuration: `configs` in the data set
card (README.md), else file and folder names that contain the split.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import metadata_load
from yaml import YAMLError

from qlora_api.sources import HubSource, parse_source
from qlora_api.spec.dataset import DatasetSpec, HeldOutSource, MixSource
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.core.paths import some_names
from qlora_trainer.data.read.reading import data_kind, require_one_kind

_SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_MOST_STARS = 8
_GLOB = re.compile(r"(\*\*/|\*\*|\*|\?)")
# Exceptions of the YAML library for a value that is not of its tag's type.
_UNUSABLE_VALUES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Wanted:
    """Which part of a hub data set a job asks for."""

    splits: tuple[str, ...]
    """In order of preference: the first that exists is used."""
    config: str | None = None
    revision: str | None = None
    """Branch, tag or commit, or None for main."""
    field: str = "spec.dataset"


TRAINING = Wanted(("train",))
EVALUATION = Wanted(("validation", "test"))


def training_part(source: MixSource, field: str = TRAINING.field) -> Wanted:
    """The part of a source to train on. Its settings are in the job's `field`."""
    return Wanted((source.split,) if source.split else TRAINING.splits, source.config, source.revision, field)


def evaluation_part(spec: DatasetSpec, own: HeldOutSource, field: str) -> Wanted:
    """The part to evaluate with, which the job's `field` names. It inherits settings from the same repository."""
    repository = _repository(own.source or "")
    same = (source for source in spec.training_sources.values() if _repository(source.source) == repository is not None)
    inherited = next(same, own)
    return Wanted(
        splits=(own.split,) if own.split else EVALUATION.splits,
        config=own.config or inherited.config,
        revision=own.revision or inherited.revision,
        field=field,
    )


def _repository(uri: str) -> str | None:
    source = parse_source(uri)
    return source.repository if isinstance(source, HubSource) else None


def read_dataset_card(path: Path, uri: str) -> Mapping[str, object]:
    """The YAML at the top of a data set card. Raises StepFailure BAD_DATASET."""
    try:
        return metadata_load(path) or {}
    except (YAMLError, RecursionError, *_UNUSABLE_VALUES) as error:
        raise bad_dataset(f"{uri}/README.md: the text between its --- lines is not YAML ({error})"[:500]) from error


def choose_data_files(
    names: Collection[str], card: Mapping[str, object] | None, path: str, wanted: Wanted, uri: str
) -> list[str]:
    """The data files, ascending, of the file or folder at `path`, or else of the repository's configuration and split.

    All files, if no name contains a split. Raises StepFailure BAD_DATASET, listing what there is.
    """
    candidates = sorted(name for name in names if data_kind(name) is not None)
    if path in candidates:
        return [path]
    if path:
        inside = [name for name in candidates if name.rpartition("/")[0] == path]
        if not inside:
            raise bad_dataset(f"{uri} has no data file or folder {path!r}; it has {some_names(candidates)}")
        chosen = _of_split(inside, wanted, f"{uri}/{path}", start=len(path))
    else:
        configs = _configs(card or {}, uri)
        if configs:
            chosen = _of_config(candidates, configs, wanted, uri)
        else:
            chosen = _of_split(_below(candidates, wanted, uri), wanted, uri)
    require_one_kind(chosen, candidates, uri)
    return chosen


def _below(names: list[str], wanted: Wanted, uri: str) -> list[str]:
    """The files in a folder that has the configuration's name."""
    if wanted.config is None:
        return names
    below = [name for name in names if wanted.config in name.split("/")[:-1]]
    if not below:
        raise bad_dataset(
            f"{uri} has no configuration {wanted.config!r} ({wanted.field}.config): neither its README.md nor a folder "
            f"has that name; it has {some_names(names)}"
        )
    return below


def _of_split(names: list[str], wanted: Wanted, uri: str, start: int = 0) -> list[str]:
    """The files whose name, from `start`, has a name of the split as a separate word."""
    for split in wanted.splits:
        found = [name for name in names if _names_split(name[start:], split)]
        if found:
            return found
    unnamed = not any(_names_split(name[start:], split) for name in names for split in _SPLIT_NAMES)
    if unnamed and wanted.splits in (TRAINING.splits, EVALUATION.splits):
        return names
    raise bad_dataset(
        f"{uri} has no data file of the split {' or '.join(map(repr, wanted.splits))}: set {wanted.field}.split, or "
        f"name the file, as in {uri}/{names[0] if names and not start else 'PATH'}; it has {some_names(names)}"
    )


def _names_split(name: str, split: str) -> bool:
    words = "|".join(map(re.escape, _SPLIT_NAMES.get(split, (split,))))
    return re.search(rf"(^|[/._-])({words})([/._-]|[0-9]|$)", name) is not None


def _configs(card: Mapping[str, object], uri: str) -> dict[str, Mapping[str, object]]:
    """The configurations whose files the card names, by name."""
    entries = card.get("configs") or []
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("config_name"), str) for entry in entries
    ):
        raise bad_dataset(f"{uri}/README.md: configs is not a list of entries with config_name: name a file instead")
    return {entry["config_name"]: entry for entry in entries if entry.get("data_files") or entry.get("data_dir")}


def _of_config(names: list[str], configs: Mapping[str, Mapping[str, object]], wanted: Wanted, uri: str) -> list[str]:
    entry = _chosen_config(configs, wanted, uri)
    files = entry.get("data_files")
    if files is None:
        folder = str(entry["data_dir"]).strip("/")
        return _of_split([name for name in names if name.startswith(f"{folder}/")], wanted, f"{uri}/{folder}")
    patterns = _patterns(files, uri)
    for split in wanted.splits:
        if split in patterns:
            globs = [_GLOB.split(pattern.removeprefix("./")) for pattern in patterns[split]]
            found = [name for name in names if any(_matches(name, glob) for glob in globs)]
            if not found:
                raise bad_dataset(
                    f"{uri}: its README.md names {', '.join(patterns[split])[:200]} for the split {split!r}, but no "
                    f"data file matches; it has {some_names(names)}"
                )
            return found
    raise bad_dataset(
        f"{uri} has no split {' or '.join(map(repr, wanted.splits))} in configuration {entry['config_name']!r}; it has "
        f"{some_names(patterns)}: set {wanted.field}.split, or name a file"
    )


def _chosen_config(configs: Mapping[str, Mapping[str, object]], wanted: Wanted, uri: str) -> Mapping[str, object]:
    if wanted.config is not None:
        if wanted.config not in configs:
            raise bad_dataset(
                f"{uri} has no configuration {wanted.config!r} ({wanted.field}.config); it has {some_names(configs)}"
            )
        return configs[wanted.config]
    marked = [entry for entry in configs.values() if entry.get("default") is True]
    choices = marked or [entry for name, entry in configs.items() if name == "default" or len(configs) == 1]
    if choices:
        return choices[0]
    raise bad_dataset(
        f"{uri} has several configurations, {some_names(configs)}: set {wanted.field}.config to one of them"
    )


def _patterns(files: object, uri: str) -> dict[str, list[str]]:
    """File patterns by split, from any of the forms of `data_files`."""
    if isinstance(files, str):
        files = [files]
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    patterns: dict[str, list[str]] = {}
    for entry in files if isinstance(files, list) else [None]:
        split, path = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        paths: Sequence[object] = path if isinstance(path, list) else [path]
        if not isinstance(split, str) or not all(
            isinstance(one, str) and one.count("*") <= _MOST_STARS for one in paths
        ):
            raise bad_dataset(
                f"{uri}/README.md: data_files has an entry without split and path, or a path with more than "
                f"{_MOST_STARS} stars: name a file instead"
            )
        patterns.setdefault(split, []).extend(str(one) for one in paths)
    return patterns


def _matches(name: str, glob: Sequence[str]) -> bool:
    """Whether the name matches the parts of a glob pattern: ** matches across folders, * and ? do not.

    Each part moves all positions, in time linear in the name: a regular expression would try all combinations.
    """
    positions = {0}
    for part in glob:
        if part == "**/":
            positions |= {end for end in range(min(positions) + 1, len(name) + 1) if name[end - 1] == "/"}
        elif part == "**":
            positions = set(range(min(positions), len(name) + 1))
        elif part == "*":
            positions = _in_folders(name, positions)
        elif part == "?":
            positions = {start + 1 for start in positions if name[start : start + 1] not in ("", "/")}
        else:
            positions = {start + len(part) for start in positions if name.startswith(part, start)}
        if not positions:
            return False
    return len(name) in positions


def _in_folders(name: str, positions: set[int]) -> set[int]:
    """The positions, and those after each up to the next /."""
    reached: set[int] = set()
    past = 0
    for start in sorted(positions):
        if start >= past:
            slash = name.find("/", start)
            past = (len(name) if slash < 0 else slash) + 1
            reached.update(range(start, past))
    return reached
