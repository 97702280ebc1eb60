"""Low-rank adapters on the attention weights of a vision transformer, one pair a task: W = W₀ + α/r
· Σ_i B_i A_i.

Any tower with transformer blocks: open_clip's (``nn.MultiheadAttention`` and open_clip's own
``Attention``, with their fused ``in_proj_weight``), timm's fused ``qkv`` and separate
``q_proj``/``k_proj``/``v_proj`` layers. The weights are parametrised (torch.nn.utils.parametrize),
so every way of reading them, the fast paths of attention included, sees W. Sources: Hu et al. 2022
(LoRA, arXiv 2106.09685); Wu et al. 2025 (MACIL, arXiv 2502.07560): on K and V, B·A unscaled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clipsteer.io.files import FileFormatError, write_json, write_safetensors
from clipsteer.io.kinds import Kind, read_kind, write_kind

__all__ = ["LoRA"]

VARIANTS = ("task", "shared", "shared_a")
_KIND = Kind("clipsteer-lora", 1, "a LoRA file")


class _LowRank(nn.Module):
    """W (n·s, d) with the pairs' products added to the chosen ones of its n panels of s rows."""

    def __init__(self, panels: int, chosen: Sequence[int], scaling: float) -> None:
        super().__init__()
        self.panels, self.chosen, self.scaling = panels, tuple(chosen), scaling
        self.A, self.B = nn.ParameterList(), nn.ParameterList()  # each (m, r, d), each (m, s, r)

    def forward(self, W: Tensor) -> Tensor:
        if not len(self.B):
            return W
        wide = torch.promote_types(W.dtype, self.B[0].dtype)
        # a parametrisation may not change the dtype, and small updates would be lost in 16 bits
        with torch.autocast(W.device.type, enabled=False):
            parts = W.to(wide).unflatten(0, (self.panels, -1))
            moved = parts[list(self.chosen)]
            # one after the other: a new pair, whose B is 0, changes no bit
            for i, B in enumerate(self.B):
                moved = torch.baddbmm(
                    moved, B.to(wide), self.A[i % len(self.A)].to(wide), alpha=self.scaling
                )
            rows = [
                moved[self.chosen.index(i)] if i in self.chosen else part
                for i, part in enumerate(parts)
            ]
            return torch.cat(rows).to(W.dtype)


class _Site(NamedTuple):
    """A weight that pairs are added to: parameter ``weight`` of module ``owner``, part of
    ``block``."""

    owner: str
    weight: str
    block: str
    panels: int
    chosen: tuple[int, ...]


def _sites(module: nn.Module, targets: Sequence[str]) -> Iterator[_Site]:
    fused = (3, tuple("qkv".index(target) for target in targets))
    for name, child in module.named_modules():
        parts = name.split(".")
        block = ".".join(
            parts[: max((i + 1 for i, part in enumerate(parts) if part.isdecimal()), default=0)]
        )
        # poolers and the like stand outside of the numbered blocks
        if not block:
            continue
        projections = [getattr(child, f"{target}_proj", None) for target in targets]
        if isinstance(getattr(child, "in_proj_weight", None), Tensor):
            yield _Site(name, "in_proj_weight", block, *fused)
        elif isinstance(child, nn.MultiheadAttention):
            yield from (_Site(name, f"{target}_proj_weight", block, 1, (0,)) for target in targets)
        elif isinstance(getattr(child, "qkv", None), nn.Linear) and child.qkv.out_features % 3 == 0:
            yield _Site(f"{name}.qkv", "weight", block, *fused)
        elif all(isinstance(projection, nn.Linear) for projection in projections):
            yield from (
                _Site(f"{name}.{target}_proj", "weight", block, 1, (0,)) for target in targets
            )


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
        if any(isinstance(child, _LowRank) for child in module.modules()):
            raise ValueError(
                "LoRA: this module has pairs already; merge them first, or go on with their LoRA"
            )
        self.module, self.rank, self.variant, self.targets, self.alpha = (
            module,
            rank,
            variant,
            tuple(targets),
            alpha,
        )
        self.sites = tuple(_sites(module, self.targets))
        if not self.sites:
            raise ValueError(
                f"LoRA: {type(module).__name__} has no numbered blocks with attention weights; "
                f"looked for "
                "in_proj_weight, qkv and q_proj, k_proj, v_proj"
            )
        self.tasks = 0
        scaling = 1.0 if alpha is None else alpha / rank
        module.requires_grad_(False)
        for site in self.sites:
            adapter = _LowRank(site.panels, site.chosen, scaling)
            parametrize.register_parametrization(
                module.get_submodule(site.owner), site.weight, adapter
            )

    def _weight(self, site: _Site) -> tuple[_LowRank, Tensor]:
        chain = self.module.get_submodule(site.owner).parametrizations[site.weight]
        return next(link for link in chain if isinstance(link, _LowRank)), chain.original

    def _shapes(self, site: _Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
        (rows, d), m = self._weight(site)[1].shape, len(site.chosen)
        return (m, self.rank, d), (m, rows // site.panels, self.rank)

    def _counts(self, tasks: int) -> tuple[int, int]:
        """How many A and B there are after so many tasks."""
        one = min(tasks, 1)
        return {"task": (tasks, tasks), "shared": (one, one), "shared_a": (one, tasks)}[
            self.variant
        ]

    def _resize(self, tasks: int) -> None:
        for site in self.sites:
            adapter, W = self._weight(site)
            like = {"dtype": torch.promote_types(W.dtype, torch.float32), "device": W.device}
            for letter, shape, count in zip("AB", self._shapes(site), self._counts(tasks)):
                kept = list(getattr(adapter, letter))[:count]
                kept += [nn.Parameter(torch.zeros(shape, **like)) for _ in range(count - len(kept))]
                for i, parameter in enumerate(kept, 1):
                    parameter.requires_grad_(i == count)
                    parameter.grad = parameter.grad if i == count else None
                setattr(adapter, letter, nn.ParameterList(kept))
        self.tasks = tasks

    def begin_task(self, generator: torch.Generator | None = None) -> list[nn.Parameter]:
        """Add what the variant adds for a task, unchanged in function, and return what now trains.

        generator: a CPU generator for A; by default torch's own.
        """
        self._check("begin_task")
        fresh = self._counts(self.tasks + 1)[0] - self._counts(self.tasks)[0]
        self._resize(self.tasks + 1)
        for site in self.sites if fresh else ():
            A = self._weight(site)[0].A[-1]
            # drawn on the CPU in float32: the same on every device
            drawn = torch.empty(A.shape[0] * A.shape[1], A.shape[2])
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                A.copy_(drawn.view(A.shape))
        return self.parameters()

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What trains in the current task, for each block, by its name: two parameters a weight."""
        groups: dict[str, list[nn.Parameter]] = {}
        for site in self.sites:
            adapter = self._weight(site)[0]
            groups.setdefault(site.block, []).extend([*adapter.A[-1:], *adapter.B[-1:]])
        return groups

    def parameters(self) -> list[nn.Parameter]:
        """All of what trains in the current task; nothing before the first ``begin_task``."""
        return [parameter for group in self.groups().values() for parameter in group]

    def state_dict(self) -> dict[str, Tensor]:
        """All pairs, detached: "<weight>.A.<i>" (m, r, d) and "<weight>.B.<i>" (m, s, r) for m
        targets; and "tasks"."""
        state = {"tasks": torch.tensor(self.tasks)}
        for site in self.sites:
            pairs = self._weight(site)[0].named_parameters(f"{site.owner}.{site.weight}")
            state.update((name, parameter.detach()) for name, parameter in pairs)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over pairs of a LoRA of the same settings on the same tower; the newest trains. All
        or nothing.

        Raises ValueError where tensors are missing, left over, or of another shape.
        """
        tasks = int(state["tasks"]) if "tasks" in state and state["tasks"].numel() == 1 else -1
        if tasks < 0 or max(self._counts(tasks)) > len(state):
            raise ValueError(
                f"LoRA.load_state_dict: expected the number of tasks in 'tasks', got "
                f"{state.get('tasks')}"
            )
        wanted: dict[str, tuple[int, ...]] = {"tasks": ()}
        for site in self.sites:
            for letter, shape, count in zip("AB", self._shapes(site), self._counts(tasks)):
                wanted.update(
                    (f"{site.owner}.{site.weight}.{letter}.{i}", shape) for i in range(count)
                )
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
        flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        lora = cls(module, **config)
        try:
            lora.load_state_dict(state)
        except ValueError:
            lora.merge()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise
        return lora

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Fold all pairs into plain weights, frozen ones, and return the module; this LoRA is then
        spent."""
        self._check("merge")
        for site in self.sites:
            owner = self.module.get_submodule(site.owner)
            # copies of a module share its injected class, from which removal takes the property:
            # give this one its own
            kind = type(owner)
            own = {
                name: value
                for name, value in vars(kind).items()
                if name not in ("__dict__", "__weakref__")
            }
            owner.__class__ = type(kind.__name__, kind.__bases__, own)
            parametrize.remove_parametrizations(owner, site.weight)
        self.sites = ()
        return self.module

    @torch.no_grad()
    def export_peft(self, folder: str | Path) -> None:
        """Write the sum of all pairs as an adapter for PEFT: ``PeftModel.from_pretrained(tower,
        folder)``.

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
            adapter = self._weight(site)[0]
            As, Bs = list(adapter.A), list(adapter.B)
            if len(As) < len(Bs):
                Bs = [torch.stack(Bs).sum(0)]
            B = torch.cat(
                [panels(part * adapter.scaling, site.panels, site.chosen) for part in Bs], 1
            )
            adapted.append(Adapted(site.owner, site.weight, torch.cat(As).flatten(0, 1), B))
        write_adapter(folder, adapted)

    def _check(self, call: str) -> None:
        if not self.sites:
            raise ValueError(f"LoRA.{call}: the pairs are merged; make a new LoRA to go on")


class Adapted(NamedTuple):
    """W + B A for the parameter ``weight`` of the module ``owner``."""

    owner: str
    weight: str
    A: Tensor  # (r, d)
    B: Tensor  # (rows, r)


def panels(B: Tensor, count: int, chosen: Sequence[int]) -> Tensor:
    """B (m, s, r) of m targets as one matrix (count·s, m·r) that is 0 wherever a panel and a target
    do not meet."""
    m, s, r = B.shape
    whole = B.new_zeros(count, s, m, r)
    for j, panel in enumerate(chosen):
        whole[panel, :, j] = B[j]
    return whole.reshape(count * s, m * r)


def write_adapter(folder: str | Path, adapted: Sequence[Adapted]) -> None:
    """Write adapter_model.safetensors and adapter_config.json. Raises ValueError for what PEFT
    cannot express."""
    if any(each.weight not in ("weight", "in_proj_weight") for each in adapted):
        raise ValueError(
            "export_peft: PEFT adapts no separate K and V parameters of nn.MultiheadAttention"
        )
    ranks = {each.A.shape[0] for each in adapted}
    if len(ranks) > 1:
        raise ValueError(
            f"export_peft: fused and separate weights in one tower need several ranks, "
            f"{sorted(ranks)}"
        )
    rank = ranks.pop()
    tensors: dict[str, Tensor] = {}
    for each in adapted:
        tensors[f"base_model.model.{each.owner}.lora_A.weight"] = each.A
        tensors[f"base_model.model.{each.owner}.lora_B.weight"] = each.B
    # a parameter that is not a linear layer's is wrapped by its own name
    parameters = [f"{each.owner}.{each.weight}" for each in adapted if each.weight != "weight"]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [each.owner for each in adapted if each.weight == "weight"],
        "target_parameters": parameters or None,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config)
