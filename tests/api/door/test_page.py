"""The door serves its page to anyone, and what the page reads and writes with the viewer's rights only."""

import json
import re
from typing import Any

import httpx2
import pytest

from devcluster.controlplane import ControlPlane
from tests.support.door import DoorProcess, Tenant, end_well

MANIFEST: dict[str, Any] = {
    "apiVersion": "qlora.dev/v1beta1",
    "kind": "QLoRAJob",
    "metadata": {"name": "clicked"},
    "spec": {
        "model": {"source": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
        "dataset": {"source": "configMap://answers/train.jsonl"},
    },
}


class Viewer:
    """A browser's requests, with a key or without one."""

    def __init__(self, door: DoorProcess, key: str | None = None, namespace: str | None = None) -> None:
        self._address = door.url.removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        if namespace:
            self._headers["OpenAI-Project"] = namespace

    def ask(self, method: str, path: str, **request: Any) -> httpx2.Response:
        return httpx2.request(method, f"{self._address}/{path}", headers=self._headers, **request)


def test_the_page_and_all_that_it_loads_need_no_key(door: DoorProcess) -> None:
    viewer, seen, waiting = Viewer(door), set[str](), {""}
    while waiting:
        seen.add(path := waiting.pop())
        answer = viewer.ask("GET", path)
        assert answer.status_code == 200, path
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        policy = dict(each.strip().split(" ", 1) for each in answer.headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        named = re.findall(r'(?:src|href)="(page/[^"]+)"', answer.text)
        named += [f"page/static/{name}" for name in re.findall(r'from "\./([^"]+)"', answer.text)]
        waiting |= {*named} - seen
    assert len(seen) > 5


@pytest.mark.parametrize("path", ["nothing.js", "..%2froutes.py", "%2e%2e/routes.py", ""])
def test_no_other_file_is_served(door: DoorProcess, path: str) -> None:
    assert Viewer(door).ask("GET", f"page/static/{path}").status_code == 404


@pytest.mark.parametrize("mode", ["door", "passing_door"])
def test_a_viewer_reads_the_own_jobs_only(
    mode: str, plane: ControlPlane, alice: Tenant, bob: Tenant, request: pytest.FixtureRequest
) -> None:
    door: DoorProcess = request.getfixturevalue(mode)
    options = ("--duration=1h",) if mode == "passing_door" else ()
    name = f"clicked-{mode.replace('_', '-')}"
    plane.kubectl.apply(json.dumps({**MANIFEST, "metadata": {"name": name, "namespace": "team-a"}}))
    end_well(plane, "team-a", name)
    owner, intruder = Viewer(door, alice.key(*options)), Viewer(door, bob.key(*options), "team-a")
    listed = owner.ask("GET", "page/jobs").json()
    assert listed["namespace"] == "team-a"
    (job,) = [each for each in listed["items"] if each["metadata"]["name"] == name]
    assert job["status"]["phase"] == "Succeeded"
    assert owner.ask("GET", f"page/jobs/{name}").json()["status"]["history"].endswith("8,1.5,1.25")
    assert Viewer(door, bob.key(*options)).ask("GET", f"page/jobs/{name}").status_code == 404
    for path in ("page/jobs", f"page/jobs/{name}"):
        assert intruder.ask("GET", path).status_code == 403
        assert Viewer(door).ask("GET", path).status_code == 401
