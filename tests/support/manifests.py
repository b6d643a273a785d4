"""QLoRAJob manifests for tests, as plain objects."""

import copy
import math
from typing import Any

from qlora_api.spec.job import QLoRAJobSpec

Manifest = dict[str, Any]

MINIMAL: Manifest = {
    "apiVersion": "qlora.dev/v1beta1",
    "kind": "QLoRAJob",
    "metadata": {"name": "tune", "namespace": "default"},
    "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "pvc://data/train.jsonl"}},
}

FULL: Manifest = {
    "apiVersion": "qlora.dev/v1beta1",
    "kind": "QLoRAJob",
    "metadata": {"name": "full", "namespace": "default"},
    "spec": {
        "model": {
            "source": "hf://org/model",
            "revision": "v1.0",
            "tokenSecretRef": {"name": "hub", "key": "read-token"},
        },
        "dataset": {
            "source": "configMap://rows/train.jsonl",
            "format": "instruction",
            "columns": {"instruction": "question", "output": "answer"},
            "chatTemplate": "configMap://formats/ours.jinja",
            "systemPrompt": {"text": "Answer in English.", "mode": "replace"},
            "eval": {"fraction": 0.1, "overlap": "drop"},
            "maxRows": 1000,
            "deduplicate": True,
            "sha256": "0" * 64,
        },
        "quantization": {"type": "nf4", "doubleQuant": True},
        "lora": {
            "rank": 16,
            "alpha": 32,
            "dropout": 0.05,
            "targetModules": ["q_proj", "v_proj"],
            "dtype": "bfloat16",
            "from": {"source": "s3://adapters/team/first", "sha256": "0" * 64, "secretRef": {"name": "keys"}},
        },
        "training": {
            "maxSteps": 100,
            "microBatchSize": 2,
            "gradientAccumulationSteps": 8,
            "learningRate": 1e-4,
            "scheduler": "cosine",
            "warmupSteps": 10,
            "weightDecay": 0.01,
            "maxGradNorm": 1.0,
            "optimizer": "paged_adamw_8bit",
            "maxSequenceLength": 1024,
            "packing": False,
            "trainOn": "all",
            "gradientCheckpointing": False,
            "evalEverySteps": 10,
            "saveEverySteps": 20,
            "keep": "best",
            "earlyStopping": {"patience": 3, "minDelta": 0.01},
            "seed": 7,
            "reportTo": ["mlflow"],
        },
        "output": {
            "destination": "pvc://adapters/team/full",
            "gguf": {"type": "q8_0"},
            "announce": {"configMap": "adapters"},
            "report": "full",
            "tracking": {"experiment": "support", "secretRef": {"name": "trackers"}},
        },
        "gate": {"minImprovement": 0.1, "maxEvalLoss": 1.5},
        "continues": "earlier",
        "workspace": {
            "size": "100Gi",
            "storageClassName": "fast",
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete", "whenFinished": "Retain"},
        },
        "resources": {"gpuMemory": "24Gi", "nodes": 2, "cpu": "8", "memory": "32Gi"},
        "scheduling": {
            "profileName": "large",
            "priorityClassName": "low",
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
        "retry": {"maxFailures": 1, "maxDisruptions": 5},
        "suspend": True,
        "activeDeadlineSeconds": 3600,
        "budget": {"gpuHours": 2.5},
        "cleanupAfterSeconds": 0,
        "ttlSecondsAfterFinished": 604800,
    },
}

MIXED: Manifest = {
    **MINIMAL,
    "spec": {
        "model": {"source": "hf://org/model"},
        "dataset": {
            "mix": [
                {"source": "pvc://data/ours.jsonl", "weight": 0.7, "format": "chat", "columns": {"messages": "turns"}},
                {"source": "hf://org/theirs", "weight": 3, "revision": "v1", "config": "en", "split": "train"},
                {"source": "s3://a-bucket/rows", "weight": 1, "sha256": "0" * 64},
                {"source": "configMap://rows/train.jsonl", "weight": 1},
            ],
            "secretRef": {"name": "store"},
            "eval": {"fraction": 0.1, "overlap": "fail"},
            "deduplicate": True,
        },
    },
}

# The schema of a weight admits every float from the smallest to a million.
_WEIGHTS = (2e-4, 2.5e-05, 1e-7, 0.1, 0.30000000000000004, 1 / 3, 1.0, 1e6, math.nextafter(1e6, 0), 5e-324)
# With numbers that clients write in several ways, or may round.
NUMBERS: Manifest = {
    **MINIMAL,
    "spec": {
        "model": {"source": "hf://org/model"},
        "dataset": {"mix": [{"source": "pvc://data/rows", "format": "auto", "weight": each} for each in _WEIGHTS]},
        "lora": {"dropout": 0.30000000000000004},
        "training": {"learningRate": 1e-7, "weightDecay": 1.0},
        "budget": {"gpuHours": 1e6},
    },
}


def with_value(manifest: Manifest, path: str, value: object) -> Manifest:
    """Copy the manifest with the value at the dotted path. Create missing objects."""
    result = copy.deepcopy(manifest)
    *parents, last = path.split(".")
    node = result
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return result


def without(manifest: Manifest, path: str) -> Manifest:
    """A copy of the manifest that lacks the field at the dotted path."""
    result = copy.deepcopy(manifest)
    *parents, last = path.split(".")
    node = result
    for parent in parents:
        node = node[parent]
    del node[last]
    return result


def merged(base: Manifest, changes: Manifest) -> Manifest:
    """The two nested dictionaries as one, `changes` winning."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if nested else value
    return result


def job_spec(**parts: Any) -> QLoRAJobSpec:
    """The spec of the smallest job with these parts."""
    return QLoRAJobSpec.model_validate(MINIMAL["spec"]).model_copy(update=parts)
