"""Where 0.1.0 had them; since then they are in `peft_reslora.training`."""

from peft_reslora.training import (  # noqa: F401
    MergeAndRestartCallback,
    check_restartable,
    load_base_weights,
    merge_and_restart,
    rewarm,
    save_base_weights,
)
