"""Wrong ports of chapter 5: how tiles are cut, weighted, denoised and blended."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.adapters import reference_operations as adapter
from conformance.mutants.mutant import Patch, chapter, edit
from storm_ref import tiling
from storm_ref.denoiser import Condition, Storm
from storm_ref.edm import Denoise, precondition
from storm_ref.tiling import Axis, Tile, Tiling

__all__ = ["TILING"]

_weights, _extents, _tiles, _bind_tiled = tiling.weights, tiling.extents, tiling.tiles, tiling.tiled_denoiser
_crop = Condition.crop


def _reramped(shape: Callable[[Tensor, int], Tensor]) -> Callable[[Axis], list[Tensor]]:
    """Weights with another ramp over the 2 b points of a seam, mirrored on the falling side."""

    def weights(axis: Axis) -> list[Tensor]:
        profiles = _weights(axis)
        if len(profiles) == 1 or axis.blend == 0:
            return profiles
        for weight, (start, stop) in zip(profiles, tiling.cores(axis), strict=True):
            first = start - axis.halo if axis.periodic else max(start - axis.halo, 0)
            place = torch.arange(first, first + len(weight))
            ends = ((place - start, start > 0), (stop - 1 - place, stop < axis.length))
            for distance, inner in ends:
                k = distance + axis.blend
                seam = (k >= 0) & (k < 2 * axis.blend)
                if inner or axis.periodic:
                    weight[seam] = shape(k[seam].double(), axis.blend)
        return profiles

    return weights


def _sines(half: float, power: int, over: int) -> Callable[[Axis], list[Tensor]]:
    return _reramped(lambda k, b: torch.sin(math.pi * (k + half) / (over * b)) ** power)


def _one_sided(axis: Axis) -> list[Tensor]:
    """sin^2(pi k / (4 b)) rising and its partner cos^2 falling: the seam sits half a point off."""
    half = math.pi / (8 * axis.blend) if axis.blend else 0.0
    profiles = _weights(axis)
    for weight in profiles if len(profiles) > 1 and axis.blend else []:
        seam = torch.nonzero((weight > 0) & (weight < 1)).flatten()
        rising = seam[seam < len(weight) / 2] if len(seam) else seam
        falling = seam[seam >= len(weight) / 2] if len(seam) else seam
        weight[rising] = torch.sin(torch.asin(weight[rising].sqrt()) - half) ** 2
        weight[falling] = torch.cos(torch.acos(weight[falling].sqrt()) - half) ** 2
    return profiles


def _normalised(shape: Callable[[int], Tensor]) -> Callable[[Axis], list[Tensor]]:
    """A window over each whole extent, divided by the sum over tiles."""

    def weights(axis: Axis) -> list[Tensor]:
        places = tiling.extents(axis)
        if len(places) == 1:
            return [torch.ones(axis.length, dtype=torch.float64)]
        total = torch.zeros(axis.length, dtype=torch.float64)
        for place in places:
            total.index_add_(0, place, shape(len(place)))
        return [shape(len(place)) / total[place] for place in places]

    return weights


def _hann(n: int) -> Tensor:
    return torch.sin(math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n) ** 2


def _numpy_hanning(axis: Axis) -> list[Tensor]:
    """numpy.hanning over the 4 b points of a rise and a fall: zero at its ends."""
    return _reramped(lambda k, b: 0.5 - 0.5 * torch.cos(2 * math.pi * k / max(4 * b - 1, 1)))(axis)


def _hann_over_extents(axis: Axis) -> list[Tensor]:
    return [torch.hann_window(len(place), dtype=torch.float64) for place in tiling.extents(axis)]


def _tapered(axis: Axis) -> list[Tensor]:
    profiles = _weights(axis)
    if not axis.periodic and len(profiles) > 1:
        ramp = torch.sin(math.pi * (torch.arange(2 * axis.blend).double() + 0.5) / (4 * axis.blend)) ** 2
        profiles[0][: len(ramp)] *= ramp
        profiles[-1][-len(ramp) :] *= ramp.flip(0)
    return profiles


def _cut_at_date_line(axis: Axis) -> list[Tensor]:
    """A periodic axis clipped at its ends, with the weights of a closed one."""
    if not axis.periodic or axis.core == axis.length:
        return _extents(axis)
    grown = [torch.arange(start - axis.halo, stop + axis.halo) for start, stop in tiling.cores(axis)]
    return [index[(index >= 0) & (index < axis.length)] for index in grown]


def _cut_weights(axis: Axis) -> list[Tensor]:
    closed = Axis(axis.length, axis.core, axis.halo, axis.blend, False, axis.patch)
    return _weights(closed)


def _transposed(made: Tiling) -> list[Tile]:
    return [
        Tile(t.rows, t.cols, t.weight.T if t.weight.shape[0] == t.weight.shape[1] else t.weight) for t in _tiles(made)
    ]


def _without_last(made: Tiling) -> list[Tile]:
    every = _tiles(made)
    return every[:-1] if len(every) > 1 else every


def _nearest_only(made: Tiling) -> list[Tile]:
    return [Tile(t.rows, t.cols, (t.weight >= 0.5).double()) for t in _tiles(made)]


_BLEND = "out[..., tile.rows[:, None], tile.cols] += tile.weight.to(value) * value"


def _tiled(*pieces: str) -> Patch:
    return (tiling, "blend_tiles", edit(*pieces))


def _axis(name: str, *pieces: str) -> Patch:
    return (Axis, name, edit(*pieces))


def _cropped(
    **change: Callable[[Condition, Tensor, Tensor, tuple[int, int], Condition], Any],
) -> Patch:
    """A crop of which some fields are made another way, from the whole, rows, cols, patch and the right crop."""

    def crop(self: Condition, rows: Tensor, cols: Tensor, patch: tuple[int, int]) -> Condition:
        right = _crop(self, rows, cols, patch)
        return replace(right, **{name: make(self, rows, cols, patch, right) for name, make in change.items()})

    return (Condition, "crop", crop)


def _centred(whole: Condition, rows: Tensor, cols: Tensor, patch: tuple[int, int], right: Condition) -> Tensor:
    """Positions relative to the tile's own middle."""
    middle: Tensor = right.position.mean((1, 2), keepdim=True)
    return right.position - middle


def _first_positions(whole: Condition, rows: Tensor, cols: Tensor, patch: tuple[int, int], right: Condition) -> Tensor:
    """Positions of the tile at the corner of the domain."""
    return whole.position[:, : right.position.shape[1], : right.position.shape[2]]


def _first_members(network: Storm, condition: Condition, made: Tiling, together: int = 16) -> Denoise:
    """Static fields of the first sample serve all members of a tile."""
    first = replace(condition, static=condition.static[:1], memory=condition.memory[:1])
    return _bind_tiled(network, first, made, together)


def _members_before_tiles(network: Storm, condition: Condition, made: Tiling, together: int = 16) -> Denoise:
    """States stacked tile by tile, conditions member by member."""
    dtype, patch = network.final.weight.dtype, network.config.patch

    def local(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
        members = len(z) // len(batch)
        parts = Condition.stack([condition.crop(t.rows, t.cols, patch) for t in batch], members)
        order = torch.arange(len(z)).reshape(len(batch), members).T.flatten()
        mixed = Condition(parts.static[order], parts.memory[order], parts.position[order], parts.periodic)
        return precondition(lambda c, s: network(c, s, mixed), z, sigma, network.config.sigma_data, dtype)

    return tiling.blend_tiles(local, made, together)


def _blended_at_the_end(i: Mapping[str, Tensor], p: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tile is denoised through all evaluations on its own, and tiles are blended once."""

    def local(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
        members = len(z) // len(batch)
        field = torch.stack([i["field"][:, tile.rows[:, None], tile.cols] for tile in batch])
        for _ in range(p["evaluations"]):
            average = p["mean"] * z.mean((-2, -1), keepdim=True)
            z = (p["own"] * z + average + field.repeat_interleave(members, 0)) / (1 + sigma**2)[:, None, None, None]
        return z

    denoise = tiling.blend_tiles(local, Tiling(Axis(**p["y"]), Axis(**p["x"])))
    return {"denoised": denoise(i["x"], i["sigma"])}


def _field_of_first_tile(i: Mapping[str, Tensor], p: Mapping[str, Any]) -> dict[str, Tensor]:
    """The field that a tile is conditioned on is read at places counted from the tile's own corner."""

    def local(z: Tensor, sigma: Tensor, batch: Sequence[Tile]) -> Tensor:
        field = i["field"][:, : z.shape[-2], : z.shape[-1]]
        average = p["mean"] * z.mean((-2, -1), keepdim=True)
        denoised: Tensor = (p["own"] * z + average + field) / (1 + sigma**2)[:, None, None, None]
        return denoised

    denoise = tiling.blend_tiles(local, Tiling(Axis(**p["y"]), Axis(**p["x"])))
    x = i["x"]
    for _ in range(p["evaluations"]):
        x = denoise(x, i["sigma"])
    return {"denoised": x}


_GROWN = "torch.arange(start - axis.halo, stop + axis.halo)"

TILING = chapter(
    "tiling",
    ("halo_short", "the halo is one point short on the left", "TILE-3",
     (tiling, "extents", edit(_GROWN, "torch.arange(start - axis.halo + (axis.halo > 0), stop + axis.halo)")),
     (tiling, "weights",
      edit("start - axis.halo if axis.periodic else max(start - axis.halo, 0)",
          "start - axis.halo + (axis.halo > 0) if axis.periodic else max(start - axis.halo + (axis.halo > 0), 0)"))),
    ("halo_long", "the halo is one patch too wide on the right", "TILE-3",
     (tiling, "extents",
      edit(_GROWN, "torch.arange(start - axis.halo, stop + axis.halo + axis.patch * (axis.halo > 0))"))),
    ("stop_is_last_index", "a core's stop is taken for its last index: extents end a point early", "TILE-3",
     (tiling, "extents", edit(_GROWN, "torch.arange(start - axis.halo, stop + axis.halo - 1)"))),
    ("halo_once", "the halo is split: half of it on each side", "TILE-3",
     (tiling, "extents", edit(_GROWN, "torch.arange(start - axis.halo // 2, stop + axis.halo // 2)")),
     (tiling, "weights",
      edit("start - axis.halo if axis.periodic else max(start - axis.halo, 0)",
          "start - axis.halo // 2 if axis.periodic else max(start - axis.halo // 2, 0)"))),
    ("halo_clamped", "beyond a closed edge the edge's point is repeated", "TILE-3",
     (tiling, "extents",
      edit("[index[(index >= 0) & (index < axis.length)] for index in grown]",
          "[index.clamp(0, axis.length - 1) for index in grown]")),
     (tiling, "weights",
      edit("start - axis.halo if axis.periodic else max(start - axis.halo, 0)", "start - axis.halo",
          "result.append(weight)", "result.append(weight * ((place >= 0) & (place < axis.length)))"))),
    ("halo_wraps_at_poles", "tiles wrap on a closed axis too: the poles touch", "TILE-3",
     (tiling, "extents", edit("if axis.periodic:", "if True:")),
     (tiling, "weights",
      edit("start - axis.halo if axis.periodic else max(start - axis.halo, 0)", "start - axis.halo",
          "result.append(weight)", "result.append(weight * ((place >= 0) & (place < axis.length)))"))),
    ("clipped_at_date_line", "tiles end at the date line of a periodic axis", "TILE-3 TILE-4",
     (tiling, "extents", _cut_at_date_line), (tiling, "weights", _cut_weights)),
    ("extents_sorted", "extents across the date line are sorted after the modulo", "TILE-3",
     (tiling, "extents", edit("index % axis.length", "(index % axis.length).sort().values"))),
    ("last_core_merged", "a last, shorter core is merged into its neighbour", "TILE-2",
     (tiling, "cores",
      edit("for start in range(0, axis.length, axis.core)",
          "for start in range(0, axis.length // axis.core * axis.core, axis.core)",
          "min(start + axis.core, axis.length)",
          "axis.length if start + 2 * axis.core > axis.length else start + axis.core"))),
    ("cores_even", "cores are of even size, as many as needed", "TILE-1 TILE-2 TILE-10",
     (tiling, "cores",
      edit("return [(start, min(start + axis.core, axis.length)) for start in range(0, axis.length, axis.core)]",
          "count = -(-axis.length // axis.core)\n"
          "    return [(i * axis.length // count, (i + 1) * axis.length // count) for i in range(count)]"))),
    ("hann_periodic", "weights are sin^2(pi k / (4 b)), without the half, mirrored", "TILE-4 TILE-5",
     (tiling, "weights", _sines(0.0, 2, 4))),
    ("hann_half_a_point_off", "weights are sin^2(pi k / (4 b)) and cos^2 of the same: the seam sits half a point off",
     "TILE-4", (tiling, "weights", _one_sided)),
    ("hann_numpy", "weights are numpy.hanning's, zero at both ends", "TILE-4 TILE-5",
     (tiling, "weights", _numpy_hanning)),
    ("hann_over_extent", "weights are a periodic Hann window over each whole extent, as it stands", "TILE-4 TILE-5",
     (tiling, "weights", _hann_over_extents)),
    ("hann_normalised", "a Hann window over the whole extent is divided by the sum of all windows", "TILE-4",
     (tiling, "weights", _normalised(_hann))),
    ("plain_average", "overlapping tiles are averaged with equal weights", "TILE-4",
     (tiling, "weights", _normalised(lambda n: torch.ones(n, dtype=torch.float64)))),
    ("linear_ramp", "weights across a seam are linear", "TILE-4",
     (tiling, "weights", _reramped(lambda k, b: (k + 0.5) / (2 * b)))),
    ("sine_not_squared", "weights across a seam are sines, not their squares", "TILE-4 TILE-5",
     (tiling, "weights", _sines(0.5, 1, 4))),
    ("ramp_twice_as_steep", "the seam's angle is over 2 b: weights rise and fall again", "TILE-4 TILE-5",
     (tiling, "weights", _sines(0.5, 2, 2))),
    ("rise_and_fall_swapped", "weights fall into a core and rise out of it", "TILE-4",
     (tiling, "weights", _reramped(lambda k, b: torch.cos(math.pi * (k + 0.5) / (4 * b)) ** 2))),
    ("seam_weights_raised", "weights below one are raised by a thousandth: their sum is not one", "TILE-4 TILE-5",
     (tiling, "weights", lambda axis: [w + 1e-3 * (w < 1) for w in _weights(axis)])),
    ("edges_tapered", "weights taper at closed edges", "TILE-4 TILE-5", (tiling, "weights", _tapered)),
    ("hard_crop", "tiles are cropped to their cores, whatever the blend", "TILE-4", (tiling, "tiles", _nearest_only)),
    ("weights_in_float32", "weights are rounded to float32", "TILE-5 NUM-2 NUM-9",
     (tiling, "weights", lambda axis: [w.float().double() for w in _weights(axis)])),
    ("blend_in_bfloat16", "weights are rounded to bfloat16 before the sum", "TILE-5 NUM-9",
     _tiled("tile.weight.to(value) * value", "tile.weight.bfloat16().to(value) * value")),
    ("blend_in_float32", "tiles are blended in float32", "NUM-9",
     _tiled("tile.weight.to(value) * value", "(tile.weight.float() * value.float()).to(value)")),
    ("weights_transposed", "rows and columns of a square tile's weights are exchanged", "TILE-4 TILE-6",
     (tiling, "tiles", _transposed)),
    ("weighted_twice", "tiles are weighted before they are denoised and after", "TILE-6",
     _tiled("z = torch.cat([x[..., tile.rows[:, None], tile.cols] for tile in batch])",
         "z = torch.cat([tile.weight.to(x) * x[..., tile.rows[:, None], tile.cols] for tile in batch])")),
    ("weighted_before", "tiles are weighted before they are denoised, and not after", "TILE-6",
     _tiled("z = torch.cat([x[..., tile.rows[:, None], tile.cols] for tile in batch])",
         "z = torch.cat([tile.weight.to(x) * x[..., tile.rows[:, None], tile.cols] for tile in batch])",
         "tile.weight.to(value) * value", "value")),
    ("weights_squared", "tiles are weighted by the squares of their weights", "TILE-6",
     _tiled("tile.weight.to(value) * value", "tile.weight.to(value) ** 2 * value")),
    ("last_tile_wins", "where tiles overlap the last one written stays", "TILE-6",
     _tiled(_BLEND,
         "seen = tile.weight.to(value) > 0\n                part = out[..., tile.rows[:, None], tile.cols]\n"
         "                out[..., tile.rows[:, None], tile.cols] = torch.where(seen, value, part)")),
    ("last_tile_left_out", "the last tile is left out", "TILE-6", (tiling, "tiles", _without_last)),
    ("tiles_see_earlier_results", "tiles see what tiles before them have written", "TILE-6 TILE-7",
     _tiled("for batch in parts:", "for batch in parts:\n            x = torch.where(out != 0, out, x)")),
    ("blended_once", "tiles are denoised on their own through all evaluations and blended at the end", "TILE-7 TILE-9",
     (adapter, "_tiled_denoise", _blended_at_the_end)),
    ("tile_local_indices", "a tile's conditions are read at places counted from its own corner", "TILE-6",
     (adapter, "_tiled_denoise", _field_of_first_tile)),
    ("tile_local_positions", "positions are counted from the tile's own corner", "TILE-6 TOK-6",
     _cropped(position=_first_positions)),
    ("tile_centred_positions", "positions are relative to the tile's middle", "TILE-6 TOK-6",
     _cropped(position=_centred)),
    ("positions_one_patch_off", "a tile's positions are those of one column of patches further on", "TILE-6 TOK-6",
     _cropped(position=lambda whole, rows, cols, patch, right: right.position.roll(1, -2))),
    ("memory_of_first_tile", "all tiles are given the first tile's memory", "TILE-6",
     _cropped(
         memory=lambda whole, r, c, patch, right: whole.memory[:, : right.memory.shape[1], : right.memory.shape[2]])),
    ("static_of_first_tile", "all tiles are given the first tile's static fields", "TILE-6",
     _cropped(static=lambda whole, r, c, patch, right: whole.static[..., : len(r), : len(c)])),
    ("tile_closes_on_itself", "windowed attention wraps inside a tile that does not span the circle",
     "TILE-6 TILE-8 ATT-6", _cropped(periodic=lambda whole, r, c, patch, right: whole.periodic)),
    ("members_before_tiles", "states are stacked tile by tile, their conditions member by member", "TILE-6 NET-6",
     (tiling, "tiled_denoiser", _members_before_tiles)),
    ("first_member_for_all", "all members of a tile are given the first one's condition", "TILE-6 NET-6",
     (tiling, "tiled_denoiser", _first_members)),
    ("sigma_stacked_wrongly", "noise levels are repeated member by member for states stacked tile by tile", "TILE-6",
     _tiled("sigma.repeat(len(batch))", "sigma.repeat_interleave(len(batch))")),
    ("position_of_first_tile_in_batch", "tiles evaluated together share the first one's positions", "TILE-6",
     (Condition, "stack", edit('repeat("position")', "parts[0].position.expand(len(parts) * batch, -1, -1, -1)"))),
    ("patch_multiple_unchecked", "cores and halos that are not whole patches are accepted", "TILE-1 CONV-10",
     _axis("__post_init__", "if getattr(self, name) % self.patch:", "if False:")),
    ("blend_beyond_halo_accepted", "a blend wider than the halo is accepted", "TILE-1 CONV-10",
     _axis("__post_init__", "if not 0 <= self.blend <= self.halo:", "if not 0 <= self.blend:")),
    ("wide_blend_accepted", "a blend of more than half a core is accepted", "TILE-1 CONV-10",
     _axis("_check_several", "2 * self.blend > self.core or ", "")),
    ("short_last_core_accepted", "a blend wider than the last core is accepted", "TILE-1 CONV-10",
     _axis("_check_several", " or self.blend > last", "")),
    ("uneven_circle_accepted", "on a periodic axis a core that does not divide the length is accepted",
     "TILE-2 CONV-10", _axis("_check_several", "if self.periodic and self.length % self.core:", "if False:")),
    ("halo_onto_itself_accepted", "a halo that wraps onto itself is accepted and shows a point twice", "TILE-3 CONV-10",
     _axis("_check_several", "if self.periodic and self.core + 2 * self.halo > self.length:", "if False:")),
    ("full_circle_refused", "a tile whose halos just meet round the circle is refused", "TILE-3",
     _axis("_check_several", "self.core + 2 * self.halo > self.length", "self.core + 2 * self.halo >= self.length")),
    ("half_blend_refused", "a blend of just half a core is refused", "TILE-1",
     _axis("_check_several", "2 * self.blend > self.core", "2 * self.blend >= self.core")),
    ("zero_core_accepted", "a core longer than the axis is accepted and cut", "TILE-1 CONV-10",
     _axis("__post_init__", "if not 1 <= self.core <= self.length:",
         "object.__setattr__(self, 'core', min(self.core, self.length))\n    if not 1 <= self.core:")),
    ("grid_unchecked", "a state of another grid than the tiling's is accepted and cut", "CONV-10 TILE-6",
     _tiled("if x.shape[-2:] != tiling.grid:",
         "if x.shape[-2] < tiling.y.length or x.shape[-1] < tiling.x.length:")),
)  # fmt: skip
