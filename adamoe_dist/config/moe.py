"""Section ``moe``: true experts, null experts, router, dispatcher, expert kernels."""

from dataclasses import dataclass
from typing import Literal

from adamoe_dist.config.fields import key, section


@dataclass(kw_only=True)
class BalanceConfig:
    """The balance loss of each MoE layer (AdaMoE equation 6) and the annealing of its coefficient."""

    type: Literal["null_averaged", "switch", "none"] = key(
        "null_averaged",
        "null_averaged: equation 6, the null experts' load is averaged over them; switch: equation 3 over all "
        "n+m experts as if distinct; none: no balance loss.",
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


@dataclass(kw_only=True)
class RouterConfig:
    """How a token picks its experts."""

    type: Literal["adamoe", "topk"] = key(
        "adamoe",
        "adamoe: null experts; topk: Megatron-core's own router and dispatcher (the baseline, m = 0).",
    )
    normalize: Literal["true_experts", "all_selected", "none"] = key(
        "true_experts",
        "Combine weights sum to 1 over the true experts selected (the paper), over all k selected with the null "
        "ones' share lost, or are the plain softmax over all n+m scores.",
    )
    null_init: Literal["random", "copy", "shared"] = key(
        "random",
        "Null experts' router rows at the start: random like the others; copy: noisy copies of the true rows; "
        "shared: one row for all null experts.",
    )
    z_loss_coefficient: float = key(
        0.0, "Weight of the mean squared log-sum-exp of the router's scores (0: off).", at_least=0
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
class DispatcherConfig:
    """How rows reach the ranks of their experts."""

    type: Literal["alltoall"] = key("alltoall", "alltoall: an all-to-all that carries rows for true experts only.")
    deduplicate: bool = key(
        True,
        "Send a token once to a rank that holds several of its experts; false: one row per (token, expert).",
    )


@dataclass(kw_only=True)
class ExpertsConfig:
    """How the experts' products are computed."""

    kernel: Literal["auto", "grouped_mm", "sequential"] = key(
        "auto",
        "grouped_mm: one grouped matrix product over all local experts; sequential: a loop over experts; auto: "
        "grouped_mm.",
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
    layer_frequency: int = key(1, "One layer in so many is an MoE layer, the last of each group (1: all).", at_least=1)
    reference_top_k: int | None = key(
        None,
        "Experts a token in the model that expert_flops_saved compares with; null: top_k where m = 0, else 2.",
        at_least=1,
    )
    router: RouterConfig = section(RouterConfig, "Router.")
    dispatcher: DispatcherConfig = section(DispatcherConfig, "Dispatcher.")
    experts: ExpertsConfig = section(ExpertsConfig, "Expert kernels.")

    @property
    def expected_load(self) -> float:
        """True experts a token: the target where one is held, else k n / (n + m), that of perfect balance."""
        if self.router.target_load is not None:
            return self.router.target_load
        return self.top_k * self.num_experts / (self.num_experts + self.num_null_experts)
