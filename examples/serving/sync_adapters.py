"""Keeps the folder of vLLM's filesystem resolver in step with the adapters that jobs have announced.

The ConfigMap of `spec.output.announce` is mounted as a folder, with one file for each adapter. One on a claim is linked
from where that is mounted, one of the Hugging Face Hub is downloaded; both only if the file is the one that the job has
trained. Adapters of another base are left out, and those whose entry is gone are removed. A vLLM that has loaded an
adapter keeps answering with it until it is restarted, whatever happens to the folder.

    python sync_adapters.py ENTRIES ADAPTERS --base ORG/NAME --claim NAME=FOLDER --every 15
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
"""Of an adapter, which becomes a folder's: that of a job."""
TENSORS = "adapter_model.safetensors"


@dataclass
class Seen:
    """Results of earlier rounds, so that each file is read and downloaded once."""

    equal: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """By name: the digest that the file has, and its size and time when it was compared."""
    wrong: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: the entry that differs from the file at its address."""


def sync(entries: Path, adapters: Path, base: str, claims: dict[str, Path], seen: Seen) -> list[str]:
    """Sync once. Returns the problems of entries, which block no other."""
    wanted, problems = {}, []
    for path in sorted(entries.glob("*.json")):
        try:
            entry = json.loads(path.read_text())
            if entry["base"] == base and NAME.fullmatch(entry["name"]):
                wanted[entry["name"]] = entry
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{path.name} is no entry: {error!r}")
    for folder in adapters.iterdir():
        if NAME.fullmatch(folder.name) and folder.name not in wanted:
            remove(folder)
    for name, entry in wanted.items():
        try:
            provide(adapters / name, entry, claims, seen)
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
    return problems


def provide(folder: Path, entry: dict[str, Any], claims: dict[str, Path], seen: Seen) -> None:
    """Put the entry's adapter at `folder`. Raises ValueError or OSError if wrong."""
    if is_there(folder, entry["digest"], seen) or seen.wrong.get(folder.name) == entry:
        return
    scheme, _, rest = str(entry["uri"]).partition("://")
    partial = folder.with_name(f".{folder.name}")
    remove(partial)
    if scheme == "pvc":
        claim, _, path = rest.partition("/")
        if claim not in claims:
            raise ValueError(f"the claim {claim} is not mounted: name it with --claim")
        source = (claims[claim] / path).resolve()
        if not source.is_relative_to(claims[claim].resolve()):
            raise ValueError(f"{entry['uri']} leads out of the claim")
        partial.symlink_to(source)
    elif scheme == "hf":
        from huggingface_hub import snapshot_download

        repository, _, revision = rest.partition("@")
        snapshot_download(repository, revision=revision or None, local_dir=partial)
    else:
        raise ValueError(f"{entry['uri']}: only pvc:// and hf:// are synced")
    found = digest(partial)
    if found != entry["digest"]:
        remove(partial)
        seen.wrong[folder.name] = entry
        raise ValueError(f"adapter_model.safetensors has {found}, announced was {entry['digest']}")
    remove(folder)
    partial.rename(folder)


def is_there(folder: Path, announced: str, seen: Seen) -> bool:
    """Whether the folder has the adapter of that digest, read again if changed."""
    try:
        stat = (folder / TENSORS).stat()
    except FileNotFoundError:
        return False
    now = (announced, stat.st_size, stat.st_mtime_ns)
    if seen.equal.get(folder.name) != now:
        if digest(folder) != announced:
            return False
        seen.equal[folder.name] = now
    return True


def digest(folder: Path) -> str:
    """That of the adapter's tensors, as an entry has it."""
    with (folder / TENSORS).open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def remove(path: Path) -> None:
    """Remove the link or the folder, if it exists."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def main() -> int:
    """Sync once, or again and again; returns the exit code."""
    parser = argparse.ArgumentParser(description="Sync vLLM's folder of adapters with the announcements of jobs.")
    parser.add_argument("entries", type=Path, help="the mount point of the ConfigMap")
    parser.add_argument("adapters", type=Path, help="VLLM_LORA_RESOLVER_CACHE_DIR")
    parser.add_argument("--base", required=True, help="the argument of `vllm serve`")
    parser.add_argument("--claim", action="append", default=[], metavar="NAME=FOLDER", help="where a claim is mounted")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="sync again and again")
    options = parser.parse_args()
    claims = {name: Path(folder) for name, _, folder in (each.partition("=") for each in options.claim)}
    seen = Seen()
    while True:
        problems = sync(options.entries, options.adapters, options.base, claims, seen)
        for problem in problems:
            print(problem, file=sys.stderr, flush=True)
        if options.every is None:
            return 1 if problems else 0
        time.sleep(options.every)


if __name__ == "__main__":
    sys.exit(main())
