"""One-stage assimilation: draw today's state given the past states and today's observations, in one generative step.

[DA-1] an analysis draws x_k ~ p(x_k | x_{k-K:k-1}, y_k). The K past states are taken as known: their errors do not
       enter, and nothing of y_k reaches them
[DA-2] a forecast is the same draw without observations: p(x_k | x_{k-K:k-1})
[DA-3] members are independent draws: the noise of member m of analysis k depends on (seed, k, m) alone, not on the size
       of the ensemble, on batching or on the machine
[DA-4] a cycle feeds each member its own analyses as history
[DA-5] in a linear model x_k = A x_{k-1} + q, q ~ N(0, Q), y = H x + e, e ~ N(0, R), the cycle is
           G = Q H^T (H Q H^T + R)^-1,   m_k = (I - G H) A m_{k-1} + G y_k,
           P_k = (I - G H) A P_{k-1} A^T (I - G H)^T + (I - G H) Q,
       which is not the Kalman filter: the gain uses Q, not the forecast covariance A P A^T + Q, which is the price of
       taking history as known. This recursion is the oracle of every cycling test
[DA-6] a state that stops being finite stops the analysis with an error that names the step and the member
[DA-7] observations without a guidance method are refused; they are never ignored

The one-stage target is the paper's. Diffusion-based schemes differ in which posterior they target (Hodyss & Morzfeld
2025), hence DA-5.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from storm_ref.edm import Churn, Denoise, NotFiniteError, sample
from storm_ref.guidance import ObservationsLike

__all__ = ["Guide", "Sampler", "cycle", "draw_members", "linear_cycle", "member_noise"]

# A guidance method with its parameters bound: takes D and observations, returns the guided D.
Guide = Callable[[Denoise, ObservationsLike], Denoise]


@dataclass(frozen=True)
class Sampler:
    """The settings by which members are drawn: noise levels, churn, and the number of members evaluated in one batch.

    The noise levels are those of `edm.schedule`. Raises ValueError for members_per_batch < 1.
    """

    sigmas: Float[Tensor, " levels"]
    churn: Churn = field(default_factory=Churn)
    members_per_batch: int = 16

    def __post_init__(self) -> None:
        if self.members_per_batch < 1:
            raise ValueError(f"members_per_batch must be at least 1, got {self.members_per_batch}")

    @property
    def draws(self) -> int:
        """The number of noise fields that a member needs: its latent, and one per step when churn is on."""
        return len(self.sigmas) if self.churn.s_churn > 0 else 1


def member_noise(
    seed: int, analysis: int, member: int, shape: Sequence[int], draws: int = 1
) -> Float[Tensor, "draws *s"]:
    """Return the standard normal noise of one member of one analysis, its latent and then its step noises, [DA-3].

    It is float64. The key of a counter-based generator (Philox) is (seed, analysis, member), so that distinct members
    have distinct streams; the seed of torch's CPU generator would not do, because it keeps only 32 bits. The first
    draws do not depend on how many are asked for. Raises ValueError unless 0 <= seed < 2^64 and
    0 <= analysis, member < 2^32.
    """
    if not (0 <= seed < 2**64 and 0 <= analysis < 2**32 and 0 <= member < 2**32):
        raise ValueError(
            "seed must be in [0, 2^64), analysis and member in [0, 2^32), because the three form one 128-bit key; got "
            f"{seed}, {analysis}, {member}"
        )
    key = np.array([seed, (analysis << 32) | member], dtype=np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal((draws, *shape)))


def draw_members(
    denoise: Denoise,
    noise: Float[Tensor, "draws m *s"],
    sampler: Sampler,
    observations: ObservationsLike | None = None,
    guide: Guide | None = None,
    progress: Callable[[], None] | None = None,
) -> Float[Tensor, "m *s"]:
    """Draw the m members of one analysis, [DA-1], or without observations of a forecast, [DA-2]; returns float64.

    noise is the `member_noise` of the members stacked along dimension 1. `progress` is called after each sampler step
    of each batch. Raises ValueError when there is no member and when observations come without a guidance method,
    [DA-7], and NotFiniteError, with members numbered as in `noise`, when one stops being finite, [DA-6].
    """
    if noise.shape[1] == 0:
        raise ValueError("no member to draw: the noise has size 0 along dimension 1")
    if observations is not None and guide is None:
        raise ValueError("observations need a guidance method that says how they are used; none is given")
    guided = denoise if observations is None or guide is None else guide(denoise, observations)
    batches = []
    for start in range(0, noise.shape[1], sampler.members_per_batch):
        part = noise[:, start : start + sampler.members_per_batch]
        latents = part[0]
        step_noises = part[1:] if len(part) > 1 else None
        try:
            with torch.no_grad():
                batches.append(sample(guided, latents, sampler.sigmas, sampler.churn, step_noises, progress))
        except NotFiniteError as error:
            members = [start + member for member in error.members]
            raise NotFiniteError(members, error.step, error.steps, error.sigma) from None
    return torch.cat(batches)


def cycle(
    history: Sequence[Float[Tensor, "m *s"]],
    analyses: Sequence[ObservationsLike | None],
    draw: Callable[[Sequence[Tensor], ObservationsLike | None, int], Tensor],
) -> Iterator[Float[Tensor, "m *s"]]:
    """Yield the members of one analysis after another, each member's own analyses becoming its history, [DA-4].

    history holds the K past states of every member, newest last. `draw(history, observations, k)` draws all members of
    analysis k, whose observations are None for a forecast. Raises ValueError for an empty history.
    """
    frames = list(history)
    if not frames:
        raise ValueError("a cycle needs at least one past frame to start from")
    for k, observations in enumerate(analyses):
        state = draw(frames, observations, k)
        frames = [*frames[1:], state]
        yield state


def linear_cycle(
    model: Float[Tensor, "v v"],
    model_error: Float[Tensor, "v v"],
    operator: Float[Tensor, "n v"],
    error: Float[Tensor, "n n"],
    mean: Float[Tensor, " v"],
    covariance: Float[Tensor, "v v"],
    observations: Float[Tensor, "k n"],
) -> list[tuple[Float[Tensor, " v"], Float[Tensor, "v v"]]]:
    """Return the mean and covariance of every analysis of a linear cycle, [DA-5].

    `model` is A, `model_error` Q, `operator` H and `error` R; `mean` and `covariance` are those of the state before the
    first analysis; `observations` has one row per analysis.
    """
    innovation = operator @ model_error @ operator.T + error
    gain = torch.linalg.solve(innovation, operator @ model_error).T
    keep = torch.eye(len(mean), dtype=mean.dtype) - gain @ operator
    analyses = []
    for y in observations:
        mean = keep @ model @ mean + gain @ y
        covariance = keep @ model @ covariance @ model.T @ keep.T + keep @ model_error
        analyses.append((mean, covariance))
    return analyses
