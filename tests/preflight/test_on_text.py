"""A multimodal model computes on text what its language model alone does, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from multimodal import CONFIGS
from transformers.models.gemma3.modeling_gemma3 import Gemma3Model
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Model

from mst_ds.model_shape import language_config
from mst_ds.preflight import require_same_on_text


def check(name: str) -> None:
    config = CONFIGS[name]()
    require_same_on_text(config, language_config(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_which_both_are_the_same(name: str) -> None:
    before = torch.get_rng_state()
    check(name)
    assert torch.equal(torch.get_rng_state(), before)


def _positions_of_images(model: Any, own: Callable[..., Any], **kwargs: Any) -> Any:
    return own(model, **kwargs | {"position_ids": 3 * torch.arange(kwargs["input_ids"].shape[1])[None]})


def _sight(model: Any, own: Callable[..., Any], **kwargs: Any) -> Any:
    return own(model, **kwargs | {"pixel_values": torch.zeros(1, 3, 28, 28)})


@pytest.mark.parametrize(
    ("name", "broken", "change", "says"),
    [
        ("qwen3_5", Qwen3_5Model, _positions_of_images, "computes on text other than its language model alone does"),
        ("gemma3", Gemma3Model, _sight, "Gemma3ForConditionalGeneration does not run on text alone"),
    ],
)
def test_one_that_differs_is_refused(
    name: str, broken: Any, change: Callable[..., Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = broken.forward

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        return change(self, own, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(broken, "forward", forward)
    with pytest.raises(ValueError, match=says) as error:
        check(name)
    assert "\n" not in str(error.value)
