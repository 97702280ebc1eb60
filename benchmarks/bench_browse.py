"""How long a site of an SAE takes, how much memory and how many bytes, beside sae-dashboard.

    clipsteer sae train --out RUN --expansion 64 --k 32 --train-tokens 1.5e6 --batch-size 1024 --lr 1e-3
    python benchmarks/bench_browse.py site --sae RUN --out SITE
    python benchmarks/bench_browse.py peer --sae RUN --features 256

``site`` builds one of 2,000 of the bundled drawings. ``peer`` gives the activations of the same drawings to the
generator of sae-dashboard, which knows language models alone: a stand-in answers where it would run one, with what
was captured here, so that its time is that of the generator. Its unembedding has a random column for each drawing.
sae-dashboard is not installed with any extra; it wants older versions of what clipsteer takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import clipsteer
from clipsteer.data.dataset import spread
from clipsteer.sae import formats

HOOK = "visual.transformer.resblocks.4"
THEIR_HOOK = "blocks.4.hook_resid_post"


def measured(work: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "threads": torch.get_num_threads(),
    }


def drawings(count: int) -> Any:
    every = clipsteer.data.open_dataset("emoji")
    return every.subset(spread(range(len(every)), count))


def site(args: argparse.Namespace) -> dict[str, Any]:
    from clipsteer.browse import build_site

    sae = clipsteer.SAE.from_pretrained(args.sae)
    clip = clipsteer.load()
    found = measured(lambda: build_site(sae, clip, drawings(args.images), args.out, name="SAE", data_name="drawings"))
    files = [path for path in args.out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return {"features": sae.d_sae, "images": args.images, **found, "bytes": size, "files": len(files)}


def activations(count: int) -> Tensor:  # (N, T, d)
    from clipsteer.clip.hooks import harvest
    from clipsteer.clip.pixels import image_loader

    clip = clipsteer.load()
    images = drawings(count)
    rows = torch.cat(list(harvest(clip, image_loader(clip, images, 64), HOOK)))
    return rows.unflatten(0, (count, -1))


class StandIn(nn.Module):
    """What sae-dashboard asks of a HookedTransformer: a prompt's activations, by its number."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.hook_dict = {THEIR_HOOK: types.SimpleNamespace(ctx={})}
        self.W_U = torch.randn(x.shape[-1], len(x))  # tokens are numbers of pictures

    def run_with_hooks(self, tokens: Tensor, stop_at_layer: int, fwd_hooks: Any) -> Tensor:
        acts = self.x[tokens[:, 0]]
        for name, hook in fwd_hooks:
            hook(acts, self.hook_dict[name])
        return acts


def peer(args: argparse.Namespace) -> dict[str, Any]:
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner
    from sae_lens import SAE

    with tempfile.TemporaryDirectory() as folder:
        formats.export(clipsteer.SAE.from_pretrained(args.sae), Path(folder) / "sae", "saelens")
        sae = SAE.load_from_disk(str(Path(folder) / "sae"))
    sae.cfg.rescale_acts_by_decoder_norm = True  # they fold the norms in, which are 1 here
    x = activations(args.images)
    tokens = torch.arange(args.images)[:, None].expand(-1, x.shape[1]).clone()
    config = SaeVisConfig(
        hook_point=THEIR_HOOK, features=list(range(args.features)), minibatch_size_features=args.features,
        minibatch_size_tokens=256, device="cpu", dtype="float32",
    )  # fmt: skip
    found = measured(lambda: SaeVisRunner(config).run(encoder=sae, model=StandIn(x), tokens=tokens))
    return {"features": args.features, "images": args.images, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("site", "peer"))
    parser.add_argument("--sae", type=Path, required=True, metavar="RUN")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--features", type=int, default=256, help="of the peer")
    parser.add_argument("--out", type=Path, default=Path("bench-site"), metavar="DIR", help="of the site")
    args = parser.parse_args()
    found = {"site": site, "peer": peer}[args.what](args)
    found["cpu_ms_per_feature"] = 1000 * found["cpu_seconds"] / found["features"]
    sys.stdout.write(json.dumps({"what": args.what, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
