"""The step `prepare`: finds and checks the model and the data, and lays them out in the workspace.

Checks that are cheap and often fail come first: the destinations, the model's configuration, the GPU's memory, the
data. The weights come last. Incomplete content is in folders named `.NAME.partial`. The next attempt resumes from
them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path

from qlora_api.contract import SweepLayout, WorkspaceLayout
from qlora_api.status import BaseStatus, InitialAdapterStatus
from qlora_trainer.core.completion import EndOfTurn, PrepareRecord, read_completion, recorded_path, write_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import (
    complete_folder,
    is_full,
    new_folder,
    partial_path,
    remove,
    remove_partials,
    sizes,
)
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.data.build import DatasetBuilder
from qlora_trainer.data.dataset import Dataset
from qlora_trainer.data.fingerprint import ResolvedInputs
from qlora_trainer.data.prepared import open_prepared
from qlora_trainer.data.read.locate import DataAccess
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.render.end_of_turn import end_of_turn, marks_in_pieces, template_remarks
from qlora_trainer.data.render.template_source import TEMPLATE_FILE, job_template, template_sha256
from qlora_trainer.data.tokenize.row_cache import RowsFolder
from qlora_trainer.evaluation.answers import AnswerTexts
from qlora_trainer.evaluation.scorable import require_readable, require_scorable
from qlora_trainer.history.trackers import require_installed
from qlora_trainer.model.adapter.initial import InitialAdapter, get_initial_adapter
from qlora_trainer.model.base.cached_base import open_base_source
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.base.workspace_base import Base, BaseSource
from qlora_trainer.model.families.admission import CheckedModel, advise_learning_rate, check_model
from qlora_trainer.model.kernels.attention import ATTENTION
from qlora_trainer.model.memory.dry_run import measure_together_within_limits, measure_within_limits
from qlora_trainer.model.memory.fit import MemoryFit
from qlora_trainer.model.source.downloads import open_model_source
from qlora_trainer.model.source.files import CONFIG, tokenizer_digests
from qlora_trainer.publishing.destinations.addresses import check_destination
from qlora_trainer.publishing.gguf import require_convertible
from qlora_trainer.publishing.manifest import SHARED_BASE, Publisher, base_publisher
from qlora_trainer.report.serving import warn_if_not_served
from qlora_trainer.steps.prepare_checks import remarks_on_evaluations, still_valid, work_of
from qlora_trainer.stores.hub import Hub, hub_token
from qlora_trainer.training.checkpoints.fingerprint import run_fingerprint, run_settings
from qlora_trainer.training.continued import continue_run, reject_other_settings, require_something_to_continue
from qlora_trainer.training.prepared_job import PreparedJob

logger = logging.getLogger(__name__)


def prepare(
    context: StepContext, records: RecordWriter, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> PrepareRecord:
    """Lay out model and data in the workspace and write the completion record. Returns early if it still holds.

    Raises StepFailure. After a failure that another attempt cannot fix, nothing is left in the workspace that was not
    there before, but for a base whose destination turns out to hold another one, or if the run to continue turns out
    to be another one; after any other, what has been downloaded and tokenized stays and the next attempt resumes from
    it.
    """

    def say(activity: str) -> None:
        records.progress(context.progress("prepare", now(), activity))

    path = context.workspace.completion("prepare")
    written = read_completion(path, PrepareRecord)
    if written is None and context.spec.continues is not None:
        require_something_to_continue(context.mounts.continued, context.spec.continues)
        settings = run_settings(context.spec, context.device, context.spec.resources.gpu_count)
        reject_other_settings(context.mounts.continued, context.spec.continues, settings)
    record = None if written is None else still_valid(written, context, records)
    if record is None:
        with _leaving_what_can_be_resumed(context.workspace):
            record = _prepare(context, records, say, now, None if written is None else written.initial_adapter)
    if context.spec.output.base is not None:
        model = context.workspace.root / record.model_path
        _check_destinations(context, base_publisher(record.base_sha256, model))
    if context.spec.continues is not None:
        say(f"copying the checkpoint of {context.spec.continues}")
        taken_up_at = None if written is None else written.continued_step
        record = _continue_run(context, record, context.spec.continues, taken_up_at)
    if record != written:
        write_completion(path, record)
    records.note(model_revision=record.model_revision, memory=record.memory, dataset=record.dataset)
    return record


def _continue_run(context: StepContext, record: PrepareRecord, name: str, taken_up_at: int | None) -> PrepareRecord:
    """Copy the checkpoint of the job of that name. The record has the step where its run is continued.

    `taken_up_at`: that step, if an attempt before this one has copied it.
    """
    fingerprint = run_fingerprint(context.spec, record, context.device, context.spec.resources.gpu_count)
    copied = continue_run(context.mounts.continued, name, PreparedJob(context, record, fingerprint))
    step = taken_up_at if copied is None else copied
    if step is None or step == record.continued_step:
        return record
    earlier = f"continues {name} from step "
    remarks = (remark for remark in record.remarks if not remark.startswith(earlier))
    return record.model_copy(update={"remarks": (*remarks, f"{earlier}{step}"), "continued_step": step})


@dataclass(frozen=True)
class _Admitted:
    """The decisions about a trainable job by the model's small files.

    They come before data and weights are fetched.
    """

    folder: Path
    """The model's, with its small files."""
    model: CheckedModel
    memory: MemoryFit
    tokenizer: Tokenizer
    tokenizer_files: Mapping[str, str]
    """SHA-256 of each of the tokenizer's files."""
    layout: BaseLayout
    rows_apart: bool
    """Whether rows can share a sequence."""
    packed: bool
    """Whether they do."""


def _prepare(
    context: StepContext,
    records: RecordWriter,
    say: Callable[[str], None],
    now: Callable[[], datetime],
    earlier_adapter: InitialAdapterStatus | None,
) -> PrepareRecord:
    hub = cache(lambda: _open_hub(context))
    _check_destinations(context)
    require_readable(context.spec.gate)

    say("reading the model's configuration")
    source = open_model_source(context, hub)
    started = now()
    folder = source.settings()
    fetching = now() - started
    admitted = _admit(folder, context, records, say)
    bases = open_base_source(context, source, folder, admitted.layout)
    bases.require_room()

    initial = _initial_adapter(context, admitted, hub, say, earlier_adapter)
    dataset = _dataset(context, admitted, hub, say)
    records.note(dataset=dataset.status())
    sequences = _write_sequences(dataset, context, admitted, say)
    end, of_turns = _turns(admitted, dataset)
    of_score = require_scorable(
        context.spec.gate,
        sequences,
        dataset.status(),
        partial(AnswerTexts, folder, end),
        fixed_positions=admitted.model.family.fixed_positions,
    )
    of_evaluations = remarks_on_evaluations(context.spec.training, sequences)

    started = now()
    base = bases.base(lambda done, total: say(f"{bases.activity} model {sizes(done, total)}"))
    fetching += now() - started

    template = _write_template(admitted.tokenizer, sequences)
    resolved = _resolved(dataset, admitted, base.revision, template)
    data = _complete_data(sequences, resolved, context)
    remarks = (*admitted.model.remarks, *of_turns, *dataset.remarks, *of_score, *of_evaluations)
    if initial is not None:
        initial.complete()
        remark = initial.remark(context.base_name, base.revision)
        remarks += () if remark is None else (remark,)
    root, family = context.workspace.root, admitted.model.family
    return PrepareRecord(
        fingerprint=data.name,
        model_path=recorded_path(source.complete(), root),
        model_revision=base.revision,
        base_path=recorded_path(base.folder, root),
        base_sha256=base.manifest.sha256,
        data_path=recorded_path(data, root),
        data_content=resolved.content(context.spec.dataset),
        target_modules=family.target_modules,
        packed=admitted.packed,
        rows_apart=admitted.rows_apart,
        mixture_of_experts=family.mixture_of_experts,
        experts_in_mxfp4=family.experts_in_mxfp4,
        model_type=family.model_type,
        auto_class=family.auto_class,
        fixed_positions=family.fixed_positions,
        attention=None if family.attention == ATTENTION else family.attention,
        memory=admitted.memory.status,
        work=work_of(
            None if family.mixture_of_experts else admitted.memory.parameters,
            open_prepared(data, "train"),
            dataset.status(),
            context.spec.training,
        ),
        dataset=dataset.status(),
        remarks=remarks,
        template_sha256=template,
        end_of_turn=end,
        initial_adapter=None if initial is None else initial.status,
        measured=admitted.memory.measured,
        base=_base_status(bases, base, source.bytes_fetched, fetching),
    )


def _admit(folder: Path, context: StepContext, records: RecordWriter, say: Callable[[str], None]) -> _Admitted:
    """Decide by the model's small files how the job is trained.

    Raises StepFailure if it cannot be.
    """
    spec, training = context.spec, context.spec.training
    template = job_template(spec.dataset, context.mounts)
    require_installed(training.report_to)
    model = check_model(folder, spec.lora, training)
    model.family.require_whole_and_unmerged(training, spec.output)
    warn_if_not_served(spec)
    if spec.output.gguf is not None:
        scratch = context.workspace.root / "gguf"
        require_convertible(folder, model.family.target_modules, spec.lora, spec.output.gguf, scratch)
    say("measuring the memory that training needs")
    rows_apart = model.family.keeps_rows_apart(training.max_sequence_length)
    memory = MemoryFit.from_config(
        folder / CONFIG,
        spec,
        model.family.target_modules,
        rows_apart=rows_apart,
        group_size=context.group_size,
        measure=partial(measure_within_limits, family=model.family),
        measure_passes=partial(measure_together_within_limits, family=model.family),
    )
    records.note(memory=memory.status)
    memory.require()
    advise_learning_rate(memory.parameters or 0, training.learning_rate)
    return _Admitted(
        folder=folder,
        model=model,
        memory=memory,
        tokenizer=Tokenizer(folder, template),
        tokenizer_files=tokenizer_digests(folder),
        layout=BaseLayout.from_folder(folder, spec.quantization),
        rows_apart=rows_apart,
        packed=model.packs(training),
    )


def _dataset(context: StepContext, admitted: _Admitted, hub: Callable[[], Hub], say: Callable[[str], None]) -> Dataset:
    """The job's data set, tokenized."""
    return DatasetBuilder(
        context.spec.dataset,
        context.spec.training,
        admitted.tokenizer,
        admitted.tokenizer_files,
        vocabulary=admitted.model.vocabulary,
        access=DataAccess(context.mounts, hub, context.secret("dataset")),
        scratch=lambda name: partial_path(context.workspace.data / name),
        rows=_rows_folder(context),
        say=say,
    ).build()


def _rows_folder(context: StepContext) -> RowsFolder:
    """The folder of tokenized rows.

    The cells of a sweep differ in nothing that changes a token.
    """
    own = partial_path(context.workspace.data / "rows")
    if context.mounts.sweep is None:
        return RowsFolder(own)
    return RowsFolder.sharing(own, SweepLayout(context.mounts.sweep).rows, context.job_uid, context.pod_uid)


def _initial_adapter(
    context: StepContext,
    admitted: _Admitted,
    hub: Callable[[], Hub],
    say: Callable[[str], None],
    earlier: InitialAdapterStatus | None,
) -> InitialAdapter | None:
    """The adapter of spec.lora.from, fetched and checked.

    `earlier`: the result of an attempt before this one.
    """
    if context.spec.lora.initial_adapter is None:
        return None
    say("fetching and checking the adapter of spec.lora.from")
    return get_initial_adapter(context, hub, admitted.folder, admitted.model.family.target_modules, earlier)


def _write_sequences(dataset: Dataset, context: StepContext, admitted: _Admitted, say: Callable[[str], None]) -> Path:
    """A new folder with the data set's sequences, incomplete until `_complete_data`."""
    folder = new_folder(partial_path(context.workspace.data / "layout"))
    dataset.write(
        folder,
        context.spec.training,
        packed=admitted.packed,
        on_epoch=lambda number: say(f"drawing the rows of epoch {number + 1}"),
    )
    return folder


def _resolved(dataset: Dataset, admitted: _Admitted, revision: str, template: str | None) -> ResolvedInputs:
    return ResolvedInputs(
        revision,
        admitted.tokenizer_files,
        tuple(source.sha256 for source in dataset.training),
        None if dataset.own_evaluation is None else dataset.own_evaluation.sha256,
        template,
    )


def _complete_data(sequences: Path, resolved: ResolvedInputs, context: StepContext) -> Path:
    """The data folder, named by its fingerprint, for the folder of the sequences."""
    fingerprint = resolved.fingerprint(context.spec)
    resolved.write(sequences, fingerprint)
    complete_folder(sequences, context.workspace.data / fingerprint)
    return context.workspace.data / fingerprint


def _base_status(bases: BaseSource, base: Base, fetched: int, fetching: timedelta) -> BaseStatus:
    """How the base came here. `fetched`: bytes of the model, in the time `fetching`."""
    return BaseStatus(
        origin=bases.origin,
        sha256=base.manifest.sha256,
        bytes_fetched=fetched,
        seconds=max(0, round(fetching.total_seconds())),
        message=bases.remark,
    )


def _write_template(tokenizer: Tokenizer, folder: Path) -> str | None:
    """Write the job's chat template for publication, and return its SHA-256, or None."""
    text = tokenizer.template_text
    if text is None:
        return None
    (folder / TEMPLATE_FILE).write_text(text, encoding="utf-8", newline="")
    return template_sha256(text)


def _turns(admitted: _Admitted, dataset: Dataset) -> tuple[EndOfTurn | None, tuple[str, ...]]:
    """How answers end, if servers need that, and remarks on it and on the template."""
    tokenizer = admitted.tokenizer
    if not tokenizer.has_chat_template or all(source.reading.format == "text" for source in dataset.training):
        return None, ()
    end = end_of_turn(tokenizer, admitted.folder)
    remarks = template_remarks(end, () if tokenizer.template is None else marks_in_pieces(tokenizer))
    for remark in remarks:
        logger.warning("%s", remark)
    return end, remarks


def _check_destinations(context: StepContext, base: Publisher | None = None) -> None:
    """Raise StepFailure unless the job can publish where it names.

    Once its `base` is known, only the destination of the base is checked.
    """
    for field, address in context.spec.output.destinations.items():
        shared = field == "base.destination"
        if shared or base is None:
            check_destination(
                address,
                mounts=context.mounts,
                secret=context.secret("output") if context.contract_version > 1 else None,
                registries=context.registries,
                publisher=(base or Publisher(SHARED_BASE)) if shared else Publisher(context.job_uid),
            )


def _open_hub(context: StepContext) -> Hub:
    reference = context.spec.model.token_secret_ref
    secret = None if reference is None else f"Secret {reference.name!r} with key {reference.key!r}"
    return Hub(hub_token(context.mounts.token_file, secret))


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
