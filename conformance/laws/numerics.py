"""Laws of chapter 10: what stays exact around and inside a network in float32 or bfloat16, whatever the run's dtype."""

from dataclasses import replace

from conformance.judging.law import Law
from conformance.laws import denoiser, memory

__all__ = ["LAWS"]

NARROW = ("float32", "bfloat16")


def _narrow(laws: tuple[Law, ...], name: str) -> list[Law]:
    """The law of another chapter, always in a narrow dtype."""
    law = next(law for law in laws if law.id.endswith(f"/law-{name}"))
    return [
        replace(
            law,
            id=f"numerics/law-{name}-{dtype}",
            profiles=("lowprec",),
            dtype=dtype,
            requirements=(*law.requirements, "NUM-9"),
        )
        for dtype in NARROW
    ]


LAWS = tuple(
    law
    for chapter, name in (
        (denoiser.LAWS, "skip"),
        (denoiser.LAWS, "bias"),
        (denoiser.LAWS, "same-bits"),
        (memory.LAWS, "compress-copies"),
        (memory.LAWS, "compress-weight-bits"),
        (memory.LAWS, "compress-chunks"),
    )
    for law in _narrow(chapter, name)
)
