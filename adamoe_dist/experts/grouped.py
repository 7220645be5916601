"""The true experts of one rank: SwiGLU feed-forward networks held as stacked matrices."""

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adamoe_dist.experts.kernels import KERNELS


class GroupedExperts(MegatronModule):
    """L local true experts, sharded over the expert-parallel group along their first axis.

    ``weight1`` (L, 2F, H) holds gate and up projections, ``weight2`` (L, H, F) the down projection. An expert's initial
    weights depend on the seed, the layer and its global number only, not on the ranks.
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
        width, inner = config.hidden_size, config.moe_ffn_hidden_size
        self.weight1 = self._parameter(num_local_experts, 2 * inner, width)
        self.weight2 = self._parameter(num_local_experts, width, inner)

    def _parameter(self, *shape: int) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.empty(*shape, dtype=self.config.params_dtype))
        parameter.is_expert = True  # type: ignore[attr-defined]
        parameter.allreduce = self.ep_size == 1  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        return parameter

    @torch.no_grad()
    def initialize(self, seed: int, layer_number: int) -> None:
        """Draw every local expert's weights from a generator of its own."""
        for local in range(self.num_local_experts):
            expert = self.ep_rank * self.num_local_experts + local
            entropy = np.random.SeedSequence((seed, layer_number, expert)).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(entropy >> np.uint64(1)))
            deviation = self.config.init_method_std
            output_deviation = deviation / (2.0 * self.config.num_layers) ** 0.5
            for parameter, std in ((self.weight1, deviation), (self.weight2, output_deviation)):
                drawn = torch.empty(parameter.shape[1:], dtype=torch.float32).normal_(0.0, std, generator=generator)
                parameter[local].copy_(drawn)

    def forward(
        self, rows_PH: Tensor, tokens_per_expert: Tensor, weights_P: Tensor, **_: object
    ) -> tuple[Tensor, None]:
        """Compute weighted expert outputs.

        Args:
            rows_PH: (P, H) rows sorted by local expert.
            tokens_per_expert: (L,) rows of each.
            weights_P: (P,) combine weight of each row, applied before the down projection.

        Returns:
            ``((P, H), None)``: Megatron's pair of output and bias.
        """
        inputs = (rows_PH, self.weight1, self.weight2, tokens_per_expert, weights_P)
        if self.is_recomputed and torch.is_grad_enabled():
            return checkpoint(self.kernel, *inputs, use_reentrant=False, preserve_rng_state=False), None
        return self.kernel(*inputs), None

    def backward_dw(self) -> None:
        """Do nothing: weight gradients are part of the backward pass (Megatron's interface for delaying them)."""
