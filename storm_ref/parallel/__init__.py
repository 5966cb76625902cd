"""Chapter 9: the same numbers from many ranks. Nothing outside this package knows of ranks."""
