"""Planning: does a model fit so many cards of so much memory, how is it laid out, how fast can it be at best.

Everything is counted from shapes, those that the running model uses; no backend is started and nothing is allocated.
"""

from dsjax.plan.chips import Chip, chip_names, load_chip

__all__ = ["Chip", "chip_names", "load_chip"]
