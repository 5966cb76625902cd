"""The former entry point of `python -m conformance answer`."""

import sys

if __name__ == "__main__":
    print("conformance: python -m conformance.directory answer is now python -m conformance answer", file=sys.stderr)
    sys.exit(2)
