"""Tiny models, made once."""

import pytest

from adamoe_dist.inference import open_model
from tests.inference.tiny import save_model

FAMILIES = ["mixtral", "olmoe", "qwen3_moe", "adamoe", "llama"]


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """A directory of each family."""
    root = tmp_path_factory.mktemp("models")
    return {
        family: save_model(root / family, family, with_bos=family in ("mixtral", "llama", "adamoe"))
        for family in FAMILIES
    }


@pytest.fixture(scope="session")
def opened_models(directories):
    """Each family, opened."""
    return {family: open_model(path, dtype="fp32", device="cpu") for family, path in directories.items()}
