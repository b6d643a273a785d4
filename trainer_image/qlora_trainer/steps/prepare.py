"""The step `prepare`: finds and checks the model and the data, and lays them out in the workspace.

Checks that are cheap and often fail come first: the destinations, the model's configuration, the GPU's memory, the
data. The weights come last. Incomplete content is in folders named `.NAME.partial`. The next attempt resumes from
them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import Literal

from qlora_api.artifact_status import BaseStatus, InitialAdapterStatus
from qlora_api.contract import ModelCacheLayout, WorkspaceLayout
from qlora_api.spec.model import SecretKeyRef
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.completion import PreparedBase, PrepareRecord, read_completion, recorded_path, write_completion
from qlora_trainer.core.context import Identity, StepContext, base_name
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import is_full, partial_path, remove, remove_partials, sizes
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.data.render.template_source import job_template
from qlora_trainer.evaluation.scorable import require_readable
from qlora_trainer.model.adapter.initial import InitialAdapter, get_initial_adapter
from qlora_trainer.model.base.cache import ModelCache
from qlora_trainer.model.base.cached_base import open_base_source
from qlora_trainer.model.base.workspace_base import Base, BaseSource
from qlora_trainer.model.source.downloads import open_model_source
from qlora_trainer.model.source.models import SharedModel
from qlora_trainer.publishing.destinations.addresses import check_destination
from qlora_trainer.publishing.manifest import SHARED_BASE, Publisher, base_publisher
from qlora_trainer.steps.prepare_checks import refresh_record
from qlora_trainer.steps.prepare_data import build_dataset, rows_folder, write_sequences
from qlora_trainer.steps.prepare_model import AdmittedModel, check_settings, measure_memory
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.hub import Hub, hub_token
from qlora_trainer.training.checkpoints.fingerprint import run_settings
from qlora_trainer.training.continued import continue_run, reject_other_settings, require_something_to_continue
from qlora_trainer.training.prepared_job import PreparedJob


def prepare(
    context: StepContext, records: RecordWriter, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> PrepareRecord:
    """Lay out model and data in the workspace and write the completion record. Returns early if it still holds.

    Raises StepFailure. After a failure that another attempt cannot fix, nothing is left in the workspace that was not
    there before, but for a base whose destination turns out to hold another one, or if the run to continue turns out
    to be another one; after any other, what has been downloaded and tokenized stays and the next attempt resumes from
    it.
    """
    spec, workspace, mounts, identity = context.spec, context.workspace, context.mounts, context.identity

    def say(activity: str) -> None:
        records.progress(identity.progress("prepare", now(), activity))

    path, gpus = workspace.completion("prepare"), spec.resources.gpu_count
    written = read_completion(path, PrepareRecord)
    if written is None and spec.continues is not None:
        require_something_to_continue(mounts.continued, spec.continues)
        reject_other_settings(mounts.continued, spec.continues, run_settings(spec, context.device, gpus))
    secret = context.secret("output") if context.contract_version > 1 else None
    check = partial(check_destination, mounts=mounts, secret=secret, registries=context.registries)
    record = None
    if written is not None:
        record = refresh_record(written, spec, workspace, mounts, context.group_size, records)
    if record is None:
        with _leaving_what_can_be_resumed(workspace):
            for field, address in spec.output.destinations.items():
                check(address, publisher=Publisher(SHARED_BASE if field == "base.destination" else identity.job_uid))
            record = _prepare(context, records, say, now, None if written is None else written.initial_adapter)
    if spec.output.base is not None:
        publisher = base_publisher(record.base_sha256, workspace.root / record.model_path)
        check(spec.output.base.destination, publisher=publisher)
    if spec.continues is not None:
        say(f"copying the checkpoint of {spec.continues}")
        job = PreparedJob.from_record(context, record, gpus)
        record = _continue_run(job, mounts.continued, spec.continues, written)
    if record != written:
        write_completion(path, record)
    records.note(model_revision=record.model_revision, memory=record.memory, dataset=record.dataset)
    return record


def _continue_run(job: PreparedJob, source: Path, name: str, written: PrepareRecord | None) -> PrepareRecord:
    """Copy the checkpoint of the job of that name from `source`; the record has the step from which it continues.

    `written` is the record of an attempt before this one, which may have copied it.
    """
    copied, record = continue_run(source, name, job), job.prepared
    earlier_step = None if written is None else written.continued_step
    step = earlier_step if copied is None else copied
    if step is None or step == record.continued_step:
        return record
    earlier = f"continues {name} from step "
    remarks = (remark for remark in record.remarks if not remark.startswith(earlier))
    return record.model_copy(update={"remarks": (*remarks, f"{earlier}{step}"), "continued_step": step})


def _prepare(
    context: StepContext,
    records: RecordWriter,
    say: Callable[[str], None],
    now: Callable[[], datetime],
    earlier_adapter: InitialAdapterStatus | None,
) -> PrepareRecord:
    """Prepare model and data in stages, each of which returns its part of the record."""
    spec, workspace, mounts = context.spec, context.workspace, context.mounts
    hub = cache(lambda: _open_hub(spec.model.token_secret_ref, mounts.token_file))

    def access(part: Literal["model", "dataset", "lora"]) -> StoreAccess:
        return StoreAccess(mounts, hub, context.secret(part), context.registries)

    require_readable(spec.gate)
    say("reading the model's configuration")
    source = open_model_source(spec.model, access("model"), workspace.models)
    started = now()
    folder = source.settings()
    fetching = now() - started
    template = job_template(spec.dataset, mounts)
    checked = check_settings(folder, spec, workspace.root / "gguf")
    say("measuring the memory that training needs")
    memory = measure_memory(folder, spec, checked.family, context.group_size)
    records.note(memory=memory.status)
    model = AdmittedModel.from_folder(folder, spec, checked, memory, template)
    model_cache = _model_cache(mounts.model_cache, context.identity)
    bases = open_base_source(source, model.layout, folder, workspace.base, model_cache)
    bases.require_room()

    target = workspace.initial_adapter
    initial = _initial_adapter(spec.lora, access("lora"), target, model, earlier_adapter, say)
    rows = rows_folder(workspace.data, mounts.sweep, context.identity)
    dataset = build_dataset(spec, model, access("dataset"), workspace.data, rows, say)
    records.note(dataset=dataset.status())
    sequences = write_sequences(dataset, spec, model, workspace.data, say)

    started = now()
    base = bases.base(lambda done, total: say(f"{bases.activity} model {sizes(done, total)}"))
    fetching += now() - started

    data = sequences.complete(spec, model, base.revision, workspace)
    of_adapter = () if initial is None else _complete_adapter(initial, base_name(spec.model), base.revision)
    return PrepareRecord(
        **dict(model.record()),
        **dict(_base_record(bases, base, source, fetching, workspace.root)),
        **dict(data),
        remarks=(*checked.remarks, *sequences.remarks, *of_adapter),
        initial_adapter=None if initial is None else initial.status,
    )


def _initial_adapter(
    lora: LoraSpec,
    access: StoreAccess,
    target: Path,
    model: AdmittedModel,
    earlier: InitialAdapterStatus | None,
    say: Callable[[str], None],
) -> InitialAdapter | None:
    """Fetch and check the adapter of spec.lora.from.

    `earlier` is the adapter that an earlier attempt has fetched.
    """
    if lora.initial_adapter is None:
        return None
    say("fetching and checking the adapter of spec.lora.from")
    return get_initial_adapter(lora, access, target, model.folder, model.checked.family.target_modules, earlier)


def _complete_adapter(initial: InitialAdapter, name: str, revision: str) -> tuple[str, ...]:
    """Complete the adapter's folder, and return remarks on its base."""
    initial.complete()
    remark = initial.remark(name, revision)
    return () if remark is None else (remark,)


def _model_cache(folder: Path | None, identity: Identity) -> ModelCache | None:
    return None if folder is None else ModelCache(ModelCacheLayout(folder), identity.job_uid, identity.pod_uid)


def _base_record(bases: BaseSource, base: Base, source: SharedModel, fetching: timedelta, root: Path) -> PreparedBase:
    """Complete the model's folder, and return the base's part of the completion record.

    `fetching` is the time in which the model arrived; `root` is the workspace folder.
    """
    return PreparedBase(
        model_path=recorded_path(source.complete(), root),
        model_revision=base.revision,
        base_path=recorded_path(base.folder, root),
        base_sha256=base.manifest.sha256,
        base=BaseStatus(
            origin=bases.origin,
            sha256=base.manifest.sha256,
            bytes_fetched=source.bytes_fetched,
            seconds=max(0, round(fetching.total_seconds())),
            message=bases.remark,
        ),
    )


def _open_hub(reference: SecretKeyRef | None, token_file: Path) -> Hub:
    secret = None if reference is None else f"Secret {reference.name!r} with key {reference.key!r}"
    return Hub(hub_token(token_file, secret))


@contextmanager
def _leaving_what_can_be_resumed(workspace: WorkspaceLayout) -> Iterator[None]:
    """Delete the incomplete folders that no attempt will resume from.

    When the body ends or raises.
    """
    try:
        yield
    except StepFailure as failure:
        if failure.exit_code.permanent:
            _discard_partials(workspace.models)
            _discard_partials(workspace.data)
            remove(partial_path(workspace.base))
            remove(partial_path(workspace.initial_adapter))
        raise
    except OSError as error:
        if is_full(error):
            _discard_partials(workspace.data)
        raise
    _discard_partials(workspace.data)


def _discard_partials(folder: Path) -> None:
    """Delete incomplete files in the folder, and then the folder itself if empty."""
    remove_partials(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
