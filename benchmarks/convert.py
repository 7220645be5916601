"""Import and export of a Hugging Face model against a plain copy of as many bytes, and the memory that they take.

A synthetic Mixtral checkpoint in shards is made tensor by tensor, imported and exported again, each in a process of its
own::

    python benchmarks/convert.py --directory /fast/disk --gigabytes 4

*Plain* is a copy of what was written, file by file with ``fsync``. An import reads bf16 and writes fp32, twice the
bytes, with a SHA-256 of all it writes. *Peak memory* is the largest resident memory of the process, the libraries in
it; the *bound* is three times the largest layer of the Hugging Face model and 1 GiB.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import common  # noqa: F401  before torch: it sets what torch reads when it is loaded
import torch
from common import BenchmarkParser, markdown, report
from processes import resident

from adamoe_dist import platform
from adamoe_dist.console import run_tool

platform.prepare()

from adamoe_dist.convert import FAMILIES, Weight, export_model, import_model, plan_export, plan_import  # noqa: E402
from adamoe_dist.convert.safetensors_files import TensorFileWriter  # noqa: E402

VOCABULARY, EXPERTS = 32000, 8
CHUNK_BYTES = 1 << 24


def config_of(hidden: int, layers: int) -> dict[str, Any]:
    """Return the ``config.json`` of a Mixtral model."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": 7 * hidden // 2,
        "max_position_embeddings": 4096,
        "num_attention_heads": hidden // 64,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": max(1, hidden // 256),
        "num_local_experts": EXPERTS,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    }


def weights_of(values: dict[str, Any]) -> list[Weight]:
    """Return the tensors of the model."""
    family = FAMILIES["mixtral"]
    return [weight for weight in family.weights(family.read(values).config(), VOCABULARY) if not weight.is_copy]


def layers_for(size: float, hidden: int) -> int:
    """Return how many layers make a model of at least ``size`` bytes in bf16."""
    one, two = (sum(2 * weight.elements for weight in weights_of(config_of(hidden, layers))) for layers in (1, 2))
    return max(1, math.ceil((size - one) / (two - one)) + 1)


def make_model(directory: Path, hidden: int, layers: int, shard_bytes: float) -> dict[str, int]:
    """Write the model's files; return their bytes and those of a layer."""
    values = config_of(hidden, layers)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(values))
    weights = weights_of(values)
    shards: list[list[Weight]] = [[]]
    for weight in weights:
        if shards[-1] and sum(2 * item.elements for item in [*shards[-1], weight]) > shard_bytes:
            shards.append([])
        shards[-1].append(weight)
    noise = torch.randn(max(weight.elements for weight in weights) + 997).to(torch.bfloat16)
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        writer = TensorFileWriter(directory / name, {item.name: (torch.bfloat16, item.shape) for item in shard})
        for count, weight in enumerate(shard):
            start = (131 * number + 17 * count) % 997
            writer.add(weight.name, noise[start : start + prod(weight.shape)].view(weight.shape))
            places[weight.name] = name
        writer.finish()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    layer = sum(2 * weight.elements for weight in weights if weight.name.startswith("model.layers.0."))
    return {"bytes": sum(2 * weight.elements for weight in weights), "layer": layer, "tensors": len(weights)}


def copy_plainly(source: Path, target: Path) -> None:
    """Copy the files of a directory, each to the disk."""
    target.mkdir()
    for file in (path for path in sorted(source.rglob("*")) if path.is_file()):
        with file.open("rb") as old, (target / file.name).open("wb") as new:
            while chunk := old.read(CHUNK_BYTES):
                new.write(chunk)
            new.flush()
            os.fsync(new.fileno())


def run_part(part: str, source: Path, target: Path) -> dict[str, float]:
    """Do one part in this process; return its seconds and peak memory."""
    started = time.perf_counter()
    if part == "import":
        import_model(plan_import(source), target)
    elif part == "export":
        export_model(plan_export(str(source)), target)
    else:
        copy_plainly(source, target)
    return {"seconds": time.perf_counter() - started, "peak": resident("VmHWM")}


def in_own_process(part: str, source: Path, target: Path) -> dict[str, float]:
    """Do one part in a fresh process."""
    command = [sys.executable, __file__, "--part", part, str(source), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def written(directory: Path) -> int:
    """Return the bytes of a directory's files."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def same_files(first: Path, second: Path) -> bool:
    """Tell whether two directories have the same tensors to the byte, in the same files."""
    names = sorted(file.name for file in first.glob("*.safetensors"))
    for name in names:
        with (first / name).open("rb") as one, (second / name).open("rb") as other:
            while chunk := one.read(CHUNK_BYTES):
                if chunk != other.read(CHUNK_BYTES):
                    return False
    return bool(names)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[list[str]], dict[str, Any]]:
    """Make the model and take each part; return the table's rows and the numbers."""
    model, checkpoint, back, copy = (folder / name for name in ("model", "checkpoint", "back", "copy"))
    size = 1e9 * options.gigabytes
    layers = layers_for(size, options.hidden)
    made = make_model(model, options.hidden, layers, size / options.shards)
    bound = 3 * made["layer"] + 2**30
    rows: list[list[str]] = []
    parts: dict[str, Any] = {}
    for part, source, target in (("import", model, checkpoint), ("export", checkpoint, back)):
        ours = in_own_process(part, source, target)
        plain = in_own_process("copy", target, copy)
        shutil.rmtree(copy)
        amount = written(target)
        speed, plain_speed = (amount / 1e6 / one["seconds"] for one in (ours, plain))
        rows.append(
            [
                part,
                f"{amount / 1e9:.2f}",
                f"{ours['seconds']:.1f}",
                f"{speed:.0f}",
                f"{plain_speed:.0f}",
                f"{speed / plain_speed:.2f}",
                f"{ours['peak'] / 2**30:.2f}",
                f"{bound / 2**30:.2f}",
            ]
        )
        parts[part] = {"written": amount, "ours": ours, "plain": plain}
    same = same_files(model, back)
    return rows, {"made": made, "layers": layers, "bound": bound, "parts": parts, "same": same}


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = BenchmarkParser("Import and export of a synthetic Mixtral model against plain copies.")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="least size of the model in bf16")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="the disk to write to")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        part, source, target = options.part
        print(json.dumps(run_part(part, Path(source), Path(target))), flush=True)
        return 0
    folder = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        rows, numbers = measure(options, folder)
    finally:
        shutil.rmtree(folder)
    title = f"{numbers['made']['bytes'] / 1e9:.2f} GB in bf16, {numbers['layers']} layers"
    header = [title, "GB written", "s", "MB/s", "plain MB/s", "ratio", "peak GiB", "bound GiB"]
    same = "the export has" if numbers["same"] else "the export does NOT have"
    report(options, [markdown(header, rows), f"{same} the files that were imported, to the byte"], numbers)
    return 0


if __name__ == "__main__":
    run_tool(main)
