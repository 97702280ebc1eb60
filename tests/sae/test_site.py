"""Where an SAE sits: what its metadata say, and what is said when it is put elsewhere."""

from __future__ import annotations

import logging

from _command import run
from clipsteer import SAE, clip
from clipsteer.sae.site import find_site

HOOKS = [f"visual.transformer.resblocks.{i}" for i in (4, 2)]


def test_another_place_than_it_was_trained_at_is_told(caplog):
    model = clip.load()
    sae = SAE(192, 16, k=2, metadata={"hook_point": HOOKS[0]})
    with caplog.at_level(logging.WARNING):
        assert find_site(sae, model, None, None).hook_point == HOOKS[0]
        assert find_site(sae, model, "*resblocks.4", None).hook_point == HOOKS[0]
        assert caplog.text == ""
        assert find_site(sae, model, HOOKS[1], None).hook_point == HOOKS[1]
    assert f"trained at {HOOKS[0]}; here it is at {HOOKS[1]}" in caplog.text


def test_steering_elsewhere_is_told_too(caplog, capsys, tmp_path):
    sae = SAE(192, 16, k=2, metadata={"hook_point": HOOKS[0], "clip_model": "emojiclip"})
    sae.save_pretrained(tmp_path / "sae")
    call = ["sae", "steer", tmp_path / "sae", "--feature", "1=2", "--data", "emoji:noto:test", "--count", 1]
    with caplog.at_level(logging.WARNING):
        assert run(capsys, *call)[0] == 0
        assert "trained at" not in caplog.text
        assert run(capsys, *call, "--hook-point", HOOKS[1])[0] == 0
    assert f"trained at {HOOKS[0]}; here it is at {HOOKS[1]}" in caplog.text
