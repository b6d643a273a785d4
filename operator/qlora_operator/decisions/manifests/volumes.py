"""Decides which volumes a step's pod mounts, where, and whether read-only."""

from collections.abc import Iterable, Sequence
from typing import Any

from qlora_api import contract
from qlora_api.naming import SPEC_ANNOTATION, other_spec_annotation
from qlora_api.profile import Profile, SigningKey
from qlora_api.sources import SCHEMES, ConfigMapSource, VolumeSource, parse_source, scheme_of
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.model import SecretRef
from qlora_api.status import ContinuedRun, StepName
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason

Manifest = dict[str, Any]
_WORKSPACE = "workspace"
_MODEL_CACHE = "model-cache"
_CONTINUED = "continued"
_BENCHMARKS = "benchmarks"
_TEMPORARY_SIZE = "4Gi"
# Processes on several GPUs exchange data through it (NCCL); runtimes give a container 64 MiB. Counts as memory.
_SHARED_MEMORY_SIZE = "1Gi"
_SECRET_MODE = 0o440
# The keys of the Secret for the servers of trackers. None is needed: a run that cannot be uploaded must not hold back
# its adapter.
_TRACKER_KEYS = {
    "mlflow": ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "wandb": ("WANDB_API_KEY",),
}


def mounts_and_volumes(
    job: QLoRAJob,
    workspace_claim: str,
    profile: Profile,
    step: StepName,
    continued: ContinuedRun | None = None,
    others: Sequence[str] = (),
) -> tuple[list[Manifest], list[Manifest]]:
    """Return `volumeMounts` of the trainer and `volumes` of the pod, each volume once.

    Every step mounts the workspace, the job's manifest and a small folder for temporary files. In addition, prepare
    reads the model, the data, an earlier adapter and their secrets, and the folder of the run that the job continues,
    and checks the destination with its secret; train reads the model; publish reads the model, writes to the
    destination and reads its secret, those of trackers, if they exist, and the profile's signing key. Prepare and train
    read the profile's tasks for benchmarks. Any other Secret or ConfigMap that does not exist yet keeps the pod
    waiting, which costs no retry. Only prepare may write to the cache of models. `others`: the names of the jobs that
    train trains too, whose manifests are mounted with the job's.
    """
    mounts = [
        _mount("job", str(contract.JOB_FILE.parent), read_only=True),
        _mount(_WORKSPACE, str(contract.WORKSPACE_MOUNT)),
        _mount("tmp", "/tmp"),  # noqa: S108 - a volume of the pod's own
    ]
    volumes = [
        {"name": "job", "downwardAPI": {"items": [_document_file(), *map(_other_document_file, others)]}},
        {"name": _WORKSPACE, "persistentVolumeClaim": {"claimName": workspace_claim}},
        {"name": "tmp", "emptyDir": {"sizeLimit": _TEMPORARY_SIZE}},
    ]
    if step == "train" and job.spec.resources.gpus > 1:
        mounts.append(_mount("shared-memory", "/dev/shm"))  # noqa: S108 - a volume of the pod's own
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY_SIZE}})
    for number, (claim, writable) in enumerate(sorted(_claims(job.spec, step).items())):
        name = _WORKSPACE if claim == workspace_claim else f"claim-{number}"
        mounts.append(_mount(name, str(contract.VOLUMES_MOUNT / claim), read_only=not writable))
        if name != _WORKSPACE:
            volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim}})
    if (cache := profile.model_cache) is not None and uses_cache(job.spec, step):
        mounts.append(_mount(_MODEL_CACHE, str(contract.MODEL_CACHE_MOUNT), read_only=step != "prepare"))
        volumes.append({"name": _MODEL_CACHE, "persistentVolumeClaim": {"claimName": cache.claim_name}})
    if (evaluation := profile.evaluation) is not None and uses_benchmarks(job.spec, step):
        mounts.append(_mount(_BENCHMARKS, str(contract.BENCHMARKS_MOUNT), read_only=True))
        volumes.append({"name": _BENCHMARKS, "persistentVolumeClaim": {"claimName": evaluation.claim_name}})
    if step == "prepare":
        _add_continued(continued, mounts, volumes)
        _add_config_maps(job.spec, mounts, volumes)
        _add_token(job.spec, mounts, volumes)
    _add_credentials(job.spec, step, mounts, volumes)
    if step == "publish":
        _add_tracking(job.spec, mounts, volumes)
        _add_signing_key(profile.signing_key, mounts, volumes)
    return mounts, volumes


def uses_cache(spec: QLoRAJobSpec, step: StepName) -> bool:
    """Whether the step reads a base from the cache for all jobs.

    That cannot hold a model on a volume.
    """
    return step != "clean" and not isinstance(parse_source(spec.model.source), VolumeSource)


def uses_benchmarks(spec: QLoRAJobSpec, step: StepName) -> bool:
    """Whether the step reads the tasks of benchmarks: prepare checks them, train runs them."""
    return bool(spec.benchmarks) and step in ("prepare", "train")


def reserved_claim(spec: QLoRAJobSpec, profiles: Iterable[Profile]) -> Reason | None:
    """Return why the job must not start: it names the cache's claim of any profile.

    It could write there what other jobs load, or read a model that its token does not open.
    """
    reserved = reserved_claims(profiles)
    named, initial = {"spec.workspace.claimName": spec.workspace.claim_name}, spec.lora.initial_adapter
    for field, uri in {
        "spec.model.source": spec.model.source,
        **({} if initial is None else {"spec.lora.from.source": initial.source}),
        **spec.data_addresses,
        **{f"spec.output.{field}": address for field, address in spec.output.destinations.items()},
    }.items():
        source = parse_source(uri)
        named[field] = source.claim if isinstance(source, VolumeSource) else None
    for field, claim in named.items():
        if claim in reserved:
            return claim_not_allowed(field, claim)
    return None


def reserved_claims(profiles: Iterable[Profile]) -> set[str]:
    """Return the claims of the profiles' model caches."""
    return {profile.model_cache.claim_name for profile in profiles if profile.model_cache is not None}


def reserved_secret(spec: QLoRAJobSpec, profiles: Iterable[Profile]) -> Reason | None:
    """Return why the job must not start: it names a Secret that any profile uses.

    A step would send the signing key, or the proxy's password, to a server as if it were a token, and publish would
    write with the account that only pulls images.
    """
    reserved: dict[str, str] = {}
    for profile in profiles:
        pulls = "with which a profile pulls images (imagePullSecrets)"
        reserved |= dict.fromkeys(profile.image_pull_secrets, pulls)
        if profile.proxy_secret_name is not None:
            reserved[profile.proxy_secret_name] = "by which a profile uses its proxy (proxySecretName)"
        if profile.signing_key is not None:
            reserved[profile.signing_key.name] = "with which a profile signs adapters (signingKey)"
    initial, tracking = spec.lora.initial_adapter, spec.output.tracking
    named = {
        "spec.model.tokenSecretRef": spec.model.token_secret_ref,
        "spec.model.secretRef": spec.model.secret_ref,
        "spec.dataset.secretRef": spec.dataset.secret_ref,
        "spec.lora.from.secretRef": initial.secret_ref if initial else None,
        "spec.output.secretRef": spec.output.secret_ref,
        "spec.output.tracking.secretRef": tracking.secret_ref if tracking else None,
    }
    for field, reference in named.items():
        if reference is not None and reference.name in reserved:
            return Reason(
                "SecretNotAllowed",
                f"{field} names the Secret {reference.name!r}, {reserved[reference.name]}: create the job again with "
                "another Secret",
            )
    return None


def claim_not_allowed(field: str, claim: str) -> Reason:
    """Why a job must not start whose field names a claim of a cache."""
    return Reason(
        "ClaimNotAllowed",
        f"{field} names the claim {claim!r}, on which a profile caches models (modelCache): create the job again with "
        "another claim",
    )


def _claims(spec: QLoRAJobSpec, step: StepName) -> dict[str, bool]:
    """The claims besides the workspace that a step mounts, and whether it may write."""
    if step == "clean":
        return {}
    data = spec.data_addresses.values()
    read = [spec.model.source, *((*data, *_initial_adapter(spec)) if step == "prepare" else ())]
    sources = (parse_source(uri) for uri in read)
    claims = {source.claim: False for source in sources if isinstance(source, VolumeSource)}
    for destination in (parse_source(uri) for uri in spec.output.destinations.values()):
        if isinstance(destination, VolumeSource) and step in ("prepare", "publish"):
            claims[destination.claim] = step == "publish"
    return claims


def _initial_adapter(spec: QLoRAJobSpec) -> list[str]:
    return [spec.lora.initial_adapter.source] if spec.lora.initial_adapter else []


def _add_continued(continued: ContinuedRun | None, mounts: list[Manifest], volumes: list[Manifest]) -> None:
    """Mount the other job's folder only.

    Its claim may be one that the pod mounts already.
    """
    if continued is None:
        return
    claims = {volume["persistentVolumeClaim"]["claimName"]: volume["name"] for volume in volumes if _is_claim(volume)}
    name = claims.get(continued.claim_name, _CONTINUED)
    mounts.append(_mount(name, str(contract.CONTINUED_MOUNT), read_only=True) | {"subPath": continued.workspace_path})
    if name == _CONTINUED:
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": continued.claim_name}})


def _is_claim(volume: Manifest) -> bool:
    return "persistentVolumeClaim" in volume


def _add_config_maps(spec: QLoRAJobSpec, mounts: list[Manifest], volumes: list[Manifest]) -> None:
    template = spec.dataset.template_address
    addresses = (*spec.data_addresses.values(), *([template] if template else ()))
    sources = (parse_source(uri) for uri in addresses)
    wanted = sorted({(source.name, source.key) for source in sources if isinstance(source, ConfigMapSource)})
    for number, name in enumerate(dict.fromkeys(name for name, _ in wanted)):
        volume, items = f"config-map-{number}", [{"key": key, "path": key} for owner, key in wanted if owner == name]
        mounts.append(_mount(volume, str(contract.CONFIG_MAPS_MOUNT / name), read_only=True))
        volumes.append({"name": volume, "configMap": {"name": name, "items": items}})


def _add_token(spec: QLoRAJobSpec, mounts: list[Manifest], volumes: list[Manifest]) -> None:
    reference = spec.model.token_secret_ref
    if reference is None:
        return
    mounts.append(_mount("token", str(contract.TOKEN_FILE.parent), read_only=True))
    items = [{"key": reference.key, "path": contract.TOKEN_FILE.name}]
    secret = {"secretName": reference.name, "items": items, "defaultMode": _SECRET_MODE}
    volumes.append({"name": "token", "secret": secret})


def _add_credentials(spec: QLoRAJobSpec, step: StepName, mounts: list[Manifest], volumes: list[Manifest]) -> None:
    wanted: list[tuple[str, SecretRef | None, list[str]]] = []
    initial = spec.lora.initial_adapter
    if step == "prepare":
        wanted += [
            ("model", spec.model.secret_ref, [spec.model.source]),
            ("dataset", spec.dataset.secret_ref, list(spec.data_addresses.values())),
            ("lora", initial.secret_ref if initial else None, _initial_adapter(spec)),
        ]
    if step in ("prepare", "publish"):
        wanted += [("output", spec.output.secret_ref, list(spec.output.destinations.values()))]
    for part, reference, addresses in wanted:
        if reference is not None:
            volume = f"{part}-credentials"
            mounts.append(_mount(volume, str(contract.CREDENTIALS_MOUNT / part), read_only=True))
            volumes.append(_credentials(volume, reference.name, {scheme_of(uri) for uri in addresses}))


def _add_tracking(spec: QLoRAJobSpec, mounts: list[Manifest], volumes: list[Manifest]) -> None:
    reference = spec.output.tracking.secret_ref if spec.output.tracking else None
    if reference is None:
        return
    keys = [key for tracker in spec.training.report_to for key in _TRACKER_KEYS.get(tracker, ())]
    # A source for each key, as one that the Secret lacks would keep the others away too.
    sources = [
        {"secret": {"name": reference.name, "optional": True, "items": [{"key": key, "path": key}]}} for key in keys
    ]
    mounts.append(_mount("tracking-credentials", str(contract.CREDENTIALS_MOUNT / "tracking"), read_only=True))
    volumes.append({"name": "tracking-credentials", "projected": {"defaultMode": _SECRET_MODE, "sources": sources}})


def _add_signing_key(key: SigningKey | None, mounts: list[Manifest], volumes: list[Manifest]) -> None:
    if key is None:
        return
    mounts.append(_mount("signing-key", str(contract.SIGNING_KEY_FILE.parent), read_only=True))
    items = [{"key": key.key, "path": contract.SIGNING_KEY_FILE.name}]
    secret = {"secretName": key.name, "items": items, "defaultMode": _SECRET_MODE}
    volumes.append({"name": "signing-key", "secret": secret})


def _credentials(volume: str, name: str, schemes: set[str]) -> Manifest:
    """Build the volume with the keys of a Secret that these schemes need or may need."""

    def source(keys: Iterable[tuple[str, ...]]) -> Manifest:
        names = sorted({key for of_scheme in keys for key in of_scheme})
        return {"name": name, "items": [{"key": key, "path": key} for key in names]}

    declared = [SCHEMES[scheme] for scheme in schemes if scheme in SCHEMES]
    needed = source(scheme.secret_keys for scheme in declared)
    possible = source(scheme.optional_secret_keys for scheme in declared)
    sources: list[Manifest] = [{"secret": needed}] if needed["items"] else []
    if possible["items"]:
        sources.append({"secret": possible | {"optional": True}})
    return {"name": volume, "projected": {"defaultMode": _SECRET_MODE, "sources": sources}}


def _document_file() -> Manifest:
    return {
        "path": contract.JOB_FILE.name,
        "fieldRef": {"fieldPath": f"metadata.annotations['{SPEC_ANNOTATION}']"},
    }


def _other_document_file(name: str) -> Manifest:
    return {
        "path": f"{contract.OTHER_JOBS.name}/{name}.json",
        "fieldRef": {"fieldPath": f"metadata.annotations['{other_spec_annotation(name)}']"},
    }


def _mount(volume: str, path: str, *, read_only: bool = False) -> Manifest:
    mount: Manifest = {"name": volume, "mountPath": path}
    return mount | ({"readOnly": True} if read_only else {})
