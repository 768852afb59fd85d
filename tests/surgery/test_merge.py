"""Merging against PEFT's `merge_and_unload`: bit for bit, but for the differences listed here, each with its reason."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import MismatchError, NonFiniteError, OptionError
from surgery.tiling import tiles
from tests.models import FAMILIES, inputs, invent, logits, make, save
from tests.peft_tools import attach, different, merged_by_peft, same_bits, stored, write_adapter

# Where we differ from PEFT 0.21 on purpose.
DIFFERENCES = {
    "rounds twice: embeddings": "PEFT casts dW of an embedding to the weight's dtype, adds, and rounds again "
    "(Embedding.merge); one rounding is nearer to the sum.",
    "rounds twice: parameters": "PEFT casts dW of target_parameters to the weight's dtype before it adds "
    "(ParamWrapper.get_delta_weight).",
    "tied weights": "PEFT adds the adapter of one end of a tied pair to the one matrix both ends share, so the other end "
    "changes too (huggingface/peft#2777); with ensure_weight_tying it adds it twice. We keep each end as trained.",
}

EXPERTS: dict[str, Any] = {
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "target_modules": ["q_proj"],
}
# Name: (family, LoraConfig settings, the difference that 16-bit weights are to show, if any).
CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "rsLoRA": ("llama", {"use_rslora": True, "lora_alpha": 7}, None),
    "rank and alpha patterns": ("llama", {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"k_proj": 3, r".*layers.0.mlp.down_proj": 5}}, None),
    "DoRA": ("llama", {"use_dora": True}, None),
    "DoRA with rsLoRA": ("llama", {"use_dora": True, "use_rslora": True}, None),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, None),
    "DoRA on Conv1D": ("gpt2", {"use_dora": True, "fan_in_fan_out": True}, None),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, "rounds twice: embeddings"),
    "DoRA on an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, None),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}, None),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}, None),
    "a classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}, None),
    "bias all": ("bert", {"target_modules": ["query"], "bias": "all"}, None),
    "bias lora_only": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}, None),
    "lora_bias": ("bert", {"target_modules": ["query", "dense"], "lora_bias": True}, None),
    "lora_bias on Conv1D": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}, None),
    "Conv2d": ("vit", {"target_modules": ["projection", "q_proj"]}, None),
    "DoRA on Conv2d": ("vit", {"target_modules": ["projection", "q_proj"], "use_dora": True}, None),
    "replaced token rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 7]}, None),
    "both fused parameters": ("mixtral", EXPERTS, "rounds twice: parameters"),
    "one fused parameter": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}, "rounds twice: parameters"),
    "a router": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}, "rounds twice: parameters"),
    "transposed experts": ("gpt_oss", EXPERTS, "rounds twice: parameters"),
    "experts stored as stacks": ("granitemoe", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, "rounds twice: parameters"),
    "fused rank pattern": ("qwen3_moe", {**EXPERTS, "rank_pattern": {"experts.gate_up_proj": 3}}, "rounds twice: parameters"),
}  # fmt: skip


def merge_both(
    tmp_path: Path, family: str, dtype: torch.dtype, settings: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Path, Path]:
    """The same adapter merged by us and by PEFT; the base's and the adapter's folders."""
    model = make(family)
    base = save(model, tmp_path / "base", dtype)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", **settings})
    # PEFT stores a targeted embedding's own weights beside its factors: they must be the base's.
    adapter = write_adapter(copy.deepcopy(model).to(dtype), config, tmp_path / "adapter")
    surgery.merge(base, adapter, output=tmp_path / "ours")
    theirs = merged_by_peft(base, [adapter], tmp_path / "theirs", family, dtype)
    return stored(tmp_path / "ours"), theirs, base, adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("mixtral", "qwen3_moe", "qwen3_moe-some-dense")])
def test_every_family_has_the_bits_of_peft(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """LoRA on all linear layers of every family: not one bit differs from merge_and_unload."""
    ours, theirs, base, _ = merge_both(tmp_path, family, dtype, {})
    assert different(ours, stored(base))
    assert not different(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_every_variant_has_the_bits_of_peft(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Everything PEFT can train merges to PEFT's bits; where PEFT rounds twice, to within a place of one rounding."""
    family, settings, difference = CASES[case]
    if family == "gpt_oss" and dtype is torch.float16:
        pytest.skip(
            "transformers keeps GPT-OSS norms in float32 when it loads float16, so the reference is another model"
        )
    ours, theirs, base, adapter = merge_both(tmp_path, family, dtype, settings)
    before = stored(base)
    assert different(ours, before)
    wrong = different(ours, theirs)
    if difference is None or dtype in (torch.float32, torch.float64):
        assert not wrong
        return
    assert wrong, f"expected: {DIFFERENCES[difference]}"
    exact = exact_merge(base, adapter, family)
    for name in wrong:
        assert within_one_place(ours[name], exact[name]), name
        assert error(ours[name], exact[name]) < error(theirs[name], exact[name]), name


def exact_merge(base: Path, adapter: Path, family: str) -> dict[str, torch.Tensor]:
    """The sum in float64, from PEFT itself on a float64 copy of the model."""
    wide = base.parent / "wide"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, FAMILIES[family][0]).from_pretrained(base, dtype=torch.float64)
        save(PeftModel.from_pretrained(model, adapter).merge_and_unload(), wide)
    return stored(wide)


def within_one_place(got: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether every value is the float64 one rounded, or its neighbour (the sum itself was formed in float32)."""
    nearest = exact.to(got.dtype)
    integers = torch.int16 if got.element_size() == 2 else torch.int32
    return int((got.view(integers).int() - nearest.view(integers).int()).abs().max()) <= 1


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm())


TIED: dict[str, dict[str, Any]] = {
    "a LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
    "a LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "LoRAs on both": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "tied LoRAs": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "a saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "a saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a saved, tied embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}  # fmt: skip


@pytest.mark.parametrize("case", TIED)
def test_tied_models_compute_what_the_unmerged_adapter_computes(case: str, tmp_path: Path) -> None:
    """Whichever end of a tied pair an adapter acts on, the merged checkpoint is the function that was trained."""
    model = make("llama-tied")
    base = save(model, tmp_path / "base")
    adapter = write_adapter(model, LoraConfig(r=4, **TIED[case]), tmp_path / "adapter")
    report = surgery.merge(base, adapter, output=tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(make("llama-tied"), adapter).eval()
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        expected = wrapped(**inputs(model)).logits
    torch.testing.assert_close(logits(merged), expected, atol=2e-6, rtol=1e-5)
    assert merged.config.tie_word_embeddings == (not report.notes)


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    """In float32 the bits are those of PEFT merging one after the other with set_scale; in bfloat16 we round once."""
    model = make("llama")
    one = write_adapter(model, LoraConfig(r=4, target_modules="all-linear"), tmp_path / "one", seed=1)
    two = write_adapter(
        model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_rslora=True), tmp_path / "two", seed=2
    )
    base = save(model, tmp_path / "base")
    surgery.merge(base, f"{one}=0.3", (two, -1.5), output=tmp_path / "ours")
    reference: Any = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter, weight in ((one, 0.3), (two, -1.5)):
            wrapped = PeftModel.from_pretrained(reference, adapter)
            module: Any
            for module in wrapped.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale("default", weight)
            reference = wrapped.merge_and_unload()
    save(reference, tmp_path / "theirs")
    assert not different(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))

    half = save(model, tmp_path / "half", torch.bfloat16)
    surgery.merge(half, f"{one}=0.3", (two, -1.5), output=tmp_path / "ours16")
    wide = {name: tensor.float() for name, tensor in stored(half).items()}
    change = {name: stored(tmp_path / "theirs")[name] - tensor for name, tensor in stored(base).items()}
    for name, tensor in stored(tmp_path / "ours16").items():
        exact = wide[name].double() + change[name].double()
        assert float((tensor.double() - exact).abs().max()) <= 2.0**-8 * float(exact.abs().max())


def test_a_tile_has_the_bits_of_the_whole_product() -> None:
    """Row tiles of 64 and more, the remainder joined to the last, for every odd shape: not one bit differs."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, rank in [
        (1000, 130, 3),
        (129, 257, 33),
        (700, 4001, 8),
        (63, 70, 5),
        (5000, 1100, 16),
        (191, 9000, 2),
    ]:
        B = torch.randn(rows, rank, generator=generator)
        A = torch.randn(rank, columns, generator=generator)
        whole = B @ A
        for begin, end in tiles(rows, columns):
            assert torch.equal(torch.mm(B[begin:end], A), whole[begin:end])
        for begin, end in tiles(columns, rows):
            assert torch.equal((B @ A[:, begin:end]).T, whole.T[begin:end])


def test_folding_the_scale_or_fusing_the_sum_would_change_bits() -> None:
    """The order of operations is not a matter of taste: both shortcuts differ from PEFT's bits."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(512, 512, generator=generator).bfloat16()
    B, A = torch.randn(512, 8, generator=generator) / 30, torch.randn(8, 512, generator=generator)
    scale = 0.7
    ours = (W.float() + (B @ A) * scale).bfloat16()
    assert not torch.equal(ours, (W.float() + (B * scale) @ A).bfloat16())
    assert not torch.equal(ours, torch.addmm(W.float(), B, A, alpha=scale).bfloat16())


def test_per_expert_adapter_onto_per_expert_checkpoint(tmp_path: Path) -> None:
    """A version-4 adapter on experts one by one merges by stored names, to the bits of adding each product."""
    model = make("mixtral")
    base = save(model, tmp_path / "base", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    expected = stored(base)
    for expert in range(4):
        for w in ("w1", "w2", "w3"):
            name = f"model.layers.1.block_sparse_moe.experts.{expert}.{w}"
            out, wide = expected[f"{name}.weight"].shape
            A, B = torch.randn(2, wide, generator=generator), torch.randn(out, 2, generator=generator) * 0.1
            tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
            expected[f"{name}.weight"] = (expected[f"{name}.weight"].float() + (B @ A) * 2.0).bfloat16()
    adapter = adapter_folder(tmp_path / "adapter", tensors, r=2, lora_alpha=4, target_modules=["w1", "w2", "w3"])
    surgery.merge(base, adapter, output=tmp_path / "merged")
    assert not different(stored(tmp_path / "merged"), expected)


def test_fused_adapter_onto_per_expert_checkpoint_is_the_same_function(tmp_path: Path) -> None:
    """A PEFT adapter on fused experts, merged into per-expert files, computes what PEFT computes unmerged."""
    model = make("mixtral")
    base = save(model, tmp_path / "base")
    adapter = write_adapter(model, LoraConfig(r=4, **EXPERTS), tmp_path / "adapter")
    surgery.merge(base, adapter, output=tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(make("mixtral"), adapter).eval()
    merged = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(logits(merged), wrapped(**inputs(model)).logits, atol=2e-6, rtol=1e-5)


def adapter_folder(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter written by hand."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def test_prefixes_are_read_as_meant(tmp_path: Path) -> None:
    """Task names onto a base-class file, bare names onto a task file, version-4 names, a multimodal prefix."""
    bert = make("bert")
    adapter = write_adapter(bert, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "task")
    surgery.merge(save(bert.bert, tmp_path / "plain"), adapter, output=tmp_path / "merged")
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = PeftModel.from_pretrained(make("bert"), adapter).eval()
    assert merged.config.num_labels == 3
    with torch.no_grad():
        torch.testing.assert_close(logits(merged), expected(**inputs(bert)).logits, atol=2e-6, rtol=1e-5)

    bare = write_adapter(bert.bert, LoraConfig(r=4, target_modules=["query"]), tmp_path / "bare")
    task = save(bert, tmp_path / "whole")
    surgery.merge(task, bare, output=tmp_path / "merged-bare")
    names = different(stored(tmp_path / "merged-bare"), stored(task))
    assert names == [f"bert.encoder.layer.{n}.attention.self.query.weight" for n in range(2)]

    vit = save(make("vit"), tmp_path / "vit")
    A, B = torch.ones(2, 32), torch.ones(32, 2)
    for number, module in enumerate(("vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj")):
        tensors = {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
        surgery.merge(
            vit, adapter_folder(tmp_path / f"v{number}", tensors, r=2, lora_alpha=2), output=tmp_path / f"vm{number}"
        )
    assert not different(stored(tmp_path / "vm0"), stored(tmp_path / "vm1"))
    assert different(stored(tmp_path / "vm0"), stored(vit)) == ["vit.encoder.layer.0.attention.attention.query.weight"]

    llama = stored(save(make("llama"), tmp_path / "llama"))
    nested = tmp_path / "nested"
    nested.mkdir()
    save_file(
        {n.replace("model.", "model.language_model.", 1): t for n, t in llama.items()}, nested / "model.safetensors"
    )
    text = write_adapter(make("llama"), LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "text")
    surgery.merge(nested, text, output=tmp_path / "nested-merged")
    surgery.merge(tmp_path / "llama", text, output=tmp_path / "llama-merged")
    got = {n.replace("model.language_model.", "model.", 1): t for n, t in stored(tmp_path / "nested-merged").items()}
    assert not different(got, stored(tmp_path / "llama-merged"))


def test_new_head_brings_its_task(tmp_path: Path) -> None:
    """A sequence classifier trained on a causal model: its head is added, class and labels are set."""
    causal = save(make("llama"), tmp_path / "base")
    config = transformers.AutoConfig.from_pretrained(causal, num_labels=5)
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification.from_pretrained(causal, config=config)
    adapter = write_adapter(
        model, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"), tmp_path / "adapter"
    )
    report = surgery.merge(causal, adapter, output=tmp_path / "merged")
    assert report.added == ("score.weight",)
    assert "The output is a LlamaForSequenceClassification." in report.notes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "merged")
        expected = PeftModel.from_pretrained(model, adapter).eval()
    assert merged.config.num_labels == 5
    tokens = {"input_ids": torch.arange(8)[None]}
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(**tokens).logits, expected(**tokens).logits, atol=2e-6, rtol=1e-5)


def test_resized_vocabulary_from_peft(tmp_path: Path) -> None:
    """PEFT saves both resized matrices; they are taken, vocab_size is set, the adapter's tokenizer is carried."""
    model = make("llama")
    base = save(model, tmp_path / "base")
    grown = make("llama")
    grown.resize_token_embeddings(101, mean_resizing=False)
    grown.config._name_or_path = str(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attach(grown, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
            tmp_path / "adapter", save_embedding_layers=True
        )
    (tmp_path / "adapter/tokenizer.json").write_text("{}")
    (tmp_path / "adapter/added_tokens.json").write_text("{}")
    report = surgery.merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    assert set(report.replaced) == {"lm_head.weight", "model.embed_tokens.weight"}
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 101
    assert {"tokenizer.json", "added_tokens.json"} <= {path.name for path in (tmp_path / "merged").iterdir()}
    theirs = merged_by_peft(
        save(grown, tmp_path / "grown"), [tmp_path / "adapter"], tmp_path / "theirs", "llama", torch.float32
    )
    assert not different(stored(tmp_path / "merged"), theirs)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(
        MismatchError, match=r"The vocabulary would differ .*'lm_head.weight' has 96, .*embed_tokens.* has 101"
    ):
        surgery.merge(base, tmp_path / "adapter", output=tmp_path / "uneven")


def test_adapter_for_another_base_is_refused_by_name(tmp_path: Path) -> None:
    """By shape and by name, every module, before any work."""
    base = save(make("llama"), tmp_path / "base")
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{x}.weight": torch.zeros(shape)
        for layer in (0, 7)
        for x, shape in (("A", (2, 48)), ("B", (32, 2)))
    }
    adapter = adapter_folder(tmp_path / "adapter", tensors, r=2, lora_alpha=2)
    with pytest.raises(MismatchError) as caught:
        surgery.merge(base, adapter, output=tmp_path / "merged")
    first, second = caught.value.problems
    assert "the factors of 'model.layers.0.self_attn.q_proj' are [2, 48] and [32, 2]" in first
    assert "has a weight of [32, 32] there; is it the adapter's base?" in first
    assert "has no module 'model.layers.7.self_attn.q_proj'; is it the adapter's base?" in second
    assert not (tmp_path / "merged").exists()


def test_rounding_report(tmp_path: Path) -> None:
    """What survived is measured: all of it in float32, nearly none of a tiny change in bfloat16."""
    model = make("llama")
    adapter = write_adapter(model, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter", scale=0.02)
    base, half = save(model, tmp_path / "base"), save(model, tmp_path / "half", torch.bfloat16)
    full = surgery.merge(base, adapter, output=tmp_path / "m32")
    lossy = surgery.merge(half, (adapter, 0.01), output=tmp_path / "m16")
    assert full.survived == pytest.approx(1.0, abs=1e-3)
    before, after = stored(half), stored(tmp_path / "m16")
    wide = {n: stored(tmp_path / "m32")[n].double() - t.double() for n, t in stored(base).items()}
    for weight in lossy.weights:
        delta = 0.01 * wide[weight.name]
        realised = after[weight.name].double() - before[weight.name].double()
        assert weight.survived == pytest.approx(1 - float((realised - delta).norm() / delta.norm()), abs=0.02)
        assert weight.unchanged_share == pytest.approx(float((realised == 0).double().mean()), abs=1e-9)
    assert lossy.survived is not None
    assert lossy.survived < 0.3
    assert full.notes == ()
    (note,) = lossy.notes
    assert note.startswith("Most of the change was lost to rounding")
    assert json.loads((tmp_path / "m16/surgery.json").read_bytes())["report"]["notes"] == [note]


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_nonfinite_values_are_named(where: str, tmp_path: Path) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base", torch.bfloat16)
    adapter = write_adapter(model, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    name = {
        "base": "model.layers.1.self_attn.q_proj.weight",
        "adapter": "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
    }[where]
    path = {"base": base / "model.safetensors", "adapter": adapter / "adapter_model.safetensors"}[where]
    tensors = load_file(path)
    tensors[name][1, 1] = math.inf
    save_file(tensors, path)
    with pytest.raises(
        NonFiniteError, match=rf"Tensor '{name}' in .* holds NaN or infinity; mend it, or pass --allow-nonf"
    ):
        surgery.merge(base, adapter, output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    surgery.merge(base, adapter, output=tmp_path / "merged", allow_nonfinite=True)


def test_overflow_of_the_dtype_is_named(tmp_path: Path) -> None:
    model = make("llama")
    base = save(model, tmp_path / "base", torch.float16)
    adapter = write_adapter(model, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter", scale=1.0)
    with pytest.raises(
        NonFiniteError, match=r"The merged weights of 'model\..*q_proj.weight' exceed the range of F16; lower"
    ):
        surgery.merge(base, (adapter, 1e6), output=tmp_path / "merged")


def test_weights_in_float8_merge_and_come_back(tmp_path: Path) -> None:
    """A plain float8 tensor is added to in float32 and rounded once to float8."""
    model = make("llama")
    base = save(model, tmp_path / "base", torch.bfloat16)
    path = base / "model.safetensors"
    tensors = {n: t.to(torch.float8_e4m3fn) if "q_proj" in n else t for n, t in load_file(path).items()}
    save_file(tensors, path)
    adapter = write_adapter(model, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    surgery.merge(base, adapter, output=tmp_path / "merged", reversible=True)
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in stored(tmp_path / "merged").items():
        expected = tensors[name]
        if "q_proj" in name:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            expected = (expected.float() + (factors[f"{key}B.weight"] @ factors[f"{key}A.weight"]) * 2.0).to(
                torch.float8_e4m3fn
            )
        assert same_bits(tensor, expected), name
    surgery.subtract(tmp_path / "merged", output=tmp_path / "back")
    assert not different(stored(tmp_path / "back"), tensors)


def test_layouts(tmp_path: Path) -> None:
    """Shards stay as they were, or are split anew; a .bin becomes safetensors; every other file is carried along."""
    model = make("llama")
    adapter = write_adapter(model, LoraConfig(r=4, target_modules="all-linear"), tmp_path / "adapter")
    one = save(model, tmp_path / "one", torch.bfloat16)
    many = save(model, tmp_path / "many", torch.bfloat16, max_shard_size="15KB")
    (many / "LICENSE").write_text("text")
    expected = None
    for number, (base, shard_bytes) in enumerate([(one, None), (many, None), (one, 9_000), (many, 10**9)]):
        out = tmp_path / f"out{number}"
        surgery.merge(base, adapter, output=out, shard_bytes=shard_bytes)
        expected = expected or stored(out)
        assert not different(stored(out), expected)
        transformers.LlamaForCausalLM.from_pretrained(out)
    assert (tmp_path / "out1/LICENSE").read_text() == "text"
    assert {p.name for p in (tmp_path / "out1").iterdir()} == {p.name for p in many.iterdir()} | {"surgery.json"}
    assert len(list((tmp_path / "out2").glob("*.safetensors"))) > 3
    assert [p.name for p in (tmp_path / "out3").glob("*.safetensors")] == ["model.safetensors"]
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    torch.save(load_file(one / "model.safetensors"), legacy / "pytorch_model.bin")
    (legacy / "config.json").write_text((one / "config.json").read_text())
    surgery.merge(legacy, adapter, output=tmp_path / "from-bin")
    assert expected is not None
    assert not different(stored(tmp_path / "from-bin"), expected)


def test_untouched_tensors_of_every_dtype_move_as_bytes(tmp_path: Path) -> None:
    """An architecture nobody has a table for, with integers, booleans and float64 beside bfloat16."""
    base, tuned = invent(tmp_path / "base"), invent(tmp_path / "tuned", delta=1.0)
    surgery.extract(base, tuned, output=tmp_path / "adapter", targets="widen", rank=4)
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    names = different(stored(tmp_path / "merged"), stored(base))
    assert names == [f"trunk.stage.{layer}.widen.weight" for layer in range(2)]


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    base = save(make("llama"), tmp_path / "base")
    adapter = write_adapter(make("llama"), LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    with pytest.raises(OptionError, match="No adapter is given"):
        surgery.merge(base, output=tmp_path / "out")
    with pytest.raises(OptionError, match="--no-hash and --reversible exclude each other: the record proves the base"):
        surgery.merge(base, adapter, output=tmp_path / "out", reversible=True, hash=False)
    with pytest.raises(OptionError, match="--shard-size is 0 bytes"):
        surgery.merge(base, adapter, output=tmp_path / "out", shard_bytes=0)


def test_extraction_of_a_merge_is_the_adapter_again(tmp_path: Path) -> None:
    """Extract what was merged in float32: the product of the factors is the adapter's, to float32."""
    model = make("llama")
    base = save(model, tmp_path / "base")
    adapter = write_adapter(model, LoraConfig(r=4, target_modules="all-linear"), tmp_path / "adapter")
    surgery.merge(base, adapter, output=tmp_path / "merged")
    report = surgery.extract(base, tmp_path / "merged", output=tmp_path / "again", rank=4, any_base=True)
    assert report.error < 1e-4
    left, right = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(tmp_path / "again/adapter_model.safetensors"),
    )
    for name in [n for n in left if "lora_A" in n]:
        other = name.replace("lora_A", "lora_B")
        expected = 2.0 * left[other] @ left[name]
        torch.testing.assert_close(right[other] @ right[name], expected, atol=1e-5, rtol=0)


def test_an_alpha_pattern_for_a_parameter(tmp_path: Path) -> None:
    """target_parameters may name a linear layer's weight; PEFT's key is then the parameter's name."""
    settings = {"target_modules": [], "target_parameters": ["q_proj.weight"], "alpha_pattern": {"q_proj.weight": 5}}
    ours, theirs, base, _ = merge_both(tmp_path, "llama", torch.float32, settings)
    assert different(ours, stored(base))
    assert not different(ours, theirs)


def test_transposed_weights_of_an_unknown_family(tmp_path: Path) -> None:
    """Nobody's table has the family: the biases, and the adapter's fan_in_fan_out, say which way its weights lie."""
    ours, _, base, adapter = merge_both(
        tmp_path, "gpt2", torch.float32, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "decision_transformer"}))
    surgery.merge(base, adapter, output=tmp_path / "unknown")
    assert not different(stored(tmp_path / "unknown"), ours)
    path = base / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if not n.endswith("c_attn.bias")}, path, {"format": "pt"})
    surgery.merge(base, adapter, output=tmp_path / "flagged")
    assert not different({**ours, **stored(tmp_path / "flagged")}, ours)
