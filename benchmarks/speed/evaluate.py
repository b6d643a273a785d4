"""Evaluates adapters of every system on the same held-out rows in the same way, in a separate process.

python -m benchmarks.speed.evaluate MODEL HELD_OUT < SNAPSHOTS, one object of `system` and `snapshots` (paths) per line
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy

from benchmarks.speed.hugging_face import load_base, lora_config, tokenized


def main() -> None:
    """Print the loss of the base (`base`) and of each snapshot as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("held_out", type=Path)
    options = parser.parse_args()
    rows = tokenized(options.model, options.held_out)
    model = get_peft_model(load_base(options.model), lora_config(), autocast_adapter_dtype=False).eval()
    losses = {"base": evaluation_loss(model, rows)}
    for line in sys.stdin:
        asked = json.loads(line)
        for snapshot in asked["snapshots"]:
            _put_in(model, Path(snapshot), in_name_order=asked["system"] == "ours")
            losses[snapshot] = evaluation_loss(model, rows)
    print(json.dumps(losses))


def evaluation_loss(model: Any, rows: list[list[int]]) -> float:
    """Return mean negative log-likelihood of all but each row's first token."""
    summed, tokens = 0.0, 0
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for row in rows:
            ids = torch.tensor([row])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            summed += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += len(row) - 1
    return summed / tokens


def _put_in(model: Any, snapshot: Path, *, in_name_order: bool) -> None:
    """Copy a snapshot into the parameters, in the order of its optimizer."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if in_name_order:
        named.sort(key=lambda pair: pair[0])
    saved = torch.load(snapshot, weights_only=True)
    with torch.no_grad():
        for (_, parameter), value in zip(named, saved, strict=True):
            parameter.copy_(value)


if __name__ == "__main__":
    main()
