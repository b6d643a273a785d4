"""The memory estimate against published peaks, whose settings were written down before it was applied to them."""

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import yaml

from qlora_api.memory.estimate import estimate
from qlora_api.memory.model_shape import ModelShape
from qlora_api.memory.training_shape import TrainingShape

POINTS = yaml.safe_load(Path(__file__).with_name("memory_points.yaml").read_text())
UNITS = {"B": 1, "MiB": 2**20, "GB": 1e9, "GiB": 2**30}


@dataclass(frozen=True)
class PublishedPeak:
    name: str
    role: str
    measures: str
    model: ModelShape
    training: TrainingShape
    published: float
    """Bytes."""

    @property
    def estimated(self) -> int:
        """Bytes; a figure of allocated tensors does not hold the CUDA context."""
        memory = estimate(self.model, self.training)
        return memory.expected - (memory.context if self.measures == "allocated" else 0)

    @property
    def error(self) -> float:
        return self.estimated / self.published - 1


def shape(name: str) -> ModelShape:
    given = POINTS["models"][name]
    return ModelShape(
        model_type=given["type"],
        num_hidden_layers=given["layers"],
        hidden_size=given["hidden"],
        intermediate_size=given["mlp"],
        num_attention_heads=given["heads"],
        num_key_value_heads=given["kv_heads"],
        head_dim=given["head_dim"],
        vocab_size=given["vocabulary"],
        tie_word_embeddings=given["tied"],
    )


def peak(group: dict[str, Any], given: dict[str, Any]) -> PublishedPeak:
    assumed = {name: value for name, (value, _reason) in group["assumed"].items()}
    own = {name: value for name, value in given.items() if name not in ("model", "published")}
    # Other trainers compose their norms and their loss: neither is stated, as none of them does otherwise.
    settings = {"composed": True, "loss_bytes_per_logit": 12} | assumed | group["stated"] | own
    if "target_modules" in settings:
        settings["target_modules"] = frozenset(settings["target_modules"])
    return PublishedPeak(
        name=" ".join([group["name"], given["model"], *(f"{name} {value}" for name, value in own.items())]),
        role=group["role"],
        measures=group["measures"],
        model=shape(given["model"]),
        training=TrainingShape(**settings),
        published=given["published"] * UNITS[group["unit"]],
    )


PEAKS = [peak(group, given) for group in POINTS["groups"] for given in group["peaks"]]


def errors(role: str) -> list[float]:
    return [peak.error for peak in PEAKS if peak.role == role]


# What was reached. The aim for both kinds was 6.5 %: the held-out figures miss it (docs/trainer/measurements.md says
# where and why).
@pytest.mark.parametrize(
    ("role", "count", "highest"), [("known", 23, 0.065), ("held_out", 23, 0.100), ("several", 10, 0.122)]
)
def test_the_mean_error_over_published_peaks_is_what_the_documentation_says(
    role: str, count: int, highest: float
) -> None:
    found = errors(role)
    assert len(found) == count
    assert mean(abs(error) for error in found) <= highest


@pytest.mark.parametrize("peak", [p for p in PEAKS if p.name.startswith("QLoRA")], ids=lambda peak: peak.name)
def test_the_papers_own_peaks_are_met_within_three_percent(peak: PublishedPeak) -> None:
    assert abs(peak.error) < 0.03


def test_low_and_high_enclose_all_published_peaks_of_one_gpu_but_one() -> None:
    outside = []
    for peak in PEAKS:
        memory = replace(estimate(peak.model, peak.training), pageable_optimizer=0)  # no paging happened
        without = memory.context if peak.measures == "allocated" else 0
        if peak.role != "several" and not memory.low - without <= peak.published <= memory.high - without:
            outside.append(peak.name)
    assert [name.split(" olmo")[0] for name in outside] == ["axolotl, Magistral and Olmo 3"]


@pytest.mark.parametrize("name", POINTS["models"])
def test_each_model_has_as_many_parameters_as_its_publisher_says(name: str) -> None:
    model = shape(name)
    assert model.linear_parameters + model.embedding_parameters == pytest.approx(
        POINTS["models"][name]["parameters"], rel=2e-4
    )


if __name__ == "__main__":
    for peak_of_table in PEAKS:
        print(  # noqa: T201
            f"{peak_of_table.role:9} {peak_of_table.published / 1e9:7.2f} {peak_of_table.estimated / 1e9:7.2f} "
            f"{peak_of_table.error:+6.1%}  {peak_of_table.name}"
        )
