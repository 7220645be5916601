"""What the model computes a second, and what part of the devices' peak that is."""

from dataclasses import dataclass

from adamoe_dist import platform
from adamoe_dist.config import Config
from adamoe_dist.planning import Parameters, count_parameters, find_device, flops_per_token


@dataclass(frozen=True)
class ModelSpeed:
    """From tokens a second to model FLOP/s and MFU.

    Attributes:
        config: the tree.
        parameters: of the model.
        world_size: ranks.
        peak_flops: of one rank's device in the precision of the run, if it is known.
        peak_origin: where that is from, or why there is none, in words.
    """

    config: Config
    parameters: Parameters
    world_size: int
    peak_flops: float | None
    peak_origin: str

    @classmethod
    def of(cls, config: Config, padded_vocab_size: int, world_size: int) -> "ModelSpeed":
        """Look up the peak: ``monitor.peak_tflops``, or that of the planner's table for a GPU that is in it."""
        parameters = count_parameters(config, padded_vocab_size)
        given, precision = config.monitor.peak_tflops, platform.compute_precision(config.train.precision)
        if given is not None:
            return cls(config, parameters, world_size, 1e12 * given, "monitor.peak_tflops")
        name = platform.gpu_name()
        device = find_device(name) if name is not None else None
        if device is None:
            return cls(config, parameters, world_size, None, f"no peak is known of {name or 'a CPU'}")
        return cls(config, parameters, world_size, device.peak_flops(precision), f"{device.name} in {precision}")

    def fields(self, tokens_per_second: float, computed_load: float) -> dict[str, float]:
        """Return ``model_flops_per_second``, of all ranks, and where a peak is known ``mfu``.

        What counts is in docs/profiling.md: forward and backward, 3 x the forward, of the true experts that were
        computed and of all else that a token needs; not what is computed again or for padding.

        Args:
            tokens_per_second: of all ranks, without padding.
            computed_load: true experts a token, without those dropped at an expert's capacity.
        """
        rate = tokens_per_second * flops_per_token(self.config, self.parameters, computed_load)
        fields = {"model_flops_per_second": rate}
        if self.peak_flops is not None:
            fields["mfu"] = rate / (self.peak_flops * self.world_size)
        return fields

    def describe(self) -> str:
        """Return one line for the start-up report."""
        if self.peak_flops is None:
            return f"MFU: not reported, {self.peak_origin}; set monitor.peak_tflops"
        return f"MFU: against {self.peak_flops / 1e12:g} TFLOP/s a rank ({self.peak_origin})"
