"""The documentation's pages: in step with the code, and every manifest in them valid."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from docs.generate import pages
from docs.screenshots import watch_lines
from qlora_api.automatic import Limits, ModelFacts, assume
from qlora_api.contract import ExitCode
from qlora_api.gpus import OLDEST_DRIVER
from qlora_api.profile import PROFILE_KIND, Profile
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.sweep.spec import SWEEP_KIND, QLoRASweepSpec
from qlora_cli.manifest import load_manifest
from tests.support.sweeps import TEMPLATE

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
CHART = ROOT / "helm" / "qlora-operator"
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "devcluster", "helm/qlora-operator", "tests/gpu")),
]
SMALLEST_SPEC = {"model": {"source": "pvc://models/base"}, "dataset": {"source": "pvc://data/rows.jsonl"}}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def yaml_blocks() -> Iterator[Any]:
    """Every YAML block of the pages, with its page and line."""
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^( *)```yaml\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            block = "\n".join(row.removeprefix(match[1]) for row in match[2].splitlines())
            yield pytest.param(block, id=f"{name_of(page)}:{line}")


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_the_reference_matches_make_generate(page: Path) -> None:
    assert page.read_text() == pages()[page], "run `make generate`"


CHART_VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
CHART_SCHEMA = json.loads((CHART / "values.schema.json").read_text())
SHIPPED = [file.read_text() for file in sorted((ROOT / "gitops").rglob("*.yaml"))]


def _over(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The values as Helm merges them."""
    merged = {
        name: _over(values[name], value) if isinstance(value, dict) and isinstance(values.get(name), dict) else value
        for name, value in given.items()
    }
    return values | merged


@pytest.mark.parametrize("block", yaml_blocks())
def test_every_yaml_block_is_valid_or_from_a_shipped_file(block: str, tmp_path: Path) -> None:
    if any(block in text for text in SHIPPED):
        return
    content = yaml.safe_load(block)
    if content.keys() <= CHART_VALUES.keys() - {"profiles"}:
        jsonschema.validate(_over(CHART_VALUES, content), CHART_SCHEMA)
        return
    if "profiles" in content:
        jsonschema.validate(_over(CHART_VALUES, content), CHART_SCHEMA)
        for profile in content["profiles"].values():
            Profile.model_validate({"image": "trainer", **profile})
        return
    if content.get("kind") == SWEEP_KIND or {"cells", "grid"} & content.get("spec", {}).keys():
        QLoRASweepSpec.model_validate({"template": {"spec": TEMPLATE}} | content["spec"])
        return
    if content.get("kind") == PROFILE_KIND:
        Profile.model_validate(content["spec"])
        return
    if set(content) == {"spec"}:
        content = {
            "apiVersion": "qlora.dev/v1beta1",
            "kind": "QLoRAJob",
            "metadata": {"name": "part"},
            "spec": {**SMALLEST_SPEC, **content["spec"]},
        }
    assert content["kind"] == "QLoRAJob"
    manifest = tmp_path / "job.yaml"
    manifest.write_text(yaml.safe_dump(content))
    load_manifest(manifest)


def reasons_of_the_operator() -> set[str]:
    """Return the reasons in the operator's source for a job that waits or fails."""
    sources = "\n".join(file.read_text() for file in (ROOT / "operator" / "qlora_operator").rglob("*.py"))
    given = r"return |Reason\(|failure_of\(|\.reason or|\.word or"
    found = set(re.findall(rf'(?:{given})\s*(?:[\w.]*step\.name, )?"([A-Z]\w+)"', sources))
    assert {"NoPod", "NameTaken", "ResultUnreadable", "ProfileNotFound", "PodFailed", "JobFailed"} <= found
    assert {"HostOutOfMemory", "DeadlineExceeded"} <= found
    # A state, not a trouble: `docs/concepts/life-of-a-job.md` has those.
    return found - {
        "CleanedUp", "Done", "False", "Finished", "NotEnded", "NotFailed", "NotReached", "NotRunning", "Running",
        "NotScheduled", "NotStalled", "NotSuspended", "Pending", "Preparing", "Progressing", "Publishing", "Queued",
        "Scheduled", "Started", "Succeeded", "Suspended", "Suspending", "TakenUp", "Training", "True", "Unknown",
        "Valid", "Paused",
    }  # fmt: skip


def test_troubleshooting_has_a_section_for_each_reason() -> None:
    sections = set(re.findall(r"^### `(\w+)`$", (DOCS / "how-to" / "troubleshooting.md").read_text(), re.MULTILINE))
    reasons = {code.reason for code in ExitCode} - {"Done", "Interrupted"}
    assert reasons | reasons_of_the_operator() <= sections


def test_the_pages_name_the_driver_that_the_locked_cuda_needs() -> None:
    """By NVIDIA's table of minor version compatibility."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    (cuda,) = (each["version"] for each in packages if each["name"] == "cuda-toolkit")
    assert {"12": 525, "13": 580}[cuda.partition(".")[0]] == OLDEST_DRIVER
    for name in ("README.md", "docs/quick-start.md", "docs/how-to/install.md", "tests/gpu/README.md"):
        assert f"driver {OLDEST_DRIVER} or later" in (ROOT / name).read_text(), name


@pytest.mark.parametrize("record", sorted((DOCS / "decisions").glob("0*.md")), ids=name_of)
def test_a_decision_record_states_its_context_options_decision_and_consequences(record: Path) -> None:
    """`make generate` rejects a head without number, title, group or date."""
    title, *sections = re.split(r"^## ", record.read_text(), flags=re.MULTILINE)
    assert title.startswith(f"# {int(record.name[:4])}. ")
    assert [section.split("\n", 1)[0] for section in sections] == [
        "Context", "Considered options", "Decision", "Consequences",
    ]  # fmt: skip
    assert len(re.findall(r"^- .+: .+, but .+$", sections[1], re.MULTILINE)) >= 2


def test_the_learning_rates_on_a_page_are_those_that_prepare_chooses() -> None:
    page = (DOCS / "how-to" / "training-settings.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| [^|]+ \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert len(rows) == 4
    for width, *rates in rows:
        for objective, rate in zip(("supervised", "dpo"), rates, strict=True):
            spec = QLoRAJobSpec.model_validate(SMALLEST_SPEC | {"training": {"objective": objective}})
            chosen = assume(spec, ModelFacts(int(width.replace(",", "")), weights_per_rank=1), None, Limits())
            assert [each.parsed for each in chosen if each.name == "learningRate"] == [float(rate)]


def paths_in(page: Path) -> Iterator[str]:
    """Yield repository files in a page's inline code, by folder and known ending."""
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        for word in code.split():
            if re.fullmatch(r"[\w.][\w./-]*/[\w-]+\.(?:py|md|yaml|yml|toml|json|jsonl)", word):
                yield word


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Relative to the root, the page, or a folder that a page speaks of throughout."""
    bases = (
        ROOT,
        page.parent,
        ROOT / "trainer_image" / "qlora_trainer",
        ROOT / "operator" / "qlora_operator",
        ROOT / "tests" / "trainer",
        ROOT / "crds" / "qlora_api",
    )
    # Files of a run, of a user and of a repository somewhere else.
    other = re.compile(r"(demo-output|report|records|work|results|\.?/?etc)/")
    missing = [
        path for path in paths_in(page) if not other.match(path) and not any((base / path).exists() for base in bases)
    ]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as MkDocs and GitHub make them."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    """`make docs` checks the built site too; this covers the repository's pages."""
    broken = []
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        file = page.parent / target if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    assert broken == []


@pytest.mark.parametrize("diagram", sorted((DOCS / "images").glob("*.svg")), ids=name_of)
def test_modules_that_a_diagram_names_exist(diagram: Path) -> None:
    bases = (ROOT / "trainer_image" / "qlora_trainer", ROOT / "operator" / "qlora_operator")
    names = re.findall(r"[\w/]+\.py\b", diagram.read_text())
    assert [name for name in names if not any((base / name).exists() for base in bases)] == []


def test_the_picture_of_the_watch_shows_each_phase_and_three_lines_of_it_at_most() -> None:
    header = "NAME   PHASE       PROGRESS   LOSS   REMAINING   AGE"
    training = [f"demo   Training    {step}% {step}/80   1.0   1m   {step}s" for step in range(1, 9)]
    output = ["noise", header, "demo   Pending                       0s", *training, "", "demo  later  1s"]
    assert watch_lines("\n".join(output)) == [header, output[2], training[0], training[4], training[7]]
    with pytest.raises(ValueError, match="NAME PHASE PROGRESS"):
        watch_lines("nothing")
