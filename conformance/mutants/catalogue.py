"""The catalogue of all wrong ports, in the order of the chapters."""

from conformance.mutants.catalogue_assimilation import ASSIMILATION, VERIFICATION
from conformance.mutants.catalogue_edm import EDM, TRAINING
from conformance.mutants.catalogue_guidance import GUIDANCE
from conformance.mutants.catalogue_network import ATTENTION, DENOISER
from conformance.mutants.catalogue_numerics import COST, NUMERICS
from conformance.mutants.catalogue_parallel import PARALLEL
from conformance.mutants.catalogue_tiling import TILING
from conformance.mutants.catalogue_tokens import MEMORY, TOKENISATION
from conformance.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_ALL = (
    *TOKENISATION,
    *MEMORY,
    *ATTENTION,
    *DENOISER,
    *TILING,
    *EDM,
    *TRAINING,
    *GUIDANCE,
    *ASSIMILATION,
    *VERIFICATION,
    *PARALLEL,
    *NUMERICS,
    *COST,
)

MUTANTS: dict[str, Mutant] = {mutant.name: mutant for mutant in _ALL}

if len(MUTANTS) != len(_ALL):
    twice = sorted({mutant.name for mutant in _ALL if sum(other.name == mutant.name for other in _ALL) > 1})
    raise ValueError(f"the name of a mutant must be unique, these are not: {twice}")
