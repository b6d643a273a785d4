"""QLoRASweep manifests for tests, as plain objects."""

from tests.support.manifests import MINIMAL, Manifest, with_value

TEMPLATE: Manifest = with_value(MINIMAL, "spec.dataset.eval", {"source": "pvc://data/held-out.jsonl"})["spec"]

SWEEP: Manifest = {
    "apiVersion": "qlora.dev/v1beta1",
    "kind": "QLoRASweep",
    "metadata": {"name": "rates", "namespace": "default"},
    "spec": {"template": {"spec": TEMPLATE}, "grid": {"rank": [8, 16], "learningRate": [1e-4, 2e-4]}},
}

TASKS: Manifest = {
    **SWEEP,
    "spec": {
        "template": {"spec": MINIMAL["spec"] | {"output": {"destination": "s3://bucket/adapters"}}},
        "cells": [
            {},
            {"dataset": {"source": "pvc://data/summaries.jsonl", "eval": {"fraction": 0.1}}, "seed": 7},
            {
                "dataset": {"mix": [{"source": "hf://org/one"}, {"source": "hf://org/two", "revision": "v2"}]},
                "output": {"destination": "oci://example.org/team/two:v1", "merged": {}},
            },
        ],
        "select": "all",
    },
}
"""A sweep whose cells train on different data."""

FULL_SWEEP: Manifest = {
    **SWEEP,
    "spec": {
        "template": {
            "spec": {
                **TEMPLATE,
                "training": {"evalEverySteps": 10},
                "output": {"destination": "s3://bucket/adapters"},
                "gate": {"maxEvalLoss": 2.0, "score": {"check": "exactMatch"}},
            }
        },
        "cells": [
            {},
            {
                "rank": 8,
                "alpha": 16,
                "dropout": 0.1,
                "targetModules": ["q_proj", "v_proj"],
                "learningRate": 1e-4,
                "scheduler": "cosine",
                "warmupSteps": 10,
                "weightDecay": 0.01,
                "maxGradNorm": 1,
                "microBatchSize": 2,
                "gradientAccumulationSteps": 8,
                "maxSteps": 100,
                "seed": 7,
            },
            {"epochs": 3},
        ],
        "best": "score",
        "halving": {"minSteps": 20, "factor": 2},
        "parallelism": 2,
        "suspend": True,
        "ttlSecondsAfterFinished": 604800,
    },
}
