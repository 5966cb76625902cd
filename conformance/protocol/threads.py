"""Limit NumPy and PyTorch to one thread: imported by the command before anything that starts threads.

One and two threads differ in the last bits, [NUM-10], and on arrays as small as these a second thread only waits.
"""

import os

__all__ = ["VARIABLES"]

VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

for name in VARIABLES:
    os.environ.setdefault(name, "1")
