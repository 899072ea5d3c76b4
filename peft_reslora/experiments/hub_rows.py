"""Rows of a data set of the Hub, or at once what to do where the Hub cannot be reached."""

from __future__ import annotations

from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from peft_reslora.experiments.settings import HubData

_SECONDS = 10.0  # to connect; the retries of huggingface_hub take minutes


def load_hub_split(hub: HubData, split: str, way_out: str) -> Any:
    """One split, from the cache where the Hub does not answer.

    Args:
        hub: the data set.
        split: as it is called there.
        way_out: what to set to read files instead.

    Raises:
        ValueError: if the Hub cannot be reached and the cache has no such data set; it says `way_out`.
    """
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    # As HF_HUB_OFFLINE=1 in the environment, which is read once, when datasets is imported.
    datasets.config.HF_HUB_OFFLINE = offline or not hub_answers()
    try:
        return datasets.load_dataset(hub.name, hub.config, split=split)
    except ConnectionError as error:
        raise ValueError(
            f"The data set {hub.name} is not in the cache and the Hub cannot be reached. {way_out}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def hub_answers() -> bool:
    """Whether the Hub can be reached, found out in seconds."""
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # httpx's or httpx2's, by the version of huggingface_hub; offline mode is a ConnectionError
        return False
    return True
