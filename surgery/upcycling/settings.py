"""Settings in config.json of a type that no model can have: found before any work, not by whoever loads the output."""

from __future__ import annotations

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, several
from surgery.names import plain

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "d_model", "d_ff", "d_kv", "num_layers", "num_decoder_layers", "num_heads",
    "n_embd", "n_inner", "n_layer", "n_head", "n_positions", "encoder_layers", "decoder_layers", "encoder_ffn_dim",
    "decoder_ffn_dim", "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
_NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "initializer_range", "partial_rotary_factor",
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling", "routed_scaling_factor",
)  # fmt: skip
_FLAGS = (
    "attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "is_decoder", "is_encoder_decoder",
)  # fmt: skip
_WORDS = ("hidden_act", "activation_function", "hidden_activation", "feed_forward_proj")
_OBJECTS = ("rope_parameters", "rope_scaling")


def check_settings(checkpoint: Checkpoint) -> None:
    """Raise `FormatError` for settings of another type than every model's; null stands for the class's default."""
    problems = []
    for names, fits, expected in (
        (_SIZES, _is_size, "a whole number of at least 1"),
        (_NUMBERS, _is_number, "a number"),
        (_FLAGS, lambda value: isinstance(value, bool), "true or false"),
        (_WORDS, lambda value: isinstance(value, str), "a word"),
        (_OBJECTS, lambda value: isinstance(value, dict), "an object"),
        (("architectures",), _is_list_of_words, "a list of class names"),
    ):
        for name in names:
            value = checkpoint.config.get(name)
            if value is not None and not fits(value):
                shown = plain(repr(value)[:40])
                problems.append(f"config.json of {checkpoint.label} says {name} {shown}, expected {expected}.")
    if problems:
        raise FormatError(several(f"config.json of {checkpoint.label}", problems), problems)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list_of_words(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
