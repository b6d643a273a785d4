"""Finds the address that a user seems to mean, for messages about a wrong one."""

import os.path
import re

_HUB_PAGE = re.compile(r"(https?://)?(www[.])?(huggingface[.]co|hf[.]co)/(datasets/)?(?P<repository>[^/\s]+/[^/\s?#]+)")
_REPOSITORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_UNTAGGED = re.compile(r"oci://[^@\s]+/[^:@/\s]+")
_PATH = re.compile(r"[./~\\]|[A-Za-z]:\\|.*[.](jsonl|json|csv|parquet|safetensors)$")
_LOCAL = (
    "for a path on this machine, write pvc://CLAIM/PATH, and give the folder of CLAIM with --volume CLAIM=DIR to plan, "
    "data and run"
)


def advice_on_address(found: str) -> str:
    """The remedy for a value that is no address, or an empty string."""
    if page := _HUB_PAGE.match(found):
        return f"did you mean hf://{page['repository']}?"
    if _UNTAGGED.fullmatch(found):
        return f":TAG is missing, as in {found}:v1"
    if "://" in found:
        return ""
    if _PATH.match(found) or os.path.exists(found):
        return _LOCAL
    return f"did you mean hf://{found}?" if _REPOSITORY.fullmatch(found) else ""
