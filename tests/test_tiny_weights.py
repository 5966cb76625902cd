"""The bundled weights: what they say of themselves, and that the command in the README leads to them.

Whole training is minutes long, so its beginning stands for it: the first losses of a new run must be those the file
records. Rounding differs between processors and grows as training goes on; over the first steps it stays below 1e-3.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from storm_ref.workbench.cli.options import parse, train_settings
from storm_ref.workbench.io import bundled, data
from storm_ref.workbench.prior import model
from storm_ref.workbench.run.training import TrainSettings, prepare, stored_settings, train

ROOT = Path(__file__).parents[1]


def test_weights_carry_their_command() -> None:
    """The README's and the Makefile's training command has the settings that the file records."""
    for page in ("README.md", "Makefile"):
        settings = stored_settings(train_settings(parse(_command(page))))
        # A setting younger than the file has there the value that it has by default.
        recorded = stored_settings(TrainSettings()) | model.load(bundled.weights()).training["settings"]
        assert settings == recorded


def test_weights_and_world_are_small() -> None:
    """The vectors have a limit of their own, in test_vectors.py."""
    files = [path for path in (ROOT / "tiny_data").glob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6


def test_weights_learnt_something() -> None:
    """The network, not the background alone: the loss on the held-back part falls by a third."""
    held = model.load(bundled.weights()).training["held_back"]
    assert min(loss for _, loss in held) < 0.67 * held[0][1]


@pytest.mark.slow
def test_weights_training_begins_as_recorded() -> None:
    recorded = model.load(bundled.weights())
    fields = data.read(bundled.world())
    split = np.datetime64(bundled.TRAINING_END)
    settings = train_settings(parse(_command("Makefile")))
    when = data.targets(fields.time, recorded.time_step, None, split, settings.frames)
    again = train(*prepare(fields, when, recorded.time_step, settings), settings, stop=8)
    np.testing.assert_allclose(again.training["losses"], recorded.training["losses"][:8], rtol=1e-3)


def _command(page: str) -> list[str]:
    """The words of the training command on a page, which may run over several lines."""
    command = re.search(r"-m storm_ref (train (?:[^\n]*\\\n)*[^\n]*storm_tiny.safetensors)", (ROOT / page).read_text())
    assert command is not None
    return command[1].replace("\\\n", " ").split()
