"""How many bytes of text each token stands for: what bits per byte are counted by."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def bytes_of_tokens(tokenizer: Any) -> NDArray[np.int64]:
    """The bytes of UTF-8 that each token stands for, by its id; 0 for special tokens and for ids that there are not.

    Tokens of a byte-level vocabulary (GPT-2, Llama 3, Qwen) are runs of bytes, one to a character, so the sum over a
    text's tokens is the length of its UTF-8. Elsewhere a token is the text it decodes to: `▁` is a space, `<0x0A>` a
    byte, and WordPiece's `##` nothing.
    """
    words: dict[str, int] = tokenizer.get_vocab()
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    special = set(tokenizer.all_special_tokens)
    decoder = _decoders(tokenizer)
    by_bytes, by_fallback = "ByteLevel" in decoder, "ByteFallback" in decoder
    found = np.zeros(max(words.values(), default=-1) + 1, np.int64)
    for word, number in words.items():
        if word in special or added.get(word):
            continue
        if word in added:
            found[number] = len(word.encode(errors="surrogatepass"))
        elif by_bytes:
            found[number] = len(word)
        elif by_fallback and _BYTE.fullmatch(word):
            found[number] = 1
        else:
            found[number] = len(word.removeprefix("##").replace("▁", " ").encode(errors="surrogatepass"))
    return found


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of decoder in a tokenizer's chain; empty where it has none to look at."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    whole = json.loads(backend.to_str()).get("decoder") or {}
    return {str(part.get("type")) for part in (whole, *whole.get("decoders", ()))}
