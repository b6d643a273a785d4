"""Reads from a text decoder's configuration for how many tokens its positions hold, and from where they change."""

from collections.abc import Iterator
from typing import Any


def longest_row(config: Any) -> int | None:
    """Tokens of the longest row that the model has positions for; None if the configuration does not say.

    `max_position_embeddings`, or more where the rotation is stretched: `factor` times the original length with YaRN
    (arXiv 2309.00071), `factor` times the length with linear interpolation (arXiv 2306.15595).
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    stretched = [positions]
    for rotation in _rotations(config):
        factor = rotation.get("factor") or 1.0
        if rotation["rope_type"] == "yarn":
            stretched.append(int(factor * (rotation.get("original_max_position_embeddings") or positions)))
        elif rotation["rope_type"] == "linear":
            stretched.append(int(factor * positions))
    return max(stretched)


def same_rotation_up_to(config: Any) -> int | None:
    """Tokens up to which a row is rotated by the same angles whatever else is in its sequence; None if always.

    LongRoPE (arXiv 2402.13753), as transformers computes it, takes its long factors for a whole sequence as soon as
    one row in it is longer than the original length.
    """
    lengths = [
        int(rotation["original_max_position_embeddings"])
        for rotation in _rotations(config)
        if rotation["rope_type"] == "longrope"
    ]
    return min(lengths, default=None)


def _rotations(config: Any) -> Iterator[dict[str, Any]]:
    """The rotary settings, one for each kind of layer where kinds differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for rotation in (parameters, *parameters.values()):
        if isinstance(rotation, dict) and "rope_type" in rotation:
            yield rotation
