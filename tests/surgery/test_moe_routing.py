"""Routers, combine weights, losses and the layer, against plain numpy in float64."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from surgery.moe import modeling_upcycled as moe

Array = np.ndarray[Any, Any]
SHAPES = {
    "groups": st.integers(1, 3),
    "n": st.integers(1, 12),
    "experts": st.integers(1, 6),
    "seed": st.integers(0, 2**16),
}


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_top_k(logits: Array, k: int) -> Array:
    taken = np.zeros(logits.shape, bool)
    for place in np.ndindex(logits.shape[:-1]):
        taken[place][np.argsort(-logits[place])[:k]] = True
    return taken


def numpy_expert_choice(logits: Array, capacity: float, real: Array) -> Array:
    taken = np.zeros(logits.shape, bool)
    for group, scores in enumerate(softmax(logits)):
        tokens = np.flatnonzero(real[group])
        count = min(len(tokens), max(1, math.ceil(capacity * len(tokens) / logits.shape[-1])))
        for expert in range(logits.shape[-1]):
            best = tokens[np.argsort(-scores[tokens, expert])[:count]]
            taken[group, best, expert] = True
    return taken


def numpy_weights(logits: Array, taken: Array, normalize: bool) -> Array:
    chosen = softmax(logits) * taken
    total = chosen.sum(-1, keepdims=True)
    return chosen / np.where(total > 0, total, 1) if normalize else chosen


def draw(groups: int, n: int, experts: int, seed: int) -> torch.Tensor:
    return torch.randn(groups, n, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(**SHAPES, k=st.integers(1, 6), normalize=st.booleans())
def test_top_k_is_what_numpy_says(groups: int, n: int, experts: int, seed: int, k: int, normalize: bool) -> None:
    logits, k = draw(groups, n, experts, seed), min(k, experts)
    taken = moe.choose_top_k(logits, k)
    expected = numpy_top_k(logits.numpy(), k)
    assert (taken.numpy() == expected).all()
    weights = moe.combine_weights(logits, taken, normalize)
    np.testing.assert_allclose(weights, numpy_weights(logits.numpy(), expected, normalize), atol=1e-14)


@settings(deadline=None, max_examples=30)
@given(
    **{**SHAPES, "experts": st.integers(2, 6)},
    capacity=st.floats(0.1, 7),
    normalize=st.booleans(),
    padded=st.booleans(),
)
def test_expert_choice_is_what_numpy_says(
    groups: int, n: int, experts: int, seed: int, capacity: float, normalize: bool, padded: bool
) -> None:
    logits = draw(groups, n, experts, seed)
    real = torch.rand(groups, n, generator=torch.Generator().manual_seed(seed)) < 0.7 if padded else None
    taken = moe.choose_by_experts(logits, capacity, real)
    mask = np.ones((groups, n), bool) if real is None else real.numpy()
    expected = numpy_expert_choice(logits.numpy(), capacity, mask)
    assert (taken.numpy() == expected).all()
    weights = moe.combine_weights(logits, taken, normalize)
    np.testing.assert_allclose(weights, numpy_weights(logits.numpy(), expected, normalize), atol=1e-14)


@pytest.mark.parametrize(
    ("tokens", "experts", "capacity", "expected"),
    [
        *((10, 4, 2, 5), (10, 4, 1, 3), (10, 32, 2, 1), (10, 32, 0.1, 1)),
        *((10, 4, 4, 10), (10, 4, 9, 10), (1, 8, 1, 1), (0, 8, 1, 0)),
    ],
)
def test_how_many_tokens_an_expert_takes(tokens: int, experts: int, capacity: float, expected: int) -> None:
    assert moe.tokens_per_expert(tokens, experts, capacity) == expected


@settings(deadline=None, max_examples=25)
@given(**SHAPES, k=st.integers(1, 6), padded=st.booleans())
def test_losses_are_what_numpy_says(groups: int, n: int, experts: int, seed: int, k: int, padded: bool) -> None:
    logits, k = draw(groups, n, experts, seed), min(k, experts)
    real = torch.rand(groups, n, generator=torch.Generator().manual_seed(seed)) < 0.7 if padded else None
    routing = moe.Routing(logits, moe.choose_top_k(logits, k), real)
    mask = np.ones((groups, n), bool) if real is None else real.numpy()
    scores, taken = logits.numpy()[mask], numpy_top_k(logits.numpy(), k)[mask]
    if not len(scores):
        assert routing.load_balancing_loss() == 0
        assert routing.router_z_loss() == 0
        return
    share, probability = taken.sum(0) / taken.sum(), softmax(scores).mean(0)
    assert float(routing.load_balancing_loss()) == pytest.approx(experts * (share * probability).sum(), rel=1e-12)
    assert float(routing.router_z_loss()) == pytest.approx((np.log(np.exp(scores).sum(-1)) ** 2).mean(), rel=1e-12)
    assert routing.tokens_per_expert.tolist() == taken.sum(0).tolist()


def test_balanced_routing_costs_one() -> None:
    logits = 50 * torch.eye(4).repeat(3, 1).unsqueeze(0)  # each token certain of another expert
    assert float(moe.load_balancing_loss(logits, moe.choose_top_k(logits, 1))) == pytest.approx(1)


def test_collapsed_routing_costs_the_number_of_experts() -> None:
    logits = torch.tensor([50.0, 0, 0, 0]).repeat(1, 12, 1)
    assert float(moe.load_balancing_loss(logits, moe.choose_top_k(logits, 1))) == pytest.approx(4)


def mlp(hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, 10), nn.Tanh(), nn.Linear(10, hidden))


def layer(seed: int = 0, identical: bool = False, jitter: float = 0.0, **options: Any) -> moe.MixtureOfExperts:
    torch.manual_seed(seed)
    options = {"layers": (0,), "num_experts": 4, **options}
    mixture = moe.MixtureOfExperts(mlp(), 6, moe.MoeOptions(**options, jitter=jitter))
    if not identical:
        for parameter in mixture.experts.parameters():
            nn.init.normal_(parameter)
    nn.init.normal_(mixture.router.weight)
    return mixture


def routing_of(mixture: moe.MixtureOfExperts) -> moe.Routing:
    """What the last run left."""
    assert mixture.routing is not None
    return mixture.routing


CHOICES = (
    {"router": "top-k", "num_experts_per_tok": 1},
    {"router": "top-k", "num_experts_per_tok": 3},
    {"router": "expert-choice", "capacity_factor": 0.5},
    {"router": "expert-choice", "capacity_factor": 2.0},
    {"router": "expert-choice", "capacity_factor": 2.0, "group": "batch"},
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_layer_adds_up_weighted_experts(choice: dict[str, Any], normalize: bool, training: bool) -> None:
    mixture = layer(**choice, normalize=normalize).double().train(training)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    tokens = x.reshape(1, 21, 6) if choice.get("group") == "batch" else x
    logits = (tokens @ mixture.router.weight.T).detach().numpy()
    if choice["router"] == "top-k":
        taken = numpy_top_k(logits, choice["num_experts_per_tok"])
    else:
        taken = numpy_expert_choice(logits, choice["capacity_factor"], np.ones(logits.shape[:2], bool))
    weights = numpy_weights(logits, taken, normalize)
    expected = sum(weights[..., e, None] * expert(tokens).detach().numpy() for e, expert in enumerate(mixture.experts))
    np.testing.assert_allclose(mixture(x).detach(), np.reshape(expected, (3, 7, 6)), atol=1e-12)
    assert mixture.routing is not None
    assert float(mixture.routing.uncovered) == pytest.approx((~taken.any(-1)).mean())


def test_tokens_that_no_expert_took_get_nothing() -> None:
    mixture = layer(router="expert-choice", capacity_factor=0.5)
    with torch.no_grad():
        out = mixture(torch.randn(2, 16, 6))
    covered = routing_of(mixture).taken.any(-1)
    assert 0 < covered.sum() < covered.numel()
    assert (out[~covered] == 0).all()
    assert (out[covered] != 0).any(-1).all()


@pytest.mark.parametrize("choice", CHOICES[1:4:2], ids=str)
def test_identical_experts_give_the_dense_bits_in_bfloat16(choice: dict[str, Any]) -> None:
    mixture = layer(identical=True, **choice).to(torch.bfloat16)
    x = torch.randn(4, 64, 6).to(torch.bfloat16)
    with torch.no_grad():
        out, dense = mixture(x), mixture.experts[0](x)
    covered = routing_of(mixture).taken.any(-1)
    assert routing_of(mixture).logits.dtype == torch.float32
    assert torch.equal(out[covered], dense[covered])


@pytest.mark.parametrize(
    ("k", "normalize", "learns"), [(1, True, False), (1, False, True), (2, True, True), (2, False, True)]
)
def test_one_expert_with_normalised_weights_teaches_the_router_nothing(k: int, normalize: bool, learns: bool) -> None:
    mixture = layer(router="top-k", num_experts_per_tok=k, normalize=normalize).train()
    mixture(torch.randn(2, 5, 6)).square().sum().backward()
    gradient = mixture.router.weight.grad
    assert gradient is not None
    assert (float(gradient.abs().max()) > 1e-4) == learns


def test_identical_experts_with_normalised_weights_teach_the_router_nothing_yet() -> None:
    mixture = layer(identical=True, router="top-k", num_experts_per_tok=2).double().train()
    mixture(torch.randn(2, 5, 6, dtype=torch.float64)).square().sum().backward()
    gradient = mixture.router.weight.grad
    assert gradient is not None
    assert float(gradient.abs().max()) < 1e-12


def test_idle_experts_have_zero_gradients_in_training() -> None:
    mixture = layer(router="top-k", num_experts_per_tok=1).train()
    mixture(torch.randn(1, 1, 6)).sum().backward()
    firsts: list[Any] = [next(expert.parameters()) for expert in mixture.experts]
    gradients = [float(parameter.grad.abs().sum()) for parameter in firsts]
    assert sum(gradient > 0 for gradient in gradients) == 1


def test_gradients_agree_with_finite_differences() -> None:
    mixture = layer(router="expert-choice", capacity_factor=2.0).double()
    assert torch.autograd.gradcheck(mixture, torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True))


def test_jitter_is_for_training_only() -> None:
    mixture = layer(router="top-k", num_experts_per_tok=2, normalize=False, jitter=0.5)
    x = torch.randn(1, 5, 6)
    mixture.eval()
    assert torch.equal(mixture(x), mixture(x))
    mixture.train()
    assert not torch.equal(mixture(x), mixture(x))


def test_autocast_leaves_the_router_in_float32() -> None:
    mixture, x = layer(router="top-k", num_experts_per_tok=2), torch.randn(2, 5, 6)
    expected = x @ mixture.router.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        mixture(x)
    torch.testing.assert_close(routing_of(mixture).logits, expected)


def test_a_layer_that_has_run_can_be_copied_and_pickled() -> None:
    mixture, x = layer(router="top-k", num_experts_per_tok=2).train(), torch.randn(1, 5, 6)
    expected = mixture(x)
    for twin in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
        assert twin.routing is None
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_is_read_off_attention_masks(dtype: torch.dtype) -> None:
    real = torch.tensor([[True, True, False], [False, True, True]])
    causal = torch.ones(3, 3).tril().bool()
    for allowed in (real[:, None, None, :].expand(2, 1, 3, 3), real[:, None, None, :] & causal):
        mask = allowed if dtype == torch.bool else torch.zeros(allowed.shape).masked_fill(~allowed, -3e38)
        assert torch.equal(moe.attended_tokens(mask), real)
    assert torch.equal(moe.attended_tokens(real.long()), real)


class Config:
    router_jitter_noise = 0.0

    def __init__(self, **entry: Any) -> None:
        self.moe_stacks = {"decoder": entry}


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"num_experts": None}, "lacks num_experts"),
        ({"colour": 1}, "has unknown fields: colour"),
        ({"num_experts": 0}, "num_experts is 0, and must be at least 1"),
        ({"router": "hash"}, "router is 'hash', and must be 'top-k' or 'expert-choice'"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, and must be from 1 to 4"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is 0, and must be from 1 to 4"),
        ({"router": "expert-choice"}, "capacity_factor is 0.0, and must be positive"),
        ({"group": "x"}, "group is 'x', and must be 'sequence' or 'batch'"),
        ({"kind": "x"}, "kind is 'x', and must be 'copy' or 'lora'"),
        ({"granularity": 0}, "granularity is 0, and must be at least 1"),
        (
            {"granularity": 2, "kind": "lora", "rank": 1, "alpha": 1},
            "granularity is 2, and kind 'lora' has one whole MLP",
        ),
        ({"kind": "lora"}, "rank is 0 and alpha 0.0, and kind 'lora' needs both"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_bad_options_are_refused_in_a_sentence(entry: dict[str, Any], sentence: str) -> None:
    config: Any = Config(**{"layers": [0], "num_experts": 4, "num_experts_per_tok": 2, **entry})
    with pytest.raises(ValueError, match=r"^moe_stacks\.decoder in config\.json.*\.$") as caught:
        moe.MoeOptions.of(config, "decoder")
    assert sentence in str(caught.value)
