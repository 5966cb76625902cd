"""The operations that a port may have, and what the suite knows of each.

A *public* operation is what a user of a port would call; profiles are earned by public operations alone. An *internal*
one is a part of a public one: a port may lack it, but with it the suite can say where a failure starts.

dtypes. A run has a dtype, that of the network: float64, float32 or bfloat16. Inputs and outputs that are *narrow* are
in it; all others are float64 whatever the run, [NUM-9], [EDM-9], [TOK-9]. bfloat16 has no NumPy type: such arrays
travel as float32 and hold bfloat16 numbers. Integers are int64.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from conformance.adapter import Array
from conformance.protocol.ranks import plain

__all__ = ["DTYPES", "LEVEL", "OPERATIONS", "PROFILES", "UNIT", "Operation", "ancestors", "round_to", "to_dtype"]

DTYPES = ("float64", "float32", "bfloat16")
LEVEL = {True: "coarse", False: "fine"}  # how stored cases and result.json spell public and internal
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}  # unit round-off: half a ULP of 1

PROFILES = {
    "smoke": "one case of each public operation but those of many ranks: does the adapter work at all",
    "core": "chapters 1 to 4: tokens, memory, noise-gated attention, the denoiser",
    "tiling": "chapter 5: tiles, weights, the tiled denoiser",
    "edm": "chapter 6: preconditioning, schedule, sampler",
    "guidance": "chapters 7 and 8: guided means, assimilation, cycles",
    "train": "chapter 6: noise levels for training, the loss and its gradients",
    "scores": "chapter 8: CRPS, spread and skill, ranks",
    "lowprec": "chapter 10: float32 and bfloat16 networks in a float64 sampler, whatever the dtype of the run",
    "rng": "chapters 8 and 10: noise by (seed, analysis, member), its statistics, equal bits on equal input",
    "cost": "chapters 2 and 5: multiply-adds of the network, the memory and the tiles",
    "parallel": "chapter 9: the same answers from many ranks, whatever the mesh",
}


@dataclass(frozen=True)
class Operation:
    """An operation of the protocol.

    narrow: names of the inputs and outputs that are in the run's dtype; `weights.` stands for all weights.
    needs: operations whose errors it inherits.
    """

    name: str
    chapter: str
    public: bool
    narrow: frozenset[str] = field(default_factory=frozenset)
    needs: tuple[str, ...] = ()

    def is_narrow(self, array: str) -> bool:
        """True when the input or output of that name is in the run's dtype.

        Probes of a network are, and so is a rank's `rank.R.NAME` where NAME is.
        """
        array = plain(array)
        group = array.split(".")[0] + "."
        return array in self.narrow or group in self.narrow or (group == "probe." and "weights." in self.narrow)


def _operation(line: str, needs: str = "") -> Operation:
    """The operation of a line `chapter name level narrow ...`, where level is `public` or `internal`."""
    chapter, name, level, *narrow = line.split()
    return Operation(name, chapter, level == "public", frozenset(narrow), tuple(needs.split()))


# Inputs, params and outputs of each are in README.md. Order: by chapter, parts before wholes.
OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        _operation("tokenisation patchify internal x tokens"),
        _operation("tokenisation unpatchify internal tokens x"),
        _operation("tokenisation position internal"),
        _operation("tokenisation embed internal x static tokens weights.", "patchify"),
        _operation("tokenisation embed_history internal past past_static tokens weights.", "patchify"),
        _operation("memory memory internal score value memory"),
        _operation("memory compress public past past_static memory weights.", "embed_history memory"),
        _operation("attention gate internal alpha beta gamma"),
        _operation("attention attention internal q k v y"),
        _operation("attention block internal x memory embedding y weights.", "gate attention"),
        _operation("denoiser noise_embedding internal embedding weights."),
        _operation("denoiser final internal tokens embedding raw weights.", "unpatchify"),
        _operation("denoiser count_weights internal"),
        _operation("edm precondition internal"),  # of chapter 6, and a part of the denoiser
        _operation(
            "denoiser denoise public static past past_static weights.",
            "embed compress noise_embedding block final precondition",
        ),
        _operation("tiling tile_geometry internal"),
        _operation("tiling tile_weights internal", "tile_geometry"),
        _operation("tiling tiled_denoise public", "tile_weights"),
        _operation("tiling denoise_tiled public static past past_static weights.", "denoise tiled_denoise"),
        _operation("edm schedule public"),
        _operation("edm sampler_step internal"),
        _operation("edm sample public", "sampler_step"),
        _operation("edm training_sigma public"),
        _operation("edm loss public static past past_static weights.", "denoise"),
        _operation("edm gradients public static past past_static weights. gradients.", "loss"),
        _operation("guidance guided_mean public"),
        _operation("guidance guided_denoise public static past past_static weights.", "denoise_tiled guided_mean"),
        _operation("assimilation assimilate public", "sample guided_mean"),
        _operation(
            "assimilation analysis public static past past_static weights.", "denoise_tiled sample guided_denoise"
        ),
        _operation("assimilation linear_cycle public"),
        _operation("assimilation cycle public", "assimilate"),
        _operation("assimilation noise public"),
        _operation("parallel shares internal"),
        _operation("parallel parallel_gather internal", "shares"),
        _operation("parallel parallel_blend internal", "shares"),
        _operation(
            "parallel parallel_denoise public static past past_static weights.",
            "parallel_gather parallel_blend denoise_tiled",
        ),
        _operation(
            "parallel parallel_gradients public static past past_static weights. gradients.",
            "parallel_denoise gradients",
        ),
        _operation("parallel parallel_ensemble public static past past_static weights.", "parallel_denoise analysis"),
        _operation("verification crps public"),
        _operation("verification spread_skill public"),
        _operation("verification average internal"),
        _operation("verification area_weights internal"),
        _operation("verification rank_histogram public"),
        _operation("cost multiply_adds public"),
    )
}


def ancestors(op: str) -> frozenset[str]:
    """The operations that `op` is made of, without itself."""
    parts: set[str] = set()
    for part in OPERATIONS[op].needs:
        parts |= {part} | ancestors(part)
    return frozenset(parts)


def round_to(value: Array, dtype: str) -> Array:
    """Round a float64 array to the nearest numbers of `dtype`, ties to even; the result is still float64."""
    if dtype == "float64":
        return value
    single = np.asarray(value, np.float32)
    if dtype == "float32":
        return single.astype(np.float64)
    bits = single.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(single), rounded, single).astype(np.float64)


def to_dtype(op: str, arrays: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """Copy an operation's arrays as a run in `dtype` exchanges them: narrow ones are float32 unless it is float64."""
    narrow = np.float64 if dtype == "float64" else np.float32

    def convert(name: str, value: Array) -> Array:
        floating = np.issubdtype(value.dtype, np.floating)
        kind = value.dtype if not floating else narrow if OPERATIONS[op].is_narrow(name) else np.float64
        return np.array(value, dtype=kind, order="C")

    return {name: convert(name, value) for name, value in arrays.items()}
