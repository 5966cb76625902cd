"""Mutants: ports with deliberate faults, to show that the cases see them."""
