"""The optimisation of one SAE, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipsteer.io.layout import Layout, Spec, check_layout, layout_of
from clipsteer.sae import losses as sae_loss
from clipsteer.sae import parallel
from clipsteer.sae.adam import Rows, UnitRowAdam, takes_row_sparse
from clipsteer.sae.config import TRAINABLE, Births, TrainConfig
from clipsteer.sae.encoding import takes_codes, with_values
from clipsteer.sae.model import SAE
from clipsteer.sae.resampling import resample, wake
from clipsteer.sae.revival import Revival, revival
from clipsteer.sae.shard import Shard, is_spread
from clipsteer.training.resume import strided_like
from clipsteer.training.schedule import seed_of
from clipsteer.training.world import World

METRICS = ("loss", "fvu", "l0", "dead", "auxk")


class SAETrainer:
    """The optimisation of one SAE, step by step; ``train_sae`` adds data, checkpoints and logging.

    Args:
        sae: trained in place, on its device; with ``shard_features`` and several processes it
            may be a ``Shard``, or its part is copied, and is ``self.sae``.
        config: its SAE settings (d_sae, k, …) are not looked at.
        total_steps: for the learning rate.
    """

    def __init__(
        self, sae: SAE, config: TrainConfig, total_steps: int, world: World | None = None
    ) -> None:
        if sae.architecture not in TRAINABLE:
            raise ValueError(
                f"train_sae: architecture must be one of {TRAINABLE}, got {sae.architecture!r}"
            )
        if sae.d_out is not None:
            config = config.for_transcoder()
        config = config.fitted(total_steps, sae.config["d_sae"])
        self.config = config
        self.total_steps = total_steps
        self.device = sae.W_enc.device
        self.world = world if world is not None else World(self.device)
        if config.shard_features and self.world.size > 1 and not isinstance(sae, Shard):
            sae = Shard.of(sae, self.world)
        self.sae = sae.train()
        self.step_count = 0
        self.optimizer = UnitRowAdam(sae, config.peak_lr)
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=self.device)
        self.dead = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.asleep = torch.zeros(sae.d_sae, dtype=torch.bool, device=self.device)
        # those of all processes
        self._n_dead: int | None = None
        self.metrics = METRICS + tuple(f"fvu_{size}" for size in (sae.matryoshka or ())[:-1])
        self._weighs_norms = not sae.has_unit_rows and sae.architecture not in (
            "topk",
            "batch_topk",
        )
        by_default = "scaled_mse" if sae.architecture in ("relu", "gated") else "fvu"
        self._loss = by_default if config.loss == "auto" else config.loss
        on_gpu = self.device.type == "cuda"
        bf16 = config.autocast == "bfloat16" or (config.autocast == "auto" and on_gpu)
        self._autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if bf16:
            self._autocast = partial(torch.autocast, self.device.type, torch.bfloat16)
        self._sparse = takes_row_sparse(sae.W_enc) and takes_row_sparse(sae.W_dec)
        # autocast rounds the products of AuxK, too
        self._revives = self.world.size == 1 and not bf16

    @cached_property
    def plan(self) -> parallel.Sums:
        """How the processes share the work; all of them ask for it together, at the first step."""
        # they must go the same way
        self._sparse = not self.world.any(not self._sparse)
        if isinstance(self.sae, Shard):
            return parallel.Features(self.sae, self.world)
        if self._sparse and self.world.size > 1:
            return parallel.Codes(self.sae, self.world)
        # gradients are summed over processes as dense tensors
        self._sparse = self._sparse and self.world.size == 1
        return parallel.Sums(self.sae, self.world)

    @torch.no_grad()
    def _plan_for(self, x: Tensor) -> parallel.Sums:
        """How the processes share this step: where most features are active, codes are longer than
        the dictionaries."""
        free = self.sae.architecture not in ("topk", "batch_topk")
        if not isinstance(self.plan, parallel.Codes) or not free:
            return self.plan
        dense = not takes_codes(x) or self.sae.mostly_active(self.sae._centred(x)[0])
        return parallel.Sums(self.sae, self.world) if self.world.any(dense) else self.plan

    def step(
        self,
        x: Tensor,  # (B, d_in)
        target: Tensor | None = None,  # (B, d_out) for a transcoder
    ) -> Tensor:  # (5 + prefixes before the last,)
        """One optimisation step on this process's rows x (B, d_in).

        Returns ``metrics``: loss, FVU, L0 and AuxK, this process's shares (which add up over the
        processes), the dead share divided by the number of processes, and the FVU of each prefix
        before the last. They stay on the device.
        """
        sae = self.sae
        config = self.config
        auxk = config.auxk
        if self.step_count % config.sync_every == 0:
            dead = self.tokens_since_fired > (config.dead_after or 0)
            self.dead = (dead & ~self.asleep).nonzero().flatten()
            self._n_dead = None
        if self._n_dead is None:
            self._n_dead = self.plan.place(self.dead)[1]
        x = x.to(self.device, sae.W_enc.dtype, non_blocking=True)
        if (target is None) != (sae.d_out is None):
            raise ValueError(f"SAETrainer.step: a target is needed with d_out, here {sae.d_out}")
        y = x if target is None else target.to(self.device, x.dtype, non_blocking=True)
        if self.step_count == 0 and sae.has_unit_rows:
            sae.renormalize_decoder_()
        plan = self._plan_for(x)
        sparse = self._sparse and plan is self.plan
        x, y = plan.rows(x, y)
        stats = sae_loss.batch_stats(y, plan.view)
        scale = self._scale(x, stats, plan.view)
        aux = x.new_zeros(())
        revived = None
        with self._autocast(), plan.at_work():
            bandwidth = config.bandwidth * scale
            out = sae_loss.forward(sae, x, plan.view, sparse, bandwidth)
            if auxk and self._n_dead and sparse and self._revives:
                revived = revival(sae, x, out, stats, self.dead, y, auxk)
            elif auxk and self._n_dead:
                rows = sparse and out.indices is not None
                aux = sae_loss.auxk(sae, x, out, stats, self.dead, rows, y, self._n_dead)
            penalty = self._penalty(x, y, out, stats, plan, sparse)
        # the mean over prefixes
        loss = self._reconstruction(y, out.x_hats, stats) / len(out.x_hats)
        loss = loss + penalty + auxk * aux
        loss.backward()
        if revived is not None:
            aux = revived.loss
            loss = loss.detach() + auxk * aux
        self._update(config.lr_at(self.step_count, self.total_steps), scale, plan, revived)
        fired = sae_loss.fired(sae, out, plan.view)
        self.tokens_since_fired.add_(stats.count).masked_fill_(fired, 0)
        self.step_count += 1
        # two features a row
        wait = math.ceil(sae.config["d_sae"] / (2 * stats.count))
        births = config.births_at(self.step_count, self.total_steps, wait)
        if births is not None:
            self._resample(x, out, plan, births)
        with torch.no_grad():
            l0 = plan.total((out.acts > 0).sum()) / stats.count
            dead = (self.tokens_since_fired > (config.dead_after or 0)).sum() / sae.d_sae
            # this process's share
            dead = dead / self.world.size / plan.share
            *shorter, fvu = [sae_loss.fvu(y, x_hat, stats) for x_hat in out.x_hats]
            values = (loss, fvu, l0, dead, aux, *shorter)
            return plan.share * torch.stack([value.detach().float() for value in values])

    def _resample(
        self,
        x: Tensor,  # (B, d_in)
        out: sae_loss.TrainingOutput,
        plan: parallel.Sums,
        births: Births,
    ) -> None:
        """Let those features start anew that were not active for too long."""
        silent = self.tokens_since_fired > (self.config.resample_after or 0)
        if births == "wake":
            wake(self.sae, self.asleep, ~silent, plan)
            self.tokens_since_fired.masked_fill_(self.asleep, 0)
            self.asleep.fill_(False)
            return
        dead = (silent & ~self.asleep).nonzero().flatten()
        seed = seed_of(self.config.seed, "resample", self.step_count)
        asleep = self.asleep if births == "asleep" else None
        anew = resample(self.sae, self.optimizer, dead, x, out, plan, seed, asleep)
        if asleep is None:
            self.tokens_since_fired.index_fill_(0, anew, 0)
            return
        asleep.index_fill_(0, anew, True)
        self.dead = self.dead[~asleep[self.dead]]
        self._n_dead = None

    def _reconstruction(self, x: Tensor, x_hat: Tensor, stats: sae_loss.BatchStats) -> Tensor:
        of = sae_loss.fvu if self._loss == "fvu" else sae_loss.scaled_mse
        return of(x, x_hat, stats)

    def _penalty(
        self,
        x: Tensor,  # (B, d_in)
        y: Tensor,  # x, or a transcoder's target (B, d_out)
        out: sae_loss.TrainingOutput,
        stats: sae_loss.BatchStats,
        plan: parallel.Sums,
        sparse: bool,
    ) -> Tensor:
        """What makes the codes of an architecture without k sparse. Penalties are weighted by the
        norms of decoder rows where these are free."""
        config = self.config
        total = plan.total
        if self.sae.architecture == "relu":
            norms = sae_loss.decoder_norms(self.sae, out, sparse)
            return config.l1_coefficient * total(sae_loss.l1(out.acts, stats, norms))
        if out.gate is None:
            return x.new_zeros(())
        if config.l0_penalty == "step" and self.sae.architecture == "jumprelu":
            return config.l0_coefficient * total(out.gate.sum()) / stats.count
        norms = sae_loss.decoder_norms(self.sae, out, sparse)
        if self.sae.architecture == "gated":
            # the gates learn from what they alone would reconstruct (Rajamanoharan et al. 2024,
            # arXiv 2404.16014, equation 8)
            by_gates = self.sae.decode(with_values(out.codes, out.gate), out.stats, frozen=True)
            by_gates = self.sae.with_skip(by_gates, x, frozen=True)
            found = self._reconstruction(y, by_gates, stats)
            return found + config.l1_coefficient * total(sae_loss.l1(out.gate, stats, norms))
        return config.l0_coefficient * total(sae_loss.tanh_l0(out.acts, stats, norms))

    def _scale(
        self,
        x: Tensor,  # (B, d_in)
        stats: sae_loss.BatchStats,  # of what is to be reconstructed
        world: World,
    ) -> Tensor:
        """() How long the rows are that are encoded: a row of W_enc that moves by 1 moves its
        pre-activations by so much. jumprelu's thresholds are as many of it as in the papers, where
        rows are scaled to 1."""
        sae = self.sae
        if sae.normalize != "none":
            return stats.total_variance.new_tensor(sae.d_in).sqrt()
        if sae.d_out is not None and sae.architecture == "jumprelu":
            stats = sae_loss.batch_stats(x, world)
        return (stats.total_variance / stats.count).sqrt()

    def _update(
        self,
        lr: float,
        scale: Tensor,  # ()
        plan: parallel.Sums,
        revived: Revival | None = None,
    ) -> None:
        named = dict(self.sae.named_parameters())
        # the rows of the batch, and those of dead features or of penalised norms
        joined = bool(self.config.auxk and len(self.dead)) and revived is None
        joined = joined or self._weighs_norms
        for parameter in named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse and joined:
                parameter.grad = parameter.grad.coalesce()
        more: dict[Tensor, Rows] = {}
        if revived is not None:
            more = revived.add_to(self.sae)
        there = [p.grad for p in named.values() if p.grad is not None]
        plan.sum_gradients(there)
        factor = None
        clip = self.config.grad_clip
        assert clip != "auto"
        if clip is not None:
            grads = [grad._values() if grad.is_sparse else grad for grad in there]
            spread = [is_spread(name, p) for name, p in named.items()]
            grads += [rows.values for rows in more.values()]
            norm = plan.norm(grads, spread)
            factor = (clip / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.set_lr(lr, scale)
        self.optimizer.step(factor=factor, more=more)
        self.optimizer.zero_grad(set_to_none=True)
        if self.sae.architecture == "jumprelu":
            # below 0 it would let negative activations through
            with torch.no_grad():
                self.sae.threshold.clamp_(min=0)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that changes from step to step: weights, both moments, dead-feature counts,
        generator states."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            for moment in ("exp_avg", "exp_avg_sq"):
                value = state.get(moment)
                if value is None:
                    value = torch.zeros_like(parameter)
                tensors[f"{moment}.{name}"] = value
        mask = torch.zeros(self.sae.d_sae, dtype=torch.uint8, device=self.device)
        tensors["tokens_since_fired"] = self.tokens_since_fired
        tensors["dead"] = mask.index_fill(0, self.dead, 1).masked_fill(self.asleep, 2)
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors

    def spread(self) -> set[str]:
        """The names of those of `state_tensors` of which this process has a part."""
        if not isinstance(self.sae, Shard):
            return set()
        own = dict(self.sae.state_dict())
        of_sae = {name for name in own if is_spread(name, own[name])}
        kinds = ("sae", "exp_avg", "exp_avg_sq")
        names = {f"{kind}.{name}" for kind in kinds for name in of_sae}
        return (names & self.state_tensors().keys()) | {"tokens_since_fired", "dead"}

    def state_layout(self) -> Layout:
        """What `state_tensors` of one process must be in a checkpoint; of one from a CPU no GPU's
        generator."""
        found = self._layout()
        for name in self.spread():
            rows, *others = found[name].shape
            found[name] = found[name]._replace(shape=(rows * self.world.size, *others))
        return found

    def _layout(self) -> Layout:
        found = layout_of(self.state_tensors())
        for name, spec in found.items():
            if name.startswith("exp_avg_sq."):
                # a square may overflow; it divides, so nothing moves then
                found[name] = spec._replace(least=0.0, most=torch.inf, any_value=False)
            elif name.startswith("exp_avg."):
                found[name] = spec._replace(any_value=False)
        found["tokens_since_fired"] = found["tokens_since_fired"]._replace(least=0)
        # 1: what AuxK is for, 2: asleep
        found["dead"] = found["dead"]._replace(least=0, most=2)
        gpu = found.get("rng.cuda", Spec(torch.uint8, (16,)))
        return found | {"rng.cuda": gpu._replace(optional=True)}

    def generators(self) -> dict[str, torch.device]:
        """torch's generators whose states are kept, and their devices."""
        found = {"rng.cpu": torch.device("cpu")}
        if self.device.type == "cuda":
            found["rng.cuda"] = self.device
        return found

    def load_state_tensors(self, tensors: dict[str, Tensor], step: int) -> None:
        """Undo ``state_tensors``; torch's generators are set too.

        Raises FileFormatError for other tensors, before any is taken: a fused optimiser looks at
        no shape.
        """
        check_layout(Path(f"state of step {step}"), tensors, self._layout())
        self.sae.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("sae.")})
        device = self.device if self.device.type == "cuda" else "cpu"
        for name, parameter in self.sae.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(step, dtype=torch.float32, device=device),
                "exp_avg": strided_like(parameter, tensors[f"exp_avg.{name}"]),
                "exp_avg_sq": strided_like(parameter, tensors[f"exp_avg_sq.{name}"]),
            }
        self.tokens_since_fired = tensors["tokens_since_fired"].to(self.device)
        dead = tensors["dead"].to(self.device)
        self.dead = (dead == 1).nonzero().flatten()
        self.asleep = dead == 2
        self._n_dead = None
        self.step_count = step
        torch.set_rng_state(tensors["rng.cpu"].cpu())
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"].cpu(), self.device)
