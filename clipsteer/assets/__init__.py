"""Where the bundled files lie; the scripts that made them are in benchmarks/emojiclip."""

from pathlib import Path

EMOJI = Path(__file__).parent / "emoji"
