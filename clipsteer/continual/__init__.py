"""Continual learning: what keeps class prototypes and statistics true while a network changes."""
