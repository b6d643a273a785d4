"""Files of each kind: good ones with the same rows, and wrong ones, each with the message that a user gets."""

from tests.support.data_files.case import BadData
from tests.support.data_files.compressed import COMPRESSED
from tests.support.data_files.folders import FOLDERS
from tests.support.data_files.good import GOOD_FILES, ROWS
from tests.support.data_files.json_files import JSON_FILES
from tests.support.data_files.tables import TABLES

CORPUS: tuple[BadData, ...] = (*JSON_FILES, *TABLES, *COMPRESSED, *FOLDERS)

__all__ = ["CORPUS", "GOOD_FILES", "ROWS", "BadData"]
