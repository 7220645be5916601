"""What keeps a test off the GPUs of this machine."""

import torch


def missing(gpus: int) -> str | None:
    """Say why ``gpus`` GPUs cannot be used here, or return None where they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    available = torch.cuda.device_count()
    return None if available >= gpus else f"needs {gpus} GPUs and there are {available}"


if __name__ == "__main__":
    print(missing(1) or "", end="")
