"""How far two sets of results lie apart: by operator, layer and call, with verdicts, tables and a plot."""

from dsjax.align.compare import compare
from dsjax.align.taps import Tap

__all__ = ["Tap", "compare"]
