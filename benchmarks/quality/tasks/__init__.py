"""The tasks of the study: each has rows made by a program, and a checker that decides whether an answer is right."""

from benchmarks.quality.tasks import arithmetic, classification, commands, dates, extraction
from benchmarks.quality.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (dates.TASK, extraction.TASK, classification.TASK, commands.TASK, arithmetic.TASK)
}
"""By name, in the order of the study."""
