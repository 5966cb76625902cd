"""[NET-7] and the refusals of StormConfig."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_problems import refuses

from storm_ref.config import StormConfig, storm_10b, storm_10m, storm_200m, tiny
from storm_ref.denoiser import Storm, count_weights


@pytest.mark.parametrize(
    ("config", "size"), [(storm_10m(), 10e6), (storm_200m(), 200e6), (storm_10b(), 10e9)], ids=["10m", "200m", "10b"]
)
def test_presets_size(config: StormConfig, size: float) -> None:
    """[NET-7] within 10 % of the size the paper quotes, counted without storing a weight."""
    with torch.device("meta"):
        count = count_weights(Storm(config))
    assert abs(count - size) <= 0.1 * size, f"{count:,} weights where {size:,.0f} are named"


@pytest.mark.parametrize(
    ("config", "width", "depth"),
    [(storm_10m(), 256, 6), (storm_200m(), 1024, 8), (storm_10b(), 3072, 40)],
    ids=["10m", "200m", "10b"],
)
def test_presets_blocks(config: StormConfig, width: int, depth: int) -> None:
    """[NET-7] [ATT-7] the paper's width and depth; all matrices of the blocks together are 25 D^2 a block."""
    assert (config.width, config.depth) == (width, depth)
    with torch.device("meta"):
        blocks = Storm(config).blocks
    assert sum(p.numel() for p in blocks.parameters() if p.ndim > 1) == depth * 25 * width**2


def test_tiny_runs_on_a_laptop() -> None:
    assert count_weights(Storm(tiny())) < 500_000


@given(st.sampled_from(["channels", "width", "heads", "depth", "mlp_ratio", "position_octaves"]), st.integers(-3, 0))
def test_config_invalid_counts(name: str, value: int) -> None:
    refuses(lambda: replace(tiny(), **{name: value}), name, str(value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": (0, 2)}, ("patch", "(0, 2)")),
        ({"static_channels": -1}, ("static_channels", "-1")),
        ({"position_features": 4}, ("position_features", "4")),
        ({"heads": 5}, ("heads", "5", "64")),
        ({"noise_features": 7}, ("noise_features", "7")),
        ({"noise_features": 0}, ("noise_features", "0")),
        ({"window": -1}, ("window", "-1")),
        ({"sigma_data": 0.0}, ("sigma_data", "0.0")),
        ({"sigma_data": float("nan")}, ("sigma_data", "nan")),
        ({"sigma_data": float("inf")}, ("sigma_data", "inf")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_invalid(change: dict[str, object], words: tuple[str, ...]) -> None:
    refuses(lambda: replace(tiny(), **change), *words)


def test_config_invalid_patch_of_three(unchecked: None) -> None:
    refuses(lambda: replace(tiny(), patch=(2, 2, 2)), "patch", "(2, 2, 2)")


def test_config_frozen() -> None:
    """A checkpoint carries its configuration: equal numbers are equal, and none can change."""
    assert tiny() == tiny() and hash(tiny()) == hash(tiny())
    with pytest.raises(FrozenInstanceError):
        tiny().width = 32  # type: ignore[misc]


def test_config_accepts_no_static_fields_and_no_window() -> None:
    config = replace(tiny(), static_channels=0, window=0)
    assert (config.static_channels, config.window) == (0, 0)
