"""Callbacks for transformers' Trainer, and the functions behind them for other training loops."""

from peft_reslora.reslora.nested_ranks import rank_in_use, set_rank
from peft_reslora.training.annealing import ShortcutAnnealing, anneal_shortcuts, annealed_share
from peft_reslora.training.dropped_layers import DroppedLayers, LayerGates, active_probability, draw_active
from peft_reslora.training.nested_ranks import NestedRanks, OneDirection, draw_rank
from peft_reslora.training.rank_allocation import RankAllocationCallback, update_and_allocate
from peft_reslora.training.restart_weights import load_base_weights, save_base_weights
from peft_reslora.training.restartable import check_restartable
from peft_reslora.training.restarts import MergeAndRestartCallback, merge_and_restart
from peft_reslora.training.rewarming import rewarm

__all__ = [
    "DroppedLayers",
    "LayerGates",
    "MergeAndRestartCallback",
    "NestedRanks",
    "OneDirection",
    "RankAllocationCallback",
    "ShortcutAnnealing",
    "active_probability",
    "anneal_shortcuts",
    "annealed_share",
    "check_restartable",
    "draw_active",
    "draw_rank",
    "load_base_weights",
    "merge_and_restart",
    "rank_in_use",
    "rewarm",
    "save_base_weights",
    "set_rank",
    "update_and_allocate",
]
