"""Checks each profile: its fields, its image, the GPUs of its nodes, and its volumes; pure."""

from collections.abc import Iterator, Sequence

from pydantic import ValidationError

from qlora_api.gpus import gpu_memory_of, why_unfit
from qlora_api.kubernetes_values import gibibytes
from qlora_api.profile import Profile
from qlora_client.doctor.facts import (
    Check,
    Facts,
    NamedProfile,
    Object,
    Unknown,
    Verdict,
    has_labels,
    profiles_of,
    untolerated,
)

_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
# Of the large clouds and of nodes' disks: their volumes are attached to one node at a time.
_ONE_NODE = (
    "disk.csi.azure.com",
    "ebs.csi.aws.com",
    "kubernetes.io/aws-ebs",
    "kubernetes.io/azure-disk",
    "kubernetes.io/gce-pd",
    "kubernetes.io/no-provisioner",
    "pd.csi.storage.gke.io",
    "rancher.io/local-path",
)
_CPU_FEATURE, _BFLOAT16 = "feature.node.kubernetes.io/cpu-cpuid.", ("AVX512BF16", "AMXBF16")


def check_profiles(facts: Facts) -> list[Check]:
    """The checks of every profile that is known."""
    if profiles := profiles_of(facts):
        return [check for profile in profiles for check in _check_profile(profile, facts)]
    if isinstance(facts.profiles, Unknown):
        return [Check("Profiles", "unknown", f"{facts.profiles.why}; no job here has a copy of one yet")]
    return [Check("Profiles", "problem", "there is no QLoRAProfile: the operator's chart creates one, named default")]


def _check_profile(named: NamedProfile, facts: Facts) -> Iterator[Check]:
    title = f"Profile {named.name}"
    try:
        # A profile in a job's status may have fields of a newer release.
        profile = Profile.model_validate(named.content, extra="ignore")
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"]))
        yield Check(title, "problem", f"QLoRAProfile {named.name}: spec.{field}: {problem['msg']}")
        return
    yield _check_image(title, profile)
    if not _admits(profile, facts):
        yield Check(title, "warning", f"jobs of {facts.namespace} may not use it: ask the administrator to admit it")
    yield _check_nodes(f"{title}: nodes", named.name, profile, facts.nodes)
    yield _check_storage(f"{title}: storage", named.name, profile, facts.storage_classes)
    if profile.runtime_class_name is not None:
        yield _check_runtime(f"{title}: runtime class", profile.runtime_class_name, facts.runtime_classes)


def _admits(profile: Profile, facts: Facts) -> bool:
    """Whether it admits the namespace, also if the namespace's labels are unknown."""
    allowed = profile.allowed_namespaces
    if allowed is None or profile.admits(facts.namespace):
        return True
    if allowed.selector is None or isinstance(facts.own_namespace, Unknown):
        return allowed.selector is not None
    return has_labels(facts.own_namespace["metadata"].get("labels") or {}, allowed.selector.match_labels)


def _check_image(title: str, profile: Profile) -> Check:
    image = profile.image
    name = image.rpartition("/")[2]
    if "@sha256:" in image:
        return Check(title, "ok", f"its image is {image}")
    if ":" not in name or name.endswith(":latest"):
        return Check(
            title, "warning", f"its image {image} may change between steps of a job: name a version, or better a digest"
        )
    if image.startswith("localhost/"):
        return Check(
            title,
            "warning",
            f"its image {image} is one that nodes cannot pull: push it to a registry, unless it is loaded on each node",
        )
    return Check(title, "ok", f"its image is {image}")


def _check_nodes(title: str, name: str, profile: Profile, nodes: Sequence[Object] | Unknown) -> Check:
    if isinstance(nodes, Unknown):
        return Check(title, "unknown", nodes.why)
    wanted = dict(profile.node_selector)
    labeled = [node for node in nodes if has_labels(node["metadata"].get("labels") or {}, wanted)]
    if not labeled:
        labels = ", ".join(f"{key}={value}" for key, value in wanted.items()) or "any labels"
        return Check(
            title,
            "warning",
            f"no node has {labels} now: right only if an autoscaler adds some; otherwise label the GPU nodes, or "
            f"change spec.nodeSelector of QLoRAProfile {name}",
        )
    usable = [node for node in labeled if not _unusable(node, profile)]
    if not usable:
        reasons = "; ".join(dict.fromkeys(f"{node['metadata']['name']} {_unusable(node, profile)}" for node in labeled))
        return Check(title, "problem", f"no pod can go to any node of its nodeSelector: {reasons}")
    if profile.gpu_resource is None:
        return _without_gpu(title, name, profile, usable)
    counts = [int((node.get("status") or {}).get("allocatable", {}).get(profile.gpu_resource, 0)) for node in usable]
    if not sum(counts):
        return Check(
            title,
            "problem",
            f"none of its nodes ({len(usable)}) offers {profile.gpu_resource}: install the vendor's device plugin, or "
            f"change spec.gpuResource of QLoRAProfile {name}",
        )
    with_gpus = [count for count in counts if count]
    offering = [node for node, count in zip(usable, counts, strict=True) if count]
    labels_of = {node["metadata"]["name"]: node["metadata"].get("labels") or {} for node in offering}
    if unfit := {node: why for node, found in labels_of.items() if (why := why_unfit(found))}:
        reasons = "; ".join(f"{node} with {why}" for node, why in unfit.items())
        verdict: Verdict = "problem" if len(unfit) == len(offering) else "warning"
        remedy = f"name other nodes in spec.nodeSelector of QLoRAProfile {name}, or upgrade an old driver"
        return Check(title, verdict, f"train cannot use {reasons}: {remedy}")
    if wrong := _wrong_memory(name, profile, offering):
        return Check(title, "warning", wrong)
    nodes_text = f"{len(with_gpus)} node{'s' if len(with_gpus) > 1 else ''}"
    return Check(
        title, "ok", f"{nodes_text} with {sum(counts)} {profile.gpu_resource} in all, and {max(counts)} on the largest"
    )


def _wrong_memory(name: str, profile: Profile, nodes: Sequence[Object]) -> str:
    """Return the remedy if the profile's gpuMemory is above the nodes' labels, or an empty text."""
    found = (gpu_memory_of(node["metadata"].get("labels") or {}, profile.gpu_resource) for node in nodes)
    smallest = min((size for size in found if size is not None), default=None)
    if profile.gpu_memory is not None and smallest is not None and gibibytes(profile.gpu_memory) > smallest:
        wrong = f"spec.gpuMemory of QLoRAProfile {name} is {profile.gpu_memory}, and its smallest GPU has {smallest}Gi"
        return f"{wrong}: set it to that"
    return ""


def _without_gpu(title: str, name: str, profile: Profile, nodes: Sequence[Object]) -> Check:
    if profile.device == "cuda":
        return Check(
            title,
            "warning",
            "it trains on cuda and requests no GPU: set spec.gpuResource, unless its nodes give every pod their GPUs",
        )
    types = ", ".join(dict.fromkeys(map(_compute_type, nodes)))
    return Check(title, "ok", f"it trains on the CPU of {len(nodes)} node{'s' if len(nodes) > 1 else ''}, in {types}")


def _compute_type(node: Object) -> str:
    """Return the type that the node's CPU computes in.

    By Kubernetes' label of the architecture, and those of Node Feature Discovery.
    """
    labels = node["metadata"].get("labels") or {}
    if labels.get("kubernetes.io/arch") == "arm64" or any(labels.get(f"{_CPU_FEATURE}{each}") for each in _BFLOAT16):
        return "bfloat16"
    has_features = any(label.startswith(_CPU_FEATURE) for label in labels)
    return "float32" if has_features else "bfloat16 or, without instructions for it, float32"


def _unusable(node: Object, profile: Profile) -> str:
    """Why no pod of the profile goes to the node; empty if it may."""
    spec = node.get("spec") or {}
    ready = [each for each in (node.get("status") or {}).get("conditions") or () if each["type"] == "Ready"]
    if not ready or ready[0]["status"] != "True":
        return "is not ready"
    if spec.get("unschedulable"):
        return "is cordoned"
    tolerations = [each.dump() for each in profile.tolerations]
    if profile.gpu_resource:
        tolerations.append({"key": profile.gpu_resource, "operator": "Exists"})
    keys = untolerated(spec.get("taints") or (), tolerations)
    return f"has the taint {keys[0]}, which the profile does not tolerate" if keys else ""


def _check_storage(title: str, name: str, profile: Profile, classes: Sequence[Object] | Unknown) -> Check:
    if isinstance(classes, Unknown):
        return Check(title, "unknown", classes.why)
    wanted, mode = profile.workspace.storage_class_name, profile.workspace.access_mode
    if wanted is None:
        found = [each for each in classes if (each["metadata"].get("annotations") or {}).get(_DEFAULT_CLASS) == "true"]
        remedy = f"mark one as the default, or set spec.workspace.storageClassName of QLoRAProfile {name}"
        missing = f"the cluster has no default StorageClass: {remedy}"
    else:
        found = [each for each in classes if each["metadata"]["name"] == wanted]
        missing = f"there is no StorageClass {wanted}: create it, or change spec.workspace.storageClassName of {name}"
    if not found:
        return Check(title, "problem", missing)
    chosen = found[0]
    label = f"the StorageClass {chosen['metadata']['name']}"
    if mode == "ReadWriteMany" and chosen["provisioner"] in _ONE_NODE:
        return Check(
            title,
            "problem",
            f"{label} ({chosen['provisioner']}) has no volumes for several nodes, and the profile asks for {mode}: "
            "name another class",
        )
    if profile.workspace.topology != "shared" and chosen.get("volumeBindingMode") == "Immediate":
        return Check(
            title,
            "warning",
            f"{label} binds volumes before a pod is placed, perhaps where no GPU is: use a class with "
            "volumeBindingMode WaitForFirstConsumer",
        )
    return Check(title, "ok", f"{label} makes its workspaces ({mode}, {profile.workspace.size})")


def _check_runtime(title: str, wanted: str, classes: Sequence[Object] | Unknown) -> Check:
    if isinstance(classes, Unknown):
        return Check(title, "unknown", classes.why)
    if any(each["metadata"]["name"] == wanted for each in classes):
        return Check(title, "ok", f"the RuntimeClass {wanted} exists")
    return Check(title, "problem", f"there is no RuntimeClass {wanted}: create it, or change the profile")
