"""The kinds of task by name."""

from __future__ import annotations

from peft_reslora.experiments.settings import TrainSettings
from peft_reslora.experiments.task import Task


def make_task(settings: TrainSettings) -> Task:
    """Read and check the data, then load the base.

    Raises:
        ValueError: for bad data, with file, row and column.
    """
    if settings.task == "generation" and settings.data.messages is not None:
        from peft_reslora.experiments.conversations import conversation_task

        return conversation_task(settings)
    if settings.task == "generation":
        from peft_reslora.experiments.generation import generation_task

        return generation_task(settings)
    if settings.task == "choice":
        from peft_reslora.experiments.choice import choice_task

        return choice_task(settings)
    if settings.task == "text_to_image":
        from peft_reslora.experiments.image_task import image_task

        return image_task(settings)
    from peft_reslora.experiments.text_tasks import text_task

    return text_task(settings)
