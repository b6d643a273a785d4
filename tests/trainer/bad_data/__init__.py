"""Data sets that people bring and that cannot be trained on, each with what they should be told."""

from tests.trainer.bad_data.case import BadData
from tests.trainer.bad_data.compressed import COMPRESSED
from tests.trainer.bad_data.conversations import CONVERSATIONS
from tests.trainer.bad_data.folders import FOLDERS
from tests.trainer.bad_data.json_files import JSON_FILES
from tests.trainer.bad_data.tables import TABLES

CORPUS: tuple[BadData, ...] = (*JSON_FILES, *CONVERSATIONS, *TABLES, *COMPRESSED, *FOLDERS)

__all__ = ["CORPUS", "BadData"]
