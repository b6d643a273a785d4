"""Profiles as lists and the watch show them, in any order."""

from typing import Any

import pytest

from qlora_operator.watch.profiles import ProfileStore
from tests.support.builders import profile_body

SELECTING: dict[str, Any] = {"allowedNamespaces": {"selector": {"matchLabels": {"tier": "gold"}}}}


class Shown:
    """A store of profiles, and the names of those that have changed."""

    def __init__(self) -> None:
        self.changed: list[str] = []
        self.store = ProfileStore(self.changed.append)

    def show(self, body: dict[str, Any], *, deleted: bool = False) -> list[str]:
        """The names of the profiles that this changes."""
        self.changed.clear()
        self.store.changed(body, deleted=deleted)
        return list(self.changed)


@pytest.fixture
def shown() -> Shown:
    return Shown()


def test_a_profile_is_usable_from_its_event_to_its_deletion(shown: Shown) -> None:
    assert shown.show(profile_body(device="cpu")) == ["default"]
    assert (list(shown.store), shown.store["default"].device) == (["default"], "cpu")
    assert shown.show(profile_body(version=9), deleted=True) == ["default"]
    assert shown.show(profile_body(version=8)) == [], "an answer from before its deletion"
    assert (len(shown.store), shown.store.stored) == (0, ())
    assert shown.show(profile_body(version=10)) == ["default"]


def test_only_a_newer_version_replaces_a_profile_and_a_status_changes_nothing(shown: Shown) -> None:
    shown.show(profile_body(device="cpu", generation=2, version=9))
    assert shown.show(profile_body(version=8)) == []
    assert shown.store["default"].device == "cpu"
    assert shown.show(profile_body(device="cpu", generation=2, version=10) | {"status": {}}) == []
    assert shown.show(profile_body(generation=3, version=11)) == ["default"]


def test_an_invalid_profile_is_unusable_until_it_is_corrected(shown: Shown) -> None:
    shown.show(profile_body())
    assert shown.show(profile_body(device="tpu", generation=2, version=8)) == ["default"]
    assert (dict(shown.store), [each.problem != "" for each in shown.store.stored]) == ({}, [True])
    assert shown.show(profile_body(generation=3, version=9)) == ["default"]
    assert list(shown.store) == ["default"]


def test_a_list_shows_what_the_watch_has_missed(shown: Shown) -> None:
    for name, version in (("gone", 5), ("newer", 30)):
        shown.show(profile_body(name, version=version))
    shown.changed.clear()
    shown.store.compare([profile_body("missed", version=12)], "20")
    assert (set(shown.store), sorted(shown.changed)) == ({"missed", "newer"}, ["gone", "missed"])


def test_a_changed_label_of_a_namespace_changes_the_profiles_that_select_it(shown: Shown) -> None:
    gold = {"tier": "gold"}
    shown.show(profile_body())
    shown.show(profile_body("gold", **SELECTING))
    assert not shown.store["gold"].admits("team")
    for labels, changed, admits in ((gold, ["gold"], True), (gold, [], True), ({}, ["gold"], False)):
        shown.changed.clear()
        shown.store.select({"team": labels})
        assert (shown.changed, shown.store["gold"].admits("team")) == (changed, admits)
