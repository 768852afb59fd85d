"""`upcycle --kind lora`: routed LoRA experts over one frozen MLP, in a small file beside the dense model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import surgery
from surgery import moe
from surgery.checkpoint import open_checkpoint
from surgery.cli.formats import number
from surgery.errors import InputError, UnsupportedError
from surgery.moe.modeling_upcycled import ROUTED_LORA_FILE, routed_lora_tensors
from surgery.moe_families import UPCYCLED_FAMILIES
from surgery.upcycling.routed_lora import where_base_is
from tests.surgery.upcycling.dense import inputs, logits, make, relative, stored, upcycled
from tests.tools import read_json, run_cli, unequal

FAMILIES = (
    *("vit", "t5", "t5-gated", "gpt2", "gpt_neox", "phi", "gemma", "gemma2", "gemma3_text", "llama", "llama-biased"),
    *("llama-tied", "mistral", "qwen2", "qwen3"),
)


def small(tmp_path: Path, name: str = "llama", **options: Any) -> Path:
    """Routed LoRA experts of rank 2 beside their base."""
    upcycled(stored(tmp_path, name), tmp_path / "lora", kind="lora", **{"rank": 2, "experts": 4, **options})
    return tmp_path / "lora"


@pytest.mark.parametrize("name", FAMILIES)
def test_it_starts_as_the_dense_model(tmp_path: Path, name: str) -> None:
    """Loaded by the name of its base, for every family; and saved again it has the same names, shapes and bits."""
    folder = small(tmp_path, name)
    model = moe.load_routed_lora(None, folder).eval()
    assert relative(logits(model), logits(make(name))) < 1e-6
    moe.save_routed_lora(model, tmp_path / "again", f"../{name}-float32")
    before, after = (load_file(place / ROUTED_LORA_FILE) for place in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert (
        read_json(folder / "config.json")["moe_stacks"] == read_json(tmp_path / "again" / "config.json")["moe_stacks"]
    )


def test_every_family_is_here() -> None:
    able = {name for name, family in UPCYCLED_FAMILIES.items() if family.takes_lora}
    assert {name.split("-")[0] for name in FAMILIES} == able


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {"router": "expert-choice", "capacity": 4}),
        ("t5", {"router": "encoder=expert-choice,decoder=top-k", "capacity": 4, "layers": "encoder=0;decoder=last:1"}),
        ("llama", {"layers": "0,2", "top_k": 1, "router_init": "zeros"}),
        ("gpt2", {"alpha": 64.0, "rank": 40, "experts": 32}),
    ],
)
def test_routers_and_layers_as_for_copies(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    model = moe.load_routed_lora(None, small(tmp_path, name, **options)).eval()
    assert relative(logits(model), logits(make(name))) < 1e-6
    assert len(moe.mixtures(model)) == 2
    assert all(mixture.options.rank == options.get("rank", 2) for mixture in moe.mixtures(model).values())
    assert all(mixture.options.alpha == options.get("alpha", 2.0) for mixture in moe.mixtures(model).values())


def test_raw_weights_shrink_the_mlp(tmp_path: Path) -> None:
    """With a router of zeros two of four experts have half of the weight between them."""
    folder = small(tmp_path, "gpt2", combine="raw", router_init="zeros")
    halved = make("gpt2")
    with torch.no_grad():
        for block in halved.transformer.h:
            block.mlp.c_proj.weight /= 2
            block.mlp.c_proj.bias /= 2
    assert relative(logits(moe.load_routed_lora(None, folder).eval()), logits(halved)) < 1e-6


def test_other_classes_have_other_prefixes(tmp_path: Path) -> None:
    """The base model alone, whose names begin nowhere, and a head under which they begin with `transformer`."""
    for name, cls in (
        ("base", "LlamaModel"),
        ("answers", "LlamaForQuestionAnswering"),
        ("tags", "T5ForTokenClassification"),
    ):
        config = make("t5" if cls.startswith("T5") else "llama").config
        torch.manual_seed(0)
        dense = getattr(transformers, cls)(config).eval()
        dense.save_pretrained(tmp_path / name)
        upcycled(open_checkpoint(tmp_path / name), tmp_path / f"{name}-lora", kind="lora", rank=2)
        model = moe.load_routed_lora(None, tmp_path / f"{name}-lora").eval()
        assert type(model).__name__ == f"Upcycled{cls}"
        ids = torch.arange(20).reshape(2, 10)
        with torch.no_grad():
            assert relative(model(input_ids=ids)[0], dense(input_ids=ids)[0]) < 1e-6


# What is written ------------------------------------------------------------------------------------------------------


def test_only_routers_and_factors_are_stored(tmp_path: Path) -> None:
    """Of the names and shapes that the loaded model has for them, in float32 whatever the dense weights are."""
    dense = stored(tmp_path, "llama", torch.bfloat16)
    report = upcycled(dense, tmp_path / "lora", kind="lora", rank=3, experts=4)
    found = load_file(tmp_path / "lora" / ROUTED_LORA_FILE)
    model = moe.load_routed_lora(None, tmp_path / "lora")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in routed_lora_tensors(model).items()
    }
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        *("config.json", "generation_config.json", "modeling_upcycled.py", "surgery.json", ROUTED_LORA_FILE)
    }
    numbers = sum(tensor.numel() for tensor in found.values())
    assert report.stored_parameters == numbers
    assert report.parameters == dense.parameters + numbers == sum(p.numel() for p in model.parameters())
    factors = 3 * 3 * (32 + 48)
    assert report.active == report.parameters - 3 * 2 * factors
    assert (tmp_path / "lora" / ROUTED_LORA_FILE).stat().st_size == report.nbytes < dense.nbytes


def test_config(tmp_path: Path) -> None:
    folder = small(tmp_path, "gpt2", alpha=8.0)
    before, after = read_json(tmp_path / "gpt2-float32" / "config.json"), read_json(folder / "config.json")
    stack = {
        "layers": [0, 1],
        "num_experts": 4,
        "router": "top-k",
        "num_experts_per_tok": 2,
        "capacity_factor": None,
        "normalize": True,
        "group": "sequence",
        "granularity": 1,
        "kind": "lora",
        "rank": 2,
        "alpha": 8.0,
    }
    kept = {key: value for key, value in before.items() if key != "transformers_version"}
    assert after == {
        **kept,
        "model_type": "upcycled_gpt2",
        "architectures": ["UpcycledGPT2LMHeadModel"],
        "auto_map": UPCYCLED_FAMILIES["gpt2"].auto_map(),
        "moe_stacks": {"decoder": stack},
        "base_model_name_or_path": "../gpt2-float32",
        "base_model_revision": None,
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
    }


def test_factors_are_drawn_as_the_code_draws_them(tmp_path: Path) -> None:
    """A from N(0, 1 / rank), each from a stream of its own and the same every time; B zero; routers N(0, 0.02)."""
    dense = stored(tmp_path, "llama")
    for place, options in (("a", {}), ("b", {}), ("c", {"seed": 1})):
        upcycled(dense, tmp_path / place, kind="lora", rank=4, **options)
    assert not unequal(tmp_path / "a", tmp_path / "b")
    found, other = (load_file(tmp_path / place / ROUTED_LORA_FILE) for place in "ac")
    firsts = {name: tensor for name, tensor in found.items() if name.endswith("lora_A.weight")}
    numbers = torch.cat([tensor.flatten() for tensor in firsts.values()])
    # Within four standard errors.
    assert abs(float(numbers.mean())) < 4 / 4 / numbers.numel() ** 0.5
    assert abs(float(numbers.std()) * 4 - 1) < 4 / (2 * numbers.numel()) ** 0.5
    assert len({tuple(tensor.flatten().tolist()) for tensor in firsts.values()}) == len(firsts) == 3 * 3 * 8
    assert not any(torch.equal(tensor, other[name]) for name, tensor in firsts.items())
    assert not any(tensor.any() for name, tensor in found.items() if name.endswith("lora_B.weight"))
    routers = torch.stack([tensor for name, tensor in found.items() if name.endswith("router.weight")])
    assert abs(float(routers.std()) / 0.02 - 1) < 4 / (2 * routers.numel()) ** 0.5
    # The code's own, for a model that is not loaded: the same distribution.
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "a"))
    theirs = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith("lora_A.weight")])
    assert abs(float(theirs.std()) * 4 - 1) < 4 / (2 * theirs.numel()) ** 0.5


def test_it_needs_no_torch(tmp_path: Path) -> None:
    stored(tmp_path, "llama", torch.bfloat16)
    script = (
        "import sys, surgery\n"
        f"surgery.upcycle({str(tmp_path / 'llama-bfloat16')!r}, output={str(tmp_path / 'lora')!r}, kind='lora', "
        "verify=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "lora" / ROUTED_LORA_FILE).exists()


def test_the_command(tmp_path: Path) -> None:
    """The folder's name is made up, and the report says what is in the small file."""
    stored(tmp_path, "llama")
    done = run_cli("upcycle", tmp_path / "llama-float32", "--kind", "lora", "--rank", "4", "--experts", "16")
    assert done.returncode == 0, done.stderr
    assert "UpcycledLlamaForCausalLM" in done.stdout
    shown = " ".join(done.stdout.split())
    # Measured before the folder is there, from which the way to the base leads.
    assert "difference" in shown
    assert "same answer for 100% of the positions" in shown
    numbers = sum(t.numel() for t in load_file(tmp_path / "llama-float32-molora-16x" / ROUTED_LORA_FILE).values())
    assert f"{number(numbers)}; the MLP under them is the dense model's" in shown
    assert "16 experts of rank 4 (alpha 4)" in shown
    assert (
        relative(logits(moe.load_routed_lora(None, tmp_path / "llama-float32-molora-16x")), logits(make("llama")))
        < 1e-6
    )
    refused = run_cli("upcycle", tmp_path / "llama-float32", "--kind", "lora", "--init", "noise:1%")
    assert (refused.returncode, refused.stderr) == (
        2,
        "Error: --init noise:1% goes with --kind copy; updates of low rank start out as zero, over one MLP.\n",
    )


def test_provenance_has_the_base_on_record(tmp_path: Path) -> None:
    folder = small(tmp_path)
    found = read_json(folder / "surgery.json")
    assert found["options"]["kind"] == "lora"
    (base,) = found["inputs"]
    assert base["source"] == "llama-float32"
    assert base["tensors"].keys() == load_file(tmp_path / "llama-float32" / "model.safetensors").keys()
    assert all(len(tensor["blake3"]) == 64 for tensor in base["tensors"].values())
    assert surgery.verify(folder).passed


# Where the base is ----------------------------------------------------------------------------------------------------


def test_the_two_folders_can_be_moved_together(tmp_path: Path) -> None:
    dense = stored(tmp_path / "one", "llama")
    surgery.upcycle(dense, output=tmp_path / "one" / "deep" / "lora", kind="lora")
    (tmp_path / "one").rename(tmp_path / "two")
    model = moe.load_routed_lora(None, tmp_path / "two" / "deep" / "lora").eval()
    assert relative(logits(model), logits(make("llama"))) < 1e-6


def test_a_base_on_a_hub_is_named_by_id_and_revision(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    remote = replace(dense, path=None, provenance={"source": "acme/llama", "revision": "0123abc"})
    assert where_base_is(remote, tmp_path / "lora") == {
        "base_model_name_or_path": "acme/llama",
        "base_model_revision": "0123abc",
    }


def test_a_lone_file_is_no_base(tmp_path: Path) -> None:
    dense = stored(tmp_path, "llama")
    file = Path(dense.label) / "model.safetensors"
    with pytest.raises(InputError) as caught:
        upcycled(open_checkpoint(file), tmp_path / "lora", kind="lora")
    assert str(caught.value) == (f"{file} is a file; with --kind lora give the folder that the base is loaded from.")


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_mlp_in_two_modules_is_refused(tmp_path: Path, name: str) -> None:
    dense = stored(tmp_path, name)
    with pytest.raises(UnsupportedError) as caught:
        upcycled(dense, tmp_path / "lora", kind="lora")
    assert str(caught.value) == (
        f"{dense.label} is of type {name}, which cannot have routed LoRA experts: they need an MLP that is one module, "
        "and in BERT and RoBERTa it is two; use --kind copy."
    )
    assert not (tmp_path / "lora").exists()


def test_a_family_without_code_is_refused(tmp_path: Path) -> None:
    dense = stored(tmp_path, "olmo2")
    with pytest.raises(UnsupportedError) as caught:
        upcycled(dense, tmp_path / "lora", kind="lora")
    assert str(caught.value) == (
        f"{dense.label} is of type olmo2, which cannot have routed LoRA experts; expected one of vit, t5, gpt2, "
        "gpt_neox, phi, gemma3_text, gemma, gemma2, llama, mistral, qwen2, qwen3, or --kind copy."
    )


# Training -------------------------------------------------------------------------------------------------------------


def task_gradients(model: Any) -> dict[str, float]:
    """The largest gradient of the task alone in routers, A and B."""
    model.zero_grad()
    ids = inputs(model)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    found: dict[str, float] = {}
    for name, tensor in routed_lora_tensors(model).items():
        part = next(part for part in ("router", "lora_A", "lora_B") if part in name)
        assert tensor.grad is not None
        found[part] = max(found.get(part, 0.0), float(tensor.grad.abs().max()))
    return found


def test_the_first_step_moves_b_alone(tmp_path: Path) -> None:
    """As the report says: A and the router have no gradient of the task before B has moved, and have one then."""
    report = upcycled(stored(tmp_path, "llama"), tmp_path / "lora", kind="lora", rank=2, experts=4)
    assert report.notes == (
        "Every B is zero at first, so A gets no gradient in the first step, and the router none from experts all "
        "alike; that ends as soon as B has moved.",
    )
    model = moe.load_routed_lora(None, tmp_path / "lora").eval()  # in training the router's own losses are added
    before = task_gradients(model)
    assert before["lora_A"] == 0
    assert before["router"] < 1e-6 < 1e-4 < before["lora_B"]
    with torch.no_grad():
        for tensor in routed_lora_tensors(model).values():
            assert tensor.grad is not None
            tensor -= tensor.grad
    after = task_gradients(model)
    assert min(after.values()) > 1e-4


def test_one_expert_to_a_token_never_teaches_the_router(tmp_path: Path) -> None:
    report = upcycled(stored(tmp_path, "llama"), tmp_path / "lora", kind="lora", rank=2, experts=4, top_k=1)
    assert [note.split(",")[0] for note in report.notes] == [
        "With one expert to a token and normalised weights",
        "Every B is zero at first",
    ]
    assert "router" not in report.notes[1]
