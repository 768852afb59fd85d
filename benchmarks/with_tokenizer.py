"""A checkpoint's files by hard links, and a tokenizer beside them: mergekit-moe does not run without one.

python -m benchmarks.with_tokenizer CHECKPOINT OUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tokenizers import Tokenizer, models


def main(checkpoint: Path, folder: Path) -> None:
    """Write `folder`; words are numbers, as many as the model has tokens."""
    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        os.link(path, folder / path.name)
    count = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{str(number): number for number in range(3, count)}}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
