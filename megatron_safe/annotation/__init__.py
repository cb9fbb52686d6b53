"""People as annotators, through Label Studio: its tasks and labelling page out of pairs, labels out of its exports."""

from megatron_safe.annotation.labels import import_annotations, read_annotations
from megatron_safe.annotation.tasks import task_of, write_tasks

__all__ = ["import_annotations", "read_annotations", "task_of", "write_tasks"]
