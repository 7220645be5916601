"""Section ``moe``: true experts, null experts, router, dispatcher, expert kernels."""

from dataclasses import dataclass
from typing import Literal

from adamoe_dist.config.fields import key, section


@dataclass(kw_only=True)
class BalanceConfig:
    """The balance loss of each MoE layer (AdaMoE equation 6) and the annealing of its coefficient."""

    type: Literal["null_averaged", "grouped", "switch", "none"] = key(
        "null_averaged",
        "null_averaged: equation 6, the null experts' load is averaged over them; grouped: only the group of true "
        "experts against that of null experts (ZEDA); switch: equation 3 over all n+m experts as if distinct; none: no "
        "balance loss.",
    )
    coefficient: float = key(
        0.02, "alpha at the first step. The loss is top_k x alpha at perfect balance (not alpha).", at_least=0
    )
    final_coefficient: float | None = key(
        None,
        "alpha after anneal_steps steps, reached linearly; null keeps coefficient throughout.",
        at_least=0,
    )
    anneal_steps: int | None = key(
        None, "Steps over which alpha goes to final_coefficient; null means schedule.total_steps.", at_least=1
    )
    target_null_share: float | None = key(
        None, "Part of the slots that type=grouped gives to null experts; null: m/(n+m).", above=0, below=1
    )
    scope: Literal["micro_batch", "global_batch"] = key(
        "micro_batch",
        "Tokens that the loads are counted over: this rank's micro-batch, or those of all ranks in this step so far "
        "(one small all-reduce a layer and micro-batch).",
    )


@dataclass(kw_only=True)
class RouterConfig:
    """How a token picks its experts."""

    type: Literal["adamoe", "topk"] = key(
        "adamoe",
        "adamoe: null experts; topk: Megatron-core's own router and dispatcher (the baseline, m = 0).",
    )
    score_function: Literal["softmax", "sigmoid"] = key(
        "softmax",
        "Scores of a token's experts: softmax over all n+m, or the sigmoid of each logit, independent of the others.",
    )
    normalize: Literal["true_experts", "all_selected", "all_true", "none"] = key(
        "true_experts",
        "Combine weights sum to 1 over the true experts selected (the paper; null experts that have an output count "
        "with them), over all k selected with the null ones' share lost, over all n true experts whether selected or "
        "not (null experts take no share: as a model without them whose weights are plain scores), or are the plain "
        "scores.",
    )
    null_init: Literal["random", "copy", "shared"] = key(
        "random",
        "Null experts' router rows at the start: random like the others; copy: noisy copies of the true rows; "
        "shared: one row for all null experts.",
    )
    z_loss_coefficient: float = key(
        0.0, "Weight of the mean squared log-sum-exp of the router's scores (0: off).", at_least=0
    )
    gating_residual: bool = key(
        False, "Add a learned map of the previous MoE layer's scores to each layer's scores (MoE++)."
    )
    capacity_factor: float | None = key(
        None,
        "Tokens that a true expert takes of each rank's micro-batch at most, as a multiple of its share at balance; "
        "what exceeds it is dropped; null: no limit, nothing is dropped.",
        above=0,
    )
    drop_policy: Literal["probs", "position"] = key(
        "probs", "Which tokens an expert beyond its capacity keeps: those of the largest weights, or the first ones."
    )
    target_load: float | None = key(
        None,
        "Mean number of true experts a token is to use in every layer; after each step a bias on the true experts' "
        "scores, for selection only, is moved towards it. Strictly between max(k-m, 0) and min(k, n); null: off.",
        above=0,
    )
    bias_rate: float = key(
        0.5,
        "Part of the load's error that one move of the bias is to undo, at the first step; how far the bias has to "
        "move for that is measured from the scores.",
        above=0,
        below=2,
    )
    bias_decay_steps: int | None = key(
        None,
        "Steps after which bias_rate has halved: it is bias_rate / (1 + step / bias_decay_steps); null means "
        "schedule.total_steps.",
        at_least=1,
    )
    balance: BalanceConfig = section(BalanceConfig, "Balance loss.")


@dataclass(kw_only=True)
class NullTypesConfig:
    """What the null experts return (MoE++). The types' columns follow each other as zero, identity, constant."""

    identity: int = key(0, "Null experts that return the token itself.", at_least=0)
    constant: int = key(
        0, "Null experts that return a mixture of the token and a learned vector; the others return zero.", at_least=0
    )


@dataclass(kw_only=True)
class DispatcherConfig:
    """How rows reach the ranks of their experts."""

    type: Literal["alltoall", "allgather", "flex"] = key(
        "alltoall",
        "alltoall: an all-to-all that carries rows for true experts only; allgather: every rank gets every token and "
        "returns sums (null slots save compute, not rows); flex: Megatron's flex dispatcher over DeepEP, on CUDA.",
    )
    flex_backend: Literal["deepep", "hybridep"] = key("deepep", "Library of type=flex: DeepEP or its HybridEP.")
    deduplicate: bool = key(
        True,
        "Send a token once to a rank that holds several of its experts; false: one row per (token, expert). For "
        "type=alltoall; does not apply with pad_to_capacity.",
    )
    dtype: Literal["model", "bf16"] = key(
        "model", "Type of the rows and their gradients on the way: as the model computes, or bf16 (alltoall and flex)."
    )
    overlap_shared_expert: bool = key(
        True,
        "Compute the shared expert while rows travel; without a shared expert, with one expert-parallel rank, with "
        "type=flex and with moe.router.type=topk it has no effect.",
    )
    pad_to_capacity: bool = key(
        False,
        "Give every expert the same number of rows from every rank, dropping and padding: fixed shapes and no size on "
        "the host. Needs moe.router.capacity_factor and type=alltoall.",
    )


@dataclass(kw_only=True)
class ExpertsConfig:
    """How the experts' products are computed."""

    kernel: Literal["auto", "grouped_mm", "sequential", "threaded"] = key(
        "auto",
        "grouped_mm: one grouped matrix product over all local experts; sequential: a loop over experts; threaded: "
        "on CPU, an expert a core at a time; auto: threaded on CPU, on CUDA grouped_mm, or sequential where the "
        "precision or the widths rule it out.",
    )


@dataclass(kw_only=True)
class MoEConfig:
    """The mixture-of-experts layers."""

    num_experts: int = key(8, "n: true experts a layer.", at_least=1)
    num_null_experts: int = key(8, "m: null experts a layer; they cost nothing.", at_least=0)
    top_k: int = key(3, "k: slots a token fills with true or null experts; at balance k n/(n+m) are true.", at_least=1)
    expert_hidden_size: int = key(256, "Inner width of an expert (SwiGLU).", at_least=1)
    shared_expert_hidden_size: int | None = key(
        None, "Inner width of a shared expert that every token uses besides; null: none.", at_least=1
    )
    shared_expert_gate: bool = key(
        False, "Multiply the shared expert's output by the sigmoid of a learned score of the token (Qwen2-MoE)."
    )
    layer_frequency: int = key(1, "One layer in so many is an MoE layer, the last of each group (1: all).", at_least=1)
    dense_layers: list[int] = key(
        [], "Layers, numbered from 0 and ascending, that have a dense feed-forward whatever layer_frequency says."
    )
    reference_top_k: int | None = key(
        None,
        "Experts a token in the model that expert_flops_saved compares with; null: top_k where m = 0, else 2.",
        at_least=1,
    )
    null_types: NullTypesConfig = section(NullTypesConfig, "Kinds of null experts.")
    router: RouterConfig = section(RouterConfig, "Router.")
    dispatcher: DispatcherConfig = section(DispatcherConfig, "Dispatcher.")
    experts: ExpertsConfig = section(ExpertsConfig, "Expert kernels.")

    @property
    def expected_load(self) -> float:
        """True experts a token: the target that is held, k (1 - r) at a target null share r, else k n / (n + m)."""
        if self.router.target_load is not None:
            return self.router.target_load
        balance = self.router.balance
        if balance.type == "grouped" and balance.target_null_share is not None:
            return self.top_k * (1.0 - balance.target_null_share)
        return self.top_k * self.num_experts / (self.num_experts + self.num_null_experts)
