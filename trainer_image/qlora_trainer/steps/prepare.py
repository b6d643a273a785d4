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
from qlora_api.automatic import Limits
from qlora_api.choice import Choice
from qlora_api.contract import ModelCacheLayout, WorkspaceLayout
from qlora_api.schema import replace
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import fill, open_settings
from qlora_trainer.core.completion import (
    PreparedBase,
    PrepareRecord,
    asked_sha256,
    read_completion,
    recorded_path,
    write_completion,
)
from qlora_trainer.core.context import StepContext, base_name
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import is_full, partial_path, remove, remove_partials, sizes
from qlora_trainer.core.paths import confine
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.data.dataset import Dataset
from qlora_trainer.data.open_settings import build_in_length, settings_chooser
from qlora_trainer.data.render.template_source import job_template
from qlora_trainer.evaluation.benchmarks import require_tasks
from qlora_trainer.evaluation.scorable import require_readable
from qlora_trainer.model.adapter.initial import get_initial_adapter
from qlora_trainer.model.base.cache import ModelCache
from qlora_trainer.model.base.cached_base import Base, BaseSource, open_base_source
from qlora_trainer.model.source.models import ModelSource, open_model_source
from qlora_trainer.publishing.manifest import base_publisher
from qlora_trainer.steps.prepare_checks import check_steps, planned_steps, refresh_record
from qlora_trainer.steps.prepare_data import build_dataset, rows_folder, write_sequences
from qlora_trainer.steps.prepare_model import AdmittedModel, check_settings, fit_model
from qlora_trainer.steps.publish import read_published
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.contents import SHARED_BASES, Publisher
from qlora_trainer.stores.destinations.addresses import check_destination
from qlora_trainer.stores.destinations.destination import reject_occupied
from qlora_trainer.stores.destinations.volume import VolumeFolder
from qlora_trainer.stores.hub import Hub, hub_token
from qlora_trainer.training.checkpoints.fingerprint import run_settings
from qlora_trainer.training.checkpoints.same_run import begun_settings, reject_changed_run
from qlora_trainer.training.continued import continue_run, continued_settings, require_something_to_continue
from qlora_trainer.training.prepared_job import PreparedJob


def prepare(
    context: StepContext, records: RecordWriter, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> PrepareRecord:
    """Lay out model and data in the workspace and write the completion record. Returns early if it still holds.

    Raises StepFailure. A failure that another attempt cannot fix leaves nothing new in the workspace, unless a
    destination, or the run in the workspace or to continue, is another one. After any other, the next attempt resumes.
    """
    spec, workspace, mounts, identity = context.spec, context.workspace, context.mounts, context.identity

    def report(activity: str) -> None:
        records.progress(identity.progress("prepare", now(), activity))

    path, gpus = workspace.completion("prepare"), spec.resources.gpu_count
    written = read_completion(path, PrepareRecord)
    if written is not None and (published := read_published(context)) is not None:
        # A job whose status was lost: a clean-up may have left nothing else.
        records.note(trained=published)
        return written
    require_tasks(mounts.tasks, spec.benchmarks)
    settings, left_open = run_settings(spec, context.device, gpus), open_settings(spec)
    begun = begun_settings(workspace.checkpoints, settings, left_open)
    if written is not None:
        # With their reasons, and what no fingerprint has.
        recorded = {each.setting: each for each in written.settings}
        begun = tuple(recorded.get(each.setting, each) for each in begun)
    if written is None and spec.continues is not None:
        require_something_to_continue(mounts.continued, spec.continues)
        begun = begun or continued_settings(mounts.continued, spec.continues, settings, left_open)
    secret = context.secret("output") if context.contract_version > 1 else None
    check = partial(check_destination, mounts=mounts, secret=secret, registries=context.registries)
    record, base = None, spec.output.base
    shared = {} if base is None else {"base.destination": SHARED_BASES[base.written_type]}
    if written is not None:
        record = refresh_record(written, spec, workspace, mounts, context.group_size, records)
    if record is None:
        with _leaving_what_can_be_resumed(workspace):
            for field, address in spec.output.destinations.items():
                check(address, publisher=Publisher(shared.get(field, identity.job_uid)))
            earlier = None if written is None else written.initial_adapter
            record = _prepare(context, records, report, now, earlier, begun)
    if base is not None:
        publisher = base_publisher(base.written_type, record.base_sha256, workspace.root / record.model_path)
        check(base.destination, publisher=publisher)
    job = PreparedJob.from_record(context, record, gpus)
    trained = job.read_train_record()
    if trained is None:
        reject_changed_run(workspace.checkpoints, job.fingerprint)
    _reject_earlier_adapter(context, Publisher(identity.job_uid, job.digest), check)
    if spec.continues is not None:
        report(f"copying the checkpoint of {spec.continues}")
        record = _continue_run(job, mounts.continued, spec.continues, written)
    if record != written:
        write_completion(path, record)
    records.note(model_revision=record.model_revision, memory=record.memory, dataset=record.dataset, trained=trained)
    return record


def _reject_earlier_adapter(context: StepContext, run: Publisher, check: Callable[..., None]) -> None:
    """Raise StepFailure if the destination has the adapter of an earlier run, which publish would not replace."""
    output, workspace = context.spec.output, context.workspace
    if output.destination is not None:
        check(output.destination, publisher=run)
        return
    folder = confine(workspace.adapter, workspace.root)
    uri = f"{context.workspace_uri}/{folder.name}"
    reject_occupied(VolumeFolder(folder, uri, owner=context.pod_uid), run)


def _continue_run(job: PreparedJob, source: Path, name: str, written: PrepareRecord | None) -> PrepareRecord:
    """Copy the other job's checkpoint, unless an attempt with `written` did."""
    step, record = continue_run(source, name, job), job.prepared
    if step is None and written is not None:
        step = written.continued_step
    if step is None or step == record.continued_step:
        return record
    earlier = f"continues {name} from step "
    remarks = (remark for remark in record.remarks if not remark.startswith(earlier))
    return replace(record, remarks=(*remarks, f"{earlier}{step}"), continued_step=step)


def _prepare(
    context: StepContext,
    records: RecordWriter,
    report: Callable[[str], None],
    now: Callable[[], datetime],
    earlier_adapter: InitialAdapterStatus | None,
    begun: tuple[Choice, ...],
) -> PrepareRecord:
    """Prepare model and data in stages. Each returns its part of the record.

    `begun`: the open settings of the run that the job resumes or continues.
    """
    spec = fill(context.spec, begun)
    workspace, mounts, identity = context.workspace, context.mounts, context.identity
    reference = spec.model.token_secret_ref
    secret = None if reference is None else f"Secret {reference.name!r} with key {reference.key!r}"
    hub = cache(lambda: Hub(hub_token(mounts.token_file, secret)))

    def access(part: Literal["model", "dataset", "lora"]) -> StoreAccess:
        return StoreAccess(mounts, hub, context.secret(part), context.registries)

    require_readable(spec.gate)
    report("reading the model's configuration")
    source = open_model_source(spec.model, access("model"), workspace.models)
    started = now()
    folder = source.settings()
    fetching = now() - started
    template = job_template(spec.dataset, mounts)
    family = check_settings(folder, spec, workspace.root / "gguf")
    model = AdmittedModel.from_folder(folder, spec, family, template)
    model_cache = None
    if mounts.model_cache is not None:
        model_cache = ModelCache(ModelCacheLayout(mounts.model_cache), identity.job_uid, identity.pod_uid)
    bases = open_base_source(source, model.layout, folder, workspace.base, model_cache)
    bases.require_room()

    initial = None
    if spec.lora.initial_adapter is not None:
        report("fetching and checking the adapter of spec.lora.from")
        modules = family.target_modules
        initial = get_initial_adapter(
            spec.lora, access("lora"), workspace.initial_adapter, folder, modules, earlier_adapter
        )

    def build(asked: QLoRAJobSpec) -> Dataset:
        # Rows of both lengths are kept until the end: an interrupted attempt resumes from either.
        name = "rows" if asked is spec else "rows-in-length"
        rows = rows_folder(workspace.data, name, mounts.sweep, identity)
        return build_dataset(asked, model, access("dataset"), workspace.data, rows, report)

    dataset, of_length = build_in_length(spec, build, family.context_for(spec.training))
    records.note(dataset=dataset.status())
    in_length = fill(spec, of_length)
    limits = Limits(
        one_row=not family.keeps_rows_apart(in_length.training.max_sequence_length),
        group_size=context.group_size,
        adapter=None if initial is None else {"rank": initial.lora.rank, "alpha": initial.lora.alpha},
    )
    packed = family.packs(in_length.training)
    facts = family.require_sizes(open_settings(in_length))
    choose = settings_chooser(in_length, of_length, dataset, facts, packed=packed)
    report("measuring the memory that training needs")
    fitted = fit_model(model, spec, choose, limits, on_gpu=context.device == "cuda")
    records.note(memory=fitted.memory.status)
    fitted.memory.require()
    sequences = write_sequences(dataset, fitted, workspace.data, report)
    training = fitted.spec.training
    of_steps = check_steps(training, spec.resources.gpu_count, sequences.folder)
    total_steps = planned_steps(training, sequences.folder)

    started = now()
    base = bases.base(lambda done, total: report(f"{bases.activity} model {sizes(done, total)}"))
    fetching += now() - started

    data = sequences.complete(fitted, base.revision, workspace)
    remarks = (*of_steps, *family.remarks(in_length.training), *sequences.remarks)
    if initial is not None:
        initial.complete()
        remark = initial.remark(base_name(spec.model), base.revision)
        remarks += () if remark is None else (remark,)
    return PrepareRecord(
        **dict(fitted.record()),
        **dict(_base_record(bases, base, source, fetching, workspace.root)),
        **dict(data),
        remarks=remarks,
        total_steps=total_steps,
        settings=(*begun, *fitted.settings),
        asked=asked_sha256(context.spec),
        initial_adapter=None if initial is None else initial.status,
    )


def _base_record(bases: BaseSource, base: Base, source: ModelSource, fetching: timedelta, root: Path) -> PreparedBase:
    """Complete the model's folder, and return the base's part of the record."""
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


@contextmanager
def _leaving_what_can_be_resumed(workspace: WorkspaceLayout) -> Iterator[None]:
    """Delete what no attempt will resume from when the body ends or raises."""
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
