"""The states of every random generator as vectors of uint8, exactly and without pickle."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORDS = 624
"""Of a Mersenne Twister, which Python and NumPy both have."""
_TWISTER = np.dtype([("words", "<u4", WORDS), ("position", "<u4"), ("has_normal", "u1"), ("normal", "<f8")])
MEGATRON = "megatron."


def seeded_generator(*key: int, wide: bool = True) -> torch.Generator:
    """Return a generator of torch's, on the CPU, whose draws depend on whole numbers >= 0 alone.

    Args:
        *key: such as a seed and the number of a layer; every key has draws of its own.
        wide: seed it with 63 bits made of the key, else with 32.
    """
    if wide:
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    else:
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.Generator().manual_seed(seed)


def random_states() -> dict[str, Tensor]:
    """Return the states of this process's generators: ``python``, ``numpy``, torch's ``cpu`` and ``cuda``.

    On CUDA also those of Megatron-core's tracker, where the model has made any, as ``megatron.NAME``. Each is a vector
    of uint8 in CPU memory, of a length that is the same on every rank.
    """
    states = {"cpu": torch.get_rng_state(), "python": _python_state(), "numpy": _numpy_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
        states |= {f"{MEGATRON}{name}": state.cpu() for name, state in _megatron_tracker().get_states().items()}
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Set the generators that :func:`random_states` gave the states of; others are left as they are."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "python" in states:
        _set_python_state(states["python"])
    if "numpy" in states:
        _set_numpy_state(states["numpy"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {key.removeprefix(MEGATRON): state for key, state in states.items() if key.startswith(MEGATRON)}
    if tracked:
        tracker = _megatron_tracker()
        tracker.set_states({**tracker.get_states(), **tracked})


def _megatron_tracker() -> Any:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def _python_state() -> Tensor:
    version, internal, normal = random.getstate()
    assert version == 3 and len(internal) == WORDS + 1, f"the state of Python's random has another form: {version}"
    return _encoded(internal[:WORDS], internal[WORDS], normal is not None, normal or 0.0)


def _set_python_state(state: Tensor) -> None:
    words, position, has_normal, normal = _decoded(state)
    random.setstate((3, (*words.tolist(), position), normal if has_normal else None))


def _numpy_state() -> Tensor:
    state: Any = np.random.get_state(legacy=False)
    assert state["bit_generator"] == "MT19937", f"NumPy's generator is {state['bit_generator']}"
    inner = state["state"]
    return _encoded(inner["key"], inner["pos"], bool(state["has_gauss"]), state["gauss"])


def _set_numpy_state(state: Tensor) -> None:
    words, position, has_normal, normal = _decoded(state)
    np.random.set_state(("MT19937", words, position, int(has_normal), normal))


def _encoded(words: Any, position: int, has_normal: bool, normal: float) -> Tensor:
    record = np.zeros(1, dtype=_TWISTER)
    record["words"], record["position"] = words, position
    record["has_normal"], record["normal"] = has_normal, normal
    return torch.from_numpy(record.view(np.uint8).copy())


def _decoded(state: Tensor) -> tuple[Any, int, bool, float]:
    record = state.contiguous().numpy().view(_TWISTER)[0]
    return record["words"].copy(), int(record["position"]), bool(record["has_normal"]), float(record["normal"])
