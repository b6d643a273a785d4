"""Turns rows into chunks of tokens on all cores, and resumes where an interrupted attempt stopped.

The number and size of the rows alone decide which chunk they are in, so a chunk has the same content whichever process
makes it, and when. A chunk that is on disk is not made again.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy

from qlora_api.automatic import LONGEST
from qlora_api.spec.dataset import Columns, DatasetSpec, RowFormat, SystemPromptSpec
from qlora_api.spec.training import TrainingSpec, TrainOn
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.data.examples.example import PlainText, Preference, TokenizedRow
from qlora_trainer.data.examples.formats import DATASET, PAIRS, PLAIN, RowReader
from qlora_trainer.data.examples.wrong_rows import WrongRows
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.render.chat_template import Rendered, Tokenizer
from qlora_trainer.data.render.template_source import JobTemplate
from qlora_trainer.data.tokenize.chunks import Chunk, Dropped, Limits
from qlora_trainer.data.tokenize.row_cache import ChunkFile, PartOfRows

CHUNK_ROWS = 4096
CHUNK_BYTES = 2**24
"""A chunk ends at this many rows or bytes of text, whichever comes first."""
MAX_WORKERS = 8
"""About as many as the one reading process can keep busy."""
# Rows of one tokenizer call: a token takes some 200 bytes until its row is in a numpy array.
_BATCH_ROWS = 128
_BATCH_BYTES = 2**20
# Workers need some seconds to load the tokenizer's libraries: this process makes this many chunks until then.
_CHUNKS_ALONE = 4
_PENDING_CHUNKS_PER_WORKER = 2
ANY_VOCABULARY = 2**31
"""For shown rows only, without the configuration that has the vocabulary's size."""
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which tokens a row becomes: what a worker process gets."""

    tokenizer: Path
    """Folder of the tokenizer's files."""
    vocabulary: int
    format: RowFormat
    columns: Columns
    train_on: TrainOn
    longest_allowed: int
    """Most tokens of a row. Longer rows are left out."""
    field: str = DATASET
    """The job's field that has format and columns, for messages."""
    template: JobTemplate | None = None
    system_prompt: SystemPromptSpec | None = None

    @classmethod
    def from_spec(
        cls,
        spec: DatasetSpec,
        training: TrainingSpec,
        tokenizer: Tokenizer,
        format_: RowFormat,
        columns: Columns | None,
        field: str,
        *,
        vocabulary: int,
        longest: int = LONGEST,
    ) -> "Recipe":
        """That of a job whose rows are of this format, which its `field` sets.

        `longest`: most tokens of a row if the rows decide on the length of sequences.
        """
        return cls(
            tokenizer=tokenizer.folder,
            vocabulary=vocabulary,
            format=format_,
            columns=columns or Columns(),
            train_on=training.train_on,
            longest_allowed=training.max_sequence_length or longest,
            field=field,
            template=tokenizer.template,
            system_prompt=spec.system_prompt,
        )

    def require_place_for_settings(self, tokenizer: Tokenizer, uri: str) -> None:
        """Raise StepFailure BAD_CONFIGURATION if the rows have no place for settings."""
        for field, value in {"chatTemplate": self.template, "systemPrompt": self.system_prompt}.items():
            if value is not None and self.format in PLAIN:
                raise bad_configuration(
                    f"spec.dataset.{field} is set, but the rows of {uri} are of format {self.format}, which has no "
                    "turns: remove it, or use rows of another format"
                )
        if self.system_prompt is not None:
            tokenizer.require_system_message()

    @property
    def limits(self) -> Limits:
        """Limits of the tokens, for chunks of any origin."""
        return Limits(self.vocabulary, self.longest_allowed)

    def row_reader(self) -> RowReader:
        """Reads the rows. Raises StepFailure BAD_CONFIGURATION for settings that conflict."""
        return RowReader(self.format, self.columns, self.field, self.train_on)


class ChunkMaker:
    """Makes chunks from rows."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer`: the recipe's, if it is loaded already."""
        self.recipe = recipe
        self._tokenizer = tokenizer or Tokenizer(recipe.tokenizer, recipe.template)
        self._reader = recipe.row_reader()

    def make(self, rows: Sequence[Row]) -> Chunk:
        """The chunk of these rows. Raises StepFailure, with the first invalid ones."""
        wrong = WrongRows()
        used: list[TokenizedRow] = []
        locations: list[str] = []
        checks: list[str] = []
        too_long: list[int] = []
        unlabeled: list[str] = []
        first_too_long: str | None = None
        for row, tokens in self._tokenize(rows, wrong):
            count = len(tokens.input_ids)
            if count > self.recipe.longest_allowed:
                too_long.append(count)
                first_too_long = first_too_long or row.location
            elif not tokens.is_target.any():
                unlabeled.append(row.location)
            else:
                self._require_known(int(tokens.input_ids.max()))
                used.append(tokens)
                locations.append(row.location)
                with wrong.collecting(row.location):
                    check = self._reader.check(row)
                    checks += [] if check is None else [check.dump()]
        wrong.require_none(len(rows))
        dropped = Dropped(len(unlabeled), unlabeled[0] if unlabeled else None, first_too_long)
        return Chunk.from_rows(used, too_long, dropped, locations, checks if self.recipe.columns.check else None)

    def render(self, row: Row) -> tuple[Rendered, ...]:
        """The row's text, or a pair's two. Raises StepFailure for an invalid row."""
        example, system = self._reader.read(row), self.recipe.system_prompt
        if system is not None and not isinstance(example, PlainText):
            example = example.with_system(system.text, replace=system.mode == "replace")
        if isinstance(example, Preference):
            return self._tokenizer.render_pair(example, row.location, self.recipe.longest_allowed)
        return (self._tokenizer.render(example, row.location, self.recipe.longest_allowed),)

    def _tokenize(self, rows: Sequence[Row], wrong: WrongRows) -> Iterator[tuple[Row, TokenizedRow]]:
        for batch in _batches(iter(rows), _BATCH_ROWS, _BATCH_BYTES):
            valid: list[Row] = []
            rendered: list[Rendered] = []
            for row in batch:
                with wrong.collecting(row.location):
                    rendered += self.render(row)
                    valid.append(row)
            if not valid:
                continue
            tokenized = self._tokenizer.tokenize(rendered, self.recipe.train_on)
            yield from zip(valid, pair_rows(tokenized) if self.recipe.format in PAIRS else tokenized, strict=True)

    def _require_known(self, largest: int) -> None:
        if largest >= self.recipe.vocabulary:
            raise bad_configuration(
                f"the tokenizer makes token {largest}, but the model has only {self.recipe.vocabulary} tokens "
                "(vocab_size): the tokenizer belongs to another model; use the one that the model was trained with"
            )


def pair_rows(tokenized: Iterator[TokenizedRow]) -> Iterator[TokenizedRow]:
    """Each two rows as one. Equal answers have no targets: there is nothing to prefer."""
    for chosen, rejected in zip(tokenized, tokenized, strict=True):
        is_target = numpy.concatenate([chosen.is_target, rejected.is_target])
        is_target &= not numpy.array_equal(chosen.input_ids, rejected.input_ids)
        input_ids = numpy.concatenate([chosen.input_ids, rejected.input_ids])
        yield TokenizedRow(input_ids, is_target, len(chosen.input_ids))


def tokenize(rows: Iterator[Row], maker: ChunkMaker, files: PartOfRows, workers: int, on_rows: OnRows) -> list[Chunk]:
    """The chunks of all rows, in order. Raises StepFailure for the first invalid row."""
    writer = _ChunkWriter(maker, files, min(workers, MAX_WORKERS))
    batches = _batches(rows, CHUNK_ROWS, CHUNK_BYTES)
    pending: deque[Chunk | Future[Path]] = deque()
    finished: list[Chunk] = []

    def finish(count: int) -> None:
        """Wait until at most `count` chunks are pending."""
        while len(pending) > count:
            chunk = pending.popleft()
            finished.append(chunk if isinstance(chunk, Chunk) else _read_back(chunk.result(), maker.recipe.limits))
            on_rows(sum(chunk.rows_read for chunk in finished))

    try:
        while True:
            try:
                batch = next(batches, None)
            except StepFailure:
                finish(0)  # an invalid row among those that were read is reported before the failure to read on
                raise
            if batch is None:
                finish(0)
                return finished
            pending.append(writer.start(batch, len(finished) + len(pending)))
            finish(writer.waiting)
    finally:
        writer.close()


def _batches(rows: Iterator[Row], most: int, bytes_: int) -> Iterator[list[Row]]:
    """Rows in lists of `most` rows or `bytes_`. Read errors follow the rows before."""
    batch: list[Row] = []
    size = 0
    failure: StepFailure | None = None
    try:
        for row in rows:
            batch.append(row)
            size += row.size
            if len(batch) == most or size >= bytes_:
                yield batch
                batch, size = [], 0
    except StepFailure as caught:
        failure = caught
    if batch:
        yield batch
    if failure is not None:
        raise failure


def _read_back(path: Path, limits: Limits) -> Chunk:
    chunk = Chunk.read(path, limits)
    if chunk is None:
        raise OSError(f"{path} was written, but cannot be read back")
    return chunk


class _ChunkWriter:
    """Makes chunk files in this process at first, then in worker processes."""

    def __init__(self, maker: ChunkMaker, files: PartOfRows, workers: int) -> None:
        self._maker, self._files, self._workers = maker, files, workers
        self._made = 0
        self._pool: ProcessPoolExecutor | None = None

    @property
    def waiting(self) -> int:
        """Most chunks that may be pending while the next one is read."""
        return 0 if self._pool is None else self._workers * _PENDING_CHUNKS_PER_WORKER

    def start(self, batch: list[Row], number: int) -> "Chunk | Future[Path]":
        """Make the chunk of this number, or return the future of its file."""
        chunk = self._files.find(number)
        if chunk is not None:
            return chunk
        self._made += 1
        file = self._files.file(number)
        if self._workers < 2 or self._made <= _CHUNKS_ALONE:
            return _read_back(file.write(self._maker.make(batch)), self._maker.recipe.limits)
        if self._pool is None:
            # Spawned, not forked: the libraries' locks and threads in this process must not be copied.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _start_worker, (self._maker.recipe,))
        return self._pool.submit(_make_file, batch, file)

    def close(self) -> None:
        """End the workers, and drop the chunks that none has started."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_maker: ChunkMaker | None = None


def _start_worker(recipe: Recipe) -> None:
    global _maker
    # Ctrl-C goes to all processes of a terminal: this process's parent ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # transformers loads PyTorch wherever it finds it, which takes each worker seconds and 700 MiB, and else advises, in
    # the step's log, to install it.
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    _maker = ChunkMaker(recipe)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _make_file(batch: list[Row], file: ChunkFile) -> Path:
    if _maker is None:
        raise RuntimeError("the worker has no recipe")
    return file.write(_maker.make(batch))
