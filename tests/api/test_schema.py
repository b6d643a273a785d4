"""The API server alone, without the operator, admits good manifests and rejects bad ones with a reason."""

import json

import pytest
from pydantic import ValidationError

from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from qlora_api.spec.job import QLoRAJobDocument
from tests.support.manifests import FULL, MINIMAL, MIXED, Manifest, with_value, without


def apply(plane: ControlPlane, manifest: Manifest, *, dry_run: bool = True) -> Manifest:
    flags = ["--dry-run=server"] if dry_run else []
    answer = plane.kubectl("apply", *flags, "--output=json", "--filename=-", input_text=json.dumps(manifest))
    applied: Manifest = json.loads(answer)
    return applied


PINNED = {"source": "hf://org/held-out", "revision": "v1", "config": "en", "split": "test", "sha256": "0" * 64}
EVALUATED = with_value(MINIMAL, "spec.dataset.eval", PINNED)
COMPARED = with_value(MINIMAL, "spec.training.objective", "dpo")
SMOOTHED = with_value(
    with_value(COMPARED, "spec.training.preference", {"beta": 0.2, "labelSmoothing": 0.1}),
    "spec.dataset",
    {"source": "hf://org/pairs", "format": "preference", "columns": {"chosen": "better", "rejected": "worse"}},
)
SCORE = {"check": "jsonSchema", "schema": '{"type": "object"}', "rows": 10, "maxNewTokens": 64}
SCORED = with_value(EVALUATED, "spec.gate", {"minScore": 0.8, "score": SCORE})

GROUPED = with_value(
    with_value(MINIMAL, "spec.group", {"name": "rates", "size": 4}), "spec.workspace", {"claimName": "team"}
)
CONVERTED = with_value(MINIMAL, "spec.output.gguf", {})


BY_ROWS = with_value(
    with_value(EVALUATED, "spec.gate", {"score": {"check": "regex"}}), "spec.dataset.columns", {"check": "expected"}
)


def mixed_by_rows(evaluation: Manifest, *checked: bool) -> Manifest:
    """A mix, of whose sources those bring checks that are `checked`."""
    sources = [
        {"source": f"pvc://data/{number}.jsonl", **({"columns": {"check": "expected"}} if brings else {})}
        for number, brings in enumerate(checked)
    ]
    return with_value(BY_ROWS, "spec.dataset", {"mix": sources, "eval": evaluation})


FRACTION, HELD_OUT = {"fraction": 0.1}, {"source": "pvc://data/held-out.jsonl"}


@pytest.mark.parametrize(
    "manifest",
    [MINIMAL, FULL, EVALUATED, SCORED, BY_ROWS, mixed_by_rows(FRACTION, True, True),
     mixed_by_rows(HELD_OUT, True, False), COMPARED, SMOOTHED, MIXED, GROUPED],
    ids=["minimal", "full", "evaluated", "scored", "by rows", "mixed by rows", "held out by rows", "dpo", "smoothed",
         "mixed", "grouped"],
)  # fmt: skip
def test_a_good_manifest_is_admitted_and_parses(plane: ControlPlane, manifest: Manifest) -> None:
    applied = apply(plane, manifest)
    document = QLoRAJobDocument.model_validate(
        {key: applied[key] for key in ("apiVersion", "kind", "metadata", "spec")}
    )
    assert document.spec == QLoRAJobDocument.model_validate(manifest).spec


def test_the_server_fills_in_the_defaults_of_the_models(plane: ControlPlane) -> None:
    assert apply(plane, MINIMAL)["spec"] == QLoRAJobDocument.model_validate(MINIMAL).spec.dump()


SHARDED = with_value(with_value(MINIMAL, "spec.training.sharding", "full"), "spec.resources.gpus", 2)
REJECTED = {
    "a tracker's server and no tracker that has one": (
        with_value(with_value(MINIMAL, "spec.training.reportTo", ["tensorboard"]), "spec.output.tracking", {}),
        "add one of them to training.reportTo",
    ),
    "no spec": (without(MINIMAL, "spec"), "spec: Required value"),
    "no model": (without(MINIMAL, "spec.model"), "spec.model: Required value"),
    "wrong type": (with_value(MINIMAL, "spec.lora.rank", "sixteen"), "spec.lora.rank"),
    "no GPU hours": (with_value(MINIMAL, "spec.budget", {"gpuHours": 0}), "spec.budget.gpuHours"),
    "GPU hours as a quantity": (with_value(MINIMAL, "spec.budget", {"gpuHours": "5h"}), "spec.budget.gpuHours"),
    "budget of a group": (with_value(GROUPED, "spec.budget", {"gpuHours": 5}), "budget is not supported with group"),
    "fractional epochs": (with_value(MINIMAL, "spec.training.epochs", 1.5), "spec.training.epochs"),
    "a list for a number": (with_value(MINIMAL, "spec.lora.rank", [1]), "spec.lora.rank"),
    "unknown field": (
        with_value(MINIMAL, "spec.training.learningRat", 1e-4),
        'unknown field "spec.training.learningRat"',
    ),
    "unknown enum value": (with_value(MINIMAL, "spec.training.scheduler", "cosin"), 'supported values: "constant"'),
    "preferences without an objective for them": (
        with_value(MINIMAL, "spec.training.preference", {"beta": 0.2}),
        "set training.objective to dpo or orpo",
    ),
    "labels smoothed for orpo": (
        with_value(COMPARED, "spec.training", {"objective": "orpo", "preference": {"labelSmoothing": 0.1}}),
        "training.preference.labelSmoothing is for objective dpo",
    ),
    "pairs trained on with their prompts": (
        with_value(COMPARED, "spec.training.trainOn", "all"),
        "set training.trainOn to completion",
    ),
    "an objective for pairs and other data": (
        with_value(COMPARED, "spec.dataset.format", "chat"),
        "set dataset.format to preference",
    ),
    "pairs and an objective for other data": (
        with_value(MINIMAL, "spec.dataset.format", "preference"),
        "dataset.format preference needs an objective that compares two answers",
    ),
    "epochs and maxSteps": (
        with_value(MINIMAL, "spec.training", {"epochs": 1, "maxSteps": 10}),
        "spec.training: Invalid value: set only one of epochs and maxSteps",
    ),
    "the best of no evaluation": (
        with_value(MINIMAL, "spec.training", {"keep": "best", "evalEverySteps": 10}),
        "training.keep: best compares adapters by their loss on held-out rows: set dataset.eval",
    ),
    "the best of one evaluation": (
        with_value(with_value(MINIMAL, "spec.dataset.eval", {"fraction": 0.1}), "spec.training.keep", "best"),
        "keep: best chooses among evaluations, and without evalEverySteps only the last adapter is evaluated",
    ),
    "early stopping without held-out rows": (
        with_value(MINIMAL, "spec.training", {"earlyStopping": {"patience": 3}, "evalEverySteps": 10}),
        "training.earlyStopping watches the loss on held-out rows: set dataset.eval",
    ),
    "early stopping without evaluations on the way": (
        with_value(
            with_value(MINIMAL, "spec.dataset.eval", {"fraction": 0.1}), "spec.training.earlyStopping.patience", 3
        ),
        "earlyStopping counts evaluations: set evalEverySteps, the number of optimizer steps between them",
    ),
    "no patience": (
        with_value(MINIMAL, "spec.training.earlyStopping", {"patience": 0}),
        "spec.training.earlyStopping.patience",
    ),
    "patience left out": (
        with_value(MINIMAL, "spec.training.earlyStopping", {"minDelta": 0.1}),
        "spec.training.earlyStopping.patience: Required value",
    ),
    "eval source and fraction": (
        with_value(MINIMAL, "spec.dataset.eval", {"source": "pvc://a/b.jsonl", "fraction": 0.1}),
        "spec.dataset.eval: Invalid value: set exactly one of source and fraction",
    ),
    "split of a volume": (
        with_value(with_value(MINIMAL, "spec.dataset.source", "pvc://a/b.jsonl"), "spec.dataset.split", "test"),
        "revision, config and split are for an hf:// data set",
    ),
    "revision of data in a bucket": (
        with_value(with_value(MINIMAL, "spec.dataset.source", "s3://a-bucket/rows"), "spec.dataset.revision", "v1"),
        "revision, config and split are for an hf:// data set",
    ),
    "revision of rows that are held out": (
        with_value(MINIMAL, "spec.dataset.eval", {"fraction": 0.1, "revision": "v1"}),
        "spec.dataset.eval: Invalid value: sha256, revision, config and split are for the evaluation's own source",
    ),
    "digest of rows that are held out": (
        with_value(MINIMAL, "spec.dataset.eval", {"fraction": 0.1, "sha256": "0" * 64}),
        "sha256, revision, config and split are for the evaluation's own source",
    ),
    "split of evaluation rows on a volume": (
        with_value(MINIMAL, "spec.dataset.eval", {"source": "pvc://a/b.jsonl", "split": "test"}),
        "spec.dataset.eval: Invalid value: revision, config and split are for an hf:// data set",
    ),
    "bad sha256 of evaluation rows": (
        with_value(MINIMAL, "spec.dataset.eval", {"source": "pvc://a/b.jsonl", "sha256": "abc"}),
        "spec.dataset.eval.sha256",
    ),
    "revision of a model on a volume": (
        with_value(with_value(MINIMAL, "spec.model.source", "pvc://models/a"), "spec.model.revision", "v1"),
        "revision is for hf:// models",
    ),
    "rows from nowhere": (without(MINIMAL, "spec.dataset.source"), "set exactly one of source and mix"),
    "a source and a mix": (
        with_value(MIXED, "spec.dataset.source", "pvc://a/b.jsonl"),
        "spec.dataset: Invalid value: set exactly one of source and mix",
    ),
    "an empty mix": (with_value(MIXED, "spec.dataset.mix", []), "spec.dataset.mix"),
    "a mix of too many": (with_value(MIXED, "spec.dataset.mix", [{"source": "hf://a/b"}] * 17), "must have at most 16"),
    "a format for a mix": (
        with_value(MIXED, "spec.dataset.format", "chat"),
        "sha256 are for source: in a mix, set them for each of its sources",
    ),
    "a digest for a mix": (
        with_value(MIXED, "spec.dataset.sha256", "0" * 64),
        "sha256 are for source: in a mix, set them for each of its sources",
    ),
    "some samples of a mix": (
        with_value(MIXED, "spec.dataset.maxRows", 5),
        "maxRows and shuffle are for source: a mix draws its rows by weight",
    ),
    "a source of a mix without a weight": (
        with_value(MIXED, "spec.dataset.mix", [{"source": "hf://a/b", "weight": 1}, {"source": "hf://a/c"}]),
        "set the weight of every source of the mix, or of none",
    ),
    "rows without pairs in a mix": (
        with_value(MIXED, "spec.training.objective", "dpo"),
        "dpo and orpo compare two answers: set dataset.format to preference",
    ),
    "pairs in a mix without an objective": (
        with_value(MIXED, "spec.dataset.mix", [{"source": "s3://a-bucket/rows", "format": "preference"}]),
        "dataset.format preference needs an objective that compares two answers",
    ),
    "a weight of nothing": (
        with_value(MIXED, "spec.dataset.mix", [{"source": "hf://a/b", "weight": 0}]),
        "spec.dataset.mix[0].weight",
    ),
    "revision of a mixed volume": (
        with_value(MIXED, "spec.dataset.mix", [{"source": "pvc://a/b.jsonl", "revision": "v1"}]),
        "spec.dataset.mix[0]: Invalid value: revision, config and split are for an hf:// data set",
    ),
    "path traversal in a mix": (
        with_value(MIXED, "spec.dataset.mix", [{"source": "pvc://data/../x.jsonl"}]),
        "a path has no '..'",
    ),
    "credentials of a mix without a bucket": (
        with_value(MIXED, "spec.dataset.mix", [{"source": "hf://a/b"}]),
        "secretRef is for s3://, gs:// and az:// data",
    ),
    "another way with an overlap": (
        with_value(MINIMAL, "spec.dataset.eval", {"fraction": 0.1, "overlap": "ignore"}),
        "spec.dataset.eval.overlap",
    ),
    "unknown chat template": (
        with_value(MINIMAL, "spec.dataset.chatTemplate", "chatlm"),
        'spec.dataset.chatTemplate: Invalid value: "chatlm": must be chatml, gemma, llama-3, mistral, zephyr or config',
    ),
    "chat template for text": (
        with_value(with_value(MINIMAL, "spec.dataset.format", "text"), "spec.dataset.chatTemplate", "chatml"),
        "spec.dataset: Invalid value: chatTemplate and systemPrompt are for rows with turns",
    ),
    "system prompt for text": (
        with_value(
            MINIMAL, "spec.dataset", MINIMAL["spec"]["dataset"] | {"format": "text", "systemPrompt": {"text": "a"}}
        ),
        "spec.dataset: Invalid value: chatTemplate and systemPrompt are for rows with turns",
    ),
    "blank system prompt": (
        with_value(MINIMAL, "spec.dataset.systemPrompt", {"text": " \n"}),
        "spec.dataset.systemPrompt.text",
    ),
    "eval empty": (with_value(MINIMAL, "spec.dataset.eval", {}), "set exactly one of source and fraction"),
    "long name": (with_value(MINIMAL, "metadata.name", "a" * 46), "at most 45 characters"),
    "dotted name": (with_value(MINIMAL, "metadata.name", "a.b"), "one DNS label"),
    "huge string": (
        with_value(MINIMAL, "spec.model.source", "hf://org/" + "a" * 100_000),
        "spec.model.source: Too long",
    ),
    "huge list": (
        with_value(MINIMAL, "spec.lora.targetModules", [f"m{number}" for number in range(1000)]),
        "spec.lora.targetModules: Too many",
    ),
    "zero learning rate": (with_value(MINIMAL, "spec.training.learningRate", 0), "spec.training.learningRate"),
    "unknown scheme": (
        with_value(MINIMAL, "spec.model.source", "https://s3.example.org/bucket/model"),
        "must be hf://ORG/NAME, pvc://CLAIM",
    ),
    "host of an object store": (
        with_value(MINIMAL, "spec.model.source", "s3://169.254.169.254:80/latest"),
        "must be hf://ORG/NAME, pvc://CLAIM",
    ),
    "password in an address": (
        with_value(MINIMAL, "spec.output.destination", "oci://user:password@registry.example.org/a:v1"),
        "must be pvc://CLAIM/PATH, s3://BUCKET",
    ),
    "digest of what is not made yet": (
        with_value(MINIMAL, "spec.output.destination", f"oci://registry.example.org/a@sha256:{'0' * 64}"),
        "must be pvc://CLAIM/PATH, s3://BUCKET",
    ),
    "credentials of a hub's model": (
        with_value(MINIMAL, "spec.model.secretRef", {"name": "keys"}),
        "secretRef is for s3://, gs://, az:// and oci:// models: for an hf:// model set tokenSecretRef",
    ),
    "credentials of an adapter on a volume": (
        with_value(MINIMAL, "spec.lora.from", {"source": "pvc://a/b", "secretRef": {"name": "keys"}}),
        "secretRef is for s3://, gs://, az://, hf:// and oci:// adapters",
    ),
    "bad sha256 of an adapter": (
        with_value(MINIMAL, "spec.lora.from", {"source": "pvc://a/b", "sha256": "abc"}),
        "spec.lora.from.sha256",
    ),
    "an adapter in a ConfigMap": (
        with_value(MINIMAL, "spec.lora.from", {"source": "configMap://a/b"}),
        "must be pvc://CLAIM/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, hf://ORG/NAME (or @COMMIT)",
    ),
    "a branch of an adapter": (
        with_value(MINIMAL, "spec.lora.from", {"source": "hf://org/adapter@main"}),
        "must be pvc://CLAIM/PATH, s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH, hf://ORG/NAME (or @COMMIT)",
    ),
    "a group of one": (with_value(GROUPED, "spec.group.size", 1), "spec.group.size"),
    "a group of seventeen": (with_value(GROUPED, "spec.group.size", 17), "spec.group.size"),
    "a group without a name": (without(GROUPED, "spec.group.name"), "spec.group.name"),
    "a group of another namespace": (with_value(GROUPED, "spec.group.name", "other/rates"), "spec.group.name"),
    "a group on claims of their own": (without(GROUPED, "spec.workspace"), "set workspace.claimName to the same claim"),
    **{
        f"a group with {field} {value}": (
            with_value(GROUPED, f"spec.{field}", value),
            f"{named} is not supported with group, which trains several jobs in one process",
        )
        for field, value, named in (
            ("resources.gpus", 2, "resources.gpus or nodes above 1"),
            ("resources.nodes", 2, "resources.gpus or nodes above 1"),
            ("lora.dropout", 0.1, "lora.dropout"),
            ("lora.useDora", True, "lora.useDora"),
            ("lora.modulesToSave", ["embed_tokens"], "lora.modulesToSave"),
            ("training.autoMicroBatch", True, "training.autoMicroBatch"),
            ("training.objective", "orpo", "training.objective"),
        )
    },
    "a job that continues itself": (
        with_value(MINIMAL, "spec.continues", "tune"),
        "spec.continues names this job itself",
    ),
    "a job of another namespace": (with_value(MINIMAL, "spec.continues", "other/tune"), "spec.continues"),
    "credentials of data on a volume": (
        with_value(MINIMAL, "spec.dataset.secretRef", {"name": "keys"}),
        "secretRef is for s3://, gs:// and az:// data",
    ),
    "credentials of the workspace": (
        with_value(MINIMAL, "spec.output", {"secretRef": {"name": "keys"}}),
        "secretRef is for an s3://, gs://, az://, hf:// or oci:// destination",
    ),
    "key of a Secret's own choice": (
        with_value(
            MINIMAL, "spec.output", {"destination": "s3://bucket/a", "secretRef": {"name": "a", "key": "password"}}
        ),
        'unknown field "spec.output.secretRef.key"',
    ),
    "a merged model inside of the adapter's folder": (
        with_value(
            MINIMAL,
            "spec.output",
            {"destination": "pvc://out/tiny", "merged": {"destination": "pvc://out/tiny/merged"}},
        ),
        "spec.output: Invalid value: adapter and merged model need separate folders",
    ),
    "an adapter's folder, with a slash, inside of the merged model's": (
        with_value(
            MINIMAL,
            "spec.output",
            {"destination": "pvc://out/tiny/adapter/", "merged": {"destination": "pvc://out/tiny/"}},
        ),
        "spec.output: Invalid value: adapter and merged model need separate folders",
    ),
    "a base inside of the adapter's folder": (
        with_value(
            MINIMAL, "spec.output", {"destination": "pvc://out/tiny", "base": {"destination": "pvc://out/tiny/base"}}
        ),
        "spec.output: Invalid value: adapter and base need separate folders",
    ),
    "a base in the merged model's folder": (
        with_value(
            MINIMAL,
            "spec.output",
            {"merged": {"destination": "pvc://out/tiny/"}, "base": {"destination": "pvc://out/tiny"}},
        ),
        "spec.output: Invalid value: merged model and base need separate folders",
    ),
    "a GGUF file of a DoRA adapter": (
        with_value(CONVERTED, "spec.lora.useDora", True),
        "output.gguf is not possible with lora.useDora, as llama.cpp knows no magnitudes",
    ),
    "a GGUF file of fully trained modules": (
        with_value(CONVERTED, "spec.lora.modulesToSave", ["lm_head"]),
        "output.gguf is not possible with lora.modulesToSave, as llama.cpp loads no fully trained modules",
    ),
    "a GGUF file in 2 bits": (with_value(CONVERTED, "spec.output.gguf.type", "q2_k"), "spec.output.gguf.type"),
    "an announcement to no ConfigMap": (
        with_value(MINIMAL, "spec.output.announce", {}),
        "spec.output.announce.configMap: Required value",
    ),
    "an announcement to a ConfigMap of another namespace": (
        with_value(MINIMAL, "spec.output.announce", {"configMap": "kube-system/coredns"}),
        "spec.output.announce.configMap",
    ),
    "path traversal": (with_value(MINIMAL, "spec.dataset.source", "pvc://data/../x.jsonl"), "a path has no '..'"),
    "model from a config map": (with_value(MINIMAL, "spec.model.source", "configMap://a/b"), "spec.model.source"),
    "claim and size": (
        with_value(MINIMAL, "spec.workspace", {"claimName": "mine", "size": "1Gi"}),
        "set either claimName, or size, storageClassName and accessModes",
    ),
    "claim of the user deleted": (
        with_value(
            with_value(MINIMAL, "spec.workspace", {"claimName": "mine", "retain": False}),
            "spec.output.destination",
            "pvc://a/b",
        ),
        "it cannot be combined with claimName",
    ),
    "adapter deleted with the job": (
        with_value(MINIMAL, "spec.workspace.retain", False),
        "workspace.retain: false would delete the adapter",
    ),
    "a base sharded over one GPU": (
        with_value(MINIMAL, "spec.training.sharding", "full"),
        "set resources.gpus or resources.nodes to 2 or more",
    ),
    "no nodes": (with_value(MINIMAL, "spec.resources.nodes", 0), "spec.resources.nodes"),
    "too many nodes": (with_value(MINIMAL, "spec.resources.nodes", 65), "spec.resources.nodes"),
    "a base sharded and merged": (
        with_value(SHARDED, "spec.output.merged", {}),
        "output.merged needs the whole base",
    ),
    "a base sharded and steps repeated": (
        with_value(SHARDED, "spec.training.autoMicroBatch", True),
        "training.autoMicroBatch repeats a step",
    ),
    "a gate without rows": (
        with_value(MINIMAL, "spec.gate", {"minImprovement": 0.1}),
        "gate is decided on held-out rows: set dataset.eval",
    ),
    "a gate of nothing": (
        with_value(EVALUATED, "spec.gate", {}),
        "set at least one of minImprovement, maxEvalLoss, minScore and score",
    ),
    "a score of more than all": (with_value(SCORED, "spec.gate.minScore", 1.5), "spec.gate.minScore"),
    "a lowest score of nothing": (without(SCORED, "spec.gate.score"), "minScore needs score"),
    "a check without its schema": (without(SCORED, "spec.gate.score.schema"), "check jsonSchema needs schema"),
    "a pattern for a schema": (with_value(SCORED, "spec.gate.score.pattern", "a"), "check regex needs pattern"),
    "checks of rows in no column": (
        without(BY_ROWS, "spec.dataset.columns"),
        "name the column in dataset.columns.check",
    ),
    "checks of rows in some sources": (mixed_by_rows(FRACTION, True, False), "in the columns of each source"),
    "checks of held-out rows in no column": (mixed_by_rows(HELD_OUT, False, True), "in the columns of each source"),
    "checks of rows beside one for all": (
        with_value(BY_ROWS, "spec.gate.score.pattern", "a"),
        "dataset.columns.check is for a gate.score whose check is regex or jsonSchema",
    ),
    "a score of rows without prompts": (
        with_value(SCORED, "spec.training.trainOn", "all"),
        "gate.score answers the prompts of held-out rows",
    ),
    "a base sharded and scored": (
        with_value(with_value(SCORED, "spec.training.sharding", "full"), "spec.resources.gpus", 2),
        "gate.score needs the whole base",
    ),
    "bad quantity": (with_value(MINIMAL, "spec.resources.memory", "much"), "spec.resources.memory"),
    "bad sha256": (with_value(MINIMAL, "spec.dataset.sha256", "abc"), "spec.dataset.sha256"),
    "namespace in a reference": (
        with_value(MINIMAL, "spec.model.tokenSecretRef", {"name": "a", "namespace": "kube-system"}),
        'unknown field "spec.model.tokenSecretRef.namespace"',
    ),
    "nothing of a quantity": (with_value(MINIMAL, "spec.workspace.size", "0Gi"), "spec.workspace.size"),
    "a claim that no object can be called": (
        with_value(MINIMAL, "spec.workspace.claimName", "My_Claim"),
        "spec.workspace.claimName",
    ),
    "a secret elsewhere": (
        with_value(MINIMAL, "spec.model.tokenSecretRef", {"name": "../../kube-system/secrets/a"}),
        "spec.model.tokenSecretRef.name",
    ),
    "one pod and many": (
        with_value(MINIMAL, "spec.workspace.accessModes", ["ReadWriteOncePod", "ReadWriteMany"]),
        "ReadWriteOncePod cannot be combined with another",
    ),
    "priority of the cluster's own": (
        with_value(MINIMAL, "spec.scheduling.priorityClassName", "system-node-critical"),
        "classes that begin with system- are reserved for the cluster",
    ),
    "label key with a space": (
        with_value(MINIMAL, "spec.scheduling.nodeSelector", {"a b": "v"}),
        "a label key is NAME or PREFIX/NAME",
    ),
    "label value with a slash": (
        with_value(MINIMAL, "spec.scheduling.nodeSelector", {"zone": "a/b"}),
        "spec.scheduling.nodeSelector",
    ),
    "toleration of nothing": (
        with_value(MINIMAL, "spec.scheduling.tolerations", [{"effect": "NoSchedule"}]),
        "a toleration without a key needs operator: Exists",
    ),
    "toleration of any value with a value": (
        with_value(MINIMAL, "spec.scheduling.tolerations", [{"key": "a", "operator": "Exists", "value": "b"}]),
        "operator: Exists takes no value",
    ),
    "toleration with pointless seconds": (
        with_value(MINIMAL, "spec.scheduling.tolerations", [{"key": "a", "tolerationSeconds": 5}]),
        "tolerationSeconds needs effect: NoExecute",
    ),
    "long label key": (
        with_value(MINIMAL, "spec.scheduling.nodeSelector", {"k" * 400: "v"}),
        "a label key has at most 317 characters",
    ),
}


@pytest.mark.parametrize(("manifest", "message"), REJECTED.values(), ids=REJECTED)
def test_a_bad_manifest_is_rejected_with_the_field_named(plane: ControlPlane, manifest: Manifest, message: str) -> None:
    with pytest.raises(ClusterError) as rejection:
        apply(plane, manifest)
    assert message in str(rejection.value)


# The server coerces nothing, pydantic some; both must reject these, so that `qlora run` and `kubectl apply` agree.
@pytest.mark.parametrize("manifest", [manifest for manifest, _ in REJECTED.values()], ids=REJECTED)
def test_the_models_reject_what_the_server_rejects(manifest: Manifest) -> None:
    with pytest.raises(ValidationError):
        QLoRAJobDocument.model_validate(manifest)


CHANGES = {
    "model": with_value(FULL, "spec.model.revision", "v2.0"),
    "dataset": with_value(FULL, "spec.dataset.maxRows", 1001),
    "quantization": with_value(FULL, "spec.quantization.type", "fp4"),
    "lora": with_value(FULL, "spec.lora.rank", 8),
    "training": with_value(FULL, "spec.training.seed", 8),
    "training removed": without(FULL, "spec.training"),
    "output": without(with_value(FULL, "spec.workspace.retain", True), "spec.output"),
    "workspace": with_value(FULL, "spec.workspace.size", "200Gi"),
    "resources": without(FULL, "spec.resources.gpuMemory"),
    "scheduling": with_value(FULL, "spec.scheduling.profile", "small"),
    "cpu": with_value(FULL, "spec.resources.cpu", "3"),
    "nodes": with_value(FULL, "spec.resources.nodes", 3),
    "queue": with_value(FULL, "spec.scheduling.queueName", "gpus"),
    "another run to continue": with_value(FULL, "spec.continues", "other"),
    "no run to continue": without(FULL, "spec.continues"),
    "group": with_value(FULL, "spec.group", {"name": "rates", "size": 4}),
    "optional field added": with_value(FULL, "spec.dataset.columns.system", "role"),
}


@pytest.fixture(scope="module")
def created(plane: ControlPlane) -> None:
    apply(plane, FULL, dry_run=False)


@pytest.mark.usefixtures("created")
@pytest.mark.parametrize("manifest", CHANGES.values(), ids=CHANGES)
def test_a_change_of_a_created_job_is_rejected_with_what_to_do(plane: ControlPlane, manifest: Manifest) -> None:
    with pytest.raises(ClusterError, match=r"spec\.[\w.]+ cannot be changed once the job exists: delete the QLoRAJob"):
        apply(plane, manifest)


@pytest.mark.usefixtures("created")
@pytest.mark.parametrize(
    "manifest",
    [
        with_value(FULL, "spec.suspend", False),
        with_value(FULL, "spec.activeDeadlineSeconds", 60),
        without(FULL, "spec.activeDeadlineSeconds"),
        with_value(FULL, "spec.budget.gpuHours", 40),
        without(FULL, "spec.budget"),
        with_value(FULL, "spec.cleanupAfterSeconds", 60),
        with_value(FULL, "spec.progressDeadlineSeconds", 60),
        with_value(FULL, "spec.retry.request", 1),
        with_value(FULL, "spec.retry.maxFailures", 2),
        with_value(FULL, "spec.resources.memory", "99Gi"),
        with_value(FULL, "spec.gate", {"minImprovement": 0.05}),
        without(FULL, "spec.gate"),
        without(FULL, "spec.retry"),
        with_value(FULL, "metadata.labels", {"team": "a"}),
    ],
    ids=[
        "suspend",
        "deadline",
        "deadline removed",
        "budget",
        "budget removed",
        "cleanup",
        "progress deadline",
        "request",
        "retries",
        "memory",
        "gate",
        "gate removed",
        "retry removed",
        "labels",
    ],
)
def test_what_may_change_may_change(plane: ControlPlane, manifest: Manifest) -> None:
    changed = apply(plane, manifest)
    for field in (
        "suspend",
        "budget",
        "activeDeadlineSeconds",
        "cleanupAfterSeconds",
        "progressDeadlineSeconds",
        "gate",
    ):
        assert changed["spec"].get(field) == manifest["spec"].get(field)
    assert (manifest["spec"].get("retry") or {}).items() <= changed["spec"]["retry"].items()
    assert changed["spec"]["resources"]["memory"] == manifest["spec"]["resources"]["memory"]


def test_the_limit_of_a_score_may_change_and_what_is_scored_may_not(plane: ControlPlane) -> None:
    scored = with_value(with_value(SCORED, "metadata.name", "scored"), "spec.model.source", "hf://org/other")
    apply(plane, scored, dry_run=False)
    assert apply(plane, with_value(scored, "spec.gate.minScore", 0.5))["spec"]["gate"]["minScore"] == 0.5
    for manifest in (with_value(scored, "spec.gate.score.rows", 20), without(scored, "spec.gate")):
        with pytest.raises(ClusterError, match=r"spec\.gate\.score cannot be changed once the job exists, as training"):
            apply(plane, manifest)


def test_a_merged_model_that_would_be_deleted_with_its_job_is_rejected(plane: ControlPlane) -> None:
    lost = with_value(FULL, "metadata.name", "lost")
    lost["spec"] |= {"workspace": {"retain": False}, "output": {"destination": "hf://org/adapter", "merged": {}}}
    with pytest.raises(ClusterError, match=r"set output\.merged\.destination, or retain: true"):
        apply(plane, lost)
    kept = with_value(lost, "spec.output.merged.destination", "hf://org/merged")
    apply(plane, kept)


@pytest.mark.usefixtures("created")
def test_a_job_that_no_operator_has_seen_reads_as_in_progress(plane: ControlPlane) -> None:
    job = plane.kubectl.get("qj", "full")
    assert job["status"]["observedGeneration"] == -1


@pytest.mark.usefixtures("created")
def test_the_server_keeps_what_a_status_says_about_the_base_and_its_cache(plane: ControlPlane) -> None:
    profile = {"image": "trainer", "modelCache": {"claimName": "model-cache"}}
    resolved = {"contractVersion": 1, "profile": profile, "claimName": "c", "claimCreated": True, "workspacePath": "w"}
    base = {"origin": "cache", "bytesFetched": 17, "seconds": 3, "message": "the cache was damaged"}
    for field, value in (("base", base), ("resolved", resolved)):
        patch = json.dumps({"status": {field: value}})
        flags = ("--subresource=status", "--type=merge", "--dry-run=server", "--output=json")
        patched = json.loads(plane.kubectl("patch", "qlorajob", "full", *flags, f"--patch={patch}"))
        assert patched["status"][field] == value
    wrong = json.dumps({"status": {"base": base | {"origin": "elsewhere"}}})
    with pytest.raises(ClusterError, match=r"status\.base\.origin: Unsupported value"):
        plane.kubectl("patch", "qlorajob", "full", "--subresource=status", "--type=merge", f"--patch={wrong}")


@pytest.mark.usefixtures("created")
def test_jobs_can_be_selected_by_model(plane: ControlPlane) -> None:
    found = plane.kubectl.get("qlorajobs", "--field-selector=spec.model.source=hf://org/model")
    assert [item["metadata"]["name"] for item in found["items"]] == ["full"]


def test_kubectl_explain_reads_like_documentation(plane: ControlPlane) -> None:
    section = plane.kubectl("explain", "qlorajob.spec.training")
    assert "gradientAccumulationSteps\t<integer>" in section
    assert "Micro batches in one optimizer step. Costs no memory." in section
    assert "1e-4 is advised above 13B" in plane.kubectl("explain", "qlorajob.spec.training.learningRate")


def test_kubectl_explain_has_the_defaults_and_no_line_breaks_of_the_source(plane: ControlPlane) -> None:
    assert "Default: 0.0002." in plane.kubectl("explain", "qlorajob.spec.training.learningRate")
    assert "Default" not in plane.kubectl("explain", "qlorajob.spec.training.epochs")
    described = plane.kubectl("explain", "qlorajob.status.conditions").partition("FIELDS:")[0]
    paragraph = described.partition("Types: ")[2].strip()
    assert " ".join(paragraph.split()).endswith("Stalled (for tools that wait), CleanedUp, Announced.")
    assert len(paragraph.splitlines()) == 3, paragraph
