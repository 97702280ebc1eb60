"""Where an SAE sits: what its metadata say, and what is said when it is put elsewhere."""

from __future__ import annotations

import logging

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
