"""Extraction: the factors against numpy in float64, the adapter in PEFT against the fine-tune itself."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import surgery
from surgery.checkpoint import open_checkpoint
from surgery.errors import MismatchError, NonFiniteError, OptionError, UnsupportedError
from surgery.sites import Kind, find_sites
from tests.models import FAMILIES, PROMISED, inputs, invent, is_linear, logits, make, perturb, save
from tests.peft_tools import different, stored


def pair(tmp_path: Path, family: str = "llama", dtype: torch.dtype | None = None, **tuning: Any) -> tuple[Path, Path]:
    """A base and a fine-tune of it on disk."""
    base = make(family)
    tuned = perturb(base, **{"where": is_linear, **tuning})
    return save(base, tmp_path / "base", dtype), save(tuned, tmp_path / "tuned", dtype)


def in_peft(base: Path, adapter: Path, family: str) -> Any:
    """The base with the adapter, loaded by PEFT, which must not miss or ignore a tensor."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = getattr(transformers, FAMILIES[family][0]).from_pretrained(base, dtype=torch.float32)
        wrapped = PeftModel.from_pretrained(model, adapter).eval()
    found = [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    assert not found
    return wrapped


def agree(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal but for float32 rounding in a tiny model's forward pass."""
    return float((left - right).abs().max()) <= 4e-6 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_adapter_is_the_fine_tune_in_peft(family: str, tmp_path: Path) -> None:
    """For every family PEFT loads the adapter whole, and base + adapter computes what the fine-tune computes."""
    base, tuned = pair(tmp_path, family, scale=0.3)
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", rank=64)
    assert report.error < 2e-6
    assert not report.residual
    wrapped = in_peft(base, tmp_path / "adapter", family)
    model = getattr(transformers, FAMILIES[family][0]).from_pretrained(tuned)
    with torch.no_grad():
        got = wrapped(**inputs(model)).logits
    expected = logits(model)
    assert not agree(logits(make(family)), expected)
    assert agree(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_makes_the_adapter_complete(family: str, tmp_path: Path) -> None:
    """With --save-residual PEFT gets norms, biases, embeddings, heads and bare parameters too, tied or not."""
    base = make(family)
    tuned = perturb(base, scale=0.3)
    with torch.no_grad():
        for number, (_, parameter) in enumerate(tuned.named_parameters()):
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.sin(torch.arange(parameter.numel()) + number))
    folders = save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    report = surgery.extract(*folders, output=tmp_path / "adapter", rank=64, save_residual=True)
    assert all(item.saved for item in report.residual)
    wrapped = in_peft(folders[0], tmp_path / "adapter", family)
    model = getattr(transformers, FAMILIES[family][0]).from_pretrained(folders[1])
    with torch.no_grad():
        assert agree(wrapped(**inputs(model)).logits, logits(model))
    surgery.merge(folders[0], tmp_path / "adapter", output=tmp_path / "merged")
    merged = getattr(transformers, FAMILIES[family][0]).from_pretrained(tmp_path / "merged")
    assert agree(logits(merged), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["randomized", "exact"])
def test_factors_are_the_best_of_their_rank(dtype: torch.dtype, method: str, tmp_path: Path) -> None:
    """Every module's stored factors, and the error reported for them, are numpy's in float64."""
    base, tuned = pair(tmp_path, "llama", dtype, scale=0.2)
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", rank=5, method=method)
    adapter, old, new = load_file(tmp_path / "adapter/adapter_model.safetensors"), stored(base), stored(tuned)
    for module in report.modules:
        delta = new[f"{module.name}.weight"].double().numpy() - old[f"{module.name}.weight"].double().numpy()
        A, B = (adapter[f"base_model.model.{module.name}.lora_{x}.weight"].double().numpy() for x in "AB")
        least = math.sqrt(float(np.sum(np.linalg.svd(delta, compute_uv=False)[5:] ** 2)))
        error, norm = float(np.linalg.norm(delta - B @ A)), float(np.linalg.norm(delta))
        assert error <= least * 1.0001 + 1e-6 * norm
        assert module.error == pytest.approx(error / norm, rel=1e-4)
        assert module.energy_kept == pytest.approx(1 - (error / norm) ** 2, abs=1e-6)
        base_norm = float(old[f"{module.name}.weight"].double().norm())
        assert module.change == pytest.approx(norm / base_norm, rel=1e-4)


def test_experts_are_factored_one_by_one(tmp_path: Path) -> None:
    """In a fused stack each expert's factors are the best for that expert: gate over up, experts interleaved in B."""
    base, tuned = pair(tmp_path, "mixtral", scale=0.2)
    surgery.extract(base, tuned, output=tmp_path / "adapter", rank=3, targets="experts")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    old, new = stored(base), stored(tuned)
    prefix, module = "model.layers.1.block_sparse_moe.experts", "base_model.model.model.layers.1.mlp.experts"
    A, B = (adapter[f"{module}.base_layer.lora_{x}.weight"] for x in "AB")
    for expert in range(4):
        delta = torch.cat(
            [new[f"{prefix}.{expert}.{w}.weight"] - old[f"{prefix}.{expert}.{w}.weight"] for w in ("w1", "w3")]
        )
        product = B[:, expert::4].double() @ A[3 * expert : 3 * expert + 3].double()
        least = torch.linalg.svdvals(delta.double())[3:].norm()
        assert float((delta.double() - product).norm()) <= float(least) * 1.0001


def test_invented_architecture_needs_no_table(tmp_path: Path) -> None:
    """Stored names and shapes are enough: linear layers and a stack of experts, types side by side, files carried."""
    base, tuned = invent(tmp_path / "base"), invent(tmp_path / "tuned", delta=1.0)
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", rank=64)
    names = {module.name for module in report.modules}
    assert "trunk.stage.0.mixer.into" in names
    assert "trunk.stage.1.expert_bank.experts" in names
    assert "reader" not in names
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    assert not different(stored(tmp_path / "merged"), stored(tuned))
    assert (tmp_path / "merged/notes.txt").read_text() == "carried along\n"


@pytest.mark.parametrize("family", PROMISED)
def test_extract_then_merge_gives_the_fine_tune_back_in_bfloat16(family: str, tmp_path: Path) -> None:
    """At full rank the rounding of the merge lands on the fine-tune's own bits, nearly everywhere."""
    base, tuned = pair(tmp_path, family, torch.bfloat16, scale=0.3)
    surgery.extract(base, tuned, output=tmp_path / "adapter", rank=64)
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    got, expected = stored(tmp_path / "merged"), stored(tuned)
    total = sum(tensor.numel() for tensor in expected.values())
    wrong = sum(int((got[name] != expected[name]).sum()) for name in expected)
    # float32 factors miss dW by 1e-6 of its size, which is more than half the spacing of a weight 4000 times smaller.
    assert wrong <= 1e-3 * total


def test_energy_and_budget_choose_ranks(tmp_path: Path) -> None:
    """--energy reaches its share in every module with no rank to spare; --budget spends what it is given."""
    base, tuned = pair(tmp_path, "llama", scale=0.3)
    report = surgery.extract(base, tuned, output=tmp_path / "energy", energy=0.8)
    old, new = stored(base), stored(tuned)
    for module in report.modules:
        delta = new[f"{module.name}.weight"].double() - old[f"{module.name}.weight"].double()
        energies = torch.linalg.svdvals(delta) ** 2
        kept = float(energies[: module.rank].sum() / energies.sum())
        assert kept >= 0.8 - 1e-6
        assert float(energies[: module.rank - 1].sum() / energies.sum()) < 0.8
    spent = surgery.extract(base, tuned, output=tmp_path / "budget", budget=4000)
    assert 4000 - 144 < spent.parameters <= 4000
    uniform = surgery.extract(base, tuned, output=tmp_path / "uniform", rank=3)
    dearer = surgery.extract(base, tuned, output=tmp_path / "same", budget=uniform.parameters)
    assert dearer.error <= uniform.error * (1 + 1e-6)


def test_a_bound_that_costs_energy_is_noted(tmp_path: Path) -> None:
    """--max-rank wins over --energy, and the report counts where; without loss there is no note."""
    base, tuned = pair(tmp_path, "llama", scale=0.3)
    bounded = surgery.extract(base, tuned, output=tmp_path / "bounded", energy=0.999, max_rank=1)
    short = sum(module.energy_kept < 0.999 for module in bounded.modules)
    assert short > 1
    assert bounded.notes == (f"--max-rank kept {short} modules below --energy 0.999.",)
    free = surgery.extract(base, tuned, output=tmp_path / "free", energy=0.5, max_rank=32)
    assert free.notes == ()


def test_mixed_ranks_load_in_peft(tmp_path: Path) -> None:
    """Fully qualified rank_pattern, one alpha, scales folded into B: the same function in PEFT."""
    base, tuned = pair(tmp_path, "llama", scale=0.3)
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", energy=0.9)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert len(set(config["rank_pattern"].values())) > 1
    assert config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert all(name.startswith("model.layers.") for name in config["rank_pattern"])
    merged = in_peft(base, tmp_path / "adapter", "llama").merge_and_unload()
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    ours = stored(tmp_path / "merged")
    assert report.error > 0.1
    assert not different(ours, {name: p.detach() for name, p in merged.state_dict().items()})


def test_bfloat16_factors_are_refitted(tmp_path: Path) -> None:
    """Half the bytes, an error measured on the rounded factors, and less of it than rounding both gives."""
    base, tuned = pair(tmp_path, "llama", scale=0.3, rank=4)
    full = surgery.extract(base, tuned, output=tmp_path / "f32", rank=4)
    half = surgery.extract(base, tuned, output=tmp_path / "bf16", rank=4, dtype="bfloat16")
    assert half.nbytes < 0.6 * full.nbytes
    wide, narrow = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("f32", "bf16"))
    old, new = stored(base), stored(tuned)
    for module in half.modules:
        key = f"base_model.model.{module.name}.lora_"
        delta = new[f"{module.name}.weight"].double() - old[f"{module.name}.weight"].double()
        got = float((delta - narrow[f"{key}B.weight"].double() @ narrow[f"{key}A.weight"].double()).norm())
        rounded = (wide[f"{key}{x}.weight"].bfloat16().double() for x in "BA")
        naive = float((delta - next(rounded) @ next(rounded)).norm())
        assert narrow[f"{key}A.weight"].dtype == torch.bfloat16
        assert got < naive
        assert module.error == pytest.approx(got / float(delta.norm()), rel=1e-3)


def test_unchanged_modules_have_no_factors(tmp_path: Path) -> None:
    """Only what changed is stored, and the config names exactly that, though the suffixes occur elsewhere."""
    base, tuned = pair(tmp_path, "llama", where=lambda name: "layers.1.self_attn.q_proj" in name)
    report = surgery.extract(base, tuned, output=tmp_path / "adapter")
    assert [module.name for module in report.modules] == ["model.layers.1.self_attn.q_proj"]
    assert report.unchanged == 13
    assert len(load_file(tmp_path / "adapter/adapter_model.safetensors")) == 2
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["1.self_attn.q_proj"]
    in_peft(base, tmp_path / "adapter", "llama")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        (r"re:.*layers\.0\.(self_attn\.q|mlp\.up)_proj", {"q_proj", "up_proj"}),
        ("attention,down_proj", {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}),
        ("embeddings,head", {"embed_tokens", "lm_head"}),
    ],
)
def test_targets(targets: str, expected: set[str], tmp_path: Path) -> None:
    """Words, suffixes and patterns; what changed and is not targeted is residual."""
    base, tuned = pair(tmp_path, "llama", where=lambda name: True)
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", targets=targets, rank=8)
    assert {module.name.rpartition(".")[2] for module in report.modules} == expected
    factored = {module.name for module in report.modules}
    left = {item.name.removesuffix(".weight") for item in report.residual}
    sites = {site.name for site in find_sites(open_checkpoint(base)).values()}
    assert left == sites - factored
    in_peft(base, tmp_path / "adapter", "llama")


def test_embeddings_and_convolutions_take_factors_too(tmp_path: Path) -> None:
    """Named as targets, they get factors in PEFT's own shapes, and PEFT computes the fine-tune."""
    base, tuned = pair(
        tmp_path, "vit", where=lambda name: "projection" in name or "query" in name or "q_proj" in name, scale=0.3
    )
    surgery.extract(base, tuned, output=tmp_path / "adapter", targets="convolutions,attention", rank=64)
    model = transformers.ViTForImageClassification.from_pretrained(tuned)
    with torch.no_grad():
        assert agree(in_peft(base, tmp_path / "adapter", "vit")(**inputs(model)).logits, logits(model))
    base, tuned = pair(
        tmp_path / "text", "opt", where=lambda name: "embed_positions" in name or "q_proj" in name, scale=0.3
    )
    surgery.extract(base, tuned, output=tmp_path / "text/adapter", targets="embeddings,q_proj", rank=64)
    found = load_file(tmp_path / "text/adapter/adapter_model.safetensors")
    assert any("lora_embedding_A" in name for name in found)
    surgery.merge(base, tmp_path / "text/adapter", output=tmp_path / "text/merged")
    merged = transformers.OPTForCausalLM.from_pretrained(tmp_path / "text/merged")
    assert agree(logits(merged), logits(transformers.OPTForCausalLM.from_pretrained(tuned)))


def test_file_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    """The adapter's file is byte for byte what safetensors writes for the same tensors."""
    base, tuned = pair(tmp_path)
    surgery.extract(base, tuned, output=tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file(load_file(path), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_prefix_of_a_file_saved_from_the_base_class(tmp_path: Path) -> None:
    """A GPT-2 stored without `transformer.` gives an adapter that fits GPT2LMHeadModel; so does BERT's."""
    base, tuned = pair(tmp_path, "gpt2", scale=0.3)
    for folder in (base, tuned):
        path = folder / "model.safetensors"
        save_file(
            {name.removeprefix("transformer."): t for name, t in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )
    surgery.extract(base, tuned, output=tmp_path / "adapter", rank=64)
    model = transformers.GPT2LMHeadModel.from_pretrained(tuned)
    with torch.no_grad():
        assert agree(in_peft(base, tmp_path / "adapter", "gpt2")(**inputs(model)).logits, logits(model))

    whole = make("bert")
    task = save(perturb(whole, where=is_linear), tmp_path / "bert-task")
    plain = save(whole.bert, tmp_path / "bert-base")
    report = surgery.extract(plain, task, output=tmp_path / "bert", save_residual=True)
    assert {module.name.split(".")[0] for module in report.modules} == {"bert"}
    assert [item.name for item in report.residual] == ["classifier.bias", "classifier.weight"]
    in_peft(task, tmp_path / "bert", "bert")


def test_vocabulary_that_grew(tmp_path: Path) -> None:
    """It is refused by name, or stored whole with the tokenizer; merging takes matrices, size and tokenizer."""
    base = make("llama")
    tuned = perturb(base, where=is_linear)
    tuned.resize_token_embeddings(103, mean_resizing=False)
    folders = save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    (folders[0] / "tokenizer.json").write_text("{}")
    (folders[1] / "tokenizer.json").write_text('{"new": true}')
    with pytest.raises(MismatchError) as caught:
        surgery.extract(*folders, output=tmp_path / "adapter")
    assert len(caught.value.problems) == 2
    assert "The vocabulary of 'lm_head.weight' went from 96 to 103 rows" in "\n".join(caught.value.problems)
    assert "--save-residual" in caught.value.problems[0]
    surgery.extract(*folders, output=tmp_path / "adapter", rank=64, save_residual=True)
    surgery.merge(folders[0], tmp_path / "adapter", output=tmp_path / "merged")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 103
    assert agree(logits(merged), logits(tuned))
    assert (tmp_path / "merged/tokenizer.json").read_text() == '{"new": true}'


def test_tied_head_stored_on_one_side_only_is_no_difference(tmp_path: Path) -> None:
    """A fine-tune saved with its tied head beside a base without it pairs completely."""
    base, tuned = pair(tmp_path, "llama-tied")
    path = tuned / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, metadata={"format": "pt"}
    )
    report = surgery.extract(base, tuned, output=tmp_path / "adapter")
    assert not report.residual
    assert not report.notes


def test_everything_that_does_not_fit_is_named_before_any_work(tmp_path: Path) -> None:
    """Missing tensors on either side and wrong shapes, all in one error, and nothing at the target."""
    base, tuned = pair(tmp_path)
    path = base / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.input_layernorm.weight"]
    tensors["model.extra.weight"] = torch.zeros(3, 3)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(7, 32)
    save_file(tensors, path)
    with pytest.raises(MismatchError) as caught:
        surgery.extract(base, tuned, output=tmp_path / "adapter")
    said = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "'model.extra.weight' is in BASE and not in TUNED; pass --allow-missing" in said
    assert "'model.layers.0.input_layernorm.weight' is in TUNED and not in BASE; pass --save-residual" in said
    assert "'model.layers.1.mlp.up_proj.weight' has shape [7, 32] in BASE and [48, 32] in TUNED" in said
    assert not (tmp_path / "adapter").exists()


def test_missing_tensors_may_pass(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    path = tuned / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", allow_missing=True)
    assert report.notes == ("Tensor 'lm_head.weight' is in BASE and not in TUNED.",)


def test_unrelated_models_are_refused(tmp_path: Path) -> None:
    """Weights that do not point the same way are no base and fine-tune, unless one insists."""
    base, other = save(make("llama"), tmp_path / "base"), save(make("llama", seed=9), tmp_path / "other")
    with pytest.raises(
        MismatchError, match=r"other does not look like a fine-tune of .*base: .* cosine of -?0\.\d\d, expected"
    ):
        surgery.extract(base, other, output=tmp_path / "adapter")
    surgery.extract(base, other, output=tmp_path / "adapter", any_base=True)


def test_equal_checkpoints_have_nothing_to_extract(tmp_path: Path) -> None:
    base = save(make("llama"), tmp_path / "base")
    twin = save(make("llama"), tmp_path / "twin")
    with pytest.raises(MismatchError, match=r"twin equals .*base in every weight that was to be factored"):
        surgery.extract(base, twin, output=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert not list(tmp_path.glob(".adapter*"))


@pytest.mark.parametrize("side", ["BASE", "TUNED"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_weights_are_named(side: str, value: float, tmp_path: Path) -> None:
    """NaN or infinity names the role, the tensor and the file; allowed, it counts as no change."""
    base, tuned = pair(tmp_path)
    path = (base if side == "BASE" else tuned) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, path)
    with pytest.raises(
        NonFiniteError, match=rf"{side}: tensor 'model.layers.1.mlp.up_proj.weight' in .* holds NaN or infin"
    ):
        surgery.extract(base, tuned, output=tmp_path / "adapter")
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", allow_nonfinite=True, rank=64)
    assert report.error < 1e-5


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedError, match=r"tuned is quantised \(quantization_config with quant_method 'gptq'\)"):
        surgery.extract(base, tuned, output=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 4, "energy": 0.5}, "--rank and --energy exclude each other"),
        ({"rank": 0}, "--rank is 0, expected at least 1"),
        ({"energy": 1.5}, "--energy is 1.5, expected a share above 0 and at most 1"),
        ({"method": "magic"}, "--method is 'magic', expected 'randomized' or 'exact'"),
        ({"dtype": "int8"}, "--dtype is 'int8', expected 'float32' or 'bfloat16'"),
        ({"max_rank": 2}, r"--max-rank bounds the ranks of --energy and --budget; give one of them\."),
        ({"max_rank": 2, "rank": 4}, "--max-rank bounds the ranks of --energy and --budget"),
        ({"targets": ""}, r"--targets is empty; name all-linear, attention, mlp, .*, a suffix such as q_proj, or re:"),
        ({"targets": " , "}, "--targets is empty"),
        ({"targets": "experts"}, "--targets names 'experts', which matches no module of"),
        ({"budget": 3}, r"--budget is 3, below the \d+ parameters of the smallest module at rank 1"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    with pytest.raises(OptionError, match=sentence):
        surgery.extract(base, tuned, output=tmp_path / "adapter", **options)


def test_unknown_targets_are_named_with_what_there_is(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    with pytest.raises(
        OptionError,
        match=r"--targets names 'qproj', which matches no module of .*; name all-linear, attention, mlp, .*, or "
        r"re:PATTERN; the suffixes are .*q_proj, .*v_proj\.",
    ):
        surgery.extract(base, tuned, output=tmp_path / "adapter", targets="qproj,v_proj")
    with pytest.raises(OptionError, match="2 problems with --targets") as caught:
        surgery.extract(base, tuned, output=tmp_path / "adapter", targets="qproj,v_proj,vproj")
    assert len(caught.value.problems) == 2


def test_dry_run_reads_no_data_and_writes_nothing(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", dry_run=True)
    assert report.dry_run
    assert report.plan.read_bytes == sum(t.nbytes for c in (base, tuned) for t in open_checkpoint(c).tensors.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_pair_in_different_layouts(tmp_path: Path) -> None:
    """Shards against a single file, bfloat16 against float32, fused experts against experts one by one."""
    base, tuned = make("mixtral"), perturb(make("mixtral"), where=is_linear, scale=0.3)
    one, many = save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned", max_shard_size="20KB")
    plain = surgery.extract(one, many, output=tmp_path / "plain", rank=64)
    tensors = stored(one)
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(2):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        parts = {w: torch.stack([tensors[f"{prefix}.{e}.{w}.weight"] for e in range(4)]) for w in ("w1", "w2", "w3")}
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([parts["w1"], parts["w3"]], dim=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = parts["w2"].contiguous()
    (tmp_path / "fused").mkdir()
    save_file(fused, tmp_path / "fused/model.safetensors")
    (tmp_path / "fused/config.json").write_text((one / "config.json").read_text())
    other = surgery.extract(tmp_path / "fused", many, output=tmp_path / "other", rank=64)
    assert [m.name for m in other.modules] == [m.name for m in plain.modules]
    left, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "other"))
    assert not different(left, right)


def test_kinds_of_sites_reach_peft_under_their_own_names(tmp_path: Path) -> None:
    """Routers and experts become target_parameters, everything else target_modules."""
    base, tuned = pair(tmp_path, "qwen2_moe", where=lambda name: True)
    surgery.extract(base, tuned, output=tmp_path / "adapter", targets="experts,router,attention")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    sites = find_sites(open_checkpoint(base)).values()
    expected = sorted(site.name for site in sites if site.kind is Kind.PARAMETER)
    assert sorted(config["target_parameters"]) == expected
    assert set(config["target_modules"]) >= {"q_proj", "k_proj", "v_proj", "o_proj"}


def wide_pair(tmp_path: Path, changed: list[str], dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """Matrices much larger than the sketch of rank 8, of which only some change."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"m.{name}.weight": torch.randn(160, 200, generator=generator) for name in ("a", "b", "c")}
    for expert in range(4):
        tensors[f"m.experts.{expert}.up_proj.weight"] = torch.randn(120, 144, generator=generator)
    tuned = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) if name in changed else tensor
        for name, tensor in tensors.items()
    }
    for folder, content in (("base", tensors), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file({name: t.to(dtype) for name, t in content.items()}, tmp_path / folder / "model.safetensors")
    return tmp_path / "base", tmp_path / "tuned"


@pytest.mark.parametrize(
    "options", [{"rank": 8}, {"energy": 0.5}, {"budget": 10_000}, {"rank": 8, "dtype": "bfloat16"}], ids=str
)
def test_a_large_module_that_did_not_change_gets_no_factors(options: dict[str, Any], tmp_path: Path) -> None:
    """As in every partial fine-tune; and the others are unaffected."""
    base, tuned = wide_pair(tmp_path, ["m.b.weight", "m.experts.2.up_proj.weight"])
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", **options)
    names = [module.name for module in report.modules]
    assert names == ["m.b", "m.experts.2.up_proj"]
    assert report.unchanged == 5
    assert all(0 < module.error < 1 for module in report.modules)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_of_a_stack_that_did_not_change_has_zero_factors(dtype: str, tmp_path: Path) -> None:
    """Two of four experts changed, in matrices larger than the sketch: the others come out as they were."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(4, 120, 144, generator=generator)
    tuned = stack.clone()
    tuned[1::2] += 0.1 * torch.randn(2, 120, 2, generator=generator) @ torch.randn(2, 2, 144, generator=generator)
    for folder, values in (("base", stack), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file({"layers.0.mlp.experts.down_proj": values}, tmp_path / folder / "model.safetensors")
    report = surgery.extract(tmp_path / "base", tmp_path / "tuned", output=tmp_path / "adapter", rank=2, dtype=dtype)
    assert report.error < (1e-2 if dtype == "bfloat16" else 1e-5)
    surgery.merge(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "merged")
    merged = stored(tmp_path / "merged")["layers.0.mlp.experts.down_proj"]
    assert torch.equal(merged[::2], stack[::2])


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "mixtral", "vit"])
@pytest.mark.parametrize("lone", ["base", "tuned", "both"])
def test_a_lone_file_pairs_with_a_folder(family: str, lone: str, tmp_path: Path) -> None:
    """A file without its config is read as what the other one is; two of them by names and shapes."""
    base, tuned = pair(tmp_path, family)
    expected = surgery.extract(base, tuned, output=tmp_path / "expected", rank=4)
    if lone in ("base", "both"):
        base = Path(shutil.copy(base / "model.safetensors", tmp_path / "b.safetensors"))
    if lone in ("tuned", "both"):
        tuned = Path(shutil.copy(tuned / "model.safetensors", tmp_path / "t.safetensors"))
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", rank=4)
    if lone == "both":
        assert len(report.modules) >= len(expected.modules)
        return
    assert report.modules == expected.modules
    ours, theirs = (stored(tmp_path / name) for name in ("adapter", "expected"))
    assert different(ours, theirs) == []


def test_transposed_weights_are_told_by_their_biases(tmp_path: Path) -> None:
    """GPT-2's weights without any config: the orientation is that of the table."""
    base, tuned = pair(tmp_path, "gpt2")
    for folder in (base, tuned):
        (folder / "config.json").unlink()
    surgery.extract(base, tuned, output=tmp_path / "adapter", rank=64)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    found = stored(tmp_path / "adapter")
    assert found["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape[1] == 32
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    for name, tensor in stored(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, stored(tuned)[name], atol=1e-6, rtol=1e-6)


def test_a_module_whose_name_ends_another_keeps_its_rank(tmp_path: Path) -> None:
    """PEFT takes a key of rank_pattern for the end of a name; here it must mean one module only."""

    class Inner(torch.nn.Module):
        def __init__(self, side: int) -> None:
            super().__init__()
            self.proj = torch.nn.Linear(side, side, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.proj(x)
            return out

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = Inner(40)
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"x": Inner(40)})])

    torch.manual_seed(0)
    model, tuned = Outer(), Outer()
    change = {"x.proj.weight": 2, "layers.0.x.proj.weight": 12}
    state = model.state_dict()
    for name, rank in change.items():
        state[name] = state[name] + torch.randn(40, rank) @ torch.randn(rank, 40) / 40
    for folder, values in (("base", model.state_dict()), ("tuned", state)):
        (tmp_path / folder).mkdir()
        save_file(values, tmp_path / folder / "model.safetensors")
    surgery.extract(tmp_path / "base", tmp_path / "tuned", output=tmp_path / "adapter", energy=0.999999, any_base=True)
    tuned.load_state_dict(model.state_dict())
    wrapped = PeftModel.from_pretrained(tuned, str(tmp_path / "adapter"))
    ranks = {name: module.r["default"] for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}
    assert sorted(ranks.values()) == [2, 12]


def test_a_residual_that_is_no_number_is_named(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"'model\.norm\.weight' holds NaN or infinity, in BASE or in TUNED"):
        surgery.extract(base, tuned, output=tmp_path / "adapter")
    surgery.extract(base, tuned, output=tmp_path / "adapter", allow_nonfinite=True)


def test_a_dry_run_refuses_what_the_run_refuses(tmp_path: Path) -> None:
    base, unrelated = save(make("llama"), tmp_path / "base"), save(make("llama", seed=9), tmp_path / "unrelated")
    with pytest.raises(MismatchError, match="does not look like a fine-tune"):
        surgery.extract(base, unrelated, output=tmp_path / "adapter", dry_run=True)
