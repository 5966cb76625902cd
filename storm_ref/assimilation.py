"""One-stage assimilation: draw today's state given the past states and today's observations, in one generative step.

[DA-1] target: x_k ~ p(x_k | x_{k-K:k-1}, y_k). The K past states are taken as known: their errors do not enter, and
       nothing of y_k reaches them.
[DA-2] forecast only is the same draw without observations: p(x_k | x_{k-K:k-1}).
[DA-3] members are independent draws: member m of analysis k has noise that depends on (seed, k, m) alone, not on how
       many members there are, how they are batched or which machine draws them.
[DA-4] a cycle feeds each member its own analyses as history.
[DA-5] in a linear model x_k = A x_{k-1} + q, q ~ N(0, Q), y = H x + e, e ~ N(0, R), the cycle is
           G = Q H^T (H Q H^T + R)^-1,   m_k = (I - G H) A m_{k-1} + G y_k,
           P_k = (I - G H) A P_{k-1} A^T (I - G H)^T + (I - G H) Q,
       which is not the Kalman filter: the gain uses Q, not the forecast covariance A P A^T + Q. This recursion is the
       oracle of every cycling test. It is the price of taking history as known.
[DA-6] the state stays finite, or the analysis stops and names the step and the member

The one-stage target is the paper's; which posterior diffusion-based schemes target differs from scheme to scheme
(Hodyss & Morzfeld 2025), hence DA-5.
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

# A guidance method with its settings bound: (D, observations) -> guided D.
Guide = Callable[[Denoise, ObservationsLike], Denoise]


@dataclass(frozen=True)
class Sampler:
    """How members are drawn: noise levels (edm.schedule), churn, and how many members are evaluated together.

    Raises ValueError for members_per_batch < 1.
    """

    sigmas: Float[Tensor, " levels"]
    churn: Churn = field(default_factory=Churn)
    members_per_batch: int = 16

    def __post_init__(self) -> None:
        if self.members_per_batch < 1:
            raise ValueError(
                f"at least one member must be evaluated at a time, got members_per_batch = {self.members_per_batch}"
            )

    @property
    def draws(self) -> int:
        """Noise fields a member needs: its latent, and one a step when churn is on."""
        return len(self.sigmas) if self.churn.s_churn > 0 else 1


def member_noise(
    seed: int, analysis: int, member: int, shape: Sequence[int], draws: int = 1
) -> Float[Tensor, "draws *s"]:
    """Standard normal noise of one member of one analysis, float64, [DA-3]: the latent first, then one field a step.

    The three numbers are the key of a counter-based generator (Philox), so that distinct members have distinct streams;
    the seed of torch's CPU generator would not do, for it keeps 32 bits. The first draws do not depend on how many are
    asked. Raises ValueError unless 0 <= seed < 2^64 and 0 <= analysis, member < 2^32.
    """
    if not (0 <= seed < 2**64 and 0 <= analysis < 2**32 and 0 <= member < 2**32):
        raise ValueError(
            "seed must be in [0, 2^64), analysis and member in [0, 2^32), because the three are one 128-bit key; got "
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
    """The ensemble of one analysis, float64, [DA-1]; without observations the forecast, [DA-2].

    noise: `member_noise` of the members, stacked on dimension 1. progress: called after each sampler step of each
    batch. Raises ValueError for no member and for observations without a guidance, NotFiniteError when a member stops
    being finite, [DA-6]; it counts members as `noise` does.
    """
    if noise.shape[1] == 0:
        raise ValueError("no member to draw: the noise has size 0 along dimension 1")
    if observations is not None and guide is None:
        raise ValueError("observations need a guidance method to say how they are used")
    guided = denoise if observations is None or guide is None else guide(denoise, observations)
    parts = []
    for start in range(0, noise.shape[1], sampler.members_per_batch):
        part = noise[:, start : start + sampler.members_per_batch]
        later = part[1:] if len(part) > 1 else None
        try:
            with torch.no_grad():
                parts.append(sample(guided, part[0], sampler.sigmas, sampler.churn, later, progress))
        except NotFiniteError as e:
            raise NotFiniteError([start + m for m in e.members], e.step, e.steps, e.sigma) from None
    return torch.cat(parts)


def cycle(
    history: Sequence[Float[Tensor, "m *s"]],
    analyses: Sequence[ObservationsLike | None],
    draw: Callable[[Sequence[Tensor], ObservationsLike | None, int], Tensor],
) -> Iterator[Float[Tensor, "m *s"]]:
    """Analyses one after another, each member's own results becoming its history, [DA-4].

    history: the K past states of every member, newest last. `draw(history, observations, k)` draws all members of
    analysis k. Raises ValueError for an empty history.
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
    """Mean and covariance of every analysis of a linear cycle, [DA-5].

    `model` A, `model_error` Q, `operator` H, `error` R; `mean` and `covariance` of the state before the first analysis.
    """
    innovation = operator @ model_error @ operator.T + error
    gain = torch.linalg.solve(innovation, operator @ model_error).T
    keep = torch.eye(len(mean), dtype=mean.dtype) - gain @ operator
    result = []
    for y in observations:
        mean = keep @ model @ mean + gain @ y
        covariance = keep @ model @ covariance @ model.T @ keep.T + keep @ model_error
        result.append((mean, covariance))
    return result
