"""Weights in half the bytes, of both architectures."""

from __future__ import annotations

import re

import pytest
import torch
from model_kit import small_model

from mla_moe import MLAMoE, MLAMoEConfig
from support import deepseek
from support.rounding import round_weights, stored_as


def small_moe() -> MLAMoE:
    torch.manual_seed(0)
    config = MLAMoEConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = MLAMoE(config).eval()
    for block in model.model.layers:
        block.mlp.gate.e_score_correction_bias.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("make", [small_model, small_moe])
def test_weights_are_rounded_in_place_and_what_that_does_is_printed(make, capsys):
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    round_weights(model, "bf16")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name].bfloat16().float())
    assert 0 < float(re.search(r"differ by (\S+) at most", capsys.readouterr().out)[1]) < 1


def test_fp32_changes_nothing_and_says_nothing(capsys):
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    round_weights(model, "fp32")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert capsys.readouterr().out == ""


def test_a_routers_bias_stays_in_fp32():
    model = small_moe()
    tensors = deepseek.hf_weights(model)
    stored = stored_as("fp16", tensors, model)
    assert stored.keys() == tensors.keys()
    biases = [name for name in stored if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name in biases else torch.float16)
