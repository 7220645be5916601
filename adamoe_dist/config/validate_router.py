"""Checks of the router's options against each other and the rest of the tree."""

from adamoe_dist.config.moe import RouterConfig
from adamoe_dist.config.tree import Config


def check_router(config: Config, problems: list[str]) -> None:
    """Add what is wrong with null types, capacity, gating residual and the balance loss to ``problems``."""
    if config.moe.router.type == "topk":
        _check_baseline(config, problems)
    _check_null_types(config, problems)
    _check_router_options(config, problems)
    _check_grouped_balance(config, problems)


def _check_baseline(config: Config, problems: list[str]) -> None:
    """Megatron's own router has none of these, or means something else by them."""
    moe, router = config.moe, config.moe.router
    if moe.num_null_experts:
        problems.append(
            f"moe.num_null_experts={moe.num_null_experts} needs moe.router.type=adamoe; Megatron's own router "
            "(moe.router.type=topk) knows none: set it to 0"
        )
    if router.balance.type in ("null_averaged", "grouped"):
        problems.append(
            f"moe.router.balance.type={router.balance.type} is AdaMoE's loss; with moe.router.type=topk use switch or "
            "none"
        )
    if router.normalize in ("all_selected", "all_true"):
        same = {"all_selected": "true_experts", "all_true": "none"}[router.normalize]
        problems.append(
            f"moe.router.normalize={router.normalize} differs from {same} only with null experts; with "
            "moe.router.type=topk use true_experts or none"
        )
    ours = {
        "score_function": router.score_function != "softmax",
        "capacity_factor": router.capacity_factor is not None,
        "gating_residual": router.gating_residual,
        "balance.scope": router.balance.scope != "micro_batch",
    }
    values = {**vars(router), "balance.scope": router.balance.scope}
    for name in (name for name, is_set in ours.items() if is_set):
        problems.append(
            f"moe.router.{name}={values[name]} needs moe.router.type=adamoe, which with moe.num_null_experts=0 "
            "routes as topk does; remove it or change the type"
        )


def _check_null_types(config: Config, problems: list[str]) -> None:
    moe, types = config.moe, config.moe.null_types
    asked = types.identity + types.constant
    if asked and moe.router.type == "topk":
        problems.append(
            f"moe.null_types.identity={types.identity}, moe.null_types.constant={types.constant} need "
            "moe.router.type=adamoe; with topk set both to 0"
        )
    if asked > moe.num_null_experts:
        problems.append(
            f"moe.null_types.identity={types.identity} + moe.null_types.constant={types.constant} are more than "
            f"moe.num_null_experts={moe.num_null_experts}, of which they are a part; raise it or lower them"
        )
    if asked and types.identity != moe.num_null_experts and moe.router.null_init == "shared":
        problems.append(
            f"moe.router.null_init=shared gives all null experts one score, so that of moe.null_types.identity="
            f"{types.identity} and moe.null_types.constant={types.constant} only the first columns would ever be "
            "selected; use random or copy"
        )


def _check_router_options(config: Config, problems: list[str]) -> None:
    router, types = config.moe.router, config.moe.null_types
    if router.normalize == "all_true" and types.identity + types.constant:
        problems.append(
            f"moe.router.normalize=all_true gives null experts no share of the weights, but "
            f"moe.null_types.identity={types.identity} and moe.null_types.constant={types.constant} have an output to "
            "be weighted; set both to 0 or use normalize=none"
        )
    if router.normalize == "all_true" and router.score_function == "sigmoid":
        problems.append(
            "moe.router.normalize=all_true divides by the sum over the true experts, and with "
            "moe.router.score_function=sigmoid no expert takes a share of another's; use normalize=none"
        )
    if router.drop_policy != "probs" and router.capacity_factor is None:
        problems.append(
            f"moe.router.drop_policy={router.drop_policy} does nothing without moe.router.capacity_factor; set both or "
            "neither"
        )
    if router.balance.type == "none" and router.balance.scope != "micro_batch":
        problems.append(
            f"moe.router.balance.scope={router.balance.scope} does nothing with moe.router.balance.type=none; remove "
            "it or choose a balance loss"
        )
    if router.gating_residual and config.parallel.pipeline > 1:
        problems.append(
            f"moe.router.gating_residual=True hands scores from layer to layer, which parallel.pipeline="
            f"{config.parallel.pipeline} would have to send from stage to stage; set parallel.pipeline=1 or "
            "moe.router.gating_residual=false"
        )
    if router.gating_residual and config.train.recompute == "full":
        problems.append(
            "moe.router.gating_residual=True hands scores from layer to layer, which train.recompute=full would run "
            "out of turn; use train.recompute=selective or none, or set moe.router.gating_residual=false"
        )


def _check_grouped_balance(config: Config, problems: list[str]) -> None:
    moe, balance = config.moe, config.moe.router.balance
    share = balance.target_null_share
    if balance.type == "grouped" and moe.num_null_experts == 0:
        problems.append(
            "moe.router.balance.type=grouped balances true against null experts and moe.num_null_experts=0 has none; "
            "add some or use switch"
        )
    if share is None:
        return
    if balance.type != "grouped":
        problems.append(
            f"moe.router.balance.target_null_share={share} does nothing with moe.router.balance.type={balance.type}; "
            "remove it or use grouped"
        )
    elif share * moe.top_k > moe.num_null_experts or (1 - share) * moe.top_k > moe.num_experts:
        problems.append(
            f"moe.router.balance.target_null_share={share} of moe.top_k={moe.top_k} slots cannot be reached with "
            f"moe.num_experts={moe.num_experts} and moe.num_null_experts={moe.num_null_experts}: a token takes each "
            "expert once; change the share or the numbers"
        )


def check_target_load(config: Config, problems: list[str]) -> None:
    """A target at an end of the range would need a bias without bound: the range is open."""
    moe, target = config.moe, config.moe.router.target_load
    if target is None:
        if moe.router.bias_decay_steps is not None:
            problems.append(
                f"moe.router.bias_decay_steps={moe.router.bias_decay_steps} does nothing without "
                "moe.router.target_load; set both or neither"
            )
        if moe.router.bias_rate != RouterConfig.bias_rate:
            problems.append(
                f"moe.router.bias_rate={moe.router.bias_rate:g} does nothing without moe.router.target_load; set both "
                "or neither"
            )
        return
    name = f"moe.router.target_load={target:g}"
    if moe.router.type == "topk":
        problems.append(f"{name} needs moe.router.type=adamoe; Megatron's own router (topk) gives every token top_k")
    elif moe.num_null_experts == 0:
        problems.append(
            f"{name} needs null experts, and moe.num_null_experts=0 gives every token moe.top_k={moe.top_k} true ones; "
            "raise moe.num_null_experts or set moe.router.target_load=null"
        )
    else:
        _check_target_range(config, target, problems)


def _check_target_range(config: Config, target: float, problems: list[str]) -> None:
    moe = config.moe
    lowest, highest = max(moe.top_k - moe.num_null_experts, 0), min(moe.top_k, moe.num_experts)
    if lowest < target < highest:
        return
    if target <= lowest:
        way_out = "lower moe.top_k or raise moe.num_null_experts"
    else:
        way_out = "raise moe.top_k" if moe.top_k <= moe.num_experts else "raise moe.num_experts"
    problems.append(
        f"moe.router.target_load={target:g} is not between {lowest} and {highest} (both excluded), the loads that "
        f"moe.top_k={moe.top_k}, moe.num_experts={moe.num_experts} and moe.num_null_experts={moe.num_null_experts} "
        f"can give; change it, or {way_out}"
    )
