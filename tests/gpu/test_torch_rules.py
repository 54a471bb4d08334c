"""The real torch keeps the rules that the stand-in (fakes/python/torch) is held to."""

from __future__ import annotations

import pytest
import torch_rules

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rule", torch_rules.ANYWHERE)
def test_rule(rule: str, device: str) -> None:
    torch_rules.ANYWHERE[rule](torch, device)


@pytest.mark.parametrize("rule", torch_rules.ON_A_GPU)
def test_rule_of_a_gpu(rule: str) -> None:
    torch_rules.ON_A_GPU[rule](torch, "cuda")
