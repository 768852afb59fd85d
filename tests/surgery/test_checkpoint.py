"""Stored checkpoints: which files are read, what is refused, what is carried along; compared with transformers."""

from __future__ import annotations

import json
import os
import pickle
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import save_file

import surgery
from surgery.checkpoint import Checkpoint, StoredTensor, open_checkpoint, read_adapter_files
from surgery.dtypes import DTYPES
from surgery.errors import FormatError, InputError
from surgery.folder import LocalFolder
from surgery.source import FileSource, read_bytes
from tests.models import make, perturb, save
from tests.peft_tools import different, same_bits, stored, write_adapter
from tests.tools import raw_file


def content(tensor: StoredTensor) -> torch.Tensor:
    """What is stored, as a tensor."""
    data = bytearray(read_bytes(tensor.source, tensor.offset, tensor.nbytes))
    raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return raw.view(tensor.dtype.to_torch).view(tensor.shape)


def contents(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: content(tensor) for name, tensor in checkpoint.tensors.items()}


def refusal(path: Path) -> InputError:
    """The error of opening a checkpoint; one sentence, or one for each problem."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    for sentence in caught.value.problems or [caught.value.message]:
        assert sentence.endswith(".")
        assert sentence.isprintable()
    return caught.value


def write(folder: Path, files: dict[str, dict[str, torch.Tensor] | object]) -> Path:
    """A folder of files: dictionaries of tensors in the format that the name says, anything else as JSON or text."""
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            assert isinstance(value, dict)
            save_file(value, path, {"format": "pt"})
        elif name.endswith(".bin"):
            torch.save(value, path)
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def ones(*names: str, value: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 2), value) for name in names}


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(folder: Path, weight_map: dict[str, str], index: str = "model.safetensors.index.json") -> Path:
    """Two shards, `a` in the first and `b` in the second, and an index that says what it likes."""
    return write(folder, {A: ones("a"), B: ones("b"), index: {"metadata": {}, "weight_map": weight_map}})


# Which files ----------------------------------------------------------------------------------------------------------


def test_one_file(tmp_path: Path) -> None:
    """The usual folder: names in natural order, dtypes and shapes, the config."""
    folder = write(tmp_path, {"model.safetensors": ones("l.10", "l.9"), "config.json": {"model_type": "x"}})
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.tensors) == ["l.9", "l.10"]
    assert (checkpoint.label, checkpoint.path, checkpoint.model_type) == (str(folder), folder, "x")
    assert dict(checkpoint.provenance) == {"source": folder.name}
    assert (checkpoint.parameters, checkpoint.nbytes) == (8, 32)


def test_shards_with_an_index(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path, {"a": A, "b": B}))
    assert {name: Path(t.source.name).name for name, t in checkpoint.tensors.items()} == {"a": A, "b": B}
    assert [shard.name for shard in checkpoint.shards] == [A, B]
    assert checkpoint.weights.index == "model.safetensors.index.json"


def test_shards_without_an_index(tmp_path: Path) -> None:
    """A complete series needs none."""
    checkpoint = open_checkpoint(write(tmp_path, {A: ones("a"), B: ones("b")}))
    assert list(checkpoint.tensors) == ["a", "b"]
    assert (checkpoint.weights.index, checkpoint.weights.stem) == (None, "model")


@pytest.mark.parametrize("suffix", ["", "-00001-of-00002"])
def test_any_stem(tmp_path: Path, suffix: str) -> None:
    """diffusers and sentence-transformers call their weights something else."""
    files: dict[str, Any] = {f"diffusion_pytorch_model{suffix}.safetensors": ones("a")}
    if suffix:
        files["diffusion_pytorch_model-00002-of-00002.safetensors"] = ones("b")
        weight_map = {"a": f"diffusion_pytorch_model{suffix}.safetensors"}
        weight_map["b"] = "diffusion_pytorch_model-00002-of-00002.safetensors"
        files["diffusion_pytorch_model.safetensors.index.json"] = {"weight_map": weight_map}
    assert open_checkpoint(write(tmp_path, files)).weights.stem == "diffusion_pytorch_model"


def test_a_single_file_brings_its_tensors_and_the_config_beside_it(tmp_path: Path) -> None:
    """What else lies beside it stays there: it may have nothing to do with it."""
    write(tmp_path, {"w.safetensors": ones("a"), "config.json": {"model_type": "x"}, "tokenizer.json": {}})
    checkpoint = open_checkpoint(tmp_path / "w.safetensors")
    assert (list(checkpoint.tensors), checkpoint.model_type) == (["a"], "x")
    assert (checkpoint.carried, checkpoint.left_behind) == ((), ())
    assert dict(checkpoint.provenance) == {"source": "w.safetensors"}


FORMS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize(
    "present", [forms for count in range(1, 5) for forms in combinations(FORMS, count)], ids="+".join
)
def test_precedence_is_that_of_transformers(tmp_path: Path, present: tuple[str, ...]) -> None:
    """Each form of the weights says something else; both readers hear the same."""
    model = make("llama")
    model.config.save_pretrained(tmp_path)
    for number, form in enumerate(present):
        state = {name: torch.full_like(value, number) for name, value in model.state_dict().items()}
        half = len(state) // 2
        parts = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
        stem, _, suffix = form.removesuffix(".index.json").rpartition(".")
        if not form.endswith(".json"):
            write(tmp_path, {form: state})
            continue
        names = [f"{stem}-0000{shard}-of-00002.{suffix}" for shard in (1, 2)]
        weight_map = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        write(tmp_path, {names[0]: parts[0], names[1]: parts[1], form: {"metadata": {}, "weight_map": weight_map}})
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert different(contents(open_checkpoint(tmp_path)), theirs) == []


def test_weights_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    """Two files, no index, no known name: the user says which."""
    message = refusal(write(tmp_path, {"one.safetensors": ones("a"), "two.safetensors": ones("b")})).message
    assert message == (
        f"{tmp_path} holds several weight files and no index that says which belong together: "
        "one.safetensors, two.safetensors; name the one to use."
    )


@pytest.mark.parametrize("missing", [A, B])
def test_half_a_series_is_refused(tmp_path: Path, missing: str) -> None:
    """A shard of two without the other and without an index is no checkpoint."""
    write(tmp_path, {A: ones("a"), B: ones("b")})
    (tmp_path / missing).unlink()
    assert "of-00002" in refusal(tmp_path).message


def test_a_gap_in_a_series_is_refused(tmp_path: Path) -> None:
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 3)]
    message = refusal(write(tmp_path, {name: ones(name) for name in names})).message
    assert "holds several weight files and no index" in message


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "holds no weights: neither .safetensors nor .bin"),
        ({"config.json": {}, "model.gguf": "x"}, "holds no weights"),
        ({"training_args.bin": {}}, "holds no weights"),
        ({"model.safetensors": {}}, "holds no tensors"),
        ({"model.safetensors.index.json": {"weight_map": {}}}, "has an empty 'weight_map'"),
        ({"model.safetensors.index.json": {}}, "has no 'weight_map' from tensor names to file names"),
        ({"model.safetensors.index.json": {"weight_map": {"a": 1}}}, "has no 'weight_map'"),
        ({"model.safetensors.index.json": "{"}, "model.safetensors.index.json is not valid JSON"),
        ({"model.safetensors.index.json": "[]"}, "holds a JSON list, expected an object"),
        ({"model.safetensors": ones("a"), "config.json": "nope"}, "config.json is not valid JSON"),
        ({"model.safetensors": ones("a"), "config.json": "[" * 100_000}, "config.json is not valid JSON"),
    ],
    ids=[
        *("nothing", "another format", "training state", "no tensors", "empty index", "no map", "map to numbers"),
        *("index cut short", "index of another kind", "config of another format", "config nested deeply"),
    ],
)
def test_folders_without_usable_weights(tmp_path: Path, files: dict[str, Any], part: str) -> None:
    """The sentence says which file it is about."""
    folder = tmp_path / "m"
    folder.mkdir()
    message = refusal(write(folder, files)).message
    assert str(folder) in message
    assert part in message


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    """Nothing there, or a file of another kind."""
    assert refusal(tmp_path / "gone").message == f"{tmp_path / 'gone'} does not exist."
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "neither a folder nor a .safetensors or .bin file" in refusal(tmp_path / "x.gguf").message


# Indexes --------------------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": A, "b": B})
    (tmp_path / B).unlink()
    expected = f"{tmp_path}/model.safetensors.index.json names the shard '{B}', which is missing; fetch it again."
    assert refusal(tmp_path).message == expected


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "..", "", ".", "s/x.safetensors", "..\\x"])
def test_a_shard_outside_the_folder_is_not_read(tmp_path: Path, shard: str) -> None:
    """Even if it is there."""
    folder = tmp_path / "m"
    write(tmp_path, {"x.safetensors": ones("b"), "m/s/x.safetensors": ones("b")})
    error = refusal(sharded(folder, {"a": A, "b": str(tmp_path / "x.safetensors") if shard.startswith("/") else shard}))
    assert "names the shard" in error.message
    assert "outside the folder" in error.message


@pytest.mark.parametrize(
    ("weight_map", "part"),
    [
        ({"a": A, "b": B, "c": B}, f"lists tensor 'c' in {B}, which does not hold it."),
        ({"a": A, "b": A}, f"lists tensor 'b' in {A}, which does not hold it."),
        ({"a": B, "b": A}, f"lists tensor 'a' in {B}, but {A} holds it."),
    ],
    ids=["one too many", "one shard only", "exchanged"],
)
def test_an_index_must_agree_with_the_shards(tmp_path: Path, weight_map: dict[str, str], part: str) -> None:
    """A tensor that an index lists elsewhere would be read by one tool and not by the next."""
    error = refusal(sharded(tmp_path, weight_map))
    found = error.problems
    assert f"{tmp_path}/model.safetensors.index.json {part}" in found
    assert error.message == (found[0] if len(found) == 1 else f"{len(found)} problems with {tmp_path}:")


def test_a_tensor_that_the_index_forgets(tmp_path: Path) -> None:
    write(tmp_path, {A: ones("a"), B: ones("b", "c")})
    write(tmp_path, {"model.safetensors.index.json": {"weight_map": {"a": A, "b": B}}})
    assert refusal(tmp_path).message == (
        f"{tmp_path}/model.safetensors.index.json does not list tensor 'c' of {B}; remove the index to read all shards."
    )


def test_every_problem_is_found_at_once(tmp_path: Path) -> None:
    """The user fixes all of them before the next try."""
    error = refusal(sharded(tmp_path, {"a": B, "b": A, "c": A, "d": B}))
    assert error.message == f"4 problems with {tmp_path}:"
    assert len(error.problems) == 4


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write(tmp_path, {A: ones("a", "b"), B: ones("b")})
    assert refusal(folder).message == f"{folder}: tensor 'b' is stored in {A} and again in {B}."


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": A, "b": B})
    (tmp_path / B).write_bytes((tmp_path / B).read_bytes()[:-1])
    message = refusal(tmp_path).message
    assert str(tmp_path / B) in message
    assert "cut short, fetch it again" in message


# Legacy files ---------------------------------------------------------------------------------------------------------


def legacy_state() -> dict[str, torch.Tensor]:
    """Tensors that are not simply rows of bytes: transposed, cut out, sharing memory, empty, of every kind."""
    whole = torch.arange(60, dtype=torch.float32).view(5, 12)
    return {
        "plain": whole,
        "transposed": whole.t(),
        "columns": whole[:, 3:7],
        "rows": whole[2:4],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "tied": whole,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "half": torch.arange(6).to(torch.bfloat16).view(2, 3),
        "mask": torch.tensor([True, False]),
        "ids": torch.arange(4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_bin_files_give_their_tensors(tmp_path: Path, zipped: bool, nested: bool) -> None:
    """In row-major order, whatever their strides; read whole and in pieces."""
    state = legacy_state()
    saved: dict[str, Any] = {"state_dict": state, "epoch": 3} if nested else dict(state)
    torch.save(saved, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.weights.pickled
    expected = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    assert different(contents(checkpoint), expected) == []
    transposed = checkpoint.tensors["transposed"]
    pieces = [read_bytes(transposed.source, begin, 80) for begin in range(0, 240, 80)]
    assert b"".join(pieces) == expected["transposed"].numpy().tobytes()


def test_sharded_bin_files(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    files: dict[str, Any] = {names[0]: ones("a"), names[1]: ones("b")}
    files["pytorch_model.bin.index.json"] = {"weight_map": {"a": names[0], "b": names[1]}}
    assert list(open_checkpoint(write(tmp_path, files)).tensors) == ["a", "b"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_bin_model_merges_like_its_safetensors_twin(tmp_path: Path, zipped: bool) -> None:
    """The output is safetensors, with the same bits; the .bin is not carried along."""
    model = make("gpt2")
    twin = save(model, tmp_path / "twin")
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    torch.save(stored(twin), legacy / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (legacy / "config.json").write_bytes((twin / "config.json").read_bytes())
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    adapter = write_adapter(model, config, tmp_path / "adapter")
    surgery.merge(twin, adapter, output=tmp_path / "one")
    surgery.merge(legacy, adapter, output=tmp_path / "other")
    assert different(stored(tmp_path / "one"), stored(tmp_path / "other")) == []
    assert not (tmp_path / "other" / "pytorch_model.bin").exists()


class Attack:
    """Pickled, it runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "bare pickle"])
def test_a_malicious_pickle_is_not_executed(tmp_path: Path, form: str) -> None:
    """The command would leave a file behind, and does where pickles are trusted."""
    trace = tmp_path / "executed"
    state = {"a": torch.ones(2), "b": Attack(trace)}
    path = tmp_path / "pytorch_model.bin"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(state["b"]))
        pickle.loads(path.read_bytes())
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
        torch.load(path, weights_only=False)
    assert trace.exists()
    trace.unlink()
    message = refusal(tmp_path).message
    assert not trace.exists()
    assert f"{path} could not be read as tensors only, and nothing else in it is executed" in message
    assert "save it as safetensors where you trust it" in message


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ([torch.ones(1)], "holds a list, expected a dictionary of tensors"),
        ({"a": torch.ones(1), "step": 7}, "the entry 'step' is a int, expected a named tensor"),
        ({3: torch.ones(1)}, "the entry 3 is a Tensor, expected a named tensor"),
        ({"a\x1b[1m": torch.ones(1)}, r"the entry 'a\x1b[1m'"),
        ({"a": torch.eye(2).to_sparse()}, "tensor 'a' of torch.float32 has no safetensors form"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "tensor 'a' of torch.complex128 has no safetensors form"),
        ({"__metadata__": torch.ones(1)}, "__metadata__"),
    ],
    ids=["list", "number", "number for a name", "escape sequence", "sparse", "complex128", "reserved name"],
)  # fmt: skip
def test_bin_files_of_other_things_are_refused(tmp_path: Path, value: Any, part: str) -> None:
    torch.save(value, tmp_path / "pytorch_model.bin")
    error = refusal(tmp_path)
    assert isinstance(error, FormatError)
    assert str(tmp_path / "pytorch_model.bin") in error.message
    assert part in error.message


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + b"\0" * 40, b"\x80\x02.", b"{}"], ids=repr)
def test_bin_files_of_nonsense_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "could not be read as tensors only" in refusal(tmp_path).message


def test_a_bin_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    assert "could not be read as tensors only" in refusal(tmp_path).message


# Tensors --------------------------------------------------------------------------------------------------------------


def test_all_dtypes_side_by_side(tmp_path: Path) -> None:
    """Every dtype of the format, those that torch lacks included, goes through a merge byte for byte."""
    header: dict[str, object] = {}
    data = bytearray()
    for dtype in sorted(DTYPES, key=lambda dtype: -dtype.order):
        size = dtype.nbytes((2, 4))
        places = [len(data), len(data) + size]
        header[f"extra.{dtype.name}"] = {"dtype": dtype.name, "shape": [2, 4], "data_offsets": places}
        data += os.urandom(size) if dtype.name != "BOOL" else bytes([0, 1] * 4)
    folder = tmp_path / "m"
    save(make("llama"), folder)
    (folder / "model.safetensors").rename(folder / A)
    (folder / B).write_bytes(raw_file(header, bytes(data)))
    checkpoint = open_checkpoint(folder)
    assert {t.dtype.name for n, t in checkpoint.tensors.items() if n.startswith("extra")} == {d.name for d in DTYPES}
    adapter = write_adapter(make("llama"), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    surgery.merge(folder, adapter, output=tmp_path / "out")
    assert (tmp_path / "out" / B).read_bytes() == (folder / B).read_bytes()
    assert (tmp_path / "out" / A).read_bytes() != (folder / A).read_bytes()


def old_bert() -> Any:
    """A BERT as transformers saved it until version 4.31: with the numbers of its positions."""
    model = make("bert")
    positions = model.bert.embeddings.position_ids
    del model.bert.embeddings.position_ids
    model.bert.embeddings.register_buffer("position_ids", positions.clone(), persistent=True)
    return model


def test_an_old_bert_with_integers_among_its_weights(tmp_path: Path) -> None:
    """Its int64 positions are neither factored nor changed, and what is written loads in transformers."""
    model = old_bert()
    base = save(model, tmp_path / "base")
    name = "bert.embeddings.position_ids"
    tensor = open_checkpoint(base).tensors[name]
    assert (tensor.dtype.name, tensor.shape) == ("I64", (1, 64))
    tuned = save(perturb(model, rank=2), tmp_path / "tuned")
    report = surgery.extract(base, tuned, output=tmp_path / "adapter", rank=2)
    assert name not in {module.name for module in report.modules} | {item.name for item in report.residual}
    surgery.merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    assert same_bits(stored(tmp_path / "merged")[name], stored(base)[name])
    transformers.BertForSequenceClassification.from_pretrained(tmp_path / "merged")


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A checkpoint of 64 GB, all of it a hole in a file, opens at once."""
    shape = [1 << 18, 1 << 17]
    size = 2 * shape[0] * shape[1]
    start = raw_file({"a": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}})
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(start)
        file.truncate(len(start) + size)
    assert open_checkpoint(tmp_path).nbytes == size == 1 << 36


def test_one_expert_of_a_stack_is_a_range_of_its_bytes(tmp_path: Path) -> None:
    stack = torch.arange(24, dtype=torch.float32).view(3, 2, 4)
    tensor = open_checkpoint(write(tmp_path, {"model.safetensors": {"e": stack}})).tensors["e"]
    assert torch.equal(content(tensor[1]), stack[1])
    assert (tensor[1].is_slice, tensor[1].shape, tensor.rows, tensor.columns) == (True, (2, 4), 6, 4)
    with pytest.raises(IndexError):
        tensor[3]


def test_a_file_that_shrinks_is_an_error_not_a_signal(tmp_path: Path) -> None:
    """Cut after its header was read."""
    tensor = open_checkpoint(write(tmp_path, {"model.safetensors": {"a": torch.zeros(1000)}})).tensors["a"]
    os.truncate(tmp_path / "model.safetensors", tensor.offset + 100)
    with pytest.raises(FormatError, match=r"model\.safetensors ends at byte \d+ with 3900 bytes still expected"):
        read_bytes(tensor.source, tensor.offset, 4000)


# Other files ----------------------------------------------------------------------------------------------------------


def test_files_of_the_model_are_carried_and_other_weights_are_not(tmp_path: Path) -> None:
    """Tokenizer, licence, template and code go along; other forms of the weights and folders with weights stay."""
    carried = [
        ".gitattributes",
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "modeling_own.py",
        "nested/deep/vocab.txt",
        "tokenizer.json",
    ]
    left = [
        "consolidated.safetensors",
        "flax_model.msgpack",
        "model-q4.gguf",
        "onnx/config.json",
        "onnx/deeper/model.onnx",
        "original/params.json",
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "training_args.bin",
    ]
    ignored = [".git/config", "__pycache__/x.pyc", "surgery.json", "undo/record.json"]
    for name in (*carried, *left, *ignored):
        write(tmp_path, {f"{name}.tmp": "{}"})
        (tmp_path / f"{name}.tmp").rename(tmp_path / name)
    checkpoint = open_checkpoint(write(tmp_path, {"model.safetensors": ones("a")}))
    assert list(checkpoint.carried) == carried
    assert list(checkpoint.left_behind) == sorted(left)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    """A downloaded folder must not pull the user's own files into an output."""
    (tmp_path / "secret.txt").write_text("mine")
    folder = write(tmp_path / "m", {"model.safetensors": ones("a"), "real.txt": "theirs"})
    (folder / "absolute.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "relative.txt").symlink_to("../secret.txt")
    (folder / "inside.txt").symlink_to("real.txt")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.carried == ("inside.txt", "real.txt")
    assert checkpoint.left_behind == ("absolute.txt", "relative.txt")


def test_a_linked_folder_is_not_lost_silently(tmp_path: Path) -> None:
    """It leads out, so it stays, and the report says so."""
    write(tmp_path, {"elsewhere/code.py": "pass"})
    folder = write(tmp_path / "m", {"model.safetensors": ones("a")})
    (folder / "code").symlink_to("../elsewhere")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.carried == ()
    assert any(name.startswith("code") for name in checkpoint.left_behind)


def test_links_within_a_hub_cache_are_followed(tmp_path: Path) -> None:
    """A snapshot in the Hub's cache is nothing but links to the blobs beside it."""
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    files: dict[str, Any] = {"model.safetensors": ones("m.weight"), "config.json": {}, "tokenizer.json": {"v": 1}}
    plain = write(tmp_path / "plain", files)
    (repository / "blobs").mkdir()
    for path in plain.iterdir():
        blob = repository / "blobs" / f"{path.name}-digest"
        path.rename(blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("another repository's")
    (snapshot / "stray.txt").symlink_to(os.path.relpath(other / "x", snapshot))
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.carried == ("config.json", "tokenizer.json")
    assert checkpoint.left_behind == ("stray.txt",)
    surgery.merge(snapshot, adapter_of(tmp_path), output=tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"v": 1}


def adapter_of(folder: Path) -> Path:
    """An adapter for the tensor `m.weight` of 2 x 2."""
    prefix = "base_model.model.m.lora_"
    tensors = {f"{prefix}A.weight": torch.ones(1, 2), f"{prefix}B.weight": torch.ones(2, 1)}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["m"]}
    return write(folder / "lora", {"adapter_model.safetensors": tensors, "adapter_config.json": config})


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    """A link that leads nowhere has no bytes to carry."""
    folder = write(tmp_path / "m", {"model.safetensors": ones("m.weight")})
    (folder / "tokenizer.json").symlink_to("gone.json")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read: No such file or directory\."):
        surgery.merge(folder, adapter_of(tmp_path), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Adapters -------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    folder = adapter_of(tmp_path)
    assert refusal(folder).message == (
        f"{folder} is an adapter, but a checkpoint is expected here; merge it first: "
        f"`surgery merge BASE {folder} -o MERGED`."
    )


def test_a_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    folder = write(tmp_path, {"model.safetensors": ones("a")})
    with pytest.raises(InputError) as caught:
        read_adapter_files(LocalFolder(folder))
    assert caught.value.message == (
        f"{folder} is not an adapter: it has no adapter_config.json; it is a checkpoint. "
        f"`surgery extract BASE {folder} -o ADAPTER` makes an adapter of it."
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"is not an adapter: it has no adapter_config\.json\.$"):
        read_adapter_files(LocalFolder(folder))


def test_a_checkpoint_beside_an_adapter_is_one(tmp_path: Path) -> None:
    """Trainers leave both in one folder."""
    folder = adapter_of(tmp_path)
    checkpoint = open_checkpoint(write(folder, {"model.safetensors": ones("a")}))
    assert list(checkpoint.tensors) == ["a"]
    assert "adapter_model.safetensors" in checkpoint.left_behind


def test_reading_goes_by_position(tmp_path: Path) -> None:
    """A source may be read in any order, by several threads; the file has no position of its own."""
    (tmp_path / "f").write_bytes(bytes(range(100)))
    source = FileSource(tmp_path / "f")
    assert [list(read_bytes(source, begin, 3)) for begin in (97, 0, 50)] == [[97, 98, 99], [0, 1, 2], [50, 51, 52]]
