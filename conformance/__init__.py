"""The conformance suite: is this implementation of STORM right, and if not, which requirement does it break?

Start with README.md beside this file. `python -m conformance --adapter MODULE:OBJECT` judges a port.
"""

__all__ = ["SPEC", "VECTORS", "WIRE"]

SPEC = "0.2"  # the version of the specification that cases and laws belong to
VECTORS = "0.2"  # of the frozen vectors: their format and their values
WIRE = "1"  # of the protocol between the suite and a port in a process of its own
