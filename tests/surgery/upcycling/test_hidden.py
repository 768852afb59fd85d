"""Routers that start from the hidden states of prompts."""

from __future__ import annotations

import builtins
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.errors import FormatError, InputError, MissingExtraError, SurgeryError
from surgery.upcycling.prompts import read_prompts
from tests.peft_tools import stored as tensors_of
from tests.surgery.upcycling.dense import load, stored, upcycled
from tests.tools import read_json, unequal

# Measuring is tested elsewhere.
upcycle = partial(surgery.upcycle, verify=False)

WORDS = [f"w{number}" for number in range(90)]
PROMPTS = [["w1 w2 w3", "w4 w5"], ["w20 w21 w22 w23"], ["w40", "w41 w42", "w43 w44 w45"], ["w60 w61 w62"]]


def with_tokenizer(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model whose tokenizer knows 90 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    source = stored(folder, name, dtype).path
    assert source is not None
    tokenizer = Tokenizer(
        models.WordLevel({"<unk>": 0, **{word: n + 3 for n, word in enumerate(WORDS)}}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(source)
    return source


def prompts_file(folder: Path, lines: list[Any] | None = None) -> Path:
    path = folder / "prompts.jsonl"
    if lines is None:
        lines = [{"expert": expert, "prompts": prompts} for expert, prompts in enumerate(PROMPTS)]
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


@torch.no_grad()
def expected_rows(source: Path, norms: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of what the norm before a layer's MLP gives out, and every token's state with the expert of its prompt."""
    model = load(source)
    norm = model.get_submodule(norms.format(layer))
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda _, __, output: seen.append(output[0].double()))
    means, states = [], []
    for prompts in PROMPTS:
        of_prompts = []
        for prompt in prompts:
            seen.clear()
            model(input_ids=torch.tensor([[int(word[1:]) + 3 for word in prompt.split()]]))
            of_prompts.append(seen[0].mean(dim=0).numpy())
            states.append(seen[0].numpy())
        means.append(np.mean(of_prompts, axis=0))
    units = np.stack([mean / np.linalg.norm(mean) for mean in means])
    rows = units - units.mean(axis=0)
    spread = np.mean([np.mean((state @ rows.T) ** 2) for state in states])
    return rows / np.sqrt(spread), np.concatenate(states)


@pytest.mark.parametrize(
    ("name", "norms", "router"),
    [
        ("llama", "model.layers.{}.post_attention_layernorm", "model.layers.{}.block_sparse_moe.gate.weight"),
        ("gpt2", "transformer.h.{}.ln_2", "transformer.h.{}.mlp.router.weight"),
        ("granite", "model.layers.{}.post_attention_layernorm", "model.layers.{}.block_sparse_moe.router.layer.weight"),
        ("phi", "model.layers.{}.input_layernorm", "model.layers.{}.mlp.router.weight"),
    ],
)
def test_rows_are_mean_states(name: str, norms: str, router: str, tmp_path: Path) -> None:
    """Against states caught where the norm before the MLP gives them out, and numpy in float64."""
    source = with_tokenizer(tmp_path, name)
    report = upcycle(source, output=tmp_path / "moe", experts=4, router_init=f"hidden:{prompts_file(tmp_path)}")
    found = tensors_of(tmp_path / "moe")
    for layer in range(2):
        wanted, states = expected_rows(source, norms, layer)
        rows = found[router.format(layer)].double().numpy()
        np.testing.assert_allclose(rows, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
        scores = states @ rows.T
        assert 0.7 < scores.std(axis=1).mean() < 1.4  # neither flat nor saturated
    assert report.router_init == "hidden:prompts.jsonl"
    assert report.notes[-1].startswith("On the prompts themselves, the routers rank a prompt's own expert first for ")
    written = (tmp_path / "moe" / "surgery.json").read_text()
    assert str(tmp_path) not in written
    load(tmp_path / "moe")


def test_prompts_find_their_experts(tmp_path: Path) -> None:
    """Prompts that have nothing in common are told apart by most of their tokens."""
    source = with_tokenizer(tmp_path, "llama")
    report = upcycle(
        source, output=tmp_path / "moe", experts=4, layers="0", router_init=f"hidden:{prompts_file(tmp_path)}"
    )
    share = int(report.notes[-1].partition(" % of its tokens")[0].rpartition(" ")[2])
    assert share >= 75


def test_bytes_are_the_same_again_and_small_experts_share_a_row(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path, "qwen3", torch.bfloat16)
    options: dict[str, Any] = {
        "experts": 8,
        "init": "granular:2",
        "layers": "last:1",
        "router_init": f"hidden:{prompts_file(tmp_path)}",
    }
    upcycle(source, output=tmp_path / "one", **options)
    upcycle(source, output=tmp_path / "two", threads=3, **options)
    assert unequal(tmp_path / "one", tmp_path / "two") == []
    rows = tensors_of(tmp_path / "one")["model.layers.2.mlp.gate.weight"]
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows[0::2], rows[1::2])
    assert len({row.view(torch.int16).numpy().tobytes() for row in rows}) == 4


def test_a_mixture_of_adapters_can_have_prompts(tmp_path: Path) -> None:
    """The dense model reads them, whatever the experts are."""
    from peft import LoraConfig

    from tests.peft_tools import write_adapter
    from tests.surgery.upcycling.dense import make

    source = with_tokenizer(tmp_path, "llama")
    for number in range(2):
        write_adapter(make("llama"), LoraConfig(r=2, target_modules=["up_proj"]), tmp_path / f"a{number}", seed=number)
    path = prompts_file(tmp_path, [{"expert": 0, "text": "w1 w2"}, {"expert": 1, "text": "w50 w51"}, ""])
    init = f"adapters:{tmp_path / 'a0'},{tmp_path / 'a1'}"
    upcycle(source, output=tmp_path / "moe", init=init, router_init=f"hidden:{path}")
    rows = tensors_of(tmp_path / "moe")["model.layers.1.block_sparse_moe.gate.weight"]
    # Two rows without their mean are each other's negatives.
    assert torch.allclose(rows[0], -rows[1], atol=1e-6)


def test_a_dry_run_runs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_tokenizer(tmp_path, "llama")
    monkeypatch.setattr("surgery.moe.hidden.router_rows", lambda *_: pytest.fail("ran"))
    report = upcycle(
        source, output=tmp_path / "moe", experts=4, router_init=f"hidden:{prompts_file(tmp_path)}", dry_run=True
    )
    assert report.dry_run
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("lines", "problems"),
    [
        ([{"expert": 0, "text": "w1"}, {"expert": 2, "text": "w1"}], ["{} has no prompts for expert 1, 3; each of 4 needs some."]),
        (
            ["{", "[]", {"expert": 0, "text": "w1", "weight": 2}, {"expert": 4, "text": "w1"}, {"text": "w1"}],
            [
                "{} line 1: not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)).",
                "{} line 2: a JSON list, expected an object.",
                "{} line 3: unknown field 'weight', expected expert and text, or expert and prompts.",
                "{} line 4: expert is 4, expected a number from 0 to 3.",
                "{} line 5: expert is None, expected a number from 0 to 3.",
            ],
        ),
        (
            [{"expert": True, "text": "w"}, {"expert": 0}, {"expert": 0, "text": "a", "prompts": ["b"]}, {"expert": 0, "text": " "}, {"expert": 1, "prompts": []}, {"expert": 1, "prompts": "abc"}, {"expert": 1, "prompts": ["a", 3]}],
            [
                "{} line 1: expert is True, expected a number from 0 to 3.",
                "{} line 2: expected either text or prompts.",
                "{} line 3: expected either text or prompts.",
                "{} line 4: a prompt is empty, or no text.",
                "{} line 5: prompts is no list of texts.",
                "{} line 6: prompts is no list of texts.",
                "{} line 7: a prompt is empty, or no text.",
            ],
        ),
    ],
)  # fmt: skip
def test_lines_that_are_wrong_are_named_together(lines: list[Any], problems: list[str], tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path, "llama")
    path = prompts_file(tmp_path, lines)
    with pytest.raises(FormatError) as caught:
        upcycle(source, output=tmp_path / "moe", experts=4, router_init=f"hidden:{path}", dry_run=True)
    assert list(caught.value.problems) == [problem.format(path) for problem in problems]


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_file_of_prompts_is_a_crash(content: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            found = read_prompts(file.name, 2)
        except SurgeryError:
            return
        assert all(found)


@given(st.lists(st.tuples(st.integers(0, 2), st.text(min_size=1).filter(str.strip)), max_size=12))
def test_prompts_survive_json(entries: list[tuple[int, str]]) -> None:
    import tempfile

    wanted = tuple(tuple(text for expert, text in entries if expert == number) for number in range(3))
    with tempfile.NamedTemporaryFile() as file:
        file.write("\n".join(json.dumps({"expert": expert, "text": text}) for expert, text in entries).encode())
        file.flush()
        if all(wanted):
            assert read_prompts(file.name, 3) == wanted
        else:
            with pytest.raises(FormatError, match="has no prompts for expert"):
                read_prompts(file.name, 3)


def refused(source: Path, tmp_path: Path, path: Path | None = None) -> str:
    with pytest.raises(SurgeryError) as caught:
        upcycle(source, output=tmp_path / "moe", experts=4, router_init=f"hidden:{path or prompts_file(tmp_path)}")
    assert not (tmp_path / "moe").exists()
    return caught.value.message


def test_models_that_read_no_prompts(tmp_path: Path) -> None:
    for name, sentence in (
        ("llama", "{} has no tokenizer, which prompts need; put its files beside the weights."),
        ("vit", "{} takes images, so it has no hidden states of prompts."),
        ("t5", "{} has an encoder and a decoder; hidden states of prompts are for models of one stack."),
    ):
        source = stored(tmp_path, name).path
        assert source is not None
        assert refused(source, tmp_path) == sentence.format(source)
    lone = tmp_path / "llama-float32" / "model.safetensors"
    with pytest.raises(InputError):
        upcycle(lone, output=tmp_path / "moe", router_init=f"hidden:{prompts_file(tmp_path)}")


def test_files_that_are_no_prompts(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path, "llama")
    assert "cannot be read: No such file or directory" in refused(source, tmp_path, tmp_path / "nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"expert": 0, "text": "\xe9"}')
    assert "latin.jsonl is not UTF-8" in refused(source, tmp_path, tmp_path / "latin.jsonl")


def test_prompts_that_are_all_alike(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path, "llama")
    path = prompts_file(tmp_path, [{"expert": expert, "text": "w1 w2"} for expert in range(4)])
    wanted = (
        f"The prompts of all experts lead {source} to one hidden state in layer 0; give each expert prompts of its own."
    )
    assert refused(source, tmp_path, path) == wanted


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path, "llama")
    path = source / "tokenizer.json"
    tokenizer = read_json(path)
    tokenizer["model"]["vocab"]["w1"] = 500
    path.write_text(json.dumps(tokenizer))
    wanted = f"The tokenizer of {source} gives token 500, but the model has 96; it is another's."
    assert refused(source, tmp_path) == wanted


def test_without_transformers_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_tokenizer(tmp_path, "llama")
    real = builtins.__import__

    def no_hidden(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "surgery.moe.hidden":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "surgery.moe.hidden", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_hidden)
    with pytest.raises(MissingExtraError, match="transformers"):
        upcycle(source, output=tmp_path / "moe", experts=4, router_init=f"hidden:{prompts_file(tmp_path)}")
    assert not (tmp_path / "moe").exists()


def test_random_rows_are_still_the_default(tmp_path: Path) -> None:
    report = upcycled(stored(tmp_path, "llama"), tmp_path / "moe", experts=2)
    assert report.router_init == "normal:0.02"
