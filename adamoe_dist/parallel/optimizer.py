"""The optimizer that DeepSpeed shards: its parameter groups and its implementation."""

import importlib
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from adamoe_dist.config import Config
from adamoe_dist.errors import UserError
from adamoe_dist.model import is_tied_copy


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return groups by weight decay (matrices have it, vectors not) and, with expert parallelism, by expert or not."""
    trained = [p for p in model.parameters() if p.requires_grad and not is_tied_copy(p)]
    groups = [
        {
            "name": "matrices",
            "params": [parameter for parameter in trained if parameter.ndim > 1],
            "weight_decay": weight_decay,
        },
        {
            "name": "vectors",
            "params": [parameter for parameter in trained if parameter.ndim <= 1],
            "weight_decay": 0.0,
        },
    ]
    split = split_params_into_different_moe_groups_for_optimizer([group for group in groups if group["params"]])
    return [group for group in split if group["params"]]


def apex_problem() -> str | None:
    """Say why NVIDIA apex cannot be used, or return None where it can.

    The package that the public index calls ``apex`` is an unrelated program; NVIDIA's has ``apex.optimizers``.
    """
    try:
        importlib.import_module("apex")
    except ImportError:
        return "NVIDIA apex is not installed"
    try:
        importlib.import_module("apex.optimizers").FusedAdam  # noqa: B018
    except (ImportError, AttributeError):
        return "the installed package named apex is not NVIDIA apex (it has no apex.optimizers.FusedAdam)"
    return None if torch.cuda.is_available() else "NVIDIA apex needs CUDA"


def choose_implementation(config: Config) -> tuple[str, str]:
    """Resolve ``optimizer.implementation`` to ``torch`` or ``apex`` and the reason.

    Raises:
        UserError: apex was asked for and cannot be used.
    """
    requested, problem = config.optimizer.implementation, apex_problem()
    if requested == "apex":
        if problem:
            raise UserError(f"optimizer.implementation=apex: {problem}; install it from NVIDIA's source or use torch")
        return "apex", "as configured"
    if requested == "torch" or config.optimizer.type == "sgd":
        return "torch", "as configured" if requested == "torch" else "auto: plain SGD"
    return ("torch", f"auto: {problem}") if problem else ("apex", "auto: NVIDIA apex is installed")


def build_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build the optimizer over parameter groups; the learning rate is set before each step."""
    settings = config.optimizer
    if settings.type == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate)
    betas = (settings.beta1, settings.beta2)
    if choose_implementation(config)[0] == "apex":
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
        optimizer: torch.optim.Optimizer = fused_adam(
            groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon, adam_w_mode=True
        )
        return optimizer
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=betas,
        eps=settings.epsilon,
        fused=torch.cuda.is_available(),
    )
