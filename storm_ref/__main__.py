"""Start the command line of the workbench: `python -m storm_ref`, or `storm-ref` where the package is installed."""

import sys

__all__ = ["main"]


def main() -> int:
    """Run one command and return its exit code; 2, with the remedy, where the reference's own packages are missing."""
    try:
        from storm_ref.workbench.cli.commands import main as run  # noqa: PLC0415  # needs torch and xarray
    except ModuleNotFoundError as error:
        print(
            f"storm_ref: the package {error.name} is not installed; pip install 'storm-ref[reference]' brings it",
            file=sys.stderr,
        )
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
