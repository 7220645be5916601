"""The optimizer that DeepSpeed shards: its parameter groups and its implementation."""

import functools
import importlib
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from adamoe_dist import platform
from adamoe_dist.config import Config
from adamoe_dist.errors import UserError
from adamoe_dist.model import is_tied_copy


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return groups by weight decay (matrices have it, vectors not) and, with expert parallelism, by expert or not.

    A parameter with ``is_tied_copy`` is left out: it is a copy of one that is trained elsewhere.
    """
    trained = [parameter for parameter in model.parameters() if is_trained(parameter)]
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


def is_trained(parameter: torch.Tensor) -> bool:
    """Tell whether the optimizer is to update a parameter on this rank."""
    return parameter.requires_grad and not is_tied_copy(parameter)


@functools.cache
def cpu_adam_problem() -> str | None:
    """Say why DeepSpeed's CPU Adam cannot be used, or return None where it can; the first call may compile it."""
    builder = get_accelerator().create_op_builder("CPUAdamBuilder")
    try:
        with platform.building_alone():
            builder.load(verbose=False)
    except Exception as problem:  # whatever a compiler, ninja or the loader may raise
        lines = str(problem).strip().splitlines()
        return f"DeepSpeed's CPU Adam cannot be built here: {lines[0] if lines else type(problem).__name__}"
    return None


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
    """Resolve ``optimizer.implementation`` to ``torch``, ``apex`` or ``deepspeed_cpu`` and the reason.

    Raises:
        UserError: apex or DeepSpeed's CPU Adam was asked for and cannot be used.
    """
    requested = config.optimizer.implementation
    if requested == "torch":
        return "torch", "as configured"
    if config.optimizer.type == "sgd":
        return "torch", "auto: plain SGD"
    if config.zero.offload_optimizer:
        problem, fastest, way_out = cpu_adam_problem(), "deepspeed_cpu", "install g++ and ninja or use torch"
        reason = "auto: the optimizer is offloaded"
    else:
        problem, fastest, way_out = apex_problem(), "apex", "install it from NVIDIA's source or use torch"
        if config.zero.stage == 3:
            problem, way_out = "zero.stage=3 updates in parts, each of which FusedAdam counts as a step", "use torch"
        reason = "auto: NVIDIA apex is installed"
    if problem is None:
        return fastest, "as configured" if requested == fastest else reason
    if requested == fastest:
        raise UserError(f"optimizer.implementation={requested}: {problem}; {way_out}")
    return "torch", f"auto: {problem}"


def build_optimizer(config: Config, groups: list[dict[str, Any]], implementation: str) -> torch.optim.Optimizer:
    """Build the optimizer over parameter groups; the learning rate is set before each step."""
    settings = config.optimizer
    if settings.type == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate)
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }
    optimizer: torch.optim.Optimizer
    if implementation == "apex":
        optimizer = importlib.import_module("apex.optimizers").FusedAdam(groups, **common, adam_w_mode=True)
    elif implementation == "deepspeed_cpu":
        optimizer = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam(groups, **common, adamw_mode=True)
    else:
        optimizer = torch.optim.AdamW(groups, **common, fused=True)
    return optimizer
