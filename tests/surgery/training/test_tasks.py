"""Tasks: each kind of model learns from what it can learn from, with the class and the loss of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import surgery
from surgery.errors import InputError, OptionError
from surgery.training.images import Pictures
from surgery.training.tasks import TASKS
from tests.surgery.training import making

SENTENCES = making.paragraphs()[:24]


def labelled(path: Path, name: Any = lambda text: len(text) % 3) -> Path:
    return making.jsonl(path, ({"text": text, "label": name(text)} for text in SENTENCES))


def test_classification_from_a_language_model(tmp_path: Path) -> None:
    """A fresh head, the names of the classes in its config, and a loss that falls."""
    base = making.checkpoint(tmp_path / "bert", "bert")
    data = labelled(tmp_path / "a.jsonl", lambda text: "long" if len(text) > 150 else "short")
    how = {"steps": 12, "learning_rate": 3e-3, "batch_size": 8, "max_length": 64, "over_length": "truncate"}
    report = making.run(base, data, tmp_path / "out", **how, eval_split=4)
    assert report.task == "classification"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "long", 1: "short"}
    assert making.losses(tmp_path / "out")[-1] < making.losses(tmp_path / "out")[0]
    evaluated = [line for line in making.log(tmp_path / "out") if "eval_loss" in line]
    assert evaluated[-1]["eval_accuracy"] in (0, 0.25, 0.5, 0.75, 1)


def test_the_losses_of_tasks_are_those_of_transformers(tmp_path: Path) -> None:
    """The first step's, on all rows at once."""
    rows = SENTENCES[:4]
    tokenizer = making.tokenizer()
    encoded = [torch.tensor([tokenizer(text)["input_ids"][:64]]) for text in rows]
    how = {"steps": 1, "batch_size": 4, "max_length": 64, "over_length": "truncate", "seed": 0}
    # Classification: the head is drawn by the seed.
    base = making.checkpoint(tmp_path / "bert", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    data = making.jsonl(tmp_path / "c.jsonl", ({"text": t, "label": n % 2} for n, t in enumerate(rows)))
    making.run(base, data, tmp_path / "classes", **how)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).train()
    expected = np.mean([model(ids, labels=torch.tensor([n % 2])).loss.item() for n, ids in enumerate(encoded)])
    assert making.losses(tmp_path / "classes") == pytest.approx([expected], abs=2e-6)
    # Numbers.
    data = making.jsonl(tmp_path / "n.jsonl", ({"text": t, "label": n / 2} for n, t in enumerate(rows)))
    making.run(base, data, tmp_path / "numbers", **how)
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).train()
    expected = np.mean([model(ids, labels=torch.tensor([n / 2])).loss.item() for n, ids in enumerate(encoded)])
    assert making.losses(tmp_path / "numbers") == pytest.approx([expected], abs=2e-6)
    assert json.loads((tmp_path / "numbers" / "config.json").read_bytes())["problem_type"] == "regression"


def test_sequence_to_sequence(tmp_path: Path) -> None:
    """T5: the decoder reads what it is to say one token later; the loss is transformers'."""
    base = making.checkpoint(tmp_path / "t5", "t5", dropout_rate=0.0)
    pairs = [{"prompt": text[:40], "completion": text[40:70]} for text in SENTENCES[:5]]
    how = {"steps": 1, "batch_size": 5}
    report = making.run(base, making.jsonl(tmp_path / "a.jsonl", pairs), tmp_path / "out", **how)
    assert report.task == "seq2seq"
    model, tokenizer = transformers.AutoModelForSeq2SeqLM.from_pretrained(base), making.tokenizer()
    total = count = 0.0
    for pair in pairs:
        ids = torch.tensor([tokenizer(pair["prompt"])["input_ids"]])
        labels = torch.tensor([[*tokenizer(pair["completion"])["input_ids"], tokenizer.eos_token_id]])
        total += model(ids, labels=labels).loss.item() * labels.numel()
        count += labels.numel()
    assert report.data.predictions == count
    assert making.losses(tmp_path / "out") == pytest.approx([total / count], abs=2e-6)


def test_pictures(tmp_path: Path) -> None:
    """scikit-learn's digits, from archives of arrays: the loss of the first step, and what the written model says."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
    pixels = torch.tensor(images, dtype=torch.float32)[:, None] / 255 * 2 - 1
    np.savez(tmp_path / "train.npz", images=images[:32], labels=digits.target[:32])
    np.savez(tmp_path / "held.npz", images=images[32:96], labels=digits.target[32:96])
    base = making.checkpoint(tmp_path / "vit", "vit", hidden_dropout_prob=0.0)
    how = {"steps": 20, "batch_size": 32, "learning_rate": 5e-3, "keep": "last"}
    report = making.run(base, tmp_path / "train.npz", tmp_path / "out", eval_data=str(tmp_path / "held.npz"), **how)
    assert report.task == "image-classification"
    before, after = (transformers.AutoModelForImageClassification.from_pretrained(tmp_path / n) for n in ("vit", "out"))
    with torch.no_grad():
        expected = before(pixel_values=pixels[:32], labels=torch.tensor(digits.target[:32])).loss.item()
        right = (after(pixel_values=pixels[32:96]).logits.argmax(-1).numpy() == digits.target[32:96]).mean()
    losses = making.losses(tmp_path / "out")
    assert losses[0] == pytest.approx(expected, abs=2e-6)
    assert losses[-1] < losses[0] - 0.15
    (*_, last) = [line for line in making.log(tmp_path / "out") if "eval_loss" in line]
    assert last["eval_accuracy"] == right


def test_options_without_effect_are_named(tmp_path: Path) -> None:
    base = making.checkpoint(tmp_path / "model")
    data = making.jsonl(tmp_path / "a.jsonl", [{"input_ids": [5, 6, 7]}])
    how = {
        "steps": 2,
        "warmup": 500,
        "new_head": True,
        "router_z_loss": 0.1,
        "end_token": "<end>",
        "learning_rate": 1e-3,
    }
    report = making.run(base, data, tmp_path / "out", **how)
    assert report.notes == (
        "The warm-up of 500 steps is not over after 2: the learning rate never reaches 0.001; --warmup below 1 is a "
        "share of the run.",
        "--new-head has no effect: it is for classification, and the task is causal-lm.",
        f"--router-z-loss has no effect: {base} has no routers.",
        "--end-token has no effect: the data are tokens already.",
    )
    assert making.run(base, data, tmp_path / "other", steps=2, learning_rate=1e-3).notes == ()
    vit = making.checkpoint(tmp_path / "vit", "vit")
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 8, 8), np.uint8), labels=np.array([9]))
    notes = making.run(vit, tmp_path / "a.npz", tmp_path / "seen", steps=1, max_length=7).notes
    assert notes == ("--max-length has no effect on pictures.",)
    with pytest.raises(OptionError, match="--packing is for causal language models, and the task is image-classificat"):
        making.run(vit, tmp_path / "a.npz", tmp_path / "packed", steps=1, packing=True)


def test_pictures_go_through_the_checkpoints_processor(tmp_path: Path) -> None:
    """Size, interpolation, scale, mean and deviation are those of transformers' own, for files and arrays."""
    from PIL import Image

    base = making.checkpoint(tmp_path / "vit", "vit", num_channels=3)
    settings = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "resample": 3,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
    }  # fmt: skip
    (base / "preprocessor_config.json").write_text(json.dumps(settings))
    config = transformers.AutoConfig.from_pretrained(base)
    made = Pictures.of(base, config, int)
    processor = transformers.AutoImageProcessor.from_pretrained(base)
    array = np.random.default_rng(0).integers(0, 256, (19, 23, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    expected = processor(images=image, return_tensors="np")["pixel_values"][0]
    assert expected.std() > 0.1
    for given in (image, array, array.transpose(2, 0, 1)):
        assert np.array_equal(made.pixels(given), expected)
    scaled = processor(images=array.astype(np.float32) / 255, do_rescale=False, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(made.pixels(array.astype(np.float32) / 255), scaled)
    grey = made.pixels(image.convert("L"))  # one channel stands for all of them
    assert np.array_equal(
        grey, processor(images=image.convert("L").convert("RGB"), return_tensors="np").pixel_values[0]
    )


@pytest.mark.parametrize(
    ("settings", "shape", "sentence"),
    [
        ("{", (2, 8, 8, 3), "{base}/preprocessor_config.json cannot be used ("),
        ('{"image_processor_type": "Nothing"}', (2, 8, 8, 3), "{base}/preprocessor_config.json cannot be used ("),
        (
            '{"image_processor_type": "ViTImageProcessor", "size": {"height": 4, "width": 4}}',
            (2, 8, 8, 3),
            "The picture of {data}, example 1 does not suit the model: preprocessor_config.json makes [3, 4, 4] of "
            "it, and the model takes [3, 8, 8].",
        ),
        (
            None,
            (2, 8, 8, 5),
            "The picture of {data}, example 1 does not suit the model: its shape is [8, 8, 5], expected 3",
        ),
    ],
    ids=["no JSON", "no processor", "another size", "channels"],
)
def test_pictures_that_do_not_suit(settings: str | None, shape: tuple[int, ...], sentence: str, tmp_path: Path) -> None:
    base = making.checkpoint(tmp_path / "vit", "vit", num_channels=3)
    if settings is not None:
        (base / "preprocessor_config.json").write_text(settings)
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8)[:1], labels=np.array([9]))
    with pytest.raises(InputError) as caught:
        making.run(base, tmp_path / "a.npz", tmp_path / "out", steps=1, batch_size=1)
    assert str(caught.value).startswith(sentence.format(base=base, data=tmp_path / "a.npz"))


def test_a_head_for_other_labels(tmp_path: Path) -> None:
    """Is replaced only when asked."""
    base = making.checkpoint(tmp_path / "vit", "vit")
    np.savez(tmp_path / "a.npz", images=np.zeros((4, 8, 8), np.uint8), labels=np.array([0, 1, 2, 11]))
    with pytest.raises(InputError) as caught:
        making.run(base, tmp_path / "a.npz", tmp_path / "out", steps=1)
    assert str(caught.value) == (
        f"{base} has a head for 10 labels, and the data have 12; pass --new-head for a fresh one."
    )
    making.run(base, tmp_path / "a.npz", tmp_path / "out", steps=1, new_head=True)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").num_labels == 12


@pytest.mark.parametrize(
    ("kind", "row", "task", "sentence"),
    [
        (
            "vit",
            {"text": "a"},
            None,
            "{base} is a checkpoint of ViTForImageClassification, which cannot learn causal-lm",
        ),
        ("bert", {"text": "a"}, None, "{base} is a checkpoint of BertForMaskedLM, which cannot learn seq2seq"),
        ("llama", {"prompt": "a", "completion": "b"}, "seq2seq", "{base} is a checkpoint of LlamaForCausalLM, which"),
        (
            "t5",
            {"text": "a"},
            None,
            "{data} holds examples of the kind 'text', and seq2seq learns from completion or tokens",
        ),
        (
            "llama",
            {"text": "a"},
            "classification",
            "{data} holds examples of the kind 'text', and classification learns",
        ),
    ],
)
def test_a_checkpoint_of_another_task(kind: str, row: Any, task: str | None, sentence: str, tmp_path: Path) -> None:
    base = making.checkpoint(tmp_path / "model", kind)
    data = making.jsonl(tmp_path / "a.jsonl", [row])
    if kind == "bert":  # has a class of its own for causal language models
        task, data = "seq2seq", making.jsonl(data, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError) as caught:
        making.run(base, data, tmp_path / "out", steps=1, task=task)
    assert str(caught.value).startswith(sentence.format(base=base, data=data))
    assert not (tmp_path / ".out.partial").exists()


def test_masked_models_foretell_nothing(tmp_path: Path) -> None:
    base = making.checkpoint(tmp_path / "bert", "bert")
    data = making.texts(tmp_path / "a.jsonl", 3)
    with pytest.raises(
        InputError, match="is a checkpoint of BertForMaskedLM, whose tokens see what comes after them, "
    ):
        making.run(base, data, tmp_path / "out", steps=1)


def test_one_class_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    base = making.checkpoint(tmp_path / "bert", "bert")
    data = making.jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "yes"}, {"text": "b", "label": "yes"}])
    with pytest.raises(InputError, match=r"a\.jsonl has one class only, 'yes', so there is nothing to tell apart\.$"):
        making.run(base, data, tmp_path / "out", steps=1)


def test_labels_of_pictures_are_whole_numbers(tmp_path: Path) -> None:
    base = making.checkpoint(tmp_path / "vit", "vit")
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0.5, 1, 2]))
    with pytest.raises(InputError, match=r"a\.npz has labels of float64 \[3\], expected a whole number for each image"):
        making.run(base, tmp_path / "a.npz", tmp_path / "out", steps=1)


def test_a_label_that_there_is_not(tmp_path: Path) -> None:
    """In the data to evaluate on, with its line."""
    base = making.checkpoint(tmp_path / "bert", "bert")
    data = making.jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}])
    held = making.jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": "yes"}, {"text": "b", "label": "maybe"}])
    with pytest.raises(InputError, match=r"b\.jsonl, line 2: 'label' is 'maybe', which is none of no or yes\."):
        making.run(base, data, tmp_path / "out", steps=1, eval_data=str(held))


def test_the_loss_is_over_the_last_positions() -> None:
    """A method may put positions of its own before the text."""
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    longer = torch.cat([torch.randn(2, 3, 7), logits], dim=1)
    task = TASKS["causal-lm"]
    torch.testing.assert_close(task.loss(longer, labels), task.loss(logits, labels))
    assert task.right(longer, labels) == task.right(logits, labels)


def test_recipes(tmp_path: Path) -> None:
    """LIMA's dropout rises over the layers, its end token is in the vocabulary, and what is given comes first."""
    base = making.checkpoint(tmp_path / "model")
    pairs = [{"prompt": text[:40], "completion": text[40:70]} for text in SENTENCES[:8]]
    data = making.jsonl(tmp_path / "a.jsonl", pairs)
    output = tmp_path / "out"
    surgery.train(base, data=data, output=output, recipe="lima", steps=2, batch_size=2, device="cpu")
    options = json.loads((output / "surgery.json").read_bytes())["options"]
    assert (options["schedule"], options["batch_size"], options["epochs"], options["steps"]) == ("linear", 2, None, 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert tokenizer.convert_tokens_to_ids("<|end_of_turn|>") == making.WORDS
    assert transformers.AutoConfig.from_pretrained(output).vocab_size == making.WORDS + 1
    with pytest.raises(OptionError, match="--recipe is 'soup', expected lima, lora-paper, upcycle or a YAML file"):
        surgery.train(base, data=data, output=tmp_path / "other", recipe="soup")
    mine = tmp_path / "mine.yaml"
    mine.write_text("learning_rat: 1\n")
    with pytest.raises(
        OptionError, match=r"has the option 'learning_rat', which there is not. Did you mean learning_rate"
    ):
        surgery.train(base, data=data, output=tmp_path / "other", recipe=str(mine))


def test_dropout_rises_over_the_layers() -> None:
    """From none at the bottom: the share of zeros in what each part adds."""
    from surgery.training.dropout import add_residual_dropout

    made = making.model().train()
    seen: list[torch.Tensor] = []
    assert add_residual_dropout(made, 0.5) == 4
    for layer in made.model.layers:
        layer.mlp.register_forward_hook(lambda *a: seen.append(a[2]))
    made(input_ids=torch.arange(200)[None])
    bottom, top = (float((output == 0).float().mean()) for output in seen)
    assert bottom == 0
    assert abs(top - 0.5) < 0.05  # 6,400 draws: eight standard deviations
    seen.clear()
    made.eval()(input_ids=torch.arange(200)[None])
    assert float((seen[1] == 0).float().mean()) == 0


# What a head and its data call classes, and what a classifier needs beside its head --------------------------------


def test_classes_of_pictures_go_by_their_names(tmp_path: Path) -> None:
    """Folders are numbered by the alphabet; a head may have another order, and more classes than the data."""
    from PIL import Image

    for number, name in enumerate(("ant", "Bee", "cow")):
        (tmp_path / "all" / name).mkdir(parents=True)
        for shade in range(4):
            picture = np.full((8, 8), 90 * number + shade, np.uint8)
            Image.fromarray(picture).save(tmp_path / "all" / name / f"{shade}.png")
    base = making.checkpoint(tmp_path / "vit", "vit")
    how: dict[str, Any] = {"new_head": True, "steps": 1, "learning_rate": 0.0}
    making.run(base, tmp_path / "all", tmp_path / "sorted", **how)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "sorted")
    assert model.config.id2label == {0: "Bee", 1: "ant", 2: "cow"}
    with torch.no_grad():
        for part in (model.classifier.weight, model.classifier.bias):
            part.copy_(part[[2, 0, 1]].clone())
    model.config.id2label = {0: "cow", 1: "bee", 2: "ant"}
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path / "turned")
    found = [
        surgery.evaluate(tmp_path / name, data=tmp_path / "all", device="cpu").lines[0] for name in ("sorted", "turned")
    ]
    assert found[1].loss == pytest.approx(found[0].loss)
    assert found[1].accuracy == found[0].accuracy
    # Training goes on with the head as it is, on some of its classes, too.
    for path in (tmp_path / "all" / "ant").iterdir():
        path.unlink()
    (tmp_path / "all" / "ant").rmdir()
    report = making.run(tmp_path / "turned", tmp_path / "all", tmp_path / "on", steps=1, learning_rate=0.0)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "on")
    assert model.config.id2label == {0: "cow", 1: "bee", 2: "ant"}
    some = surgery.evaluate(tmp_path / "sorted", data=tmp_path / "all", device="cpu").lines[0]
    assert report.first_loss == pytest.approx(some.loss, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_that_has_no_padding_classifies(tmp_path: Path, kind: str) -> None:
    """By the last token of each text, whatever stands after it in a batch."""
    base = making.checkpoint(tmp_path / kind, kind)
    data = labelled(tmp_path / "a.jsonl")
    report = making.run(base, data, tmp_path / "out", steps=2, learning_rate=1e-2, eval_data=str(data))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    total = 0.0
    with torch.no_grad():
        for row in rows:
            logits = model(**making.tokenizer()(row["text"], return_tensors="pt")).logits
            total += torch.nn.functional.cross_entropy(logits, torch.tensor([row["label"]])).item()
    assert report.best_loss == pytest.approx(total / len(rows), abs=1e-6)
    assert surgery.evaluate(tmp_path / "out", data=data, device="cpu").lines[0].loss == pytest.approx(report.best_loss)
    making.run(base, data, tmp_path / "lora", steps=1, method="lora")
    line = surgery.evaluate(base, data=data, adapters=[tmp_path / "lora"], device="cpu").lines[0]
    assert line.accuracy is not None


@pytest.mark.parametrize("method", ["lora", "adapter-h"])
def test_a_fresh_pooler_is_stored_with_the_head(tmp_path: Path, method: str) -> None:
    """BERT's language models lack it: without it the adapter would be another model wherever it is loaded."""
    base = making.checkpoint(tmp_path / "bert", "bert")
    data = labelled(tmp_path / "a.jsonl")
    report = making.run(base, data, tmp_path / "out", method=method, steps=3, learning_rate=1e-2, eval_data=str(data))
    assert report.method == method
    for seed in (0, 7):  # which draws other weights for what is missing
        found = surgery.evaluate(base, data=data, adapters=[tmp_path / "out"], seed=seed, device="cpu")
        assert found.lines[0].loss == pytest.approx(report.best_loss, abs=1e-6)
    if method == "lora":
        surgery.merge(base, tmp_path / "out", output=tmp_path / "merged")
        merged = surgery.evaluate(tmp_path / "merged", data=data, device="cpu")
        assert merged.lines[0].loss == pytest.approx(report.best_loss, abs=1e-5)
    on = making.run(tmp_path / "out", data, tmp_path / "on", base=base, steps=1, learning_rate=0.0, eval_data=str(data))
    assert on.eval_loss == pytest.approx(report.best_loss, abs=1e-6)
    with pytest.raises(OptionError, match="bert lacks the weights of its pooler"):
        making.run(base, data, tmp_path / "prompt", method="prompt", steps=1)
