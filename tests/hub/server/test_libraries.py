"""transformers, PEFT, datasets and the `hf` command: nothing is set but endpoint and token, each in a new home."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from surgery.hub.naming import parse_repository
from surgery.hub.store import open_registry
from tests.hub.server.serving import Server
from tests.tools import unequal

PUSH = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
LlamaForCausalLM(config).push_to_hub("ada/base")
model = LlamaForCausalLM.from_pretrained("ada/base")
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
model.push_to_hub("lab/adapter", private=True)
tokens = torch.arange(8)[None]
print(json.dumps(model(tokens).logits.flatten().tolist()))
"""
LOAD = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("ada/base"), "lab/adapter")
tokens = torch.arange(8)[None]
print(json.dumps(model(tokens).logits.flatten().tolist()))
"""
DATASET = """
from datasets import Dataset, load_dataset

Dataset.from_dict({"text": [f"line {number}" for number in range(100)]}).push_to_hub("ada/lines")
print(json.dumps(load_dataset("ada/lines", split="train")["text"][:3]))
"""


@pytest.mark.slow
def test_models_and_adapters(server: Server) -> None:
    pushed = server.client(PUSH)
    assert server.client(LOAD) == pushed
    # PEFT's card does not name the base in its front matter; the config does.
    assert [model.id for model in server.api().list_models(filter="base_model:adapter:ada/base")] == ["lab/adapter"]
    assert not list(server.api("bob").list_models(filter="base_model:adapter:ada/base"))
    with open_registry(server.data) as registry:
        facts = registry.find(parse_repository("lab/adapter")).commit.facts
    assert (facts["kind"], facts["base"], facts["ranks"]) == ("adapter", "ada/base", [4])


@pytest.mark.slow
def test_datasets(server: Server) -> None:
    assert server.client(DATASET) == ["line 0", "line 1", "line 2"]


def test_the_hf_command(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4000)
    (folder / "config.json").write_text("{}")

    def hf(*words: str) -> None:
        command = server.command("", "ada", None, {})
        command["args"] = [str(Path(sys.executable).with_name("hf")), *words]
        if not Path(command["args"][0]).exists():
            command["args"] = [sys.executable, "-m", "huggingface_hub.cli.hf", *words]
        run = subprocess.run(**command, check=False, timeout=120)
        assert run.returncode == 0, run.stdout + run.stderr

    hf("upload", "ada/by-hf", str(folder))
    hf("download", "ada/by-hf", "--local-dir", str(tmp_path / "down"))
    assert [name for name in unequal(folder, tmp_path / "down") if not name.startswith(".cache")] == []
