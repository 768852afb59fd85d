"""Virtual tokens: before the input (PEFT's prompt tuning), at every layer (PEFT's prefix tuning), and the infix.

An infix stands between prompt and completion: PreEmbed of Hu et al. 2021, section 5.1, has both kinds of virtual token,
and PEFT has the first alone.

d: hidden size     p, i: tokens of prefix and infix     n: tokens of a row     B: rows
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import UnsupportedError
from surgery.training.methods import anatomy
from surgery.training.methods.lora import known_warnings, task_type
from surgery.training.methods.options import MethodOptions

IGNORED = -100


def add_virtual_tokens(model: Any, options: MethodOptions) -> Any:
    """Wrap a model in PEFT's prompt or prefix tuning, or in ours if there is an infix. The base is frozen."""
    per_layer = "prefix" in options.kind
    task = task_type(model)
    if task is None:
        raise UnsupportedError(
            f"{anatomy.name_of(model)} takes no virtual tokens: --method {options.name} is for causal language models, "
            "text classification and sequence-to-sequence; use --method lora."
        )
    if options.infix_tokens:
        if task != "CAUSAL_LM":
            raise UnsupportedError(
                f"{anatomy.name_of(model)} has no completion for an infix to stand before; leave --infix-tokens out."
            )
        return PromptedModel(model, options.tokens, options.infix_tokens, options.seed)
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    if per_layer and getattr(model.config, "output_router_logits", False):
        raise UnsupportedError(
            "--method prefix cannot be had with output_router_logits in config.json: the router sees fewer tokens than "
            "the attention mask has, and its loss fails; use --method prompt or lora, or switch that setting off."
        )
    kinds = PrefixTuningConfig if per_layer else PromptTuningConfig
    # With an encoder, PEFT's prompts stand before its input. Its prefixes are for the decoder, one for each of its two
    # attentions: a single one would stand in for what the second reads of the encoder.
    both = per_layer and task == "SEQ_2_SEQ_LM"
    config = kinds(task_type=task, num_virtual_tokens=options.tokens, num_transformer_submodules=2 if both else 1)
    with known_warnings():
        wrapped: Any = get_peft_model(model, config)
    if not per_layer:
        _begin_with_tokens(wrapped.prompt_encoder[wrapped.active_adapter].embedding.weight, model, options.seed)
    return wrapped


def load_virtual_tokens(model: Any, folder: Path, config: Any) -> Any:
    """PEFT's prompt or prefix from its folder, to be trained on, which `PeftModel.from_pretrained` does not offer."""
    from peft import get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    config = copy.copy(config)
    config.inference_mode = False
    wrapped = get_peft_model(model, config)
    set_peft_model_state_dict(wrapped, load_peft_weights(str(folder), device="cpu"))
    return wrapped


def _begin_with_tokens(virtual: Tensor, model: Any, seed: int) -> None:
    """Begin with the embeddings of tokens drawn at random: they are of the right size, which noise is not."""
    words = model.get_input_embeddings().weight
    if not words.is_meta:
        rows = torch.randint(len(words), (len(virtual),), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            virtual.copy_(words[rows.to(words.device)])


class PromptedModel(nn.Module):
    """A causal language model that sees `p` virtual tokens before each row and `i` before its completion.

    The completion begins at the first label that counts. Without labels the infix stands at the row's end, where the
    model is about to answer: so does `generate`. Logits are those of the n tokens that were given: what stands at a
    token's place foretells the token after it, with the infix seen where that is the completion's first.

    Attributes:
        base: the model.
        prompt: (p, d), trained.
        infix: (i, d), trained.
    """

    def __init__(self, base: Any, prefix: int, infix: int, seed: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        words = base.get_input_embeddings().weight
        width = words.shape[1]
        self.prompt = nn.Parameter(torch.empty(prefix, width, device=words.device, dtype=torch.float32))
        self.infix = nn.Parameter(torch.empty(infix, width, device=words.device, dtype=torch.float32))
        _begin_with_tokens(self.prompt.data, base, seed)
        _begin_with_tokens(self.infix.data, base, seed + 1)

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def device(self) -> torch.device:
        return self.infix.device

    def __getattr__(self, name: str) -> Any:
        """What a trainer asks of a transformers model, such as `gradient_checkpointing_enable`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **others: Any
    ) -> Any:
        """(B, n) tokens to what the base returns, with logits (B, n, V) and, given labels, the loss."""
        longer, mask, place = self._lengthened(input_ids, attention_mask, labels)
        others.pop("position_ids", None)
        counted = {"num_items_in_batch": others.pop("num_items_in_batch", None)}
        outputs = self.base(inputs_embeds=longer, attention_mask=mask, **others)
        # Where the token after each one stands, less one; the last of a row has none, and keeps its own place.
        before_next = torch.cat([place[:, 1:] - 1, place[:, -1:]], dim=1)  # (B, n)
        outputs.logits = outputs.logits.gather(1, before_next[..., None].expand(-1, -1, outputs.logits.shape[2]))
        if labels is not None:
            size = outputs.logits.shape[2]
            outputs.loss = self.base.loss_function(logits=outputs.logits, labels=labels, vocab_size=size, **counted)
        return outputs

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        """What the base generates after the prompts and their infix; the new tokens alone. Pad on the left."""
        longer, mask, _ = self._lengthened(input_ids, attention_mask, None)
        new: Tensor = self.base.generate(inputs_embeds=longer, attention_mask=mask, **others)
        return new

    def _lengthened(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, p + n + i, d), their mask, and where each token has gone: (B, n)."""
        rows, n = input_ids.shape
        p, i = len(self.prompt), len(self.infix)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        at = _completions(attention_mask, labels)[:, None]  # (B, 1)
        old = torch.arange(n, device=input_ids.device)[None]
        place = old + p + i * (old >= at)  # (B, n)
        words = self.base.get_input_embeddings()(input_ids)  # (B, n, d)
        virtual = torch.cat([self.prompt, self.infix]).to(words.dtype).expand(rows, -1, -1)
        own = torch.cat(
            [torch.arange(p, device=at.device).expand(rows, -1), at + p + torch.arange(i, device=at.device)], 1
        )
        # Rows of [prompt | infix | tokens], sorted by the places they go to.
        order = torch.cat([own, place], dim=1).argsort(dim=1)
        longer = torch.cat([virtual, words], dim=1).gather(1, order[..., None].expand(-1, -1, words.shape[2]))
        mask = torch.cat([attention_mask.new_ones(rows, p + i), attention_mask], dim=1).gather(1, order)
        return longer, mask, place


def _completions(attention_mask: Tensor, labels: Tensor | None) -> Tensor:
    """Where each row's completion begins: (B,), the row's end where no label counts."""
    n = attention_mask.shape[1]
    places = torch.arange(n, device=attention_mask.device)
    ends = ((places + 1) * attention_mask.ne(0)).amax(dim=1)
    if labels is None:
        return ends
    first = torch.where(labels != IGNORED, places, n).amin(dim=1)
    return torch.minimum(first, ends)
