"""From the configuration tree to Megatron's TransformerConfig."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from adamoe_dist.config import Config, MoEConfig, Resolved


@dataclass
class AdaMoETransformerConfig(TransformerConfig):
    """Megatron's configuration with what the AdaMoE layers need besides.

    ``moe`` is the tree's own section, ``experts_kernel`` the kernel that was chosen, ``seed`` the seed of the experts'
    initial weights, ``expert_nodes`` the node of each rank of the expert-parallel group, expert-tensor ranks next to
    each other (empty: all on one).
    """

    moe: MoEConfig = field(default_factory=MoEConfig)
    experts_kernel: str = "grouped_mm"
    seed: int = 0
    expert_nodes: tuple[int, ...] = ()


def transformer_config(
    config: Config,
    resolved: Resolved,
    dtype: torch.dtype,
    experts_kernel: str,
    expert_nodes: tuple[int, ...] = (),
) -> AdaMoETransformerConfig:
    """Return Megatron's configuration of a run.

    Weights start on the CPU from seeded generators on every platform, so that they do not depend on the ranks or the
    device. Fused kernels that write into Megatron's own gradient buffers stay off: DeepSpeed owns the gradients.
    Megatron's own router, the baseline, divides its losses by the tensor- and context-parallel ranks; gradients are
    summed over the former and averaged over the latter, hence the factor ``layout.context``.
    """
    model, moe, layout = config.model, config.moe, resolved.layout
    baseline = moe.router.type == "topk"
    balanced = baseline and moe.router.balance.type == "switch"
    return AdaMoETransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.head_dim,
        qk_layernorm=model.qk_norm != "none",
        add_qkv_bias=model.qkv_bias,
        ffn_hidden_size=model.ffn_hidden_size or 4 * model.hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        deterministic_mode=config.run.deterministic,
        use_cpu_initialization=True,
        init_method_std=model.init_std,
        params_dtype=torch.float32,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.tensor > 1,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        num_moe_experts=moe.num_experts,
        moe_ffn_hidden_size=moe.expert_hidden_size,
        moe_layer_freq=[int(is_moe_layer(config, layer)) for layer in range(model.num_layers)],
        moe_shared_expert_intermediate_size=moe.shared_expert_hidden_size,
        moe_shared_expert_gate=moe.shared_expert_gate,
        moe_router_topk=min(moe.top_k, moe.num_experts),
        moe_router_pre_softmax=moe.router.normalize == "none",
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss" if balanced else "none",
        moe_aux_loss_coeff=moe.router.balance.coefficient * moe.top_k * layout.context if balanced else 0.0,
        moe_z_loss_coeff=(moe.router.z_loss_coefficient * layout.context or None) if baseline else None,
        moe_token_dispatcher_type="alltoall",
        moe_flex_dispatcher_backend=moe.dispatcher.flex_backend,
        **recomputation(config),
        moe=moe,
        experts_kernel=experts_kernel,
        seed=config.run.seed,
        expert_nodes=expert_nodes,
    )


def recomputation(config: Config) -> dict[str, Any]:
    """Return Megatron's arguments for ``train.recompute``.

    ``selective`` names the feed-forward modules whose inner width makes their activations large and that communicate
    nothing; the true experts see to themselves. The attention kernels keep no score matrix that would be worth it.
    """
    if config.train.recompute == "none":
        return {}
    if config.train.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp", "shared_experts"]}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def is_moe_layer(config: Config, layer: int) -> bool:
    """Tell whether layer ``layer`` (from 0) has experts."""
    return layer in config.moe_layers
