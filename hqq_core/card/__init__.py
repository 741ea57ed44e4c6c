"""The model card of a result: README.md, with a front matter that the Hub understands, and a chart of errors by layer."""

from __future__ import annotations

from hqq_core.card._card import card_of
from hqq_core.card._several import card_of_several

__all__ = ["card_of", "card_of_several"]
