"""The conformance suite: is this implementation of STORM right, and if not, which requirement does it break?

Start with README.md beside this file. `python -m conformance --adapter MODULE:OBJECT` judges a port.
"""

__all__ = ["SPEC"]

SPEC = "0.1"  # the version of the specification that the cases belong to
