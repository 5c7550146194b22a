"""What a draft model must get accepted: the drafting of SGLang written down again with plain modules, one sequence at a time.

SGLang drafts every kind alike, as an EAGLE head needs it: of a sequence x_0 ... x_n the draft model reads pairs (token p + 1,
hidden state p). So a draft that is a language model of its own (STANDALONE) never reads x_0, on any device, and proposes what
it would say of a sequence that starts with x_1.

Shape legend: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from runner.config.schema import ModelConfig

Propose = Callable[[list[int], int], list[int]]  # (tokens so far, how many) -> the tokens that are proposed to follow
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # tokens [T], hidden states before them [T, H] -> the draft's [T, H]


def greedy(policy: nn.Module, tokens: list[int], count: int) -> list[int]:
    """The `count` tokens that plain decoding gives."""
    sequence = list(tokens)
    for _ in range(count):
        with torch.no_grad():
            sequence.append(int(policy(torch.tensor([sequence])).logits[0, -1].argmax()))
    return sequence[len(tokens) :]


def standalone(draft: nn.Module) -> Propose:
    return lambda tokens, count: greedy(draft, tokens[1:], count)


def recurrent(policy: nn.Module, step: Step) -> Propose:
    """An EAGLE head or multi-token-prediction layer: after the first proposal it reads its own hidden state, not the policy's."""

    def propose(tokens: list[int], count: int) -> list[int]:
        with torch.no_grad():
            hidden_TH = policy.model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
            sequence = list(tokens)
            for _ in range(count):
                last_H = step(torch.tensor(sequence[1:]), hidden_TH)[-1]
                hidden_TH = torch.cat([hidden_TH, last_H[None]])
                sequence.append(int(policy.lm_head(last_H).argmax()))
        return sequence[len(tokens) :]

    return propose


def mtp_step(policy: Any) -> Step:
    """MiMo's layer. SGLang takes a zero embedding at position 0."""
    layer = policy.model.mtp_layers[0]

    def step(tokens_T: torch.Tensor, hidden_TH: torch.Tensor) -> torch.Tensor:
        embedded_TH = policy.model.embed_tokens(tokens_T).clone()
        embedded_TH[0] = 0
        rotary = policy.model.rotary_emb(embedded_TH[None], torch.arange(len(tokens_T))[None])
        return layer(hidden_TH[None], embedded_TH[None], rotary, _causal(len(tokens_T)))[0]

    return step


class EagleHead(nn.Module):
    """The draft that SGLang calls LlamaForCausalLMEagle (EAGLE, arXiv 2401.15077): a projection of [embedding of token p + 1,
    hidden state p] and a Llama layer without its first norm. Embedding and output layer are the policy's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, 0)])
        self.layers[0].input_layernorm = nn.Identity()
        self.rotary = LlamaRotaryEmbedding(config)

    @classmethod
    def random(cls, model: ModelConfig, seed: int) -> EagleHead:
        """For a policy of this size. The layer and the hidden state's part of the projection add little to the embedding."""
        config = LlamaConfig(
            hidden_size=model.hidden_size, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, vocab_size=model.vocab_size, max_position_embeddings=1024,
            tie_word_embeddings=False, attn_implementation="eager", architectures=["LlamaForCausalLMEagle"],
        )  # fmt: skip
        head, generator = cls(config), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in head.named_parameters():
                if not name.endswith("layernorm.weight"):
                    spread = 0.01 if name.startswith("fc.") else 0.05
                    weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
            head.fc.weight[:, : model.hidden_size] += torch.eye(model.hidden_size)
        return head.eval()

    def save(self, folder: Path) -> None:
        """As published: names without a prefix, no output layer."""
        self.config.save_pretrained(folder)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")

    def step(self, policy: Any) -> Step:
        def step(tokens_T: torch.Tensor, hidden_TH: torch.Tensor) -> torch.Tensor:
            joined = self.fc(torch.cat([policy.model.embed_tokens(tokens_T), hidden_TH], dim=-1))[None]
            rotary = self.rotary(joined, torch.arange(len(tokens_T))[None])
            return self.layers[0](joined, attention_mask=_causal(len(tokens_T)), position_embeddings=rotary)[0]

        return step


def _causal(length: int) -> torch.Tensor:
    return torch.full((1, 1, length, length), float("-inf")).triu(1)


def expected(prompt: list[int], response: list[int], room: int, propose: Propose, count: int) -> tuple[int, int, int]:
    """(engine steps, drafts accepted, drafts proposed) of one greedy sample of `room` tokens; `response` goes on after them as
    far as the last step may look. The first token comes from the prefill, without drafts."""
    steps = accepted = 0
    position = 1
    while position < room:
        proposed = propose([*prompt, *response[:position]], count)
        right = 0
        while right < count and proposed[right] == response[position + right]:
            right += 1
        steps, accepted, position = steps + 1, accepted + right, position + right + 1
    return steps, accepted, steps * count
