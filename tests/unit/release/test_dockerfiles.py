"""What a release reads in a Dockerfile: the pinned base, and what each layer and each removal is for."""

import re

import pytest

from release import dockerfiles
from release.errors import ReleaseError
from release.project import DOCKERFILES, ROOT

TRAINER = (ROOT / DOCKERFILES["qlora-trainer"]).read_text()
STAGE = """\
FROM base AS tools
RUN nobody asks what this is for
FROM base
# The user.
COPY --from=tools /etc/passwd /etc/
# Packages,
# and their bytecode.
COPY list /
RUN install \\
    # No compiler.
 && rm -r include \\
 && rm *.a \\
    # Nobody serves.
 && rm server
USER 10001
"""


def test_each_layer_of_the_last_stage_has_a_purpose_and_each_removal_a_reason() -> None:
    user, packages = dockerfiles.layers(STAGE)
    assert (user.purpose, len(user.instructions), user.removals) == ("The user.", 1, ())
    assert (packages.purpose, len(packages.instructions)) == ("Packages, and their bytecode.", 2)
    assert [(removal.command, removal.reason) for removal in packages.removals] == [
        ("rm -r include", "No compiler."),
        ("rm *.a", "No compiler."),
        ("rm server", "Nobody serves."),
    ]


@pytest.mark.parametrize(
    ("gone", "complaint"),
    [
        ("# The user.\n", "no comment says what this layer is for: COPY --from=tools"),
        ("    # No compiler.\n", "no comment says why nothing misses this: rm -r include"),
    ],
)
def test_a_layer_or_a_removal_without_a_comment_is_rejected(gone: str, complaint: str) -> None:
    with pytest.raises(ReleaseError, match=re.escape(complaint)):
        dockerfiles.layers(STAGE.replace(gone, ""))


def test_what_is_removed_after_apt_needs_no_reason() -> None:
    assert (
        dockerfiles.layers("FROM base\n# Fonts.\nRUN apt-get install fonts \\\n && rm -r /var/cache/*\n")[0].removals
        == ()
    )


@pytest.mark.parametrize(
    "base", ["python:3.11", "docker.io/library/python:3.11", "docker.io/library/python@sha256:" + "0" * 64, ""]
)
def test_a_base_that_somebody_could_replace_is_rejected(base: str) -> None:
    with pytest.raises(ReleaseError, match="expected one REGISTRY/NAME:TAG@sha256:DIGEST"):
        dockerfiles.base_image(f"ARG BASE_IMAGE={base}\nFROM $BASE_IMAGE\n")


def test_a_layer_does_not_depend_on_the_name_of_the_base() -> None:
    """An argument that is declared before them is part of what later commands are cached by."""
    for path in DOCKERFILES.values():
        stage = (ROOT / path).read_text().rpartition("\nFROM ")[2]
        before, declared, _ = stage.partition("\nARG BASE_IMAGE")
        assert declared
        assert "LABEL" not in before
        assert "\nRUN" not in stage.partition("\nARG BASE_IMAGE")[2]


def test_the_list_of_packages_says_why_some_are_left_out() -> None:
    left_out = re.findall(r"--no-emit-package (\S+)", TRAINER)
    assert left_out
    assert all(f"{name}" in dockerfiles.left_out_packages(TRAINER) for name in left_out)
