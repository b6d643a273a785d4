"""Data sets that cannot be trained on, each with the message that a person should get."""

from tests.support.bad_data.case import BadData
from tests.support.bad_data.compressed import COMPRESSED
from tests.support.bad_data.conversations import CONVERSATIONS
from tests.support.bad_data.folders import FOLDERS
from tests.support.bad_data.json_files import JSON_FILES
from tests.support.bad_data.tables import TABLES

CORPUS: tuple[BadData, ...] = (*JSON_FILES, *CONVERSATIONS, *TABLES, *COMPRESSED, *FOLDERS)

__all__ = ["CORPUS", "BadData"]
