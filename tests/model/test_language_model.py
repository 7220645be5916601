"""The whole model against a plain float64 one written from the formulas, on the same weights."""

import math

import pytest
import torch

from tests.distributed.cases import merged, tokens_of
from tests.model.layers import config_of, model_of

SMALL = {
    "model": {
        "num_layers": 2,
        "num_query_groups": 2,
        "sequence_length": 16,
        "init_std": 0.15,
        "ffn_hidden_size": 80,
        "rotary_base": 500,
    },
    "moe": {
        "num_experts": 6,
        "num_null_experts": 4,
        "router": {"balance": {"type": "none"}, "z_loss_coefficient": 0.0},
    },
}


class Plain:
    """The formulas, one head, one token and one expert at a time, with Megatron's names for the weights."""

    def __init__(self, model, config):
        self.config = config
        self.weights = {
            name.removeprefix("gpt."): parameter.detach().double().requires_grad_()
            for name, parameter in model.named_parameters()
        }

    def norm(self, x, name):
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.config.model.norm_epsilon) * self.weights[name]

    def rotate(self, x):
        """(S, D): the first half of a head pairs with the second."""
        length, width = x.shape
        rows = []
        for position in range(length):
            turned = [None] * width
            for pair in range(width // 2):
                angle = position * self.config.model.rotary_base ** (-2 * pair / width)
                first, second = x[position, pair], x[position, pair + width // 2]
                turned[pair] = first * math.cos(angle) - second * math.sin(angle)
                turned[pair + width // 2] = second * math.cos(angle) + first * math.sin(angle)
            rows.append(torch.stack(turned))
        return torch.stack(rows)

    def attention(self, x, layer):
        """(S, H). The rows of the joint projection are, for each group: its query heads, its key, its value."""
        model = self.config.model
        groups, width = model.num_query_groups, model.head_dim or model.hidden_size // model.num_attention_heads
        per_group = model.num_attention_heads // groups
        projected = x @ self.weights[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"].t()
        if model.qkv_bias:
            projected = projected + self.weights[f"decoder.layers.{layer}.self_attention.linear_qkv.bias"]
        heads = iter(projected.split(width, 1))
        all_queries, all_keys, values = [], [], []
        for _ in range(groups):
            all_queries += [next(heads) for _ in range(per_group)]
            all_keys.append(next(heads))
            values.append(next(heads))
        all_queries = [self.rotate(head) for head in self.normed_heads(all_queries, layer, "q")]
        all_keys = [self.rotate(head) for head in self.normed_heads(all_keys, layer, "k")]
        results = []
        for group in range(groups):
            key, value = all_keys[group], values[group]
            for query in all_queries[group * per_group : (group + 1) * per_group]:
                scores = query @ key.t() / math.sqrt(width)
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
                results.append(scores.softmax(dim=-1) @ value)
        return torch.cat(results, dim=1) @ self.weights[f"decoder.layers.{layer}.self_attention.linear_proj.weight"].t()

    def normed_heads(self, heads, layer, which):
        name, kind = f"decoder.layers.{layer}.self_attention.{which}_layernorm.weight", self.config.model.qk_norm
        if kind == "head":
            return [self.norm(head, name) for head in heads]
        return list(self.norm(torch.cat(heads, dim=1), name).split(heads[0].shape[1], 1)) if kind == "all" else heads

    @staticmethod
    def swiglu(x, first, second):
        gate, up = (first @ x).chunk(2)
        return second @ (gate * torch.sigmoid(gate) * up)

    def experts(self, x, layer):
        prefix, moe = f"decoder.layers.{layer}.mlp.", self.config.moe
        null = self.weights[f"{prefix}router.null_weight"]
        null = null.expand(moe.num_null_experts, -1)
        scores = x @ torch.cat([self.weights[f"{prefix}router.weight"], null]).t()
        rows = []
        for token in range(x.shape[0]):
            chosen = sorted(range(scores.shape[1]), key=lambda a, token=token: -float(scores[token, a]))[: moe.top_k]
            true = [expert for expert in chosen if expert < moe.num_experts]
            among = {
                "true_experts": true,
                "all_selected": chosen,
                "all_true": range(moe.num_experts),
                "none": range(scores.shape[1]),
            }[moe.router.normalize]
            output = x[token] * 0
            for expert in true:
                weight = scores[token, expert].exp() / sum(scores[token, other].exp() for other in among)
                output = output + weight * self.swiglu(
                    x[token],
                    self.weights[f"{prefix}experts.weight1"][expert],
                    self.weights[f"{prefix}experts.weight2"][expert],
                )
            rows.append(output)
        return torch.stack(rows)

    def shared(self, x, layer):
        prefix = f"decoder.layers.{layer}.mlp.shared_experts."
        first, second = self.weights[f"{prefix}linear_fc1.weight"], self.weights[f"{prefix}linear_fc2.weight"]
        outputs = torch.stack([self.swiglu(row, first, second) for row in x])
        if self.config.moe.shared_expert_gate:
            outputs = outputs * torch.sigmoid(x @ self.weights[f"{prefix}gate_weight"].t())
        return outputs

    def dense(self, x, layer):
        prefix = f"decoder.layers.{layer}.mlp."
        first, second = self.weights[f"{prefix}linear_fc1.weight"], self.weights[f"{prefix}linear_fc2.weight"]
        return torch.stack([self.swiglu(row, first, second) for row in x])

    def losses(self, tokens):
        """(S,) of one window of S + 1 tokens."""
        x = self.weights["embedding.word_embeddings.weight"][tokens[:-1]]
        for layer in range(self.config.model.num_layers):
            x = x + self.attention(self.norm(x, f"decoder.layers.{layer}.input_layernorm.weight"), layer)
            normed = self.norm(x, f"decoder.layers.{layer}.pre_mlp_layernorm.weight")
            if (layer + 1) % self.config.moe.layer_frequency or layer in self.config.moe.dense_layers:
                x = x + self.dense(normed, layer)
                continue
            x = x + self.experts(normed, layer)
            if self.config.moe.shared_expert_hidden_size:
                x = x + self.shared(normed, layer)
        x = self.norm(x, "decoder.final_layernorm.weight")
        tied = self.config.model.tie_embeddings
        scores = x @ self.weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"].t()
        return torch.stack(
            [torch.logsumexp(row, 0) - row[label] for row, label in zip(scores, tokens[1:], strict=True)]
        )


@torch.no_grad()
def perturb_vectors(model):
    """Norms and biases start as ones and zeros, which a dropped or misplaced one would not show."""
    generator = torch.Generator().manual_seed(12)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe": {"router": {"normalize": "all_selected", "null_init": "shared"}}},
        {"moe": {"router": {"normalize": "none"}, "layer_frequency": 2, "shared_expert_hidden_size": 40}},
        {"model": {"tie_embeddings": True, "num_query_groups": 4}, "moe": {"experts": {"kernel": "sequential"}}},
        {
            "model": {"head_dim": 24, "qk_norm": "head", "qkv_bias": True},
            "moe": {"dense_layers": [0], "router": {"normalize": "all_true"}},
        },
        {
            "model": {"head_dim": 10, "qk_norm": "all"},
            "moe": {"shared_expert_hidden_size": 40, "shared_expert_gate": True, "dense_layers": [1]},
        },
    ],
    ids=["true_experts", "all_selected-shared_row", "none-dense-shared_expert", "tied-sequential", "qwen", "olmoe"],
)
def test_losses_and_gradients_are_those_of_the_formulas(changes):
    changes = merged(SMALL, changes)
    config, _ = config_of(changes)
    model = model_of(changes).train()
    perturb_vectors(model)
    tokens = tokens_of(0, 2, config.model.sequence_length)
    losses = model(tokens)
    plain = Plain(model, config)
    expected = torch.stack([plain.losses(window) for window in tokens])
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    losses.mean().backward()
    expected.mean().backward()
    compared = 0
    for name, parameter in model.named_parameters():
        reference = plain.weights[name.removeprefix("gpt.")].grad
        if "router.null_weight" in name and config.moe.router.normalize in ("true_experts", "all_true"):
            assert parameter.grad.count_nonzero() == 0
            continue
        assert float(reference.norm()) > 1e-4, f"{name} shows nothing"
        assert float((parameter.grad - reference).norm()) < 1e-4 * float(reference.norm()), name
        compared += 1
    assert compared >= 10


def test_logits_are_what_the_loss_is_computed_from():
    model = model_of(SMALL).train()
    tokens = tokens_of(0, 2, 16)
    scores = model.logits(tokens[:, :-1])
    losses = torch.nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(model(tokens).flatten(), losses)
