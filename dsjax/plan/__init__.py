"""Planning: does a model fit so many cards of so much memory, how is it laid out, how fast can it be at best.

Everything is counted from shapes, those that the running model uses; no backend is started and nothing is allocated.
"""

from dsjax.plan.answer import answer
from dsjax.plan.chips import Chip, chip_names, load_chip
from dsjax.plan.memory import RESERVE, Load
from dsjax.plan.placement import Model, load_model
from dsjax.plan.search import Cards

__all__ = ["RESERVE", "Cards", "Chip", "Load", "Model", "answer", "chip_names", "load_chip", "load_model"]
