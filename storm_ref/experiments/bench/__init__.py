"""`make bench`: linear cost on this machine, counted, timed and held in memory, and what tiling costs in fidelity."""
