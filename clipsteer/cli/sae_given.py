"""What several actions of ``clipsteer sae`` are given: an SAE, its model, and images."""

from __future__ import annotations

import argparse
from typing import Any

from clipsteer.cli.arguments import (
    add_data,
    add_known_site,
    add_model,
    device_of,
    load_known,
)
from clipsteer.cli.images import open_images


def add_sae(
    p: argparse.ArgumentParser,
    images: str = "images to look at (default: the bundled held-out style)",
) -> None:
    """The arguments that ``open_sae`` reads."""
    p.add_argument(
        "sae", metavar="SAE", help="a folder, a Prisma .pt, or hf-hub:org/repo/subfolder"
    )
    add_model(p, None)
    add_data(p, images)
    add_known_site(p, "what the SAE was trained on")


def open_sae(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The SAE, the model it belongs to, and the images."""
    import clipsteer

    sae = clipsteer.SAE.from_pretrained(args.sae, device=device_of(args))
    clip = load_known(args, sae.metadata, args.sae)
    return sae, clip, open_images(args, args.data or "emoji", emoji="held-out:seen")
