"""Wrong versions that no array shows to the conformance suite, each of which a unit test must catch.

The catalogue of `conformance/mutants` has all others. These are second forms of an equation, baselines, fresh weights,
defaults, refusals that an operation cannot reach, and functions that only Python sees.
"""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import test_attention
import test_denoiser
import test_edm
import test_guidance
import test_memory

from conformance.mutants.mutant import Edit, edit
from storm_ref import attention, denoiser, edm, memory
from storm_ref.attention import DividedBlock, SpaceTimeBlock
from storm_ref.denoiser import Storm
from storm_ref.guidance import Observations

Owner = ModuleType | type
Check = Callable[..., None]

_KEY_BIAS = edit("nn.Linear(width, width, bias=False)", "nn.Linear(width, width)")
_ALL_FRAMES = test_memory.test_memory_equals_its_definition_for_any_chunks
_ATTENTION = test_attention.test_attention_equals_its_definition
_DIVIDED = test_attention.test_divided_block_is_attention_over_frames_then_over_locations
_SPACE_TIME = test_attention.test_space_time_block_is_attention_over_all_tokens_of_all_frames
_WEIGHTS = test_attention.test_block_weights
_FRESH = test_denoiser.test_reset_is_no_network
_SHAPES = test_denoiser.test_storm_invalid_shapes

WRONG: dict[str, tuple[Owner, str, Edit, Check]] = {
    "memory's definition: softmax over heads": (
        memory,
        "memory_by_definition",
        edit("torch.softmax(score, 1)", "torch.softmax(score, 3)"),
        _ALL_FRAMES,
    ),
    "memory's definition: softmax over locations": (
        memory,
        "memory_by_definition",
        edit("torch.softmax(score, 1)", "torch.softmax(score, 2)"),
        _ALL_FRAMES,
    ),
    "memory's definition: mean over frames": (
        memory,
        "memory_by_definition",
        edit("torch.softmax(score, 1)", "torch.softmax(0 * score, 1)"),
        _ALL_FRAMES,
    ),
    "memory of no frame is NaN": (
        memory,
        "memory_finish",
        edit("(state.denominator == 0).any()", "False"),
        test_memory.test_memory_invalid_no_frame,
    ),
    "memory's keys have a bias": (
        memory,
        "TemporalMemory",
        _KEY_BIAS,
        test_memory.test_key_projection_has_no_bias,
    ),
    "attention's definition: scale 1/d": (attention, "attention_by_definition", edit("** 0.5", ""), _ATTENTION),
    "attention's definition: softmax over queries": (
        attention,
        "attention_by_definition",
        edit("torch.softmax(score, -1)", "torch.softmax(score, -2)"),
        _ATTENTION,
    ),
    "attention's definition: mask inverted": (attention, "attention_by_definition", edit("~mask", "mask"), _ATTENTION),
    "attention's definition: masked scores of zero": (
        attention,
        "attention_by_definition",
        edit("-torch.inf", "0.0"),
        _ATTENTION,
    ),
    "attention's keys have a bias": (attention, "MultiHead", _KEY_BIAS, _WEIGHTS),
    "block: MLP of ratio 2 by default": (
        attention,
        "Block",
        edit("mlp_ratio: int = 4", "mlp_ratio: int = 2"),
        _WEIGHTS,
    ),
    "block: six adaptive outputs more": (attention, "Block", edit("9 * width", "15 * width"), _WEIGHTS),
    "divided block: no attention over frames": (
        DividedBlock,
        "forward",
        edit("x = x + rearrange(self.time_out(", "x = x + 0 * rearrange(self.time_out("),
        _DIVIDED,
    ),
    "divided block: second norm forgotten": (
        DividedBlock,
        "forward",
        edit('layer_norm(rearrange(x, "b t n w -> (b t) n w"))', 'rearrange(x, "b t n w -> (b t) n w")'),
        _DIVIDED,
    ),
    "space-time block: frames apart": (
        SpaceTimeBlock,
        "forward",
        edit('"b t n w -> b (t n) w"', '"b t n w -> b (n t) w"'),
        _SPACE_TIME,
    ),
    "fresh network: output not zero": (
        Storm,
        "reset",
        edit("(self.final_adaptive, self.final)", "(self.final_adaptive,)"),
        _FRESH,
    ),
    "fresh network: gates not zero": (
        Storm,
        "reset",
        edit("nn.init.zeros_(block.adaptive.bias)", "nn.init.ones_(block.adaptive.bias)"),
        _FRESH,
    ),
    "memory of another grid accepted": (
        Storm,
        "_check",
        edit("(rows, cols, c.width)", "condition.memory.shape[1:]"),
        _SHAPES,
    ),
    "one noise level for a batch accepted": (
        Storm,
        "_check",
        edit('_expect("sigma", sigma, {b}, ())', "pass"),
        _SHAPES,
    ),
    "broken patches accepted": (
        denoiser,
        "_whole_patches",
        edit("raise ValueError", "str"),
        test_denoiser.test_condition_crop_is_of_whole_patches,
    ),
    "training noise levels of uniform numbers": (
        edm,
        "draw_sigma",
        edit("torch.randn(", "torch.rand("),
        test_edm.test_draw_sigma_is_training_sigma_of_its_generator,
    ),
    "adjoint overwrites repeated points": (
        Observations,
        "adjoint",
        edit("index_add_", "index_copy_"),
        test_guidance.test_observations_adjoint_identity,
    ),
}


def plant(monkeypatch: pytest.MonkeyPatch, owner: Owner, name: str, wrong: object) -> None:
    """Put the wrong version in place of the right one, in the tests' modules too where they bind it by name."""
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, wrong)
    for module in [m for key, m in sys.modules.items() if key.startswith(("storm_ref.", "test_"))]:
        for key, value in list(vars(module).items()):
            if value is right:
                monkeypatch.setattr(module, key, wrong)


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_version_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    """Signatures are unchecked, as where users run the code: values must tell."""
    owner, name, change, check = WRONG[fault]
    plant(monkeypatch, owner, name, change.apply(owner, name))
    arguments = (None,) if check is _SHAPES else ()
    with pytest.raises(AssertionError):
        check(*arguments)
