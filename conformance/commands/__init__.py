"""The commands of `python -m conformance` that judge a port; the others live in the room of what they do."""
