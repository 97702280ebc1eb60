"""Low-rank adapters on the attention weights of a vision transformer, one pair a task:
W = W₀ + α/r · Σ_i B_i A_i.

Any tower with transformer blocks: open_clip's (``nn.MultiheadAttention`` and open_clip's own
``Attention``, with their fused ``in_proj_weight``), timm's fused ``qkv`` and separate
``q_proj``/``k_proj``/``v_proj`` layers. The weights are parametrised (torch.nn.utils.parametrize),
so every way of reading them, the fast paths of attention included, sees W. Sources: Hu et al. 2022
(LoRA, arXiv 2106.09685); Wu et al. 2025 (MACIL, arXiv 2502.07560): on K and V, B·A unscaled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipsteer.continual.adapters import (
    Adapted,
    LowRank,
    Site,
    attention_sites,
    spread_panels,
    write_adapter,
)
from clipsteer.io.doors import door
from clipsteer.io.files import FileFormatError
from clipsteer.io.kinds import Kind, read_kind, write_kind
from clipsteer.io.layout import Layout, Spec

__all__ = ["LoRA"]

VARIANTS = ("task", "shared", "shared_a")
_KIND = Kind("clipsteer-lora", 1, "a LoRA file")


def _check_config(rank: int, variant: str, targets: Sequence[str], alpha: float | None) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"LoRA: rank must be an int of at least 1, got {rank!r}")
    if variant not in VARIANTS:
        raise ValueError(f"LoRA: variant must be one of {VARIANTS}, got {variant!r}")
    if not targets or len(set(targets)) != len(targets) or not set(targets) <= set("qkv"):
        raise ValueError(f"LoRA: targets must be some of 'q', 'k', 'v', each once, got {targets!r}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"LoRA: alpha must be positive and finite, or None, got {alpha!r}")


class LoRA:
    """Adds a low-rank pair a task to the attention weights of ``module``, and trains the newest
    alone.

        lora = LoRA(model.visual, rank=32)
        lora.begin_task()
        optimizer = torch.optim.SGD(lora.parameters(), lr=0.01)

    Args:
        module: the tower. Changed in place: all of its parameters are frozen, its attention weights
            parametrised.
        rank: r of each pair, for each of the targets.
        variant: "task" (a pair A, B a task; earlier ones are frozen), "shared" (one pair for all
            tasks) or "shared_a" (a B a task, one A, which goes on training in each task as in the
            MACIL authors' code; so earlier tasks' products move with it).
        targets: which of "q", "k", "v". The rows of the others stay untouched.
        alpha: pairs are scaled by alpha / rank; None means 1.

    A is drawn uniformly (Kaiming, a = √5), B is 0. Pairs are float32 on 16-bit weights.
    ``copy.deepcopy`` of the module gives an independent tower. ``nn.MultiheadAttention`` reads its
    weight three to five times a forward pass; a pass under ``with
    torch.nn.utils.parametrize.cached():`` computes it once, gradients included.

    Attributes:
        tasks: how many have begun.

    Raises:
        ValueError: arguments out of range, no attention weights, or a module that has pairs
            already.
    """

    def __init__(
        self,
        module: nn.Module,
        rank: int = 32,
        variant: str = "task",
        targets: Sequence[str] = ("k", "v"),
        alpha: float | None = None,
    ) -> None:
        _check_config(rank, variant, targets, alpha)
        if any(isinstance(child, LowRank) for child in module.modules()):
            raise ValueError(
                "LoRA: this module has pairs already; merge them first, or go on with their LoRA"
            )
        self.module = module
        self.rank = rank
        self.variant = variant
        self.targets = tuple(targets)
        self.alpha = alpha
        self.sites = tuple(attention_sites(module, self.targets))
        if not self.sites:
            raise ValueError(
                f"LoRA: {type(module).__name__} has no numbered blocks with attention weights; "
                "looked for in_proj_weight, qkv and q_proj, k_proj, v_proj"
            )
        self.tasks = 0
        scaling = 1.0 if alpha is None else alpha / rank
        module.requires_grad_(False)
        for site in self.sites:
            owner = module.get_submodule(site.owner)
            adapter = LowRank(site.panels, site.chosen, scaling)
            parametrize.register_parametrization(owner, site.weight, adapter)

    def _chain(self, site: Site) -> parametrize.ParametrizationList:
        parametrizations = self.module.get_submodule(site.owner).parametrizations
        assert isinstance(parametrizations, nn.ModuleDict)
        chain = parametrizations[site.weight]
        assert isinstance(chain, parametrize.ParametrizationList)
        return chain

    def _adapter(self, site: Site) -> LowRank:
        return next(link for link in self._chain(site) if isinstance(link, LowRank))

    def _shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Of each A and B at the site."""
        rows, d = self._chain(site).original.shape
        m = len(site.chosen)
        return {"A": (m, self.rank, d), "B": (m, rows // site.panels, self.rank)}

    def _counts(self, tasks: int) -> dict[str, int]:
        """How many A and B there are after so many tasks."""
        at_most_one = min(tasks, 1)
        return {
            "A": tasks if self.variant == "task" else at_most_one,
            "B": at_most_one if self.variant == "shared" else tasks,
        }

    def _resize(self, tasks: int) -> None:
        """Keep the pairs of so many tasks, with zeros for those that are new; the newest trains."""
        counts = self._counts(tasks)
        for site in self.sites:
            adapter = self._adapter(site)
            W = self._chain(site).original
            dtype = torch.promote_types(W.dtype, torch.float32)
            for letter, shape in self._shapes(site).items():
                count = counts[letter]
                kept = list(getattr(adapter, letter))[:count]
                while len(kept) < count:
                    kept.append(nn.Parameter(torch.zeros(shape, dtype=dtype, device=W.device)))
                for parameter in kept[:-1]:
                    parameter.requires_grad_(False)
                    parameter.grad = None
                for parameter in kept[-1:]:
                    parameter.requires_grad_(True)
                setattr(adapter, letter, nn.ParameterList(kept))
        self.tasks = tasks

    def begin_task(self, generator: torch.Generator | None = None) -> list[nn.Parameter]:
        """Add what the variant adds for a task, unchanged in function, and return what now trains.

        generator: a CPU generator for A; by default torch's own.
        """
        self._check("begin_task")
        before = self._counts(self.tasks)["A"]
        self._resize(self.tasks + 1)
        if self._counts(self.tasks)["A"] > before:
            for site in self.sites:
                self._draw(self._adapter(site).A[-1], generator)
        return self.parameters()

    @torch.no_grad()
    def _draw(
        self,
        A: Tensor,  # (m, r, d)
        generator: torch.Generator | None,
    ) -> None:
        m, r, d = A.shape
        # on the CPU in float32: the same on every device
        drawn = torch.empty(m * r, d)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        A.copy_(drawn.view(A.shape))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains in the current task, for each block, by its name: two parameters a weight."""
        groups: dict[str, list[nn.Parameter]] = {}
        for site in self.sites:
            adapter = self._adapter(site)
            newest = [*adapter.A[-1:], *adapter.B[-1:]]
            groups.setdefault(site.block, []).extend(newest)
        return groups

    def parameters(self) -> list[nn.Parameter]:
        """All of what trains in the current task; nothing before the first ``begin_task``."""
        return [parameter for group in self.groups().values() for parameter in group]

    def state_dict(self) -> dict[str, Tensor]:
        """All pairs, detached: "<weight>.A.<i>" (m, r, d) and "<weight>.B.<i>" (m, s, r) for m
        targets; and "tasks"."""
        state = {"tasks": torch.tensor(self.tasks)}
        for site in self.sites:
            prefix = f"{site.owner}.{site.weight}"
            for name, parameter in self._adapter(site).named_parameters(prefix):
                state[name] = parameter.detach()
        return state

    def layout(self, tasks: int) -> Layout:
        """What ``state_dict`` is after so many tasks."""
        found = {"tasks": Spec(torch.int64, (), least=tasks, most=tasks)}
        counts = self._counts(tasks)
        for site in self.sites:
            dtype = torch.promote_types(self._chain(site).original.dtype, torch.float32)
            for letter, shape in self._shapes(site).items():
                for i in range(counts[letter]):
                    found[f"{site.owner}.{site.weight}.{letter}.{i}"] = Spec(dtype, shape)
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over pairs of a LoRA of the same settings on the same tower; the newest trains.

        Raises ValueError where tensors are missing, left over, or of another shape; then nothing
        is taken.
        """
        known = state.get("tasks")
        tasks = int(known) if known is not None and known.numel() == 1 else -1
        if tasks < 0 or max(self._counts(tasks).values()) > len(state):
            raise ValueError(
                f"LoRA.load_state_dict: expected the number of tasks in 'tasks', got {known}"
            )
        wanted = {name: spec.shape for name, spec in self.layout(tasks).items()}
        for name in sorted({*wanted, *state}):
            got = tuple(state[name].shape) if name in state else None
            if name not in wanted or got != wanted[name]:
                raise ValueError(
                    f"LoRA.load_state_dict: {name}: expected shape {wanted.get(name)}, got {got}"
                )
        self._resize(tasks)
        for name, parameter in self.state_dict().items():
            if name != "tasks":
                parameter.copy_(state[name])

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this LoRA on a module."""
        return {
            "rank": self.rank,
            "variant": self.variant,
            "targets": list(self.targets),
            "alpha": self.alpha,
        }

    def save(self, path: str | Path) -> None:
        """Write all pairs and the settings to a safetensors file."""
        write_kind(path, _KIND, self.state_dict(), {"config": self.config})

    @classmethod
    @door
    def load(cls, module: nn.Module, path: str | Path) -> LoRA:
        """Put what ``save`` wrote on an equal module, which is left as it was if that fails.

        Raises FileFormatError for another or a damaged file, ValueError for a module that the pairs
        do not fit.
        """
        state, values = read_kind(path, _KIND, allow_nan=False)
        try:
            config = json.loads(values.get("config", ""))
            _check_config(**config)
        except (TypeError, ValueError, RecursionError) as error:
            raise FileFormatError(f"{path}: {error}") from None
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        lora = cls(module, **config)
        try:
            lora.load_state_dict(state)
        except ValueError:
            lora.merge()
            for parameter in trained:
                parameter.requires_grad_(True)
            raise
        return lora

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Fold all pairs into plain, frozen weights and return the module; this LoRA is spent."""
        self._check("merge")
        for site in self.sites:
            owner = self.module.get_submodule(site.owner)
            # copies of a module share its injected class, from which removal takes the property:
            # give this one its own
            kind = type(owner)
            members = dict(vars(kind))
            members.pop("__dict__", None)
            members.pop("__weakref__", None)
            owner.__class__ = type(kind.__name__, kind.__bases__, members)
            parametrize.remove_parametrizations(owner, site.weight)
        self.sites = ()
        return self.module

    @torch.no_grad()
    def export_peft(self, folder: str | Path) -> None:
        """Write the sum of all pairs as an adapter: ``PeftModel.from_pretrained(tower, folder)``.

        A fused weight becomes one pair of the rank of all its pairs together, whose B is 0 in the
        rows of the others. Fused parameters of attention modules are "target_parameters", which
        PEFT has from 0.17 on; linear layers are "target_modules", for any PEFT.

        Raises ValueError before the first task, for separate K and V parameters in one
        ``nn.MultiheadAttention``, which PEFT cannot express, and for towers that mix fused and
        separate weights.
        """
        self._check("export_peft")
        if not self.tasks:
            raise ValueError("LoRA.export_peft: no task has begun, so there is nothing to export")
        adapted = []
        for site in self.sites:
            adapter = self._adapter(site)
            parts: list[Tensor] = list(adapter.B)  # (m, s, r) each
            # with one A for all: Σ_i B_i A = (Σ_i B_i) A
            if len(adapter.A) < len(parts):
                parts = [torch.stack(parts).sum(0)]
            wide = [spread_panels(B * adapter.scaling, site.panels, site.chosen) for B in parts]
            A = torch.cat(list(adapter.A)).flatten(0, 1)  # (m·r a pair, d)
            adapted.append(Adapted(site.owner, site.weight, A, torch.cat(wide, 1)))
        write_adapter(folder, adapted)

    def _check(self, call: str) -> None:
        if not self.sites:
            raise ValueError(f"LoRA.{call}: the pairs are merged; make a new LoRA to go on")
