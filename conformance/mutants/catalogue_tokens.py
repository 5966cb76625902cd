"""Wrong ports of chapters 1 and 2: tokens and the compressed memory."""

import torch
from einops import rearrange
from torch import Tensor

from conformance.mutants.mutant import chapter, edit
from storm_ref import memory, tokenisation
from storm_ref.denoiser import Storm
from storm_ref.memory import MemoryState, TemporalMemory

__all__ = ["MEMORY", "TOKENISATION"]

_patchify, _sphere, _update = tokenisation.patchify, tokenisation.sphere_position, memory.memory_update


def _padded(x: Tensor, patch: tuple[int, int]) -> Tensor:
    below, right = -x.shape[-2] % patch[0], -x.shape[-1] % patch[1]
    return _patchify(torch.nn.functional.pad(x, (0, right, 0, below)), patch)


def _mean_of_vectors(latitude: Tensor, longitude: Tensor, patch: tuple[int, int]) -> Tensor:
    """The mean direction of a patch's points, back on the sphere."""
    points = _sphere(latitude, longitude, (1, 1))
    mean: Tensor = rearrange(points, "(i p) (j q) c -> i j (p q) c", p=patch[0], q=patch[1]).mean(2)
    unit: Tensor = mean / mean.norm(dim=-1, keepdim=True)
    return unit


def _tiny_to_zero(x: Tensor, patch: tuple[int, int]) -> Tensor:
    patches = _patchify(x, patch)
    return torch.where(patches.abs() < 1e-30, torch.zeros_like(patches), patches)


_FIRST_AGE = "age_features(age[:, :1].expand_as(age).double()"
_LINEAR = "math.pi / 2 * (1 + torch.arange(octaves, dtype=r.dtype, device=r.device))"
_BOTH = ("patchify", "unpatchify")

TOKENISATION = chapter(
    "tokenisation",
    ("tokens_column_major", "tokens are numbered column by column", "TOK-2 CONV-1",
     *((tokenisation, name, edit("(i j) (c p q)", "(j i) (c p q)")) for name in _BOTH)),
    ("tokens_channel_last", "inside a token the order is row, column, channel", "TOK-2 CONV-1",
     *((tokenisation, name, edit("(c p q)", "(p q c)")) for name in _BOTH)),
    ("token_columns_before_rows", "inside a token the row is the fastest index", "TOK-2 CONV-1",
     *((tokenisation, name, edit("(c p q)", "(c q p)")) for name in _BOTH)),
    ("patch_axes_swapped", "the patch is read as (p_x, p_y)", "TOK-1 TOK-2",
     *((tokenisation, name, edit("p=patch[0], q=patch[1]", "p=patch[1], q=patch[0]")) for name in _BOTH)),
    ("fields_column_major", "fields are put together from tokens column by column", "TOK-2 TOK-3",
     (tokenisation, "unpatchify", edit("(i j) (c p q)", "(j i) (c p q)"))),
    ("crop_in_silence", "rows and columns that do not fill a patch are cropped in silence", "TOK-1 CONV-10",
     (tokenisation, "patchify",
      edit("    height, width = x.shape[-2:]\n",
          "    height, width = (s // p * p for s, p in zip(x.shape[-2:], patch))\n    x = x[..., :height, :width]\n"))),
    ("pad_in_silence", "a grid that the patch does not divide is padded with zeros in silence", "TOK-1 CONV-10",
     (tokenisation, "patchify", _padded)),
    ("denormals_flushed", "tiny values become zero on the way into tokens", "TOK-3",
     (tokenisation, "patchify", _tiny_to_zero)),
    ("ragged_tokens_accepted", "tokens that do not fill whole rows of patches are cut short in silence",
     "CONV-10 TOK-3",
     (tokenisation, "unpatchify",
      edit("    if rows < 1 or count % rows:\n",
          "    tokens = tokens[..., : count // rows * rows, :]\n    if rows < 1:\n"))),
    ("patch_corner", "a patch's position is that of its first point", "TOK-6",
     (tokenisation, "_centres", edit(".mean(1)", "[:, 0]"))),
    ("position_in_float32", "angles are rounded to float32 before their sines", "TOK-9",
     (tokenisation, "sphere_position",
      edit("torch.deg2rad(_centres(latitude, patch[0]))",
          "torch.deg2rad(_centres(latitude, patch[0])).float().double()",
          "torch.deg2rad(_centres(longitude, patch[1]))",
          "torch.deg2rad(_centres(longitude, patch[1])).float().double()"))),
    ("longitude_in_radians", "degrees of longitude are fed to sine and cosine", "TOK-6 CONV-3",
     (tokenisation, "sphere_position",
      edit("torch.deg2rad(_centres(longitude, patch[1]))", "_centres(longitude, patch[1])"))),
    ("colatitude", "latitude is counted from the pole, as the angle theta of spherical coordinates", "TOK-6 CONV-3",
     (tokenisation, "sphere_position",
      edit("torch.deg2rad(_centres(latitude, patch[0]))", "torch.deg2rad(90 - _centres(latitude, patch[0]))"))),
    ("south_positive", "southern latitudes are positive", "CONV-3 TOK-6",
     (tokenisation, "_centres",
      edit("coordinate.double()", "(-coordinate if coordinate.abs().max() <= 90 else coordinate).double()"))),
    ("latitude_sine_for_cosine", "the first two coordinates have the sine of latitude in place of its cosine", "TOK-6",
     (tokenisation, "sphere_position",
      edit("torch.cos(lat) * torch.cos(lon)", "torch.sin(lat) * torch.cos(lon)", "torch.cos(lat) * torch.sin(lon)",
          "torch.sin(lat) * torch.sin(lon)"))),
    ("longitude_as_a_number", "the first coordinate is longitude itself, which jumps at the date line", "TOK-6",
     (tokenisation, "sphere_position", edit("torch.cos(lat) * torch.cos(lon)", "torch.cos(lat) * lon / math.pi"))),
    ("mean_of_unit_vectors", "a patch's position is the mean direction of its points, not of the mean coordinates",
     "TOK-6", (tokenisation, "sphere_position", _mean_of_vectors)),
    ("date_line_jump_accepted", "longitudes that jump from 359 to 0 are averaged across the jump", "CONV-10 CONV-2",
     (tokenisation, "_centres", edit("(coordinate.diff().abs() > 180).any()", "False"))),
    ("region_without_cosine", "distances along a parallel are not shortened by cos(lat_0)", "TOK-6",
     (tokenisation, "region_position", edit(" * torch.cos(torch.deg2rad(lat_0))", ""))),
    ("region_axes_swapped", "the region's coordinates are (y, x)", "TOK-6",
     (tokenisation, "region_position", edit(".flip(-1)", ""))),
    ("region_from_the_corner", "the region's coordinates count from its first row and column", "TOK-6",
     (tokenisation, "region_position",
      edit("(latitude.double().max() + latitude.double().min()) / 2", "latitude.double()[0]",
          "(longitude.double().max() + longitude.double().min()) / 2", "longitude.double()[0]"))),
    ("region_middle_of_centres", "the region's middle is the mean of its coordinates, not of their extremes", "TOK-6",
     (tokenisation, "region_position",
      edit("(latitude.double().max() + latitude.double().min()) / 2", "latitude.double().mean()",
          "(longitude.double().max() + longitude.double().min()) / 2", "longitude.double().mean()"))),
    ("latitude_not_its_sine", "the zonal position is latitude over 90, not its sine", "TOK-6",
     (tokenisation, "latitude_position",
      edit("torch.sin(torch.deg2rad(_centres(latitude, patch[0])))", "(_centres(latitude, patch[0]) / 90)"))),
    ("fourier_cosines_first", "codes have the cosines before the sines", "TOK-7 TOK-8",
     (tokenisation, "fourier_features", edit("[phase.sin(), phase.cos()]", "[phase.cos(), phase.sin()]"))),
    ("fourier_interleaved", "codes have sine and cosine side by side", "TOK-7 TOK-8",
     (tokenisation, "fourier_features",
      edit("torch.cat([phase.sin(), phase.cos()], -1)", "torch.stack([phase.sin(), phase.cos()], -1).flatten(-2)"))),
    ("octave_slowest", "codes run octave by octave, the coordinate fastest", "TOK-7",
     (tokenisation, "fourier_features", edit("(r[..., None] * waves)", "(r[..., None, :] * waves[:, None])"))),
    ("fourier_octaves_from_one", "the longest wave of a code is 2: the two poles share one", "TOK-7 TOK-8",
     (tokenisation, "fourier_features", edit("math.pi / 2 *", "math.pi *"))),
    ("linear_waves", "wave numbers are 1, 2, 3, ... instead of powers of two", "TOK-7 TOK-8",
     (tokenisation, "fourier_features",
      edit("math.pi / 2 * 2.0 ** torch.arange(octaves, dtype=r.dtype, device=r.device)", _LINEAR))),
    ("position_narrow", "positions are rounded to the network's dtype before their codes are made", "TOK-9",
     (Storm, "_position", edit("position.double()", "position.to(like.dtype)"))),
    ("age_narrow", "ages are rounded to the network's dtype before their codes are made", "TOK-9",
     (Storm, "embed_past", edit("age.double()", "age.to(tokens.dtype)"))),
    ("position_of_index", "a token is known by its row and column, not by its coordinates", "TOK-6 TOK-4",
     (Storm, "_position",
      edit("position.double()",
          "torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in position.shape[-3:-1]), "
          "indexing='ij'), -1)[..., [0, 1, 1][: position.shape[-1]]].expand(position.shape)"))),
    ("position_from_first_token", "positions are counted from that of the first token", "TOK-4 TOK-6",
     (Storm, "_position", edit("position.double()", "(position.double() - position[..., :1, :1, :])"))),
    ("age_in_days", "age is in days", "TOK-8 CONV-4",
     (tokenisation, "age_features", edit("1 + age)", "1 + age / 24)"))),
    ("age_natural_logarithm", "age goes through the natural logarithm", "TOK-8",
     (tokenisation, "age_features", edit("torch.log2", "torch.log"))),
    ("age_linear", "age enters codes as it is, over 100 hours, not through a logarithm", "TOK-8",
     (tokenisation, "age_features", edit("torch.log2(1 + age) / 8", "age / 100"))),
    ("age_without_one", "age goes through log2(age), not log2(1 + age)", "TOK-8",
     (tokenisation, "age_features", edit("torch.log2(1 + age)", "torch.log2(age)"))),
    ("age_sign_ignored", "a frame of the future passes as one of the past", "TOK-8 CONV-4 CONV-10",
     (tokenisation, "age_features", edit("(age > 0)", "(age != 0)", "1 + age)", "1 + age.abs())"))),
    ("age_zero_accepted", "a frame of the present passes as one of the past", "TOK-8 CONV-4 CONV-10",
     (tokenisation, "age_features", edit("(age > 0)", "(age >= 0)"))),
    ("age_infinite_accepted", "an infinite age is accepted", "TOK-8 CONV-4 CONV-10",
     (tokenisation, "age_features",
      edit("torch.isfinite(age) & (age > 0)", "(age > 0)", "1 + age)", "1 + age.clamp(max=2.0**32))"))),
    ("age_clamped", "ages beyond a year count as a year", "TOK-8",
     (tokenisation, "age_features", edit("1 + age)", "1 + age.clamp(max=8760))"))),
    ("age_shared", "one age code serves all frames of a chunk", "TOK-5",
     (Storm, "embed_past", edit("age_features(age.double()", _FIRST_AGE))),
    ("frame_index_for_age", "a frame's place in the list stands for its age", "TOK-5 TOK-8 CONV-4",
     (Storm, "embed_past",
      edit("age_features(age.double()", "age_features((torch.arange(age.shape[1]) + 1.0).double().expand_as(age)"))),
    ("ages_reversed", "ages run the other way than the frames", "TOK-5",
     (Storm, "embed_past", edit("age_features(age.double()", "age_features(age.flip(1).double()"))),
    ("age_forgotten", "history tokens have no age code", "TOK-5",
     (Storm, "embed_past", edit(" + code[:, :, None]", ""))),
    ("age_of_first_sample", "the ages of the first sample serve the batch", "TOK-5",
     (Storm, "embed_past", edit("age_features(age.double()", "age_features(age[:1].expand_as(age).double()"))),
    ("static_of_first_frame", "the first past frame's static fields serve all frames", "TOK-5",
     (Storm, "embed_past",
      edit("torch.cat([past, static], 2)", "torch.cat([past, static[:, :1].expand_as(static)], 2)"))),
    ("static_before_state", "static channels stand before the state's", "TOK-4 CONV-1",
     (Storm, "embed", edit("torch.cat([x, static], 1)", "torch.cat([static, x], 1)"))),
    ("past_static_first", "static channels stand before the past state's", "TOK-5 CONV-1",
     (Storm, "embed_past", edit("torch.cat([past, static], 2)", "torch.cat([static, past], 2)"))),
    ("past_times_c_in", "past frames are scaled by c_in at sigma = 1", "TOK-5 NET-5",
     (Storm, "embed_past",
      edit("torch.cat([past, static], 2)",
          "torch.cat([past.double() * (1 + self.config.sigma_data**2) ** -0.5, static.double()], 2)"))),
    ("history_by_state_weights", "past frames are embedded with the state's weights", "TOK-5",
     (Storm, "embed_past", edit("self.embed_history(patchify", "self.embed_state(patchify"))),
    ("history_without_position", "history tokens have no position code", "TOK-5",
     (Storm, "embed_past", edit(" + self._position(position, tokens)", ""))),
    ("state_without_position", "state tokens have no position code", "TOK-4",
     (Storm, "embed", edit("return t + self._position(position, t)", "return t"))),
    ("positions_column_major", "positions are assigned to tokens column by column", "TOK-4 TOK-5",
     (Storm, "_position", edit("... i j f -> ... (i j) f", "... i j f -> ... (j i) f"))),
)  # fmt: skip


def _softmax_over(dim: int) -> object:
    """The update of a memory whose softmax runs over another axis than frames: locations (2) or heads (3)."""

    def update(state: MemoryState, score: Tensor, value: Tensor) -> MemoryState:
        if score.shape[1] == 0:
            return state
        added = torch.einsum("bkna,bknad->bnad", torch.softmax(score, dim), value)
        return MemoryState(state.maximum, torch.ones_like(state.denominator), state.accumulator + added)

    return update


def _mean_of_chunks(state: MemoryState, score: Tensor, value: Tensor) -> MemoryState:
    """Each chunk's softmax by itself; the denominator counts chunks."""
    if score.shape[1] == 0:
        return state
    added = memory.memory_by_definition(score, value)
    return MemoryState(state.maximum, state.denominator + 1, state.accumulator + added)


def _divided_every_chunk(state: MemoryState, score: Tensor, value: Tensor) -> MemoryState:
    """Divides by the denominator after each chunk, and keeps the denominator for the end."""
    updated = _update(state, score, value)
    return MemoryState(updated.maximum, updated.denominator, updated.accumulator / updated.denominator[..., None])


_B16 = ".bfloat16().to(score.dtype)"
_SCORES = 'torch.einsum("bknad,ad->bkna", key, self.query) / key.shape[-1] ** 0.5'
_MAXIMUM = "torch.maximum(state.maximum, score.amax(1))"

MEMORY = chapter(
    "memory",
    ("memory_scale_1_over_d", "memory scores are divided by d, not by its root", "MEM-1",
     (TemporalMemory, "scores_and_values", edit(" / key.shape[-1] ** 0.5", " / key.shape[-1]"))),
    ("memory_unscaled", "memory scores are not divided by the root of d", "MEM-1",
     (TemporalMemory, "scores_and_values", edit(" / key.shape[-1] ** 0.5", ""))),
    ("memory_scale_width", "memory scores are divided by the root of the width, not of the head's", "MEM-1",
     (TemporalMemory, "scores_and_values", edit("/ key.shape[-1] ** 0.5", "/ tokens.shape[-1] ** 0.5"))),
    ("memory_query_shared", "all heads use the first head's query", "MEM-1",
     (TemporalMemory, "scores_and_values", edit("key, self.query)", "key, self.query[:1].expand_as(self.query))"))),
    ("memory_heads_interleaved", "the memory's values are cut into heads by stride", "MEM-2",
     (TemporalMemory, "scores_and_values",
      edit('self.value(tokens), "b k n (a d)', 'self.value(tokens), "b k n (d a)'))),
    ("memory_key_as_value", "the memory mixes keys instead of values", "MEM-2",
     (TemporalMemory, "scores_and_values", edit("self.value(tokens)", "self.key(tokens)"))),
    ("memory_value_bias_forgotten", "the memory's values have no bias", "MEM-2 MEM-5",
     (TemporalMemory, "scores_and_values", edit("self.value(tokens)", "(self.value(tokens) - self.value.bias)"))),
    ("memory_heads_averaged", "the memory's scores are averaged over heads", "MEM-2",
     (TemporalMemory, "scores_and_values",
      edit(f"return {_SCORES}, value",
          f"score = {_SCORES}\n    return score.mean(-1, keepdim=True).expand_as(score), value"))),
    ("memory_mean_of_frames", "the memory is the plain mean of the frames", "MEM-2",
     (memory, "memory_update",
      edit("score - maximum[:, None]", "0 * score", _MAXIMUM, "torch.zeros_like(state.maximum)",
          "state.maximum - maximum)", "torch.zeros_like(maximum))"))),
    ("memory_mean_of_chunks", "the memory is the mean of its chunks", "MEM-3 MEM-4",
     (memory, "memory_update", _mean_of_chunks)),
    ("memory_newest_frame_only", "the memory keeps the last chunk and forgets the earlier ones", "MEM-3 MEM-4",
     (memory, "memory_update",
      edit("state.denominator * keep + weight", "weight", "state.accumulator * keep[..., None] + torch", "torch"))),
    ("memory_over_locations", "the memory's softmax runs over locations", "MEM-2 MEM-5",
     (memory, "memory_update", _softmax_over(2))),
    ("memory_over_heads", "the memory's softmax runs over heads", "MEM-2 MEM-5",
     (memory, "memory_update", _softmax_over(3))),
    ("memory_not_shifted", "exponentials of the memory's scores are taken as they stand", "MEM-3 MEM-6",
     (memory, "memory_update",
      edit(_MAXIMUM, "torch.zeros_like(state.maximum)", "state.maximum - maximum)", "torch.zeros_like(maximum))"))),
    ("memory_maximum_of_chunk", "the running maximum is that of the chunk alone", "MEM-3 MEM-6",
     (memory, "memory_update", edit(_MAXIMUM, "score.amax(1)"))),
    ("memory_maximum_starts_at_zero", "the running maximum starts at 0, not at minus infinity", "MEM-3 MEM-6",
     (memory, "memory_start", edit("torch.full(shape[:3], -torch.inf,", "torch.zeros(shape[:3],"))),
    ("memory_minimum_for_maximum", "the minimum of a chunk's scores is taken for their maximum", "MEM-3 MEM-6",
     (memory, "memory_update", edit("amax", "amin"))),
    ("memory_maximum_over_heads", "one running maximum serves all heads", "MEM-3 MEM-6",
     (memory, "memory_update",
      edit("score.amax(1)", "score.amax((1, 3))[..., None].expand_as(state.maximum)"))),
    ("memory_not_rescaled", "a chunk that raises the maximum leaves the accumulator as it was", "MEM-3 MEM-4",
     (memory, "memory_update", edit(" * keep[..., None]", ""))),
    ("memory_denominator_not_rescaled", "a chunk that raises the maximum leaves the denominator as it was",
     "MEM-3 MEM-4", (memory, "memory_update", edit(" * keep + weight", " + weight"))),
    ("memory_denominator_rescaled_twice", "a chunk that raises the maximum rescales the denominator twice",
     "MEM-3 MEM-4", (memory, "memory_update", edit(" * keep + weight", " * keep * keep + weight"))),
    ("memory_rescaled_wrong_way", "the rescaling factor is e^(M' - M)", "MEM-3 MEM-4 MEM-6",
     (memory, "memory_update",
      edit("torch.exp(state.maximum - maximum)",
          "torch.exp((maximum - state.maximum).where(state.maximum > -torch.inf, 0))"))),
    ("memory_divided_twice", "the memory is divided by its denominator after every chunk and again at the end",
     "MEM-3 MEM-4", (memory, "memory_update", _divided_every_chunk)),
    ("memory_not_divided", "the weighted sum of the frames is not divided by the denominator", "MEM-2 MEM-3 MEM-5",
     (memory, "memory_finish", edit(" / state.denominator[..., None]", ""))),
    ("memory_state_narrow", "the memory's running sums are kept in bfloat16", "MEM-3 MEM-4 NUM-8",
     (memory, "memory_update",
      edit("state.denominator * keep + weight.sum(1),", f"(state.denominator * keep + weight.sum(1)){_B16},",
          "weight, value),\n", f"weight, value){_B16},\n"))),
    ("memory_without_output", "the memory's output projection is left out", "MEM-2 MEM-5",
     (TemporalMemory, "finish", edit("self.out(", "("))),
    ("memory_of_nothing", "a history of no frame gives a memory of zeros", "MEM-7 CONV-10",
     (memory, "memory_finish",
      edit("bool((state.denominator == 0).any())", "False", "state.denominator[..., None]",
          "state.denominator[..., None].clamp(min=1e-30)")),
     (Storm, "compress",
      edit('raise ValueError("the memory needs at least one past frame, got none")',
          "return torch.zeros(len(past), *position.shape[:2], self.config.width, dtype=past.dtype)"))),
    ("last_chunk_dropped", "frames of a last, shorter chunk are left out of the memory", "MEM-4",
     (Storm, "compress", edit("range(0, past.shape[1], chunk)", "range(0, max(past.shape[1] - chunk, 0) + 1, chunk)"))),
    ("memory_chunks_overlap", "chunks of frames share a frame", "MEM-4",
     (Storm, "compress", edit("slice(at, at + chunk)", "slice(at, at + chunk + 1)"))),
    ("memory_grid_transposed", "memory tokens are laid out with rows for columns", "MEM-2 CONV-1",
     (Storm, "compress",
      edit('"b (i j) d -> b i j d", i=position.shape[0]', '"b (j i) d -> b i j d", i=position.shape[0]'))),
    ("memory_of_first_sample", "the first sample's history serves the batch", "MEM-2 NET-6",
     (Storm, "compress", edit("self.memory.finish(state)", "self.memory.finish(state)[:1].expand(len(past), -1, -1)"))),
)  # fmt: skip
