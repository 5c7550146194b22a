"""Online training of multi-token-prediction (MTP) layers: drafts that follow the policy, which learns nothing from them.

Layer k sees, at position t, what layer k - 1 made of it (layer 0: the policy's hidden state) and the embedding of token
t + 1 + k, and predicts token t + 2 + k (DeepSeek-V3, arXiv 2412.19437, section 2.2). Hidden states, embedding and lm_head are
detached, and the layers have an optimizer, a gradient norm and a clip of their own: the policy's updates are the same bits
with and without this. The loss is the mean cross-entropy at temperature 1 over the response tokens that the samples' loss
masks count. Both trainers use this class; they differ in how hidden states are gathered and logprobs are computed.

Shape legend: B samples, T tokens of one, H hidden, N predictions laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from runner.config.schema import Config, ModelConfig, Role
from runner.data import Batch
from runner.models import family_of
from runner.models.family import Family, MtpLayers
from runner.trainer.optimizer import MasterOptimizer

Sequences = Sequence[tuple[torch.Tensor, int]]  # (tokens [T], prompt length) of each sample
Embed = Callable[[torch.Tensor], torch.Tensor]  # tokens [...] -> embeddings [..., H], without gradient
Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # hidden [N, H], targets [N] -> logprobs [N]; lm_head detached
Reduce = Callable[[torch.Tensor], None]  # sums a tensor over the ranks that have other samples, in place


def trained_online(cfg: Config) -> bool:
    """Whether MTP layers are trained along with the policy; otherwise they stay as they are."""
    return bool(cfg.speculative.online_training and cfg.model.num_mtp_layers)


def mtp_names(family: Family, model: ModelConfig) -> set[str]:
    """Parameters that are not the policy's. Its optimizer leaves them alone: a weight without gradient would still decay."""
    return {parameter.name for parameter in family.parameters(model) if parameter.role is Role.mtp}


class NoMtp:
    """The null object: no MTP layers, or none that are trained."""

    def begin(self, sequences: Sequences, masks: Sequence[torch.Tensor], predictions: int) -> None:
        return

    def learn(self, hidden: Callable[[], Sequence[torch.Tensor]], indices: Sequence[int]) -> None:
        return

    def update(self, lr: float) -> None:
        return

    def skip(self) -> None:
        return

    def reset_optimizer(self) -> None:
        return

    def take_metrics(self, prefix: str) -> dict[str, float]:
        return {}

    def kept(self) -> Iterator[torch.Tensor]:
        """For parking.py: what is trained, and how."""
        yield from ()

    def dropped(self) -> Iterator[torch.Tensor]:
        """Gradients."""
        yield from ()


class MtpTraining(NoMtp):
    """Trains `layers`, whose parameters hold bf16(master); `rotary` gives their position embeddings."""

    def __init__(
        self,
        cfg: Config,
        layers: Sequence[nn.Module],
        rotary: nn.Module,
        *,
        embed: Embed,
        score: Score,
        master_weights: bool,
        reduce: Reduce = lambda tensor: None,
    ) -> None:
        self.layers, self.rotary, self.embed, self.score, self.reduce = layers, rotary, embed, score, reduce
        self.prefix = layers_of(family_of(cfg.model)).prefix  # of the layers' parameters in a checkpoint
        self.coef = cfg.speculative.mtp_loss_coef
        named = [(f"{index}.{name}", p) for index, layer in enumerate(layers) for name, p in layer.named_parameters()]
        options = replace(cfg.trainer.optimizer, cpu_offload=False)  # few weights, whose gradients are reduced on their device
        self.optimizer = MasterOptimizer(named, options, master_weights=master_weights)
        self.device = named[0][1].device
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # negative logprobs, predictions
        self._norms: list[float] = []

    def kept(self) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            yield from layer.parameters()
        yield from self.optimizer.kept()

    def dropped(self) -> Iterator[torch.Tensor]:
        yield self.optimizer.gradient

    def begin(self, sequences: Sequences, masks: Sequence[torch.Tensor], predictions: int) -> None:
        """A new update: this rank's samples, their loss masks [R], and how many predictions the samples of all ranks make."""
        self._sequences, self._masks, self._predictions = sequences, masks, predictions

    def learn(self, hidden: Callable[[], Sequence[torch.Tensor]], indices: Sequence[int]) -> None:
        """Add the gradients of some of the update's samples. `hidden`: the policy's states behind its last norm, [T, H] each."""
        if not indices:
            return
        tokens = pad_sequence([self._sequences[i][0].to(self.device) for i in indices], batch_first=True).to(torch.int64)
        with torch.no_grad():
            state = pad_sequence([rows.detach() for rows in hidden()], batch_first=True)  # [B, T, H]
            positions = torch.arange(tokens.shape[1], device=self.device).unsqueeze(0)
            rotary = self.rotary(state, positions)
        loss = torch.zeros((), device=self.device)
        for depth, layer in enumerate(self.layers):
            with torch.no_grad():  # what comes from behind a sample's end is seen by no counted position
                following = self.embed(tokens.roll(-1 - depth, dims=1))
            state = layer(state, following, rotary)
            rows, targets = self._counted(tokens, indices, depth)
            if len(targets):
                loss = loss - self.score(state.flatten(0, 1)[rows], targets).sum()
                self._sums[1] += len(targets)
        self._sums[0] += loss.detach()
        if loss.requires_grad:
            (loss * (self.coef / self._predictions)).backward()

    def _counted(self, tokens: torch.Tensor, indices: Sequence[int], depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(places [N] in [B * T] of the states that predict counted response tokens, those tokens [N])."""
        places, targets, width = [], [], tokens.shape[1]
        for row, index in enumerate(indices):
            (_, prompt), mask = self._sequences[index], self._masks[index]
            wanted = prompt + mask.to("cpu", torch.bool).nonzero().squeeze(1)
            wanted = wanted[wanted >= 2 + depth].to(self.device)
            places.append(row * width + wanted - 2 - depth)
            targets.append(tokens[row, wanted])
        return torch.cat(places), torch.cat(targets)

    def update(self, lr: float) -> None:
        """One optimizer step of the layers, unless their gradient is not finite; collective where ranks share samples."""
        self.reduce(self.optimizer.gradient)
        norm = self.optimizer.grad_norm()
        self._norms.append(norm)
        if norm != norm or norm == float("inf"):
            self.optimizer.zero_grad()
            return
        self.optimizer.step(lr, norm)
        self.write()

    def skip(self) -> None:
        """The policy's update was not finite: this one is not made either."""
        self.optimizer.zero_grad()

    @torch.no_grad()
    def write(self) -> None:
        """masters -> weights."""
        for name, parameter in self.optimizer.params.items():
            if self.optimizer.has_masters:
                parameter.copy_(self.optimizer.masters[name])

    def reset_optimizer(self) -> None:
        self.optimizer.reset()

    def take_metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>/mtp_loss` in nats per prediction and `<prefix>/mtp_grad_norm` since the last call. Collective."""
        self.reduce(self._sums)
        total, count = self._sums.tolist()
        metrics = {f"{prefix}/mtp_loss": total / max(count, 1.0)}
        if self._norms:
            metrics[f"{prefix}/mtp_grad_norm"] = sum(self._norms) / len(self._norms)
        self._sums.zero_()
        self._norms = []
        return metrics

    # ---- checkpoints

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Masters and optimizer state; moments only after the first update."""
        masters = {f"master/{name}": tensor for name, tensor in self.optimizer.masters.items()}
        return masters | self.optimizer.state_tensors()

    def prepare_to_load(self, stepped: bool) -> None:
        """Make `state_tensors` name what a checkpoint holds: moments too if it was made after an update."""
        self.optimizer.prepare_to_load(stepped)

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_tensors`; KeyError naming what is missing."""
        for name, master in self.optimizer.masters.items():
            master.copy_(state[f"master/{name}"])
        self.optimizer.load_state_tensors(state)
        self.write()

    @torch.no_grad()
    def adopt_weights(self) -> None:
        """Masters from the layers' weights, moments from zero: a checkpoint of a run that did not train them."""
        for name, parameter in self.optimizer.params.items():
            self.optimizer.masters[name].copy_(parameter)
        self.optimizer.reset()


def predictions(cfg: Config, sequences: Sequences, masks: Sequence[torch.Tensor]) -> int:
    """How many counted tokens the MTP layers predict in all of these samples with loss masks [R]; 0 where none are trained."""
    counted = 0
    for (_, prompt), mask in zip(sequences, masks, strict=True) if trained_online(cfg) else ():
        for depth in range(cfg.model.num_mtp_layers):
            counted += int(mask[max(2 + depth - prompt, 0) :].sum())
    return counted


def sequences_of(batch: Batch) -> tuple[Sequences, list[torch.Tensor]]:
    """Sequences and loss masks of a batch, for `begin`."""
    return [(s.tokens, s.prompt_length) for s in batch.samples], [s.loss_mask for s in batch.samples]


def all_tokens(sequences: Sequences) -> list[torch.Tensor]:
    """Loss masks [R] of supervised samples: every response token counts."""
    return [torch.ones(len(tokens) - prompt, dtype=torch.bool) for tokens, prompt in sequences]


def build_layers(model: ModelConfig, attention: str, dtype: torch.dtype) -> tuple[list[nn.Module], nn.Module]:
    """(MTP layers with weights still to be filled, their rotary embedding), without the rest of the model."""
    from runner.models.published import checkpoint_config

    config = checkpoint_config(model)
    config._attn_implementation = attention
    layers, rotary = layers_of(family_of(model)).build(config)
    return [layer.to(dtype) for layer in layers], rotary


def layers_of(family: Family) -> MtpLayers:
    """How the family builds its MTP layers; only for a model that has some."""
    assert family.mtp is not None, f"{family.name} has parameters of role mtp and no layers for them"
    return family.mtp
