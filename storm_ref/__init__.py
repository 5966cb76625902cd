"""The reference implementation of STORM: one module a chapter of the specification.

Read the chapters in the order of spec/: config, tokenisation, memory, attention, denoiser, tiling, cost, edm, guidance,
assimilation, verification. What a user runs is in `storm_ref.workbench`; no chapter imports it.
"""

__version__ = "0.1.0"
