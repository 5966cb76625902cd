"""The denoiser: a network from tokens to tokens inside EDM's preconditioning, without tiling or sharding.

[NET-1] noise embedding  e = W_2 silu(W_1 phi(c_noise) + b_1) + b_2,
        phi(c) = [sin(f_j c), cos(f_j c)], f_j = 2 pi 2^(j/8 - 2), all sines, then all cosines
[NET-2] t = state tokens ([TOK-4]);  m = compressed memory ([MEM-2]) of history tokens ([TOK-5])
[NET-3] t <- block_l(t, m, e, sigma), l = 1..L ([ATT-3])
[NET-4] F = unpatchify(W_f [LN(t) (1 + scale) + shift] + b_f), (shift, scale) = W_m silu(e) + b_m
[NET-5] D(x; sigma) = c_skip x + c_out F(c_in x; sigma) ([EDM-1]); F forms c_noise = ln(sigma) / 4
        and the gate's ln sigma from sigma itself; the memory depends on neither x nor sigma: computed once per analysis
[NET-6] the state x, static fields, memory and position share one grid and one batch (a batch of 1 serves all samples);
        so do the past frames, their static fields and ages; anything else is an error that names the shapes
[NET-7] the presets count within 10 % of 10 M, 200 M and 10 B weights
[NET-8] a checkpoint carries its configuration and loads into no other
[NET-9] ln sigma, the waves of phi and the argument of the gate are float64 whatever the network's dtype, rounded once

The paper describes a Vision Transformer denoiser that sees the current state at full resolution and the past
compressed. Noise embedding and output layer are our interpretation, after Peebles & Xie (2023).
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from storm_ref.attention import Block, modulate, window_mask
from storm_ref.config import StormConfig
from storm_ref.edm import Denoise, precondition
from storm_ref.memory import MemoryState, TemporalMemory
from storm_ref.tokenisation import age_features, fourier_features, patchify, unpatchify

__all__ = ["Condition", "Storm", "count_weights", "denoiser", "noise_features", "randomise"]


@dataclass(frozen=True)
class Condition:
    """Everything the denoiser is conditioned on besides x and sigma. A batch of 1 is broadcast to all members."""

    static: Float[Tensor, "bs s h w"]  # constant fields and known forcings
    memory: Float[Tensor, "bm rows cols d"]  # from Storm.compress
    position: Float[Tensor, "bp rows cols p"]  # absolute coordinates of the patch centres
    periodic: bool = False  # the columns close on themselves (only windowed attention depends on it)

    def crop(self, rows: Int[Tensor, " i"], cols: Int[Tensor, " j"], patch: tuple[int, int]) -> "Condition":
        """The condition of one tile, with absolute positions; `rows` and `cols` are the grid points of its extent.

        Raises ValueError when they are not whole patches.
        """
        i, j = _whole_patches(rows, patch[0])[:, None], _whole_patches(cols, patch[1])
        return replace(
            self,
            static=self.static[..., rows[:, None], cols],
            memory=self.memory[:, i, j],
            position=self.position[:, i, j],
            periodic=self.periodic and len(cols) == self.static.shape[-1],
        )

    @staticmethod
    def stack(parts: "list[Condition]", batch: int) -> "Condition":
        """The conditions of tiles of one shape in one batch: all members of the first tile, then of the second, etc."""

        def repeat(name: str) -> Tensor:
            tensors = [getattr(part, name) for part in parts]
            return torch.cat([t.expand(batch, *t.shape[1:]) for t in tensors])

        return Condition(repeat("static"), repeat("memory"), repeat("position"), parts[0].periodic)


def _whole_patches(index: Int[Tensor, " i"], patch: int) -> Int[Tensor, " m"]:
    first = index[::patch]
    whole = first[:, None] + torch.arange(patch, device=index.device)
    if bool((first % patch != 0).any()) or not torch.equal(whole.flatten(), index):
        raise ValueError(f"grid points {index.tolist()} are not whole patches of {patch}")
    return first // patch


def noise_features(c_noise: Float[Tensor, " b"], count: int) -> Float[Tensor, "b count"]:
    """Return phi(c_noise) of [NET-1] in the dtype of c_noise: count / 2 sines, then count / 2 cosines.

    Wave numbers start at pi / 2 and are an eighth of an octave apart, so that the default 64 features end at 23. Much
    faster waves would make the network rough in sigma and sensitive to the rounding of sigma.
    """
    wave = 2 * math.pi * 2.0 ** (torch.arange(count // 2, dtype=c_noise.dtype, device=c_noise.device) / 8 - 2)
    phase = c_noise[:, None] * wave
    return torch.cat([phase.sin(), phase.cos()], -1)


class Storm(nn.Module):
    """The network F of [NET-1] to [NET-4] and its compression of history, for one `StormConfig`."""

    @torch.random.fork_rng(devices=[])  # torch's layers draw from the global generator: its state is kept, [NUM-12]
    def __init__(self, config: StormConfig, generator: torch.Generator | None = None) -> None:
        """Make a fresh network, whose weights the generator draws; without one, a generator with seed 0."""
        super().__init__()
        self.config = config
        points = config.patch[0] * config.patch[1]
        values = (config.channels + config.static_channels) * points
        codes = 2 * config.position_features * config.position_octaves
        self.embed_state = nn.Linear(values, config.width)
        self.embed_history = nn.Linear(values, config.width)
        self.embed_position = nn.Linear(codes, config.width, bias=False)
        self.embed_age = nn.Linear(2 * config.position_octaves, config.width, bias=False)
        self.embed_noise = nn.Sequential(
            nn.Linear(config.noise_features, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.memory = TemporalMemory(config.width, config.heads)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.final_adaptive = nn.Linear(config.width, 2 * config.width)
        self.final = nn.Linear(config.width, config.channels * points)
        self.reset(torch.Generator().manual_seed(0) if generator is None else generator)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Set the weights to training's starting point, where F = 0 and D = c_skip x.

        The blocks' adaptive layer norms and the output layer are zero, all other matrices uniform within
        1 / sqrt(fan_in), and all other vectors zero.
        """
        for weight in self.parameters():
            bound = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.0
            if not weight.is_meta:
                weight.uniform_(-bound, bound, generator=generator)
        for block in self.blocks:
            nn.init.zeros_(block.adaptive.weight)  # type: ignore[arg-type, union-attr]
            nn.init.zeros_(block.adaptive.bias)  # type: ignore[arg-type, union-attr]
        for layer in (self.final_adaptive, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def embed(
        self, x: Float[Tensor, "b c h w"], static: Float[Tensor, "b s h w"], position: Float[Tensor, "bp rows cols p"]
    ) -> Float[Tensor, "b n d"]:
        """Return the state tokens of x, which is already scaled by c_in, [TOK-4]."""
        t = self.embed_state(patchify(torch.cat([x, static], 1), self.config.patch))
        return t + self._position(position, t)  # type: ignore[no-any-return]

    def embed_past(
        self,
        past: Float[Tensor, "b k c h w"],
        static: Float[Tensor, "b k s h w"],
        age: Float[Tensor, "b k"],
        position: Float[Tensor, "rows cols p"],
    ) -> Float[Tensor, "b k n d"]:
        """Return the history tokens of k past frames, [TOK-5], with age codes from float64, [TOK-9].

        The arguments are those of `compress`. Raises ValueError for ages and shapes as `compress` does.
        """
        self._check_past(past, static, age, position)
        fields = torch.cat([past, static], 2).to(self.embed_history.weight.dtype)
        tokens = self.embed_history(patchify(fields, self.config.patch))
        code = self.embed_age(age_features(age.double(), self.config.position_octaves).to(tokens.dtype))
        return tokens + self._position(position, tokens) + code[:, :, None]  # type: ignore[no-any-return]

    def embed_sigma(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Return the noise embedding e of [NET-1]; c_noise and its waves are float64, [NET-9]."""
        features = noise_features(sigma.double().log() / 4, self.config.noise_features)
        dtype = next(self.embed_noise.parameters()).dtype
        return self.embed_noise(features.to(dtype))  # type: ignore[no-any-return]

    def finish(
        self, tokens: Float[Tensor, "b n d"], embedding: Float[Tensor, "b d"], rows: int
    ) -> Float[Tensor, "b c h w"]:
        """Return F from the last block's tokens and the noise embedding, on a grid of `rows` patch rows, [NET-4]."""
        shift, scale = self.final_adaptive(F.silu(embedding)).chunk(2, -1)
        return unpatchify(self.final(modulate(tokens, shift, scale)), self.config.patch, rows)

    def compress_chunk(
        self,
        state: MemoryState | None,
        past: Float[Tensor, "b k c h w"],
        static: Float[Tensor, "b k s h w"],
        age: Float[Tensor, "b k"],
        position: Float[Tensor, "rows cols p"],
    ) -> MemoryState:
        """Add k past frames to the memory's state, [MEM-3]; before the first chunk it is None.

        The arguments are those of `compress`. Raises ValueError for ages and shapes as `compress` does.
        """
        return self.memory.update(state, self.embed_past(past, static, age, position))

    def compress(
        self,
        past: Float[Tensor, "b k c h w"],
        static: Float[Tensor, "b k s h w"],
        age: Float[Tensor, "b k"],
        position: Float[Tensor, "rows cols p"],
        chunk: int = 16,
    ) -> Float[Tensor, "b rows cols d"]:
        """Compress k past frames into one memory token per location, `chunk` frames at a time, [NET-2].

        past is normalised as the state; `static` holds each frame's own fields and forcings; `age` is in hours,
        positive into the past. Raises ValueError when there is no frame, [MEM-7], when an age is not positive and
        finite, [TOK-8], when shapes do not fit, [NET-6], and for chunk < 1.
        """
        if past.shape[1] == 0:
            raise ValueError("the memory needs at least one past frame, got none")
        if chunk < 1:
            raise ValueError(f"a chunk must be at least one frame, got {chunk}")
        self._check_past(past, static, age, position)
        state: MemoryState | None = None
        for at in range(0, past.shape[1], chunk):
            part = slice(at, at + chunk)
            state = self.compress_chunk(state, past[:, part], static[:, part], age[:, part], position)
        assert state is not None
        return rearrange(self.memory.finish(state), "b (i j) d -> b i j d", i=position.shape[0])

    def _position(self, position: Tensor, like: Tensor) -> Tensor:
        """Return the position code P(r) in the dtype of `like`; its waves are float64, [TOK-9]."""
        features = fourier_features(position.double(), self.config.position_octaves)
        code: Tensor = self.embed_position(rearrange(features.to(like.dtype), "... i j f -> ... (i j) f"))
        return code

    def forward(
        self, x: Float[Tensor, "b c h w"], sigma: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b c h w"]:
        """Return F(x; sigma) for x already scaled by c_in, [NET-1] to [NET-4].

        Raises ValueError that names what does not share the grid or the batch, [NET-6], and for sigma <= 0.
        """
        self._check(x, sigma, condition)
        batch = x.shape[0]
        rows, cols = condition.position.shape[-3:-1]
        static = condition.static.to(x.dtype).expand(batch, -1, -1, -1)
        memory = rearrange(condition.memory.to(x.dtype), "b i j d -> b (i j) d").expand(batch, -1, -1)
        t = self.embed(x, static, condition.position)
        e = self.embed_sigma(sigma)
        window = self.config.window
        mask = None if window is None else window_mask(rows, cols, window, condition.periodic, x.device)
        for block in self.blocks:
            t = block(t, memory, e, sigma, mask)
        return self.finish(t, e, rows)

    def _check(self, x: Tensor, sigma: Tensor, condition: Condition) -> None:
        c = self.config
        b = x.shape[0]
        rows, cols = condition.position.shape[-3:-1]
        grid = (rows * c.patch[0], cols * c.patch[1])
        _expect("state", x, {b}, (c.channels, *grid))
        _expect("sigma", sigma, {b}, ())
        _expect("static fields", condition.static, {1, b}, (c.static_channels, *grid))
        _expect("memory", condition.memory, {1, b}, (rows, cols, c.width))
        _expect("position", condition.position, {1, b}, (rows, cols, c.position_features))

    def _check_past(self, past: Tensor, static: Tensor, age: Tensor, position: Tensor) -> None:
        c = self.config
        b, k = past.shape[:2]
        rows, cols = position.shape[:2]
        grid = (rows * c.patch[0], cols * c.patch[1])
        _expect("past frames", past, {b}, (k, c.channels, *grid))
        _expect("static fields of the past", static, {b}, (k, c.static_channels, *grid))
        _expect("ages", age, {b}, (k,))
        _expect("position", position, {rows}, (cols, c.position_features))


def _expect(name: str, tensor: Tensor, batch: set[int], shape: tuple[int, ...]) -> None:
    got = tuple(tensor.shape)
    if got[:1] == () or got[0] not in batch or got[1:] != shape:
        lead = " or ".join(str(b) for b in sorted(batch))
        raise ValueError(f"{name}: shape {got}, but the network on this grid and batch needs ({lead}) x {shape}")


def denoiser(network: Storm, condition: Condition) -> Denoise:
    """Return D(x; sigma) of one analysis without tiling, [NET-5].

    F is evaluated in the dtype of the network and everything else in float64.
    """
    dtype = network.final.weight.dtype

    def conditioned_network(x: Tensor, sigma: Tensor) -> Tensor:
        raw: Tensor = network(x, sigma, condition)
        return raw

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return precondition(conditioned_network, x, sigma, network.config.sigma_data, dtype)

    return denoise


def count_weights(network: nn.Module) -> int:
    """Return the number of trained weights, [NET-7]; the network may be on the meta device."""
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def randomise(network: nn.Module, generator: torch.Generator, scale: float = 1.0) -> None:
    """Draw generic weights for vectors and tests, [NUM-6].

    Matrices are N(0, scale^2 / fan_in), vectors N(0, (scale / 2)^2). Gates that are initialised to zero hide the model
    behind them: a test on fresh weights sees next to nothing.
    """
    for weight in network.parameters():
        draw = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.copy_(draw * (scale / math.sqrt(weight.shape[-1]) if weight.ndim > 1 else scale / 2))
