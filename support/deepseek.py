"""mla_moe.py's model as transformers' DeepseekV3ForCausalLM, for export_hf.py. The names are the same already."""

from __future__ import annotations

import torch


def hf_config(model_config: dict, end_of_text: int | None) -> dict:
    """config.json of an MLAMoEConfig."""
    shape = {name: value for name, value in model_config.items() if name != "balance_rate"}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **shape,
        "num_key_value_heads": model_config["num_attention_heads"],
        "head_dim": model_config["qk_rope_head_dim"],  # what its rotary embedding goes by
        "first_k_dense_replace": 0,  # every layer has experts
        "n_group": 1,  # and the router chooses among all of them
        "topk_group": 1,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rope_interleave": True,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }


def hf_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights as in published checkpoints, where each expert's matrices stand by themselves: every release reads it."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for i, one in enumerate(tensor):
                gate, up = one.chunk(2)
                tensors[f"{stem}.{i}.gate_proj.weight"] = gate.clone()
                tensors[f"{stem}.{i}.up_proj.weight"] = up.clone()
        elif kind == "down_proj":
            for i, down in enumerate(tensor):
                tensors[f"{stem}.{i}.down_proj.weight"] = down.clone()
        else:
            tensors[name] = tensor
    return tensors
