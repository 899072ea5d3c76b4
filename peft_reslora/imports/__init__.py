"""Adapters that were trained with the papers' own repositories, as native adapters of this package."""

from peft_reslora.imports.account import Account, Row
from peft_reslora.imports.adapter import import_adapter

__all__ = ["Account", "Row", "import_adapter"]
