"""Text to batches: corpora, tokenizers, Megatron's indexed datasets, blends and the position in them.

Names are imported when they are first used: the workers that cut text need neither torch nor Megatron.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adamoe_dist.data.batches import BatchStream, validation_batches
    from adamoe_dist.data.blend import BlendedSamples, Dataset, Samples
    from adamoe_dist.data.corpus import Document, corpus_bytes, iterate_documents, validate_inputs
    from adamoe_dist.data.example_samples import ExampleSamples
    from adamoe_dist.data.example_store import ExampleRules, keep_examples, load_examples
    from adamoe_dist.data.example_tokens import PLAIN_TURN, plain_pieces, tokens_of_example
    from adamoe_dist.data.examples import Conversation, read_examples
    from adamoe_dist.data.indexed import TokenDataset
    from adamoe_dist.data.micro_batch import MaskedSample, MicroBatch
    from adamoe_dist.data.prepare import PreparationSummary, prepare_corpus
    from adamoe_dist.data.standard_library import STANDARD_LIBRARY
    from adamoe_dist.data.storage import PartInfo, read_info
    from adamoe_dist.data.tokenizer import Tokenizer
    from adamoe_dist.data.tokenizer_huggingface import TOKENIZER_FILES, HuggingFaceTokenizer, prefix_ids_of
    from adamoe_dist.data.tokenizer_sentencepiece import SentencePieceTokenizer
    from adamoe_dist.data.tokenizer_training import TrainingSummary, train_tokenizer

__all__ = [
    "PLAIN_TURN",
    "STANDARD_LIBRARY",
    "TOKENIZER_FILES",
    "BatchStream",
    "BlendedSamples",
    "Conversation",
    "Dataset",
    "Document",
    "ExampleRules",
    "ExampleSamples",
    "HuggingFaceTokenizer",
    "MaskedSample",
    "MicroBatch",
    "PartInfo",
    "PreparationSummary",
    "Samples",
    "SentencePieceTokenizer",
    "TokenDataset",
    "Tokenizer",
    "TrainingSummary",
    "corpus_bytes",
    "iterate_documents",
    "keep_examples",
    "load_examples",
    "plain_pieces",
    "prefix_ids_of",
    "prepare_corpus",
    "read_examples",
    "read_info",
    "tokens_of_example",
    "train_tokenizer",
    "validate_inputs",
    "validation_batches",
]

_HOMES = {
    "batches": ("BatchStream", "validation_batches"),
    "blend": ("BlendedSamples", "Dataset", "Samples"),
    "corpus": ("Document", "corpus_bytes", "iterate_documents", "validate_inputs"),
    "example_samples": ("ExampleSamples",),
    "example_store": ("ExampleRules", "keep_examples", "load_examples"),
    "example_tokens": ("PLAIN_TURN", "plain_pieces", "tokens_of_example"),
    "examples": ("Conversation", "read_examples"),
    "indexed": ("TokenDataset",),
    "micro_batch": ("MaskedSample", "MicroBatch"),
    "prepare": ("PreparationSummary", "prepare_corpus"),
    "standard_library": ("STANDARD_LIBRARY",),
    "storage": ("PartInfo", "read_info"),
    "tokenizer": ("Tokenizer",),
    "tokenizer_huggingface": ("TOKENIZER_FILES", "HuggingFaceTokenizer", "prefix_ids_of"),
    "tokenizer_sentencepiece": ("SentencePieceTokenizer",),
    "tokenizer_training": ("TrainingSummary", "train_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
