"""Checkpoints in other number formats, with a certificate of what that did to the values."""

from dsjax.convert.plan import Options
from dsjax.convert.run import Outcome, Share, convert
from dsjax.convert.targets import TARGETS, Encoding, Target
from dsjax.convert.verify import verify

__all__ = ["TARGETS", "Encoding", "Options", "Outcome", "Share", "Target", "convert", "verify"]
