"""Process groups: torch.distributed, Megatron's groups, and DeepSpeed's view of them."""

import os
import socket
from datetime import timedelta

import deepspeed.comm as deepspeed_comm
import deepspeed.utils.groups as deepspeed_groups
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from adamoe_dist import platform
from adamoe_dist.config import Layout, Resolved
from adamoe_dist.errors import UserError
from adamoe_dist.launcher import Launch
from adamoe_dist.model import forget_logged_losses

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def check_port(launch: Launch) -> None:
    """Refuse a rendezvous port that something else listens on, before any process waits for it.

    Raises:
        UserError: naming the port and how to choose another.
    """
    port = os.environ.get("MASTER_PORT")
    if launch.rank != 0 or port is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as problem:
            raise UserError(
                f"MASTER_PORT={port} cannot be opened ({problem.strerror}); free it or give another with "
                "deepspeed --master_port N (torchrun --master-port N)"
            ) from None


def initialize_groups(launch: Launch, resolved: Resolved) -> tuple[int, ...]:
    """Start torch.distributed and build Megatron's groups; DeepSpeed is told of the ones it needs.

    Args:
        launch: this process's place.
        resolved: the degrees.

    Returns:
        The node of each rank of this process's expert-parallel group, expert-tensor ranks next to each other.
    """
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ.update(RANK=str(launch.rank), LOCAL_RANK=str(launch.local_rank), WORLD_SIZE=str(launch.world_size))
    device = platform.select_device(launch.local_rank)
    dist.init_process_group(
        platform.communication_backend(),
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if platform.is_cuda() else None,
    )
    with platform.without_compiled_collectives():
        deepspeed_comm.init_distributed(platform.communication_backend(), verbose=False)
    layout = resolved.layout
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    assert parallel_state.get_data_parallel_world_size() == layout.data, layout
    assert dist.get_world_size(parallel_state.get_expert_data_parallel_group()) == layout.expert_data, layout
    register_expert_groups(layout)
    return _expert_nodes(launch.node, device)


def _expert_nodes(node: int, device: torch.device) -> tuple[int, ...]:
    """Gather the nodes of all ranks that share a layer's experts, expert-tensor ranks innermost. Collective."""
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    nodes_G = torch.empty(group.size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(nodes_G, torch.tensor([node], device=device), group=group)
    return tuple(nodes_G.tolist())


def nodes_of_ranks(launch: Launch, device: torch.device) -> tuple[int, ...]:
    """Return the node of every rank. Collective over all ranks."""
    nodes_R = torch.empty(launch.world_size, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(nodes_R, torch.tensor([launch.node], device=device))
    return tuple(nodes_R.tolist())


def place_of_rank(launch: Launch, device: torch.device) -> str:
    """Return in words where this rank runs, and which one it is in each of its groups."""
    state = parallel_state
    groups = {
        "tensor": state.get_tensor_model_parallel_group(),
        "pipeline": state.get_pipeline_model_parallel_group(),
        "context": state.get_context_parallel_group(),
        "data": state.get_data_parallel_group(),
        "expert": state.get_expert_model_parallel_group(),
        "expert-tensor": state.get_expert_tensor_parallel_group(),
    }
    named = [f"{name} {group.rank()} of {group.size()}" for name, group in groups.items() if group.size() > 1]
    return ", ".join(
        [f"rank {launch.rank} of {launch.world_size}: {socket.gethostname()}, process {os.getpid()}, {device}", *named]
    )


def register_expert_groups(layout: Layout) -> None:
    """Give DeepSpeed Megatron's expert groups: it has no way to ask for them, only these tables.

    It uses the first only for the gradient norm, which it sums over the ranks that hold different experts. Ranks that
    share an expert hold different parts of it, so they belong to that group; DeepSpeed's own way of summing over them
    takes them for the tensor-parallel ranks.
    """
    name = expert_group_name(layout.expert)
    expert = parallel_state.get_expert_tensor_and_model_parallel_group()
    expert_data = parallel_state.get_expert_data_parallel_group()
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = expert
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = expert_data
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(expert)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(expert_data)
    deepspeed_groups.expert_tensor_parallel_world_size = 1


def replicas_group() -> dist.ProcessGroup:
    """Return the ranks that hold the same dense weights, this one among them: data- and context-parallel ones."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def data_parallel_rank() -> int:
    """Return this rank's place among the ranks that train on samples of their own."""
    return int(parallel_state.get_data_parallel_rank())


def stage_group() -> dist.ProcessGroup:
    """Return the ranks of this rank's pipeline stage: those that hold the same layers, or parts of them."""
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


def expert_group_name(expert_parallel: int) -> str:
    """Return DeepSpeed's name of an expert group; it parses the number out of it."""
    return f"ep_size_{expert_parallel}"


def destroy_groups() -> None:
    """Leave all groups; a process that skips this can crash at exit."""
    for table in (
        deepspeed_groups._EXPERT_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        table.clear()
    forget_logged_losses()
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MegatronTopology:
    """Megatron's groups under the names that DeepSpeed asks an ``mpu`` for.

    DeepSpeed's data-parallel ranks are all that hold the same dense weights: Megatron's data- and context-parallel
    ones. It averages gradients over them; a context-parallel rank's loss is the mean over its part of the sequences.
    """

    def get_data_parallel_world_size(self) -> int:
        """Number of ranks that hold the same dense weights."""
        return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))

    def get_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Their group."""
        return replicas_group()

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks that share one copy of the dense weights."""
        return int(torch.distributed.get_world_size(self.get_model_parallel_group()))

    def get_model_parallel_rank(self) -> int:
        """This rank's place among them."""
        return int(torch.distributed.get_rank(self.get_model_parallel_group()))

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Their group."""
        return parallel_state.get_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Number of ranks that share each dense matrix."""
        return int(parallel_state.get_tensor_model_parallel_world_size())

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's place among them."""
        return int(parallel_state.get_tensor_model_parallel_rank())

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Their group."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of pipeline stages."""
        return int(parallel_state.get_pipeline_model_parallel_world_size())

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """The group of the stages."""
        return parallel_state.get_pipeline_model_parallel_group()
