"""The tasks of the study: each has rows made by a program, and a checker that decides whether an answer is right."""

from benchmarks.quality.tasks import classification
from benchmarks.quality.tasks.programs import ARITHMETIC, COMMANDS, DATES, EXTRACTION
from benchmarks.quality.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (DATES, EXTRACTION, classification.TASK, COMMANDS, ARITHMETIC)}
"""By name, in the order of the study."""
