"""Tokenizes the data set of a job and writes its sequences, for prepare."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qlora_api.contract import SweepLayout, WorkspaceLayout
from qlora_api.spec.job import QLoRAJobSpec
from qlora_trainer.core.completion import EndOfTurn, PreparedData, recorded_path
from qlora_trainer.core.context import Identity
from qlora_trainer.core.filesystem import complete_folder, new_folder, partial_path
from qlora_trainer.data.build import DatasetBuilder
from qlora_trainer.data.dataset import Dataset
from qlora_trainer.data.fingerprint import ResolvedInputs
from qlora_trainer.data.prepared import guard_split, open_prepared
from qlora_trainer.data.render.end_of_turn import end_of_turn, marks_in_pieces, template_remarks
from qlora_trainer.data.render.template_source import TEMPLATE_FILE, template_sha256
from qlora_trainer.data.tokenize.row_cache import RowsFolder
from qlora_trainer.evaluation.answers import AnswerTexts
from qlora_trainer.evaluation.scorable import require_scorable
from qlora_trainer.steps.prepare_checks import planned_work
from qlora_trainer.steps.prepare_model import AdmittedModel, FittedModel
from qlora_trainer.stores.access import StoreAccess

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WrittenSequences:
    """The data set's sequences, in a folder that `complete` renames."""

    dataset: Dataset
    folder: Path
    end_of_turn: EndOfTurn | None
    """How answers end, if servers have to be given that."""
    remarks: tuple[str, ...]

    def complete(self, model: FittedModel, revision: str, workspace: WorkspaceLayout) -> PreparedData:
        """Rename the folder to its fingerprint, and return the data's part of the record."""
        spec, admitted = model.spec, model.admitted
        template, text = None, admitted.tokenizer.template_text
        if text is not None:
            # For publication.
            (self.folder / TEMPLATE_FILE).write_text(text, encoding="utf-8", newline="")
            template = template_sha256(text)
        digests = {split: source.sha256 for split, source in self.dataset.held_out_sources.items()}
        guards = {guard.name: digests[guard_split(guard.name)] for guard in spec.guards}
        resolved = ResolvedInputs(
            revision,
            admitted.tokenizer_files,
            tuple(source.sha256 for source in self.dataset.training),
            digests.get("eval"),
            template,
            tuple(guards.values()),
        )
        fingerprint = resolved.fingerprint(spec)
        resolved.write(self.folder, fingerprint)
        folder = workspace.data / fingerprint
        complete_folder(self.folder, folder)
        status = self.dataset.status()
        return PreparedData(
            fingerprint=fingerprint,
            data_path=recorded_path(folder, workspace.root),
            data_content=resolved.content(spec.dataset),
            dataset=status,
            guards=guards,
            work=planned_work(
                model.parameters, open_prepared(folder, "train"), status, spec.training, model.fitted.recomputed_share
            ),
            template_sha256=template,
            end_of_turn=self.end_of_turn,
        )


def build_dataset(
    spec: QLoRAJobSpec,
    model: AdmittedModel,
    access: StoreAccess,
    data: Path,
    rows: RowsFolder,
    report: Callable[[str], None],
) -> Dataset:
    """Tokenize the job's data set. The next attempt resumes from files below `data`."""
    return DatasetBuilder(
        spec,
        model.tokenizer,
        model.tokenizer_files,
        vocabulary=model.family.vocabulary,
        access=access,
        scratch=lambda name: partial_path(data / name),
        rows=rows,
        say=report,
        context=model.family.context_for(spec.training),
    ).build()


def rows_folder(data: Path, name: str, sweep: Path | None, identity: Identity) -> RowsFolder:
    """Return the folder of tokenized rows, which the cells of a sweep share."""
    own = partial_path(data / name)
    if sweep is None:
        return RowsFolder(own)
    return RowsFolder.from_shared(own, SweepLayout(sweep).rows, identity.job_uid, identity.pod_uid)


def write_sequences(
    dataset: Dataset, model: FittedModel, data: Path, report: Callable[[str], None]
) -> WrittenSequences:
    """Write the sequences to a new folder below `data`. Raises StepFailure."""
    folder, spec, admitted = new_folder(partial_path(data / "layout")), model.spec, model.admitted
    dataset.write(
        folder,
        spec.training,
        packed=model.packed,
        on_epoch=lambda number: report(f"drawing the rows of epoch {number + 1}"),
    )
    tokenizer = admitted.tokenizer
    end: EndOfTurn | None = None
    of_turns: tuple[str, ...] = ()
    if tokenizer.has_chat_template and not all(source.reading.format == "text" for source in dataset.training):
        end = end_of_turn(tokenizer, admitted.folder)
        of_turns = template_remarks(end, () if tokenizer.template is None else marks_in_pieces(tokenizer))
        for remark in of_turns:
            logger.warning("%s", remark)
    of_score = require_scorable(
        spec.gate,
        folder,
        dataset.status(),
        partial(AnswerTexts, admitted.folder, end),
        fixed_positions=admitted.family.fixed_positions,
    )
    return WrittenSequences(dataset, folder, end, (*of_turns, *dataset.remarks, *of_score))
