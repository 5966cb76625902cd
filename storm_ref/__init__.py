"""The reference implementation of STORM: one module for each chapter of the specification.

Read the chapters in the order of spec/: config, tokenisation, memory, attention, denoiser, tiling, cost, edm, guidance,
assimilation, verification; then `storm_ref.parallel`. The commands that a user runs are in `storm_ref.workbench`, which
no chapter imports.
"""

__version__ = "0.1.0"
