"""What TransformerEngine's layers cannot do is refused at set-up, whatever this machine has."""

import re
from typing import Any

import pytest

from megarlhf.config.check_kernels import kernel_errors, kernel_warnings
from megarlhf.config.layouts import LayoutArguments

CP, SELECTIVE = {"context_parallel_size": 2}, {"recompute_granularity": "selective"}


def errors(impl: Any = "transformer_engine", *, prefix: str = "", layout: dict[str, Any], **options: Any) -> list[str]:
    given: dict[str, Any] = {"bf16": True, "share_prompt_prefix": False} | options
    return kernel_errors(impl, [(prefix, LayoutArguments(**layout))], **given)


@pytest.mark.parametrize(
    ("layout", "options", "words"),
    [
        (CP, {"bf16": False}, "bf16=False with context_parallel_size=2 .*: set bf16, or set transformer_impl=local"),
        (CP, {"bf16": False, "prefix": "critic_"}, "with critic_context_parallel_size=2"),
        (CP | {"cp_comm_type": "all_gather"}, {}, "cp_comm_type=all_gather with context_parallel_size=2 .*packed"),
        ({}, {"share_prompt_prefix": True}, "share_prompt_prefix=True with transformer_impl=transformer_engine"),
        ({}, {"load_in_4bit": True}, "load_in_4bit=True with transformer_impl=transformer_engine"),
        (SELECTIVE, {}, "recompute_granularity=selective .* saves nothing .*recompute_granularity=full"),
    ],
)
def test_what_is_refused(layout: dict[str, Any], options: dict[str, Any], words: str) -> None:
    (error,) = errors(layout=layout, **options)
    assert re.search(words, error)
    assert errors("local", layout=layout, **options) == []


def test_pytorchs_adamw_on_both_sides_is_refused() -> None:
    (error,) = errors("local", layout={}, offload_fraction=0.5, fused_adam=False)
    assert error.startswith("optimizer_offload_fraction=0.5 without TransformerEngine or apex")
    assert errors("local", layout={}, offload_fraction=0.5) == errors("local", layout={}, fused_adam=False) == []


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (CP, {}),
        ({"cp_comm_type": "all_gather"}, {}),
        ({}, {"bf16": False}),
        (SELECTIVE, {"bf16": False}),  # the unfused attention keeps its scores
        (SELECTIVE, {"recompute_modules": ("core_attn", "mlp")}),
        ({"recompute_granularity": "full"}, {}),
    ],
)
def test_what_is_not(layout: dict[str, Any], options: dict[str, Any]) -> None:
    assert errors(layout=layout, **options) == []


def test_what_is_slow_is_said() -> None:
    (warning,) = kernel_warnings("transformer_engine", bf16=False)
    assert "bf16=False: TransformerEngine's fused and flash attention have no fp32" in warning
    assert kernel_warnings("transformer_engine", bf16=True) == kernel_warnings("local", bf16=False) == []


@pytest.mark.parametrize(
    ("layout", "modules", "words"),
    [
        (
            SELECTIVE,
            ["mlp", "layernorm"],
            "mlp layernorm with transformer_impl=local .layernorm need TransformerEngine",
        ),
        (SELECTIVE, ["attention"], "recompute_modules=attention names attention, not .*: use core_attn, layernorm"),
        (SELECTIVE, [], "names nothing"),
        ({}, ["mlp"], "recompute_modules=mlp is ignored without recompute_granularity=selective"),
    ],
)
def test_modules_that_cannot_be_recomputed(layout: dict[str, Any], modules: list[str], words: str) -> None:
    (error,) = errors("local", layout=layout, recompute_modules=modules)
    assert re.search(words, error)
    assert errors("local", layout=SELECTIVE, recompute_modules=["mlp", "core_attn"]) == []
