"""Shows rows of a job's data set as the model sees them, and statistics of all rows."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_api.automatic import NO_LIMITS, Limits
from qlora_api.choice import Choice
from qlora_api.printable import printable
from qlora_api.sources import HubSource, VolumeSource, parse_source
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.model import BaseModelSpec
from qlora_api.spec.resolved import ResolvedTraining, fill, open_settings
from qlora_cli.local.forecast import Epoch
from qlora_cli.local.run import missing_data
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration, bad_dataset, model_unavailable
from qlora_trainer.core.process import hide_gpus
from qlora_trainer.model.families.family import Traits
from qlora_trainer.model.source.hub_config import fetching, hub_answers, require_hub_client
from qlora_trainer.steps.planned import assume_settings

if TYPE_CHECKING:
    from qlora_trainer.data.build import ExaminedData
    from qlora_trainer.data.dataset import Dataset, TokenizedSource
    from qlora_trainer.data.examples.wrong_rows import WrongRows
    from qlora_trainer.data.preview import Counts, Preview, PreviewedRow
    from qlora_trainer.data.render.chat_template import Tokenizer
    from qlora_trainer.stores.access import StoreAccess

_TRAINED = "bold green"
_MARKS = ("[[", "]]")
_BAR_WIDTH = 40
_MODEL_ADVICE = "To see rows as the model sees them, name it with --model, such as hf://ORG/NAME or its folder"


@dataclass(frozen=True)
class RowAccess:
    """Access to the rows and the tokenizer of a job on this machine."""

    spec: QLoRAJobSpec
    mounts: Mounts
    tokenizer_folder: Path | None = None
    """Folder of the model's tokenizer, if it is given."""
    has_model: bool = True
    is_manifest: bool = True
    """Whether the spec has the objective of its rows; it follows from them if not."""

    def tokenizer(self) -> "Tokenizer":
        """The model's tokenizer with the job's chat template. Raises StepFailure."""
        from qlora_trainer.data.render.chat_template import Tokenizer
        from qlora_trainer.data.render.template_source import job_template

        # This loads PyTorch. Parquet files are read in forked processes, and none is forked where it sees a GPU.
        hide_gpus()
        folder = self.tokenizer_folder or find_tokenizer(self.spec.model, self.mounts)
        return Tokenizer(folder, job_template(self.spec.dataset, self.mounts))

    @contextmanager
    def previews(self, count: int, wrong: "WrongRows") -> Iterator[Iterator["Preview"]]:
        """Return `count` rows of each source, delete downloads. Raises StepFailure."""
        # Before PyTorch is loaded: see `tokenizer`.
        hide_gpus()
        from qlora_trainer.data.preview import previews

        with TemporaryDirectory() as folder:
            tokenizer = self.tokenizer() if self.has_model or self.tokenizer_folder else None
            access, known = self._data(), self.is_manifest
            yield previews(self.spec, tokenizer, access, Path(folder), count, wrong, objective_is_known=known)

    def examine(self, spec: QLoRAJobSpec, folder: Path, context: int | None) -> "ExaminedData":
        """Tokenize all rows of a job with their files in `folder`. Raises StepFailure.

        `context`: tokens of a row that the model has positions for, None for any number.
        """
        from qlora_trainer.data.build import DatasetBuilder
        from qlora_trainer.data.tokenize.chunk_maker import ANY_VOCABULARY
        from qlora_trainer.data.tokenize.row_cache import RowsFolder

        return DatasetBuilder(
            spec,
            self.tokenizer(),
            {},
            vocabulary=ANY_VOCABULARY,
            access=self._data(),
            scratch=lambda name: folder / name,
            rows=RowsFolder(folder / "rows"),
            say=lambda _activity: None,
            context=context,
        ).examine()

    def _data(self) -> "StoreAccess":
        from qlora_trainer.stores.access import StoreAccess
        from qlora_trainer.stores.hub import Hub, hub_token

        secret = Secret(self.mounts.credentials / "dataset", "spec.dataset.secretRef", None)
        return StoreAccess(self.mounts, cache(lambda: Hub(hub_token(self.mounts.token_file, None))), secret)


def find_tokenizer(model: BaseModelSpec, mounts: Mounts) -> Path:
    """Return the model's tokenizer folder, local or fetched. Raises StepFailure."""
    source, advice = parse_source(model.source), "give the folder of the model's tokenizer with --tokenizer DIR"
    if isinstance(source, VolumeSource):
        if source.claim not in mounts.claims:
            raise bad_configuration(
                f"spec.model.source is {model.source}: give a folder for the claim with --volume {source.claim}=DIR, "
                f"or {advice.removeprefix('give ')}"
            )
        folder = mounts.folder(source)
        if not folder.is_dir():
            raise model_unavailable(f"{folder} does not exist: correct {model.source}, or {advice}")
        return folder
    if not isinstance(source, HubSource):
        raise bad_configuration(f"spec.model.source is {model.source}, which this command does not download: {advice}")
    require_hub_client(f"or {advice}")
    from huggingface_hub import snapshot_download

    from qlora_trainer.core.file_names import TOKENIZER_FILES
    from qlora_trainer.model.source.files import CONFIG, GENERATION_CONFIG

    with fetching(model, f"or {advice}"):
        names = [CONFIG, GENERATION_CONFIG, *sorted(TOKENIZER_FILES)]
        has_hub = hub_answers(source, model)
        folder = snapshot_download(
            source.repository, revision=model.revision, allow_patterns=names, local_files_only=not has_hub
        )
        return Path(folder)


def show_first_rows(access: RowAccess, count: int, console: Console) -> None:
    """Print `count` rows of each source. Raises StepFailure with all wrong ones, last."""
    from qlora_trainer.data.examples.wrong_rows import WrongRows

    wrong, read = WrongRows(), 0
    with access.previews(count, wrong) as previews:
        for preview in previews:
            show_rows(preview, console)
            read += preview.counts.read
    wrong.require_none_of(read)


def show_rows(preview: "Preview", console: Console, environment: Mapping[str, str] = os.environ) -> None:
    """Print each row's text; targets are green on a terminal, and elsewhere between [[ and ]].

    The preview collects invalid rows.
    """
    colored = console.is_terminal and not environment.get("NO_COLOR")
    reading = preview.reading
    of = f"{preview.uri} (held out)" if preview.held_out else preview.uri
    console.print(
        Text(printable(f"{of}: format {reading.format}, columns {', '.join(reading.columns)}")), soft_wrap=True
    )
    if reading.ignored:
        console.print(Text(printable(f"Not used: {', '.join(reading.ignored)}")))
    if preview.has_text:
        how = Text("green", _TRAINED) if colored else Text(f"between {_MARKS[0]} and {_MARKS[1]}")
        console.print(Text("Tokens that are trained on are ").append_text(how).append("."))
    for row in preview.rows:
        console.print()
        _show_row(row, console, colored=colored)
    if not preview.has_text:
        console.print(Text(f"{_counted(preview.counts.read)} read. {_MODEL_ADVICE}."), soft_wrap=True)
    if preview.counts.unread:
        console.print(Text(f"\n{_not_read(preview.counts)}", "yellow"))


def _not_read(counts: "Counts") -> str:
    from qlora_trainer.data.preview import MOST_COUNTED

    only = "Only the first row" if counts.read == 1 else f"Only the first {counts.read:,} rows"
    all_rows = f"{'at least ' if counts.unread == MOST_COUNTED else ''}{counts.read + counts.unread:,}"
    return f"{only} of {all_rows} {'was' if counts.read == 1 else 'were'} read: --rows 0 reads all."


def _show_row(row: "PreviewedRow", console: Console, *, colored: bool) -> None:
    counts = f"{printable(row.location)}: {row.tokens} tokens, {row.targets} trained on"
    console.print(Text(counts, "bold"), soft_wrap=True)
    if row.left_out:
        console.print(Text(f"Left out: {row.left_out}", "yellow"), soft_wrap=True)
    text = Text()
    for stretch in row.stretches:
        shown = "\n".join(map(printable, stretch.text.split("\n")))
        if stretch.is_trained and not colored:
            shown = f"{_MARKS[0]}{shown}{_MARKS[1]}"
        text.append(shown, _TRAINED if stretch.is_trained and colored else None)
    console.print(text, soft_wrap=True, highlight=False, end="" if text.plain.endswith("\n") else "\n")


@dataclass(frozen=True)
class CountedRows:
    """All rows of a job, tokenized, and the settings that they decide."""

    examined: "ExaminedData"
    of_length: tuple[Choice, ...]
    """The length of a sequence, if the job leaves it open."""

    def choose(self, spec: QLoRAJobSpec, traits: Traits, limits: Limits = NO_LIMITS) -> tuple[Choice, ...]:
        """Choose the settings that a job on these rows leaves open. Raises StepFailure if it cannot train on them."""
        from qlora_trainer.data.open_settings import settings_chooser

        if self.examined.dataset is None or self.examined.rejection:
            raise bad_dataset(self.examined.rejection)
        in_length, dataset = fill(spec, self.of_length), self.examined.dataset
        limits = replace(limits, one_row=not traits.keeps_rows_apart(in_length.training.max_sequence_length))
        sizes, packed = traits.require_sizes(open_settings(in_length)), traits.packs(in_length.training)
        return settings_chooser(in_length, self.of_length, dataset, sizes, packed=packed)(limits)

    def epoch(self, training: ResolvedTraining, *, packed: bool) -> Epoch:
        """The data of an epoch. `packed`: whether a sequence may have several rows."""
        dataset = self.examined.dataset
        if dataset is None:
            return Epoch()
        facts = dataset.facts(training.max_sequence_length, training.seed, packed=packed)
        return Epoch(dataset.status().tokens, facts.sequences)


@contextmanager
def counted_rows(spec: QLoRAJobSpec, access: RowAccess, context: int | None) -> Iterator[CountedRows]:
    """Tokenize all rows of a job into files that exist during the body. Raises StepFailure if they are unreadable.

    `context`: tokens of a row that the model has positions for, None for any number.
    """
    from qlora_trainer.data.open_settings import build_in_length

    with TemporaryDirectory() as folder:
        found = [access.examine(spec, Path(folder) / "first", context)]

        def build(asked: QLoRAJobSpec) -> "Dataset":
            if asked is not spec:
                found.append(access.examine(asked, Path(folder) / "again", context))
            if found[-1].dataset is None:
                raise bad_dataset(found[-1].rejection)
            return found[-1].dataset

        of_length: tuple[Choice, ...] = ()
        if found[0].dataset is not None:
            _, of_length = build_in_length(spec, build, context)
        yield CountedRows(found[-1], of_length)


@dataclass(frozen=True)
class RowCounts:
    """Counts the rows of jobs, once for all with the same rows. Their files exist until `files` is closed."""

    access: RowAccess
    files: ExitStack
    _known: dict[object, CountedRows] = field(default_factory=dict)

    def of(self, spec: QLoRAJobSpec, traits: Traits) -> CountedRows:
        """Return the rows of a job that differs from that of the access as cells do. Raises StepFailure."""
        dataset = spec.dataset
        by_seed = dataset.eval is None or dataset.eval.source is None or dataset.shuffle
        key = (dataset.model_dump_json(), spec.training.seed if by_seed else None)
        if key not in self._known:
            mounts, access = self.access.mounts, replace(self.access, spec=spec)
            if missing := missing_data(spec, mounts.claims, mounts.config_map_folders):
                raise bad_configuration("\n".join(missing))
            counted = counted_rows(spec, access, traits.context_for(spec.training))
            self._known[key] = self.files.enter_context(counted)
        return self._known[key]

    def choose(self, spec: QLoRAJobSpec, traits: Traits, limits: Limits) -> tuple[Choice, ...]:
        """Choose the settings that a job leaves open; assume them if it fails for its rows. Raises StepFailure."""
        counted = self.of(spec, traits)
        return (assume_settings if counted.examined.rejection else counted.choose)(spec, traits, limits)


def show_lengths(spec: QLoRAJobSpec, counted: CountedRows, console: Console) -> None:
    """Print the lengths of rows, the number above each maxSequenceLength, and the job's use of the others."""
    examined, length = counted.examined, fill(spec, counted.of_length).training.max_sequence_length
    for source in examined.sources:
        _show_source(source, length, console)
    console.print()
    if examined.dataset is not None:
        _show_chosen(examined.dataset, spec, console)
    if examined.rejection:
        console.print(Text(printable(f"The job fails: {examined.rejection}."), "bold red"), soft_wrap=True)


def _show_chosen(dataset: "Dataset", spec: QLoRAJobSpec, console: Console) -> None:
    """Print the number of equal rows, and each source's share of an epoch."""
    found, evaluation = dataset.status(), spec.dataset.eval
    treated = f", {'left out' if spec.dataset.deduplicate else 'kept'}" if found.duplicate_rows else ""
    lines = [f"Duplicates: {_counted(found.duplicate_rows) if found.duplicate_rows else 'none'}{treated}."]
    # If the job fails on an overlap, its reason has the rows.
    if dataset.overlap is not None and (evaluation is None or evaluation.overlap != "fail"):
        lines.append(f"Overlap: {dataset.overlap.remark()}.")
    sources = found.sources or ()
    of_epoch = sum(source.epoch_rows for source in sources)
    for source in sources:
        times = "once" if source.epoch_rows == source.used_rows else f"{source.epoch_rows / source.used_rows:.3g} times"
        lines.append(f"{source.source}: {source.epoch_rows:,} of {of_epoch:,} rows of an epoch, each {times}.")
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


def _show_source(source: "TokenizedSource", chosen: int | None, console: Console) -> None:
    from qlora_trainer.data.examples.formats import PAIRS
    from qlora_trainer.data.statistics import unlabeled_rows

    console.print()
    console.print(Text(printable(f"{source.data.uri}: {_counted(source.rows.rows_read)}"), "bold"), soft_wrap=True)
    unlabeled = unlabeled_rows(source.rows, pairs=source.reading.format in PAIRS)
    if unlabeled.rows:
        left_out = f"Left out: {_counted(unlabeled.rows)}: {unlabeled.reason} (the first: {unlabeled.first})"
        console.print(Text(printable(left_out), "yellow"), soft_wrap=True)
    lengths = source.all_lengths()
    if len(lengths):
        _show_lengths(lengths, chosen, console)


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows:,} rows"


def _show_lengths(lengths: Any, chosen: int | None, console: Console) -> None:
    """`lengths`: int32 [rows]."""
    from qlora_trainer.data.statistics import Lengths

    found = Lengths.from_lengths(lengths)
    console.print(
        f"Tokens per row: {found.shortest:,} to {found.longest:,}, median {found.median:,}, "
        f"99 % at most {found.p99:,}.",
        highlight=False,
    )
    table = Table("Tokens", "Rows", "", "Longer", box=None, pad_edge=False)
    most = max(bar.rows for bar in found.histogram)
    for bar in found.histogram:
        width = round(_BAR_WIDTH * bar.rows / most)
        table.add_row(f"≤ {bar.up_to:,}", f"{bar.rows:,}", "█" * width, _lost(lengths, bar.up_to))
    console.print(table)
    if chosen is None:
        return
    lost = _lost(lengths, chosen)
    console.print(f"spec.training.maxSequenceLength is {chosen:,}: it leaves out {lost}.", highlight=False)


def _lost(lengths: Any, longest: int) -> str:
    """The rows that are longer, for people."""
    rows = int((lengths > longest).sum())
    return f"{rows:,} of {len(lengths):,} rows ({rows / len(lengths):.1%})" if rows else "none"
