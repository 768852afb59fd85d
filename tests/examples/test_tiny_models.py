"""The models and the measure that the examples are built on."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import (
    CONTEXT,
    Tokens,
    Training,
    encode,
    evaluate,
    make_model,
    make_tokenizer,
    python_manual,
    python_source,
    train,
)

TEXTS = ["def double(x):\n    return 2 * x\n", "# π is not 3\n" * 20]


def test_no_paragraph_of_a_held_out_topic_is_trained_on() -> None:
    """Topics of the manual quote one another; what is held out of one is held out of all."""
    manual = python_manual()
    held_out = {part for text in manual.held_out for part in text.split("\n\n")}
    assert held_out
    assert not held_out & {part for text in manual.train for part in text.split("\n\n")}


def test_the_source_has_no_page_of_the_manual() -> None:
    source, manual = python_source(1_000_000), python_manual()
    paragraphs = {part for text in manual.held_out for part in text.split("\n\n") if len(part) > 200}
    assert not [part for part in paragraphs for text in source.train if part in text]


def test_the_selection_is_the_same_every_time() -> None:
    assert python_source(200_000) == python_source(200_000)
    assert python_manual() == python_manual()


def test_tokens_give_back_the_text() -> None:
    tokenizer = make_tokenizer(TEXTS, 300)
    tokens = encode(tokenizer, TEXTS)
    end = tokenizer.eos_token
    assert tokenizer.decode(tokens.ids) == "".join(text + end for text in TEXTS)
    assert tokens.nbytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("count", [2, CONTEXT, CONTEXT + 1, CONTEXT + 2, 3 * CONTEXT + 5])
def test_every_token_but_the_first_is_measured_once(count: int) -> None:
    """A model that finds all tokens equally likely has a loss of ln V for each of them."""
    model = make_model(vocabulary=64, hidden=32, layers=1, seed=0)
    torch.nn.init.zeros_(model.lm_head.weight)
    loss = evaluate(model, Tokens(torch.randint(64, (count,)), nbytes=4 * count))
    assert loss.nats_per_token == pytest.approx(math.log(64))
    assert loss.bits_per_byte == pytest.approx(6 * (count - 1) / (4 * count))


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    how = Training(steps=100, learning_rate=2.0)
    rates = [how.rate(step) for step in range(100)]
    assert max(rates) == rates[4] == 2.0
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_training_is_the_same_every_time_and_lowers_the_loss() -> None:
    tokenizer = make_tokenizer(TEXTS, 280)
    tokens = encode(tokenizer, TEXTS * 4)
    losses: list[list[float]] = [[], []]
    for seen in losses:
        model = make_model(len(tokenizer), hidden=32, layers=1, seed=0)
        train(model, tokens, Training(steps=8, learning_rate=1e-2, batch=2), seen.append)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.5
