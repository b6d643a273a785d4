"""What the labels of a profile's nodes show of their GPUs: whether training can use them, and their memory."""

import pytest

from qlora_api.profile import Profile
from qlora_operator.decisions.profiles.gpu_nodes import memory_of_nodes, objection_to_nodes
from tests.support.builders import profile_body

DRIVER, DEPRECATED = "nvidia.com/cuda.driver-version.major", "nvidia.com/cuda.driver.major"
OLD, NEW = {DRIVER: "570", DEPRECATED: "570"}, {DRIVER: "580"}
T4 = {DRIVER: "580", "nvidia.com/gpu.compute.major": "7", "nvidia.com/gpu.compute.minor": "5"}


def says(*labels: dict[str, str]) -> str | None:
    why = objection_to_nodes("a100", {f"gpu-{number}": each for number, each in enumerate(labels, 1)})
    return None if why is None else why.sentence


def test_all_nodes_with_an_old_driver_are_named_with_it_and_the_remedy() -> None:
    assert says(OLD, T4) == (
        "train cannot use the GPUs of profile 'a100': gpu-1 with driver 570, and 580 is needed; gpu-2 with compute "
        "capability 7.5, and 8.0 is needed; the job starts when the administrator upgrades an old driver, or names "
        "other nodes in the profile's nodeSelector"
    )


def test_the_older_name_of_the_label_counts() -> None:
    assert "driver 535" in (says({DEPRECATED: "535"}) or "")


def test_a_node_without_labels_is_no_evidence() -> None:
    assert says(OLD, {}) == says(OLD)


def test_of_many_nodes_three_are_named() -> None:
    assert "; gpu-3 with driver 570, and 580 is needed; and 2 more nodes; the job" in (says(*[OLD] * 5) or "")


@pytest.mark.parametrize("labels", [(), ({},), (NEW,), (OLD, NEW), ({DRIVER: ""},)])
def test_an_empty_pool_a_fit_node_and_unknown_drivers_object_to_nothing(labels: tuple[dict[str, str], ...]) -> None:
    assert says(*labels) is None


def sized(mib: str, resource: str = "nvidia.com/gpu") -> dict[str, str]:
    return {f"{resource}.memory": mib}


@pytest.mark.parametrize(
    ("nodes", "memory"),
    [
        ([sized("46068"), sized("46068"), {}], "44Gi"),
        ([sized("23034"), sized("23028")], "22Gi"),
        ([sized("15360") | T4, sized("81559")], "79Gi"),
        ([sized("23034"), sized("81920")], None),
        ([sized("20096", "nvidia.com/mig-3g.20gb")], None),
        ([], None),
        ([{}], None),
        ([sized("0")], None),
        ([sized("unknown")], None),
        ([sized("99999999")], None),
    ],
)
def test_the_memory_of_the_gpus_is_that_of_all_labeled_nodes_that_training_can_use(
    nodes: list[dict[str, str]], memory: str | None
) -> None:
    named = {f"gpu-{number}": labels for number, labels in enumerate(nodes)}
    assert memory_of_nodes(Profile.model_validate(profile_body(gpuResource="nvidia.com/gpu")["spec"]), named) == memory


def test_a_part_of_a_gpu_has_its_own_label() -> None:
    part = "nvidia.com/mig-3g.20gb"
    nodes = {"gpu-1": sized("20096", part) | sized("40960")}
    assert memory_of_nodes(Profile.model_validate(profile_body(gpuResource=part)["spec"]), nodes) == "19Gi"
