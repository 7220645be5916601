"""Section ``run``: the run's name, place and seed."""

from dataclasses import dataclass

from adamoe_dist.config.fields import key


@dataclass(kw_only=True)
class RunConfig:
    """What identifies a run."""

    name: str = key("adamoe", "Name of the run: its directory and its TensorBoard label.")
    dir: str | None = key(None, "Run directory; null means runs/<run.name>.")
    seed: int = key(1234, "Seed of the initial weights and of the data order.", at_least=0)
    deterministic: bool = key(
        False,
        "Give the same bits every time on the same machines: kernels and collectives with one order of terms (CUDA: "
        "slower; the CPU always does).",
    )
