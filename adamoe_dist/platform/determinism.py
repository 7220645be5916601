"""The same bits from run to run: what torch, its CUDA libraries and NCCL must be told, and when."""

import os

import torch

from adamoe_dist.errors import UserError

CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""The sizes of ``CUBLAS_WORKSPACE_CONFIG`` with which cuBLAS promises the same bits from run to run."""
FIXED_ORDER_ALGORITHM = "Ring"
VARYING_ORDER_ALGORITHMS = ("nvls", "collnet", "pat")


def fix_order_of_sums() -> None:
    """Set what CUDA's libraries read when they start; call it before anything computes or communicates on CUDA.

    - cuBLAS gets workspaces of a fixed size. It reads them with its first product, and torch remembers what it found.
    - NCCL gets one algorithm, in which each sum has one order of terms on given machines. NVLS adds in the switch, in
      no fixed order; and where NCCL may choose, its choice can change with a version.

    Both are ignored without CUDA.

    Raises:
        UserError: the environment asks for something that has no fixed order.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if workspace not in CUBLAS_WORKSPACES:
        raise UserError(
            f"CUBLAS_WORKSPACE_CONFIG={workspace}: run.deterministic=true needs one of {', '.join(CUBLAS_WORKSPACES)}; "
            "unset it"
        )
    algorithm = os.environ.setdefault("NCCL_ALGO", FIXED_ORDER_ALGORITHM)
    if not algorithm.startswith("^") and any(name in algorithm.lower() for name in VARYING_ORDER_ALGORITHMS):
        raise UserError(
            f"NCCL_ALGO={algorithm}: run.deterministic=true needs an algorithm that adds in a fixed order; unset it or "
            "use Ring or Tree"
        )


def choose_kernels(deterministic: bool) -> None:
    """Let torch choose freely, or only kernels that give the same bits every time, and raise where there is none.

    Raises:
        RuntimeError: :func:`fix_order_of_sums` has not been called.
    """
    if deterministic and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS_WORKSPACES:
        raise RuntimeError("deterministic kernels were asked for after CUDA's libraries could be told")
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        torch.backends.cudnn.benchmark = False
