"""Figures of one checkpoint, against transformers' own loss, scikit-learn's and numpy's statistics, and by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

import surgery
from surgery.errors import InputError, NonFiniteError
from surgery.evaluation import metrics
from surgery.evaluation.report import EvalLine
from surgery.evaluation.vocabulary import bytes_of_tokens
from tests.surgery.evaluation.models import classifier, llama
from tests.surgery.training import making

# Sums over a few thousand tokens in float32, in batches of other widths.
NEAR = 2e-6


def line(checkpoint: Path, data: Path, **options: Any) -> EvalLine:
    (found,) = surgery.evaluate(checkpoint, data=data, device="cpu", **options).lines
    return found


def loss_by_transformers(model: Any, rows: list[dict[str, Any]]) -> tuple[float, int]:
    """The sum over rows, one at a time, of what the model itself says is its loss."""
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        said = int((labels[:, 1:] != -100).sum()) if not model.config.is_encoder_decoder else labels.shape[1]
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss) * said
        count += said
    return total, count


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_texts(kind: str, tmp_path: Path) -> None:
    """Loss, perplexity, accuracy and bits per byte of whole texts; no batch size changes them."""
    base, data = making.checkpoint(tmp_path / "model", kind), making.texts(tmp_path / "t.jsonl", 20)
    words, model = making.tokenizer(), making.model(kind).eval()
    texts = making.paragraphs()[:20]
    rows = [{"input_ids": ids, "labels": ids} for text in texts if (ids := [*words(text)["input_ids"], 0])]
    total, count = loss_by_transformers(model, rows)
    found = line(base, data, batch_size=3)
    assert found.predictions == count
    assert found.loss == pytest.approx(total / count, rel=NEAR)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=10 * NEAR)
    # The first token of each text is not foretold, and the end of a text has no bytes.
    nbytes = sum(len(text.encode()) - len(words.decode(words(text)["input_ids"][:1]).encode()) for text in texts)
    assert found.nbytes == nbytes
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / nbytes, rel=NEAR)
    with torch.no_grad():
        right = [
            int(
                (
                    model(torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1) == torch.tensor(row["labels"][1:])
                ).sum()
            )
            for row in rows
        ]
    assert found.accuracy == pytest.approx(sum(right) / count)
    other = line(base, data, batch_size=20)
    assert other.loss == pytest.approx(found.loss, rel=NEAR)
    assert other.accuracy == found.accuracy


def completions(path: Path) -> tuple[Path, list[tuple[str, str]]]:
    pairs = [(text[:30], text[30:]) for text in making.paragraphs()[:12]]
    return making.jsonl(path, [{"prompt": prompt, "completion": said} for prompt, said in pairs]), pairs


def test_completions(tmp_path: Path) -> None:
    """Only completions are foretold: all their bytes, and the end token."""
    base = making.checkpoint(tmp_path / "model")
    data, pairs = completions(tmp_path / "p.jsonl")
    words, rows, nbytes = making.tokenizer(), [], 0
    for prompt, said in pairs:
        before, whole = words(prompt)["input_ids"], words(prompt + said)["input_ids"]
        after = whole[len(before) :] if whole[: len(before)] == before else words(said)["input_ids"]
        rows.append({"input_ids": [*before, *after, 0], "labels": [-100] * len(before) + [*after, 0]})
        nbytes += len(said.encode())
    total, count = loss_by_transformers(making.model().eval(), rows)
    found = line(base, data)
    assert (found.predictions, found.nbytes) == (count, nbytes)
    assert found.loss == pytest.approx(total / count, rel=NEAR)
    assert line(base, data, loss="all").predictions > count


def test_chats(tmp_path: Path) -> None:
    """The assistant's turns, as the template marks them."""
    base = making.checkpoint(tmp_path / "model")
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "user", "content": "What is a tuple?"}, {"role": "assistant", "content": "A sequence."}]
    data = making.jsonl(tmp_path / "c.jsonl", [{"messages": turns}] * 3)
    out = tmp_path / "answers.jsonl"
    found = line(base, data, chat_template=str(template), generate=out, max_new_tokens=4)
    words = making.tokenizer()
    ids, said = words("user: What is a tuple?\nassistant: ")["input_ids"], words("A sequence.")["input_ids"]
    whole = words("user: What is a tuple?\nassistant: A sequence.\n")["input_ids"]
    assert whole[len(ids) : len(ids) + len(said)] == said, "the case is simple: no token runs across the border"
    labels = [-100] * len(ids) + said + [-100] * (len(whole) - len(ids) - len(said))
    total, count = loss_by_transformers(making.model().eval(), [{"input_ids": whole, "labels": labels}])
    assert (found.predictions, found.nbytes) == (3 * count, 3 * len("A sequence."))
    assert found.loss == pytest.approx(total / count, rel=NEAR)
    first = surgery_answers(out)[0]
    assert (first["prompt"], first["reference"]) == ("user: What is a tuple?", "A sequence.")
    greedy = making.model().eval().generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert first["answer"] == words.decode(greedy[0, len(ids) :], skip_special_tokens=True)


def surgery_answers(path: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_sequence_to_sequence(tmp_path: Path) -> None:
    base = making.checkpoint(tmp_path / "model", "t5")
    data, pairs = completions(tmp_path / "p.jsonl")
    words = making.tokenizer()
    rows = [{"input_ids": words(p)["input_ids"], "labels": [*words(c)["input_ids"], 0]} for p, c in pairs]
    total, count = loss_by_transformers(making.model("t5").eval(), rows)
    found = line(base, data, batch_size=5)
    assert (found.predictions, found.nbytes) == (count, sum(len(c.encode()) for _, c in pairs))
    assert found.loss == pytest.approx(total / count, rel=NEAR)


@pytest.mark.parametrize("classes", [2, 3])
def test_classes(classes: int, tmp_path: Path) -> None:
    """Against scikit-learn on predictions made one at a time."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    model = classifier(classes)
    base = making.checkpoint(tmp_path / "model", made=model)
    texts = making.paragraphs()[:30]
    labels = [len(text) % classes for text in texts]
    data = making.jsonl(tmp_path / "l.jsonl", [{"text": t, "label": k} for t, k in zip(texts, labels, strict=True)])
    with torch.no_grad():
        logits = torch.cat([model(**making.tokenizer()(text, return_tensors="pt")).logits for text in texts])
    predicted, found = logits.argmax(-1).tolist(), line(base, data)
    assert len({*predicted}) > 1, "a model that says one thing tests nothing"
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, torch.tensor(labels))), rel=1e-5)
    assert found.accuracy == pytest.approx(np.mean(np.array(predicted) == labels))
    assert found.matthews == pytest.approx(matthews_corrcoef(labels, predicted))
    assert found.f1_macro == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found.f1 == (pytest.approx(f1_score(labels, predicted)) if classes == 2 else None)
    assert found.perplexity is None


def test_numbers(tmp_path: Path) -> None:
    """Whole numbers, too, where the head is for numbers."""
    model = classifier(1, problem_type="regression")
    base = making.checkpoint(tmp_path / "model", made=model)
    texts = making.paragraphs()[:16]
    with torch.no_grad():
        said = np.array([float(model(**making.tokenizer()(text, return_tensors="pt")).logits) for text in texts])
    for labels in ([len(text) / 100 for text in texts], [len(text) // 50 for text in texts]):
        rows = [{"text": text, "label": value} for text, value in zip(texts, labels, strict=True)]
        found = line(base, making.jsonl(tmp_path / "n.jsonl", rows))
        assert found.loss == pytest.approx(np.mean((said - np.array(labels)) ** 2), rel=1e-5)
        assert found.pearson == pytest.approx(np.corrcoef(said, labels)[0, 1], rel=1e-4)
        ranks = [
            np.array([(sorted(v).index(x) + len(v) - 1 - sorted(v)[::-1].index(x)) / 2 for x in v])
            for v in (said.tolist(), labels)
        ]
        assert found.spearman == pytest.approx(np.corrcoef(np.stack(ranks))[0, 1], rel=1e-4)
        assert found.accuracy is None
    same = making.jsonl(tmp_path / "s.jsonl", [{"text": text, "label": 0.5} for text in texts])
    found = line(base, same)
    assert (found.pearson, found.spearman) == (None, None), "undefined without two values"


def test_pictures(tmp_path: Path) -> None:
    base = making.checkpoint(tmp_path / "model", "vit")
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (20, 8, 8), dtype=np.uint8), random.integers(0, 10, 20)
    np.savez(tmp_path / "i.npz", images=images, labels=labels)
    pixels = torch.from_numpy((images / np.float32(255) - 0.5) / 0.5).float()[:, None]
    with torch.no_grad():
        logits = making.model("vit").eval()(pixels).logits
    found = line(base, tmp_path / "i.npz")
    assert found.loss == pytest.approx(float(functional.cross_entropy(logits, torch.from_numpy(labels))), rel=1e-5)
    assert found.accuracy == pytest.approx(float((logits.argmax(-1).numpy() == labels).mean()))


@pytest.mark.parametrize("shipped", [False, True])
def test_routers(shipped: bool, tmp_path: Path) -> None:
    """Loads sum to one, and the entropy is that of the router's scores over the tokens that are there."""
    data = making.texts(tmp_path / "t.jsonl", 6)
    if shipped:
        surgery.upcycle(
            making.checkpoint(tmp_path / "gpt2", "gpt2"), experts=4, output=tmp_path / "model", verify=False, hash=False
        )
    else:
        making.checkpoint(tmp_path / "model", "mixtral")
    found = line(tmp_path / "model", data, batch_size=4)
    assert found.load
    assert found.router_entropy
    assert found.load.keys() == found.router_entropy.keys()
    assert all(sum(load) == pytest.approx(1, abs=1e-5) for load in found.load.values())
    alone = line(tmp_path / "model", data, batch_size=1)
    assert alone.load is not None
    assert alone.router_entropy == pytest.approx(found.router_entropy, rel=1e-5)
    for layer, load in found.load.items():
        assert load == pytest.approx(alone.load[layer], abs=1e-5)
    if not shipped:
        model, words, sums, tokens = making.model("mixtral").eval(), making.tokenizer(), 0.0, 0
        for text in making.paragraphs()[:6]:
            ids = torch.tensor([[*words(text)["input_ids"], 0]])
            with torch.no_grad():
                shares = model(ids, output_router_logits=True).router_logits[0].softmax(-1)
            sums += float(-(shares * shares.log()).sum())
            tokens += ids.shape[1]
        assert found.router_entropy["0"] == pytest.approx(sums / tokens, rel=1e-5)


@pytest.mark.slow
def test_experts_do_not_see_padding(tmp_path: Path) -> None:
    """Neither Switch's capacity nor experts that choose: figures are those of rows one at a time."""
    making.model("switch").save_pretrained(tmp_path / "switch")
    rows = [{"input_ids": [*range(1, n)], "labels": [*range(2, n // 2 + 3)]} for n in (4, 10, 6, 15, 8)]
    tokens = making.jsonl(tmp_path / "ids.jsonl", rows)
    bert = making.checkpoint(tmp_path / "bert", made=classifier(2))
    surgery.upcycle(bert, experts=4, router="expert-choice", output=tmp_path / "moe", verify=False, hash=False)
    weights = tmp_path / "moe" / "model.safetensors"
    random = torch.Generator().manual_seed(0)
    stored = {  # experts that are alike would not care who comes to them
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=random) if "experts" in name else tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(stored, weights, {"format": "pt"})
    labelled = [{"text": text, "label": len(text) % 2} for text in making.paragraphs()[:9]]
    for model, data in (("switch", tokens), ("moe", making.jsonl(tmp_path / "l.jsonl", labelled))):
        alone, together = (line(tmp_path / model, data, batch_size=size) for size in (1, 9))
        assert together.loss == pytest.approx(alone.loss, rel=NEAR)
        assert together.load == alone.load
        assert together.uncovered == alone.uncovered
        assert together.router_entropy == pytest.approx(alone.router_entropy, rel=1e-5)


# Bytes of tokens ------------------------------------------------------------------------------------------------------


def test_bytes_of_a_byte_level_vocabulary() -> None:
    """Sum to the length of the text in UTF-8, also where a letter takes several tokens."""
    words = making.tokenizer()
    widths = bytes_of_tokens(words)
    for text in ("plain", "é, ∑ and 😀", " spaces  and\n\tlines ", *making.paragraphs()[:5]):
        ids = words(text)["input_ids"]
        assert int(widths[ids].sum()) == len(text.encode())
    assert widths[words.eos_token_id] == 0


def test_bytes_of_other_vocabularies() -> None:
    """Metaspace with bytes to fall back on, as SentencePiece has it, and WordPiece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = {"<unk>": 0, "▁a": 1, "b": 2, "▁": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    made = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    widths = bytes_of_tokens(words)
    assert widths[:4].tolist() == [0, 2, 1, 1]
    assert widths[4:].tolist() == [1] * 256
    assert int(widths[words("b é")["input_ids"]].sum()) == len(" b é".encode()), "the space that Metaspace puts first"
    made = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    assert bytes_of_tokens(words).tolist() == [0, 4, 3]


# Answers --------------------------------------------------------------------------------------------------------------


def test_scores_of_answers() -> None:
    """By hand: three of four words shared, two of three pairs, and BLEU from n-gram precisions and the brevity."""
    found = metrics.of_answers(["the cat sat down", " same ", ""], ["the cat sat up", "same", "empty"])
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["rouge1"] == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert found["rouge2"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert found["rouge_l"] == pytest.approx((3 / 4 + 1 + 0) / 3)
    # Of 5 words 4 are shared, of 3 pairs 2, of 2 triples 1, of 1 four none, counted as a half; 6 words were wanted.
    brevity = math.exp(1 - 6 / 5)
    assert found["bleu"] == pytest.approx(100 * brevity * (4 / 5 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit(tmp_path: Path) -> None:
    """A checkpoint of another task, a head for other labels, a tokenizer of another model."""
    base = making.checkpoint(tmp_path / "model")
    labelled = making.jsonl(tmp_path / "l.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 2}])
    with pytest.raises(
        InputError, match=r"model has no head for classes, so there is nothing to evaluate on .*l.jsonl"
    ):
        line(base, labelled)
    head = making.checkpoint(tmp_path / "head", made=classifier(2))
    with pytest.raises(InputError, match=r"head has a head for 2 labels, and .*l.jsonl has 3 labels"):
        line(head, labelled)
    with pytest.raises(InputError, match="is a checkpoint of BertForSequenceClassification, which cannot learn causal"):
        line(head, making.texts(tmp_path / "t.jsonl", 2))
    small = making.checkpoint(tmp_path / "small", made=llama(vocab_size=100))
    with pytest.raises(InputError, match=r"t.jsonl, line \d has token \d+, and .*small has 100; is the tokenizer"):
        line(small, making.texts(tmp_path / "t.jsonl", 2))


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    model = making.model()
    model.model.norm.weight.data[0] = float("nan")
    base, data = making.checkpoint(tmp_path / "model", made=model), making.texts(tmp_path / "t.jsonl", 3)
    with pytest.raises(NonFiniteError, match=r"gives a loss that is no number on .*t.jsonl, line \d and 2 more; look"):
        line(base, data)
