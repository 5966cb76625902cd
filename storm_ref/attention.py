"""Noise-gated attention: one block of STORM, and the two baselines it is compared with.

[ATT-1] attention  A(q, k, v) = softmax(q k^T / sqrt(d)) v, d = D / A, heads concatenated
[ATT-2] adaptive layer norm  LN(x) (1 + scale) + shift, LN without affine weights, eps = 1e-6; (shift, scale, gate) for
        each of three sub-layers from one linear map D -> 9 D of silu(e), e the noise embedding (9 D^2 weights)
[ATT-3] x += g1 * W_s[(1 - gamma_a) SelfAttn_a(LN1(x))]
        x += g2 * W_t[gamma_a CrossAttn_a(LN2(x), LN(memory))]
        x += g3 * W_2 gelu(W_1 LN3(x)), the exact gelu (erf)
        LN1, LN2, LN3 are the adaptive layer norm of [ATT-2], LN the plain one
[ATT-4] gamma_a(sigma) = sigmoid(softplus(alpha_a) (ln sigma - beta_a)): nondecreasing in sigma by construction;
        it tends to 1 as sigma grows (temporal branch) and to 0 as sigma falls (spatial branch)
[ATT-5] key projections have no bias: it would shift all scores of a query alike, without effect and with zero gradient;
        all other projections have one
[ATT-6] windowed attention of radius r: token (i, j) sees (i', j') with |i - i'| <= r and |j - j'| <= r, columns modulo
        their number on a periodic axis; the same window for tokens and for memory tokens
[ATT-7] a block has 25 D^2 weights besides biases: 4 self, 4 cross, 8 MLP, 9 adaptive layer norm

The paper states that spatial self-attention and temporal cross-attention are weighted by the noise level, temporal at
high noise and spatial at low. The gate's formula and the order of the sub-layers are our interpretation. Adaptive layer
norm: Peebles & Xie (2023). TimeSformer: Bertasius et al. (2021).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = [
    "Block",
    "DividedBlock",
    "MultiHead",
    "SpaceTimeBlock",
    "attention",
    "attention_by_definition",
    "layer_norm",
    "modulate",
    "noise_gate",
    "window_mask",
]

EPS = 1e-6


def attention_by_definition(
    q: Float[Tensor, "*b n d"],
    k: Float[Tensor, "*b m d"],
    v: Float[Tensor, "*b m e"],
    mask: Bool[Tensor, "n m"] | None = None,
) -> Float[Tensor, "*b n e"]:
    """Return attention as [ATT-1] writes it; `mask` is True where a query sees a key."""
    score = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    return torch.softmax(score, -1) @ v


def attention(
    q: Float[Tensor, "b a n d"],
    k: Float[Tensor, "b a m d"],
    v: Float[Tensor, "b a m d"],
    mask: Bool[Tensor, "n m"] | None = None,
) -> Float[Tensor, "b a n d"]:
    """Return attention, [ATT-1], by the fused kernel, which never stores the n x m scores.

    `mask` is True where a query sees a key. The result equals `attention_by_definition` to rounding.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def window_mask(
    rows: int, cols: int, radius: int, periodic: bool, device: torch.device | None = None
) -> Bool[Tensor, "n n"]:
    """Return the mask of windowed attention, True where token (i, j) sees token (i', j'), [ATT-6].

    radius is in tokens; tokens are numbered row by row; columns wrap around when `periodic`.
    """
    i = torch.arange(rows, device=device)
    j = torch.arange(cols, device=device)
    di = (i[:, None] - i).abs()
    dj = (j[:, None] - j).abs()
    if periodic:
        dj = torch.minimum(dj, cols - dj)
    return rearrange((di <= radius)[:, None, :, None] & (dj <= radius)[None, :, None, :], "i j k l -> (i j) (k l)")


def layer_norm(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """Return (x - mean) / sqrt(var + 1e-6) over the last dimension: population variance, no weights, [ATT-2]."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b n d"]:
    """Return the adaptive layer norm LN(x) (1 + scale) + shift, [ATT-2]."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def noise_gate(
    sigma: Float[Tensor, " b"], alpha: Float[Tensor, " a"], beta: Float[Tensor, " a"]
) -> Float[Tensor, "b a"]:
    """Return the noise gate gamma_a(sigma) of [ATT-4], in float64 whatever the dtype of alpha and beta, [NET-9].

    Raises ValueError for sigma <= 0.
    """
    if not bool((sigma > 0).all()):
        raise ValueError(f"the noise gate needs sigma > 0, got {sigma.min().item()}")
    # torch takes softplus(x) = x above a threshold: its default of 20 is off by 2e-9 there, 40 is exact in float64.
    steepness = F.softplus(alpha.double(), threshold=40)
    return torch.sigmoid(steepness * (sigma.double().log()[:, None] - beta))


class MultiHead(nn.Module):
    """Multi-head attention with its query, key (no bias, [ATT-5]), value and output projections: 4 D^2 weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        context: Float[Tensor, "b m w"],
        head_weight: Float[Tensor, "b a"] | None = None,
        mask: Bool[Tensor, "n m"] | None = None,
    ) -> Float[Tensor, "b n w"]:
        """Return W_o[weight_a A_a(x, context)], which is self-attention when `context` is `x`.

        `head_weight` multiplies each head's output before the output projection, [ATT-3].
        """
        q, k, v = (
            rearrange(project(t), "b n (a d) -> b a n d", a=self.heads)
            for project, t in ((self.query, x), (self.key, context), (self.value, context))
        )
        y = attention(q, k, v, mask)
        if head_weight is not None:
            y = y * head_weight[:, :, None, None]
        return self.out(rearrange(y, "b a n d -> b n (a d)"))  # type: ignore[no-any-return]


def _mlp(width: int, ratio: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))


class Block(nn.Module):
    """The noise-gated block of STORM, [ATT-3]: 25 D^2 weights, [ATT-7]."""

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.adaptive = nn.Linear(width, 9 * width)
        self.spatial = MultiHead(width, heads)
        self.temporal = MultiHead(width, heads)
        self.mlp = _mlp(width, mlp_ratio)
        self.gate_alpha = nn.Parameter(torch.zeros(heads))
        self.gate_beta = nn.Parameter(torch.zeros(heads))

    def forward(
        self,
        x: Float[Tensor, "b n w"],
        memory: Float[Tensor, "b m w"],
        embedding: Float[Tensor, "b w"],
        sigma: Float[Tensor, " b"],
        mask: Bool[Tensor, "n m"] | None = None,
    ) -> Float[Tensor, "b n w"]:
        """Return the tokens after the three sub-layers of [ATT-3].

        Takes tokens x, memory tokens, noise embedding and noise level; `mask` is the window of [ATT-6], None for all
        tokens. Raises ValueError for sigma <= 0.
        """
        nine = self.adaptive(F.silu(embedding)).chunk(9, -1)
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = nine
        gamma = noise_gate(sigma, self.gate_alpha, self.gate_beta).to(x.dtype)
        y = modulate(x, shift1, scale1)
        x = x + gate1[:, None] * self.spatial(y, y, 1 - gamma, mask)
        y = modulate(x, shift2, scale2)
        x = x + gate2[:, None] * self.temporal(y, layer_norm(memory), gamma, mask)
        return x + gate3[:, None] * self.mlp(modulate(x, shift3, scale3))  # type: ignore[no-any-return]


class SpaceTimeBlock(nn.Module):
    """Baseline with joint attention over all T N space-time tokens, O((T N)^2)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.joint = MultiHead(width, heads)
        self.mlp = _mlp(width, mlp_ratio)

    def forward(self, x: Float[Tensor, "b t n w"]) -> Float[Tensor, "b t n w"]:
        """Apply a pre-norm residual block to the flattened space-time tokens."""
        tokens: Tensor = rearrange(x, "b t n w -> b (t n) w")
        y = layer_norm(tokens)
        tokens = tokens + self.joint(y, y)
        tokens = tokens + self.mlp(layer_norm(tokens))
        return rearrange(tokens, "b (t n) w -> b t n w", t=x.shape[1])


class DividedBlock(nn.Module):
    """Baseline with TimeSformer's divided attention, first over time, then over space, O(T N (T + N)).

    With MLP ratio 4 and no class token a layer takes 17 T N D^2 + 2 D T N (T + N) multiply-adds.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.time = MultiHead(width, heads)
        self.time_out = nn.Linear(width, width)
        self.space = MultiHead(width, heads)
        self.mlp = _mlp(width, mlp_ratio)

    def forward(self, x: Float[Tensor, "b t n w"]) -> Float[Tensor, "b t n w"]:
        """Attend over the frames of each location, then over the locations of each frame, then apply the MLP."""
        y = layer_norm(rearrange(x, "b t n w -> (b n) t w"))
        x = x + rearrange(self.time_out(self.time(y, y)), "(b n) t w -> b t n w", b=x.shape[0])
        y = layer_norm(rearrange(x, "b t n w -> (b t) n w"))
        x = x + rearrange(self.space(y, y), "(b t) n w -> b t n w", b=x.shape[0])
        return x + self.mlp(layer_norm(x))  # type: ignore[no-any-return]
