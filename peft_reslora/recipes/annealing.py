"""Where 0.1.0 had them; since then they are in `peft_reslora.training`."""

from peft_reslora.training import ShortcutAnnealing, anneal_shortcuts, annealed_share  # noqa: F401
