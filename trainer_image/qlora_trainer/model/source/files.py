"""Gets the files of a base model into one folder, complete and safe to load."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qlora_trainer.core.failures import model_unavailable, unsafe_artifact
from qlora_trainer.core.file_names import PROCESSOR_FILES, TOKENIZER_FILES
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.core.paths import some_names

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_VOCABULARIES = frozenset({"tokenizer.json", "tokenizer.model", "vocab.json"})
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


OnBytes = Callable[[int, int], None]
"""Called with the bytes done and the total."""


def choose_settings(names: Collection[str], source: str) -> list[str]:
    """The names of the small files to use, config.json first, out of the `names` in the model's folder.

    Code and pickles are never chosen. Raises StepFailure if the model cannot be used.
    """
    if WEIGHTS not in names and WEIGHTS_INDEX not in names:
        pickles = sorted(name for name in names if name.endswith(_PICKLES))
        if pickles:
            raise unsafe_artifact(
                f"{source} has its weights only as {some_names(pickles)}, which can run code when it is loaded: "
                "use a revision or a conversion with safetensors"
            )
        raise model_unavailable(f"{source} has neither {WEIGHTS} nor {WEIGHTS_INDEX}; it has {some_names(names)}")
    if CONFIG not in names:
        raise model_unavailable(f"{source} has no {CONFIG}; it has {some_names(names)}")
    if not _VOCABULARIES & set(names):
        raise model_unavailable(
            f"{source} has no tokenizer ({', '.join(sorted(_VOCABULARIES))}); it has {some_names(names)}"
        )
    wanted = {GENERATION_CONFIG, *TOKENIZER_FILES, *PROCESSOR_FILES}
    # As transformers does: a single file takes precedence over an index.
    if WEIGHTS not in names:
        wanted.add(WEIGHTS_INDEX)
    return [CONFIG, *sorted(wanted & set(names))]


def weight_files(index: bytes | None, names: Collection[str], source: str) -> list[str]:
    """The names of the weights' files: those in the index's `weight_map`, or the single file if there is no index.

    Raises StepFailure: UNSAFE_ARTIFACT for a name that is not a plain *.safetensors name, MODEL_UNAVAILABLE for a
    broken index or a missing file.
    """
    if index is None:
        return [WEIGHTS]
    try:
        entries = set(json.loads(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise model_unavailable(f"{source}: {WEIGHTS_INDEX} is not an object with a weight_map") from error
    for entry in entries:
        if not (isinstance(entry, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors", entry)):
            raise unsafe_artifact(
                f"{source}: {WEIGHTS_INDEX} names {str(entry)[:80]!r}; allowed are plain names of *.safetensors files"
            )
    missing = sorted(entries - set(names))
    if missing or not entries:
        raise model_unavailable(
            f"{source} is incomplete: {WEIGHTS_INDEX} names {some_names(missing)}, which is missing"
        )
    return sorted(entries)


def reject_code(folder: Path) -> None:
    """Raise StepFailure UNSAFE_ARTIFACT if the model's tokenizer has Python code."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise model_unavailable(f"the model's {path.name} is not JSON ({error})") from error
    if isinstance(settings, dict) and settings.get("auto_map"):
        raise unsafe_artifact(
            f"the model's {path.name} has auto_map: its tokenizer brings its own Python code, which is never run "
            "here; use a model without it"
        )


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each of the tokenizer's files in the model's folder, by name."""
    return {name: file_sha256(folder / name) for name in sorted(TOKENIZER_FILES) if (folder / name).is_file()}


def tokenizer_and_processor(folder: Path) -> dict[str, Path]:
    """Each file of the tokenizer and of the processor in the model's folder, by name."""
    return {name: folder / name for name in sorted(TOKENIZER_FILES | PROCESSOR_FILES) if (folder / name).is_file()}


def file_digests(folder: Path, names: Iterable[str], on_bytes: OnBytes) -> dict[str, str]:
    """SHA-256 of each file's content, by its name."""
    names = sorted(names)
    sizes = {name: (folder / name).stat().st_size for name in names}
    total, finished, digests = sum(sizes.values()), 0, {}
    for name in names:
        before = finished
        digests[name] = file_sha256(folder / name, lambda done, before=before: on_bytes(before + done, total))  # type: ignore[misc]
        finished += sizes[name]
    return digests


def content_revision(digests: Mapping[str, str]) -> str:
    """sha256: and the SHA-256 over the lines `<sha256>  <name>`, sorted by name."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return f"sha256:{sha256(lines.encode()).hexdigest()}"


def require_whole(path: Path, name: str) -> None:
    """Raise StepFailure MODEL_UNAVAILABLE if a safetensors file is truncated."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise model_unavailable(f"{name} is not a whole safetensors file ({error}): copy it again") from error
