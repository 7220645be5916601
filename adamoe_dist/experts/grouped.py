"""The true experts of one rank: SwiGLU feed-forward networks held as stacked matrices."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adamoe_dist import platform
from adamoe_dist.experts.adapted import AdaptedExperts
from adamoe_dist.experts.kernels import KERNELS


def slice_gate_up(full_2FH: Tensor, rank: int, ranks: int) -> Tensor:
    """Return what expert-tensor rank ``rank`` holds of one expert's (2F, H): its slice of gate, then that of up."""
    return full_2FH.unflatten(0, (2, -1)).chunk(ranks, dim=1)[rank].flatten(0, 1)


def slice_down(full_HF: Tensor, rank: int, ranks: int) -> Tensor:
    """Return what expert-tensor rank ``rank`` holds of one expert's (H, F): the columns of its slice of gate and up."""
    return full_HF.chunk(ranks, dim=1)[rank]


class GroupedExperts(MegatronModule):
    """L local true experts, sharded over the expert-parallel group along their first axis.

    ``weight1`` (L, 2F, H) holds gate and up projections, ``weight2`` (L, H, F) the down projection. An expert's initial
    weights depend on the seed, the layer and its global number only, not on the ranks.

    Over an expert-tensor group of X ranks each expert is cut along F, so that this rank has F / X of it and computes a
    part of the sum that is each row's output: :func:`slice_gate_up` and :func:`slice_down` say which. A parameter's
    ``expert_tensor_axis`` is the axis that is cut; along that of ``weight1`` lie two pieces, one of gate and one of up.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        """Allocate the experts; :meth:`initialize` fills them once the layer's number is known.

        Args:
            num_local_experts: L.
            config: Megatron's configuration (widths, dtype) with ``experts_kernel``, a name in ``KERNELS``.
            pg_collection: Megatron's process groups.
        """
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.kernel = KERNELS[config.experts_kernel]
        self.is_recomputed = config.recompute_granularity == "selective"
        self.ep_size, self.ep_rank = pg_collection.ep.size(), pg_collection.ep.rank()
        self.tensor_size, self.tensor_rank = pg_collection.expt_tp.size(), pg_collection.expt_tp.rank()
        self.inner_width, rest = divmod(config.moe_ffn_hidden_size, self.tensor_size)
        assert rest == 0, f"inner width {config.moe_ffn_hidden_size} is not cut by {self.tensor_size} ranks"
        width = config.hidden_size
        self.lora: AdaptedExperts | None = None
        self.weight1 = self._parameter(1, num_local_experts, 2 * self.inner_width, width)
        self.weight2 = self._parameter(2, num_local_experts, width, self.inner_width)

    def _parameter(self, tensor_axis: int, *shape: int) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.empty(*shape, dtype=self.config.params_dtype))
        parameter.is_expert = True  # type: ignore[attr-defined]
        parameter.allreduce = self.ep_size == 1  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.expert_tensor_axis = tensor_axis  # type: ignore[attr-defined]
        return parameter

    @torch.no_grad()
    def initialize(self, seed: int, layer_number: int) -> None:
        """Draw every local expert's weights from a generator of its own, and keep this rank's slice of them."""
        deviation = self.config.init_method_std
        output_deviation = deviation / (2.0 * self.config.num_layers) ** 0.5
        width, inner = self.config.hidden_size, self.config.moe_ffn_hidden_size
        for local in range(self.num_local_experts):
            expert = self.ep_rank * self.num_local_experts + local
            generator = platform.seeded_generator(seed, layer_number, expert)
            gate_up = torch.empty(2 * inner, width, dtype=torch.float32).normal_(0.0, deviation, generator=generator)
            down = torch.empty(width, inner, dtype=torch.float32).normal_(0.0, output_deviation, generator=generator)
            self.weight1[local].copy_(slice_gate_up(gate_up, self.tensor_rank, self.tensor_size))
            self.weight2[local].copy_(slice_down(down, self.tensor_rank, self.tensor_size))

    def forward(
        self, rows_PH: Tensor, tokens_per_expert: Tensor, weights_P: Tensor, **_: object
    ) -> tuple[Tensor, None]:
        """Compute weighted expert outputs.

        Args:
            rows_PH: (P, H) rows sorted by local expert.
            tokens_per_expert: (L,) rows of each.
            weights_P: (P,) combine weight of each row, applied before the down projection.

        Returns:
            ``((P, H), None)``: Megatron's pair of output (of this rank's slice of F) and bias.
        """
        inputs = (rows_PH, self.weight1, self.weight2, tokens_per_expert, weights_P)
        if self.lora is not None:
            return self.lora(*inputs), None
        if self.is_recomputed and torch.is_grad_enabled():
            return checkpoint(self.kernel, *inputs, use_reentrant=False, preserve_rng_state=False), None
        return self.kernel(*inputs), None

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are part of the backward pass (Megatron's interface for delaying them)."""
