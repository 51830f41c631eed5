"""The second architecture, `train.py --arch mla_moe`: DeepSeek-V3's (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report",
section 2.1), in the names of transformers' DeepseekV3Config and with its parameter names.

Two things differ from GPT-2. Attention reads keys and values out of a small latent vector, which is all that a cache
has to keep of a token. And the MLP is a mixture of experts: a router sends each token to two of seven, and a shared one
works on every token, so that a token meets half of the parameters.
docs/mla-moe.md explains both, and how each part is proven.

    MLAMoEConfig       the shape; the defaults are those of --preset mla-moe-1b
    LatentAttention    multi-head latent attention with its decoupled rotary positions
    Router, Experts    who works on a token, and the work
    MLAMoE             the model, as train.py, sample.py and export_hf.py use it
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

from support.kernels import attention_by_products, linear_cross_entropy


@dataclass(frozen=True)
class MLAMoEConfig:
    """Shape of the model. The defaults make 1,075,293,184 parameters, 509,062,144 of which work on a token."""

    vocab_size: int = 49152
    hidden_size: int = 1024  # C
    num_hidden_layers: int = 24
    num_attention_heads: int = 16  # H
    q_lora_rank: int = 384  # width of the latent vector that queries are read from
    kv_lora_rank: int = 384  # and of the one that keys and values are read from
    qk_nope_head_dim: int = 32  # of a head's query and key: values without position
    qk_rope_head_dim: int = 32  # and values that are rotated by their position
    v_head_dim: int = 64  # as wide as the two together, which attention kernels on a CPU want
    moe_intermediate_size: int = 1536  # width inside an expert
    n_routed_experts: int = 7  # E
    num_experts_per_tok: int = 2  # k
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 1024
    initializer_range: float = 0.02
    balance_rate: float = 1e-3  # a step of the router's bias; transformers knows no such setting

    @classmethod
    def of(cls, settings, vocab_size: int) -> MLAMoEConfig:
        """From train.py's settings."""
        C = settings.n_embd
        head = C // settings.n_head
        return cls(
            vocab_size=vocab_size,
            hidden_size=C,
            num_hidden_layers=settings.n_layer,
            num_attention_heads=settings.n_head,
            q_lora_rank=3 * C // 8,
            kv_lora_rank=3 * C // 8,
            qk_nope_head_dim=head // 2,
            qk_rope_head_dim=head // 2,
            v_head_dim=head,
            moe_intermediate_size=settings.expert_width or 3 * C // 2,
            n_routed_experts=settings.n_expert,
            num_experts_per_tok=settings.n_expert_active,
            max_position_embeddings=settings.block_size,
            balance_rate=settings.balance_rate,
        )

    @staticmethod
    def conflicts(settings) -> Iterator[tuple[str, str]]:
        """Yields (train.py's settings that this architecture can't have, what to do about it)."""
        head = settings.n_embd // settings.n_head
        if settings.n_embd % settings.n_head == 0 and head % 4:
            yield "n_embd n_head", f"n_embd / n_head is {head}: --arch mla_moe needs a multiple of 4, such as 64"
        for name in ("n_embd", "expert_width"):
            width = getattr(settings, name)
            if width % 8:  # rows of experts' matrices begin at multiples of 16 bytes
                nearest = 8 * (width // 8 + 1)
                yield name, f"{name} {width} isn't a multiple of 8: --arch mla_moe needs one, such as {nearest}"
        if settings.n_expert_active > settings.n_expert:
            most = f"use at most {settings.n_expert}"
            yield "n_expert n_expert_active", f"n_expert_active {settings.n_expert_active} is over n_expert: {most}"
        if settings.dropout:
            yield "dropout", "dropout is for --arch gpt2 alone: leave it out"

    def __post_init__(self) -> None:
        """Raises ValueError for a shape that no model can have."""
        if self.num_attention_heads < 1 or self.qk_rope_head_dim % 2:
            raise ValueError("its heads can't be rotated")
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError("it has fewer experts than a token is sent to")

    # the names that the rest of the program has for them
    @property
    def block_size(self) -> int:
        return self.max_position_embeddings

    @property
    def n_layer(self) -> int:
        return self.num_hidden_layers


# ======== Attention ===================================================================================================


class RMSNorm(nn.Module):
    """LayerNorm without mean and bias (Zhang & Sennrich 2019). Squares are summed in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * wide).to(x.dtype)


class Matrix(nn.Module):
    """A weight (rows, columns) that isn't only used as nn.Linear would use it."""

    def __init__(self, columns: int, rows: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))


def rotations(config: MLAMoEConfig, start: int, end: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angles of positions start .. end - 1, each (T, rope / 2) (Su et al. 2021, "RoFormer")."""
    pairs = torch.arange(0, config.qk_rope_head_dim, 2, device=device).float()
    speeds = 1.0 / config.rope_theta ** (pairs / config.qk_rope_head_dim)
    angles = torch.arange(start, end, device=device).float()[:, None] * speeds
    return angles.cos(), angles.sin()


def rotated(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turns each pair of neighbours in (..., T, rope) by its position's angle. The pairs' first halves come out before
    the second ones, in queries and keys alike, so products don't change."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1). A token leaves one latent vector,
    from which each head reads its own key and value, and one key that carries its position, shared by all heads."""

    def __init__(self, config: MLAMoEConfig):
        super().__init__()
        C = config.hidden_size
        H = config.num_attention_heads
        self.n_head = H
        self.latent = config.kv_lora_rank
        self.nope = config.qk_nope_head_dim
        self.rope = config.qk_rope_head_dim
        self.v = config.v_head_dim
        self.q_a_proj = nn.Linear(C, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, H * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(C, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, config.rms_norm_eps)
        self.kv_b_proj = Matrix(self.latent, H * (self.nope + self.v))
        self.o_proj = nn.Linear(H * self.v, C, bias=False)
        self.masks_explicitly = False  # set where torch's own kernel isn't causal

    def forward(self, x: torch.Tensor, rope: tuple, cache: dict | None = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). A cache holds what earlier tokens left, and is extended by these."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        q_nope, q_rope = q.split((self.nope, self.rope), dim=-1)  # (B, H, T, ...)
        q_rope = rotated(q_rope, rope)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.latent, self.rope), dim=-1)
        left = torch.cat((self.kv_a_layernorm(latent), rotated(k_rope, rope)), dim=-1)  # (B, T, latent + rope)
        if cache:
            cache["left"] = torch.cat((cache["left"], left), dim=1)
            y = self.absorbed(q_nope, q_rope, cache["left"])
        else:
            if cache is not None:
                cache["left"] = left
            y = self.expanded(q_nope, q_rope, left)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def expanded(self, q_nope: torch.Tensor, q_rope: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """Each head's keys and values are read out of the latent vectors: quickest where all tokens are new, as in
        training. Queries (B, H, T, ...) and what T tokens left -> (B, H, T, v)."""
        latent, k_rope = left.split((self.latent, self.rope), dim=-1)
        kv = F.linear(latent, self.kv_b_proj.weight).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        k_nope, v = kv.split((self.nope, self.v), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, self.n_head, -1, -1)), dim=-1)
        if self.masks_explicitly or q.device.type == "cpu":
            return attention_by_products(q, k, v, dropout=0.0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def absorbed(self, q_nope: torch.Tensor, q_rope: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """The same for the last T of S tokens without making S keys and values: q (W l) = (q W) l, so the queries are
        taken into the latent space once, and what is gathered there is taken out of it."""
        T, S = q_nope.size(2), left.size(1)
        into, out_of = self.kv_b_proj.weight.unflatten(0, (self.n_head, -1)).split((self.nope, self.v), dim=1)
        q = torch.cat((q_nope @ into, q_rope), dim=-1)  # (B, H, T, latent + rope)
        scores = (q @ left[:, None].mT).float() / math.sqrt(self.nope + self.rope)
        later = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        weights = scores.masked_fill(later, -math.inf).softmax(dim=-1).to(left.dtype)
        return weights @ left[:, None, :, : self.latent] @ out_of.mT


# ======== Experts =====================================================================================================


class Router(nn.Module):
    """Chooses k of E experts for each token, in fp32: sigmoid scores, of which a bias takes part in the choice alone.
    It is no parameter: MLAMoE.before_update moves it so that the experts get even loads (Wang et al. 2024,
    "Auxiliary-loss-free load balancing")."""

    def __init__(self, config: MLAMoEConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, C) -> (what each chosen expert's answer counts, which experts), both (N, k)."""
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight).sigmoid()
        experts = (scores + self.e_score_correction_bias).topk(self.top_k, sorted=False).indices
        weights = scores.gather(1, experts)
        return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scale, experts


class Experts(nn.Module):
    """E gated MLPs (Shazeer 2020, "GLU Variants"), their matrices stacked. No token is dropped."""

    def __init__(self, config: MLAMoEConfig):
        super().__init__()
        E, C, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, width))
        self.in_groups = True  # off where a token's answer must not depend on its neighbours, not even in the last bit

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor):
        """x (N, C), weights and experts (N, k) -> (the sum of the chosen experts' answers (N, C), load (E,): how many
        tokens each expert was given)."""
        # bincount would make a GPU wait
        load = (experts.flatten() == torch.arange(len(self.down_proj), device=x.device)[:, None]).sum(dim=1)
        if self.in_groups and x.device.type != "mps":  # which has no grouped products
            return self.grouped(x, weights, experts, load), load
        return self.plain(x, weights, experts), load

    def plain(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Each expert works on all tokens, and most of its answers count nothing."""
        y = 0.0
        for number, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            counts = (weights * (experts == number)).sum(dim=1, keepdim=True)
            y = y + F.linear(F.silu(gate) * up, down) * counts
        return y

    def grouped(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, load: torch.Tensor):
        """Each expert works on the tokens that were sent to it."""
        kind = x.device.type
        # autocast doesn't know grouped products
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        order = experts.flatten().argsort(stable=True)  # an expert's tokens side by side
        tokens = order // experts.size(1)
        ends = load.cumsum(0).to(torch.int32)
        rows = x.to(dtype)[tokens]
        gate, up = F.grouped_mm(rows, self.gate_up_proj.to(dtype).mT, offs=ends).chunk(2, dim=-1)
        answers = F.grouped_mm(F.silu(gate) * up, self.down_proj.to(dtype).mT, offs=ends)
        answers = answers * weights.flatten()[order, None]
        return torch.zeros_like(x, dtype=answers.dtype).index_add(0, tokens, answers)


class SharedExpert(nn.Module):
    """The one that works on every token."""

    def __init__(self, config: MLAMoEConfig):
        super().__init__()
        width = config.n_shared_experts * config.moe_intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    def __init__(self, config: MLAMoEConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, C) -> (the same, load (E,))."""
        rows = x.flatten(0, 1)
        y, load = self.experts(rows, *self.gate(rows))
        return y.view(x.shape) + self.shared_experts(x), load


# ======== The model ===================================================================================================


class Block(nn.Module):
    """Attention, then experts; each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: MLAMoEConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config)

    def forward(self, x: torch.Tensor, rope: tuple, cache: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        y, load = self.mlp(self.post_attention_layernorm(x))
        return x + y, load


class MLAMoE(nn.Module):
    """DeepSeek-V3 in the small, with its own parameter names: transformers' DeepseekV3ForCausalLM loads them."""

    figures = ("load_entropy", "busiest")  # of a step, for log and CSV: see before_update

    def __init__(self, config: MLAMoEConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # keep only each block's input, and compute the rest again for the gradients
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # not tied to the embedding
        # (L, E): tokens that each expert was given in training since the last step
        load = torch.zeros(config.num_hidden_layers, config.n_routed_experts, dtype=torch.long)
        self.register_buffer("load", load, persistent=False)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """N(0, 0.02), and less for what writes to the residual stream: its variance shouldn't grow with depth."""
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                p.normal_(0.0, std / math.sqrt(2 * self.config.num_hidden_layers), generator=generator)
            elif p.dim() >= 2:
                p.normal_(0.0, std, generator=generator)

    def hidden(self, idx: torch.Tensor, cache: list[dict] | None = None) -> torch.Tensor:
        """Token ids (B, T) -> what the head reads, (B, T, C). Raises ValueError past the context's end."""
        past = cache[0]["left"].size(1) if cache and cache[0] else 0
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens don't fit into a context of {self.config.block_size}")
        rope = rotations(self.config, past, end, idx.device)
        x = self.model.embed_tokens(idx)
        loads = []
        for i, block in enumerate(self.model.layers):
            if cache is not None:
                x, load = block(x, rope, cache[i])
            elif self.grad_checkpoint and torch.is_grad_enabled():
                x, load = torch.utils.checkpoint.checkpoint(block, x, rope, use_reentrant=False)
            else:
                x, load = block(x, rope)
            loads.append(load)
        if self.training:
            self.load += torch.stack(loads)
        return self.model.norm(x)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, keep_logits: bool = True, cache=None):
        """idx (B, T) -> (logits (B, T, V), loss); the loss is the mean over the targets that aren't -1, in nats.
        Training needs none: without logits (None) it takes less memory. With a cache they are the last position's."""
        x = self.hidden(idx, cache)
        if cache is not None:
            x = x[:, -1:]
        if not keep_logits:
            return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def before_update(self, runtime) -> dict[str, torch.Tensor]:
        """Between gradients and step: an expert that got more tokens than the mean, over all micro-batches and
        processes, is chosen less often from now on. Returns how even the load was: its entropy, 1 where all are alike
        (mean of the layers), and the share of the busiest expert of any layer."""
        load = torch.stack(runtime.gather(self.load)).sum(dim=0).float()  # (L, E)
        self.load.zero_()
        steps = self.config.balance_rate * (load.mean(dim=1, keepdim=True) - load).sign()
        steps -= steps.mean(dim=1, keepdim=True)  # a bias that all have in common chooses nothing
        for block, step in zip(self.model.layers, steps, strict=True):
            block.mlp.gate.e_score_correction_bias += step
        share = load / load.sum(dim=1, keepdim=True)
        entropy = torch.special.entr(share).sum(dim=1).mean() / math.log(load.size(1))
        return {"load_entropy": entropy, "busiest": share.max()}

    def new_cache(self) -> list[dict]:
        """An empty cache for each block: of S tokens it has one tensor (B, S, kv_lora_rank + qk_rope_head_dim)."""
        return [{} for _ in self.model.layers]

    def mask_explicitly(self) -> None:
        """Attention with a mask of our own, where torch's kernel lets a token see later ones."""
        for block in self.model.layers:
            block.self_attn.masks_explicitly = True

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by how they are trained: the blocks' matrices, embedding and head, and vectors. The router counts
        as one of these: its few rows are no map from space to space, which Muon is for."""
        routers = [block.mlp.gate.weight for block in self.model.layers]
        others = [p for name, p in self.model.layers.named_parameters() if not name.endswith("mlp.gate.weight")]
        return {
            "matrices": [p for p in others if p.dim() >= 2],
            "embeddings": [self.model.embed_tokens.weight, self.lm_head.weight],
            "vectors": [*routers, *(p for p in others if p.dim() < 2), self.model.norm.weight],
        }

    def stacks(self) -> dict:
        """As train.GPT's. Experts' parameters are stacks already."""
        return {}

    def flops_per_token(self) -> int:
        """A product and a sum for each weight that works on a token, forward and twice backward: all but the experts
        that it isn't sent to."""
        config = self.config
        idle = config.num_hidden_layers * (config.n_routed_experts - config.num_experts_per_tok)
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        return 6 * (sum(p.numel() for p in self.parameters()) - idle * expert)

    def activation_bytes(self, tokens: int, half_precision: bool, grad_checkpoint: bool) -> int:
        """At least what is kept for the gradients: of each block its input or, without grad_checkpoint, also what its
        products read, in 16 or 32 bits."""
        config = self.config
        C = config.hidden_size
        size = 4 * C
        if not grad_checkpoint:
            head = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
            heads = 2 * config.num_attention_heads * head
            experts = (config.num_experts_per_tok + 1) * (C + 3 * config.moe_intermediate_size)
            read = 2 * C + config.q_lora_rank + config.kv_lora_rank + heads + experts
            size += 4 * C + read * (2 if half_precision else 4)
        return tokens * config.num_hidden_layers * size
