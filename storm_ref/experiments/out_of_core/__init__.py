"""Out of core: the tiled denoiser and the compression of history on a domain larger than memory.

Inputs and outputs lie on disk: Zarr v3 arrays, numpy memory maps, or anything with a shape, a dtype and slices.

    denoise   T[D](x; sigma) of [TILE-6]:  out = sum_i P_i^T ( w_i * D(P_i x; sigma, absolute coordinates) )
              first every batch of tiles is evaluated and w_i * D is written, where w_i > 0, to a file of its own; then
              core by core the few tiles that meet there are read back and added
    compress  m of [NET-2], which is pointwise in location: block after block of grid rows

Guarantees:

* `denoise` equals `tiling.tiled_denoiser(network, condition, tiling, tiles_per_batch)(x, sigma)`, evaluated without
  gradients, bit for bit where the network is finite: the batches are the same, and contributions to a point are added
  in the same order. (In memory a tile that is not finite spoils its whole extent; here only where it has weight.)
  `compress` equals `Storm.compress` to rounding.
* Memory holds the tiles in flight and nine files of batches, or one block of `chunk` frames; beyond that only what
  belongs to the axes: coordinates, weights and cuts, O(H + W) numbers. On disk the batches take about the size of the
  state.
* A run that was interrupted or killed resumes when it is called again with the same arguments, and ends in the same
  bits. A batch is finished when its file exists, a row of cores or a block when its checksum does. A damaged file is
  made again, and parts of `out` that no longer hold what was written are written again. A run is not resumed with other
  arguments, as far as that can be seen: of large inputs only samples are compared. Data that the operating system had
  not yet put on disk when it lost power is not protected. Only one process at a time may use a folder.
* A finished run leaves nothing in its folder, so that the next one can use it.

Stores are read in pieces of tiles and written in pieces of cores: chunks of the size of a core suit them best.
"""

from storm_ref.experiments.out_of_core.arrays import ArrayLike, WritableArray, create, open_array
from storm_ref.experiments.out_of_core.compression import Frames, compress
from storm_ref.experiments.out_of_core.denoising import Domain, denoise
from storm_ref.experiments.out_of_core.unfinished import Progress

__all__ = ["ArrayLike", "Domain", "Frames", "Progress", "WritableArray", "compress", "create", "denoise", "open_array"]
