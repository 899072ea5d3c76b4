"""A base model of the Hub, or at once what to do where the Hub cannot be reached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

from peft_reslora.experiments.hub_rows import hub_answers


@contextmanager
def reading_base(name: str) -> Iterator[None]:
    """While a base of this name is read: from the cache alone where the Hub does not answer.

    Raises:
        ValueError: if the Hub cannot be reached and the cache has no such base.
    """
    if os.path.isdir(name):
        yield
        return
    offline = constants.HF_HUB_OFFLINE
    # As HF_HUB_OFFLINE=1 in the environment, which is read once, when huggingface_hub is imported.
    unreachable = constants.HF_HUB_OFFLINE = offline or not hub_answers()
    try:
        yield
    except OSError as error:
        if not unreachable:
            raise
        raise ValueError(
            f"The base {name} is not in the cache and the Hub cannot be reached. Set base.name to a folder that holds "
            "the model with its tokenizer. (HF_HUB_OFFLINE=1 reads the cache without asking the Hub.)"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline
