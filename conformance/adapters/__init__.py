"""Adapters: what connects an implementation to the suite."""
