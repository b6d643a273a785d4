"""Curves over each other, distinct without colors, and as a picture."""

from pathlib import Path

import pytest

from qlora_cli.cluster.compare import draw_curves, require_picture, save_picture
from qlora_client.history import LossHistory
from qlora_client.kube.errors import ClusterError

RUNS = {
    "rank-16": LossHistory({step: 3 - step / 100 for step in range(1, 200)}, {0: 3.1, 199: 1.2}),
    "rank-64": LossHistory({step: 3 - step / 120 for step in range(1, 150)}),
}


@pytest.mark.parametrize("width", [60, 80])
def test_each_curve_has_a_letter_and_the_picture_fits_the_terminal(width: int) -> None:
    drawn = draw_curves(RUNS, width, colors=False)
    picture, _, names = drawn.rpartition("\n\n")
    assert "\x1b" not in drawn
    assert names.splitlines() == ["  A  rank-16", "  B  rank-64"]
    assert picture.count("A") >= 5 <= picture.count("B")
    assert max(map(len, drawn.splitlines())) <= width


def test_nothing_but_the_curves_is_drawn() -> None:
    # They fall, so that below the beginning of both there is nothing.
    rows = [row for row in draw_curves(RUNS, 80, colors=False).splitlines() if "." in row.partition("|")[0]]
    assert [row.partition("| ")[2][:8].strip(" \u2800") for row in rows[-5:]] == [""] * 5


def test_colors_are_used_where_the_terminal_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # The library detects a terminal by itself.
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in draw_curves(RUNS, 80, colors=True)


def test_a_run_without_losses_and_a_narrow_terminal_leave_nothing_to_draw() -> None:
    assert draw_curves({"a": LossHistory()}, 80, colors=False) == ""
    assert draw_curves(RUNS, 20, colors=False) == ""
    flat = draw_curves({"a": LossHistory({1: 1.0, 2: 1.0}), "b": LossHistory()}, 80, colors=False)
    assert flat.endswith("  A  a")


@pytest.mark.parametrize(("name", "start"), [("c.png", b"\x89PNG"), ("c.svg", b"<?xml")])
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path: Path, name: str, start: bytes) -> None:
    save_picture(RUNS, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_another_format_is_rejected_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"found the picture .*c.pdf, must end in .png or .svg"):
        require_picture(tmp_path / "c.pdf")
