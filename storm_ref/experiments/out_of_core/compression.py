"""The compression of history from disk to disk, block after block of grid rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from storm_ref.denoiser import Storm
from storm_ref.experiments.out_of_core.arrays import ArrayLike, WritableArray, checksum, expect, read_piece
from storm_ref.experiments.out_of_core.positions import Positions, positions_of
from storm_ref.experiments.out_of_core.unfinished import (
    Progress,
    Steps,
    claim,
    clear,
    digest,
    digest_of_samples,
    intact_checksums,
    network_fingerprint,
    save_checksums,
)
from storm_ref.memory import MemoryState
from storm_ref.tokenisation import age_features

__all__ = ["Frames", "compress"]

# (k0, k1, row0, row1) -> frames k0..k1 of grid rows row0..row1, [k, channels, rows, W].
Frames = Callable[[int, int, int, int], Tensor]


@torch.no_grad()
def compress(
    network: Storm,
    past: ArrayLike | Frames,
    static: ArrayLike | Frames,
    ages: Float[Tensor, " k"],
    latitude: Float[Tensor, " h"],
    longitude: Float[Tensor, " w"],
    out: WritableArray,
    folder: Path,
    rows: int = 4,
    chunk: int = 16,
    progress: Progress | None = None,
    position: ArrayLike | None = None,
) -> None:
    """Compress K past frames [K, C, H, W] into the memory `out` [H / p_y, W / p_x, D]; see the package's guarantees.

    It takes `rows` rows of patches and `chunk` frames at a time, and a step of progress is one such block. `static` has
    each frame's own fields [K, S, H, W], or [S, H, W] for all of them. Past frames and static fields may be functions
    that make or read them on demand, `Frames`. `ages` are hours before the analysis. `out` has the dtype of the
    network, float32 where that is shorter. `folder` and `position` are as for `denoise` and `Domain`.

    Raises ValueError for no frame, ages that are not positive, rows or chunk < 1, shapes and dtypes that do not fit,
    and a folder of another run.
    """
    if len(ages) == 0 or rows < 1 or chunk < 1:
        raise ValueError(f"rows, chunk and frames are at least 1, got rows {rows}, chunk {chunk}, {len(ages)} frames")
    age_features(ages.double(), 1)  # raises for ages that are not positive
    config = network.config
    grid = (latitude.shape[0], longitude.shape[0])
    static_shape = (len(ages), config.static_channels, *grid)
    past_frames = _frames("past frames", past, (len(ages), config.channels, *grid))
    static_frames = _frames("static fields of the past", static, static_shape, one_serves_all=True)
    positions = positions_of(config, latitude, longitude, position)
    dtype = torch.promote_types(network.final.weight.dtype, torch.float32)
    expect("out", out, (positions.rows, positions.cols, config.width), {str(dtype).removeprefix("torch.")})
    settings = {"rows": rows, "chunk": chunk, "grid": grid}
    claim(folder, _fingerprint(network, past_frames, static_frames, ages, positions, settings))
    blocks = [(top, min(top + rows, positions.rows)) for top in range(0, positions.rows, rows)]
    columns = ((0, positions.cols),)
    finished = intact_checksums(
        folder, lambda n: checksum(read_piece(out, (blocks[n],), columns, grid_first=True).numpy())
    )
    step = Steps(progress, len(blocks))
    step.skip(len(finished))
    for block in blocks[len(finished) :]:
        tokens = _compress_block(network, past_frames, static_frames, ages, positions, block, chunk).cpu().numpy()
        out[slice(*block)] = tokens
        finished.append(checksum(tokens))
        save_checksums(folder, finished)
        step()
    clear(folder)


def _compress_block(
    network: Storm,
    past: Frames,
    static: Frames,
    ages: Tensor,
    positions: Positions,
    block: tuple[int, int],
    chunk: int,
) -> Float[Tensor, "rows cols d"]:
    """Stream some rows of patches as `Storm.compress` does, with frames that are read as they are needed."""
    device = network.final.weight.device
    patch = network.config.patch[0]
    position = positions((block,), ((0, positions.cols),)).to(device)
    top = block[0] * patch
    bottom = block[1] * patch
    state: MemoryState | None = None
    for start in range(0, len(ages), chunk):
        stop = min(start + chunk, len(ages))
        frames = past(start, stop, top, bottom)[None].to(device)
        fields = static(start, stop, top, bottom)[None].to(device)
        state = network.compress_chunk(state, frames, fields, ages[None, start:stop].to(device), position)
    assert state is not None
    tokens = rearrange(network.memory.finish(state)[0], "(i j) d -> i j d", j=positions.cols)
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32)).contiguous()


def _frames(name: str, source: ArrayLike | Frames, shape: tuple[int, ...], one_serves_all: bool = False) -> Frames:
    """The frames of a function or of an array of this shape, of shape[1:] where one array serves all frames."""
    if not isinstance(source, ArrayLike):
        return _checked(name, source, shape)
    array = source
    columns = ((0, shape[-1]),)
    if one_serves_all and tuple(array.shape) == shape[1:]:
        return lambda k0, k1, row0, row1: read_piece(array, ((row0, row1),), columns).expand(k1 - k0, -1, -1, -1)
    expect(name, array, shape)
    return lambda k0, k1, row0, row1: read_piece(array, ((row0, row1),), columns, (slice(k0, k1),))


def _checked(name: str, source: Frames, shape: tuple[int, ...]) -> Frames:
    def checked_frames(k0: int, k1: int, row0: int, row1: int) -> Tensor:
        frames = source(k0, k1, row0, row1)
        wanted = (k1 - k0, shape[1], row1 - row0, shape[3])
        if tuple(frames.shape) != wanted:
            raise ValueError(
                f"{name} {k0}..{k1}, rows {row0}..{row1}: shape {tuple(frames.shape)}, but {wanted} is wanted"
            )
        return frames

    return checked_frames


def _fingerprint(
    network: Storm, past: Frames, static: Frames, ages: Tensor, positions: Positions, settings: dict[str, Any]
) -> dict[str, Any]:
    """The settings and the inputs, of the frames the first rows of the first and the last rows of the last."""
    last = len(ages)
    height = settings["grid"][0]
    patch = network.config.patch[0]
    ends = ((0, 1, 0, patch), (last - 1, last, height - patch, height))
    given = {} if positions.given is None else {"position": digest_of_samples(positions.given, grid_first=True)}
    return {
        "kind": "compress",
        **settings,
        "ages": digest(ages),
        "coordinates": digest(positions.lat, positions.lon),
        "past": digest(*(past(*end) for end in ends)),
        "static": digest(*(static(*end) for end in ends)),
        **given,
        **network_fingerprint(network),
    }
