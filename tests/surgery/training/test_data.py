"""Data: what is learnt from each kind, and what is said about data that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import InputError, OptionError
from surgery.training.batches import share, text_batch
from surgery.training.examples import Examples, hold_out, pack, text_examples
from surgery.training.options import TrainOptions
from surgery.training.reading import read_rows
from surgery.training.tasks import find_labels
from surgery.training.text import UNSAID, Encoder, load_tokenizer
from tests.surgery.training import making

MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "What is a list?"},
    {"role": "assistant", "content": "A sequence."},
    {"role": "user", "content": "And a set?"},
    {"role": "assistant", "content": "No sequence."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    making.tokenizer().save_pretrained(place)
    return place


def examples(data: Path, folder: Path, task: str = "causal-lm", limit: int = 64, **others: Any) -> Examples:
    options = TrainOptions(data=str(data), **others)
    rows = read_rows(str(data))
    encoder = Encoder.of(load_tokenizer(folder, options), rows.kind, task, options, making.WORDS)
    return text_examples(rows, encoder, limit, options)


def said(found: Examples, index: int = 0) -> tuple[str, str]:
    """The text of a piece, and that part of it which is to be learnt."""
    ids, labels = found.piece(index)
    assert all(label in (UNSAID, token) for token, label in zip(ids.tolist(), labels.tolist(), strict=True))
    tokenizer = making.tokenizer()
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != UNSAID])


# What is learnt -------------------------------------------------------------------------------------------------------


def test_text_is_learnt_whole(folder: Path, tmp_path: Path) -> None:
    found = examples(making.jsonl(tmp_path / "a.jsonl", [{"text": "def f(): pass"}]), folder)
    text, learnt = said(found)
    assert text == "def f(): pass<|end|>"
    assert text.endswith(learnt)
    assert found.counts.tolist() == [len(found.piece(0)[0]) - 1]  # nothing comes before the first token


def test_only_completions_are_learnt(folder: Path, tmp_path: Path) -> None:
    data = making.jsonl(tmp_path / "a.jsonl", [{"prompt": "What is a list? ", "completion": "A sequence."}])
    assert said(examples(data, folder)) == ("What is a list? A sequence.<|end|>", "A sequence.<|end|>")
    assert said(examples(data, folder, loss="all"))[1].endswith("is a list? A sequence.<|end|>")


def test_only_the_assistant_is_learnt(folder: Path, tmp_path: Path) -> None:
    """Every turn of it, with the template's own end of a turn."""
    template = tmp_path / "template.jinja"
    template.write_text(MARKED)
    data = making.jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    found = examples(data, folder, chat_template=str(template))
    text, learnt = said(found)
    assert text == "<user>What is a list?<assistant>A sequence.<|end|><user>And a set?<assistant>No sequence.<|end|>"
    assert learnt == "A sequence.<|end|>No sequence.<|end|>"
    assert said(examples(data, folder, chat_template=str(template), loss="all"))[1].endswith("No sequence.<|end|>")


def test_another_end_token(folder: Path, tmp_path: Path) -> None:
    """It is added to the vocabulary, and takes the place of the tokenizer's own."""
    data = making.jsonl(tmp_path / "a.jsonl", [{"prompt": "a ", "completion": "b"}])
    ids, _ = examples(data, folder, end_token="<|turn|>").piece(0)
    assert ids[-1] == making.WORDS


def test_formats_hold_the_same(folder: Path, tmp_path: Path) -> None:
    """JSONL, CSV and Parquet of the same rows give the same tokens."""
    import datasets

    rows = [{"prompt": f"question {n}, ", "completion": f"answer\n{n}"} for n in range(5)]
    jsonl = making.jsonl(tmp_path / "rows.jsonl", rows)
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "rows.csv")
    table.to_parquet(tmp_path / "rows.parquet")
    found = [examples(jsonl.with_suffix(end), folder) for end in (".jsonl", ".csv", ".parquet")]
    for number in range(5):
        first, *others = [item.piece(number)[0].tolist() for item in found]
        assert others == [first, first]


def test_a_folder_of_texts_is_a_document_a_file(folder: Path, tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"{name}: two\nlines\n")
    found = examples(tmp_path, folder)
    assert said(found, 0)[0] == "a.txt: two\nlines\n<|end|>"
    assert len(found) == 2


def test_pictures_and_arrays(tmp_path: Path) -> None:
    """A folder of pictures by class, and arrays that numpy wrote."""
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (200, 10, 10)).save(tmp_path / "pictures" / name / "1.png")
    rows = read_rows(str(tmp_path / "pictures"))
    assert (rows.kind, len(rows.dataset)) == ("image", 2)
    assert find_labels(rows, None).names == ("cat", "dog")
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0, 2, 1]))
    arrays = read_rows(str(tmp_path / "a.npz"))
    assert (arrays.kind, arrays.dataset["label"][1]) == ("image", 2)


# Length and packing ---------------------------------------------------------------------------------------------------


def test_long_examples_are_counted_and_left_alone(folder: Path, tmp_path: Path) -> None:
    data = making.jsonl(tmp_path / "a.jsonl", [{"text": "short"}, {"text": "word " * 50}, {"text": "x" * 90}])
    with pytest.raises(InputError) as caught:
        examples(data, folder, limit=16)
    count = len(making.tokenizer()("word " * 50)["input_ids"]) + 1
    assert str(caught.value) == (
        f"2 of 3 examples are longer than 16 tokens, the longest has {count} ({data}, line 2); pass --over-length "
        "truncate, skip or split, or another --max-length."
    )
    cut = examples(data, folder, limit=16, over_length="truncate")
    assert [len(cut.piece(n)[0]) for n in range(3)][1:] == [16, 16]
    assert (cut.longer, cut.truncated, cut.skipped) == (2, 2, 0)
    left = examples(data, folder, limit=16, over_length="skip")
    assert (len(left), left.longer, left.skipped) == (1, 2, 2)


def test_split_loses_nothing(folder: Path, tmp_path: Path) -> None:
    text = "\n".join(making.paragraphs()[:3])
    data = making.jsonl(tmp_path / "a.jsonl", [{"text": text}])
    found = examples(data, folder, limit=16, over_length="split")
    whole = [token for number in range(len(found)) for token in found.piece(number)[0].tolist()]
    assert making.tokenizer().decode(whole) == text + "<|end|>"
    assert found.counts.sum() == len(whole) - len(found)


def test_what_is_cut_away_has_nothing_to_learn(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * 40, "completion": "x"}, {"prompt": "a", "completion": "b"}]
    found = examples(making.jsonl(tmp_path / "a.jsonl", rows), folder, limit=16, over_length="truncate")
    assert (len(found), found.skipped, found.truncated) == (1, 1, 1)
    with pytest.raises(
        InputError, match=r"No example of .*a\.jsonl has a token to learn, with at most 16 tokens each\."
    ):
        examples(making.jsonl(tmp_path / "a.jsonl", rows[:1]), folder, limit=16, over_length="truncate")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_holds_every_piece_once(lengths: list[int]) -> None:
    """No row is too long, and no two of them are half empty."""
    rows = pack(np.array(lengths), 20)
    assert sorted(int(piece) for row in rows for piece in row) == list(range(len(lengths)))
    assert all(sum(lengths[piece] for piece in row) <= 20 for row in rows)
    assert sum(2 * sum(lengths[piece] for piece in row) <= 20 for row in rows) <= 1


def test_a_packed_batch_tells_where_pieces_begin(folder: Path, tmp_path: Path) -> None:
    data = making.jsonl(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "defgh"}, {"text": "word " * 5}])
    found = examples(data, folder, limit=24, packing=True)
    batch = text_batch(found, range(len(found)), 0, packed=True)
    starts = (batch["position_ids"] == 0).nonzero().tolist()
    lengths = [len(found.piece(int(piece))[0]) for row in found.items for piece in row]
    assert len(starts) >= len(lengths)
    assert "attention_mask" not in batch
    assert int((batch["labels"] != UNSAID).sum()) == sum(lengths) - 3


@given(st.integers(1, 40), st.integers(1, 7))
def test_processes_share_a_batch(rows: int, processes: int) -> None:
    shares = [share(range(rows), process, processes) for process in range(processes)]
    assert [row for part in shares for row in part] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_held_out_examples_are_not_trained_on(folder: Path, tmp_path: Path) -> None:
    found = examples(making.texts(tmp_path / "a.jsonl", 20), folder, limit=512)
    kept, held = hold_out(found, 0.25, seed=1)
    rows = [{int(part.pieces[piece, 0]) for item in part.items for piece in item} for part in (kept, held)]
    assert rows[0] | rows[1] == set(range(20))
    assert len(rows[1]) == 5
    assert not rows[0] & rows[1]
    assert len(hold_out(found, 3, seed=1)[1]) == 3
    with pytest.raises(InputError, match="--eval-split holds out 20 of 20 examples; nothing is left to train on"):
        hold_out(found, 20, seed=1)


# What is said about bad data ------------------------------------------------------------------------------------------

BAD: list[tuple[str, bytes, str]] = [
    ("empty.jsonl", b"", "{file} is empty."),
    ("cut.jsonl", b'{"text": "a"}\n{"text": \n', "{file}, line 2: not JSON (Expecting value), expected one object to a line."),
    ("list.jsonl", b'{"text": "a"}\n\n["b"]\n', "{file}, line 3: list, expected an object."),
    ("hole.jsonl", b'{"text": "a"}\n\n{"text": null}\n', "{file}, line 3: it has no 'text'."),
    ("blank.jsonl", b'{"text": "a"}\n{"text": ""}\n', "{file}, line 2: 'text' is empty."),
    ("numbers.jsonl", b'{"text": 3}\n', "{file}, line 1: 'text' is int, expected text."),
    ("half.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n', "{file}, line 2: it has no 'completion'."),
    ("turns.jsonl", b'{"messages": []}\n', "{file}, line 1: 'messages' is no list of turns."),
    ("mute.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "{file}, line 1: the assistant says nothing in it."),
    ("wide.csv", b"text,label\na,1\nb,2,3\n", "{file}, line 3: 3 fields, expected 2."),
    ("foreign.jsonl", b'{"foo": 1}\n', "{file} has the columns 'foo', expected 'text', 'prompt' and 'completion', 'messages', "
     "'text' and 'label', 'image' and 'label', or 'input_ids'."),
    ("tokens.jsonl", b'{"input_ids": [1, 999]}\n', "{file}, line 1: 'input_ids' has a token outside of the vocabulary of 320."),
    ("data.xyz", b"?", "{file} is of no kind that is known here: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, .md, .py, "
     ".rst, .npz, or a folder of such or of images."),
    ("bad.npz", b"?", "{file} is no archive of arrays that numpy can read: "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "sentence"), BAD, ids=[name for name, _, _ in BAD])
def test_bad_data_are_named(name: str, content: bytes, sentence: str, folder: Path, tmp_path: Path) -> None:
    """File, line, what was found and what was expected."""
    data, template = tmp_path / name, tmp_path / "template.jinja"
    data.write_bytes(content)
    template.write_text(MARKED)
    with pytest.raises(InputError) as caught:
        examples(data, folder, chat_template=str(template))
    assert str(caught.value).startswith(sentence.format(file=data))


def test_text_that_is_not_utf8(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "latin.jsonl"
    data.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl, line 2: not JSON"):
        examples(data, folder)


def test_data_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl does not exist\."):
        read_rows(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match=r"no/such is neither a path nor a data set that can be fetched"):
        read_rows("no/such")
    with pytest.raises(InputError, match="holds no files of a kind that is known"):
        read_rows(str(tmp_path))


def test_templates_that_do_not_serve(folder: Path, tmp_path: Path) -> None:
    data = making.jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(
        InputError, match=r"has no chat template, and the data are chats; give one with --chat-template"
    ):
        examples(data, folder)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError) as caught:
        examples(data, folder, chat_template=str(template))
    assert str(caught.value) == (
        "The chat template does not mark what the assistant says with {% generation %} and {% endgeneration %}; give one "
        "that does with --chat-template FILE, or train on all turns with --loss all."
    )
    assert said(examples(data, folder, chat_template=str(template), loss="all"))[0].startswith("What is a list?A seq")


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer that can be loaded .*; name one with --tokenizer\."):
        load_tokenizer(tmp_path, TrainOptions(data="x"))


def test_options_that_do_not_go_together() -> None:
    """All at once."""
    with pytest.raises(OptionError) as caught:
        TrainOptions(data="x", steps=3, epochs=1, batch_size=0, schedule="steep", patience=1, learning_rate=-1)
    assert caught.value.problems == (
        "--schedule is 'steep', expected cosine, linear or constant.",
        "--batch-size is 0, expected at least 1.",
        "--learning-rate is -1, expected 0 or more.",
        "--steps and --epochs both say how long to train; give one of them.",
        "--patience needs evaluations; give --eval-data or --eval-split.",
    )


def test_tokens_as_they_are(tmp_path: Path) -> None:
    """Without any tokenizer."""
    base = making.checkpoint(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    rows = [{"input_ids": list(range(1, 9)), "labels": [-100] * 4 + list(range(5, 9))}] * 4
    report = making.run(base, making.jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", steps=1)
    assert (report.data.kind, report.data.tokens, report.data.predictions) == ("tokens", 32, 16)
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["model_type"] == "llama"
    assert torch.isfinite(torch.tensor(making.losses(tmp_path / "out"))).all()


@pytest.mark.parametrize("label", [999, -5, "a", 1.5, None, True])
def test_labels_that_are_no_tokens(tmp_path: Path, label: object) -> None:
    """Are named before the first step."""
    base = making.checkpoint(tmp_path / "base")
    data = making.jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3], "labels": [-100, label, 3]}])
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: 'labels' has .*, expected -100 or a token below 320\.$"):
        making.run(base, data, tmp_path / "out", steps=1)


@pytest.mark.parametrize("kind", ["Opt", "Bloom", "Mpt"])
def test_packing_where_examples_would_see_each_other(tmp_path: Path, kind: str) -> None:
    """transformers makes no mask of positions for these."""
    import transformers

    sizes = {
        "Opt": {"hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 32, "word_embed_proj_dim": 32},
        "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
        "Mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "expansion_ratio": 1},
    }[kind]
    heads = {"num_attention_heads": 2} if kind == "Opt" else {}
    name = {"Opt": "OPT"}.get(kind, kind)
    config = getattr(transformers, f"{name}Config")(vocab_size=making.WORDS, **sizes, **heads)
    base = making.checkpoint(tmp_path / "base", made=getattr(transformers, f"{name}ForCausalLM")(config))
    data = making.texts(tmp_path / "t.jsonl", 4)
    with pytest.raises(OptionError, match=rf"base \({name}ForCausalLM\) takes no notice of where one ends"):
        making.run(base, data, tmp_path / "out", packing=True, steps=1)
