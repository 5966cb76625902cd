"""Comparison of the tiled denoiser T[D] with the untiled D where [TILE-8] does not make them equal.

With r(a) = sqrt(mean a^2) over members, channels and points, and x in standard deviations of the state:

    absolute      r(T[D] - D)                               in those standard deviations
    relative      r(T[D] - D) / r(D - G)                    G is D with the network off, F = 0; D - G is what the
                                                            network contributes
    skill         r(D(x + s n; s) - x) with x the truth;    lost = (tiled - untiled) / (off - untiled), in squares
    sampled       r(S[T[D]](z) - S[D](z)) with S the deterministic sampler and z the same latents, over r(S[D](z)) and
                  over the spread of members. "once" is T[S[D]]: each tile is sampled alone on its part of z, and only
                  the results are blended
    seam          r of u(q) - u(q - 1) with q at core boundaries, over the same with q at the other places of the same
                  phase of the patch: 1 without seams. An untiled field has no boundaries, so its ratios estimate the
                  error of this measure
    cone          J_k = d x_n / d x_{n-k} at a point of the end of Euler's sampler: max |s_{n-k} J_k| over points and
                  channels of a tile is the response, in standard deviations, to unit noise at one point there
    cost          multiply-adds of one evaluation ([COST-2]) over those of the untiled network, and points ([TILE-10])

Where a model has a covariance, its Gaussian part G is never tiled: only the tiling of F is measured.
"""

from storm_ref.experiments.fidelity.report import Sizes, run

__all__ = ["Sizes", "run"]
