"""Turns rows into chunks of tokens with all cores, and goes on where an interrupted attempt stopped.

Rows are put into chunks by their number and size alone, so that a chunk holds the same whoever makes it, and when. A
chunk that is on disk is not made again.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal

from qlora_api.dataset import Columns
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.data.chat_template import TokenizedRow, Tokenizer
from qlora_trainer.data.chunks import Chunk, Dropped
from qlora_trainer.data.formats import Format, RowReader
from qlora_trainer.data.reading import parse
from qlora_trainer.data.rows import RawRow

CHUNK_ROWS = 4096
CHUNK_BYTES = 2**24
"""A chunk ends at so many rows or bytes of text, whichever comes first."""
MAX_WORKERS = 8
"""Reading keeps up with about so many."""
# What is tokenized in one call: a token takes some 200 bytes until it is put away.
_BATCH_ROWS = 128
_BATCH_BYTES = 2**20
# Workers load the tokenizer's libraries for some seconds, in which this process makes so many chunks.
_CHUNKS_ALONE = 4
_WAITING_CHUNKS_A_WORKER = 2
OnRows = Callable[[int], None]
"""Called with the rows tokenized so far."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which tokens a row becomes."""

    tokenizer: Path
    """Folder of the tokenizer's files."""
    vocabulary: int
    """Tokens that the model knows."""
    format: Format
    columns: Columns
    train_on: Literal["completion", "all"]
    longest_allowed: int
    """Tokens; a longer row is left out."""


class ChunkMaker:
    """Makes chunks by a recipe."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer`: that of the recipe, where it is loaded already."""
        self._recipe = recipe
        self._tokenizer = tokenizer or Tokenizer(recipe.tokenizer)
        self._reader = RowReader(recipe.format, recipe.columns)

    def make(self, rows: Sequence[RawRow]) -> Chunk:
        """The chunk of these rows. Raises StepFailure for the first one that is wrong."""
        used: list[TokenizedRow] = []
        too_long: list[int] = []
        unlabeled: list[str] = []
        first_too_long: str | None = None
        for row, tokens in self._tokenized(rows):
            count = len(tokens.input_ids)
            if count > self._recipe.longest_allowed:
                too_long.append(count)
                first_too_long = first_too_long or row.place
            elif not tokens.is_target.any():
                unlabeled.append(row.place)
            else:
                self._require_known(int(tokens.input_ids.max()))
                used.append(tokens)
        dropped = Dropped(len(unlabeled), unlabeled[0] if unlabeled else None, first_too_long)
        return Chunk.of(((tokens.input_ids, tokens.is_target) for tokens in used), too_long, dropped)

    def _tokenized(self, rows: Sequence[RawRow]) -> Iterator[tuple[RawRow, TokenizedRow]]:
        for batch in _batches(iter(rows), _BATCH_ROWS, _BATCH_BYTES):
            rendered = [self._tokenizer.render(self._reader.read(parse(row)), row.place) for row in batch]
            yield from zip(batch, self._tokenizer.tokenize(rendered, self._recipe.train_on), strict=True)

    def _require_known(self, largest: int) -> None:
        if largest >= self._recipe.vocabulary:
            raise bad_configuration(
                f"the tokenizer makes token {largest}, but the model knows only {self._recipe.vocabulary} "
                "(vocab_size): the tokenizer belongs to another model"
            )


def tokenize(
    rows: Iterator[RawRow], maker: ChunkMaker, recipe: Recipe, prefix: Path, workers: int, on_rows: OnRows
) -> list[Chunk]:
    """The chunks of all rows, in order, kept in files whose paths begin with `prefix`.

    Memory: a few chunks of text for each of `workers` processes. Raises StepFailure for the first row that is wrong.
    """
    crew = _Crew(maker, recipe, min(workers, MAX_WORKERS))
    batches = _batches(rows, CHUNK_ROWS, CHUNK_BYTES)
    pending: deque[tuple[Path, Future[None] | None]] = deque()
    finished: list[Chunk] = []

    def finish(count: int) -> None:
        """Wait until at most `count` chunks are pending."""
        while len(pending) > count:
            path, future = pending.popleft()
            if future is not None:
                future.result()
            finished.append(_read_back(path))
            on_rows(sum(chunk.rows_read for chunk in finished))

    try:
        while True:
            try:
                batch = next(batches, None)
            except StepFailure:
                finish(0)  # a wrong row among those that were read goes before the place where reading ends
                raise
            if batch is None:
                finish(0)
                return finished
            path = Path(f"{prefix}-{len(finished) + len(pending):06}.safetensors")
            pending.append((path, crew.start(batch, path)))
            finish(crew.waiting)
    finally:
        crew.close()


def _batches(rows: Iterator[RawRow], most: int, bytes_: int) -> Iterator[list[RawRow]]:
    """Rows in lists that end at `most` rows or so many bytes. A failure to read comes after the rows before it."""
    batch: list[RawRow] = []
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


def _read_back(path: Path) -> Chunk:
    chunk = Chunk.read(path)
    if chunk is None:
        raise OSError(f"{path} was written, but cannot be read back")
    return chunk


class _Crew:
    """Makes chunk files: here at first, and in worker processes as soon as there are many."""

    def __init__(self, maker: ChunkMaker, recipe: Recipe, workers: int) -> None:
        self._maker, self._recipe, self._workers = maker, recipe, workers
        self._made = 0
        self._pool: ProcessPoolExecutor | None = None

    @property
    def waiting(self) -> int:
        """How many chunks may be pending before the next is read."""
        return 0 if self._pool is None else self._workers * _WAITING_CHUNKS_A_WORKER

    def start(self, batch: list[RawRow], path: Path) -> "Future[None] | None":
        """Make the file unless it is there whole: None if that is done, else what to wait for."""
        if Chunk.read(path) is not None:
            return None
        self._made += 1
        if self._workers < 2 or self._made <= _CHUNKS_ALONE:
            self._maker.make(batch).write(path)
            return None
        if self._pool is None:
            # Processes that are started anew share no locks and threads of the libraries in this one.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, _start_worker, (self._recipe,))
        return self._pool.submit(_make_file, batch, path)

    def close(self) -> None:
        """End the workers; chunks that are not begun are not made."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


_maker: ChunkMaker | None = None
"""What a worker process makes chunks with."""


def _start_worker(recipe: Recipe) -> None:
    global _maker
    # Ctrl-C goes to all processes of a terminal: the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _maker = ChunkMaker(recipe)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _make_file(batch: list[RawRow], path: Path) -> None:
    if _maker is None:
        raise RuntimeError("the worker has no recipe")
    _maker.make(batch).write(path)
