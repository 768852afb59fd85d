"""The tokenizer's class, said in its own file: without that, transformers goes by the model type, which is another now.

Source: transformers 5.23, `models/auto/tokenization_auto.py`: the class of a dense model type.
"""

from __future__ import annotations

from surgery.checkpoint import Checkpoint
from surgery.folder import read_json
from surgery.operation import config_bytes

_CLASSES = {
    "bert": "BertTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "phi": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
}
_FILE = "tokenizer_config.json"
_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}


def tokenizer_file(checkpoint: Checkpoint) -> dict[str, bytes]:
    """`tokenizer_config.json` with the class in it, where the dense model leaves it to the model type."""
    name = _CLASSES.get(checkpoint.model_type)
    if name is None or not _VOCABULARIES & set(checkpoint.carried) or "tokenizer_class" in checkpoint.config:
        return {}
    settings = read_json(checkpoint.folder.open(_FILE)) if _FILE in checkpoint.carried else {}
    return {} if "tokenizer_class" in settings else {_FILE: config_bytes({**settings, "tokenizer_class": name})}
