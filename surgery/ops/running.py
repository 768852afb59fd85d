"""Running a stored model with transformers, in float32 on the CPU, on inputs of its own kind.

Nothing of it shows: transformers' progress bars, log and warnings are kept off the terminal. Code that a checkpoint
brings along is never run; the classes are those of transformers and of `surgery.moe`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, MissingExtraError, first_line

if TYPE_CHECKING:
    import numpy as np
    import torch

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt", "tekken.json")
IMAGE_FILES = ("preprocessor_config.json",)
# Tokens that go through a model at once: of a text that is named, and of the one below.
_WINDOW, _SHORT_WINDOW = 512, 64
# Of a text that is named, this many tokens count at most: two passes of a model with 10^9 parameters take minutes.
_MOST_TOKENS = 4096
# What a model is run on where no text is named: a few sentences of the kind that any tokenizer has seen.
SAMPLE_TEXT = """The river had risen in the night, and by morning the lower fields lay under a sheet of brown water. \
Nobody in the village was surprised. It happened in most years, usually in March, when the snow on the hills began to \
melt, and people had long since built their barns on higher ground. What they talked about was the bridge: two of its \
seven arches had cracked in 1987, repairs had cost $40,000, and the engineer who signed for them had written, in plain \
words, that another flood like that one would carry it away. "We should have listened," said the baker, counting loaves.
"""


def transformers_module() -> Any:
    """The package; `MissingExtraError` where it is not installed, `InputError` where it is too old for our classes."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise InputError(f"transformers {transformers.__version__} is installed, expected 5 or newer; upgrade it.")
    return transformers


def is_installed() -> bool:
    """Whether there is a transformers package, without the seconds that importing it takes."""
    from importlib.util import find_spec

    try:
        return find_spec("transformers") is not None
    except (ImportError, ValueError):
        return False


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers from drawing, logging and warning for a while."""
    logging = transformers_module().utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Loaded:
    """A model, the parameters that its checkpoint does not store, and the tensors that it has no use for."""

    model: Any
    missing: frozenset[str]
    unexpected: frozenset[str]


def load(path: Path, base: Path | None = None, dtype: torch.dtype | None = None, *, class_name: str = "") -> Loaded:
    """The model of a checkpoint folder, as the class that its config names, in `dtype`, float32 unless given.

    `base` is where the dense weights are if the folder has routed LoRA experts alone; by default where it says.
    `class_name` is the class for a config that names none.
    """
    import torch

    transformers = transformers_module()
    from surgery.moe import modeling_upcycled  # this also makes AutoConfig know the upcycled types

    with quietly():
        try:
            config = transformers.AutoConfig.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            reason = first_line(error)
            raise InputError(f"{path} cannot be run: transformers has no model for its config ({reason}).") from error
        named, homes = (getattr(config, "architectures", None) or [class_name])[0], (transformers, modeling_upcycled)
        cls = next((getattr(home, named) for home in homes if named and hasattr(home, named)), None)
        if cls is None:
            raise InputError(f"{path} names no class of transformers in its config, so it cannot be run.")
        if base is not None and getattr(config, "base_model_name_or_path", None):
            config.base_model_name_or_path, config.base_model_revision = str(base.absolute()), None
        model, found = cls.from_pretrained(path, config=config, dtype=dtype or torch.float32, output_loading_info=True)
    return Loaded(model.eval(), frozenset(found["missing_keys"]), frozenset(found["unexpected_keys"]))


def first_output(output: object) -> torch.Tensor:
    """Logits where there are any, else the picture that a model draws, else the last hidden state.

    Where an answer starts and where it ends are two outputs at each position: [sequences, positions, 2].
    """
    import torch

    if getattr(output, "start_logits", None) is not None:
        ends: Any = output
        return torch.stack((ends.start_logits, ends.end_logits), -1)
    for name in ("logits", "prediction_logits", "reconstruction", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is not None:
            found: torch.Tensor = value
            return found
    raise InputError("The model gives neither logits nor hidden states.")


@dataclass(frozen=True)
class Inputs:
    """What a model is run on.

    Attributes:
        batches: keyword arguments of one forward pass each.
        targets: for each batch the tokens to foretell, [sequences, positions], where the model foretells tokens.
        described: in words.
    """

    batches: tuple[dict[str, torch.Tensor], ...]
    targets: tuple[torch.Tensor, ...]
    described: str


def inputs_of(model: Any, folder: Path, text: Path | None = None, seed: int = 0) -> Inputs:
    """Real inputs where the folder has a tokenizer or an image processor, and seeded random ones elsewhere.

    Args:
        model: what is to be run.
        folder: where its tokenizer or image processor lies.
        text: a file to take the tokens from, in place of a few sentences that every installation has.
        seed: of random inputs.

    Raises:
        InputError: a text is named, and there are no tokens to make of it.
    """
    if takes_images(model):
        pixels = _drawn_images(model, folder)
        if text is not None:
            raise InputError(f"{text} cannot be used: the model takes images, not text.")
        if pixels is not None:
            return Inputs(({"pixel_values": pixels},), (), f"{len(pixels)} drawn images")
    else:
        longest = _WINDOW if text is not None else _SHORT_WINDOW
        content = SAMPLE_TEXT if text is None else text.read_text(encoding="utf-8", errors="replace")
        tokens = _tokens(model, folder, content)
        if text is not None and (tokens is None or tokens.numel() < 2):
            found = "no tokenizer that transformers can load" if tokens is None else "fewer than 2 tokens for it"
            raise InputError(f"{text} cannot be used: there is {found}.")
        if tokens is not None and tokens.numel() >= 2:
            windows = _windows(tokens, min(longest, _positions(model)), 2 if text is None else None)
            count = sum(window.numel() for window in windows)
            name = "a built-in text" if text is None else text.name
            batches, targets = zip(*(_of_tokens(model, window) for window in windows), strict=True)
            return Inputs(batches, targets, f"{count} tokens of {name}")
    batch, described = random_inputs(model, seed)
    return Inputs((batch,), (), described)


def takes_images(model: Any) -> bool:
    """Whether a model looks at pictures."""
    return bool(getattr(model, "main_input_name", "input_ids") == "pixel_values")


def foretells_tokens(model: Any) -> bool:
    """Whether a model's logits are for the next token."""
    name = type(model).__name__
    return name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) and not takes_images(model)


def random_inputs(model: Any, seed: int) -> tuple[dict[str, torch.Tensor], str]:
    """Seeded inputs for a model of text or of images."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if takes_images(model):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}, "2 random images"
    length = min(_SHORT_WINDOW, _positions(model))
    tokens = torch.randint(0, config.get_text_config().vocab_size, (2, length), generator=generator)
    tokens = _for_the_head(model, tokens)
    inputs = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return inputs, f"2 sequences of {length} random tokens"


def _for_the_head(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [sequences, positions] in the form that the model's head asks for.

    One for multiple choice takes them as the choices of one example, [1, choices, positions]; one of an encoder-decoder
    that tells classes looks at the end token, of which each sequence must have as many as the others.
    """
    if type(model).__name__.endswith("ForMultipleChoice"):
        return tokens.unsqueeze(0)
    end = getattr(model.config, "eos_token_id", None)
    if _tells_classes_in_a_decoder(model) and isinstance(end, int):
        tokens = tokens.masked_fill(tokens == end, end - 1 if end else 1)
        tokens[:, -1] = end
    return tokens


def _tells_classes_in_a_decoder(model: Any) -> bool:
    two = bool(getattr(model.config, "is_encoder_decoder", False))
    return two and type(model).__name__.endswith("ForSequenceClassification")


def _positions(model: Any) -> int:
    """How long a sequence may be."""
    # Half of the positions: RoBERTa and its like number theirs from the padding token on.
    return (getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * _WINDOW) // 2


def _tokens(model: Any, folder: Path, text: str) -> torch.Tensor | None:
    """A text as token ids [count]; None where there is no tokenizer that fits the model."""
    import torch

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    transformers = transformers_module()
    with quietly():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            ids = tokenizer(text)["input_ids"]
        except Exception:  # whatever a broken or foreign tokenizer may raise; random tokens serve, too
            return None
    tokens = torch.tensor(ids[:_MOST_TOKENS], dtype=torch.long)
    if tokens.numel() and int(tokens.max()) >= model.config.get_text_config().vocab_size:
        return None
    return tokens


def _windows(tokens: torch.Tensor, length: int, most: int | None) -> Sequence[torch.Tensor]:
    """Pieces of a text, [1, length] each; a last one of a single token foretells nothing and is left out."""
    pieces = [tokens[begin : begin + length].unsqueeze(0) for begin in range(0, len(tokens), length)]
    return [piece for piece in pieces if piece.numel() > 1][:most]


def _of_tokens(model: Any, tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The inputs of one forward pass over [1, n] tokens, and the tokens that it foretells, at its last positions.

    An encoder-decoder model reads the first half and foretells the second.
    """
    import torch

    if not getattr(model.config, "is_encoder_decoder", False) or _tells_classes_in_a_decoder(model):
        return {"input_ids": _for_the_head(model, tokens)}, tokens[:, 1:]
    half = tokens.shape[1] // 2
    first, second = tokens[:, :half], tokens[:, half:]
    start = model.config.decoder_start_token_id
    start = torch.full((1, 1), 0 if start is None else start)
    return {"input_ids": first, "decoder_input_ids": torch.cat((start, second[:, :-1]), 1)}, second


def _drawn_images(model: Any, folder: Path) -> torch.Tensor | None:
    """Two simple pictures as the folder's image processor prepares them; None where it has none that works."""
    if not any((folder / name).is_file() for name in IMAGE_FILES):
        return None
    transformers = transformers_module()
    with quietly():
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
            pixels: torch.Tensor = processor(images=list(_pictures()), return_tensors="pt")["pixel_values"]
        except Exception:  # it may need pillow or torchvision, or be broken; random pixels serve, too
            return None
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return pixels if tuple(pixels.shape[1:]) == (model.config.num_channels, height, width) else None


def _pictures() -> Iterator[np.ndarray]:
    """A disc on a gradient, and stripes with a square: [224, 224, 3], uint8."""
    import numpy as np

    y, x = np.mgrid[0:224, 0:224]
    disc = (y - 100) ** 2 + (x - 120) ** 2 < 60**2
    yield np.stack([np.where(disc, 220, x), np.where(disc, 60, y), 255 - (x + y) // 2], -1).astype(np.uint8)
    square = (abs(y - 140) < 40) & (abs(x - 80) < 40)
    stripes = np.where((x // 14) % 2 == 0, 200, 40)
    yield np.stack([np.where(square, 30, stripes), stripes, np.where(square, 230, y)], -1).astype(np.uint8)
