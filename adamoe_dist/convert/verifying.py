"""The same tokens through a Hugging Face model and through the Megatron model of a checkpoint."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamoe_dist import platform
from adamoe_dist.checkpoint import MergedReader, OnBytes, bytes_of_files, checkpoint_at, read_config, verify_files
from adamoe_dist.config import config_from_dict
from adamoe_dist.convert.exporting import read_weight
from adamoe_dist.convert.family import meaning
from adamoe_dist.convert.hf_directory import HFDirectory
from adamoe_dist.convert.load_report import read_text
from adamoe_dist.convert.mapping import Weight
from adamoe_dist.convert.megatron_model import megatron_model
from adamoe_dist.convert.safetensors_files import DTYPES
from adamoe_dist.convert.tokenizer_files import has_tokenizer
from adamoe_dist.errors import UserError

LONGEST = 256
RANDOM_SEQUENCES = 4
SENTENCES = (
    "The ship left the harbour before dawn, and nobody on the quay saw which way it turned.",
    "To find the area of a circle, square its radius and multiply by pi.",
    "def add(left, right):\n    return left + right\n",
    "In 1905 he sent four papers to the journal; each of them would have been a life's work.",
    "Water boils at 100 degrees at sea level and at about 93 degrees in a town 2000 metres up.",
    "¿Dónde está la biblioteca? — Là-bas, à gauche. — 谢谢!",
)


class Comparing:
    """A Hugging Face directory beside a checkpoint of the same model."""

    def __init__(self, hf: Path, megatron: str) -> None:
        """Open both.

        Raises:
            UserError: one of them is not what it should be, or they are not of the same model.
        """
        self.directory = HFDirectory(hf, "--hf")
        self.checkpoint = checkpoint_at(megatron, "--megatron")
        config = config_from_dict(read_config(self.checkpoint))
        here, there = meaning(config), meaning(self.directory.architecture.config())
        differing = [f"{key} is {there[key]} there, {here[key]} here" for key in here if here[key] != there[key]]
        if differing:
            raise UserError(f"--hf {hf} is not the model of --megatron {self.checkpoint}: {'; '.join(differing)}")
        there_rows = self.directory.architecture.vocab_size
        self._vocab_size = config.model.vocab_size or there_rows
        if there_rows not in (self._vocab_size, config.padded_vocab_size(self._vocab_size)):
            raise UserError(
                f"--hf {hf} is not the model of --megatron {self.checkpoint}: vocab_size is {there_rows} there, "
                f"{self._vocab_size} here"
            )
        self.weights: list[Weight] = self.directory.weights(config)
        self._is_verified = False

    @property
    def work_bytes(self) -> int:
        """Bytes of the checkpoint that are verified, and of tensors that are compared."""
        return bytes_of_files(self.checkpoint) + sum(stored.bytes for stored in self.directory.tensors.values())

    def check_logits_possible(self) -> None:
        """Refuse before anything is read what would fail after all tensors were.

        Raises:
            UserError: transformers has no class of the family, or the machine has too little memory for the model.
        """
        if not self.has_class():
            raise UserError(
                f"--hf {self.directory.path}: transformers has no class for model_type="
                f"{self.directory.family.model_type}, so that logits cannot be compared; give --tensors-only"
            )
        elements = [weight.elements for weight in self.weights]
        needed, available = 4 * (sum(elements) + max(elements)), platform.host.available_bytes()
        if available is not None and needed > available:
            raise UserError(
                f"--hf {self.directory.path}: comparing logits needs {needed / 1e9:.2f} GB of memory for the model in "
                f"fp32, and {available / 1e9:.2f} GB are free; give --tensors-only, or use a machine with more"
            )

    def compare_tensors(self, on_bytes: OnBytes | None = None) -> int:
        """Verify the checkpoint's files, compare tensor by tensor in the directory's types; return how many there are.

        Args:
            on_bytes: told of every part that was verified or compared, :attr:`work_bytes` in all.

        Raises:
            UserError: naming the file that is damaged, the tensor with the largest difference, and it, or one that
                has equal numbers which are not all finite.
        """
        verify_files(self.checkpoint, on_bytes=on_bytes)
        self._is_verified = True
        worst, where, number, unusable = 0.0, "", 0, ""
        with self.directory.open() as files, MergedReader(self.checkpoint) as reader:
            for weight in self.weights:
                stored = self.directory.tensors[weight.name]
                theirs = files.read(stored)
                ours = read_weight(reader, weight, DTYPES[stored.dtype])
                if not torch.allclose(theirs, ours, rtol=0.0, atol=0.0, equal_nan=True):
                    number += 1
                    gap = float((theirs.float() - ours.float()).abs().max())
                    if not where or not gap <= worst:
                        worst, where = gap, weight.name
                elif not theirs.isfinite().all():
                    unusable = unusable or weight.name
                if on_bytes is not None:
                    on_bytes(stored.bytes)
        if where:
            raise UserError(
                f"{number} of {len(self.weights)} tensors differ, {where} most: by {worst:.3g}; "
                f"--hf {self.directory.path} and --megatron {self.checkpoint} do not have the same weights"
            )
        if unusable:
            raise UserError(
                f"tensors are equal, but {unusable} holds numbers that are not finite, with which no logits can be "
                f"compared; give --hf {self.directory.path} and --megatron {self.checkpoint} without such"
            )
        return len(self.weights)

    def has_class(self) -> bool:
        """Tell whether transformers has a class of this family."""
        from transformers import CONFIG_MAPPING

        import adamoe_dist.hf  # noqa: F401  registers the class of this project

        return self.directory.family.model_type in CONFIG_MAPPING

    def compare_logits(self, text: Path | None, tolerance: float) -> tuple[str, int, float, float]:
        """Return where the tokens are from, their number, the largest and the mean difference of the logits.

        Raises:
            UserError: the largest is above ``tolerance``; it says where.
        """
        source, sequences = self.sequences(text)
        theirs = self._their_logits(sequences)
        dtypes = {weight.tensor: DTYPES[self.directory.tensors[weight.name].dtype] for weight in self.weights}
        largest, total, where = 0.0, 0.0, (0, 0, 0)
        with torch.no_grad(), megatron_model(self.checkpoint, self._vocab_size, dtypes, self._is_verified) as model:
            device = next(model.parameters()).device
            for number, (tokens, expected) in enumerate(zip(sequences, theirs, strict=True)):
                got = model.logits(tokens.to(device))[0, :, : expected.shape[1]].float().cpu()
                gaps = (got - expected).abs()
                total += float(gaps.double().sum())
                top = float(gaps.max())
                if not top <= largest:
                    largest = top
                    where = number, *divmod(int(gaps.argmax()), expected.shape[1])
        count = sum(expected.numel() for expected in theirs)
        if not largest <= tolerance or math.isnan(total):
            raise UserError(
                f"the logits differ by up to {largest:.3g}, more than --tolerance {tolerance:g}: sequence {where[0]}, "
                f"position {where[1]}, token id {where[2]}, though tensors are equal; report the model's config.json"
            )
        return source, sum(tokens.numel() for tokens in sequences), largest, total / count

    def sequences(self, text: Path | None) -> tuple[str, list[Tensor]]:
        """Return token ids (1, S), and where they are from: a text, sentences, or chance without a tokenizer."""
        if not has_tokenizer(self.directory.path):
            if text is not None:
                raise UserError(f"--text {text}: {self.directory.path} has no tokenizer to cut it with; leave it out")
            draws = torch.Generator().manual_seed(0)
            length = min(64, int(self.directory.architecture.model["sequence_length"]))
            shape = (RANDOM_SEQUENCES, 1, length)
            return "random ids, for there is no tokenizer", list(
                torch.randint(self._vocab_size, shape, generator=draws)
            )
        cut = _tokenizer(self.directory.path)
        longest = min(LONGEST, int(self.directory.architecture.model["sequence_length"]))
        if text is None:
            ids = [cut(sentence)["input_ids"][:longest] for sentence in SENTENCES]
            source = f"{len(SENTENCES)} sentences"
        else:
            whole = cut(read_text(text))["input_ids"]
            ids = [whole[start : start + longest] for start in range(0, min(len(whole), 8 * longest), longest)]
            source = str(text)
        sequences = [torch.tensor([part]) for part in ids if part]
        if not sequences:
            raise UserError(f"--text {text} has no tokens; give another")
        return source, sequences

    def _their_logits(self, sequences: list[Tensor]) -> list[Tensor]:
        """Return the logits (S, V) of each sequence by transformers, in fp32."""
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.directory.path, dtype=torch.float32, local_files_only=True, attn_implementation="sdpa"
            )
        except (OSError, ValueError, KeyError, RuntimeError) as problem:
            raise UserError(f"--hf {self.directory.path} cannot be loaded by transformers: {problem}") from problem
        device = platform.device()
        model.to(device).eval()
        with torch.no_grad():
            return [model(tokens.to(device)).logits[0].float().cpu() for tokens in sequences]


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as problem:
        raise UserError(f"the tokenizer of {path} cannot be loaded by transformers: {problem}") from problem
