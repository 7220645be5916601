"""CPU or CUDA: the one place that asks, and what follows from the answer."""

import os
import random
import warnings

import numpy as np
import torch

from adamoe_dist.errors import UserError
from adamoe_dist.platform.determinism import choose_kernels
from adamoe_dist.platform.host import keep_memory, peak_resident_bytes
from adamoe_dist.platform.megatron_cpu import install_stand_ins

UNCONCERNED = (
    ".*Apex (is|are) not installed.*",
    "full scope is deprecated",
    ".*torch.distributed.*is deprecated",
    "`load_state_dict` is deprecated",
    "The argument order of load",
    "torch.distributed is disabled",
)
"""Warnings by which Megatron-core and DeepSpeed speak of their own affairs."""

_UNCONCERNED_ON_CPU = ("When using .* set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",)


def is_cuda() -> bool:
    """Tell whether training runs on CUDA devices."""
    return torch.cuda.is_available()


def prepare() -> None:
    """Make this process ready for DeepSpeed and Megatron-core; call it before either is imported.

    With CUDA it only keeps quiet the libraries' notes on optional packages, which the start-up report covers. Without,
    it also names the CPU to DeepSpeed, keeps Megatron's decorated helpers from being compiled, installs the stand-ins
    of :mod:`adamoe_dist.platform.megatron_cpu`, and keeps freed memory (:func:`adamoe_dist.platform.host.keep_memory`).
    """
    for unconcerned in UNCONCERNED if is_cuda() else UNCONCERNED + _UNCONCERNED_ON_CPU:
        warnings.filterwarnings("ignore", message=unconcerned)
    if is_cuda():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    install_stand_ins()
    keep_memory()


def device(local_rank: int = 0) -> torch.device:
    """Return this process's device."""
    return torch.device("cuda", local_rank) if is_cuda() else torch.device("cpu")


def select_device(local_rank: int) -> torch.device:
    """Bind this process to its device and return it."""
    if is_cuda():
        torch.cuda.set_device(local_rank)
    return device(local_rank)


def communication_backend() -> str:
    """Return the torch.distributed backend: NCCL on CUDA, gloo on CPU."""
    return "nccl" if is_cuda() else "gloo"


def compute_precision(requested: str) -> str:
    """Return ``train.precision`` with ``auto`` resolved: bf16 on CUDA, fp32 on CPU.

    Raises:
        UserError: fp16 without CUDA.
    """
    if requested == "fp16" and not is_cuda():
        raise UserError("train.precision=fp16 needs CUDA and there is none; use fp32 or bf16")
    if requested != "auto":
        return requested
    return "bf16" if is_cuda() else "fp32"


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed the generators of Python, NumPy and torch, and forbid kernels of varying bits if asked.

    With ``deterministic``, :func:`adamoe_dist.platform.determinism.fix_order_of_sums` must have come before.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    choose_kernels(deterministic)


def synchronize() -> None:
    """Wait for the device's queued work."""
    if is_cuda():
        torch.cuda.synchronize()


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB: allocated on the GPU, or resident on the CPU."""
    if is_cuda():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_bytes() / 2**30


def gpu_name() -> str | None:
    """Return the driver's name of this process's GPU, or None on a CPU."""
    return str(torch.cuda.get_device_name()) if is_cuda() else None


def device_name() -> str:
    """Return the device in words, for the start-up report."""
    if is_cuda():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} a rank"


def limit_threads() -> None:
    """Share this host's cores among its ranks, unless ``OMP_NUM_THREADS`` says otherwise."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if not is_cuda() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
